"""The tiles of an item's list, step by step, and which of their pairs attend."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.lowering import lists
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.views import head_of

WORD = 32  # columns of a mask that a word of bits holds


class ListedTiles:
  """What `KeyTiles` and `QueryTiles` are, of a list: full blocks first, some tiles to a block.

  Rows are queries and columns keys, or with `batch` the other way round; then query tiles are those
  of all heads of a group. A masked step's part of the sweep is the number of its block, as the list
  has it: with the bits of its parts above it, if there are such.

  Attributes:
    per_block: tiles of a block.
    parts: whose bits numbers have above them, if any.
    q0, num: as of `KeyTiles`.
    b, first_step, end_step: as of `QueryTiles`.
  """

  def __init__(self, frame: Any, item: Item, blocks: BlockSizes, batch: int | None = None):
    self.frame, self.item, self.step = frame, item, blocks.step
    self.transposed = batch is not None
    self.parts = frame.parts[self.transposed]
    self.rows, self.columns = lists.BLOCK, lists.BLOCK if self.transposed else frame.problem.keys
    self.per_block = self.columns // blocks.step
    if not self.transposed:
      self.q0 = item["tile"] * blocks.rows
    self.num_listed = item["num"] * self.per_block
    self.num_full = item["num_full"] * self.per_block
    if not self.transposed:
      self.num = jnp.maximum(self.num_listed, 1)  # as of `KeyTiles`, though no such list is empty
    else:
      self.b = rem(item["b"], batch)
      self.first_step, self.end_step = jnp.int32(0), self.num_listed

  # -------------------------------------------------------------------------------------- steps

  def tile(self, i: Scalar, number: Scalar | None = None) -> Scalar:
    """The tile of step i, of a block whose number was read before or is read now."""
    number = self._itself(self.number(i) if number is None else number)
    if self.transposed:  # blocks of one head of a group are numbered after those of another
      number = rem(number, self.frame.problem.nq)
    return number if self.per_block == 1 else number * self.per_block + rem(i, self.per_block)

  def number(self, i: Scalar) -> Scalar:
    """Of the block of step i, as the list has it; that of step num_steps is not used."""
    # The list behind this one, or its own end where it is the last of all: nobody uses it.
    numbers = self.item["numbers"]
    return numbers[jnp.minimum(self._place(i), numbers.shape[0] - 1)]

  def head(self, i: Scalar, number: Scalar | None = None) -> Scalar:
    """The query head, of the launch."""
    size = len(self.frame.problem.owners[0])
    if not self.transposed or size == 1:
      return self.item["h"]
    first = self.item["h"] * size
    number = self._itself(self.number(i) if number is None else number)
    return first + div(number, self.frame.problem.nq)

  def _itself(self, number: Scalar) -> Scalar:
    return self.parts.number(number) if self.parts else number

  def first_part(self) -> Scalar:
    """The part of the first step, where masks are made without a condition."""
    return self.number(jnp.int32(0))

  def run(
    self, step: Callable, carry: Any, *, skip: Callable | None, first: int | None = None
  ) -> Any:
    """carry = step(i, carry, part) over the steps from `first` on; as of `KeyTiles`."""
    start = jnp.int32(0) if first is None else first
    masked = self.num_full if first is None else jnp.maximum(self.num_full, first)
    number = self.number(masked)
    carry = lax.fori_loop(start, masked, functools.partial(step, part=None), carry)

    def masked_step(i: Any, number_and_carry: tuple) -> tuple:
      number, carry = number_and_carry
      following = self.number(i + 1)  # read by its own step, it would be waited for: 500 cycles
      use = functools.partial(step, i, part=number)
      # A diagonal block has a quarter that nobody sees, which steps of half a block can pass over.
      passes_over = self.parts or (self.frame.causal and self.step < lists.BLOCK)
      if skip is None or not passes_over:
        return following, use(carry)
      skips = functools.partial(skip, i)
      return following, lax.cond(self.fully_masked(i, number), skips, use, carry)

    return lax.fori_loop(masked, self.num_listed, masked_step, (number, carry))[1]

  def _place(self, i: Scalar) -> Scalar:
    """Where the block of step i is in the lists."""
    return self.item["start"] + (i if self.per_block == 1 else div(i, self.per_block))

  # -------------------------------------------------------------------------------------- masks

  def prepare(self, refs: Refs, base: Scalar) -> None:
    """For the masks of a warpgroup, whose rows are base ... base + 63."""
    self.refs, self.base = refs, base
    if self.frame.segments:
      ids = pairs.key_ids(refs) if self.transposed else refs["ids"]
      ids = ids.at[self.item["b"], 0, gpu.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def fully_masked(self, i: Scalar, number: Scalar) -> jax.Array:
    """Whether no pair of step i attends, though some of the block do."""
    hidden = jnp.bool_(False)
    if self.frame.causal:
      first = self.tile(i, number) * self.step
      hidden = first + self.step <= self.base if self.transposed else first >= self.base + TILE
    if self.parts:
      hidden = hidden | (self._bits_here(i, number) == 0)
    return hidden

  def mask(self, i: Scalar, slot: Any, number: Scalar | None) -> jax.Array | None:
    """Which of [64, step] attend in step i, whose tile lies in a slot; None: all."""
    if number is None:
      return None
    frame, shape = self.frame, (TILE, self.step)
    queries, keys = self._positions(i, number)
    if not frame.formulas:
      mask = self._bits(i)
    elif len(frame.formulas) == 1:
      mask = frame.formulas[0](shape, queries, keys)
    else:
      turn = lax.broadcast(head_of(frame.formula_of, self.head(i, number)), shape)
      each = [
        (turn == n) & allowed(shape, queries, keys) for n, allowed in enumerate(frame.formulas)
      ]
      mask = functools.reduce(jnp.logical_or, each)
    if self.parts:
      mask = mask & self._listed(i, number)
    # Keys past the last one are zeros, and would have weights; queries past the last one matter
    # where a score function makes no number of them.
    if frame.ends_inside:
      mask = mask & (keys() < frame.num_keys)
    if self.transposed and frame.problem.rows_end:
      mask = mask & (queries() < frame.problem.T)
    if frame.segments:
      ids = gpu.load(slot["ids"], layout=gpu.COLUMN, optimized=False)
      mask = mask & (gpu.over_columns(self.ids, self.step) == gpu.over_rows(ids, TILE))
      gpu.commit_reads()
    return mask

  def _positions(self, i: Scalar, number: Scalar | None) -> tuple[Callable, Callable]:
    """What makes the positions of queries and of keys, [64, step] each."""
    # Functions: what nothing needs must not be made, it would have no layout.
    rows = lambda: gpu.over_columns(self.base + gpu.iota((TILE,), layout=gpu.ROW), self.step)

    def columns() -> Any:
      first = self.tile(i, number) * self.step
      return gpu.over_rows(first + gpu.iota((self.step,), layout=gpu.COLUMN), TILE)

    return (columns, rows) if self.transposed else (rows, columns)

  def _bits_here(self, i: Scalar, number: Scalar) -> Scalar:
    """Those of the parts that this warpgroup's rows and this step's columns are in."""
    rows, columns = self._first_parts(i)
    (R, row_bit), (C, column_bit) = self._sizes_and_bits()
    of_rows, of_columns = (max(1, n // size) for n, size in ((TILE, R), (self.step, C)))
    here = 0
    for n in range(of_rows):
      for m in range(of_columns):
        here |= 1 << (n * row_bit + m * column_bit)
    first = rows * row_bit + columns * column_bit
    return lax.shift_right_logical(self.parts.bits(number), first) & here

  def _listed(self, i: Scalar, number: Scalar) -> jax.Array:
    """Which of [64, step] are in parts that list each other."""
    bits, (rows, columns) = self.parts.bits(number), self._first_parts(i)
    (R, row_bit), (C, column_bit) = self._sizes_and_bits()
    place = 0
    if self.rows > R:
      own = rows + (gpu.iota((TILE,), layout=gpu.ROW) >> (R.bit_length() - 1))
      place = gpu.over_columns(own * row_bit, self.step)
    if self.columns > C:
      own = columns + (gpu.iota((self.step,), layout=gpu.COLUMN) >> (C.bit_length() - 1))
      place = place + gpu.over_rows(own * column_bit, TILE)
    bits = lax.broadcast(bits, (TILE, self.step))
    return (lax.shift_right_logical(bits, place) & 1) == 1

  def _sizes_and_bits(self) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of the parts of rows, and of columns: how long one is, and from bit to bit how far."""
    queries, keys = self.parts.queries, self.parts.keys
    if self.transposed:
      return (self.rows // keys, 1), (self.columns // queries, keys)
    return (self.rows // queries, keys), (self.columns // keys, 1)

  def _first_parts(self, i: Scalar) -> tuple[Scalar, Scalar]:
    """In which part of its tile the first of the rows is, and of its block the first column."""
    (R, _), (C, _) = self._sizes_and_bits()
    column = rem(i, self.per_block) * self.step if self.per_block > 1 else jnp.int32(0)
    return div(rem(self.base, self.rows), R), div(column, C)

  def _bits(self, i: Scalar) -> jax.Array:
    """The mask of a block as it was looked up before."""
    mask, num_words = self.refs["masks"][self._place(i)], self.step // WORD
    rows = rem(self.base, lists.BLOCK)
    first = rem(i, self.per_block) * num_words
    load = lambda n: gpu.load(
      self.refs["words"].at[mask, first + n, gpu.ds(rows, TILE)], layout=gpu.ROW, optimized=False
    )
    # A thread has its row's words, of which a column picks one, and a bit of it.
    column = gpu.iota((TILE, self.step), axis=1)
    words = gpu.over_columns(load(0), self.step)
    for n in range(1, num_words):
      words = jnp.where(column >= WORD * n, gpu.over_columns(load(n), self.step), words)
    return (lax.shift_right_logical(words, column & (WORD - 1)) & 1) == 1

  # ------------------------------------------------------------------------------------- logits

  def logits(
    self, i: Scalar, products: jax.Array, number: Scalar | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """The logits of products, and their derivatives by them; None where those are a factor."""
    if self.frame.scores is None:
      return products, None
    return formula.logits(self.frame.scores, products, *self._made_of(i, products, number))

  def value_derivatives(
    self, i: Scalar, products: jax.Array, number: Scalar | None
  ) -> list[jax.Array]:
    """The logits of products, and their derivatives by learned values."""
    scores = self.frame.scores
    return formula.value_derivatives(scores, products, *self._made_of(i, products, number))

  def _made_of(self, i: Scalar, products: jax.Array, number: Scalar | None) -> tuple:
    # Read by each step, not held in registers: it is one load from the cache.
    wide = lambda x: lax.broadcast(x, products.shape)
    head = lambda: head_of(self.frame.problem.heads, self.head(i, number))
    value = lambda n: lambda: wide(self.refs[f"value{n}"][head()])
    values = tuple(map(value, range(len(self.frame.values))))
    return *self._positions(i, number), values
