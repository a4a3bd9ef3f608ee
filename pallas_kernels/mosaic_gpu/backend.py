"""The backend protocol on Hopper GPUs: passes in an order, each by the kernel that suits it.

Sequences that fit in shared memory and windows have kernels that the memory system bounds
(forward.py, backward.py), all else streams (stream_forward.py, stream_backward.py). The passes of a
union are one softmax: each takes up where the one before ended, and adds to its gradients.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import functions
from pallas_kernels.lowering import heads
from pallas_kernels.lowering import lists
from pallas_kernels.lowering import passes
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import backward as backward_kernels
from pallas_kernels.mosaic_gpu import formula
from pallas_kernels.mosaic_gpu import forward as forward_kernels
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import listed
from pallas_kernels.mosaic_gpu import sizes
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu import stream_backward
from pallas_kernels.mosaic_gpu import stream_forward
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

HEAD_SIZES = (32, 64, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")


def unsupported(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  block_mask: Array | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> str | None:
  """Why these kernels cannot compute this, and what they can; None where they can."""
  Dk, Dv = q.shape[-1], v.shape[-1]
  if q.dtype.name not in DTYPES:
    return f"mosaic_gpu: {q.dtype.name} is not supported, {' and '.join(DTYPES)} are"
  if not {Dk, Dv} <= set(HEAD_SIZES):
    return f"mosaic_gpu: head sizes {Dk} of k and {Dv} of v are not both in {HEAD_SIZES}"
  if block_mask is not None and block_size % lists.BLOCK:
    return f"mosaic_gpu: a block mask of {block_size=} is not supported, multiples of 128 are"
  if not isinstance(q.shape[0], int):
    return f"mosaic_gpu: a symbolic batch {q.shape[0]} is not supported"
  if functions.holds(pattern):
    return "mosaic_gpu: a predicate that holds traced arrays is not supported"
  if not formula.computes(scores):
    return (
      "mosaic_gpu: this score_fn is not supported, those of operators and elements are, which may "
      "hold numbers and arrays with an entry per head, but look up nothing by position"
    )
  for of_group, group in _lowered(pattern, q, k, v, segment_ids, block_mask, scores):
    if group is not None or listed.formulas(pattern, tuple(of_group))[0]:
      continue
    if lists.bits_of(pattern, tuple(of_group), q.shape[1], k.shape[1]) is None:
      return f"mosaic_gpu: {pattern} is not supported, its blocks have too many different masks"
  return None


def forward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> tuple[Float[Array, "B T H Dv"], tuple[Array, ...]]:
  """Result and log-sum-exp, of every group of heads as its kernel left it."""
  groups = _groups(pattern, q, k, v, segment_ids, block_mask, scores, block_size, held)
  scale = scores.scale
  outs, lses = zip(*(one.forward(q, k, v, segment_ids, scale) for one in groups), strict=True)
  return _join(outs, groups), lses


def natural_lse(
  lse: tuple[Array, ...],
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> Float[Array, "B T H"]:
  """The natural log-sum-exp, from what `forward` returned."""
  groups = _groups(pattern, q, k, v, segment_ids, block_mask, scores, block_size, held)
  parts = [one.cut(one.view.restore(x)) for one, x in zip(groups, lse, strict=True)]
  return _join(parts, groups) * math.log(2)


def lse_of_natural(
  lse: Float[Array, "B T H"],
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> tuple[Array, ...]:
  """What `forward` returned, from the natural log-sum-exp."""
  groups = _groups(pattern, q, k, v, segment_ids, block_mask, scores, block_size, held)
  lse = lse / math.log(2)
  return tuple(one.view.rows(one.padded(_select(lse, one.heads))) for one in groups)


def backward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  out: Float[Array, "B T H Dv"],
  lse: tuple[Array, ...],
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> tuple[Array, ...]:
  """Gradients of q, k and v, given those of the result and of its natural log-sum-exp or None.

  Then those of the arrays of `held` that `scores.learned` says, by one more sweep over the keys.
  """
  groups = _groups(pattern, q, k, v, segment_ids, block_mask, scores, block_size, held)
  grads = []
  for one, part in zip(groups, lse, strict=True):
    mine, dmine, dlse_mine = (_select(x, one.heads) for x in (out, dout, dlse))
    grads.append(one.backward(q, k, v, segment_ids, mine, part, dmine, dlse_mine, scores.scale))
  dq, dk, dv = (_join(parts, groups) for parts in zip(*(x[:3] for x in grads), strict=True))
  dk, dv = (heads.sum_per_key_head(x, k.shape[2]).astype(x.dtype) for x in (dk, dv))
  if not scores.learned:
    return dq, dk, dv

  def learned_values(*arrays):
    other = dict(zip(scores.learned, arrays, strict=True))
    mixed = tuple(other.get(n, x) for n, x in enumerate(held))
    values = formula.values(scores, q.shape[2], mixed)
    return tuple(values[n] for n in formula.learned(scores))

  _, pull = jax.vjp(learned_values, *(held[n] for n in scores.learned))
  (_, _, _, *of_values), *_ = grads  # scores with a function have one group
  return dq, dk, dv, *pull(tuple(of_values))


def _groups(pattern, q, k, v, segment_ids, block_mask, scores, block_size, held=()):
  return [
    _Listed(of_group, pattern, q, k, v, segment_ids, block_mask, scores, block_size, held)
    if group is None
    else _Group(of_group, group, q, v)
    for of_group, group in _lowered(pattern, q, k, v, segment_ids, block_mask, scores)
  ]


def _lowered(pattern: Pattern, q, k, v, segment_ids, block_mask, scores: Scores):
  """Heads, and their passes: None for lists of blocks."""
  every = range(q.shape[2])
  plain = scores.only_scale and scores.scale > 0 and block_mask is None
  if not plain or not pattern.causal or q.shape[1] != k.shape[1]:
    return [(every, None)]
  found, rest = [], []
  for of_group, group in passes.lower(pattern, q.shape[2]):
    if _lists_suit(group, q.shape[1], max(q.shape[-1], v.shape[-1]), segment_ids is not None):
      rest.extend(of_group)
    else:
      found.append((of_group, group))
  return found + ([(every if len(rest) == len(every) else tuple(rest), None)] if rest else [])


def _lists_suit(group: tuple[Pass, ...], T: int, D: int, segments: bool) -> bool:
  """Whether the heads of a group have no kernel of their own, or lists are faster.

  Segments prune the blocks of long rows; narrow windows and blocks see little else than their own.
  Dense attention with heads of 128 features has a faster dq by lists: on an H200, T = 32,768, 8.1
  ms instead of 9.5; with heads of 64, forward and backward take 35 ms instead of 31.
  """
  if any(one.distance is None and one.view != "summaries" for one in group):
    return True
  if len(group) == 1 and group[0].view == "summaries" and group[0].stride > T:
    return True  # its view would be padded to a whole row
  if len(group) == 1 and group[0].view == "natural" and group[0].window is None and 64 < D <= 128:
    return True
  narrow = sizes.MAX_REACH * gpu.TILE
  wide = any(one.window is not None and narrow < one.window < T for one in group)
  own = all(one.view == "blocks" or one.window is not None for one in group)
  return (wide and len(group) == 1) or (segments and not own)


# --------------------------------------------------------------------------- heads and passes


class _Group:
  """Heads that share passes.

  Attributes:
    heads: the query heads.
    sweeps: of their passes, in the order they run forward.
    view: in whose rows the log-sum-exp is.
    length, T: positions, without and with padding.
    row, stride: positions of a row, without and with padding.
  """

  def __init__(self, heads, group: tuple[Pass, ...], q, v):
    T, first = q.shape[1], group[0]
    self.heads = heads
    if len(group) == 2 and group[1].view == "summaries" and first.stride >= T:
      group = (first,)  # no block is finished
    self.row = max(one.stride for one in group)
    # A row is no longer than the sequence, but a summary keeps its place in it.
    if all(one.view != "summaries" for one in group):
      self.row = min(self.row, T)
    # The copy engine wants whole groups of 8 along the axis that is a sequence: what is missing is
    # added at the end of every row, or as rows.
    rows, self.stride = -(-T // self.row), self.row
    if all(one.view in ("blocks", "summaries") for one in group):
      self.stride = _up(self.row, 8)
    else:
      rows = _up(rows, 8)
    self.T, self.length = rows * self.stride, T
    make = functools.partial(_Sweep, heads=heads, T=self.T, stride=self.stride, q=q, v=v)
    if len(group) == 2 and group[1].view == "summaries":
      self.sweeps = [_Fixed(make(group[0], merged=True), make(group[1], merged=True))]
    else:
      # Those that cannot take up where others ended come first.
      sweeps = [make(one, merged=len(group) > 1) for one in group]
      self.sweeps = sorted(sweeps, key=lambda sweep: sweep.resumes)
    self.view = self.sweeps[-1].view

  def forward(self, q, k, v, ids, scale):
    """out [B, T, Hg, Dv] and lse, base 2, in rows of `view`."""
    q, k, v, ids = (self.padded(x) for x in (q, k, v, ids))
    prev = view = None
    for sweep in self.sweeps:
      prev = None if prev is None else (prev[0], sweep.rows(prev[1], view))
      prev = sweep.forward(q, k, v, ids, prev, scale)
      view = sweep.view
    out, lse = prev
    return self.cut(out), lse

  def backward(self, q, k, v, ids, out, lse, dout, dlse, scale):
    """dq, dk, dv [B, T, Hg, D], of k and v per query head."""
    arrays = q, k, v, ids, out, dout, dlse
    q, k, v, ids, out, dout, dlse = (self.padded(x) for x in arrays)
    grads = delta = view = None
    for sweep in sorted(self.sweeps, key=lambda sweep: sweep.turn_backward):
      # The first one computes delta of out and dlse, for all.
      rows = sweep.rows(lse, self.view), sweep.rows(dlse), sweep.rows(delta, view)
      *grads, delta = sweep.backward(q, k, v, ids, out, dout, *rows, grads, scale)
      out = dlse = None
      view = sweep.view
    return tuple(self.cut(x) for x in grads)

  def padded(self, x):
    """[B, T, ...] with zeros where sequences end; as it is where all sizes fit."""
    if x is None or self.length == self.T:
      return x
    rows = -(-self.length // self.row)
    x = _padded(x, rows * self.row).reshape(x.shape[0], rows, self.row, *x.shape[2:])
    x = _padded(x, self.stride, axis=2)
    return _padded(x.reshape(x.shape[0], -1, *x.shape[3:]), self.T)

  def cut(self, x):
    """The way back from `padded`."""
    if self.length == self.T:
      return x
    x = x.reshape(x.shape[0], -1, self.stride, *x.shape[2:])[:, :, : self.row]
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]


class _Sweep:
  """One pass over the heads of a group.

  Attributes:
    view: its sequences, in whose rows lse and delta are.
    resumes: whether its forward kernel takes up where another pass ended.
    turn_backward: smaller for those that come earlier.
  """

  def __init__(self, one: Pass, heads, T, stride, q, v, *, merged: bool):
    summaries = one.view == "summaries"
    stride = 1 if one.view == "natural" else stride
    window = one.window if one.window is not None and one.window < T else None
    self.heads = heads
    self.view = View("natural" if summaries else one.view, T, 1 if summaries else stride)
    self.band = Band(-(-(one.distance or 0) // stride), window)
    self.schedule = stream.Schedule(
      view=one.view,
      stride=stride,
      distance=self.band.near,
      window=window,
      width=one.width,
      starts=one.starts or (0,),
      finished=summaries and merged,
    )
    of_view = dict(columns="column", blocks="block", summaries="summary")
    kind = of_view.get(one.view, "dense" if window is None else "local")
    problem = sizes.Problem(kind, self.view, self.band, q.shape[-1], v.shape[-1], q.dtype)
    self.streamed = sizes.streamed(problem)
    self.resident = self.window = self.resident_backward = self.window_backward = None
    if not summaries:
      self.resident = sizes.resident(problem, merged)
      self.window = sizes.window(problem)
      self.resident_backward = sizes.resident_backward(problem)
      self.window_backward = sizes.window_backward(problem)
    self.resumes = bool(self.resident or self.window)
    # A window is the first, and computes delta; what adds to gradients of others is the last.
    self.turn_backward = 0 if self.window_backward else 2 if self.resident_backward else 1

  def rows(self, x, view: View | None = None):
    """[B, T, Hg], or rows of a view, in rows of this sweep: small arrays, copied."""
    if x is None or view == self.view:
      return x
    return self.view.rows(x if view is None else view.restore(x))

  def forward(self, q, k, v, ids, prev, scale):
    how = dict(scale=scale, heads=self.heads)
    if self.resumes:
      kernel = forward_kernels.resident if self.resident else forward_kernels.window
      how |= self.resident or self.window
      return kernel(self.view, self.band, q, k, v, self.ids(ids), prev, **how)
    blocks = self.streamed.forward
    new = stream_forward.forward(self.schedule, q, k, v, ids, blocks=blocks, **how)
    return new if prev is None else _merge(self.view, prev, new)

  def backward(self, q, k, v, ids, out, dout, lse, dlse, delta, prev, scale):
    how = dict(scale=scale, heads=self.heads)
    if self.window_backward:
      how |= self.window_backward
      rows = self.ids(ids), out, lse, dout, dlse
      return backward_kernels.window(self.view, self.band, q, k, v, *rows, **how)
    if self.resident_backward:
      how |= self.resident_backward
      rows = self.ids(ids), out, lse, dout, dlse, delta
      return backward_kernels.resident(self.view, self.band, q, k, v, *rows, prev, **how)
    lse, dlse, delta = (self.streamed_rows(x) for x in (lse, dlse, delta))
    rest = q, k, v, ids, lse
    how |= dict(out=out, dlse=dlse, blocks=self.streamed.dq)
    dq, delta = stream_backward.dq_kernel(self.schedule, *rest, delta, dout, **how)
    dk, dv = self.key_gradients(*rest, delta, dout, scale)
    if self.schedule.view == "summaries":
      dk, dv = (_unfolded(x, self.schedule, q.shape[1]) for x in (dk, dv))
    grads = dq, dk, dv
    if prev is not None:
      add = lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)
      grads = tuple(add(a, b) for a, b in zip(prev, grads, strict=True))
    return *grads, delta

  def key_gradients(self, q, k, v, ids, lse, delta, dout, scale):
    """dk and dv by streaming; of summaries [B, rows, width, Hg, D]."""
    how = dict(scale=scale, heads=self.heads, blocks=self.streamed.dkv)
    return stream_backward.dkv_kernel(self.schedule, q, k, v, ids, lse, delta, dout, **how)

  def streamed_rows(self, x):
    """lse, its cotangent or delta in whole tiles of a streaming kernel."""
    return _padded(x, _up(self.view.M, stream.ROWS), axis=3)

  def ids(self, segment_ids):
    return None if segment_ids is None else self.view.rows(segment_ids, -1)


class _Fixed:
  """A block and the summaries of the blocks before it, in one sweep of streaming kernels.

  Only the gradients of keys are computed apart.
  """

  turn_backward = 0

  def __init__(self, block: _Sweep, summary: _Sweep):
    self.block, self.summary = block, summary
    self.view, self.rows, self.heads = summary.view, summary.rows, summary.heads
    self.schedule = dataclasses.replace(summary.schedule, own=True)

  def forward(self, q, k, v, ids, prev, scale):
    del prev  # there is no other sweep
    how = dict(scale=scale, heads=self.heads, blocks=self.summary.streamed.forward)
    return stream_forward.forward(self.schedule, q, k, v, ids, **how)

  def backward(self, q, k, v, ids, out, dout, lse, dlse, delta, prev, scale):
    del prev
    lse, dlse, delta = (self.summary.streamed_rows(x) for x in (lse, dlse, delta))
    how = dict(scale=scale, heads=self.heads, blocks=self.summary.streamed.dq, out=out, dlse=dlse)
    dq, delta = stream_backward.dq_kernel(self.schedule, q, k, v, ids, lse, delta, dout, **how)
    of_summaries = self.summary.key_gradients(q, k, v, ids, lse, delta, dout, scale)
    in_blocks = (self.block.streamed_rows(self.block.rows(x, self.view)) for x in (lse, delta))
    of_blocks = self.block.key_gradients(q, k, v, ids, *in_blocks, dout, scale)
    dk, dv = (
      _add_summaries(x, y, self.schedule) for x, y in zip(of_blocks, of_summaries, strict=True)
    )
    return dq, dk, dv, delta


class _Listed:
  """Heads whose blocks are listed."""

  def __init__(self, heads, pattern, q, k, v, segment_ids, block_mask, scores, block_size, held):
    self.heads, self.pattern, self.view = heads, pattern, View("natural", q.shape[1])
    self.sizes = sizes.listed(q.shape[-1], v.shape[-1], segment_ids is not None)
    self.masks = block_mask, block_size, segment_ids
    self.own_scores = not scores.only_scale or scores.scale <= 0
    self.scores = scores if self.own_scores else None
    self.values = formula.values(scores, q.shape[2], held)

  def frame(self, q, k, teams: int = 1, backward: bool = False) -> listed.Listed:
    """The lists, dealt to so many teams per core."""
    (B, T, H, _), S, heads = q.shape, k.shape[1], tuple(self.heads)
    # Some heads alone may not be whole groups.
    shape = dict(B=B, T=T, S=S, heads=heads, group=H // k.shape[2], joined=len(heads) == H)
    shape.update(num_cores=teams * gpu.num_multiprocessors(), own_scores=self.own_scores)
    problem = lists.Problem(**shape)
    each, of_head = listed.formulas(self.pattern, heads)
    with_bits, (block_mask, block_size, segment_ids) = not each, self.masks
    if segment_ids is None and block_mask is None:
      by_queries = lists.by_queries(self.pattern, problem, with_bits)
      by_keys = lists.by_keys(self.pattern, problem, with_bits) if backward else None
    else:
      tables = lists.of_pattern(self.pattern, problem, with_bits)
      tables = lists.masked(tables, block_mask, block_size, segment_ids, heads)
      by_queries = lists.traced_by_queries(tables, problem)
      by_keys = lists.traced_by_keys(tables, problem) if backward else None
    bits = lists.bits_of(self.pattern, heads, T, S) if with_bits else None
    masks = each, of_head, bits, segment_ids is not None
    causal = self.pattern.causal
    return listed.Listed(problem, causal, by_queries, by_keys, *masks, self.scores, self.values)

  def forward(self, q, k, v, ids, scale):
    """out [B, T, Hg, Dv] and lse, base 2, in rows of the natural view."""
    frame, blocks = self.frame(q, k, self.sizes.forward.teams), self.sizes.forward
    scale = 1.0 if self.own_scores else scale
    return stream_forward.sweep(frame, _select(q, self.heads), k, v, ids, scale, blocks)

  def backward(self, q, k, v, ids, out, lse, dout, dlse, scale):
    """dq [B, T, Hg, Dk]; dk and dv of key heads, or of the query heads; those of learned values."""
    frame, how = self.frame(q, k, backward=True), dict(scale=1.0 if self.own_scores else scale)
    dlse = None if dlse is None else _padded(self.view.rows(dlse), lse.shape[-1], axis=3)
    rest = frame, _select(q, self.heads), k, v, ids, lse
    more = dict(out=out, dlse=dlse, blocks=self.sizes.dq)
    dq, delta = stream_backward.sweep_keys(*rest, None, dout, **more, **how)
    of_keys = stream_backward.sweep_queries(*rest, delta, dout, **how, blocks=self.sizes.dkv)
    if self.scores is None or not self.scores.learned:
      return dq, *of_keys
    rows = stream_backward.sweep_values(*rest, delta, dout, **how, blocks=self.sizes.dq)
    return dq, *of_keys, *(x[:, :, 0, : q.shape[1]].sum(axis=(0, 2)) for x in rows)

  def padded(self, x):
    return x

  def cut(self, x):
    return x


# --------------------------------------------------------------------------------- arrays


def _merge(view: View, a, b):
  """One softmax over two disjoint key sets, each one's (out, lse) in rows of a view."""
  (out_a, lse_a), (out_b, lse_b) = ((out, view.restore(lse)) for out, lse in (a, b))
  out, lse = heads.merge(out_a, lse_a, out_b, lse_b, base=2)
  return out.astype(out_a.dtype), view.rows(lse)


def _unfolded(x, schedule: stream.Schedule, T: int):
  """Gradients of summaries `[B, rows, width, Hg, D]` among zeros: `[B, T, Hg, D]`."""
  (start,) = schedule.starts  # a pass of its own has one
  after = schedule.stride - start - schedule.width
  x = jnp.pad(x, [(0, 0), (0, 0), (start, after), (0, 0), (0, 0)])
  return x.reshape(x.shape[0], T, *x.shape[3:])


def _add_summaries(x: Float[Array, "B T Hg D"], summaries: Array, schedule: stream.Schedule):
  """x with the gradients of summaries `[B, rows, width, Hg, D]` added where their keys are."""
  (B, T, H, D), starts = x.shape, schedule.starts
  # Head h has starts[h % n]: heads [.., n] lie beside each other, one write for each start.
  starts = starts if H % len(starts) == 0 else tuple(starts[h % len(starts)] for h in range(H))
  split = lambda x: x.reshape(*x.shape[:-2], H // len(starts), len(starts), D)
  x, summaries = split(x.reshape(B, -1, schedule.stride, H, D)), split(summaries)
  for n, start in enumerate(starts):
    old = x[:, :, start : start + schedule.width, :, n : n + 1]
    new = old.astype(jnp.float32) + summaries[..., n : n + 1, :].astype(jnp.float32)
    x = _written(x, new.astype(x.dtype), (0, 0, start, 0, n, 0))
  return x.reshape(B, T, H, D)


def _written(x, update, start: tuple[int, ...]):
  """`lax.dynamic_update_slice`, which XLA does in place; vmap would make it a scatter."""

  @custom_vmap
  def write(x, update):
    return lax.dynamic_update_slice(x, update, start)

  @write.def_vmap
  def batched(size, is_batched, *arrays):
    whole = zip(arrays, is_batched, strict=True)
    arrays = (x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in whole)
    return _written(*arrays, (0, *start)), True

  return write(x, update)


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _select(x, of_group):
  return None if x is None else heads.take(x, of_group)


def _join(parts, groups):
  return heads.join(parts, [one.heads for one in groups])


def _padded(x, length: int, axis: int = 1):
  """x with zeros up to a length of an axis: later than all else in a sequence."""
  if x is None or x.shape[axis] == length:
    return x
  return jnp.pad(x, [(0, length - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])
