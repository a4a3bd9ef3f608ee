"""What the streaming kernels sweep where a pattern is no formula of tiles: lists of blocks.

`pallas_kernels.lowering.lists` makes the lists. A kernel's tile is a block, or a part of one.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.lowering import lists
from pallas_kernels.lowering.bits import Bits
from pallas_kernels.mosaic_gpu import formula
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores


class Listed(stream.Frame):
  """Lists of blocks at one size, of the natural view.

  Args:
    problem: sizes and heads; q and all that belongs to queries has these heads alone.
    causal: whether no query attends to a later key.
    by_queries, by_keys: the lists.
    formulas: which pairs of a block attend that is not full (`formula.of_pattern`); `formula_of`
      says which one is a head's. Empty where masks are bits.
    formula_of: for each head of the launch.
    bits: the masks of blocks, where pairs are no formula.
    segments: whether segment ids mask as well.
    scores: how logits are made, where that is more than a factor.
    values: what they need, for every query head.

  Attributes:
    ends_inside: whether masks have to hide keys past the last one.
  """

  def __init__(
    self,
    problem: lists.Problem,
    causal: bool,
    by_queries: lists.Lists,
    by_keys: lists.Lists | None,
    formulas: tuple[Callable, ...],
    formula_of: tuple[int, ...],
    bits: Bits | None,
    segments: bool,
    scores: Scores | None,
    values: tuple[Array, ...] = (),
  ):
    heads = range(len(problem.heads))
    one = stream.Schedule(view="natural")
    super().__init__(one, problem.T, len(heads), len(heads), heads, segments)
    self.problem, self.causal = problem, causal
    self.by_queries, self.by_keys = by_queries, by_keys
    self.formulas, self.formula_of, self.bits = formulas, formula_of, bits
    self.scores, self.values = scores, values
    self.has_full, self.num_keys = True, problem.S
    numbers = by_queries.numbers
    past_the_end = not isinstance(numbers, np.ndarray) or (numbers == problem.nk).any()
    self.ends_inside = past_the_end or problem.S % lists.BLOCK > 0

  def lists(self, transposed: bool):
    found = (self.by_keys if transposed else self.by_queries)._asdict()
    if self.bits is not None:
      found.update(words=self.bits.by_keys if transposed else self.bits.by_queries)
    found.update({f"value{n}": x for n, x in enumerate(self.values)})
    return {name: jnp.asarray(x) for name, x in found.items()}

  def keys(self, x):
    return jnp.pad(x, [(0, 0), (0, -self.num_keys % 8), (0, 0), (0, 0)]) if self.num_keys % 8 else x

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return (batch, self.num_keys + -self.num_keys % 8, len(self.problem.owners), D)

  def key_grads(self, x):
    return x[:, : self.num_keys] if self.num_keys % 8 else x

  def load_keys(self, copy, source, item, tile, step):
    copy(source.at[item["b"], pl.ds(tile * step, step), item["kv"]], 0, step)

  def work(self, blocks: stream.BlockSizes, batch: int, transposed: bool) -> "Work":
    del batch
    found = self.by_keys if transposed else self.by_queries
    return Work(found.cores.shape[0] - 1, lists.BLOCK // blocks.rows)

  def first_row(self, item, rows: int):
    return item["tile"] * rows

  def key_tiles(self, item, q0, rows: int, step: int) -> "Tiles":
    del q0, rows
    return Tiles(item, lists.BLOCK // step, None)

  def query_tiles(self, item, k0, keys: int, step: int) -> "Tiles":
    del k0, keys
    return Tiles(item, lists.BLOCK // step, self.problem.nq)

  def query_head(self, item, tiles, i, number=None):
    size = len(self.problem.owners[0])
    return item["h"] if size == 1 else item["h"] * size + tiles.group(i, number)


class Tiles:
  """The tiles of an item's list, `parts` to a block; of groups with `per_head` blocks a head."""

  def __init__(self, item, parts: int, per_head: int | None):
    self.item, self.parts, self.per_head = item, parts, per_head
    self.num, self.num_full = item["num"] * parts, item["num_full"] * parts

  def tile(self, i, number=None):
    """The tile of step i, of a block whose number was read before or is read now."""
    number = self.number(i) if number is None else number
    if self.per_head is not None:
      number = lax.rem(number, jnp.int32(self.per_head))
    return number if self.parts == 1 else number * self.parts + lax.rem(i, jnp.int32(self.parts))

  def group(self, i, number=None):
    """Whose block of queries it is, of the heads of a group."""
    return stream.div(self.number(i) if number is None else number, self.per_head)

  def place(self, i):
    """Where the block of step i is in the lists."""
    return self.item["start"] + (i if self.parts == 1 else stream.div(i, self.parts))

  def number(self, i):
    """Of the block of step i; of no one's, one step after the last."""
    numbers = self.item["numbers"]
    return numbers[jnp.minimum(self.place(i), numbers.shape[0] - 1)]

  def each(self, start, number, body: Callable, carry):
    """carry = body(i, number of its block, carry) for steps from `start` on, whose is `number`.

    A number comes from memory while the step before runs.
    """
    step = lambda i, both: (self.number(i + 1), body(i, *both))
    return lax.fori_loop(start, self.num, step, (number, carry))[1]


class Work:
  """The items of a launch as lists deal them to cores.

  Args:
    num_cores: of the lists; a team of warpgroups takes the items of one.
    halves: items of the kernel to one of the lists.
  """

  def __init__(self, num_cores: int, halves: int, refs=None, core=None):
    self.num_blocks, self.halves, self.refs, self.core = num_cores, halves, refs, core

  def of(self, refs, core=None) -> "Work":
    core = lax.axis_index("core") if core is None else core
    return Work(self.num_blocks, self.halves, refs, core)

  def count(self):
    return self.refs["cores"][self.core, 1] * self.halves

  def each(self, body: Callable, carry):
    """carry = body(item, its number in this thread block, carry) for the items dealt to it."""
    refs, last = self.refs, self.refs["items"].shape[0] - 1
    first = refs["cores"][self.core, 0]

    def read(n):
      place = jnp.minimum(first + stream.div(n, self.halves), last)
      return tuple(refs["items"][place, m] for m in range(len(lists.FIELDS)))

    def step(n, carry):
      fields, carry = carry
      item = dict(zip(lists.FIELDS, fields, strict=True), r=jnp.int32(0), numbers=refs["numbers"])
      if self.halves > 1:
        item["tile"] = item["tile"] * self.halves + lax.rem(n, jnp.int32(self.halves))
      following = read(n + 1)  # on its way while this one is worked on
      return following, body(item, n, carry)

    return lax.fori_loop(0, self.count(), step, (read(jnp.int32(0)), carry))[1]


class Masks:
  """The pairs of 64 rows and the columns of a step that attend; rows are queries, or keys."""

  def __init__(self, refs, frame: Listed, sweep, item, base, transposed: bool = False):
    self.refs, self.frame, self.sweep, self.item = refs, frame, sweep, item
    self.base, self.transposed = base, transposed
    self.step = sweep.blocks.step if transposed else sweep.step
    self.hides = frame.causal and self.step < lists.BLOCK
    if frame.segments:
      ids = refs["ids"].at[item["b"], 0, pl.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def places(self, i, number=None):
    """What makes the positions of queries and of keys, [64, step] each.

    One that nothing needs must not be made: it would have no layout.
    """
    rows = lambda: gpu.over_columns(self.base + gpu.iota((TILE,), layout=gpu.ROW), self.step)

    def columns():
      first = self.sweep.tiles.tile(i, number) * self.step
      return gpu.over_rows(first + gpu.iota((self.step,), layout=gpu.COLUMN), TILE)

    return (columns, rows) if self.transposed else (rows, columns)

  def head(self, i, number=None):
    """The query head, of the launch."""
    if self.transposed:
      return self.frame.query_head(self.item, self.sweep.tiles, i, number)
    return self.item["h"]

  def hide(self, i, number):
    """Whether no pair of step i attends, though some of the block do."""
    first = self.sweep.tiles.tile(i, number) * self.step
    if self.transposed:
      return first + self.step <= self.base
    return first >= self.base + TILE

  def logits(self, i, products, number=None):
    """Of products, and their derivatives."""
    return formula.logits(self.frame.scores, products, *self._made_of(i, products, number))

  def slopes(self, i, products, number=None):
    """The logits of products, and their derivatives by learned values."""
    return formula.slopes(self.frame.scores, products, *self._made_of(i, products, number))

  def _made_of(self, i, products, number):
    wide = lambda x: lax.broadcast(x, products.shape)
    head = lambda: head_of(self.frame.problem.heads, self.head(i, number))
    value = lambda n: lambda: wide(self.refs[f"value{n}"][head()])
    values = tuple(map(value, range(len(self.frame.values))))
    return *self.places(i, number), values

  def __call__(self, i, s, number=None):
    """Which of [64, step] attend in step i, whose tile lies in slot s.

    `number` is its block's, where that was read before.
    """
    frame, shape = self.frame, (TILE, self.step)
    queries, keys = self.places(i, number)
    if frame.bits is not None:
      mask = self.bits(i)
    elif len(frame.formulas) == 1:
      mask = frame.formulas[0](shape, queries, keys)
    else:
      turn = lax.broadcast(head_of(frame.formula_of, self.head(i, number)), shape)
      found = [(turn == n) & one(shape, queries, keys) for n, one in enumerate(frame.formulas)]
      mask = functools.reduce(jnp.logical_or, found)
    if frame.ends_inside:
      mask = mask & (keys() < frame.num_keys)
    if self.transposed and frame.problem.rows_end:
      mask = mask & (queries() < frame.problem.T)
    if frame.segments:
      ids = gpu.load(self.refs["ids_s"].at[s], layout=gpu.COLUMN, optimized=False)
      mask = mask & (gpu.over_columns(self.ids, self.step) == gpu.over_rows(ids, TILE))
      gpu.commit_reads()
    return mask

  def bits(self, i):
    """The mask of a block as it was looked up before."""
    tiles, step = self.sweep.tiles, self.step
    mask = self.refs["masks"][tiles.place(i)]
    rows = lax.rem(self.base, jnp.int32(lists.BLOCK))
    first = lax.rem(i, jnp.int32(tiles.parts)) * (step // 32)
    load = lambda n: gpu.load(
      self.refs["words"].at[mask, first + n, pl.ds(rows, TILE)], layout=gpu.ROW, optimized=False
    )
    column = gpu.iota((TILE, step), axis=1)
    words = gpu.over_columns(load(0), step)
    for n in range(1, step // 32):
      words = jnp.where(column >= 32 * n, gpu.over_columns(load(n), step), words)
    return (lax.shift_right_logical(words, column & 31) & 1) == 1


@functools.lru_cache(maxsize=64)
def formulas(pattern: Pattern, heads: tuple[int, ...]):
  """The formulas of a pattern's heads, each once, and the place of every head's; else ().

  Heads whose layouts differ may have one formula.
  """
  found = [formula.of_pattern(pattern.of_head(h)) for h in heads]
  if None in found:
    return (), ()
  each = list(dict.fromkeys(found))
  return tuple(each), tuple(each.index(one) for one in found)
