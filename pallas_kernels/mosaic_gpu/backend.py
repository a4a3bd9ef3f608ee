"""The backend protocol on Hopper GPUs: groups of heads, each by the kernels that suit it.

Sequences that fit in shared memory and windows have kernels that the memory system bounds
(resident/, window/), all else streams (stream/). The passes of a union are one softmax: each takes
up where the one before ended, and adds to its gradients.
"""

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import functions
from pallas_kernels.lowering import heads
from pallas_kernels.lowering import indexed
from pallas_kernels.lowering import lists
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import groups
from pallas_kernels.mosaic_gpu import run_lists
from pallas_kernels.mosaic_gpu import run_passes
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.mosaic_gpu.views import View

HEAD_SIZES = (32, 64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")


def unsupported(plan: Plan) -> str | None:
  """Why these kernels cannot compute this, and what they can; None where they can."""
  if plan.dtype.name not in DTYPES:
    return f"mosaic_gpu: {plan.dtype.name} is not supported, {' and '.join(DTYPES)} are"
  if not {plan.Dk, plan.Dv} <= set(HEAD_SIZES):
    sizes = f"{plan.Dk} of k and {plan.Dv} of v"
    return f"mosaic_gpu: head sizes {sizes} are not both in {HEAD_SIZES}"
  if plan.block_mask is not None and plan.block_size % lists.BLOCK:
    block_size = plan.block_size
    return f"mosaic_gpu: a block mask of {block_size=} is not supported, multiples of 128 are"
  if not isinstance(plan.B, int):
    return f"mosaic_gpu: a symbolic batch {plan.B} is not supported"
  if functions.holds(plan.pattern):
    return "mosaic_gpu: a predicate that holds traced arrays is not supported"
  if not formula.computes(plan.scores):
    return (
      "mosaic_gpu: this score_fn is not supported, those of operators and elements are, which may "
      "hold numbers and arrays with an entry per head, but look up nothing by position"
    )
  # Last, since it looks at all pairs: only lists whose pairs are no formula need bits.
  for group in groups.lowered(plan):
    if group.passes or stream.formulas(plan.pattern, group.heads)[0]:
      continue
    if lists.bits_of(plan.pattern, group.heads, plan.T, plan.S) is None:
      why = "its blocks have too many different masks"
      return f"mosaic_gpu: {plan.pattern} is not supported, {why}"
  return None


def takes_lists(plan: Plan) -> bool:
  """Multiples of tiles of queries and of keys; parts of them where a formula gives the pairs."""
  problem = run_lists.problem_of(plan, tuple(range(plan.H)))
  parts = indexed.parts_of(plan.query_block, plan.block_size, problem)
  of_queries = indexed.of_queries(problem, plan.block_size)
  # The sums of a step are of one block, and those of a mesh are `xla`'s.
  if plan.return_mass and (plan.sharded or plan.block_size < of_queries.keys):
    return False
  if not indexed.takes(plan.query_block, plan.block_size, problem):
    return False
  if parts is None or functions.holds(plan.pattern):  # which `unsupported` says
    return True
  return bool(stream.formulas(plan.pattern, problem.heads)[0])


def planned(plan: Plan) -> Plan:
  """With the kernels of all heads, and their sizes."""
  return dataclasses.replace(plan, groups=groups.groups_of(plan))


def forward(plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T H Dv"], tuple[Array, ...]]:
  """Result and log-sum-exp, of every group of heads as its kernel left it."""
  # The log-sum-exp stays as its kernel wrote it: who wants the natural one pays for the copy.
  results = (_runner(group).forward(plan, group, arrays) for group in plan.groups)
  outs, lses = zip(*results, strict=True)
  return _join(plan, outs), lses


def natural_lse(plan: Plan, residual: tuple[Array, ...]) -> Float[Array, "B T H"]:
  """The natural log-sum-exp, from what `forward` returned."""
  parts = []
  for group, lse in zip(plan.groups, residual, strict=True):
    # First the rows that fill tiles go, then the tokens that `padded` added.
    lse = _view(plan, group).restore(lse)
    parts.append(run_passes.cut(plan, group, lse) if group.passes else lse)
  return _join(plan, parts) * math.log(2)


def lse_of_natural(plan: Plan, lse: Float[Array, "B T H"]) -> tuple[Array, ...]:
  """What `forward` returned, from the natural log-sum-exp."""
  lse, residual = lse / math.log(2), []
  for group in plan.groups:
    part = heads.take(lse, group.heads)
    part = run_passes.padded(plan, group, part) if group.passes else part
    residual.append(_view(plan, group).rows(part))
  return tuple(residual)


def backward(
  plan: Plan,
  arrays: Arrays,
  out: Float[Array, "B T H Dv"],
  residual: tuple[Array, ...],
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
) -> Arrays:
  """Gradients of q, k, v, and of learned arrays by one more sweep over the keys."""
  grads = []
  for group, lse in zip(plan.groups, residual, strict=True):
    own = (None if x is None else heads.take(x, group.heads) for x in (out, dout, dlse))
    out_here, dout_here, dlse_here = own
    cotangents = out_here, lse, dout_here, dlse_here
    grads.append(_runner(group).backward(plan, group, arrays, *cotangents))
  dq, dk, dv = (_join(plan, parts) for parts in zip(*(x[:3] for x in grads), strict=True))
  # Where kernels have dk and dv for each query head: adding them up there would need atomics.
  dk, dv = (heads.sum_per_key_head(x, plan.Hkv).astype(x.dtype) for x in (dk, dv))
  if not plan.scores.learned:
    return plan.gradients(arrays, dq, dk, dv)
  (_, _, _, *of_values), *_ = grads  # scores with a function have one group
  return plan.gradients(arrays, dq, dk, dv, *_of_learned(plan, arrays, of_values))


def _of_learned(plan: Plan, arrays: Arrays, of_values: list[Array]) -> tuple[Array, ...]:
  """The gradients of learned arrays, from those of the values that kernels read."""
  scores, held = plan.scores, arrays.held

  def learned_values(*learned: Any) -> tuple:
    changed = dict(zip(scores.learned, learned, strict=True))
    values = formula.values(scores, plan.H, tuple(changed.get(n, x) for n, x in enumerate(held)))
    return tuple(values[n] for n in formula.learned(scores))

  # What turns learned arrays into values is cheap, and anything: JAX differentiates it.
  _, pull = jax.vjp(learned_values, *(held[n] for n in scores.learned))
  return pull(tuple(of_values))


def _runner(group: Group) -> ModuleType:
  """The module that runs a group."""
  return run_passes if group.passes else run_lists


def _view(plan: Plan, group: Group) -> View:
  """In whose rows the log-sum-exp of a group is."""
  return group.kernels[-1].view


def _join(plan: Plan, parts) -> Array:
  return heads.join(parts, [group.heads for group in plan.groups])
