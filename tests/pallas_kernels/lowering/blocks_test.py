"""Blocks of patterns beside the exact masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels.lowering import blocks
from pallas_kernels.lowering import passes
from tests.helpers.arrays import EVERY_PATTERN

BOTH = {
  "dense_both": patterns.Dense(causal=False),
  "local_both": patterns.Local(5, causal=False),
  "layout_both": patterns.BlockLayout(np.random.default_rng(3).random((7, 6)) < 0.5, 4, False),
  "where_both": patterns.Where(lambda i, j: (i // 4 + j // 5) % 3 != 0, causal=False),
}
MORE = {
  "local_of_one": patterns.Local(1),
  "column_of_one": patterns.Column(1),
  "long_column": patterns.Column(50),
  "summary_of_all": patterns.Summary(4, 4),
  "long_block": patterns.Block(17),
  "full_layout": patterns.BlockLayout(np.ones((9, 9), bool), 5),
}
PATTERNS = EVERY_PATTERN | BOTH | MORE
# Those of which nothing may be missed and nothing may be too much.
EXACT = {
  "dense", "local", "column", "block", "summary", "where", "dense_both", "local_both",
  "layout_both", "where_both", "local_of_one", "column_of_one", "long_column", "summary_of_all",
  "long_block",
}  # fmt: skip
SIZES = [(4, 4), (8, 3), (3, 8), (1, 1), (5, 16), (64, 64)]


def by_mask(pattern, T, S, block_q, block_k):
  """Whether any pair, and whether all pairs of a block attend."""
  mask, nq, nk = pattern.mask(T, S), -(-T // block_q), -(-S // block_k)
  cut = lambda fill: np.pad(
    mask, [(0, nq * block_q - T), (0, nk * block_k - S)], constant_values=fill
  ).reshape(nq, block_q, nk, block_k)
  return cut(False).any((1, 3)), cut(True).all((1, 3))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_hold_what_the_masks_hold(name, size):
  for T, S in ((37, 37), (24, 24), (19, 41), (41, 19), (1, 1)):
    for h in range(PATTERNS[name].period):
      pattern = PATTERNS[name].of_head(h)
      some, every = blocks.blocks_of(pattern, T, S, *size)
      any_pair, all_pairs = by_mask(pattern, T, S, *size)
      assert some.shape == any_pair.shape == every.shape
      assert not (any_pair & ~some).any() and not (every & ~all_pairs).any()
      if name in EXACT:
        np.testing.assert_array_equal(some, any_pair)
        np.testing.assert_array_equal(every, all_pairs)


@pytest.mark.parametrize("name", ["where", "where_both"])
def test_compiled_sweeps_agree(name, monkeypatch):
  plain = blocks.blocks_of.__wrapped__(PATTERNS[name], 50, 41, 8, 6)
  monkeypatch.setattr(blocks, "_BY_NUMPY", 0)

  @jax.jit
  def program(x):  # the tables are made while a program is traced
    swept = blocks.blocks_of.__wrapped__(PATTERNS[name], 50, 41, 8, 6)
    for a, b in zip(swept, plain, strict=True):
      assert isinstance(a, np.ndarray)
      np.testing.assert_array_equal(a, b)
    return x

  program(jnp.zeros(()))


@pytest.mark.parametrize("name", ["per_head", "layout", "fixed"])
def test_heads_that_differ_are_refused(name):
  with pytest.raises(ValueError, match="of_head"):
    blocks.blocks_of(EVERY_PATTERN[name], 8, 8, 4, 4)


def test_tables_are_made_once():
  make = lambda: patterns.Local(9) | patterns.BlockLayout(np.eye(4, dtype=bool), 4)
  assert blocks.blocks_of(make(), 32, 32, 4, 4) is blocks.blocks_of(make(), 32, 32, 4, 4)


def test_empty_blocks_are_not_swept():
  pattern = patterns.Where(lambda i, j: i // 64 == j // 64)
  ((_, (one,)),) = passes.lower(pattern, 2)
  idx, length = passes.tile_lists(one, 512, 512, 64, 64)
  assert length.tolist() == [1] * 8 and idx[:, 0].tolist() == list(range(8))
