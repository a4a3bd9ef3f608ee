"""How far away the blocks are that lists have."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.view import chosen


@pytest.mark.parametrize(("query_block", "block_size"), [(1, 4), (4, 2)])
def test_lists_are_counted_by_distance(query_block, block_size):
  T = 19
  nq, nk = -(-T // query_block), -(-T // block_size)
  lists = np.random.default_rng(0).random((2, 3, nq, nk)) < 0.4
  read, there = np.zeros(nk, int), np.zeros(nk, int)
  for n in range(nq):
    last = (min((n + 1) * query_block, T) - 1) // block_size
    lists[:, :, n, last + 1 :] = False
    for j in range(last + 1):
      read[last - j] += lists[:, :, n, j].sum()
      there[last - j] += 2 * 3
  counts = chosen._by_distance(jnp.asarray(lists), query_block, block_size)
  np.testing.assert_array_equal(counts, (read, there))


def test_each_layer_has_a_line():
  figure = chosen.draw({1: np.linspace(1, 0, 5, dtype=np.float32)}, 16)
  (line,) = figure.axes[0].lines
  assert line.get_label() == "layer 1" and line.get_xdata().tolist() == [0, 16, 32, 48, 64]
