"""Exact attention in jax.numpy that runs everywhere and never builds a T x T array.

Every pass (passes.py) becomes N independent problems of T queries and S keys. Small ones are
solved whole, many at a time; long ones tile by tile with an online softmax over the lists of key
tiles. Either way at most about `_LOGITS` logits exist at once, and the backward pass computes them
again from q, k and the merged log-sum-exp.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Num

from pallas_kernels import functions
from pallas_kernels.lowering import heads
from pallas_kernels.lowering import passes
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import attending
from pallas_kernels.scores import Scores

_LOGITS = 1 << 20  # logits at once: 4 MB in float32, about what the caches of a core hold
_WHOLE = 1 << 19  # logits per head up to which a problem is solved whole
_TILE = 512  # queries and keys of a tile of a long problem
_NO_MAXIMUM = -1e30  # where a running maximum starts: finite, so that exp(-inf - it) is 0


def forward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
  """Attention over the pairs of `pattern`, and the log-sum-exp of its logits.

  `held` is what the traced functions in `pattern` and `scores` hold.
  """
  out, lse = [], []
  given = segment_ids, block_mask, block_size, held
  natural, groups = _lowered(pattern, q, k, block_mask, scores)
  for of_group, group in groups:
    part = None
    for one in group:
      view = _View(one, of_group, q.shape, natural)
      (qs, ks, vs), problem = view.arrays(q, k, v), view.problem(scores, *given)
      new = view.restore(*_map(problem, problem.forward, (qs, ks, vs), view.B))
      part = new if part is None else heads.merge(*part, *new)
    out.append(part[0])
    lse.append(part[1])
  join = lambda xs: heads.join(xs, [of_group for of_group, _ in groups])
  return join(out).astype(q.dtype), join(lse)


def backward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  out: Float[Array, "B T H Dv"],
  lse: Float[Array, "B T H"],
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
  held: tuple[Array, ...] = (),
) -> tuple[Array, ...]:
  """Gradients of q, k and v, given those of the result and of its log-sum-exp, if it has any.

  Then those of the arrays of `held` that `scores.learned` says.

  With P = exp(S - lse) of the merged lse, dS = P (dP - delta), delta = rowsum(dout out) - dlse:
  every pass of a merged pattern uses the same two rows, and the merge is never differentiated.
  """
  delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  delta = delta if dlse is None else delta - dlse
  # A row without keys has no pair to use these, and its cotangent of lse = -inf may be anything.
  has_keys = jnp.isfinite(lse)
  lse, delta = jnp.where(has_keys, lse, 0.0), jnp.where(has_keys, delta, 0.0)
  grads = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  learned = [held[n] for n in scores.learned]
  of_learned = [jnp.zeros(x.shape, jnp.float32) for x in learned]
  given = segment_ids, block_mask, block_size, held
  natural, groups = _lowered(pattern, q, k, block_mask, scores)
  for of_group, group in groups:
    for one in group:
      view = _View(one, of_group, q.shape, natural)
      (qs, ks, vs), pull = jax.vjp(view.arrays, q, k, v)
      rows = view.queries(dout), view.queries(lse[..., None]), view.queries(delta[..., None])
      problem = view.problem(scores, *given)
      *parts, more = _map(problem, problem.backward, (qs, ks, vs, *rows), view.B)
      of_learned = [a + b.sum(axis=0) for a, b in zip(of_learned, more, strict=True)]
      parts = tuple(part.astype(x.dtype) for part, x in zip(parts, (qs, ks, vs), strict=True))
      grads = tuple(a + b.astype(jnp.float32) for a, b in zip(grads, pull(parts), strict=True))
  grads, arrays = (*grads, *of_learned), (q, k, v, *learned)
  return tuple(grad.astype(x.dtype) for grad, x in zip(grads, arrays, strict=True))


def natural_lse(lse: Float[Array, "B T H"], *arrays, **how) -> Float[Array, "B T H"]:
  """The public log-sum-exp: of this backend, what `forward` returned."""
  del arrays, how
  return lse


def lse_of_natural(lse: Float[Array, "B T H"], *arrays, **how) -> Float[Array, "B T H"]:
  """What `forward` returned, from the public log-sum-exp."""
  del arrays, how
  return lse


def _lowered(pattern: Pattern, q, k, block_mask, scores: Scores):
  """Whether the natural view alone is swept, and heads and their passes."""
  T, H = q.shape[1:3]
  # Only the natural view has the original positions.
  natural = k.shape[1] != T or block_mask is not None or scores.of_positions
  groups = passes.lower(pattern, H, natural)
  # Rows of summaries are whole ones, which may be much longer than the sequence.
  if any(one.view == "summaries" and one.stride > T for _, group in groups for one in group):
    natural, groups = True, passes.lower(pattern, H, natural=True)
  return natural, groups


# --------------------------------------------------------------------------------------- views


class _View:
  """q, k, v of one pass and its heads as N problems, `[N, H, T, D]`, and the way back.

  A window becomes blocks of queries that each carry the keys of the window before them, unless the
  view must stay `natural`; all other views are reshapes.
  """

  def __init__(self, one: Pass, of_group, q_shape, natural: bool):
    self.one, self.heads = one, of_group
    self.B, self.T, self.H, _ = q_shape
    self.kind, self.stride, self.halo = one.view, min(one.stride, self.T), 0
    short = one.window is not None and one.window <= _TILE
    if self.kind == "natural" and not natural and one.causal and short:
      window = min(one.window, self.T)
      # Blocks narrower than 64 waste the matrix units, wider ones waste logits outside the window.
      self.kind, self.halo = "windows", window - 1
      self.stride = min(max(window, 64), 256, self.T)
    if one.view == "summaries":
      self.stride = one.stride  # a summary column keeps its place, however short the sequence
    self.rows = -(-self.T // self.stride)  # rows of the view; the last one is padded

  def arrays(self, q, k, v):
    """Queries, keys and values of the problems."""
    return self.queries(q), self.keys(k), self.keys(v)

  def queries(self, x: Num[Array, "B T H D"]) -> Num[Array, "N h t D"]:
    x = self._select(x)
    if self.kind in ("natural", "summaries"):
      return x.transpose(0, 2, 1, 3)
    x = self._fold(x)  # [B, rows, stride, h, D]
    if self.kind == "columns":
      return x.transpose(0, 2, 3, 1, 4).reshape(-1, x.shape[3], self.rows, x.shape[4])
    return x.transpose(0, 1, 3, 2, 4).reshape(-1, x.shape[3], self.stride, x.shape[4])

  def keys(self, x: Num[Array, "B S Hkv D"]) -> Num[Array, "N h s D"]:
    x = jnp.repeat(x, self.H // x.shape[2], axis=2)
    if self.kind == "summaries":
      x, starts, width = self._fold(self._select(x)), self.one.starts, self.one.width
      starts = [starts[h % len(starts)] for h in self.heads]
      columns = [x[:, :, start : start + width, n] for n, start in enumerate(starts)]
      x = jnp.stack(columns, axis=1)  # [B, h, rows, width, D]
      return x.reshape(*x.shape[:2], -1, x.shape[-1])
    x = self.queries(x)
    if self.kind != "windows":
      return x
    x = x.reshape(self.B, self.rows, *x.shape[1:])
    steps = -(-self.halo // self.stride)  # blocks that the window reaches back
    late = lambda n: jnp.pad(x, [(0, 0), (n, 0)] + [(0, 0)] * 3)[:, : self.rows]
    x = jnp.concatenate([late(n) for n in range(steps, -1, -1)], axis=3)
    x = x[:, :, :, steps * self.stride - self.halo :]
    return x.reshape(-1, *x.shape[2:])

  def restore(self, out: Float[Array, "N h t D"], lse: Float[Array, "N h t"]):
    """Results in the order of q: `[B, T, h, D]` and `[B, T, h]`."""
    return self._unfold(out), self._unfold(lse[..., None])[..., 0]

  def problem(self, scores: Scores, segment_ids, block_mask, block_size: int, held) -> "_Problem":
    """What the problems have in common, and what masks each of them."""
    q_ids = k_ids = first_key = blocks = None
    if segment_ids is not None:
      ids = jnp.broadcast_to(segment_ids[:, :, None, None], (self.B, self.T, self.H, 1))
      q_ids, k_ids = self.queries(ids)[..., 0], self.keys(ids)[..., 0]
    if self.kind == "windows":  # keys before the sequence began
      first_key = np.maximum(0, self.halo - self.stride * np.arange(self.rows))
      first_key = jnp.tile(jnp.asarray(first_key, jnp.int32), self.B)
    if block_mask is not None:
      blocks = block_mask if block_mask.shape[1] == 1 else block_mask[:, np.asarray(self.heads)]
      blocks = jnp.broadcast_to(blocks, (self.B, *blocks.shape[1:]))
    masks = q_ids, k_ids, first_key, blocks
    allowed = self.one.allowed
    if self.one.pattern is not None:
      allowed = functions.bound(self.one.pattern, held).allowed
    how = allowed, self.halo, scores, held, self.heads, block_size, masks
    return _Problem(self.one, *how)

  def _select(self, x):
    return heads.take(x, self.heads)

  def _fold(self, x):
    """`[B, T, h, D]` -> `[B, rows, stride, h, D]`, padded at the end: in the future of all."""
    x = jnp.pad(x, [(0, 0), (0, self.rows * self.stride - self.T), (0, 0), (0, 0)])
    return x.reshape(self.B, self.rows, self.stride, *x.shape[2:])

  def _unfold(self, x):
    if self.kind in ("natural", "summaries"):
      return x.transpose(0, 2, 1, 3)
    h, D = x.shape[1], x.shape[3]
    if self.kind == "columns":
      x = x.reshape(self.B, self.stride, h, self.rows, D).transpose(0, 3, 1, 2, 4)
    else:
      x = x.reshape(self.B, self.rows, h, self.stride, D).transpose(0, 1, 3, 2, 4)
    return x.reshape(self.B, self.rows * self.stride, h, D)[:, : self.T]


# ------------------------------------------------------------------------------------ problems


def _map(problem: "_Problem", solve: Callable, arrays: tuple, batch: int) -> tuple:
  """`solve` for each of the N problems of `batch` rows: as many at once as `_LOGITS` allows."""
  (N, h, T, _), S = arrays[0].shape, arrays[1].shape[2]
  if not isinstance(N, int):  # of a symbolic batch: row by row
    split = lambda x: x.reshape(batch, -1, *x.shape[1:])
    inner = lambda xs: _map(problem._replace(masks=xs[1]), solve, xs[0], 1)
    results = jax.lax.map(inner, jax.tree.map(split, (arrays, problem.masks)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
  block_q, block_k = problem.tiles(T, S)
  whole = (block_q, block_k) == (T, S)
  at_once = max(1, _LOGITS // (h * T * S)) if whole else 1  # a sweep groups its own tiles
  xs = (arrays, problem.masks)
  if at_once >= N:
    return jax.vmap(solve)(xs)
  return jax.lax.map(solve, xs, batch_size=at_once)


class _Problem(NamedTuple):
  """One sequence of a view: `[h, T, D]` queries, `[h, S, D]` keys, and what masks them.

  Attributes:
    one: the pass.
    allowed: its pairs, for what its pattern holds.
    halo: keys before the first query, in a block of a window.
    scores: how its logits are made.
    held: what they and the pattern hold.
    heads: the numbers of its heads.
    block_size: tokens of a block of the last of the masks.
    masks: segment ids of queries `[N, h, T]` and of keys `[N, h, S]`, the first key that exists
      `[N]`, and which blocks attend `[N, h or 1, nq, nk]`; None where nothing is to mask.
  """

  one: Pass
  allowed: Callable[[Any, Any], Any]
  halo: int
  scores: Scores
  held: tuple[Any, ...]
  heads: range | tuple[int, ...]
  block_size: int
  masks: tuple[Any, Any, Any, Any]

  def tiles(self, T: int, S: int) -> tuple[int, int]:
    """Queries and keys of a tile; the whole problem where it is small."""
    if self.one.block_size:
      return (min(self.one.block_size, _TILE, T),) * 2
    small = T * S <= _WHOLE or self.masks[2] is not None  # blocks of a window always are
    return (T, S) if small else (min(_TILE, T), min(_TILE, S))

  def logits(self, i, j):
    """(products `[..., h, t, s]`) -> logits, of queries i `[..., t]` and keys j `[..., s]`."""
    pairs = i[..., None, :, None], j[..., None, None, :]
    return lambda products: self.scores(products, *pairs, self._heads(), held=self.held)

  def learned_logits(self, i, j, mask):
    """(products, arrays that `scores.learned` says) -> logits where `mask` says."""
    learned, (i, j) = self.scores.learned, (i[..., None, :, None], j[..., None, None, :])
    if learned:
      i, j = attending(mask, i, j)

    def logits(products, *values):
      held = list(self.held)
      for n, x in zip(learned, values, strict=True):
        held[n] = x
      return self.scores(products, i, j, self._heads(), held=tuple(held))

    return logits, tuple(self.held[n] for n in learned)

  def _heads(self):
    return np.asarray(self.heads, np.int32)[:, None, None]

  def mask(self, i, j, q_ids, k_ids, first_key, blocks):
    """Pairs of queries i `[..., t]` and keys j `[..., s]` that attend, `[..., h or 1, t, s]`."""
    i, j = i[..., :, None], j[..., None, :]
    positions = self.one.query_position(i + self.halo), self.one.key_position(j)
    mask = self.allowed(*positions)[..., None, :, :]
    if first_key is not None:
      mask = mask & (j >= first_key)[None]
    if q_ids is not None:
      mask = mask & (q_ids[..., :, None] == k_ids[..., None, :])
    if blocks is not None:  # what lies beyond the blocks is padding
      pairs = blocks[:, i // self.block_size, j // self.block_size]
      mask = mask & jnp.moveaxis(pairs, 0, -3)
    return mask

  def forward(self, xs):
    """(q, k, v), masks -> out float32 `[h, T, D]` and lse `[h, T]` of one problem."""
    (q, k, v), masks = xs
    tiles = self.tiles(q.shape[1], k.shape[1])
    if tiles != (q.shape[1], k.shape[1]):
      return _sweep_forward(self, tiles, q, k, v, masks)
    i, j = _positions(q), _positions(k)
    return _finish(*_attend(q, k, v, self.mask(i, j, *masks), self.logits(i, j), _start(q, v)))

  def backward(self, xs):
    """(q, k, v, dout, lse, delta), masks -> dq, dk, dv and those of learned arrays, float32."""
    (q, k, v, dout, lse, delta), masks = xs
    tiles = self.tiles(q.shape[1], k.shape[1])
    if tiles != (q.shape[1], k.shape[1]):
      return _sweep_backward(self, tiles, q, k, v, dout, lse, delta, masks)
    i, j = _positions(q), _positions(k)
    mask = self.mask(i, j, *masks)
    return _gradients(q, k, v, dout, lse, delta, mask, *self.learned_logits(i, j, mask))


# --------------------------------------------------------------------------- one tile of logits


def _matmul(equation, a, b):
  """The product in the dtype of the second operand, summed in float32."""
  return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _positions(x):
  """0 ... T - 1 of `[h, T, D]`, in the int32 that tiles count in."""
  return np.arange(x.shape[1], dtype=np.int32)


def _start(q, v):
  """The online softmax before any key: weighted sum, running maximum, sum of weights."""
  rows = q.shape[:-1]
  zeros = jnp.zeros(rows, jnp.float32)
  return jnp.zeros((*rows, v.shape[-1]), jnp.float32), zeros + _NO_MAXIMUM, zeros


def _attend(q, k, v, mask, logits_of, state):
  """The online softmax after the keys k `[..., h, s, D]`."""
  total, top, weight = state
  logits = logits_of(_matmul("...td,...sd->...ts", q, k))
  new_top = jnp.maximum(top, jnp.max(logits, axis=-1, where=mask, initial=_NO_MAXIMUM))
  weights = jnp.where(mask, jnp.exp(logits - new_top[..., None]), 0.0)
  keep = jnp.exp(top - new_top)
  total = total * keep[..., None] + _matmul("...ts,...sd->...td", weights, v)
  return total, new_top, weight * keep + weights.sum(axis=-1)


def _finish(total, top, weight):
  """Output and log-sum-exp; zeros and -inf for a row without keys."""
  safe = jnp.where(weight == 0, 1.0, weight)
  return total / safe[..., None], jnp.where(weight == 0, -jnp.inf, top + jnp.log(safe))


def _gradients(q, k, v, dout, lse, delta, mask, logits_of, learned):
  """What the pairs of one tile add to dq, dk, dv and to the gradients of learned arrays.

  lse and delta are `[..., h, t, 1]`.
  """
  logits, pull = jax.vjp(logits_of, _matmul("...td,...sd->...ts", q, k), *learned)
  weights = jnp.where(mask, jnp.exp(logits - lse), 0.0)
  dweights = _matmul("...td,...sd->...ts", dout, v)
  # A pair that is masked may have any logit, and any derivative of it.
  dproducts, *of_learned = pull(weights * (dweights - delta))
  dproducts = jnp.where(mask, dproducts, 0.0)
  of_learned = [jnp.where(mask.any(), x, 0.0).astype(jnp.float32) for x in of_learned]
  dq = _matmul("...ts,...sd->...td", dproducts, k)
  dk = _matmul("...ts,...td->...sd", dproducts, q)
  return dq, dk, _matmul("...ts,...td->...sd", weights, dout), of_learned


# -------------------------------------------------------------------------- tile by tile sweeps


class _Tiles:
  """One long problem cut into tiles, its rows of tiles in groups that are swept together."""

  def __init__(self, problem: _Problem, tiles: tuple[int, int], q, k, masks):
    self.problem, (self.block_q, self.block_k) = problem, tiles
    h, self.T, self.S = q.shape[0], q.shape[1], k.shape[1]
    idx, length = passes.tile_lists(problem.one, self.T, self.S, *tiles)
    self.group = min(len(idx), max(1, _LOGITS // (h * self.block_q * self.block_k)))
    self.rows = -(-len(idx) // self.group) * self.group
    pad = lambda x: np.pad(x, [(0, self.rows - len(idx))] + [(0, 0)] * (x.ndim - 1))
    lists = np.arange(self.rows, dtype=np.int32), pad(idx), pad(length)
    self.lists = tuple(jnp.asarray(self._grouped(x)) for x in lists)
    self.q_ids, self.k_ids, _, self.blocks = masks
    if self.q_ids is not None:
      self.q_ids, self.k_ids = self.of_queries(self.q_ids), self.of_keys(self.k_ids)

  def _grouped(self, x):
    return x.reshape(-1, self.group, *x.shape[1:])

  def _cut(self, x, block, num):
    x = jnp.pad(x, [(0, 0), (0, num * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], num, block, *x.shape[2:]).swapaxes(0, 1)

  def of_queries(self, x):
    """`[h, T, ...]` -> `[groups, rows of a group, h, block_q, ...]`."""
    return self._grouped(self._cut(x, self.block_q, self.rows))

  def of_keys(self, x):
    """`[h, S, ...]` -> `[tiles, h, block_k, ...]`."""
    return self._cut(x, self.block_k, -(-self.S // self.block_k))

  def joined(self, x, length):
    """`[tiles, h, block, ...]` -> `[h, length, ...]`."""
    x = x.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

  def step(self, n, rows, idx, length, q_ids):
    """The n-th key tile of each row of tiles: its number, the positions, the mask of the pairs."""
    cols = idx[:, n]
    i = rows[:, None] * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)[None]
    j = cols[:, None] * self.block_k + jnp.arange(self.block_k, dtype=jnp.int32)[None]
    k_ids = None if q_ids is None else self.k_ids[cols]
    mask = self.problem.mask(i, j, q_ids, k_ids, None, self.blocks)
    mask = mask & (n < length)[:, None, None, None]
    if not self.problem.one.causal or self.T > self.S:  # else padded keys come after all queries
      mask = mask & (j < self.S)[:, None, None, :]
    return cols, (i, j), mask


def _sweep_forward(problem, tiles, q, k, v, masks):
  """Output and log-sum-exp of one long problem."""
  cut = _Tiles(problem, tiles, q, k, masks)
  ks, vs = cut.of_keys(k), cut.of_keys(v)

  def sweep(xs):
    (rows, idx, length), qs, q_ids = xs

    def step(n, state):
      cols, pairs, mask = cut.step(n, rows, idx, length, q_ids)
      return _attend(qs, ks[cols], vs[cols], mask, problem.logits(*pairs), state)

    return _finish(*jax.lax.fori_loop(0, length.max(), step, _start(qs, v)))

  out, lse = jax.lax.map(sweep, (cut.lists, cut.of_queries(q), cut.q_ids))
  flat = lambda x: cut.joined(x.reshape(-1, *x.shape[2:]), cut.T)
  return flat(out), flat(lse)


def _sweep_backward(problem, tiles, q, k, v, dout, lse, delta, masks):
  """Gradients of one long problem: dq row by row, dk and dv summed on the way."""
  cut = _Tiles(problem, tiles, q, k, masks)
  ks, vs = cut.of_keys(k), cut.of_keys(v)

  def sweep(carry, xs):
    (rows, idx, length), arrays, q_ids = xs

    def step(n, grads):
      dq, dk, dv, of_learned = grads
      cols, pairs, mask = cut.step(n, rows, idx, length, q_ids)
      qs, *rest = arrays
      logits = problem.learned_logits(*pairs, mask)
      new_dq, new_dk, new_dv, more = _gradients(qs, ks[cols], vs[cols], *rest, mask, *logits)
      of_learned = [a + b for a, b in zip(of_learned, more, strict=True)]
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
