"""The problems of a view: solved whole, many at a time, or tile by tile."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import functions
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.scores import logits_of_learned
from pallas_kernels.scores import Scores
from pallas_kernels.xla import sizes
from pallas_kernels.xla import softmax
from pallas_kernels.xla import tiles as long
from pallas_kernels.xla.views import View


def solve(problem: "Problem", one_of: Callable, arrays: tuple) -> tuple:
  """`one_of` for each of the N problems: as many at once as `sizes.LOGITS` allows."""
  if not isinstance(arrays[0].shape[0], int):  # of a symbolic batch: row by row
    split = lambda x: x.reshape(problem.view.B, -1, *x.shape[1:])
    inner = lambda xs: _solve(problem._replace(masks=xs[1]), one_of, xs[0])
    results = jax.lax.map(inner, jax.tree.map(split, (arrays, problem.masks)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
  return _solve(problem, one_of, arrays)


def _solve(problem: "Problem", one_of: Callable, arrays: tuple) -> tuple:
  (N, h, T, _), S = arrays[0].shape, arrays[1].shape[2]
  whole = problem.tiles(T, S) == (T, S)
  at_once = max(1, sizes.LOGITS // (h * T * S)) if whole else 1  # a sweep groups its own tiles
  xs = (arrays, problem.masks)
  if at_once >= N:
    return jax.vmap(one_of)(xs)
  return jax.lax.map(one_of, xs, batch_size=at_once)


def of_view(view: View, arrays: Arrays, scores: Scores, block_size: int) -> "Problem":
  """The problems of a view: what they have in common, and what masks each of them."""
  allowed = view.pass_.allowed
  if view.pass_.pattern is not None:
    allowed = functions.bound(view.pass_.pattern, arrays.held).allowed
  masks = view.masks(arrays)
  return Problem(view, allowed, scores, arrays.held, block_size, masks)


class Problem(NamedTuple):
  """One sequence of a view: `[h, T, D]` queries, `[h, S, D]` keys, and what masks them.

  Attributes:
    view: whose sequences.
    allowed: its pairs, for what its pattern holds.
    scores: how its logits are made.
    held: what they and the pattern hold.
    block_size: tokens of a block of the last of the masks.
    masks: segment ids of queries `[N, h, T]` and of keys `[N, h, S]`, the first key that exists
      `[N]`, and which blocks attend `[N, h or 1, nq, nk]`; None where nothing is to mask.
  """

  view: View
  allowed: Callable[[Any, Any], Any]
  scores: Scores
  held: tuple[Any, ...]
  block_size: int
  masks: tuple[Any, Any, Any, Any]

  def tiles(self, T: int, S: int) -> tuple[int, int]:
    """Queries and keys of a tile; the whole problem where it is small."""
    if self.view.pass_.block_size:
      return (min(self.view.pass_.block_size, sizes.TILE, T),) * 2
    small = T * S <= sizes.WHOLE or self.masks[2] is not None  # blocks of a window always are
    return (T, S) if small else (min(sizes.TILE, T), min(sizes.TILE, S))

  def logits(self, i: Any, j: Any) -> Any:
    """(products `[..., h, t, s]`) -> logits, of queries i `[..., t]` and keys j `[..., s]`."""
    pairs = i[..., None, :, None], j[..., None, None, :]
    return lambda products: self.scores(products, *pairs, self._heads(), held=self.held)

  def learned_logits(self, i: Any, j: Any, mask: Any) -> tuple:
    """(products, arrays that `scores.learned` says) -> logits where `mask` says."""
    pairs = i[..., None, :, None], j[..., None, None, :]
    return logits_of_learned(self.scores, self.held, *pairs, self._heads(), mask)

  def _heads(self) -> np.ndarray:
    return np.asarray(self.view.heads, np.int32)[:, None, None]

  def mask(self, i: Any, j: Any, q_ids: Any, k_ids: Any, first_key: Any, blocks: Any) -> Any:
    """Pairs of queries i `[..., t]` and keys j `[..., s]` that attend, `[..., h or 1, t, s]`."""
    i, j = i[..., :, None], j[..., None, :]
    positions = self.view.pass_.query_position(i + self.view.halo), self.view.pass_.key_position(j)
    mask = self.allowed(*positions)[..., None, :, :]
    if first_key is not None:
      mask = mask & (j >= first_key)[None]
    if q_ids is not None:
      mask = mask & (q_ids[..., :, None] == k_ids[..., None, :])
    if blocks is not None:  # what lies beyond the blocks is padding
      pairs = blocks[:, i // self.block_size, j // self.block_size]
      mask = mask & jnp.moveaxis(pairs, 0, -3)
    return mask

  def forward(self, xs: Any) -> tuple:
    """(q, k, v), masks -> out float32 `[h, T, D]` and lse `[h, T]` of one problem."""
    (q, k, v), masks = xs
    tiles = self.tiles(q.shape[1], k.shape[1])
    if tiles != (q.shape[1], k.shape[1]):
      return long.forward(self, tiles, q, k, v, masks)
    i, j = _positions(q), _positions(k)
    return softmax.finish(
      *softmax.attend(q, k, v, self.mask(i, j, *masks), self.logits(i, j), softmax.start(q, v))
    )

  def backward(self, xs: Any) -> tuple:
    """(q, k, v, dout, lse, delta), masks -> dq, dk, dv and those of learned arrays, float32."""
    (q, k, v, dout, lse, delta), masks = xs
    tiles = self.tiles(q.shape[1], k.shape[1])
    if tiles != (q.shape[1], k.shape[1]):
      return long.backward(self, tiles, q, k, v, dout, lse, delta, masks)
    i, j = _positions(q), _positions(k)
    mask = self.mask(i, j, *masks)
    return softmax.gradients(q, k, v, dout, lse, delta, mask, *self.learned_logits(i, j, mask))


def _positions(x: Any) -> np.ndarray:
  """0 ... T - 1 of `[h, T, D]`, in the int32 that tiles count in."""
  return np.arange(x.shape[1], dtype=np.int32)
