"""Where the heads of an array lie in the blocks that a kernel gets, and how it takes them out.

Heads lie side by side in the lanes of [B, rows, H * D], the order in which projections leave them.
Or 8 of them (heads of a token, or neighbouring tokens, each of which belongs to another column)
lie in the sublanes of [B, rows, 8 n, lanes], where whole tiles of 8 x 128 are moved and the kernel
takes every 8th row. Heads of less than 128 features share lanes: one of them is a tile in which
the others' lanes are zero.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Operand:
  """The heads in a block of one array.

  Attributes:
    size: features of a head, D.
    count: heads side by side in the lanes of the block.
    rows: tokens of the block.
    sublanes: whether 8 such groups of heads lie in the sublanes.
  """

  size: int
  count: int
  rows: int
  sublanes: bool

  @property
  def width(self) -> int:
    """Lanes of the block."""
    return self.size * self.count

  @property
  def tile(self) -> int:
    """Lanes in which one head is found, with others where it is narrow."""
    return self.size if self.size >= LANES else min(LANES, self.width)

  @property
  def sharing(self) -> int:
    """Heads of a tile."""
    return self.tile // self.size

  @property
  def num(self) -> int:
    """Heads of the block."""
    return self.count * (SUBLANES if self.sublanes else 1)

  @property
  def num_tiles(self) -> int:
    return self.num // self.sharing

  @property
  def block(self) -> tuple[int, ...]:
    return (1, self.rows, SUBLANES, self.width) if self.sublanes else (1, self.rows, self.width)

  def tile_of(self, head: int) -> int:
    """The tile of a head."""
    return head // self.sharing

  def tiles(self, ref: Any, numbers: Any, left: Any = None) -> dict:
    """Tiles of a block by number, [rows, tile] each; rows from number `left` on are zeros."""
    numbers, tile_of_number = sorted(set(numbers)), {}
    per_row = self.width // self.tile
    for n in numbers:
      if n in tile_of_number:
        continue
      # Tiles are numbered along the lanes first, then by sublane.
      u, c = divmod(n, per_row)
      lanes = slice(c * self.tile, (c + 1) * self.tile)
      if not self.sublanes:
        tile_of_number[n] = ref[0, :, lanes]
      else:
        # A load of 16-bit values brings a neighbour along, which some head will want too.
        tile_of_number |= {m * per_row + c: x for m, x in self._split(ref, u, lanes).items()}
    # Rows past the end may be NaN in memory: zeros instead, for 0 times NaN is NaN.
    whole = lambda x: x if left is None else _first_rows(x, left)
    return {n: whole(tile_of_number[n]) for n in numbers}

  def only(self, tile: Any, head: int) -> Array:
    """A tile with zeros in the lanes of other heads."""
    if self.sharing == 1:
      return tile
    return jnp.where(self.lanes_of(tile.shape, head), tile, jnp.zeros_like(tile))

  def lanes_of(self, shape: tuple[int, ...], head: int) -> Array:
    """Which lanes of a tile are those of a head."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) // self.size == head % self.sharing

  def store(self, ref: Any, tiles: list) -> None:
    """Fills a block."""
    tiles = [x.astype(ref.dtype) for x in tiles]
    if not self.sublanes:
      for n, x in enumerate(tiles):
        ref[0, :, n * self.tile : (n + 1) * self.tile] = x
      return
    per_row = self.width // self.tile
    for c in range(per_row):
      self._join(ref, c, tiles[c::per_row])

  # Rows of one sublane are every 8th of a block. Loads with a stride are of 32-bit words: a word
  # has two neighbouring sublanes' bfloat16 of one row, and is wanted with one sublane's of two.

  def _split(self, ref: Any, u: int, lanes: slice) -> dict:
    """Some lanes of sublane u, and of what comes with it."""
    if ref.dtype.itemsize == 4:
      flat = ref.reshape(self.rows * SUBLANES, self.width)
      return {u: flat[pl.ds(u, self.rows, SUBLANES), lanes]}
    flat, u = ref.bitcast(jnp.int32).reshape(self.rows * 4, self.width), u // 2
    # A token has 4 words, of two sublanes each: every 8th word belongs to every second token.
    even, odd = (flat[pl.ds(n, self.rows // 2, SUBLANES), lanes] for n in (u, u + 4))
    # The lower half of a word is the even sublane, or row.
    low = (even & 0xFFFF) | (odd << 16)
    high = lax.shift_right_logical(even, 16) | (odd & -0x10000)
    return {2 * u + n: pltpu.bitcast(x, ref.dtype) for n, x in enumerate((low, high))}

  def _join(self, ref: Any, c: int, parts: list) -> None:
    """The way back."""
    lanes = slice(c * self.tile, (c + 1) * self.tile)
    if ref.dtype.itemsize == 4:
      flat = ref.reshape(self.rows * SUBLANES, self.width)
      for u, part in enumerate(parts):
        flat[pl.ds(u, self.rows, SUBLANES), lanes] = part
      return
    flat = ref.bitcast(jnp.int32).reshape(self.rows * 4, self.width)
    for u in range(4):
      low, high = (pltpu.bitcast(x, jnp.int32) for x in parts[2 * u : 2 * u + 2])
      flat[pl.ds(u, self.rows // 2, SUBLANES), lanes] = (low & 0xFFFF) | (high << 16)
      odd = lax.shift_right_logical(low, 16) | (high & -0x10000)
      flat[pl.ds(u + 4, self.rows // 2, SUBLANES), lanes] = odd


def _first_rows(x: Any, left: Any) -> Array:
  return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < left, x, jnp.zeros_like(x))
