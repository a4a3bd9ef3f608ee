"""Free reshapes of [B, T, H, D] in which the keys of a query lie together, and boxes of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced


@dataclasses.dataclass(frozen=True)
class View:
  """R sequences of M rows each, of the positions 0 ... T - 1.

  Attributes:
    kind: "natural": R = 1, M = T. "columns": row m of sequence r is position m * stride + r.
      "blocks": row m of sequence r is position r * stride + m.
    T: positions; a multiple of `stride`.
    stride: 1 in the natural view.
  """

  kind: Literal["natural", "columns", "blocks"]
  T: int
  stride: int = 1

  @classmethod
  def of(cls, pass_: Pass, T: int) -> "View":
    """Where the queries of a pass lie."""
    natural = pass_.view in ("natural", "summaries")
    return cls("natural", T) if natural else cls(pass_.view, T, pass_.stride)

  @property
  def R(self) -> int:
    return {"natural": 1, "columns": self.stride, "blocks": self.T // self.stride}[self.kind]

  @property
  def M(self) -> int:
    return self.T // self.R

  @property
  def num_tiles(self) -> int:
    return -(-self.M // TILE)

  @property
  def even_rows(self) -> int:
    """Rows of a tile when those of a short sequence are even: 48 for M = 96, 32 for M = 24.

    Matrix instructions want multiples of 16. What is missing to whole tiles is copied in one piece:
    a multiple of 128 bytes of lse, and no more than a tile has.
    """
    missing = lambda rows: self.num_tiles * (TILE - rows)
    fits = lambda rows: rows * self.num_tiles >= self.M and missing(rows) <= rows
    return next(n for n in (32, 48, TILE) if fits(n) and missing(n) % 32 == 0)

  def __call__(self, x: Array) -> Array:
    """The view of an array [B, T, ...]; no copy."""
    # T is whole rows, so that rows and places in them are two axes of the same memory.
    if self.kind == "natural":
      return x
    return x.reshape(x.shape[0], self.T // self.stride, self.stride, *x.shape[2:])

  def box(self, ref: Ref, b: Traced, r: Traced, h: Traced, start: Traced, rows: int = TILE) -> Ref:
    """Rows start ... start + rows - 1 of sequence r, head h: strided in memory, dense in a copy."""
    span = gpu.ds(start, rows)
    if self.kind == "natural":
      return ref.at[b, span, h]
    # The copy engine steps over what lies between: columns need no transposed array.
    return ref.at[b, span, r, h] if self.kind == "columns" else ref.at[b, r, span, h]

  def rows(self, x: Array, fill: int | float = 0) -> Array:
    """[B, T, ...] -> [B, ..., R, Mp], Mp = M rounded up to a tile: small arrays, copied."""
    x = jnp.moveaxis(self(x), 1, -1) if self.kind == "natural" else self(x)
    if self.kind == "natural":
      x = x[..., None, :]
    else:
      x = jnp.moveaxis(x, (1, 2), (-2, -1) if self.kind == "blocks" else (-1, -2))
    # Whole tiles: rows of numbers are copied without a check of their end.
    padding = [(0, 0)] * (x.ndim - 1) + [(0, self.num_tiles * TILE - self.M)]
    return jnp.pad(x, padding, constant_values=fill)

  def restore(self, x: Array) -> Array:
    """[B, ..., R, Mp] -> [B, T, ...]."""
    x = x[..., : self.M]
    x = jnp.moveaxis(x, (-2, -1), (1, 2) if self.kind != "columns" else (2, 1))
    return x.reshape(x.shape[0], self.T, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Band:
  """The keys m - j of a query's sequence with near <= m - j < far; far None: no end."""

  near: int = 0
  far: int | None = None

  @classmethod
  def of(cls, pass_: Pass) -> "Band":
    return cls(-(-(pass_.distance or 0) // pass_.stride), pass_.window)

  def first(self, size: int = TILE) -> int:
    """The nearest tile of `size` rows that may hold pairs, counted before the query's own."""
    return max(0, -(-(self.near - size + 1) // size))

  def first_full(self, size: int = TILE) -> int:
    """The nearest tile of causal pairs alone."""
    return -(-(self.near + size - 1) // size)

  def last(self, num_tiles: int) -> int:
    """The farthest tile that may hold pairs."""
    last = num_tiles if self.far is None else (self.far + TILE - 2) // TILE
    return min(last, num_tiles - 1)

  def covers(self, distance: int) -> bool:
    """Whether all pairs of two tiles, this many tiles apart, attend."""
    # Pairs are less than a tile farther apart than their tiles.
    end = (distance + 1) * TILE
    return distance >= self.first_full() and (self.far is None or end <= self.far)

  def folds(self, num_tiles: int) -> bool:
    """Whether no pair of positions is in both the nearest and the farthest tile."""
    reach = self.last(num_tiles)
    return self.near == 0 and reach > 0 and self.far is not None and self.far <= reach * TILE

  def mask(self, distance: Traced) -> Traced:
    """Which of the pairs at these distances attend."""
    mask = distance >= self.near
    return mask if self.far is None else mask & (distance < self.far)


def head_of(heads: Sequence[int], n: Any) -> Any:
  """heads[n] of a traced n: by arithmetic, or by comparing where the heads are irregular."""
  # Most patterns give heads at equal steps: one instruction instead of one for each head.
  step = heads[1] - heads[0] if len(heads) > 1 else 1
  if all(head == heads[0] + i * step for i, head in enumerate(heads)):
    return n * step + heads[0]
  chosen = jnp.int32(heads[0])
  for i, head in enumerate(heads):
    chosen = jnp.where(n == i, jnp.int32(head), chosen)
  return chosen
