"""What the streaming kernels sweep where a pattern is no formula of tiles: lists of blocks.

`lowering/lists.py` makes the lists. A kernel's tile is a block, or a part of one.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pallas_kernels.lowering import lists
from pallas_kernels.lowering.indexed import Parts
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.mosaic_gpu.stream.arrays import padded
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.frame import COPY_ROWS
from pallas_kernels.mosaic_gpu.stream.listed_tiles import ListedTiles
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.views import Natural
from pallas_kernels.mosaic_gpu.stream.work import Work
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

# What a kernel reads (`lowering.lists.Lists`):
#
#   cores     [first item, number of items]            of each team of warpgroups
#      |
#   items     [b, h, kv, tile, start, num_full, num]   in the order they are worked on
#      |                         |
#   numbers   .. | full blocks, then masked blocks | ..        `num` of them from `start` on
#   masks     .. |  -              place in words  | ..        beside them, where masks are bits
#   words     [words, 128] of each mask


class Listed(Natural):
  """Lists of blocks at one size, of the natural view.

  Args:
    problem: sizes and heads; q and all that belongs to queries has these heads alone.
    causal: whether no query attends to a later key.
    by_queries, by_keys: the lists.
    formulas: which pairs of a block attend that is not full (`formula.of_pattern`); `formula_of`
      says which one is a head's. Empty where masks are bits.
    formula_of: for each head of the launch.
    segments: whether segment ids mask as well.
    scores: how logits are made, where that is more than a factor.
    values: what they need, for every query head.
    parts: whose bits numbers have above them in lists of queries, and in those of keys; None where
      they have none.

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
    segments: bool,
    scores: Scores | None,
    values: tuple[Array, ...] = (),
    parts: Sequence[Parts | None] = (None, None),
  ):
    heads = range(len(problem.heads))
    natural = Pass(view="natural")
    super().__init__(natural, problem.T, len(heads), len(heads), heads, segments)
    self.problem, self.causal = problem, causal
    self.by_queries, self.by_keys = by_queries, by_keys
    self.formulas, self.formula_of = formulas, formula_of
    self.scores, self.values, self.parts = scores, values, tuple(parts)
    self.num_keys = problem.S
    self.has_full = True  # also with segment ids: the lists say which blocks they leave whole
    numbers = by_queries.numbers
    past_the_end = not isinstance(numbers, np.ndarray) or (numbers == problem.nk).any()
    self.ends_inside = past_the_end or problem.S % problem.keys > 0

  def lists(self, transposed: bool) -> dict[str, Array]:
    arrays = (self.by_keys if transposed else self.by_queries)._asdict()
    arrays.update({f"value{n}": x for n, x in enumerate(self.values)})
    return {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}

  def keys(self, x: Array) -> Array:
    return padded(x, 1, -self.num_keys % COPY_ROWS)

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return batch, self.num_keys + -self.num_keys % COPY_ROWS, len(self.problem.owners), D

  def key_grads(self, x: Array) -> Array:
    return x[:, : self.num_keys] if self.num_keys % COPY_ROWS else x

  def load_keys(self, copy: Callable, source: Any, item: Item, tile: Scalar, step: int) -> None:
    copy(source.at[item["b"], gpu.ds(tile * step, step), item["kv"]], 0, step)

  def work(self, blocks: BlockSizes, batch: int, transposed: bool) -> Work:
    del batch
    num_cores = (self.by_keys if transposed else self.by_queries).cores.shape[0] - 1
    return ListedWork(num_cores, lists.BLOCK // blocks.rows)

  def sweep_keys(self, item: Item, blocks: BlockSizes) -> ListedTiles:
    return ListedTiles(self, item, blocks)

  def sweep_queries(
    self, item: Item, k0: Scalar, blocks: BlockSizes, shares: int, batch: int
  ) -> ListedTiles:
    del k0
    assert shares == 1
    return ListedTiles(self, item, blocks, batch)


class ListedWork(Work):
  """The items of a launch as lists deal them to cores.

  Args:
    num_cores: of the lists; a team of warpgroups takes the items of one.
    per_block: items of the kernel to one of the lists.
  """

  def __init__(
    self, num_cores: int, per_block: int, refs: Refs | None = None, core: Scalar | None = None
  ):
    self.num_blocks, self.per_block = num_cores, per_block
    self.refs, self.core = refs, core

  def of(self, refs: Refs, core: Scalar | None = None) -> "ListedWork":
    core = lax.axis_index("core") if core is None else core
    return ListedWork(self.num_blocks, self.per_block, refs, core)

  def count(self) -> Scalar:
    return self.refs["cores"][self.core, 1] * self.per_block

  def each(self, body: Callable, carry: Any) -> Any:
    refs, last = self.refs, self.refs["items"].shape[0] - 1
    first = refs["cores"][self.core, 0]

    def read(n: Any) -> tuple:
      place = jnp.minimum(first + div(n, self.per_block), last)
      return tuple(refs["items"][place, m] for m in range(len(lists.FIELDS)))

    def step(n: Any, carry: Any) -> tuple:
      fields, carry = carry
      item = dict(zip(lists.FIELDS, fields, strict=True), r=jnp.int32(0), numbers=refs["numbers"])
      if self.per_block > 1:
        item["tile"] = item["tile"] * self.per_block + rem(n, self.per_block)
      following = read(n + 1)  # on its way while this one is worked on
      return following, body(item, n, carry)

    return lax.fori_loop(0, self.count(), step, (read(jnp.int32(0)), carry))[1]


@functools.lru_cache(maxsize=64)
def formulas(pattern: Pattern, heads: tuple[int, ...]) -> tuple[tuple, tuple[int, ...]]:
  """The formulas of a pattern's heads, each once, and the place of every head's; else ().

  Heads whose layouts differ may have one formula.
  """
  of_heads = [formula.of_pattern(pattern.of_head(h)) for h in heads]
  if None in of_heads:
    return (), ()
  distinct = list(dict.fromkeys(of_heads))
  return tuple(distinct), tuple(map(distinct.index, of_heads))
