"""The tiles of an item's list, step by step, and which of their pairs attend."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from pallas_kernels import lists
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.integers import div
from pallas_kernels.mosaic_gpu.stream.integers import rem
from pallas_kernels.mosaic_gpu.views import head_of

WORD = 32  # columns of a mask that a word of bits holds


class ListedTiles:
  """What `KeyTiles` and `QueryTiles` are, of a list: full blocks first, `parts` tiles to a block.

  Rows are queries and columns keys, or with `transposed` the other way round. A masked step's part
  of the sweep is the number of its block, which is read while the step before runs: read by the
  step itself, it would be waited for.

  Attributes:
    num: steps.
    q0: the first query of rows that are queries.
    first_step, last_step, b: as of `QueryTiles`.
  """

  def __init__(self, frame, item: dict, step: int, transposed: bool):
    self.frame, self.item, self.step, self.transposed = frame, item, step, transposed
    self.parts = lists.BLOCK // step
    self.num_listed, self.num_full = item["num"] * self.parts, item["num_full"] * self.parts

  @classmethod
  def of_keys(cls, frame, item: dict, blocks: BlockSizes) -> "ListedTiles":
    """The key tiles of an item of queries."""
    q0 = item["tile"] * blocks.rows
    tiles = cls(frame, item, blocks.step, transposed=False)
    tiles.q0, tiles.num = q0, jnp.maximum(tiles.num_listed, 1)
    return tiles

  @classmethod
  def of_queries(cls, frame, item: dict, blocks: BlockSizes, batch: int) -> "ListedTiles":
    """The query tiles of an item of keys, of all heads of a group."""
    tiles = cls(frame, item, blocks.step, transposed=True)
    tiles.b = rem(item["b"], batch)
    tiles.first_step, tiles.last_step = jnp.int32(0), tiles.num_listed
    return tiles

  # -------------------------------------------------------------------------------------- steps

  def tile(self, i, number=None):
    """The tile of step i, of a block whose number was read before or is read now."""
    number = self.number(i) if number is None else number
    if self.transposed:  # blocks of one head of a group are numbered after those of another
      number = rem(number, self.frame.problem.nq)
    return number if self.parts == 1 else number * self.parts + rem(i, self.parts)

  def number(self, i):
    """Of the block of step i; of no one's, one step after the last."""
    numbers = self.item["numbers"]
    return numbers[jnp.minimum(self._place(i), numbers.shape[0] - 1)]

  def head(self, i, number=None):
    """The query head, of the launch."""
    size = len(self.frame.problem.owners[0])
    if not self.transposed or size == 1:
      return self.item["h"]
    first = self.item["h"] * size
    number = self.number(i) if number is None else number
    return first + div(number, self.frame.problem.nq)

  def first_part(self):
    """The part of the first step, where masks are made without a condition."""
    return self.number(jnp.int32(0))

  def run(self, step: Callable, carry, *, skip: Callable | None, first: int | None = None):
    """carry = step(i, carry, part) over the steps from `first` on; as of `KeyTiles`."""
    start = jnp.int32(0) if first is None else first
    masked = self.num_full if first is None else jnp.maximum(self.num_full, first)
    number = self.number(masked)
    carry = lax.fori_loop(start, masked, functools.partial(step, part=None), carry)

    def masked_step(i, number_and_carry):
      number, carry = number_and_carry
      following = self.number(i + 1)
      use = functools.partial(step, i, part=number)
      if skip is None or not (self.frame.causal and self.step < lists.BLOCK):
        return following, use(carry)
      skips = functools.partial(skip, i)
      return following, lax.cond(self.fully_masked(i, number), skips, use, carry)

    return lax.fori_loop(masked, self.num_listed, masked_step, (number, carry))[1]

  def _place(self, i):
    """Where the block of step i is in the lists."""
    return self.item["start"] + (i if self.parts == 1 else div(i, self.parts))

  # -------------------------------------------------------------------------------------- masks

  def prepare(self, refs: dict, base):
    """For the masks of a warpgroup, whose rows are base ... base + 63."""
    self.refs, self.base = refs, base
    if self.frame.segments:
      ids = refs["ids"].at[self.item["b"], 0, gpu.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def fully_masked(self, i, number):
    """Whether no pair of step i attends, though some of the block do; of causal patterns."""
    first = self.tile(i, number) * self.step
    if self.transposed:
      return first + self.step <= self.base
    return first >= self.base + TILE

  def mask(self, i, slot, number):
    """Which of [64, step] attend in step i, whose tile lies in a slot; None: all."""
    if number is None:
      return None
    frame, shape = self.frame, (TILE, self.step)
    queries, keys = self._positions(i, number)
    if frame.bits is not None:
      mask = self._bits(i)
    elif len(frame.formulas) == 1:
      mask = frame.formulas[0](shape, queries, keys)
    else:
      turn = lax.broadcast(head_of(frame.formula_of, self.head(i, number)), shape)
      each = [
        (turn == n) & allowed(shape, queries, keys) for n, allowed in enumerate(frame.formulas)
      ]
      mask = functools.reduce(jnp.logical_or, each)
    if frame.ends_inside:
      mask = mask & (keys() < frame.num_keys)
    if self.transposed and frame.problem.rows_end:
      mask = mask & (queries() < frame.problem.T)
    if frame.segments:
      ids = gpu.load(slot["ids"], layout=gpu.COLUMN, optimized=False)
      mask = mask & (gpu.over_columns(self.ids, self.step) == gpu.over_rows(ids, TILE))
      gpu.commit_reads()
    return mask

  def _positions(self, i, number=None):
    """What makes the positions of queries and of keys, [64, step] each.

    One that nothing needs must not be made: it would have no layout.
    """
    rows = lambda: gpu.over_columns(self.base + gpu.iota((TILE,), layout=gpu.ROW), self.step)

    def columns():
      first = self.tile(i, number) * self.step
      return gpu.over_rows(first + gpu.iota((self.step,), layout=gpu.COLUMN), TILE)

    return (columns, rows) if self.transposed else (rows, columns)

  def _bits(self, i):
    """The mask of a block as it was looked up before."""
    mask, num_words = self.refs["masks"][self._place(i)], self.step // WORD
    rows = rem(self.base, lists.BLOCK)
    first = rem(i, self.parts) * num_words
    load = lambda n: gpu.load(
      self.refs["words"].at[mask, first + n, gpu.ds(rows, TILE)], layout=gpu.ROW, optimized=False
    )
    column = gpu.iota((TILE, self.step), axis=1)
    words = gpu.over_columns(load(0), self.step)
    for n in range(1, num_words):
      words = jnp.where(column >= WORD * n, gpu.over_columns(load(n), self.step), words)
    return (lax.shift_right_logical(words, column & (WORD - 1)) & 1) == 1

  # ------------------------------------------------------------------------------------- logits

  def logits(self, i, products, number):
    """The logits of products, and their derivatives by them; None where those are a factor."""
    if self.frame.scores is None:
      return products, None
    return formula.logits(self.frame.scores, products, *self._made_of(i, products, number))

  def value_derivatives(self, i, products, number):
    """The logits of products, and their derivatives by learned values."""
    scores = self.frame.scores
    return formula.value_derivatives(scores, products, *self._made_of(i, products, number))

  def _made_of(self, i, products, number):
    wide = lambda x: lax.broadcast(x, products.shape)
    head = lambda: head_of(self.frame.problem.heads, self.head(i, number))
    value = lambda n: lambda: wide(self.refs[f"value{n}"][head()])
    values = tuple(map(value, range(len(self.frame.values))))
    return *self._positions(i, number), values
