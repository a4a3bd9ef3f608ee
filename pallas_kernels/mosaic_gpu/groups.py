"""Which kernel sweeps which heads: all that is chosen of a call before its arrays are looked at.

Heads whose passes are formulas of tiles have a `Sweep` for each of them; all others, and what
kernels do not know, are one group of lists of blocks.
"""

import dataclasses
import functools

from pallas_kernels import tuning
from pallas_kernels.lowering import indexed
from pallas_kernels.lowering import passes
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import sizes
from pallas_kernels.mosaic_gpu.sizes import Kernel
from pallas_kernels.mosaic_gpu.sizes import Sweep


def groups_of(plan: Plan) -> tuple[Group, ...]:
  """All heads, with what sweeps them: sweeps in the order they run forward, one of lists."""
  return _groups_of(plan, tuning.context())


@functools.lru_cache(maxsize=256)
def _groups_of(plan: Plan, context: tuple) -> tuple[Group, ...]:
  del context  # by which, besides the plan, the result is kept
  natural = Sweep(Pass(view="natural"), plan.T, plan.Dk, plan.Dv, plan.dtype)
  split = plan.block_indices is not None and indexed.splits(plan.block_size)
  blocks = sizes.listed(plan.Dk, plan.Dv, plan.segment_ids, split)
  of_lists = dataclasses.replace(natural, **blocks)
  return tuple(
    dataclasses.replace(group, kernels=_sweeps(plan, group) if group.passes else (of_lists,))
    for group in lowered(plan)
  )


def lowered(plan: Plan) -> tuple[Group, ...]:
  """Heads and their passes; one group without passes, the last, where lists of blocks suit."""
  every = tuple(range(plan.H))
  # Formulas of tiles know neither other masks nor other logits; lists know all.
  if not plan.extras <= {"segment_ids", "kv_segment_ids"}:
    return (Group(every, ()),)
  groups, of_lists = [], []
  # Heads that suit lists share one launch, whatever their patterns.
  for heads, of_heads in passes.lower(plan.pattern, plan.H):
    if _lists_suit(plan, of_heads):
      of_lists.extend(heads)
    else:
      groups.append(Group(heads, _visited(of_heads, plan.T)))
  return (*groups, Group(tuple(sorted(of_lists)), ())) if of_lists else tuple(groups)


def is_fixed(group: Group) -> bool:
  """Whether blocks and the summaries before them are one sweep."""
  return len(group.passes) == 2 and group.passes[1].view == "summaries"


def padding(plan: Plan, group: Group) -> tuple[int, int, int]:
  """Positions of a row, of a padded row, and of the padded sequence, as kernels want them.

  The copy engine takes whole groups of 8 along the axis that is a sequence: what is missing is
  added at the end of every row, or as rows.
  """
  row = max(pass_.stride for pass_ in group.passes)
  # A row is no longer than the sequence, but a summary keeps its place in it.
  if all(pass_.view != "summaries" for pass_ in group.passes):
    row = min(row, plan.T)
  # Blocks grow in length, columns in number of rows: either is the axis that a sequence lies along.
  rows, stride = -(-plan.T // row), row
  if all(pass_.view in ("blocks", "summaries") for pass_ in group.passes):
    stride = _up(row, 8)
  else:
    rows = _up(rows, 8)
  return row, stride, rows * stride


def _visited(of_heads: tuple[Pass, ...], T: int) -> tuple[Pass, ...]:
  """Without summaries of finished blocks where no block is finished."""
  # Summaries that nobody sees would only cost time.
  first = of_heads[0]
  several = len(of_heads) == 2 and of_heads[1].view == "summaries"
  return (first,) if several and first.stride >= T else of_heads


def _lists_suit(plan: Plan, of_heads: tuple[Pass, ...]) -> bool:
  """Whether heads have no kernel of their own, or lists are faster.

  Segments prune the blocks of long rows; narrow windows and blocks see little else than their own.
  Dense attention with heads of 128 features has a faster dq by lists: on an H200, T = 32,768, 8.1
  ms instead of 9.5; with heads of 64, forward and backward take 35 ms instead of 31.
  """
  first, D = of_heads[0], max(plan.Dk, plan.Dv)
  # A pass without a distance is no band of its view, so that only lists can have it.
  if any(pass_.distance is None and pass_.view != "summaries" for pass_ in of_heads):
    return True
  if len(of_heads) == 1 and first.view == "summaries" and first.stride > plan.T:
    return True  # its view would be padded to a whole row
  if len(of_heads) == 1 and first.view == "natural" and first.window is None and 64 < D <= 128:
    return True
  narrow = sizes.MAX_REACH * gpu.TILE
  wide = any(pass_.window is not None and narrow < pass_.window < plan.T for pass_ in of_heads)
  own = all(pass_.view == "blocks" or pass_.window is not None for pass_ in of_heads)
  return (wide and len(of_heads) == 1) or (plan.segment_ids and not own)


def _sweeps(plan: Plan, group: Group) -> tuple[Sweep, ...]:
  merged, (_, stride, T) = len(group.passes) > 1, padding(plan, group)
  sweeps = [_sweep(plan, pass_, T, stride, merged) for pass_ in group.passes]
  # One sweep has both, and takes them in this order.
  if is_fixed(group):
    return tuple(sweeps)
  # Those that cannot take up where others ended come first.
  return tuple(sorted(sweeps, key=lambda sweep: sweep.forward is not None))


def _sweep(plan: Plan, pass_: Pass, T: int, stride: int, merged: bool) -> Sweep:
  """T and stride are padded."""
  # A window that no query reaches the end of is plain causal attention.
  window = pass_.window if pass_.window is not None and pass_.window < T else None
  stride = 1 if pass_.view == "natural" else stride
  fitted = dataclasses.replace(pass_, stride=stride, window=window)
  sweep = Sweep(fitted, T, plan.Dk, plan.Dv, plan.dtype)
  forward = backward = None
  if pass_.view != "summaries":
    forward = _kernel(resident=sizes.resident(sweep, merged), window=sizes.window(sweep))
    backward = _kernel(window=sizes.window_backward(sweep), resident=sizes.resident_backward(sweep))
  return dataclasses.replace(sweep, forward=forward, backward=backward, **sizes.streamed(sweep))


def _kernel(**choices: dict[str, int] | None) -> Kernel | None:
  """The first of the kernels that take a sweep."""
  return next(((family, tuple(x.items())) for family, x in choices.items() if x), None)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
