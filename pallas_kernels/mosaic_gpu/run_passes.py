"""Heads whose passes have kernels: one after the other, each takes up where the one before ended.

Arrays are padded to what the kernels want, lse and delta go from the rows of one view to another's.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.lowering import heads as heads_lib
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import groups
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.resident import backward as resident_backward
from pallas_kernels.mosaic_gpu.resident import forward as resident_forward
from pallas_kernels.mosaic_gpu.sizes import Sweep
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.mosaic_gpu.window import backward as window_backward
from pallas_kernels.mosaic_gpu.window import forward as window_forward

_FORWARD = {"resident": resident_forward.forward, "window": window_forward.forward}
_BACKWARD = {"resident": resident_backward.backward, "window": window_backward.backward}


def forward(plan: Plan, group: Group, arrays: Arrays) -> tuple[Array, Array]:
  """out [B, T, Hg, Dv] and lse, base 2, in rows of the last sweep's view."""
  own = tuple(padded(plan, group, x) for x in arrays[:5])
  options = dict(scale=plan.scores.scale, heads=group.heads)
  if groups.is_fixed(group):
    out, lse = _forward_fixed(*group.kernels, own, options)
  else:
    out = lse = view = None
    # Each goes on from the result of the one before, in rows of its own view.
    for sweep in group.kernels:
      before = None if out is None else (out, _rows(sweep, lse, view))
      out, lse = _forward_one(sweep, own, before, options)
      view = sweep.view
  return cut(plan, group, out), lse


def backward(
  plan: Plan,
  group: Group,
  arrays: Arrays,
  out: Array | None,
  lse: Array,
  dout: Array | None,
  dlse: Array | None,
) -> tuple[Array, ...]:
  """dq, dk, dv [B, T, Hg, D], of k and v per query head; out, dout and dlse of these heads."""
  own = tuple(padded(plan, group, x) for x in arrays[:5])
  out, dout, dlse = (padded(plan, group, x) for x in (out, dout, dlse))
  options = dict(scale=plan.scores.scale, heads=group.heads)
  if groups.is_fixed(group):
    grads = _backward_fixed(*group.kernels, own, out, lse, dout, dlse, options)
  else:
    grads = delta = view = None
    for sweep in sorted(group.kernels, key=lambda sweep: sweep.turn_backward):
      # The first one computes delta of out and dlse, for all.
      lse_here = _rows(sweep, lse, group.kernels[-1].view)
      rows = lse_here, _rows(sweep, dlse), _rows(sweep, delta, view)
      *grads, delta = _backward_one(sweep, own, out, dout, *rows, grads, options)
      # With delta there is no further use for these.
      out = dlse = None
      view = sweep.view
  return tuple(cut(plan, group, x) for x in grads)


def padded(plan: Plan, group: Group, x: Array | None) -> Array | None:
  """[B, T, ...] with zeros where sequences end; as it is where all sizes fit."""
  row, stride, T = groups.padding(plan, group)
  if x is None or plan.T == T:
    return x
  rows = -(-plan.T // row)
  # Whole rows, then the rows lengthened, then more of them: a token keeps its row and its place in
  # it.
  x = _with_zeros(x, rows * row).reshape(x.shape[0], rows, row, *x.shape[2:])
  x = _with_zeros(x, stride, axis=2)
  return _with_zeros(x.reshape(x.shape[0], -1, *x.shape[3:]), T)


def cut(plan: Plan, group: Group, x: Array) -> Array:
  """The way back from `padded`."""
  row, stride, T = groups.padding(plan, group)
  if plan.T == T:
    return x
  x = x.reshape(x.shape[0], -1, stride, *x.shape[2:])[:, :, :row]
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : plan.T]


# ------------------------------------------------------------------------------------- one pass


def _forward_one(sweep: Sweep, own: tuple, before: tuple | None, options: dict[str, Any]) -> tuple:
  """(out, lse) of a sweep and of those before it."""
  q, k, v, *ids = own
  if sweep.forward is not None:
    family, sizes = sweep.forward
    own, options = (q, k, v, *_ids(sweep, ids)), options | dict(sizes)
    return _FORWARD[family](sweep.view, sweep.band, *own, before, **options)
  # The streaming kernels take up no state: theirs is merged afterwards.
  new = _stream_forward(sweep, own, options)
  return new if before is None else _merge(sweep.view, before, new)


def _backward_one(
  sweep: Sweep,
  own: tuple,
  out: Array | None,
  dout: Array | None,
  lse: Array,
  dlse: Array | None,
  delta: Array | None,
  before: Sequence[Array] | None,
  options: dict[str, Any],
) -> tuple:
  """dq, dk, dv of a sweep and of those before it, and delta."""
  q, k, v, *ids = own
  if sweep.backward is not None:
    family, sizes = sweep.backward
    rows = *_ids(sweep, ids), out, lse, dout, dlse
    if family == "resident":  # a window is the first of all sweeps
      rows = *rows, delta, before
    kernel, options = _BACKWARD[family], options | dict(sizes)
    return kernel(sweep.view, sweep.band, q, k, v, *rows, **options)
  lse, dlse, delta = (_streamed_rows(sweep, x) for x in (lse, dlse, delta))
  dq, delta = _query_gradients(sweep, own, out, lse, delta, dout, dlse, options)
  dk, dv = _key_gradients(sweep, own, lse, delta, dout, options)
  if sweep.pass_.view == "summaries":
    dk, dv = (_unfolded(x, sweep.pass_, q.shape[1]) for x in (dk, dv))
  grads = dq, dk, dv
  if before is not None:
    # In float32, so that the sum is rounded once.
    add = lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(a.dtype)
    grads = tuple(add(a, b) for a, b in zip(before, grads, strict=True))
  return *grads, delta


def _key_gradients(
  sweep: Sweep,
  own: tuple,
  lse: Array,
  delta: Array | None,
  dout: Array | None,
  options: dict[str, Any],
) -> tuple:
  """dk and dv by streaming; of summaries [B, rows, width, Hg, D]."""
  frame, blocks = _frame(sweep, own, options["heads"]), sweep.dkv_blocks
  return stream.dkv_kernel(frame, *own, lse, delta, dout, scale=options["scale"], blocks=blocks)


def _frame(
  sweep: Sweep, own: tuple, heads: heads_lib.Heads, own_rows: bool = False
) -> stream.Frame:
  """Of the streaming kernels; `own_rows`: with the keys of the queries' own rows."""
  q, k, _, ids, _ = own
  sizes = q.shape[1], q.shape[2], k.shape[2]
  return stream.frame_of(sweep.pass_, *sizes, heads, ids is not None, own=own_rows)


def _stream_forward(
  sweep: Sweep, own: tuple, options: dict[str, Any], own_rows: bool = False
) -> tuple:
  frame = _frame(sweep, own, options["heads"], own_rows)
  blocks = sweep.forward_blocks
  return stream.forward_kernel(frame, *own, scale=options["scale"], blocks=blocks)


def _query_gradients(
  sweep: Sweep,
  own: tuple,
  out: Array | None,
  lse: Array,
  delta: Array | None,
  dout: Array | None,
  dlse: Array | None,
  options: dict[str, Any],
  own_rows: bool = False,
) -> tuple:
  """dq by streaming, and delta."""
  frame = _frame(sweep, own, options["heads"], own_rows)
  of_dq = dict(out=out, dlse=dlse, scale=options["scale"], blocks=sweep.dq_blocks)
  return stream.dq_kernel(frame, *own, lse, delta, dout, **of_dq)


# ------------------------------------------------ a block and the summaries of those before it


def _forward_fixed(block: Sweep, summary: Sweep, own: tuple, options: dict[str, Any]) -> tuple:
  """In one sweep of the streaming kernels."""
  del block
  return _stream_forward(summary, own, options, own_rows=True)


def _backward_fixed(
  block: Sweep,
  summary: Sweep,
  own: tuple,
  out: Array | None,
  lse: Array,
  dout: Array | None,
  dlse: Array | None,
  options: dict[str, Any],
) -> tuple:
  """dq in one sweep; only the gradients of keys are computed apart."""
  lse, dlse = (_rows(summary, x, view) for x, view in ((lse, summary.view), (dlse, None)))
  lse, dlse = (_streamed_rows(summary, x) for x in (lse, dlse))
  dq, delta = _query_gradients(summary, own, out, lse, None, dout, dlse, options, own_rows=True)
  of_summaries = _key_gradients(summary, own, lse, delta, dout, options)
  # lse and delta are of the whole softmax, whichever keys have gradients.
  in_blocks = (_streamed_rows(block, _rows(block, x, summary.view)) for x in (lse, delta))
  of_blocks = _key_gradients(block, own, *in_blocks, dout, options)
  dk, dv = (
    _add_summaries(x, y, summary.pass_) for x, y in zip(of_blocks, of_summaries, strict=True)
  )
  return dq, dk, dv


# --------------------------------------------------------------------------------------- arrays


def _rows(sweep: Sweep, x: Array | None, view: View | None = None) -> Array | None:
  """[B, T, Hg], or rows of a view, in rows of this sweep: small arrays, copied."""
  if x is None or view == sweep.view:
    return x
  return sweep.view.rows(x if view is None else view.restore(x))


def _streamed_rows(sweep: Sweep, x: Array | None) -> Array | None:
  """lse, its cotangent or delta in whole tiles of a streaming kernel."""
  return _with_zeros(x, -(-sweep.view.M // stream.ROWS) * stream.ROWS, axis=3)


def _ids(sweep: Sweep, ids: Sequence[Array | None]) -> tuple[Array | None, ...]:
  return tuple(None if x is None else sweep.view.rows(x, -1) for x in ids)


def _merge(view: View, a: tuple, b: tuple) -> tuple:
  """One softmax over two disjoint key sets, each one's (out, lse) in rows of a view."""
  (out_a, lse_a), (out_b, lse_b) = ((out, view.restore(lse)) for out, lse in (a, b))
  out, lse = heads_lib.merge(out_a, lse_a, out_b, lse_b, base=2)
  return out.astype(out_a.dtype), view.rows(lse)


def _unfolded(x: Array, pass_: Pass, T: int) -> Array:
  """Gradients of summaries `[B, rows, width, Hg, D]` among zeros: `[B, T, Hg, D]`."""
  (start,) = pass_.starts  # one by itself has one
  # Tokens that are in no summary have no gradient from them.
  after = pass_.stride - start - pass_.width
  x = jnp.pad(x, [(0, 0), (0, 0), (start, after), (0, 0), (0, 0)])
  return x.reshape(x.shape[0], T, *x.shape[3:])


def _add_summaries(
  x: Float[Array, "B T Hg D"], summaries: Array, pass_: Pass
) -> Float[Array, "B T Hg D"]:
  """x with the gradients of summaries `[B, rows, width, Hg, D]` added where their keys are."""
  (B, T, H, D), starts = x.shape, pass_.starts
  # Head h has starts[h % n]: heads [.., n] lie beside each other, a part of them for each start.
  starts = starts if H % len(starts) == 0 else tuple(starts[h % len(starts)] for h in range(H))
  split = lambda x: x.reshape(*x.shape[:-2], H // len(starts), len(starts), D)
  x, summaries = split(x.reshape(B, -1, pass_.stride, H, D)), split(summaries)
  parts = []
  for n, start in enumerate(starts):
    after = pass_.stride - start - pass_.width
    around = [(start, after) if axis == 2 else (0, 0) for axis in range(x.ndim)]
    parts.append(jnp.pad(summaries[..., n : n + 1, :], around))
  # One pass over x: XLA copies all of it for each slice that is written where it was read.
  sums = x.astype(jnp.float32) + jnp.concatenate(parts, axis=-2).astype(jnp.float32)
  return sums.astype(x.dtype).reshape(B, T, H, D)


def _with_zeros(x: Array | None, length: int, axis: int = 1) -> Array | None:
  """x with zeros up to a length of an axis: later than all else in a sequence."""
  if x is None or x.shape[axis] == length:
    return x
  return jnp.pad(x, [(0, length - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])
