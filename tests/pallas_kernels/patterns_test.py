"""The index sets against the tables and pictures of the paper."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from tests.helpers.arrays import EVERY_PATTERN

# n = 12, l = 4: entries of each mask, and keys of the last query.
SMALL = [
  (patterns.Dense(), 78, 12),
  (patterns.Local(4), 42, 4),
  (patterns.Column(4), 24, 3),
  (patterns.Strided(4), 54, 6),
  (patterns.Block(4), 30, 4),
  (patterns.Summary(4, 1), 15, 3),
  (patterns.Fixed(4, 1), 42, 6),
]


@pytest.mark.parametrize(("pattern", "entries", "last"), SMALL, ids=str)
def test_counts_of_the_small_pictures(pattern, entries, last):
  mask = pattern.mask(12)
  assert (mask.sum(), mask[-1].sum()) == (entries, last)


@pytest.mark.parametrize("h", [0, 1])
def test_sub_blocks_count_from_the_end_of_the_block(h):
  pattern = patterns.Fixed(4, 2, num_subblocks=2)
  mask = pattern.mask(12)
  assert mask.shape == (2, 12, 12) and mask[h].sum() == 54
  seen = {0: {6, 7, 2, 3, 8, 9, 10, 11}, 1: {0, 1, 4, 5, 8, 9, 10, 11}}
  assert set(np.flatnonzero(mask[h, 11])) == seen[h]


def test_the_worked_example_of_eight_heads():
  pattern = patterns.Fixed(128, 32, num_subblocks=4)
  keys = [set(np.flatnonzero(pattern.allowed(300, np.arange(301), h))) for h in range(8)]
  own = set(range(256, 301))
  summaries = [(96, 224), (64, 192), (32, 160), (0, 128)]
  for h in range(8):
    first, second = summaries[h % 4]
    assert keys[h] == own | set(range(first, first + 32)) | set(range(second, second + 32))
  assert [int(pattern.keys_per_query(1024, h)[300]) for h in range(4)] == [109] * 4
  assert [int(pattern.keys_per_query(1024)[i]) for i in (0, 127, 128, 1023)] == [1, 128, 33, 352]


# Section 1.6 of the specification's counts: average keys per query.
AVERAGES = [
  (3072, 96, 1536.5, 94.515625, 16.5, 110.015625, 544.5),
  (12288, 128, 6144.5, 127.33854, 48.5, 174.83854, 1584.5),
  (12288, 192, 6144.5, 190.50781, 32.5, 222.00781, 1104.5),
]


@pytest.mark.parametrize(("T", "stride", "dense", "local", "column", "strided", "fixed"), AVERAGES)
def test_average_keys_per_query(T, stride, dense, local, column, strided, fixed):
  average = lambda pattern: round(pattern.num_pairs(T) / T, 6)
  assert average(patterns.Dense()) == dense
  assert average(patterns.Local(stride)) == pytest.approx(local, abs=1e-5)
  assert average(patterns.Column(stride)) == column
  assert average(patterns.Strided(stride)) == pytest.approx(strided, abs=1e-5)
  assert average(patterns.Fixed(stride, 32)) == fixed


@pytest.mark.parametrize("T", [1, 2, 5, 12, 13, 31])
@pytest.mark.parametrize("name", EVERY_PATTERN)
def test_keys_per_query_counts_the_mask(name, T):
  pattern = EVERY_PATTERN[name]
  mask = np.broadcast_to(pattern.mask(T), (pattern.period, T, T))
  for h in range(pattern.period):
    np.testing.assert_array_equal(pattern.keys_per_query(T, h), mask[h].sum(axis=1))
  assert pattern.num_pairs(T) == mask.sum() / pattern.period


@pytest.mark.parametrize("name", EVERY_PATTERN)
def test_allowed_is_the_same_in_jax_and_for_an_array_of_heads(name):
  pattern, T = EVERY_PATTERN[name], 13
  mask = np.broadcast_to(pattern.mask(T), (pattern.period, T, T))
  h = np.arange(6)
  i, j = np.arange(T)[:, None], np.arange(T)[None, :]
  positions = jnp.asarray(i[None]), jnp.asarray(j[None]), jnp.asarray(h[:, None, None])
  allowed = jax.jit(lambda i, j, h: pattern.allowed(i, j, h), static_argnums=())
  with jax.numpy_rank_promotion("allow"):
    got = np.broadcast_to(allowed(*positions), (6, T, T))
  np.testing.assert_array_equal(got, mask[h % len(mask)])


def test_unions_and_intersections():
  local, column, layout = patterns.Local(4), patterns.Column(4), EVERY_PATTERN["layout"]
  np.testing.assert_array_equal((local | column).mask(12), patterns.Strided(4).mask(12))
  np.testing.assert_array_equal((local & column).mask(12), np.eye(12, dtype=bool))
  fixed = patterns.Fixed(6, 2, 3)
  assert (layout | fixed).period == 6
  union = (layout | fixed).mask(24)
  for h in range(6):
    np.testing.assert_array_equal(union[h], layout.mask(24)[h % 2] | fixed.mask(24)[h % 3])
  assert ((local | column) | fixed).patterns == (local | (column | fixed)).patterns


def test_patterns_without_causality():
  T = 7
  i, j = np.arange(T)[:, None], np.arange(T)[None, :]
  assert patterns.Dense(causal=False).mask(T).all()
  np.testing.assert_array_equal(patterns.Local(3, causal=False).mask(T), abs(i - j) < 3)
  np.testing.assert_array_equal(patterns.Where(lambda i, j: i != j, False).mask(T), i != j)
  layout = np.asarray([[0, 1], [1, 0]], bool)
  np.testing.assert_array_equal(
    patterns.BlockLayout(layout, 4, causal=False).mask(T), i // 4 != j // 4
  )
  for pattern in (patterns.Dense(False), patterns.Local(3, False)):
    assert not pattern.causal and not (pattern | patterns.Dense()).causal
    np.testing.assert_array_equal(pattern.keys_per_query(T), pattern.mask(T).sum(axis=1))
  with pytest.raises(TypeError, match="causal"):
    patterns.Column(3, causal=False)


def test_queries_and_keys_of_other_lengths_both_count_from_zero():
  assert patterns.Local(3).mask(5, 9).shape == (5, 9)
  np.testing.assert_array_equal(patterns.Local(3).mask(5, 9)[:, :5], patterns.Local(3).mask(5))


def test_patterns_are_values():
  layout = np.tri(3, dtype=bool)
  a, b = patterns.BlockLayout(layout, 4), patterns.BlockLayout(layout.copy(), 4)
  assert a == b and hash(a) == hash(b) and a != patterns.BlockLayout(layout, 8)
  layout[0, 0] = False
  assert a == b  # the pattern holds a copy
  assert len({patterns.Local(3), patterns.Local(3), patterns.Local(4)}) == 2
  assert patterns.PerHead((patterns.Local(3),) * 4).period == 1


def test_two_layers_reach_every_earlier_position():
  local, column = patterns.Local(4).mask(30), patterns.Column(4).mask(30)
  everything = patterns.Dense().mask(30)
  np.testing.assert_array_equal(local @ column, everything)
  np.testing.assert_array_equal(column @ local, everything)
  block, summary = patterns.Block(4).mask(30), patterns.Summary(4, 1).mask(30)
  residual = np.eye(30, dtype=bool)
  np.testing.assert_array_equal((summary | residual) @ (block | residual), everything)
  assert not np.array_equal((block | residual) @ (summary | residual), everything)


WRONG = {
  "Local(window=0)": lambda: patterns.Local(0),
  "Column(stride=2.5)": lambda: patterns.Column(2.5),
  "must lie within stride=4": lambda: patterns.Summary(4, 3, 2),
  "must not exceed stride=8": lambda: patterns.Fixed(8, 4, 3),
  "at least one pattern": lambda: patterns.PerHead(()),
  "must be a boolean table": lambda: patterns.BlockLayout(np.ones((2, 2)), 4),
}


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_value(words, as_a_user):
  with pytest.raises(ValueError, match=re.escape(words)):
    WRONG[words]()
