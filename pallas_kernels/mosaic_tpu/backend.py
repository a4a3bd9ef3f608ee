"""The backend protocol on TPUs: every pass is a list of blocks of some view, one kernel for all.

The passes of a union merge through their log-sum-exp; their gradients add up, since each uses the
log-sum-exp and delta of the whole softmax.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import functions
from pallas_kernels import partitioning
from pallas_kernels import patterns
from pallas_kernels.lowering import heads
from pallas_kernels.lowering import passes
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.views import Launches
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

DTYPES = ("bfloat16", "float32")
_LOOKUPS = ("gather", "dynamic_slice", "argmax", "sort", "scan", "while", "cond")


def unsupported(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  block_mask: Array | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> str | None:
  """Why these kernels cannot compute this, and what they can; None where they can."""
  if q.dtype.name not in DTYPES:
    return f"mosaic_tpu: {q.dtype.name} is not supported, {' and '.join(DTYPES)} are"
  if max(q.shape[-1], v.shape[-1]) > 256:
    sizes = q.shape[-1], v.shape[-1]
    return f"mosaic_tpu: head sizes {sizes} are not supported, those up to 256 are"
  if not isinstance(q.shape[0], int):
    return f"mosaic_tpu: a symbolic batch {q.shape[0]} is not supported"
  if functions.holds(pattern) or (scores.score_fn is not None and scores.score_fn.places):
    return "mosaic_tpu: functions that hold arrays, and a traced scale, are not supported"
  if partitioning.heads_may_be_numbered(q, k, v, pattern=pattern, scores=scores):
    return "mosaic_tpu: a score_fn of head numbers is not supported where heads may be sharded"
  for of_group, group in _lowered(pattern, q, k, segment_ids, block_mask, scores):
    for one in group:
      if one.pattern is not None and not _is_formula(one.pattern):
        return f"mosaic_tpu: {one.pattern} is not supported, its pairs are no formula"
      launches = Launches(of_group, one, q, k, v, segment_ids, block_mask, scores, block_size)
      if launches.block is None:
        sizes = ", ".join(map(str, launches.block_sizes))
        return (
          f"mosaic_tpu: blocks of {sizes} are not supported, multiples of 8 that divide 512 are"
        )
      words = launches.words()
      if words > steps.MOST:
        return f"mosaic_tpu: lists of {words:,} words exceed {steps.MOST:,} of scalar memory"
  return None


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
  """Result and natural log-sum-exp."""
  assert not held, "unsupported() refuses functions that hold arrays"
  masks = segment_ids, block_mask, scores, block_size
  groups = _lowered(pattern, q, k, segment_ids, block_mask, scores)
  parts = []
  for of_group, group in groups:
    found = [Launches(of_group, one, q, k, v, *masks).forward(q, k, v) for one in group]
    parts.append(functools.reduce(_merge, found))
  return tuple(_join(x, groups) for x in zip(*parts, strict=True))


def natural_lse(lse: Float[Array, "B T H"], *arrays, **how) -> Float[Array, "B T H"]:
  """The natural log-sum-exp, from what `forward` returned."""
  del arrays, how
  return lse


def lse_of_natural(lse: Float[Array, "B T H"], *arrays, **how) -> Float[Array, "B T H"]:
  """What `forward` returned, from the natural log-sum-exp."""
  del arrays, how
  return lse


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
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B S Hkv Dk"], Float[Array, "B S Hkv Dv"]]:
  """Gradients of q, k and v, given those of the result and of its natural log-sum-exp or None."""
  assert not held, "unsupported() refuses functions that hold arrays"
  delta = _row_sums(out, dout)
  delta = delta if dlse is None else delta - dlse
  empty = lse == -jnp.inf
  delta, lse = jnp.where(empty, 0.0, delta), jnp.where(empty, jnp.inf, lse)
  masks = segment_ids, block_mask, scores, block_size
  groups = _lowered(pattern, q, k, segment_ids, block_mask, scores)
  parts = []
  for of_group, group in groups:
    mine = [heads.take(x, of_group) for x in (dout, lse, delta)]
    grads = [Launches(of_group, one, q, k, v, *masks).backward(q, k, v, *mine) for one in group]
    parts.append([_sum(x) for x in zip(*grads, strict=True)])
  dq, dk, dv = (_join(x, groups) for x in zip(*parts, strict=True))
  dk, dv = (heads.sum_per_key_head(x, k.shape[2]) for x in (dk, dv))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _lowered(pattern: Pattern, q, k, segment_ids, block_mask, scores: Scores):
  """Heads, and their passes. What speaks of positions, or differs in queries and keys: one view."""
  plain = not scores.of_positions and segment_ids is None and block_mask is None
  natural = not plain or not pattern.causal or q.shape[1] != k.shape[1]
  lowered = passes.lower(pattern, q.shape[2], natural)
  if any(
    one.view == "summaries" and one.stride > q.shape[1] for _, group in lowered for one in group
  ):
    lowered = passes.lower(pattern, q.shape[2], natural=True)  # no view of whole rows
  if q.shape[2] == k.shape[2]:
    return lowered
  groups = []
  for of_group, group in lowered:
    several = max(len(one.starts) or 1 for one in group)
    for n in range(several):  # heads of queries that share keys, but not their summaries
      mine = tuple(of_group[n::several])
      with_start = lambda one, n=n: dataclasses.replace(one, starts=one.starts[n : n + 1])
      if mine:
        groups.append((mine, tuple(with_start(one) if one.starts else one for one in group)))
  return groups


@functools.lru_cache(maxsize=256)
def _is_formula(pattern: Pattern) -> bool:
  """Whether a kernel can compute the pairs, but for layouts, which have tables."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    return all(map(_is_formula, pattern.patterns))
  if isinstance(pattern, patterns.BlockLayout):
    return True
  position = jax.ShapeDtypeStruct((8, LANES), jnp.int32)
  traced = jax.make_jaxpr(pattern.allowed)(position, position)
  text = str(traced)
  return not traced.consts and not any(f" {name}[" in text for name in _LOOKUPS)


# ------------------------------------------------------------------------------------------ arrays


def _merge(a, b):
  out, lse = heads.merge(*a, *b)
  return out.astype(a[0].dtype), lse


def _join(parts, groups):
  return heads.join(parts, [of_group for of_group, _ in groups])


def _row_sums(a, b):
  """The sums of a * b over the last axis, [B, T, H, D] -> [B, T, H], float32.

  Of heads that are no whole lanes as a product with ones: [B, T, H, D] of those in float32 would
  take many times its size.
  """
  B, T, H, D = a.shape
  if D % LANES == 0:
    return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=-1)
  flat = lambda x: x.reshape(B, T, H * D).astype(jnp.float32)
  ones = jnp.repeat(jnp.eye(H, dtype=jnp.float32), D, axis=0)
  return jnp.dot(flat(a) * flat(b), ones, precision=jax.lax.Precision.HIGHEST)


def _sum(parts):
  """In float32, where there are several."""
  if len(parts) == 1:
    return parts[0]
  return sum(x.astype(jnp.float32) for x in parts)
