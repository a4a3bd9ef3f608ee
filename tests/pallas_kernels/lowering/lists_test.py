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
    num = found.items[:, lists.FIELDS.index("num")] + 1
    loads = [num[first : first + count].sum() for first, count in found.cores[:-1]]
    assert max(loads) <= 1.03 * np.mean(loads)


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
