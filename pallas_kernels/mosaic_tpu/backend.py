"""The backend protocol on TPUs: every pass is a list of blocks of some view, one kernel for all.

The passes of a union merge through their log-sum-exp; their gradients add up, since each uses the
log-sum-exp and delta of the whole softmax.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import functions
from pallas_kernels import patterns
from pallas_kernels.lowering import heads
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_tpu import launches
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu import views
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.patterns import Pattern

DTYPES = ("bfloat16", "float32")
# A pattern that is traced with one of these is no formula: it looks something up, or loops.
_LOOKUPS = ("gather", "dynamic_slice", "argmax", "sort", "scan", "while", "cond")


def unsupported(plan: Plan) -> str | None:
  """Why these kernels cannot compute this, and what they can; None where they can."""
  if plan.dtype.name not in DTYPES:
    return f"mosaic_tpu: {plan.dtype.name} is not supported, {' and '.join(DTYPES)} are"
  if max(plan.Dk, plan.Dv) > 256:
    return f"mosaic_tpu: head sizes {plan.Dk, plan.Dv} are not supported, those up to 256 are"
  if not isinstance(plan.B, int):
    return f"mosaic_tpu: a symbolic batch {plan.B} is not supported"
  score_fn = plan.scores.score_fn
  if functions.holds(plan.pattern) or (score_fn is not None and score_fn.places):
    return "mosaic_tpu: functions that hold arrays, and a traced scale, are not supported"
  if plan.heads_are_numbered:
    return "mosaic_tpu: a score_fn of head numbers is not supported where heads may be sharded"
  each = (view for group in planned(plan).groups for view in group.kernels)
  return next(filter(None, map(_unsupported_view, each)), None)


def _unsupported_view(view: views.View) -> str | None:
  pass_ = view.pass_
  if pass_.pattern is not None and not _is_formula(pass_.pattern):
    return f"mosaic_tpu: {pass_.pattern} is not supported, its pairs are no formula"
  if view.block is None:
    sizes = ", ".join(map(str, views.block_sizes(view.plan, pass_)))
    return f"mosaic_tpu: blocks of {sizes} are not supported, multiples of 8 that divide 512 are"
  if (words := view.words()) > steps.MOST:
    return f"mosaic_tpu: lists of {words:,} words exceed {steps.MOST:,} of scalar memory"
  return None


def takes_lists(plan: Plan) -> bool:
  """None: on a TPU a block mask says which blocks are read."""
  del plan
  return False


def planned(plan: Plan) -> Plan:
  """With a view for every pass of all heads."""
  groups = []
  for group in _lowered(plan):
    each = tuple(views.view_of(plan, group.heads, pass_) for pass_ in group.passes)
    groups.append(dataclasses.replace(group, kernels=each))
  return dataclasses.replace(plan, groups=tuple(groups))


def _lowered(plan: Plan) -> tuple[Group, ...]:
  """Heads and their passes; those that share keys, but not their summaries, apart."""
  # What speaks of positions, or differs in queries and keys, has one view.
  lowered = plan.lowered(natural=bool(plan.extras - {"logits"}))
  if plan.Hkv == plan.H:
    return lowered
  groups = []
  for group in lowered:
    num_starts = max(len(pass_.starts) or 1 for pass_ in group.passes)
    # Heads take turns among the starts, so that every num_starts-th head has the same.
    for n in range(min(num_starts, len(group.heads))):
      with_start = lambda pass_, n=n: dataclasses.replace(pass_, starts=pass_.starts[n : n + 1])
      passes = tuple(with_start(pass_) if pass_.starts else pass_ for pass_ in group.passes)
      groups.append(Group(group.heads[n::num_starts], passes))
  return tuple(groups)


def forward(plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
  """Result and natural log-sum-exp."""
  assert not arrays.held, "unsupported() refuses functions that hold arrays"
  parts = []
  for group in plan.groups:
    out, lse = launches.forward(group.kernels[0], arrays)
    # Each pass has a softmax of its own; the log-sum-exp of both says how they mix.
    for view in group.kernels[1:]:
      both, lse = heads.merge(out, lse, *launches.forward(view, arrays))
      out = both.astype(out.dtype)
    parts.append((out, lse))
  return tuple(_join(plan, x) for x in zip(*parts, strict=True))


def natural_lse(plan: Plan, residual: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
  """What `forward` returned."""
  del plan
  return residual


def lse_of_natural(plan: Plan, lse: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
  """What `forward` returned."""
  del plan
  return lse


def backward(
  plan: Plan,
  arrays: Arrays,
  out: Float[Array, "B T H Dv"],
  residual: Float[Array, "B T H"],
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
) -> Arrays:
  """Gradients of q, k and v, given those of the result and of its natural log-sum-exp or None."""
  assert not arrays.held, "unsupported() refuses functions that hold arrays"
  delta = _row_sums(out, dout)
  # d lse / d logits are the weights: its cotangent joins delta, which they are multiplied with too.
  delta = delta if dlse is None else delta - dlse
  # exp2(x - inf) is 0: rows without keys weigh nothing, as they must.
  empty = residual == -jnp.inf
  delta, lse = jnp.where(empty, 0.0, delta), jnp.where(empty, jnp.inf, residual)
  parts = []
  for group in plan.groups:
    rows = [heads.take(x, group.heads) for x in (dout, lse, delta)]
    grads = [launches.backward(view, arrays, *rows) for view in group.kernels]
    parts.append([_sum(x) for x in zip(*grads, strict=True)])
  dq, dk, dv = (_join(plan, x) for x in zip(*parts, strict=True))
  # Query heads of one key head may lie in several groups: their sum is made of all together.
  dk, dv = (heads.sum_per_key_head(x, plan.Hkv) for x in (dk, dv))
  return plan.gradients(arrays, *(x.astype(plan.dtype) for x in (dq, dk, dv)))


@functools.lru_cache(maxsize=256)
def _is_formula(pattern: Pattern) -> bool:
  """Whether a kernel can compute the pairs, but for layouts, which have tables."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    return all(map(_is_formula, pattern.patterns))
  if isinstance(pattern, patterns.BlockLayout):
    return True
  position = jax.ShapeDtypeStruct((8, LANES), jnp.int32)
  traced = jax.make_jaxpr(pattern.allowed)(position, position)
  # As text: a lookup may hide in any inner program.
  text = str(traced)
  return not traced.consts and not any(f" {name}[" in text for name in _LOOKUPS)


# ------------------------------------------------------------------------------------------ arrays


def _row_sums(a: Array, b: Array) -> Array:
  """The sums of a * b over the last axis, [B, T, H, D] -> [B, T, H], float32.

  Of heads that are no whole lanes as a product with ones: [B, T, H, D] of those in float32 would
  take many times its size.
  """
  B, T, H, D = a.shape
  if D % LANES == 0:
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=-1)
  flat = lambda x: x.reshape(B, T, H * D).astype(jnp.float32)
  ones = jnp.repeat(jnp.eye(H, dtype=jnp.float32), D, axis=0)
  return jnp.dot(flat(a) * flat(b), ones, precision=jax.lax.Precision.HIGHEST)


def _sum(parts: Any) -> Array:
  """In float32, where there are several."""
  if len(parts) == 1:
    return parts[0]
  return sum(x.astype(jnp.float32) for x in parts)


def _join(plan: Plan, parts: Any) -> Array:
  return heads.join(parts, [group.heads for group in plan.groups])
