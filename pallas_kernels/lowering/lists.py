"""Lists of blocks: for every tile of queries the blocks of keys to visit, and the other way round.

Full blocks come first, then those that are masked. A block of queries without keys has one block
all the same, behind the last key, whose mask hides all. Lists of patterns are made by numpy, once,
and kept; those of block masks and segment ids, which may be traced, where the program runs.
"""

import dataclasses
import functools
import heapq
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Int

from pallas_kernels import patterns
from pallas_kernels.lowering import bits
from pallas_kernels.lowering import blocks

BLOCK = 128  # queries and keys of a block: a loaded key serves so many queries
_AT_THE_END = 3  # lists for every core, dealt together when all others are
UNEVEN = 4.0  # times the mean of all items: where the longest has more, cores get unequal numbers
FIELDS = ("b", "h", "kv", "tile", "start", "num_full", "num")  # of an item; see `Lists`


class Lists(NamedTuple):
  """What a kernel sweeps; the items of a core are one after the other.

  Attributes:
    items: int32 [N, 8], the fields of an item: batch row `b`, head `h` whose result it makes, key
      head `kv` that it reads, `tile` of its own rows, and its list: `num` entries of `numbers` from
      `start` on, of which the first `num_full` need no mask.
    cores: int32 [cores + 1, 2]: first item, and number of items; the last one, which may lack a
      team to share a thread block with, has none.
    numbers: int32: blocks of keys; where keys are the rows, blocks of queries, those of query head
      g of a group numbered from g times the number of blocks on.
    masks: int32: the mask of each of these blocks among `words`, where there are any.
    words: the masks, bit by bit, rows of lists first (`lowering.bits`); None where pairs of a block
      are a formula.
  """

  items: Int[Any, "N 8"]
  cores: Int[Any, "cores+1 2"]
  numbers: Int[Any, "L"]
  masks: Int[Any, "M"]
  words: bits.Words | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
  """What lists depend on, besides a pattern and masks.

  Attributes:
    B, T, S: batch rows, queries, keys.
    heads: the query heads of a launch.
    group: query heads of a key head.
    joined: whether the heads of a group have the gradients of their keys together.
    num_cores: to deal items to; fewer, where there are fewer items.
    own_scores: whether logits are more than products, so that queries past the end have to be
      masked like others: there they may be anything.
    split: lists of queries are of blocks of BLOCK / split keys.
  """

  B: int
  T: int
  S: int
  heads: tuple[int, ...]
  group: int
  joined: bool
  num_cores: int
  own_scores: bool = False
  split: int = 1

  @property
  def keys(self) -> int:
    """Of a block."""
    return BLOCK // self.split

  @property
  def rows_end(self) -> bool:
    """Whether masks have to hide queries past the last one."""
    return self.own_scores and self.T % BLOCK > 0

  @property
  def nq(self) -> int:
    return -(-self.T // BLOCK)

  @property
  def nk(self) -> int:
    return -(-self.S // self.keys)

  @property
  def owners(self) -> tuple[tuple[int, ...], ...]:
    """Heads of a launch, counted within it, whose keys have gradients together."""
    size = self.group if self.joined else 1
    return tuple(tuple(range(n, n + size)) for n in range(0, len(self.heads), size))


def tables(pattern: patterns.Pattern, problem: Problem) -> blocks.Blocks:
  """`blocks_of` for a head's lists: keys past the end are masked like others."""
  some, every = blocks.blocks_of(pattern, problem.T, problem.S, BLOCK, problem.keys)
  ends = lambda n, size: (np.arange(n) + 1) * size
  every = every & some & (ends(problem.nk, problem.keys) <= problem.S)
  if problem.rows_end:
    every = every & (ends(problem.nq, BLOCK) <= problem.T)[:, None]
  return blocks.Blocks(some, every)


# ------------------------------------------------------------------------------- of patterns alone


@functools.lru_cache(maxsize=64)
def by_queries(pattern: patterns.Pattern, problem: Problem, with_bits: bool) -> Lists:
  """The key blocks of every block of queries; `with_bits`: and their masks."""
  rows = [(pattern.of_head(h),) for h in problem.heads]
  heads = [(h, head // problem.group) for h, head in enumerate(problem.heads)]
  return _static(rows, heads, problem, _bits(pattern, problem, with_bits), transposed=False)


@functools.lru_cache(maxsize=64)
def by_keys(pattern: patterns.Pattern, problem: Problem, with_bits: bool) -> Lists:
  """The query blocks of every block of keys, of all heads of a group."""
  rows = [tuple(pattern.of_head(problem.heads[h]) for h in owner) for owner in problem.owners]
  heads = [(n, problem.heads[owner[0]] // problem.group) for n, owner in enumerate(problem.owners)]
  return _static(rows, heads, problem, _bits(pattern, problem, with_bits), transposed=True)


def bits_of(
  pattern: patterns.Pattern, heads: tuple[int, ...], T: int, S: int
) -> tuple[bits.Words, bits.Words, bits.Which] | None:
  """`bits.bits_of` for some heads' patterns; None: too many masks."""
  each = dict.fromkeys(pattern.of_head(h) for h in heads)
  return bits.bits_of(tuple(each), T, S, BLOCK)


def _bits(
  pattern: patterns.Pattern, problem: Problem, with_bits: bool
) -> tuple[bits.Words, bits.Words, bits.Which] | tuple[None, None, None]:
  """`bits_of` for a launch; no masks without bits."""
  if not with_bits:
    return None, None, None
  masks = bits_of(pattern, problem.heads, problem.T, problem.S)
  assert masks is not None  # a plan asks for bits only where there are not too many
  return masks


def _static(rows, heads, problem: Problem, masks_of, transposed: bool) -> Lists:
  """Lists for `heads` (result, key head); `rows` are the patterns that each one's lists join."""
  *words, which = masks_of
  numbers, masks, place, size = [], [], {}, 0  # equal heads share their lists
  for key in rows:
    if key in place:
      continue
    of_patterns = [tables(shared, problem) for shared in key]
    kinds = [(every, some & ~every) for some, every in of_patterns]
    numbers_of = [which[shared] for shared in key] if which else []
    if transposed:
      kinds = [tuple(table.T for table in pair) for pair in kinds]
      numbers_of = [table.T for table in numbers_of]
    full, partial = (np.concatenate(each, axis=1) for each in zip(*kinds, strict=True))
    if not transposed:  # a column behind the last key
      nobody = ~(full | partial).any(axis=1, keepdims=True)
      full, partial = np.pad(full, [(0, 0), (0, 1)]), np.concatenate([partial, nobody], axis=1)
    row, column, count = _compressed(full, partial)
    place[key] = (size + np.cumsum(count.sum(axis=1)) - count.sum(axis=1), count)
    numbers.append(column)
    if which:
      numbers_of = np.concatenate(numbers_of, axis=1)
      masks.append(np.pad(numbers_of, [(0, 0), (0, 0 if transposed else 1)])[row, column])
    size += len(column)
  items = []
  for key, (h, kv) in zip(rows, heads, strict=True):
    start, count = place[key]
    fields = np.zeros((len(start), 8), np.int32)
    columns = dict(h=h, kv=kv, tile=np.arange(len(start)), start=start)
    columns |= dict(num_full=count[:, 0], num=count.sum(axis=1))
    for name, column in columns.items():
      fields[:, FIELDS.index(name)] = column
    items.append(fields)
  items = np.concatenate(items)
  whole = np.tile(items, (problem.B, 1))
  whole[:, FIELDS.index("b")] = np.repeat(np.arange(problem.B), len(items))
  # Head by head: cores that work at one time share keys in the cache. The last ones together, so
  # that there are enough short lists at the end. Long ones come first.
  heads_of = np.arange(len(whole)) // (len(items) // len(heads))
  last = -(-_AT_THE_END * problem.num_cores // (len(items) // len(heads)))
  heads_of = np.minimum(heads_of, max(0, problem.B * len(heads) - last))
  num = whole[:, FIELDS.index("num")]
  whole = whole[np.lexsort((-num, heads_of))]
  order, cores = _deal(whole[:, FIELDS.index("num")], problem.num_cores)
  joined = lambda parts: np.concatenate([*parts, np.zeros(1, np.int32)])  # none is empty
  return Lists(whole[order], cores, joined(numbers), joined(masks), words[transposed])


def _compressed(full, partial):
  """Row and column of all entries, full ones first in every row; how many of each a row has."""
  places = [np.nonzero(table) for table in (full, partial)]
  count = np.stack([np.bincount(row, minlength=len(full)) for row, _ in places], axis=1)
  row, column = (np.concatenate(x).astype(np.int32) for x in zip(*places, strict=True))
  order = np.argsort(row, kind="stable")
  return row[order], column[order], count


def _deal(num, num_cores: int):
  """Items in the order of the cores, each to the core that has least to do so far."""
  num_cores = min(num_cores, len(num))
  loads = [(0, core) for core in range(num_cores)]
  items_of = [[] for _ in range(num_cores)]
  for n, steps in enumerate(num.tolist()):
    load, core = heapq.heappop(loads)
    items_of[core].append(n)
    heapq.heappush(loads, (load + steps + 1, core))  # and about a step to begin and to end
  counts = np.array([*map(len, items_of), 0], np.int32)
  cores = np.stack([np.cumsum(counts) - counts, counts], 1)
  return np.concatenate(items_of).astype(np.int64), cores


# -------------------------------------------------------------------------------- of traced masks


def of_pattern(pattern: patterns.Pattern, problem: Problem) -> blocks.Blocks:
  """The tables of a launch's heads, once if they agree."""
  each = zip(*(tables(shared, problem) for shared in _distinct(pattern, problem)), strict=True)
  return blocks.Blocks(*(np.stack(table)[None] for table in each))


def _distinct(pattern: patterns.Pattern, problem: Problem) -> list[patterns.Pattern]:
  """The patterns of a launch's heads, once if they agree."""
  each = [pattern.of_head(h) for h in problem.heads]
  return each[:1] if len(set(each)) == 1 else each


def masked(
  visits: blocks.Blocks,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  block_size: int,
  segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  heads: tuple[int, ...],
) -> blocks.Blocks:
  """`visits` without blocks that a block mask of whole blocks excludes, or segments that differ.

  Segments are compared by the least and the largest id of a block; keys have the ids of the queries
  where `kv_segment_ids` is None.
  """
  some, every = visits
  if block_mask is not None:
    ratio, (nq, nk) = block_size // BLOCK, some.shape[2:]
    mask = block_mask[:, list(heads)] if block_mask.shape[1] > 1 else block_mask
    mask = jnp.repeat(jnp.repeat(mask, ratio, axis=2), ratio, axis=3)[:, :, :nq, :nk]
    some, every = some & mask, every & mask
  if segment_ids is not None:
    low, high = kv_low, kv_high = ranges(segment_ids)
    if kv_segment_ids is not None:
      kv_low, kv_high = ranges(kv_segment_ids)
    queries, keys = (lambda x: x[:, None, :, None]), (lambda x: x[:, None, None, :])
    some = some & (queries(low) <= keys(kv_high)) & (keys(kv_low) <= queries(high))
    one_id = queries(low == high) & keys(kv_low == kv_high) & (queries(low) == keys(kv_low))
    every = every & some & one_id
  return blocks.Blocks(some, every)


def ranges(
  ids: Int[Array, "B T"], size: int | None = None
) -> tuple[Int[Array, "B nq"], Int[Array, "B nq"]]:
  """The least and the largest id of each block, of BLOCK tokens or of `size`."""
  (B, T), size = ids.shape, size or BLOCK
  ids = jnp.pad(ids, [(0, 0), (0, -T % size)], mode="edge").reshape(B, -1, size)
  return ids.min(axis=2), ids.max(axis=2)


def traced_by_queries(
  visits: blocks.Blocks, pattern: patterns.Pattern, problem: Problem, with_bits: bool
) -> Lists:
  """As `by_queries`, of the blocks to visit."""
  heads = [(h, head // problem.group) for h, head in enumerate(problem.heads)]
  some, every = visits
  which, words = traced_bits(pattern, problem, with_bits, transposed=False)
  nobody = ~some.any(axis=-1, keepdims=True)  # a column behind the last key
  wider = lambda x, column: jnp.concatenate([x, jnp.broadcast_to(column, nobody.shape)], axis=-1)
  some, every = wider(some, nobody), wider(every, False)
  if which is not None:
    which = np.pad(which, [(0, 0)] * 3 + [(0, 1)])
  return _traced(some, every, which, words, heads, problem)


def traced_by_keys(
  visits: blocks.Blocks, pattern: patterns.Pattern, problem: Problem, with_bits: bool
) -> Lists:
  """As `by_keys`, of the blocks to visit."""
  owners = problem.owners
  heads = [(n, problem.heads[owner[0]] // problem.group) for n, owner in enumerate(owners)]

  def transposed(table) -> Any:  # [.., heads, nq, nk] -> [.., owners, nk, group * nq]
    if table is None:
      return None
    size, table = len(owners[0]), jnp.swapaxes(table, 2, 3)
    if table.shape[1] == 1:
      return jnp.tile(table, (1, 1, 1, size))
    table = table.reshape(table.shape[0], len(owners), size, *table.shape[2:])
    table = jnp.moveaxis(table, 2, 3)
    return table.reshape(*table.shape[:3], -1)

  which, words = traced_bits(pattern, problem, with_bits, transposed=True)
  some, every, which = transposed(visits.some), transposed(visits.every), transposed(which)
  return _traced(some, every, which, words, heads, problem)


def traced_bits(
  pattern: patterns.Pattern, problem: Problem, with_bits: bool, *, transposed: bool
) -> tuple[Int[np.ndarray, "1 heads nq nk"] | None, bits.Words | None]:
  """The mask of each block, [1, heads or 1, nq, nk], and the masks; None without bits."""
  *words, which = _bits(pattern, problem, with_bits)
  if which is not None:
    which = np.stack([which[shared] for shared in _distinct(pattern, problem)])[None]
  return which, words[transposed]


def _traced(
  some: Array,
  every: Array,
  which: Array | np.ndarray | None,
  words: bits.Words | None,
  heads: list[tuple[int, int]],
  problem: Problem,
) -> Lists:
  kinds = jnp.where(some, jnp.where(every, 0, 1), 2).astype(jnp.int8)
  numbers = jnp.argsort(kinds, axis=-1, stable=True).astype(jnp.int32)
  masks = jnp.zeros(1, jnp.int32)
  if which is not None:
    masks = jnp.take_along_axis(jnp.broadcast_to(which, numbers.shape), numbers, axis=-1)
  count = lambda table: table.sum(axis=-1, dtype=jnp.int32)
  num, width = count(some), numbers.shape[-1]
  start = jnp.arange(num.size, dtype=jnp.int32).reshape(num.shape) * width
  fields = dict(start=start, num_full=count(some & every), num=num)
  return dealt(fields, heads, problem, numbers, masks, words)


def dealt(
  fields: dict[str, Int[Any, "_ _ rows"]],
  heads: list[tuple[int, int]],
  problem: Problem,
  numbers: Array,
  masks: Array,
  words: bits.Words | None,
  *,
  expected: Int[np.ndarray, " rows"] | None = None,
) -> Lists:
  """Lists that were made where the program runs, each for a core.

  Args:
    fields: `start`, `num_full` and `num` of the lists of each, or of all, batch rows and heads.
    heads: (result, key head).
    problem: of the launch.
    numbers, masks, words: as in `Lists`, in any shape.
    expected: about how long the list of each row will be, where that is known before: then nothing
      is sorted where the program runs, and the cores get equally many.
  """
  rows = fields["num"].shape[2]
  axis = lambda x, n: np.asarray(x, np.int32).reshape([-1 if m == n else 1 for m in range(3)])
  fields = fields | dict(
    b=axis(range(problem.B), 0),
    h=axis([h for h, _ in heads], 1),
    kv=axis([kv for _, kv in heads], 1),
    tile=axis(range(rows), 2),
  )
  wide = lambda x: jnp.broadcast_to(x, (problem.B, len(heads), rows)).reshape(-1)
  items = jnp.stack([wide(fields[name]) for name in FIELDS], axis=1)
  items = jnp.pad(items, [(0, 0), (0, 8 - len(FIELDS))])
  # The longest first, over the cores forwards, then backwards: [cores, rounds] of items.
  cores = np.arange(min(problem.num_cores, len(items)))
  rounds = np.arange(-(-len(items) // len(cores)))[:, None]
  order = (rounds * len(cores) + np.where(rounds % 2 == 0, cores, cores[::-1])).T
  if expected is None:
    items = items[jnp.argsort(-items[:, FIELDS.index("num")], stable=True)]
    order, counts = _levelled(items[:, FIELDS.index("num")] + 1, order)
  else:
    counts = (order < len(items)).sum(axis=1)  # the last round may lack some
    longest_first = np.argsort(-np.tile(expected, len(items) // rows), kind="stable")
    order = longest_first[order[order < len(items)]]
  cores = jnp.stack([jnp.cumsum(counts) - counts, counts], axis=1).astype(jnp.int32)
  return Lists(
    items[order], jnp.pad(cores, [(0, 1), (0, 0)]), numbers.reshape(-1), masks.reshape(-1), words
  )


def _levelled(
  steps: Int[Array, "N"], order: Int[np.ndarray, "cores rounds"]
) -> tuple[Int[Array, "N"], Int[Array, " cores"]]:
  """Items in the order of the cores, and how many each has, so that all have about as many steps.

  A block that all queries read has many times the steps of others; with as many items as the other
  cores, its core would be the last by far. Each core keeps the item of its first round, and has of
  the others what is missing to the mean:

      mean   - - -  - - -  - - -  - - -    the columns of `order`, whose sums are about equal, one
             | | |  4 5 6  8 9 10 12 ..    after the other, cut at the cores' ends; a column begins
             | 0 |  | 1 |  | 2 |  | 3 |    and ends with few steps, so that a cut is nearly right

  Where no item is much longer than others, as many items for each are as good, or better if they
  are few: then these.

  Args:
    steps: of items, the most first.
    order: the items of each core, were all alike; numbers past the last are none.
  """
  (num_cores, rounds), N = order.shape, len(steps)
  alike, counts_alike = order[order < N], (order < N).sum(axis=1, dtype=np.int32)
  if rounds == 1:
    return jnp.asarray(alike), jnp.asarray(counts_alike)
  few_to_many, many_to_few = range(rounds)[2::2][::-1], range(rounds)[1::2]
  others = order[:, [*few_to_many, *many_to_few]].reshape(-1)
  others = others[others < N]
  load, left, total = steps[:num_cores], steps[others], steps.sum()
  room = jnp.cumsum(jnp.maximum(-(-total // num_cores) - load, 0))
  # Less than there is room for, where some are above the mean.
  share = (total - load.sum()).astype(jnp.float32) / room[-1].astype(jnp.float32)
  ends = (room[:-1].astype(jnp.float32) * share).astype(jnp.int32)
  middles = jnp.cumsum(left) - (left + 1) // 2
  behind = middles[:, None] >= ends[None]  # all cores but the last: it has what is left
  core = behind.sum(axis=1, dtype=jnp.int32)
  first = jnp.pad(len(others) - behind.sum(axis=0, dtype=jnp.int32), (1, 0))
  counts = 1 + jnp.diff(first, append=len(others))
  place = jnp.concatenate([first + np.arange(num_cores), core + 1 + np.arange(len(others))])
  items = np.concatenate([np.arange(num_cores), others]).astype(np.int32)
  items = jnp.zeros_like(items).at[place].set(items, unique_indices=True)
  uneven = steps[0].astype(jnp.float32) * N > UNEVEN * total.astype(jnp.float32)
  return jnp.where(uneven, items, alike), jnp.where(uneven, counts, counts_alike)
