"""One query tile and the key tiles of its window, an online softmax over a few tiles at once.

    key tiles at a distance     3    2    1    0
    of the query tile           ◥    ■    ■    ◣     ■ all pairs, ◣ ◥ those of a triangle

The nearest and the farthest tile complement each other where the window ends between tiles: row i
sees j <= i of the one and some j > i of the other. They are folded into one tile, which saves half
the exponentials of two, and taken apart again before the products with the values.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band


def lower_triangle() -> Traced:
  """int16 that takes two folded tiles apart: -1 where the key is no later than the query, or 0."""
  near = gpu.iota((TILE, TILE), 0) >= gpu.iota((TILE, TILE), 1)
  # Opaque, or it would be computed again in each step; packed, it is 16 registers.
  return lax.optimization_barrier(jnp.where(near, jnp.int16(-1), jnp.int16(0)))


@dataclasses.dataclass(frozen=True)
class Window:
  """A query tile and what it sees.

  Attributes:
    band: which pairs attend.
    own: number of the query tile in its sequence.
    q: the query tile.
    keys, values: the tiles 0, 1, ... before the query's own.
    same: per tile, which pairs share a segment, or None.
    near: `lower_triangle`, where the nearest and the farthest tile are folded, or None.
    scale: of the logits.
    at_once: tiles of logits in registers, 32 each: one maximum and one rescaling for them.
    scratch: shared memory for weights, for the simulator.
  """

  band: Band
  own: Any
  q: Any
  keys: list
  values: list
  same: list
  near: Any
  scale: float
  at_once: int
  scratch: Any

  @property
  def last(self) -> int:
    """The distance of the farthest tile."""
    return len(self.keys) - 1

  def attend(self, state: softmax.State | None) -> softmax.State:
    """The state after the window."""
    Dv = self.values[0].shape[1]
    difference = gpu.iota((TILE, TILE), 0) - gpu.iota((TILE, TILE), 1)
    # By distance; two that are folded are one tile of logits.
    tiles = [(n,) for n in range(self.last + 1)]
    if self.near is not None:
      tiles = [(0, self.last), *tiles[1:-1]]
    for first in range(0, len(tiles), self.at_once):
      chosen = tiles[first : first + self.at_once]
      xs = [self.logits(distances, difference) for distances in chosen]
      ps, state = softmax.rescale(state, xs, self.scale, Dv)
      factors = [
        (part, self.values[n])
        for p, distances in zip(ps, chosen, strict=True)
        for part, n in zip(self.parts(p, distances), distances, strict=True)
      ]
      (total,) = gpu.add_matmul((state.total, *factors), scratch=self.scratch)
      state = state._replace(total=total)
    return state

  def logits(self, distances: tuple[int, ...], difference: Traced) -> Traced:
    """Of one tile, or of two that are folded: -inf where a pair does not attend.

    Args:
      difference: query minus key, of two tiles at the same place.
    """
    xs = gpu.matmul(*((self.q, pairs.transposed(self.keys[n])) for n in distances))
    if farthest := distances[-1]:
      # Only the first query tiles of a sequence pay for tiles that do not exist. A condition around
      # these additions is cheap; one around the products would make ptxas wait for each.
      beyond = lambda *xs: self.without_tiles_before(xs, distances)
      xs = lax.cond(self.own >= farthest, lambda *xs: xs, beyond, *xs)
    mask = None
    if len(distances) > 1:
      # Of the nearest tile the causal half, of the farthest the one that is in the window.
      x = jnp.where(difference >= 0, *xs)
      # No pair of places is in the window in both tiles (`Band.folds`): "or" tells whether in one.
      if self.band.far < self.last * TILE:  # the window ends inside a tile
        mask = self.band.mask(difference) | self.band.mask(difference + self.last * TILE)
    else:
      (x,), (n,) = xs, distances
      # A tile in the middle of the window has all pairs, and needs no mask.
      mask = self.same[n]
      if not self.band.covers(n):
        mask = pairs.both(mask, self.band.mask(difference + n * TILE))
    return x if mask is None else jnp.where(mask, x, -jnp.inf)

  def without_tiles_before(
    self, xs: Sequence[Traced], distances: Sequence[int]
  ) -> tuple[Traced, ...]:
    """Logits without the tiles before the sequence, which do not exist."""
    exists = lambda n: jnp.where(self.own >= n, jnp.float32(0), -jnp.inf)
    return tuple(x if n == 0 else x + exists(n) for x, n in zip(xs, distances, strict=True))

  def parts(self, p: Traced, distances: Sequence[int]) -> list[Traced]:
    """Of the weights of a tile, the operands for each of the tiles that it is made of."""
    p = p.astype(self.q.dtype)
    if len(distances) == 1:
      return [p]
    bits = lax.bitcast_convert_type(p, jnp.int16)  # selects by "and": half as many instructions
    return [lax.bitcast_convert_type(x, p.dtype) for x in (bits & self.near, bits & ~self.near)]
