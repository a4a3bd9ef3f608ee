"""Lists of blocks straight from indices, for groups of queries: no mask of all blocks.

What `lists` makes of a block mask [nq, nk], here of the entries alone: `width` for each tile.

    by queries    the list of a tile itself, full blocks first
    by keys       a bit for each tile of queries that reads a block; a tile's place in the list of
                  the block is the number of bits before its own

Bits of a word are added, each once, and places are distinct: the same lists in each run.

Where lists are of fewer queries than a tile has, or of blocks smaller than one of the kernels, a
tile reads the union of its lists, and each entry says by bits who listed it and what (`Parts`):

    lists of a tile, top 3     0: 0 2 9    1: 0 2 8    2: 0 3 9    3: 0 2 9
    the tile's                 0 [0 1 2 3]    2 [0 1 3]    3 [2]    8 [1]    9 [0 2 3]
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
    indices: blocks of `block_size` keys of each `query_block` queries, both multiples or parts of
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
    blocks: of `Problem.keys` keys.
    kinds: of these.
    which: the mask of each, where masks are bits.
    parts: which parts of tile and block are listed, where there are such.
  """

  blocks: Int[Array, "Bi Hi nq width"]
  kinds: Int[Array, "Bi Hi nq width"]
  which: Int[Array, "Bi Hi nq width"] | None
  parts: Int[Array, "Bi Hi nq width"] | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
  """Parts of a tile that have a list each, and of a block that are listed apart.

  A number in a list, of a block or of a tile of queries, has above it a bit for each part of the
  tile and of the block: bit n * keys + m for part n of the queries and part m of the keys.

  Attributes:
    queries: in how many parts a tile of queries is cut.
    keys: likewise a block of keys.
    first_bit: the lowest of these bits.
  """

  queries: int
  keys: int
  first_bit: int

  @property
  def num(self) -> int:
    return self.queries * self.keys

  @property
  def all(self) -> int:
    return (1 << self.num) - 1

  def number(self, numbered: Any) -> Any:
    """The number itself."""
    return numbered & ((1 << self.first_bit) - 1)

  def bits(self, numbered: Any) -> Any:
    return lax.shift_right_logical(numbered, jnp.int32(self.first_bit))


def parts_of(query_block: int, block_size: int, problem: Problem) -> Parts | None:
  """None where lists are of whole tiles and whole blocks."""
  queries, keys = max(1, lists.BLOCK // query_block), max(1, problem.keys // block_size)
  parts = Parts(queries, keys, _bits_of_numbers(problem))
  return parts if parts.num > 1 else None


def splits(block_size: int) -> bool:
  """Whether lists of queries are of half blocks: a whole one would often be listed in part."""
  return block_size < lists.BLOCK


def of_queries(problem: Problem, block_size: int) -> Problem:
  """The same for lists of queries."""
  return dataclasses.replace(problem, split=2) if splits(block_size) else problem


def takes(query_block: int, block_size: int, problem: Problem) -> bool:
  """Whether there are lists for such groups of queries and blocks."""
  fits = lambda size: size % lists.BLOCK == 0 or lists.BLOCK % size == 0
  each = (parts_of(query_block, block_size, x) for x in (problem, of_queries(problem, block_size)))
  room = all(parts is None or parts.first_bit + parts.num <= WORD for parts in each)
  return fits(query_block) and fits(block_size) and room


def _bits_of_numbers(problem: Problem) -> int:
  """Numbers are of blocks, nk for none, or of the tiles of all heads of a group."""
  return max(problem.nk, problem.nq * len(problem.owners[0]) - 1).bit_length()


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
  nk, parts = problem.nk, parts_of(indexed.query_block, indexed.block_size, problem)
  if parts:
    blocks, bits = _union(indexed, problem, parts)
  else:
    blocks, bits = blocks_of_lists(indexed, problem)[:, :, :, 0], None
  some, every = _of_pattern(pattern, problem, blocks)
  if parts:
    every = every & (bits == parts.all)
  if segments[0] is not None:
    some, every = _of_segments(some, every, blocks, problem, *segments)
  blocks, some, every = jnp.broadcast_arrays(blocks, some, every)
  kinds = jnp.where(some, jnp.where(every, FULL, MASKED), NONE)
  ordered = kinds * (nk + 1) + blocks
  if parts:
    ordered, bits = lax.sort((ordered, jnp.broadcast_to(bits, ordered.shape)), num_keys=1)
    # Each block is there once: of many short lists there is more room than there are blocks.
    ordered, bits = ordered[..., :nk], bits[..., :nk]
  else:
    ordered = jnp.sort(ordered, axis=-1)
  kinds, blocks = ordered // (nk + 1), ordered % (nk + 1)
  which, _ = lists.traced_bits(pattern, problem, with_bits, transposed=False)
  if which is not None:
    which = _looked_up(np.pad(which[0], [(0, 0), (0, 0), (0, 1)]), blocks)
  return Entries(blocks, kinds, which, bits)


def _union(
  indexed: Indexed, problem: Problem, parts: Parts
) -> tuple[Int[Array, "Bi Hi nq width"], Int[Array, "Bi Hi nq width"]]:
  """The blocks that some list of a tile has, each once among nk for none, and their bits."""
  blocks, of_keys = blocks_of_lists(indexed, problem), _of_tiles(indexed, problem) % parts.keys
  shape = blocks.shape
  of_keys = jnp.repeat(of_keys, blocks.size // of_keys.size, axis=4)
  of_queries = np.arange(parts.queries, dtype=np.int32).reshape(1, 1, 1, -1, 1)
  bits = jnp.left_shift(jnp.int32(1), of_queries * parts.keys + of_keys)
  bits = jnp.where(blocks < problem.nk, bits, 0)
  flat = lambda x: x.reshape(*shape[:3], -1)
  blocks, bits = lax.sort((flat(blocks), flat(bits)), num_keys=1)
  # Of equal blocks the last one has the bits of all: they differ, so their sum is their union.
  changes = blocks[..., 1:] != blocks[..., :-1]
  last = jnp.pad(changes, [(0, 0)] * 3 + [(0, 1)], constant_values=True)
  sums = jnp.cumsum(bits, axis=-1)
  until = lax.cummax(jnp.where(last, sums, 0), axis=3)
  bits = sums - jnp.pad(until[..., :-1], [(0, 0)] * 3 + [(1, 0)])
  return jnp.where(last, blocks, problem.nk), jnp.where(last, bits, 0)


def blocks_of_lists(indexed: Indexed, problem: Problem) -> Int[Array, "Bi Hi nq lists width"]:
  """The blocks of each list of a tile, those of one that is listed together; nk for none."""
  of_tiles = _of_tiles(indexed, problem)
  lead = of_tiles.shape[:4]
  return _blocks_in(of_tiles.reshape(*lead[:2], -1, of_tiles.shape[4]), indexed, problem).reshape(
    *lead, -1
  )


def _of_tiles(indexed: Indexed, problem: Problem) -> Int[Array, "Bi Hi nq lists top"]:
  """The lists of each tile, one or as many as its queries have; -1 past the last query."""
  given, nq, parts = indexed.indices, problem.nq, max(1, lists.BLOCK // indexed.query_block)
  if parts == 1:
    given = jnp.repeat(given, indexed.query_block // lists.BLOCK, axis=2)[:, :, :nq]
  else:
    missing = nq * parts - given.shape[2]
    given = jnp.pad(given, [(0, 0), (0, 0), (0, missing), (0, 0)], constant_values=-1)
  return given.reshape(*given.shape[:2], nq, parts, -1)


def _blocks_in(listed: Int[Array, "Bi Hi n top"], indexed: Indexed, problem: Problem) -> Array:
  """Of the blocks that are listed those of `Problem.keys`, [Bi, Hi, n, width], nk for none."""
  nk, size = problem.nk, indexed.block_size
  exists = (listed >= 0) & (listed < -(-problem.S // size))
  if size < problem.keys:
    return jnp.where(exists, listed // (problem.keys // size), nk).astype(jnp.int32)
  ratio = size // problem.keys
  within = np.arange(ratio).reshape(1, 1, 1, 1, -1)
  blocks = jnp.where(exists, listed, nk)[..., None] * ratio + within
  return jnp.minimum(blocks.reshape(*blocks.shape[:3], -1), nk).astype(jnp.int32)


def _of_pattern(pattern: patterns.Pattern, problem: Problem, blocks: Array) -> tuple[Any, Any]:
  """Whether any, and whether every pair of a tile and a block attends."""
  tile, nk = np.arange(problem.nq).reshape(1, 1, -1, 1), problem.nk
  if pattern == patterns.Dense():  # a table of all blocks would be larger than the lists
    rows = (tile + 1) * lists.BLOCK <= problem.T if problem.rows_end else True
    whole = (blocks + 1) * problem.keys <= problem.S
    some = (blocks // problem.split <= tile) & (blocks < nk)
    return some, (blocks // problem.split < tile) & whole & rows
  # One more column, of the block that is none.
  some, every = (np.pad(x[0], [(0, 0), (0, 0), (0, 1)]) for x in lists.of_pattern(pattern, problem))
  return _looked_up(some, blocks), _looked_up(every, blocks)


def _looked_up(table: np.ndarray, blocks: Int[Array, "Bi Hi nq width"]) -> Array:
  """table [heads or 1, nq, nk + 1] at the blocks of each tile, for each head where they differ."""
  blocks = jnp.broadcast_to(
    blocks, (blocks.shape[0], max(len(table), blocks.shape[1]), *blocks.shape[2:])
  )
  return jnp.take_along_axis(jnp.asarray(table)[None], blocks, axis=-1, mode="clip")


def _of_segments(some, every, blocks, problem, segment_ids, kv_segment_ids) -> tuple[Array, Array]:
  """As `lists.masked`: segments are compared by the least and the largest id of a block."""
  low, high = lists.ranges(segment_ids)
  of_keys = segment_ids if kv_segment_ids is None else kv_segment_ids
  kv_low, kv_high = lists.ranges(of_keys, problem.keys)
  B = low.shape[0]
  blocks = jnp.broadcast_to(blocks, (B, *blocks.shape[1:]))
  queries = lambda x: x[:, None, :, None]
  keys = lambda x: jnp.take_along_axis(x[:, None, None], blocks, axis=-1, mode="clip")
  kv_low, kv_high, low, high = keys(kv_low), keys(kv_high), queries(low), queries(high)
  some = some & (low <= kv_high) & (kv_low <= high)
  return some, every & some & (low == high) & (kv_low == kv_high) & (low == kv_low)


def by_queries(
  of: Entries,
  pattern: patterns.Pattern,
  problem: Problem,
  with_bits: bool,
  alike: bool = False,
) -> Lists:
  """As `lists.traced_by_queries`; `alike`: most lists are as long as they can be."""
  _, words = lists.traced_bits(pattern, problem, with_bits, transposed=False)
  count = lambda those: those.sum(axis=-1, dtype=jnp.int32)
  num_full, num = count(of.kinds == FULL), count(of.kinds != NONE)
  # A tile without keys has the block behind the last one.
  nobody = (num == 0)[..., None] & (np.arange(of.blocks.shape[-1]) == 0).reshape(1, 1, 1, -1)
  blocks = jnp.where(nobody, problem.nk, of.blocks)
  blocks = _numbered(blocks, of.parts, problem)
  start = jnp.arange(num.size, dtype=jnp.int32).reshape(num.shape) * blocks.shape[-1]
  heads = [(h, head // problem.group) for h, head in enumerate(problem.heads)]
  masks = jnp.zeros(1, jnp.int32) if of.which is None else jnp.where(nobody, 0, of.which)
  fields = dict(start=start, num_full=num_full, num=jnp.maximum(num, 1))
  seen = np.arange(1, problem.nq + 1) * problem.split if pattern.causal else problem.nk
  longest = np.broadcast_to(np.minimum(seen, blocks.shape[-1]), (problem.nq,)) if alike else None
  return lists.dealt(fields, heads, problem, blocks, masks, words, expected=longest)


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
  numbered = _numbered(column, None if of.parts is None else of_owners(of.parts), problem)
  return lists.dealt(fields, heads, problem, scattered(numbered), masks, words)


def _numbered(numbers: Any, bits: Array | None, problem: Problem) -> Any:
  """Numbers with the bits of their parts, if there are such; see `Parts`."""
  return numbers if bits is None else numbers + (bits << _bits_of_numbers(problem))
