"""Attention to listed blocks: a sweep over the entries of many lists at a time.

A list is a problem of its own: the queries that share it, of all heads that share it and a key
head, against one of its blocks after the other, which are gathered from a table of blocks. Of a
list no more than one block of logits exists at once, and lists are taken in pieces.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import functions
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.scores import logits_of_learned
from pallas_kernels.xla import sizes
from pallas_kernels.xla import softmax


class _Lists:
  """The lists of a call, [batch rows, units, nq] of them in order, in pieces.

  A unit is the query heads that share lists and a key head; their queries are the rows of a list,
  head by head.
  """

  def __init__(self, plan: Plan, arrays: Arrays):
    self.plan, self.held = plan, arrays.held
    indices = jnp.asarray(arrays.block_indices, jnp.int32)
    self.units = plan.Hkv if indices.shape[1] in (1, plan.Hkv) else plan.H
    self.heads = plan.H // self.units
    self.size, self.width = plan.block_size, plan.query_block
    self.nq, self.nk = -(-plan.T // self.width), -(-plan.S // self.size)
    self.num, self.rows = plan.B * self.units * self.nq, self.heads * self.width
    # The blocks that are gathered may be larger than their logits.
    widest = max(self.rows, plan.Dk, plan.Dv)
    at_most = max(1, sizes.LOGITS // (widest * self.size))
    self.pieces = -(-self.num // at_most)
    self.at_once = -(-self.num // self.pieces)
    indices = jnp.broadcast_to(indices, (plan.B, self.units, *indices.shape[2:]))
    numbers = jnp.arange(self.pieces * self.at_once, dtype=jnp.int32)
    self.lists = self._cut(numbers), self._cut(indices.reshape(self.num, -1), -1)
    self.pattern = functions.bound(plan.pattern, arrays.held)
    ids, kv_ids = arrays.segment_ids, arrays.kv_segment_ids
    self.q_ids = self.k_ids = None
    if ids is not None:
      kv_ids = ids if kv_ids is None else kv_ids
      self.q_ids = _padded(ids, self.nq * self.width).reshape(-1, self.width)
      self.k_ids = _padded(kv_ids, self.nk * self.size).reshape(-1, self.size)

  def _cut(self, x: Array, fill: int = 0) -> Array:
    """[lists, ...] -> [pieces, lists of a piece, ...]; the lists that are added have no blocks."""
    missing = self.pieces * self.at_once - x.shape[0]
    x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
    return x.reshape(self.pieces, self.at_once, *x.shape[1:])

  def of_queries(self, x: Float[Array, "B T H D"]) -> Float[Array, "pieces n rows D"]:
    x = _padded(x, self.nq * self.width)
    x = x.reshape(x.shape[0], self.nq, self.width, self.units, self.heads, x.shape[3])
    return self._cut(x.transpose(0, 3, 1, 4, 2, 5).reshape(self.num, self.rows, x.shape[5]))

  def restored(self, x: Float[Array, "pieces n rows D"]) -> Float[Array, "B T H D"]:
    """The way back from `of_queries`."""
    D, plan = x.shape[3], self.plan
    x = x.reshape(-1, self.rows, D)[: self.num]
    x = x.reshape(plan.B, self.units, self.nq, self.heads, self.width, D)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(plan.B, -1, plan.H, D)[:, : plan.T]

  def of_keys(self, x: Float[Array, "B S Hkv D"]) -> Float[Array, "blocks b D"]:
    """The blocks of all key heads of all batch rows."""
    x = _padded(x, self.nk * self.size)
    x = x.reshape(x.shape[0], self.nk, self.size, *x.shape[2:])
    return x.transpose(0, 3, 1, 2, 4).reshape(-1, self.size, x.shape[4])

  def keys_restored(self, x: Float[Array, "blocks b D"]) -> Float[Array, "B S Hkv D"]:
    """The way back from `of_keys`."""
    x = x.reshape(self.plan.B, self.plan.Hkv, self.nk, self.size, x.shape[2])
    x = x.transpose(0, 2, 3, 1, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.plan.S]

  def most(self, lists: Array) -> Array:
    """Entries of a piece's lists, but for those at the end that no list has."""
    there = ((lists >= 0) & (lists < self.nk)).any(axis=0)
    return jnp.where(there, jnp.arange(1, there.shape[0] + 1, dtype=jnp.int32), 0).max(initial=0)

  def step(self, numbers: Array, lists: Array, n: Any) -> tuple:
    """The n-th block of every list: its place in the table, (i, j, h), the mask of the pairs."""
    block, plan = lists[:, n], self.plan
    there = (block >= 0) & (block < self.nk)
    block = jnp.where(there, block, 0)
    batch = jnp.minimum(numbers // (self.units * self.nq), plan.B - 1)
    unit, row = numbers // self.nq % self.units, numbers % self.nq
    head, place = np.divmod(np.arange(self.rows, dtype=np.int32), self.width)
    i = (row[:, None] * self.width + place[None])[:, :, None]
    h = (unit[:, None] * self.heads + head[None])[:, :, None]
    j = (block[:, None] * self.size + jnp.arange(self.size, dtype=jnp.int32)[None])[:, None]
    pairs = (i, j) if plan.pattern.period == 1 else (i, j, h)
    mask = self.pattern.allowed(*pairs) & there[:, None, None] & (i < plan.T) & (j < plan.S)
    if self.q_ids is not None:
      q_ids = self.q_ids[batch * self.nq + row][:, place][:, :, None]
      mask = mask & (q_ids == self.k_ids[batch * self.nk + block][:, None])
    key_head = unit * plan.Hkv // self.units
    return (batch * plan.Hkv + key_head) * self.nk + block, (i, j, h), mask

  def logits(self, i: Any, j: Any, h: Any) -> Callable:
    """(products [n, rows, b]) -> logits."""
    return lambda products: self.plan.scores(products, i, j, h, held=self.held)

  def learned_logits(self, i: Any, j: Any, h: Any, mask: Any) -> tuple:
    """(products, learned arrays) -> logits where `mask` says, and those arrays."""
    return logits_of_learned(self.plan.scores, self.held, i, j, h, mask)


def forward(plan: Plan, arrays: Arrays) -> tuple[Array, Array, Array | None]:
  """Output and natural log-sum-exp in float32, and where it is wanted the mass."""
  cut = _Lists(plan, arrays)
  ks, vs = cut.of_keys(arrays.k), cut.of_keys(arrays.v)

  def piece(xs: Any) -> tuple:
    (numbers, lists), q = xs

    def step(n: Any, state: Any) -> tuple:
      (total, top, weight), of_blocks = state
      cols, pairs, mask = cut.step(numbers, lists, n)
      k, v = ks[cols], vs[cols]
      own = softmax.attend(q, k, v, mask, cut.logits(*pairs), softmax.start(q, v))
      if of_blocks is not None:
        of_blocks = of_blocks.at[..., n].set(softmax.finish(*own)[1])
      new_top = jnp.maximum(top, own[1])
      keep, add = jnp.exp(top - new_top), jnp.exp(own[1] - new_top)
      total = total * keep[..., None] + own[0] * add[..., None]
      return (total, new_top, weight * keep + own[2] * add), of_blocks

    of_blocks = None
    if plan.return_mass:
      of_blocks = jnp.full((*q.shape[:2], lists.shape[1]), -jnp.inf, jnp.float32)
    start = softmax.start(q, vs), of_blocks
    state, of_blocks = jax.lax.fori_loop(0, cut.most(lists), step, start)
    out, lse = softmax.finish(*state)
    if of_blocks is not None:
      of_blocks = jnp.exp(of_blocks - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
    return out, lse[..., None], of_blocks

  out, lse, mass = jax.lax.map(piece, (cut.lists, cut.of_queries(arrays.q)))
  mass = None if mass is None else cut.restored(mass)
  return cut.restored(out), cut.restored(lse)[..., 0], mass


def backward(
  plan: Plan,
  arrays: Arrays,
  dout: Float[Array, "B T H Dv"],
  lse: Float[Array, "B T H"],
  delta: Float[Array, "B T H"],
  dmass: Float[Array, "B T H top"] | None,
) -> tuple[tuple[Array, Array, Array], list[Array]]:
  """Gradients of q, k and v, and those of learned arrays, in float32.

  dS = P (dP + dmass of the block - delta), and delta has all else.
  """
  cut = _Lists(plan, arrays)
  ks, vs = cut.of_keys(arrays.k), cut.of_keys(arrays.v)
  rows = arrays.q, dout, lse[..., None], delta[..., None]
  rows = tuple(cut.of_queries(x) for x in rows)
  of_mass = None if dmass is None else cut.of_queries(dmass)

  def piece(carry: Any, xs: Any) -> tuple:
    (numbers, lists), (q, dout, lse, delta), of_mass = xs

    def step(n: Any, grads: Any) -> tuple:
      dq, dk, dv, of_learned = grads
      cols, pairs, mask = cut.step(numbers, lists, n)
      of_block = delta if of_mass is None else delta - of_mass[..., n][..., None]
      logits = cut.learned_logits(*pairs, mask)
      given = q, ks[cols], vs[cols], dout, lse, of_block, mask, *logits
      new_dq, new_dk, new_dv, new_learned = softmax.gradients(*given)
      of_learned = [a + b for a, b in zip(of_learned, new_learned, strict=True)]
      return dq + new_dq, dk.at[cols].add(new_dk), dv.at[cols].add(new_dv), of_learned

    start = jnp.zeros(q.shape, jnp.float32)
    dq, *carry = jax.lax.fori_loop(0, cut.most(lists), step, (start, *carry))
    return tuple(carry), dq

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = zeros(ks), zeros(vs), [zeros(arrays.held[n]) for n in plan.scores.learned]
  (dk, dv, of_learned), dq = jax.lax.scan(piece, start, (cut.lists, rows, of_mass))
  return (cut.restored(dq), cut.keys_restored(dk), cut.keys_restored(dv)), of_learned


def _padded(x: Array, length: int) -> Array:
  """[B, T, ...] -> [B, length, ...]."""
  return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
