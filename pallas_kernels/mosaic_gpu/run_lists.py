"""Heads whose blocks are listed: the lists of a call, and the streaming kernels over them."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.lowering import heads
from pallas_kernels.lowering import indexed
from pallas_kernels.lowering import indices
from pallas_kernels.lowering import lists
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.stream import formula


def forward(plan: Plan, group: Group, arrays: Arrays) -> tuple[Array, Array]:
  """out [B, T, Hg, Dv] and lse, base 2, in rows of the natural view."""
  blocks = group.kernels[0].forward_blocks
  frame = frame_of(plan, group, arrays, teams=blocks.teams)
  q = heads.take(arrays.q, group.heads)
  own = q, *arrays[1:5]
  return stream.forward_kernel(frame, *own, scale=factor(plan), blocks=blocks)


def backward(
  plan: Plan,
  group: Group,
  arrays: Arrays,
  out: Array | None,
  lse: Array,
  dout: Array | None,
  dlse: Array | None,
) -> tuple[Array, ...]:
  """dq [B, T, Hg, Dk]; dk and dv of key heads, or of the query heads; those of learned values.

  out, dout and dlse are of these heads.
  """
  (sweep,), options = group.kernels, dict(scale=factor(plan))
  frame = frame_of(plan, group, arrays, backward=True)
  if dlse is not None:
    dlse = sweep.view.rows(dlse)
    # lse may come from a streaming kernel, whose tiles are larger than those of a view.
    missing = lse.shape[-1] - dlse.shape[-1]
    dlse = jnp.pad(dlse, [(0, 0)] * 3 + [(0, missing)]) if missing else dlse
  q = heads.take(arrays.q, group.heads)
  own = frame, q, *arrays[1:5], lse
  of_dq = dict(out=out, dlse=dlse, blocks=sweep.dq_blocks)
  # dq first: it makes delta of out, which all that follows reads.
  dq, delta = stream.dq_kernel(*own, None, dout, **of_dq, **options)
  of_keys = stream.dkv_kernel(*own, delta, dout, **options, blocks=sweep.dkv_blocks)
  if not plan.scores.learned:
    return dq, *of_keys
  # A sweep of its own: few calls learn, and the others should not pay for it.
  rows = stream.dvalues_kernel(*own, delta, dout, **options, blocks=sweep.dq_blocks)
  return dq, *of_keys, *(x[:, :, 0, : plan.T].sum(axis=(0, 2)) for x in rows)


def factor(plan: Plan) -> float:
  """Of products, where logits are no more than that."""
  return 1.0 if "logits" in plan.extras else plan.scores.scale


def problem_of(plan: Plan, of_group: tuple[int, ...], num_cores: int = 1) -> lists.Problem:
  """What the lists of some heads depend on, dealt to so many."""
  return lists.Problem(
    B=plan.B,
    T=plan.T,
    S=plan.S,
    heads=of_group,
    group=plan.H // plan.Hkv,
    joined=len(of_group) == plan.H,  # some heads alone may not be whole groups
    num_cores=num_cores,
    own_scores="logits" in plan.extras,
  )


def listed_by(plan: Plan, arrays: Arrays, of_group: tuple[int, ...]) -> indexed.Indexed:
  """The blocks that are listed for some heads."""
  each = indices.per_query_head(plan, arrays.block_indices)
  each = each[:, list(of_group)] if each.shape[1] > 1 else each
  return indexed.Indexed(indices=each, block_size=plan.block_size, query_block=plan.query_block)


def entries_of(plan: Plan, arrays: Arrays, problem: lists.Problem) -> indexed.Entries:
  """The entries of the lists of a call."""
  listed, segments = listed_by(plan, arrays, problem.heads), arrays[3:5]
  return indexed.entries(listed, plan.pattern, problem, _with_bits(plan, problem.heads), segments)


def _with_bits(plan: Plan, of_group: tuple[int, ...]) -> bool:
  """Whether masks are bits, one in memory for every block: where no formula gives the pairs."""
  return not stream.formulas(plan.pattern, of_group)[0]


def frame_of(
  plan: Plan, group: Group, arrays: Arrays, *, teams: int = 1, backward: bool = False
) -> stream.Frame:
  """The lists, dealt to so many teams per core."""
  own_scores, of_group = "logits" in plan.extras, group.heads
  values = formula.values(plan.scores, plan.H, arrays.held)
  problem = problem_of(plan, of_group, teams * gpu.num_multiprocessors())
  with_bits, by_keys, parts = _with_bits(plan, of_group), None, (None, None)
  own = plan.pattern, problem, with_bits
  # Lists of patterns alone are made once, by numpy; all others are made where the call runs.
  if arrays.block_indices is not None:
    of_queries = indexed.of_queries(problem, plan.block_size)
    of = entries_of(plan, arrays, of_queries)
    alike = arrays.segment_ids is None  # documents cut some short
    by_queries = indexed.by_queries(of, plan.pattern, of_queries, with_bits, alike)
    parts = [indexed.parts_of(plan.query_block, plan.block_size, x) for x in (of_queries, problem)]
    if backward:
      whole = of if of_queries == problem else entries_of(plan, arrays, problem)
      by_keys = indexed.by_keys(whole, *own)
    problem = of_queries
  elif arrays.segment_ids is None and arrays.block_mask is None:
    by_queries = lists.by_queries(*own)
    if backward:
      by_keys = lists.by_keys(*own)
  else:
    masks = arrays.block_mask, plan.block_size, arrays.segment_ids, arrays.kv_segment_ids
    visits = lists.masked(lists.of_pattern(plan.pattern, problem), *masks, of_group)
    by_queries = lists.traced_by_queries(visits, *own)
    if backward:
      by_keys = lists.traced_by_keys(visits, *own)
  return stream.frame_of_lists(
    plan.pattern,
    problem,
    by_queries,
    by_keys,
    segments=plan.segment_ids,
    scores=plan.scores if own_scores else None,
    values=values,
    parts=parts,
  )
