"""Ranges of tiles: what an item sweeps, step by step, and which pairs of a step attend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar

# An item is some rows of one side; it sweeps tiles of the other one. For example a window's keys:
#
#   first                    full_first                          full_end             end
#     | masked: steps 4, 5 .. | no mask: steps 0, 1, 2, 3, in order | masked: steps .. n  |
#                  <---------                                         --------->
#
# Tiles without mask code are swept first, then those before them, backwards, then those after: away
# from the full ones, so that neighbouring items meet in the cache. A step hands on which `part` of
# the sweep it is in, None for tiles without a mask. Lists have the same methods (listed_tiles.py).

# Parts of a sweep of keys that masks know: the view's keys, the queries' own rows, or either.
VIEW, OWN, EITHER = "view", "own", "either"


class Tiles:
  """Tiles first ... end - 1, of which full_first ... full_end - 1 need no mask."""

  def __init__(self, frame: Any, item: Item, step: int, bounds: tuple[Scalar, ...]):
    self.frame, self.item, self.step = frame, item, step
    self.first, self.full_first, self.full_end, self.end = bounds

  @property
  def num_tiles(self) -> Scalar:
    return self.end - self.first

  @property
  def num_full(self) -> Scalar:
    return self.full_end - self.full_first

  def tile(self, i: Scalar) -> Scalar:
    """The tile of step i."""
    if self.full_first is self.first:  # none before them
      return self.first + i
    before = self.full_end - 1 - i
    masked = jnp.where(before >= self.first, before, self.first + i)
    return jnp.where(i < self.num_full, self.full_first + i, masked)

  def logits(
    self, i: Scalar, products: jax.Array, part: Scalar | str | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """The logits of products, and their derivatives by them; None where those are a factor."""
    del i, part
    return products, None


class KeyTiles(Tiles):
  """The key tiles of an item of queries: of the view, then of the queries' own rows.

  Attributes:
    q0: the first query.
    num: steps, of which the first `num_view` are over the view's tiles.
  """

  def __init__(self, frame: Any, item: Item, q0: Scalar, blocks: BlockSizes):
    rows, step = blocks.rows, blocks.step
    super().__init__(frame, item, step, frame.key_tiles(q0, rows, step))
    self.q0 = q0
    self.num_view = self.num = self.num_tiles
    if frame.own:
      self.own_first, count = frame.own_tiles(q0, rows, step)
      self.num = self.num_view + count
    else:
      # A sweep without tiles visits one all the same, whose mask hides every key: no loop, barrier
      # or epilogue has to know about it.
      self.num = jnp.maximum(self.num, 1)

  def own_key(self, i: Scalar) -> Scalar:
    """First key of step i, one over the queries' own rows."""
    return self.own_first + (i - self.num_view) * self.step

  def first_part(self) -> str:
    """The part of the first step, where masks are made without a condition."""
    return EITHER if self.frame.own else VIEW

  def prepare(self, refs: Refs, base: Scalar) -> None:
    """For the masks of a warpgroup, whose queries are base ... base + 63."""
    self.refs, self.base = refs, base
    self.bounds = self.frame.query_bounds(base, TILE, gpu.ROW)
    if self.frame.segments:
      ids = refs["ids"].at[self.item["b"], self.item["r"], gpu.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def run(self, step: Callable, carry: Any, *, first: int, skip: Callable | None) -> Any:
    """carry = step(i, carry, part) over the steps from `first` on, a loop per part.

    Args:
      skip: skip(i, carry), instead of steps of which the warpgroup sees nothing; None: there is no
        such condition.
    """
    full, view = self.num_full, self.num_view
    # Not a condition in one loop: around products, ptxas would wait after each of them (C7511).
    step = step if skip is None else functools.partial(self._unless_fully_masked, step, skip)
    loop = lambda start, stop, part, carry: lax.fori_loop(
      start, stop, functools.partial(step, part=part), carry
    )
    if self.frame.has_full:
      carry = loop(first, full, None, carry)
    if not self.frame.own:
      return loop(jnp.maximum(full, first), self.num, VIEW, carry)
    carry = loop(jnp.maximum(full, first), view, VIEW, carry)
    return loop(jnp.maximum(view, first), self.num, OWN, carry)

  def _unless_fully_masked(
    self, step: Callable, skip: Callable, i: Scalar, carry: Any, part: str | None
  ) -> Any:
    if part is None:  # a full tile, of all warpgroups
      return step(i, carry, part)
    use = functools.partial(step, i, part=part)
    return lax.cond(self.fully_masked(i, part), functools.partial(skip, i), use, carry)

  def fully_masked(self, i: Scalar, part: str) -> jax.Array:
    """Whether no pair of step i attends: a tile that other warpgroups need."""
    last = self.base + TILE - 1
    if part == OWN:
      key, row = self.own_key(i), self.frame.row_of(self.base)
      return (key > last) | (key + self.step <= row)
    key, window = self.tile(i) * self.step, self.frame.window
    masked = self.frame.first_query(key) > last
    return masked if window is None else masked | (key + self.step + window - 1 <= self.base)

  def mask(self, i: Scalar, slot: Any, part: str | None) -> jax.Array | None:
    """Which of [64, step] attend in step i, whose tile lies in a slot; None: all."""
    if part is None:
      return None
    frame, step = self.frame, self.step
    high, low = self.bounds
    if part in (VIEW, EITHER):
      places = frame.key_places(self.tile(i) * step, step, self.item["h"], gpu.COLUMN)
    if part in (OWN, EITHER):
      own_places = self.own_key(i) + gpu.iota((step,), layout=gpu.COLUMN)
      low = frame.row_starts(self.base, TILE, gpu.ROW)
    if part == OWN:
      places = own_places
    if part == EITHER:  # arithmetic: a scalar does not select between arrays in a kernel
      own = (i >= self.num_view).astype(jnp.int32)
      places, low = own_places * own + places * (1 - own), low * own
    # A value per row and one per column are compared: positions of all pairs would be two tiles of
    # integers in registers.
    rows, columns = (lambda x: gpu.over_columns(x, step)), (lambda x: gpu.over_rows(x, TILE))
    mask = _attend(high, low, places, of_query=rows, of_key=columns)
    if frame.segments:
      ids = gpu.load(slot["ids"], layout=gpu.COLUMN, optimized=False)
      mask = mask & (rows(self.ids) == columns(ids))
      gpu.commit_reads()
    return mask


class QueryTiles(Tiles):
  """The tiles of queries that an item of keys sweeps, or a share of them.

  Batch row b of an item is share b // batch of the steps of batch row b % batch.

  Attributes:
    first_step, end_step: the item's own steps are first_step ... end_step - 1.
    b: its batch row.
  """

  def __init__(
    self, frame: Any, item: Item, k0: Scalar, blocks: BlockSizes, shares: int, batch: int
  ):
    super().__init__(frame, item, blocks.step, frame.query_tiles(k0, blocks.rows, blocks.step))
    self.b, share = rem(item["b"], batch), div(item["b"], batch)
    if shares == 1:
      self.first_step, self.end_step = 0 * self.num_tiles, self.num_tiles
    else:
      self.first_step = div(self.num_tiles * share, shares)
      self.end_step = div(self.num_tiles * (share + 1), shares)

  def head(self, i: Scalar, part: str | None = None) -> Scalar:
    """The head whose queries step i sees, of the launch."""
    del i, part
    return self.item["h"]

  def prepare(self, refs: Refs, base: Scalar) -> None:
    """For the masks of a warpgroup, whose keys are base ... base + 63."""
    self.base, frame = base, self.frame
    self.places = frame.key_places(base, TILE, self.item["h"], gpu.ROW)
    if frame.segments:
      ids = pairs.key_ids(refs).at[self.b, self.item["r"], gpu.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def run(self, step: Callable, carry: Any, *, skip: Callable) -> Any:
    """carry = step(i, carry, part) over the item's steps; skip(i, carry) where all is masked."""
    loop = lambda start, stop, part, carry: lax.fori_loop(
      start, stop, functools.partial(step, part=part), carry
    )
    masked, fully_masked = self._own_bounds()
    if self.frame.has_full:
      carry = loop(self.first_step, masked, None, carry)
    carry = loop(masked, fully_masked, VIEW, carry)
    # Masked tiles are swept last, backwards: at the end those of queries before all our keys.
    gpu.loop(fully_masked, self.end_step)(lambda i: skip(i, None))
    return carry

  def _own_bounds(self) -> tuple[Scalar, Scalar]:
    """The first steps that the warpgroup's own keys need a mask in, and that see none of them."""
    inside = lambda i: jnp.clip(i, self.first_step, self.end_step)
    if self.frame.window is not None:
      return inside(self.num_full), self.end_step
    # Other warpgroups may need masks longer, and begin earlier.
    first, full_first, *_ = self.frame.query_tiles(self.base, TILE, self.step)
    return inside(self.full_end - full_first), inside(self.full_end - first)

  def mask(self, i: Scalar, slot: Any, part: str | None) -> jax.Array | None:
    """Which of [64 keys, step queries] attend in step i; None: all."""
    if part is None:
      return None
    high, low = self.frame.query_bounds(self.tile(i) * self.step, self.step, gpu.COLUMN)
    rows, columns = (lambda x: gpu.over_columns(x, self.step)), (lambda x: gpu.over_rows(x, TILE))
    mask = _attend(high, low, self.places, of_query=columns, of_key=rows)
    if self.frame.segments:
      ids = gpu.load(slot["ids"], layout=gpu.COLUMN, optimized=False)
      mask = mask & (columns(ids) == rows(self.ids))
    return mask


def _attend(
  high: jax.Array,
  low: jax.Array | None,
  places: jax.Array,
  of_query: Callable,
  of_key: Callable,
) -> jax.Array:
  """Which pairs attend: places of keys between bounds of queries, each made as wide as a tile."""
  mask = of_query(high) >= of_key(places)
  return mask if low is None else mask & (of_query(low) <= of_key(places))
