"""Heads in groups that share a pattern: taken apart, joined again, and summed per key head.

Arrays are [B, T, H, ...]. Two softmaxes over disjoint keys are merged here too.
"""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Shaped

from pallas_kernels import patterns

Heads = tuple[int, ...]


def by_pattern(
  pattern: patterns.Pattern, num_heads: int, *, split_fixed: bool
) -> tuple[tuple[Heads, patterns.Pattern], ...]:
  """The query heads of each different pattern, in the order of their first head.

  Args:
    pattern: of all heads.
    num_heads: query heads.
    split_fixed: whether heads of `Fixed` with different summaries are different; else they are
      one group, whose pattern is `Fixed` itself.
  """
  if isinstance(pattern, patterns.Fixed) and not split_fixed:
    return ((tuple(range(num_heads)), pattern),)
  heads_of = {}
  for h in range(num_heads):
    heads_of.setdefault(pattern.of_head(h), []).append(h)
  return tuple((tuple(heads), of_heads) for of_heads, heads in heads_of.items())


def take(x: Shaped[Array, "B T H *D"], heads: Sequence[int]) -> Shaped[Array, "B T Hg *D"]:
  """Some heads of x, ascending: slices, not a gather."""
  if len(heads) == x.shape[2]:
    return x
  step = heads[1] - heads[0] if len(heads) > 1 else 1
  if tuple(heads) == tuple(range(heads[0], heads[-1] + 1, step)):
    return x[:, :, heads[0] : heads[-1] + 1 : step]
  return jnp.concatenate([x[:, :, h : h + 1] for h in heads], axis=2)


def join(parts: Iterable[Shaped[Array, "B T _ *D"]], heads: Iterable[Sequence[int]]) -> Array:
  """All heads in order, [B, T, H, ...], from those of groups, in the widest of their dtypes."""
  parts = list(parts)
  if len(parts) == 1:
    return parts[0]
  widest = max((x.dtype for x in parts), key=lambda dtype: dtype.itemsize)
  place = {h: (x, n) for x, of_x in zip(parts, heads, strict=True) for n, h in enumerate(of_x)}
  slices = (place[h] for h in sorted(place))
  return jnp.concatenate([x[:, :, n : n + 1].astype(widest) for x, n in slices], axis=2)


def sum_per_key_head(x: Float[Array, "B S H D"], num_kv_heads: int) -> Float[Array, "B S Hkv D"]:
  """The sum over the query heads that read one key head: float32, or x where heads are equal."""
  B, S, H, D = x.shape
  if num_kv_heads == H:
    return x
  grouped = x.reshape(B, S, num_kv_heads, H // num_kv_heads, D)
  return grouped.sum(axis=3, dtype=jnp.float32)


def merge(
  out_a: Float[Array, "B T H D"],
  lse_a: Float[Array, "B T H"],
  out_b: Float[Array, "B T H D"],
  lse_b: Float[Array, "B T H"],
  *,
  base: Literal["e", 2] = "e",
) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]:
  """One softmax over two disjoint key sets, from each one's result and log-sum-exp.

  A row may have no keys in one set or in both. Differentiable, in float32.

  Args:
    out_a, lse_a: of one set.
    out_b, lse_b: of the other.
    base: of the logarithms.
  """
  exp, log = (jnp.exp, jnp.log) if base == "e" else (jnp.exp2, jnp.log2)
  top = jnp.maximum(lse_a, lse_b)
  # Any number serves: it keeps exp in range, and cancels.
  top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
  weight_a, weight_b = exp(lse_a - top), exp(lse_b - top)
  total = weight_a + weight_b
  safe = jnp.where(total == 0, 1.0, total)
  share = lambda weight: (weight / safe)[..., None]
  out = share(weight_a) * out_a.astype(jnp.float32) + share(weight_b) * out_b.astype(jnp.float32)
  return out, jnp.where(total == 0, -jnp.inf, top + log(safe))
