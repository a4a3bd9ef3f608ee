"""The launches of a view: forward, and one or two kernels for the gradients."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.mosaic_tpu import grid
from pallas_kernels.mosaic_tpu import kernels
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.sweep import LOG2E
from pallas_kernels.mosaic_tpu.views import Place
from pallas_kernels.mosaic_tpu.views import View


def forward(view: View, arrays: Arrays) -> tuple[Array, Array]:
  """out [B, T, Hg, Dv] and the natural lse [B, T, Hg]."""
  place, block = view.place(), view.block
  inputs, out_op = _inputs(view, place, arrays), view.operand(place, place.Dv)
  visits, masks = _steps(view, arrays, transposed=False)
  outputs = dict(
    out=(view.result(place, inputs["q"], place.Dv, place.count), ("q_results", out_op)),
    lse=(view.rows_shape(place, inputs["q"]), ("rows", place.num)),
  )
  # A number for each row takes all 128 lanes: columns of one lane would be spread in each step.
  scratch = dict(top=(place.num, block, LANES), total=(place.num, block, LANES))
  scratch |= dict(acc=(place.num, block, out_op.tile))
  what = view.sweep, visits, view.groups(place), inputs | masks, outputs, scratch
  out, lse = grid.launch("attention_forward", kernels.forward, *what)
  out = view.from_array(out, view.plan.Dv, place.Dv, view.T)
  # Kernels count in base 2; passes merge, and users see, natural ones.
  return out, view.from_rows(lse, place) * math.log(2)


def backward(
  view: View, arrays: Arrays, dout: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
  """dq [B, T, Hg, Dk]; dk and dv [B, S, Hg or Hkv, D], of the latter for all heads."""
  rows = dout, lse, delta
  place = view.place_of_one_backward()
  # One kernel where dq of a whole sequence fits: 5 products a pair of blocks instead of 7.
  if place is not None:
    dq, dk, dv = _backward(view, place, True, arrays, rows)
    return dq, dk, dv
  place = view.place()
  return _dq(view, place, arrays, rows), *_backward(view, place, False, arrays, rows)


def _inputs(view: View, place: Place, arrays: Arrays) -> dict:
  operand, (q, k, v) = functools.partial(view.operand, place), arrays[:3]
  return dict(
    q=(view.array(q, place, place.Dk), ("queries", operand(place.Dk))),
    k=(view.array(view.keys(k), place, place.Dk), ("keys", operand(place.Dk, of_keys=True))),
    v=(view.array(view.keys(v), place, place.Dv), ("keys", operand(place.Dv, of_keys=True))),
  )


def _gradient_inputs(view: View, place: Place, arrays: Arrays, rows: Any) -> dict:
  dout, lse, delta = rows
  return _inputs(view, place, arrays) | dict(
    dout=(view.array(dout, place, place.Dv), ("q_results", view.operand(place, place.Dv))),
    # inf where there is no query: weights of 0, which add nothing to the gradients of keys.
    lse=(view.rows(lse * LOG2E, place, jnp.inf), ("rows", place.num)),
    delta=(view.rows(delta, place, 0.0), ("rows", place.num)),
  )


def _dq(view: View, place: Place, arrays: Arrays, rows: Any) -> Array:
  inputs, block = _gradient_inputs(view, place, arrays, rows), view.block
  q_op = inputs["q"][1][1]
  visits, masks = _steps(view, arrays, transposed=False)
  outputs = dict(dq=(view.result(place, inputs["q"], place.Dk, place.count), ("q_results", q_op)))
  # 8 lanes are what turning a row of numbers into a column leaves.
  scratch = dict(lse_s=(place.num, block, 8), delta_s=(place.num, block, 8))
  scratch |= dict(acc=(q_op.num_tiles, block, q_op.tile))
  what = view.sweep, visits, view.groups(place), inputs | masks, outputs, scratch
  (dq,) = grid.launch("attention_dq", kernels.dq, *what)
  return view.from_array(dq, view.plan.Dk, place.Dk, view.T)


def _backward(
  view: View, place: Place, with_dq: bool, arrays: Arrays, rows: Any
) -> tuple[Array, ...]:
  """dk and dv, and before them dq where the kernel has it too."""
  inputs, block = _gradient_inputs(view, place, arrays, rows), view.block
  q_op, k_op, v_op = (inputs[name][1][1] for name in "qkv")
  visits, masks = _steps(view, arrays, transposed=True)
  num = -(-view.sweep.num_queries // block)
  outputs = dict(
    dk=(view.result(place, inputs["k"], place.Dk, place.keys), ("k_results", k_op)),
    dv=(view.result(place, inputs["k"], place.Dv, place.keys), ("k_results", v_op)),
  )
  scratch = dict(dk_s=(k_op.num_tiles, block, k_op.tile), dv_s=(v_op.num_tiles, block, v_op.tile))
  if with_dq:
    # Any column may add to any row, so that rows are complete only after the last.
    visits = visits.with_stores(num)
    outputs |= dict(dq=(view.result(place, inputs["q"], place.Dk, place.count), ("dq", q_op)))
    scratch |= dict(dq_s=(q_op.num_tiles, num * block, q_op.tile))
  what = view.sweep, visits, view.groups(place), inputs | masks, outputs, scratch
  name = "attention_backward" if with_dq else "attention_dkv"
  dk, dv, *dq = grid.launch(name, kernels.backward, *what)
  Dk, Dv = view.plan.Dk, view.plan.Dv
  dk, dv = view.from_keys(dk, Dk, place.Dk), view.from_keys(dv, Dv, place.Dv)
  return *(view.from_array(x, Dk, place.Dk, view.T) for x in dq), dk, dv


# ---------------------------------------------------------------------------------------- masks


def _steps(view: View, arrays: Arrays, *, transposed: bool) -> tuple:
  """The steps, and the arrays that mask."""
  visits, masks = view.static_steps(transposed), {}
  block_mask, size = arrays.block_mask, view.plan.block_size
  nq, nk = (-(-n // view.block) for n in (view.sweep.num_queries, view.sweep.num_keys))
  for n, leaf in enumerate(view.sweep.leaves):
    layout = leaf.of_head(0).layout[None, None]
    masks[f"table{n}"] = _table(view, layout, leaf.block_size, transposed)
  if block_mask is not None:
    own = block_mask[:, np.asarray(view.heads)] if block_mask.shape[1] > 1 else block_mask
    masks["block_mask"] = _table(view, own, size, transposed)
    visits = visits.masked(*_joined_blocks(own, size, view.block, nq, nk))
  if arrays.segment_ids is not None:
    # By the last id: a fill of its own would make the last block look as if it had several.
    whole = lambda x, n: jnp.pad(x, [(0, 0), (0, n * view.block - x.shape[1])], mode="edge")
    ids = kv_ids = whole(arrays.segment_ids, nq)
    if arrays.kv_segment_ids is not None:
      kv_ids = whole(arrays.kv_segment_ids, nk)
    lines, others = (kv_ids, ids) if transposed else (ids, kv_ids)
    masks["ids_of_lines"] = lines[:, :, None], ("lines", 1)
    masks["ids_of_others"] = others[:, None, :], ("others", 1)
    low, high = kv_low, kv_high = _ranges(ids, view.block)
    if kv_ids is not ids:
      kv_low, kv_high = _ranges(kv_ids, view.block)
    # Ranges of ids that do not overlap have no pair; ids need not ascend.
    meet = (low[:, :, None] <= kv_high[:, None, :]) & (kv_low[:, None, :] <= high[:, :, None])
    # Both of one and the same id: no pair has to be compared.
    one_id = (low == high)[:, :, None] & (kv_low == kv_high)[:, None, :]
    same = one_id & (low[:, :, None] == kv_low[:, None, :])
    visits = visits.masked(meet[:, None], same[:, None])
  return visits, masks


def _ranges(ids: Array, block: int) -> tuple[Array, Array]:
  """The least and the largest id of each block."""
  ids = ids.reshape(ids.shape[0], -1, block)
  return ids.min(axis=2), ids.max(axis=2)


def _table(view: View, layout: Any, size: int, transposed: bool) -> tuple:
  """A block table as an input: its entries along the other axis repeated for every token."""
  num, lines, block = view.sweep.num_keys, view.sweep.num_queries, view.block
  if transposed:
    layout, num, lines = layout.swapaxes(2, 3), lines, num
  num, lines = (-(-n // block) * block for n in (num, lines))
  per_block, span = max(1, block // size), max(1, size // block)
  groups = -(-lines // (block * span))
  # A byte an entry: tables are loaded with every block.
  layout = jnp.asarray(layout).astype(jnp.int8)
  layout = jnp.repeat(layout, size, axis=3)[..., :num]
  fill = lambda n, length: (0, max(0, length - n))
  shape = layout.shape
  layout = layout[:, :, : groups * per_block]
  layout = jnp.pad(
    layout, [(0, 0), (0, 0), fill(layout.shape[2], groups * per_block), fill(shape[3], num)]
  )
  return layout.reshape(*shape[:2], groups, per_block, num), ("table", span)


def _joined_blocks(mask: Any, size: int, block: int, nq: int, nk: int) -> tuple:
  """Whether some, and whether all entries of a block mask attend, in the blocks of a list."""
  # Entries larger than a block of the list count for several, smaller ones are joined.
  split = max(1, size // block)
  mask = jnp.repeat(jnp.repeat(mask, split, axis=2), split, axis=3)
  per = max(1, block // size)
  shape = mask.shape
  mask = mask[:, :, : nq * per, : nk * per]
  fill = [(0, n * per - m) for n, m in zip((nq, nk), mask.shape[2:], strict=True)]
  cut = lambda x: x.reshape(*shape[:2], nq, per, nk, per)
  # What lies past the ends counts for neither.
  some = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill])).any(axis=(3, 5))
  every = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill], constant_values=True)).all(axis=(3, 5))
  return some, every
