"""Tiles of pairs, one query and one key each: who shares a segment, weights and their derivatives.

Backward kernels compute the weights again, P = exp2(c S - lse) with S the products before the
scale and c = scale log2(e), and from them dS = P (dP - delta), with dP = dout v^T and
delta = rowsum(dout out) - dlse: the derivative of the loss by the scaled logits.

Kernels that accumulate by key work on transposed tiles, whose rows are keys: P^T and dS^T then come
out of the matrix units as the operands that dv += P^T dout and dk += dS^T q want. lse and delta of
the queries are by column there.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced


def transposed(tile: Ref) -> Ref:
  """A tile in shared memory, read the other way."""
  return tile.transpose((1, 0))


def load(tile: Ref) -> Traced:
  """A tile of shared memory in registers, float32."""
  return gpu.load(tile, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)


def both(mask: Traced | None, other: Traced) -> Traced:
  """The pairs of two masks, None for all pairs."""
  return other if mask is None else mask & other


# --------------------------------------------------------------------------------- segments


def segments(ref: Ref, b: Traced, r: Traced, start: Traced, size: int, layout: Any) -> Traced:
  """The segment ids of `size` rows from `start` on of sequence r, in device memory [B, R, Mp]."""
  return gpu.load(ref.at[b, r, gpu.ds(start, size)], layout=layout, optimized=False)


def key_ids(refs: Mapping[str, Any]) -> Ref:
  """The segment ids of keys: their own, or those of the queries."""
  return refs["kv_ids"] if "kv_ids" in refs else refs["ids"]


def share_segment(rows: Traced, columns: Traced) -> Traced:
  """Which pairs have equal ids, of rows [m] and columns [n]."""
  return gpu.over_columns(rows, columns.shape[0]) == gpu.over_rows(columns, rows.shape[0])


def tiles_share_segment(
  row_ids: Ref, column_ids: Ref, b: Traced, r: Traced, row_tile: Traced, column_tile: Traced
) -> Traced:
  """Which pairs of two tiles have equal ids.

  The ids come as two arrays, though they may be equal: one load of a tile would have to serve rows
  and columns, in layouts that differ.
  """
  return share_segment(
    segments(row_ids, b, r, row_tile * TILE, TILE, ROW),
    segments(column_ids, b, r, column_tile * TILE, TILE, COLUMN),
  )


# ------------------------------------------------------------------------ weights, transposed


def weights_by_key(x: Traced, lse: Traced, c: float, mask: Traced | None = None) -> Traced:
  """P^T from x = S^T, whose rows are keys, and lse of the queries, by column."""
  p = jnp.exp2(x * c - gpu.over_rows(lse, x.shape[0]))
  return p if mask is None else jnp.where(mask, p, 0.0)


def derivatives_by_key(p: Traced, dp: Traced, delta: Traced, dtype: jax.typing.DTypeLike) -> Traced:
  """dS^T, as an operand, from P^T, dP^T and delta of the queries, by column."""
  return (p * (dp - gpu.over_rows(delta, p.shape[0]))).astype(dtype)
