"""Lists of blocks and their masks, put together again: exactly the pairs of the pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels.lowering import bits
from pallas_kernels.lowering import indexed
from pallas_kernels.lowering import lists
from tests.helpers.arrays import EVERY_PATTERN

BLOCK = 32
H, GROUP = 4, 2
PATTERNS = EVERY_PATTERN | {
  "whole_blocks": patterns.BlockLayout(np.random.default_rng(0).random((4, 3, 4)) < 0.4, BLOCK),
  "odd_blocks": patterns.BlockLayout(np.random.default_rng(1).random((30, 30)) < 0.3, 6),
  "both_ways": patterns.Local(20, causal=False),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(lists, "BLOCK", BLOCK)
  monkeypatch.setattr(bits, "_AT_ONCE", 8)
  forget = (lists.by_queries, lists.by_keys, bits.bits_of)
  [one.cache_clear() for one in forget]
  yield
  [one.cache_clear() for one in forget]


def problem(T=75, S=75, B=2, heads=tuple(range(H)), joined=True, num_cores=7):
  return lists.Problem(B, T, S, heads, GROUP, joined, num_cores)


def dealt(found: lists.Lists):
  """The items in the order of the cores, each once; fields by name."""
  items, cores = np.asarray(found.items), np.asarray(found.cores)
  mine = np.concatenate([items[first : first + count] for first, count in cores])
  assert (cores[:-1, 1] > 0).all() and cores[-1, 1] == 0
  return [dict(zip(lists.FIELDS, row[: len(lists.FIELDS)].tolist(), strict=True)) for row in mine]


def unpacked(words):
  """[words, size] -> which pairs of a block attend."""
  pairs = (words[:, :, None] >> np.arange(32)) & 1
  return pairs.transpose(1, 0, 2).reshape(words.shape[1], -1).astype(bool)


def put_together(pattern, one, found, transposed, words):
  """The mask [B, H, T, S] that lists say, and how often each pair is visited."""
  nq, nk = one.nq, one.nk
  mask = np.zeros((one.B, len(one.heads), nq * BLOCK, (nk + 1) * BLOCK), bool)
  visits = np.zeros((one.B, len(one.heads), nq, nk + 1), int)
  seen = set()
  for item in dealt(found):
    key = item["b"], item["h"], item["tile"]
    assert key not in seen
    seen.add(key)
    owner = one.owners[item["h"]] if transposed else (item["h"],)
    assert {one.heads[h] // GROUP for h in owner} == {item["kv"]}
    for n in range(item["num"]):
      place = item["start"] + n
      number, which = int(found.numbers[place]), int(found.masks[place])
      h = owner[number // nq] if transposed else item["h"]
      row, column = (number % nq, item["tile"]) if transposed else (item["tile"], number)
      pairs = unpacked(np.asarray(words[which]))
      assert n >= item["num_full"] or pairs.all()
      if column == nk:  # a row without keys: its mask hides all
        continue
      span = np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
      mask[item["b"], h][span] = pairs.T if transposed else pairs
      visits[item["b"], h, row, column] += 1
  rows = one.nk if transposed else nq
  heads = len(one.owners) if transposed else len(one.heads)
  assert len(seen) == one.B * heads * rows
  assert visits.max() <= 1
  return mask[:, :, : one.T, : one.S]


def truth(pattern, one):
  masks = [pattern.of_head(h).mask(one.T, one.S) for h in one.heads]
  return np.broadcast_to(np.stack(masks), (one.B, len(masks), one.T, one.S))


def words_of(pattern, one, transposed):
  by_queries, by_keys, _ = lists.bits_of(pattern, one.heads, one.T, one.S)
  return by_keys if transposed else by_queries


@pytest.mark.smoke(daily=8)
@pytest.mark.parametrize("transposed", [False, True], ids=["by_queries", "by_keys"])
@pytest.mark.parametrize("name", PATTERNS)
def test_lists_and_bits_hold_exactly_the_pairs(name, transposed):
  pattern = PATTERNS[name]
  for one in (problem(), problem(T=75, S=90, B=1, heads=(3, 0), joined=False)):
    make = lists.by_keys if transposed else lists.by_queries
    found = make(pattern, one, with_bits=True)
    got = put_together(pattern, one, found, transposed, words_of(pattern, one, transposed))
    np.testing.assert_array_equal(got, truth(pattern, one))


@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("transposed", [False, True], ids=["by_queries", "by_keys"])
@pytest.mark.parametrize("name", ["local", "odd_blocks", "per_head", "whole_blocks"])
def test_traced_lists_hold_the_same(name, transposed):
  pattern, one = PATTERNS[name], problem()
  tables = lists.of_pattern(pattern, one)
  blocks = jnp.asarray(np.random.default_rng(0).random((2, H, one.nq, one.nk)) < 0.6)
  ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, one.T)), axis=1))

  @jax.jit
  def make(blocks, ids):
    masked = lists.masked(tables, blocks, BLOCK, ids, None, one.heads)
    traced = lists.traced_by_keys if transposed else lists.traced_by_queries
    return traced(masked, pattern, one, with_bits=True)

  found = lists.Lists(*map(np.asarray, make(blocks, ids)))
  words = words_of(pattern, one, transposed)
  np.testing.assert_array_equal(found.words, words)
  got = put_together(pattern, one, found, transposed, words)
  # Kernels compare the ids of the pairs of every block that is not full.
  segments = np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None, :]
  wide = np.asarray(blocks).repeat(BLOCK, 2).repeat(BLOCK, 3)[:, :, : one.T, : one.S]
  np.testing.assert_array_equal(got & segments, truth(pattern, one) & wide & segments)
  for item in dealt(found):  # full blocks have one id
    assert item["num_full"] <= item["num"]


def test_full_blocks_of_segments_have_one_id():
  one = problem(T=128, S=128, B=1)
  ids = jnp.asarray([[0] * 32 + [1] * 80 + [2] * 16])
  tables = lists.of_pattern(patterns.Dense(causal=False), one)
  some, every = lists.masked(tables, None, BLOCK, ids, None, one.heads)
  expected = np.array([[1, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], bool)
  np.testing.assert_array_equal(some[0, 0], expected)
  expected[:, 3] = expected[3] = False  # two ids
  np.testing.assert_array_equal(every[0, 0], expected)


def test_blocks_of_keys_with_segments_of_their_own():
  one = problem(T=64, S=100, B=1)
  ids, kv_ids = jnp.asarray([[1] * 40 + [2] * 24]), jnp.asarray([[0] * 32 + [1] * 32 + [2] * 36])
  tables = lists.of_pattern(patterns.Dense(causal=False), one)
  some, every = lists.masked(tables, None, BLOCK, ids, kv_ids, one.heads)
  expected = np.array([[0, 1, 0, 0], [0, 1, 1, 1]], bool)
  np.testing.assert_array_equal(some[0, 0], expected)
  expected[1] = False  # two ids of queries
  np.testing.assert_array_equal(every[0, 0], expected)


def test_equal_heads_share_their_lists():
  one = problem(B=1)
  shared = lists.by_queries(patterns.Local(20), one, with_bits=False)
  each = lists.by_queries(PATTERNS["whole_blocks"], one, with_bits=False)
  assert len({item["start"] for item in dealt(shared)}) == one.nq
  assert len({item["start"] for item in dealt(each)}) == one.nq * H


def test_cores_get_about_the_same():
  rng = np.random.default_rng(0)
  layout = np.tri(64, dtype=bool) & (rng.random((8, 64, 64)) < 0.3)
  one = lists.Problem(1, 64 * BLOCK, 64 * BLOCK, tuple(range(8)), 1, True, 16)
  pattern = patterns.BlockLayout(layout | np.eye(64, dtype=bool), BLOCK)
  for make in (lists.by_queries, lists.by_keys):
    found = make(pattern, one, with_bits=False)
    loads = steps_of_cores(found)
    assert max(loads) <= 1.03 * np.mean(loads)


def steps_of_cores(found):
  num = np.asarray(found.items)[:, lists.FIELDS.index("num")] + 1
  return [num[first : first + count].sum() for first, count in np.asarray(found.cores)[:-1]]


@pytest.mark.parametrize("top", [4, 12])
def test_a_block_that_all_queries_read_does_not_keep_its_core_longer(top):
  """With as many items for each core as for the others, its core would have half as much again."""
  rng, nq, heads, cores = np.random.default_rng(0), 96, 8, 24
  given = np.full((1, heads, nq, top), -1)
  for h, n in np.ndindex(heads, nq):
    others = rng.permutation(np.arange(1, n))[: top - 2]
    given[0, h, n, : len(others) + min(n, 1) + 1] = sorted({0, n, *others})
  one = lists.Problem(1, nq * BLOCK, nq * BLOCK, tuple(range(heads)), 1, True, cores)
  lists_of = indexed.Indexed(indices=jnp.asarray(given), block_size=BLOCK, query_block=BLOCK)
  of = indexed.entries(lists_of, patterns.Dense(), one, False)
  loads = steps_of_cores(indexed.by_keys(of, patterns.Dense(), one, False))
  assert max(loads) <= max(1.06 * np.mean(loads), nq + 1)
  tables = lists.of_pattern(patterns.Dense(), one)
  listed = jnp.asarray((given[..., None] == np.arange(nq)).any(axis=3))
  visits = lists.masked(tables, listed, BLOCK, None, None, one.heads)
  assert steps_of_cores(lists.traced_by_keys(visits, patterns.Dense(), one, False)) == loads


@pytest.mark.parametrize("longest", [1, 40, 2_000])
@pytest.mark.parametrize("num", [1, 7, 8, 9, 20, 300])
def test_items_of_any_lengths_are_dealt_once(num, longest):
  rng = np.random.default_rng(num)
  steps = np.sort((longest / rng.uniform(1, 50, num)).astype(np.int32))[::-1] + 1
  cores = np.arange(min(8, num))
  rounds = np.arange(-(-num // len(cores)))[:, None]
  alike = (rounds * len(cores) + np.where(rounds % 2 == 0, cores, cores[::-1])).T
  order, counts = map(np.asarray, jax.jit(lambda steps: lists._levelled(steps, alike))(steps))
  assert sorted(order) == list(range(num)) and counts.sum() == num and (counts > 0).all()
  if steps[0] * num > lists.UNEVEN * steps.sum():
    loads = [steps[items].sum() for items in np.split(order, np.cumsum(counts)[:-1])]
    mean, next_longest = steps.sum() / len(cores), steps[min(num - 1, len(cores))]
    assert max(loads) <= max(steps[0], mean + next_longest)
  else:
    np.testing.assert_array_equal(order, alike[alike < num])


def test_items_of_almost_as_many_steps_as_int32_has_are_dealt_once():
  steps = np.sort(np.array([2**29, *[7_000_000] * 200], np.int32))[::-1]
  assert 2**30 < steps.sum(dtype=np.int64) < 2**31
  order = np.arange(208).reshape(26, 8).T
  order, counts = map(np.asarray, jax.jit(lambda steps: lists._levelled(steps, order))(steps))
  assert sorted(order) == list(range(201)) and counts.sum() == 201 and counts[0] == 1


def test_too_many_different_masks_are_none(monkeypatch):
  monkeypatch.setattr(bits, "MOST", 4)
  assert bits.bits_of((patterns.Column(7),), 200, 200, 32) is None
  assert bits.bits_of((patterns.Local(32),), 200, 200, 32) is not None


@pytest.mark.smoke(daily=4)
@pytest.mark.parametrize("transposed", [False, True], ids=["by_queries", "by_keys"])
@pytest.mark.parametrize("shared", [False, True], ids=["of_heads", "of_all"])
@pytest.mark.parametrize("name", ["dense", "local", "odd_blocks", "per_head", "both_ways"])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2)], ids=str)
def test_lists_of_indices_hold_the_same(name, sizes, shared, transposed):
  """Lists of several tiles of queries, blocks of several tiles of keys, and numbers of no block."""
  pattern, one, rng = PATTERNS[name], problem(T=140, S=140), np.random.default_rng(0)
  query_block, block_size = (n * BLOCK for n in sizes)
  rows, nk, heads = -(-140 // query_block), -(-140 // block_size), 1 if shared else H
  given = np.full((2, heads, rows, 4), -1)
  for place in np.ndindex(2, heads, rows):
    blocks = np.sort(rng.permutation(nk)[: rng.integers(0, 4)])
    given[place][: len(blocks)] = blocks
  given[0, 0, 0, 3] = nk + 7  # none either
  ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, one.T)), axis=1))

  @jax.jit
  def make(given, ids):
    lists_of = indexed.Indexed(indices=given, block_size=block_size, query_block=query_block)
    of = indexed.entries(lists_of, pattern, one, True, (ids, None))
    return (indexed.by_keys if transposed else indexed.by_queries)(of, pattern, one, True)

  found = lists.Lists(*map(np.asarray, make(jnp.asarray(given), ids)))
  words = words_of(pattern, one, transposed)
  got = put_together(pattern, one, found, transposed, words)
  segments = np.asarray(ids)[:, None, :, None] == np.asarray(ids)[:, None, None, :]
  listed = (given[..., None] == np.arange(nk)).any(axis=3)
  wide = listed.repeat(query_block, 2).repeat(block_size, 3)[:, :, : one.T, : one.S]
  np.testing.assert_array_equal(got & segments, truth(pattern, one) & wide & segments)
  # In the order of a block mask's lists, of which the results of a kernel have their bits.
  mask = jnp.asarray(listed.repeat(query_block // BLOCK, 2).repeat(block_size // BLOCK, 3))
  masked = lists.masked(lists.of_pattern(pattern, one), mask, BLOCK, ids, None, one.heads)
  traced = lists.traced_by_keys if transposed else lists.traced_by_queries
  same = lists.Lists(*map(np.asarray, traced(masked, pattern, one, True)))
  entries = lambda lists_: {
    (x["b"], x["h"], x["tile"]): (
      x["num_full"],
      lists_.numbers[x["start"] : x["start"] + x["num"]].tolist(),
      lists_.masks[x["start"] + x["num_full"] : x["start"] + x["num"]].tolist(),
    )
    for x in dealt(lists_)
  }
  assert entries(found) == entries(same)


@pytest.mark.parametrize("name", ["dense", "local"])
@pytest.mark.parametrize(
  "sizes", [(4, 1), (1, 0.5), (2, 0.5), (4, 0.5), (4, 2), (0.5, 0.5)], ids=str
)
def test_lists_of_parts_of_a_tile_hold_what_each_part_lists(name, sizes):
  """`sizes`: lists of a tile of queries, and how many blocks of the kernels a listed one is."""
  pattern, one, rng = PATTERNS[name], problem(T=150, S=150), np.random.default_rng(0)
  query_block, block_size = round(BLOCK / sizes[0]), round(BLOCK * sizes[1])
  rows, nk = -(-one.T // query_block), -(-one.S // block_size)
  given = np.full((2, H, rows, 5), -1)
  for place in np.ndindex(2, H, rows):
    blocks = np.sort(rng.permutation(nk)[: rng.integers(0, 6)])
    given[place][: len(blocks)] = blocks
  assert indexed.takes(query_block, block_size, one)
  of_queries = indexed.of_queries(one, block_size)

  @jax.jit
  def make(given):
    lists_of = indexed.Indexed(indices=given, block_size=block_size, query_block=query_block)
    entries = lambda its: indexed.entries(lists_of, pattern, its, False)
    return (
      indexed.by_queries(entries(of_queries), pattern, of_queries, False, alike=True),
      indexed.by_keys(entries(one), pattern, one, False),
    )

  listed = (given[..., None] == np.arange(nk)).any(axis=3)
  wanted = listed.repeat(query_block, 2).repeat(block_size, 3)[:, :, : one.T, : one.S]
  wanted = wanted & truth(pattern, one)
  for transposed, found in enumerate(make(jnp.asarray(given))):
    its = one if transposed else of_queries
    parts = indexed.parts_of(query_block, block_size, its) or indexed.Parts(1, 1, 20)
    listed_here = np.zeros((2, H, one.nq * BLOCK, (one.nk + 1) * BLOCK), bool)
    for item in dealt(found):
      owner = one.owners[item["h"]] if transposed else (item["h"],)
      for n in range(item["num"]):
        numbered = int(found.numbers[item["start"] + n])
        number, bits = numbered & ((1 << parts.first_bit) - 1), numbered >> parts.first_bit
        bits = bits if parts.num > 1 else 1
        h = owner[number // one.nq] if transposed else item["h"]
        row, column = (number % one.nq, item["tile"]) if transposed else (item["tile"], number)
        each = [[bits >> (n * parts.keys + m) & 1 for m in range(parts.keys)]
                for n in range(parts.queries)]  # fmt: skip
        block = np.array(each, bool)
        block = block.repeat(BLOCK // parts.queries, 0).repeat(its.keys // parts.keys, 1)
        corner = row * BLOCK, column * its.keys
        here = listed_here[item["b"], h, corner[0] :, corner[1] :][:BLOCK, : its.keys]
        assert not here.any()
        here |= block
        if n < item["num_full"]:  # nothing else masks it
          inside = wanted[item["b"], h, corner[0] :, corner[1] :][:BLOCK, : its.keys]
          assert block.all() and inside.all() and inside.shape[1] == its.keys
    got = listed_here[:, :, : one.T, : one.S] & truth(pattern, one)
    np.testing.assert_array_equal(got, wanted)


def test_too_many_parts_are_not_taken():
  one = problem(T=1_000, S=1_000)
  assert indexed.takes(BLOCK // 16, BLOCK, one) and indexed.takes(BLOCK // 8, BLOCK // 2, one)
  assert not indexed.takes(BLOCK // 32, BLOCK, one)  # 32 bits above a number
  # At a million tokens numbers of the tiles of 8 heads have 16 bits, which leaves 16 for parts.
  long = lists.Problem(1, 2**13 * BLOCK, 2**13 * BLOCK, tuple(range(8)), 8, True, 132)
  assert indexed.takes(BLOCK // 8, BLOCK // 2, long)
  longer = lists.Problem(1, 2**13 * BLOCK, 2**13 * BLOCK, tuple(range(16)), 16, True, 132)
  assert not indexed.takes(BLOCK // 8, BLOCK // 2, longer) and indexed.takes(
    BLOCK // 8, BLOCK, longer
  )
  assert not indexed.takes(BLOCK // 8, BLOCK // 4, one)
  assert not indexed.takes(3 * BLOCK // 4, BLOCK, one) and not indexed.takes(BLOCK, 24, one)


def test_lists_of_a_million_tokens_have_no_table_of_all_blocks(monkeypatch):
  monkeypatch.setattr(lists, "BLOCK", 128)
  T = 1_048_576
  one = lists.Problem(1, T, T, (0, 1), 2, True, 132)
  nq = one.nq

  def make(indices):
    lists_of = indexed.Indexed(indices=indices, block_size=128, query_block=128)
    of = indexed.entries(lists_of, patterns.Dense(), one, False)
    return [f(of, patterns.Dense(), one, False) for f in (indexed.by_queries, indexed.by_keys)]

  program = jax.make_jaxpr(make)(jax.ShapeDtypeStruct((1, 1, nq, 16), jnp.int32))
  sizes = [x.aval.size for line in program.jaxpr.eqns for x in (*line.invars, *line.outvars)]
  # A word has the bits of 32 tiles, of both heads.
  assert len(sizes) > 50 and max(sizes) <= nq * nq * 2 // 32
