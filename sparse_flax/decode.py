"""Attention of one new query over the keys and values of earlier steps."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import patterns

Step = int | Integer[Array, ""]


class Cache(NamedTuple):
  """Keys and values of earlier steps, of one layer or of several like it."""

  key: Float[Array, "L H B S Dk"]
  value: Float[Array, "L H B S Dv"]


def init_cache(
  *,
  num_layers: int,
  length: int,
  num_heads: int,
  batch_size: int,
  k_size: int,
  v_size: int,
  dtype: jax.typing.DTypeLike,
) -> Cache:
  """An empty cache for `length` steps; k_size and v_size are Dk and Dv, of one head."""
  room = lambda size: jnp.zeros((num_layers, num_heads, batch_size, length, size), dtype)
  return Cache(key=room(k_size), value=room(v_size))


def attend(
  q: Float[Array, "B H Dk"],
  k: Float[Array, "B H Dk"],
  v: Float[Array, "B H Dv"],
  cache: Cache,
  *,
  pattern: patterns.Pattern,
  step: Step,
  layer: Step = 0,
) -> tuple[Float[Array, "B H Dv"], Cache]:
  """Stores k and v as row `step`, then attends with q to the rows that `pattern` allows.

  Only the keys of the row are read: for a strided pattern about 2 sqrt(S), not S. Scores, softmax
  and the sum are in float32; a row without keys gives zeros.

  Returns:
    The output in q's dtype, and the cache with the new row.
  """
  heads_first = lambda x: jnp.swapaxes(x, 0, 1)  # [B, H, D] -> [H, B, D], the cache's order
  store = lambda rows, x: jax.lax.dynamic_update_slice(
    rows, heads_first(x)[None, :, :, None].astype(rows.dtype), (layer, 0, 0, step, 0)
  )
  cache = Cache(key=store(cache.key, k), value=store(cache.value, v))
  H, B, S = cache.key.shape[1:4]
  index = _keys_of_heads(pattern, step, S=S, H=H)  # [H, K]
  if index.shape[1] < S:
    heads, batch = jnp.arange(H)[:, None, None], jnp.arange(B)[None, :, None]
    read = lambda rows: rows[layer, heads, batch, index[:, None]]
    seen = index >= 0
  else:  # all rows: a slice is cheaper than a gather
    read = lambda rows: jax.lax.dynamic_index_in_dim(rows, layer, keepdims=False)
    seen = pattern.allowed(step, jnp.arange(S)[None], jnp.arange(H)[:, None])
    seen = jnp.broadcast_to(seen, (H, S))
  q32, k32, v32 = (
    x.astype(jnp.float32) for x in (heads_first(q), read(cache.key), read(cache.value))
  )
  scores = q.shape[-1] ** -0.5 * jnp.einsum("HBD,HBKD->HBK", q32, k32, precision="highest")
  # The finite floor and the guarded division keep a row without keys at zeros, not NaN.
  scores = jnp.where(seen[:, None], scores, -jnp.inf)
  top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e30)
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  out = jnp.einsum("HBK,HBKD->HBD", weights, v32, precision="highest")
  return heads_first(out / jnp.where(total == 0, 1.0, total)).astype(q.dtype), cache


def _keys_of_heads(
  pattern: patterns.Pattern, step: Step, *, S: int, H: int
) -> Integer[Array, "H K"]:
  """The keys of row `step` for every head, each once, filled up with -1."""
  rows = [keys_of_row(pattern.of_head(h), step, S=S) for h in range(min(pattern.period, H))]
  longest = max(len(row) for row in rows)
  filled = [jnp.pad(row, (0, longest - len(row)), constant_values=-1) for row in rows]
  return jnp.stack([filled[h % len(rows)] for h in range(H)])


def keys_of_row(pattern: patterns.Pattern, step: Step, *, S: int) -> Integer[Array, "K"]:
  """The keys among S that row `step` attends to, each once, filled up with -1.

  K depends on the pattern (of one head) and on S alone. `pattern.allowed` has the last word; what
  is written here is where to look, so that a row of a sparse pattern costs K and not S.
  """
  every = lambda stride: stride * jnp.arange(-(-S // stride))  # 0, stride, 2 stride, ... < S
  match pattern:
    case patterns.Strided(stride):
      return keys_of_row(patterns.Local(stride) | patterns.Column(stride), step, S=S)
    case patterns.Union(members):
      parts = [keys_of_row(member, step, S=S) for member in members]
      for n, part in enumerate(parts[1:], start=1):  # a key of several members counts once
        taken = functools.reduce(operator.or_, (p.allowed(step, part) for p in members[:n]))
        parts[n] = jnp.where(taken, -1, part)
      return jnp.concatenate(parts)
    case patterns.Intersection(members):
      keys = min((keys_of_row(member, step, S=S) for member in members), key=len)
    case patterns.Local(window):
      keys = step - jnp.arange(min(window, S))
    case patterns.Column(stride):
      keys = step - every(stride)
    case patterns.Block(stride):
      keys = step // stride * stride + jnp.arange(min(stride, S))
    case patterns.Summary(stride, width):
      keys = (every(stride)[:, None] + (pattern.start + jnp.arange(width))[None]).reshape(-1)
    case _:
      keys = jnp.arange(S)
  inside = (keys >= 0) & (keys < S)
  return jnp.where(inside & pattern.allowed(step, keys), keys, -1)
