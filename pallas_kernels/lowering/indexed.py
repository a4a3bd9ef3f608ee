"""Lists of blocks straight from indices, for groups of whole tiles of queries: no mask, no sort.

What `lists` makes of a block mask [nq, nk], here of the entries alone: `width` for each tile.

    by queries    the list of a tile itself, full blocks first
    by keys       a bit for each tile of queries that reads a block; a tile's place in the list of
                  the block is the number of bits before its own

Bits of a word are added, each once, and places are distinct: the same lists in each run.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array
from jaxtyping import Int

from pallas_kernels import patterns
from pallas_kernels.lowering import lists
from pallas_kernels.lowering.lists import Lists
from pallas_kernels.lowering.lists import Problem

FULL, MASKED, NONE = 0, 1, 2  # kinds of a block of a list
WORD = 32  # bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexed:
  """Which blocks are listed.

  Attributes:
    indices: blocks of `block_size` keys of each `query_block` queries, both multiples of
      `lists.BLOCK`; any other number is none.
    block_size: keys of a block.
    query_block: queries that share a list.
  """

  indices: Int[Array, "Bi Hi lists top"]
  block_size: int
  query_block: int


class Entries(NamedTuple):
  """The lists of tiles of BLOCK queries, ascending, full blocks first, then masked ones, then none.

  Attributes:
    blocks: of BLOCK keys.
    kinds: of these.
    which: the mask of each, where masks are bits.
  """

  blocks: Int[Array, "Bi Hi nq width"]
  kinds: Int[Array, "Bi Hi nq width"]
  which: Int[Array, "Bi Hi nq width"] | None


def entries(
  indexed: Indexed,
  pattern: patterns.Pattern,
  problem: Problem,
  with_bits: bool,
  segments: tuple[Array | None, Array | None] = (None, None),
) -> Entries:
  """The lists of a launch.

  Args:
    indexed: with lists for all heads of the launch, or one for all.
    pattern: what attends of the pairs that are listed.
    problem: of the launch.
    with_bits: whether masks are bits.
    segments: ids of queries and of keys; those of queries serve both if keys have none.
  """
  ratio, nk = indexed.block_size // lists.BLOCK, problem.nk
  of_tiles = jnp.repeat(indexed.indices, indexed.query_block // lists.BLOCK, axis=2)
  of_tiles = of_tiles[:, :, : problem.nq]
  listed = (of_tiles >= 0) & (of_tiles < -(-problem.S // indexed.block_size))
  parts = np.arange(ratio).reshape(1, 1, 1, 1, -1)  # blocks of BLOCK keys in a listed one
  blocks = jnp.where(listed, of_tiles, nk)[..., None] * ratio + parts
  blocks = jnp.minimum(blocks.reshape(*blocks.shape[:3], -1), nk).astype(jnp.int32)
  some, every = _of_pattern(pattern, problem, blocks)
  if segments[0] is not None:
    some, every = _of_segments(some, every, blocks, *segments)
  blocks, some, every = jnp.broadcast_arrays(blocks, some, every)
  kinds = jnp.where(some, jnp.where(every, FULL, MASKED), NONE)
  ordered = jnp.sort(kinds * (nk + 1) + blocks, axis=-1)
  kinds, blocks = ordered // (nk + 1), ordered % (nk + 1)
  which, _ = lists.traced_bits(pattern, problem, with_bits, transposed=False)
  if which is not None:
    which = _looked_up(np.pad(which[0], [(0, 0), (0, 0), (0, 1)]), blocks)
  return Entries(blocks, kinds, which)


def _of_pattern(pattern: patterns.Pattern, problem: Problem, blocks: Array) -> tuple[Any, Any]:
  """Whether any, and whether every pair of a tile and a block attends."""
  tile, nk = np.arange(problem.nq).reshape(1, 1, -1, 1), problem.nk
  if pattern == patterns.Dense():  # a table of all blocks would be larger than the lists
    rows = (tile + 1) * lists.BLOCK <= problem.T if problem.rows_end else True
    whole = (blocks + 1) * lists.BLOCK <= problem.S
    return (blocks <= tile) & (blocks < nk), (blocks < tile) & whole & rows
  # One more column, of the block that is none.
  some, every = (np.pad(x[0], [(0, 0), (0, 0), (0, 1)]) for x in lists.of_pattern(pattern, problem))
  return _looked_up(some, blocks), _looked_up(every, blocks)


def _looked_up(table: np.ndarray, blocks: Int[Array, "Bi Hi nq width"]) -> Array:
  """table [heads or 1, nq, nk + 1] at the blocks of each tile, for each head where they differ."""
  blocks = jnp.broadcast_to(
    blocks, (blocks.shape[0], max(len(table), blocks.shape[1]), *blocks.shape[2:])
  )
  return jnp.take_along_axis(jnp.asarray(table)[None], blocks, axis=-1, mode="clip")


def _of_segments(some, every, blocks, segment_ids, kv_segment_ids) -> tuple[Array, Array]:
  """As `lists.masked`: segments are compared by the least and the largest id of a block."""
  low, high = kv_low, kv_high = lists.ranges(segment_ids)
  if kv_segment_ids is not None:
    kv_low, kv_high = lists.ranges(kv_segment_ids)
  B = low.shape[0]
  blocks = jnp.broadcast_to(blocks, (B, *blocks.shape[1:]))
  queries = lambda x: x[:, None, :, None]
  keys = lambda x: jnp.take_along_axis(x[:, None, None], blocks, axis=-1, mode="clip")
  kv_low, kv_high, low, high = keys(kv_low), keys(kv_high), queries(low), queries(high)
  some = some & (low <= kv_high) & (kv_low <= high)
  return some, every & some & (low == high) & (kv_low == kv_high) & (low == kv_low)


def by_queries(of: Entries, pattern: patterns.Pattern, problem: Problem, with_bits: bool) -> Lists:
  """As `lists.traced_by_queries`."""
  _, words = lists.traced_bits(pattern, problem, with_bits, transposed=False)
  count = lambda those: those.sum(axis=-1, dtype=jnp.int32)
  num_full, num = count(of.kinds == FULL), count(of.kinds != NONE)
  # A tile without keys has the block behind the last one.
  nobody = (num == 0)[..., None] & (np.arange(of.blocks.shape[-1]) == 0).reshape(1, 1, 1, -1)
  blocks = jnp.where(nobody, problem.nk, of.blocks)
  start = jnp.arange(num.size, dtype=jnp.int32).reshape(num.shape) * blocks.shape[-1]
  heads = [(h, head // problem.group) for h, head in enumerate(problem.heads)]
  masks = jnp.zeros(1, jnp.int32) if of.which is None else jnp.where(nobody, 0, of.which)
  fields = dict(start=start, num_full=num_full, num=jnp.maximum(num, 1))
  return lists.dealt(fields, heads, problem, blocks, masks, words)


def by_keys(of: Entries, pattern: patterns.Pattern, problem: Problem, with_bits: bool) -> Lists:
  """As `lists.traced_by_keys`."""
  _, words = lists.traced_bits(pattern, problem, with_bits, transposed=True)
  owners, nq, nk = problem.owners, problem.nq, problem.nk
  size = len(owners[0])
  columns = size * nq

  def of_owners(x: Array) -> Array:
    """[.., heads, nq, width] -> [.., owners, group * nq * width], in the order of `columns`."""
    if x.shape[1] == 1:
      return jnp.tile(x.reshape(x.shape[0], 1, -1), (1, 1, size))
    return x.reshape(x.shape[0], len(owners), -1)

  blocks, kinds = of_owners(of.blocks), of_owners(of.kinds)
  column = np.repeat(np.arange(columns, dtype=np.int32), of.blocks.shape[-1])[None, None]
  word, bit = column // WORD, np.uint32(1) << (column % WORD).astype(np.uint32)
  num_words = -(-columns // WORD)
  lead = blocks.shape[:2]
  places = np.ix_(*(np.arange(n) for n in lead), [0])[:2]  # of the lists of an owner

  def ranks(kind: int) -> tuple[Array, Array]:
    """How many tiles of a kind read each block, and how many of them come before each entry's."""
    target = jnp.where(kinds == kind, blocks, nk)
    bits = jnp.zeros((*lead, nk, num_words), jnp.uint32)
    bits = bits.at[(*places, target, word)].add(bit, mode="drop")
    counts = lax.population_count(bits).astype(jnp.int32)
    before = jnp.cumsum(counts, axis=-1) - counts
    at = (*places, jnp.minimum(target, nk - 1), word)
    below = lax.population_count(bits[at] & (bit - 1)).astype(jnp.int32)
    return counts.sum(axis=-1), before[at] + below

  (num_full, of_full), (num_masked, of_masked) = ranks(FULL), ranks(MASKED)
  num = num_full + num_masked
  start = (jnp.cumsum(num.reshape(-1)) - num.reshape(-1)).astype(jnp.int32).reshape(num.shape)
  at = (*places, jnp.minimum(blocks, nk - 1))
  rank = jnp.where(kinds == FULL, of_full, num_full[at] + of_masked)
  place = jnp.where(kinds == NONE, blocks.size, start[at] + rank).reshape(-1)
  scattered = lambda x: (
    jnp.zeros(blocks.size + 1, jnp.int32)
    .at[place]
    .set(jnp.broadcast_to(x, blocks.shape).reshape(-1).astype(jnp.int32), mode="drop")
  )
  heads = [(n, problem.heads[owner[0]] // problem.group) for n, owner in enumerate(owners)]
  masks = jnp.zeros(1, jnp.int32) if of.which is None else scattered(of_owners(of.which))
  fields = dict(start=start, num_full=num_full, num=num)
  return lists.dealt(fields, heads, problem, scattered(column), masks, words)
