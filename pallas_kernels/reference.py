"""The definition of correct: dense masked softmax attention in float32, one screen long."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Integer

from pallas_kernels import functions
from pallas_kernels.lowering import indices
from pallas_kernels.lowering import plan as plans
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import attending
from pallas_kernels.scores import Scores

# Pairs of a mask that a program holds. To compile one with 12,288 x 12,288 of them takes 18 s on a
# CPU; one that computes them, 0.4 s.
LARGEST_CONSTANT = 1 << 20


def reference_attention(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  *,
  pattern: Pattern,
  scores: Scores | None = None,
  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
  kv_segment_ids: Integer[Array | np.ndarray, "B S"] | None = None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
  block_size: int = 128,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
  """softmax(scale q k^T over the allowed keys) v, and the log-sum-exp of the logits.

  A query without keys gets zeros and lse = -inf, and sends no gradient.
  """
  plan, arrays = plans.of_call(
    q,
    k,
    v,
    pattern=pattern,
    scores=scores or Scores(q.shape[-1] ** -0.5),
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    block_mask=block_mask,
    block_size=block_size,
  )
  out, lse, *_ = forward(plan, arrays)
  return out, lse


def forward(plan: plans.Plan, arrays: plans.Arrays) -> tuple[Array, ...]:
  """`reference_attention` of a call that was planned; its derivatives are JAX's own.

  With `plan.return_mass` also the share of each listed block, [B, T, H, top].
  """
  ids, kv_ids, block_mask = arrays.segment_ids, arrays.kv_segment_ids, arrays.block_mask
  only = None
  if ids is not None:
    only = ids[:, None, :, None] == (ids if kv_ids is None else kv_ids)[:, None, None, :]
  if block_mask is not None:
    blocks = jnp.repeat(jnp.repeat(block_mask, plan.block_size, axis=2), plan.block_size, axis=3)
    blocks = blocks[:, :, : plan.T, : plan.S]
    only = blocks if only is None else only & blocks
  if arrays.block_indices is not None:
    lists = indices.per_query_head(plan, arrays.block_indices)
    blocks = indices.of_blocks(lists, -(-plan.S // plan.block_size))
    blocks = jnp.repeat(jnp.repeat(blocks, plan.query_block, axis=2), plan.block_size, axis=3)
    blocks = blocks[:, :, : plan.T, : plan.S]
    only = blocks if only is None else only & blocks
  logits, mask = _logits_and_mask(plan, arrays, np.arange(plan.T), only)
  weights, lse = _softmax(logits, mask)
  v = jnp.repeat(arrays.v.astype(jnp.float32), plan.H // plan.Hkv, axis=2)
  out = jnp.einsum("BHTS,BSHD->BTHD", weights, v, precision="highest")
  results = out.astype(plan.dtype), lse.transpose(0, 2, 1)
  return (*results, _mass(plan, arrays, weights)) if plan.return_mass else results


def _mass(plan, arrays, weights: Float[Array, "B H T S"]) -> Float[Array, "B T H top"]:
  """The sums of the weights over the listed blocks."""
  nk = -(-plan.S // plan.block_size)
  of_blocks = jnp.pad(weights, [(0, 0)] * 3 + [(0, nk * plan.block_size - plan.S)])
  of_blocks = of_blocks.reshape(*weights.shape[:3], nk, plan.block_size).sum(axis=-1)
  lists = indices.per_query_head(plan, arrays.block_indices)
  lists = jnp.repeat(lists, plan.query_block, axis=2)[:, :, : plan.T]
  lists = jnp.broadcast_to(lists, (*weights.shape[:3], lists.shape[3]))
  there = (lists >= 0) & (lists < nk)
  mass = jnp.take_along_axis(of_blocks, jnp.where(there, lists, 0), axis=-1)
  return jnp.where(there, mass, 0.0).transpose(0, 2, 1, 3)


def attention_weights(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  *,
  pattern: Pattern,
  scores: Scores | None = None,
  rows: Int[np.ndarray, "Q"] | None = None,
) -> Float[Array, "B H Q S"]:
  """The softmax weights of the queries `rows` (all by default): what one draws."""
  scores = scores or Scores(q.shape[-1] ** -0.5)
  plan, arrays = plans.of_call(q, k, k, pattern=pattern, scores=scores)
  rows = np.arange(plan.T) if rows is None else np.asarray(rows)
  return _softmax(*_logits_and_mask(plan, arrays, rows))[0]


def _logits_and_mask(plan, arrays, rows, only=None):
  """Logits float32 [B, H, Q, S], and the mask of the pairs that attend; `only` those at most."""
  q, k, held, H, S = arrays.q, arrays.k, arrays.held, plan.H, plan.S
  pattern = functions.bound(plan.pattern, held)
  rows = rows.astype(np.int32)  # as every other implementation counts
  mask = _mask_of_heads(pattern, H, rows, S)
  mask = mask if only is None else mask & only
  q32 = q[:, rows].astype(jnp.float32)
  k32 = jnp.repeat(k.astype(jnp.float32), H // plan.Hkv, axis=2)
  # "highest": a TPU would multiply in bf16, and the reference would be the less exact side.
  products = jnp.einsum("BTHD,BSHD->BHTS", q32, k32, precision="highest")
  i, j, h = rows[:, None], np.arange(S, dtype=np.int32)[None, :], np.arange(H)[:, None, None]
  if plan.scores.score_fn is not None:
    i, j = attending(mask, i, j)
  return plan.scores(products, i, j, h.astype(np.int32), held=held), mask


def _mask_of_heads(pattern: Pattern, H: int, rows, S: int) -> Bool[Any, "1 H T S"]:
  i, j = rows[:, None], np.arange(S, dtype=np.int32)[None, :]
  if len(rows) * S > LARGEST_CONSTANT:
    i, j = jnp.asarray(i), jnp.asarray(j)
  masks = [pattern.allowed(i, j, h) for h in range(pattern.period)]
  xp = jnp if any(isinstance(mask, jax.Array) for mask in masks) else np
  masks = [xp.broadcast_to(mask, (len(rows), S)) for mask in masks]
  # By an index, which a compiler computes for some heads alone, as it does not a stack of H.
  return xp.stack(masks)[np.arange(H) % len(masks)][None]


def _softmax(logits: Float[Array, "B H T S"], mask):
  """Weights over the allowed keys and lse [B, H, T]; a row without keys gets zeros and -inf."""
  # The maximum starts at a finite value and the inner where keeps exp finite on masked pairs, so
  # that neither values nor gradients meet inf - inf.
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=mask, initial=-1e30))
  weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  empty = total == 0
  safe = jnp.where(empty, 1.0, total)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
  return weights / safe, lse[..., 0]
