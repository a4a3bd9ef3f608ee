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
  of all heads of a group. A masked step's part of the sweep is the number of its block.

  Attributes:
    per_block: tiles of a block.
    q0, num: as of `KeyTiles`.
    b, first_step, end_step: as of `QueryTiles`.
  """

  def __init__(self, frame: Any, item: Item, blocks: BlockSizes, batch: int | None = None):
    self.frame, self.item, self.step = frame, item, blocks.step
    self.transposed, self.per_block = batch is not None, lists.BLOCK // blocks.step
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
    number = self.number(i) if number is None else number
    if self.transposed:  # blocks of one head of a group are numbered after those of another
      number = rem(number, self.frame.problem.nq)
    return number if self.per_block == 1 else number * self.per_block + rem(i, self.per_block)

  def number(self, i: Scalar) -> Scalar:
    """Of the block of step i; step num_steps has no block, and its number is not used."""
    # The list behind this one, or its own end where it is the last of all: nobody uses it.
    numbers = self.item["numbers"]
    return numbers[jnp.minimum(self._place(i), numbers.shape[0] - 1)]

  def head(self, i: Scalar, number: Scalar | None = None) -> Scalar:
    """The query head, of the launch."""
    size = len(self.frame.problem.owners[0])
    if not self.transposed or size == 1:
      return self.item["h"]
    first = self.item["h"] * size
    number = self.number(i) if number is None else number
    return first + div(number, self.frame.problem.nq)

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
      if skip is None or not (self.frame.causal and self.step < lists.BLOCK):
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
    """Whether no pair of step i attends, though some of the block do; of causal patterns."""
    first = self.tile(i, number) * self.step
    if self.transposed:
      return first + self.step <= self.base
    return first >= self.base + TILE

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
