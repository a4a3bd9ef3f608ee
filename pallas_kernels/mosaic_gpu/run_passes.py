"""Heads whose passes have kernels: one after the other, each takes up where the one before ended.

Arrays are padded to what the kernels want, lse and delta go from the rows of one view to another's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.lowering import heads as heads_lib
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Group
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import groups
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.resident import backward as resident_backward
from pallas_kernels.mosaic_gpu.resident import forward as resident_forward
from pallas_kernels.mosaic_gpu.resident import short
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
  dq_before, *before = before or (None, None, None)
  of_keys = _key_gradients(sweep, own, lse, delta, dout, options, before)
  return _sum(dq_before, dq), *of_keys, delta


def _key_gradients(
  sweep: Sweep,
  own: tuple,
  lse: Array,
  delta: Array | None,
  dout: Array | None,
  options: dict[str, Any],
  before: Sequence[Array | None] = (None, None),
) -> tuple:
  """dk and dv by streaming, with those of the keys of other sweeps `before` added."""
  frame, of_dkv = _frame(sweep, own, options["heads"]), dict(scale=options["scale"])
  gradients = functools.partial(stream.dkv_kernel, frame, *own, lse, delta, dout, **of_dkv)
  if sweep.pass_.view != "summaries":
    return tuple(map(_sum, before, gradients(blocks=sweep.dkv_blocks)))
  if before[0] is None:
    grads = gradients(blocks=sweep.dkv_blocks)
    heads = *own[0].shape[:2], len(options["heads"])
    # Behind a barrier: else XLA pads, in one pass at less than half of the rate of filling.
    zeros = lambda x: lax.optimization_barrier(jnp.zeros((*heads, x.shape[-1]), x.dtype))
    return tuple(frame.with_summaries(zeros(x), x) for x in grads)
  # The kernel adds where there are summaries. All other rows stay as they are, and where they are.
  grads = gradients(blocks=sweep.dkv_blocks, before=before)
  return tuple(map(frame.with_summaries, before, grads))


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
  # lse and delta are of the whole softmax, whichever keys have gradients.
  in_blocks = [_rows(block, x, summary.view) for x in (lse, delta)]
  q, k, v, *_ = own
  if short.takes(block.view, block.band, q.shape[-1], v.shape[-1]):
    rows = in_blocks[0], dout, in_blocks[1]
    of_blocks = short.key_gradients(block.view, block.band, q, k, v, *rows, **options)
  else:
    in_blocks = (_streamed_rows(block, x) for x in in_blocks)
    of_blocks = _key_gradients(block, own, *in_blocks, dout, options)
  return dq, *_key_gradients(summary, own, lse, delta, dout, options, of_blocks)


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


def _sum(a: Array | None, b: Array) -> Array:
  """a + b, of which a may be missing, rounded once."""
  if a is None:
    return b
  return (a.astype(jnp.float32) + b.astype(jnp.float32)).astype(b.dtype)


def _with_zeros(x: Array | None, length: int, axis: int = 1) -> Array | None:
  """x with zeros up to a length of an axis: later than all else in a sequence."""
  if x is None or x.shape[axis] == length:
    return x
  return jnp.pad(x, [(0, length - x.shape[axis] if n == axis else 0) for n in range(x.ndim)])
