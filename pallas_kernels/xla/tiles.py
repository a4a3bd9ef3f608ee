"""A long problem tile by tile: sweeps over the lists of key tiles that may hold pairs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.lowering import passes
from pallas_kernels.xla import sizes
from pallas_kernels.xla import softmax


class _Tiles:
  """One long problem cut into tiles, its rows of tiles in groups that are swept together.

  Args:
    problem: a `problems.Problem`.
    tiles: queries and keys of a tile.
    q, k, masks: of one sequence.
  """

  def __init__(self, problem: Any, tiles: tuple[int, int], q: Array, k: Array, masks: Any):
    self.problem, (self.block_q, self.block_k) = problem, tiles
    h, self.T, self.S = q.shape[0], q.shape[1], k.shape[1]
    idx, length = passes.tile_lists(problem.view.pass_, self.T, self.S, *tiles)
    self.group = min(len(idx), max(1, sizes.LOGITS // (h * self.block_q * self.block_k)))
    self.rows = -(-len(idx) // self.group) * self.group
    pad = lambda x: np.pad(x, [(0, self.rows - len(idx))] + [(0, 0)] * (x.ndim - 1))
    lists = np.arange(self.rows, dtype=np.int32), pad(idx), pad(length)
    self.lists = tuple(jnp.asarray(self._grouped(x)) for x in lists)
    self.q_ids, self.k_ids, _, self.blocks = masks
    if self.q_ids is not None:
      self.q_ids, self.k_ids = self.of_queries(self.q_ids), self.of_keys(self.k_ids)

  def _grouped(self, x: Any) -> Any:
    return x.reshape(-1, self.group, *x.shape[1:])

  def _cut(self, x: Any, block: int, num: int) -> Any:
    x = jnp.pad(x, [(0, 0), (0, num * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], num, block, *x.shape[2:]).swapaxes(0, 1)

  def of_queries(self, x: Any) -> Any:
    """`[h, T, ...]` -> `[groups, rows of a group, h, block_q, ...]`."""
    return self._grouped(self._cut(x, self.block_q, self.rows))

  def of_keys(self, x: Any) -> Any:
    """`[h, S, ...]` -> `[tiles, h, block_k, ...]`."""
    return self._cut(x, self.block_k, -(-self.S // self.block_k))

  def joined(self, x: Any, length: Any) -> Any:
    """`[tiles, h, block, ...]` -> `[h, length, ...]`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

  def step(self, n: Any, rows: Any, idx: Any, length: Any, q_ids: Any) -> tuple:
    """The n-th key tile of each row of tiles: its number, the positions, the mask of the pairs."""
    cols = idx[:, n]
    i = rows[:, None] * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[None]
    j = cols[:, None] * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)[None]
    k_ids = None if q_ids is None else self.k_ids[cols]
    mask = self.problem.mask(i, j, q_ids, k_ids, None, self.blocks)
    mask = mask & (n < length)[:, None, None, None]
    # Where queries see no later key, the padded keys come after all of them.
    if not self.problem.view.pass_.causal or self.T > self.S:
      mask = mask & (j < self.S)[:, None, None, :]
    return cols, (i, j), mask


def forward(
  problem: Any, tiles: tuple[int, int], q: Array, k: Array, v: Array, masks: Any
) -> tuple[Array, Array]:
  """Output and log-sum-exp of one long problem."""
  cut = _Tiles(problem, tiles, q, k, masks)
  ks, vs = cut.of_keys(k), cut.of_keys(v)

  def sweep(xs: Any) -> tuple:
    (rows, idx, length), qs, q_ids = xs

    def step(n: Any, state: Any) -> tuple:
      cols, pairs, mask = cut.step(n, rows, idx, length, q_ids)
      return softmax.attend(qs, ks[cols], vs[cols], mask, problem.logits(*pairs), state)

    return softmax.finish(*jax.lax.fori_loop(0, length.max(), step, softmax.start(qs, v)))

  out, lse = jax.lax.map(sweep, (cut.lists, cut.of_queries(q), cut.q_ids))
  flat = lambda x: cut.joined(x.reshape(-1, *x.shape[2:]), cut.T)
  return flat(out), flat(lse)


def backward(
  problem: Any,
  tiles: tuple[int, int],
  q: Array,
  k: Array,
  v: Array,
  dout: Array,
  lse: Array,
  delta: Array,
  masks: Any,
) -> tuple:
  """Gradients of one long problem: dq row by row, dk and dv summed on the way."""
  cut = _Tiles(problem, tiles, q, k, masks)
  ks, vs = cut.of_keys(k), cut.of_keys(v)

  def sweep(carry: Any, xs: Any) -> tuple:
    (rows, idx, length), arrays, q_ids = xs

    def step(n: Any, grads: Any) -> tuple:
      dq, dk, dv, of_learned = grads
      cols, pairs, mask = cut.step(n, rows, idx, length, q_ids)
      qs, *rows_of_q = arrays
      logits = problem.learned_logits(*pairs, mask)
      new_dq, new_dk, new_dv, new_learned = softmax.gradients(
        qs, ks[cols], vs[cols], *rows_of_q, mask, *logits
      )
      of_learned = [a + b for a, b in zip(of_learned, new_learned, strict=True)]
      return dq + new_dq, dk.at[cols].add(new_dk), dv.at[cols].add(new_dv), of_learned

    start = jnp.zeros(arrays[0].shape, jnp.float32)
    dq, *carry = jax.lax.fori_loop(0, length.max(), step, (start, *carry))
    return tuple(carry), dq

  arrays = tuple(cut.of_queries(x) for x in (q, dout, lse, delta))
  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = zeros(ks), zeros(vs), [zeros(problem.held[n]) for n in problem.scores.learned]
  (dk, dv, of_learned), dq = jax.lax.scan(sweep, start, (cut.lists, arrays, cut.q_ids))
  dq = cut.joined(dq.reshape(-1, *dq.shape[2:]), cut.T)
  return dq, cut.joined(dk, cut.S), cut.joined(dv, cut.S), of_learned
