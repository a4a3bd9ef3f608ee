"""Attention of one new query over the keys and values of earlier steps, of which only those are
kept and read that the pattern needs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import patterns
from sparse_flax.model import cache_rows
from sparse_flax.model.cache_rows import Step


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["key", "value"],
  meta_fields=["heads", "rows", "pattern"],
)
@dataclasses.dataclass(frozen=True)
class Part:
  """Keys and values that one pattern reads, of some heads of one layer or of several like it.

  Attributes:
    key: [*L, B, H, rows.length, Dk].
    value: [*L, B, H, rows.length, Dv].
    heads: their numbers in the layer.
    rows: which rows of the sequence lie where.
    pattern: of each of the heads, which decides what of the rows is seen.
  """

  key: Any  # an array, or what JAX's transformations put in its place
  value: Any
  heads: tuple[int, ...]
  rows: cache_rows.Rows
  pattern: patterns.Pattern


# Parts of the same heads follow each other: they share a softmax.
Cache = tuple[Part, ...]


def init_cache(
  pattern: patterns.Pattern,
  *,
  num_layers: int,
  length: int,
  num_heads: int,
  batch_size: int,
  k_size: int,
  v_size: int,
  dtype: jax.typing.DTypeLike,
  sparse: bool = True,
) -> Cache:
  """An empty cache for `length` steps; k_size and v_size are Dk and Dv, of one head.

  With sparse=False it keeps, and every step reads, all rows; what is computed is the same.
  """

  def empty(heads, rows):
    shape = (num_layers, batch_size, len(heads), rows.length)
    return (jnp.zeros((*shape, size), dtype) for size in (k_size, v_size))

  return _parts(pattern, num_heads, length, sparse, empty)


def fill(
  pattern: patterns.Pattern,
  k: Float[Array, "B P H Dk"],
  v: Float[Array, "B P H Dv"],
  *,
  length: int,
  sparse: bool = True,
) -> Cache:
  """The cache of one layer, without an axis for layers, as steps 0 to P - 1 leave it."""
  last = k.shape[1] - 1

  def taken(heads, rows):
    row = rows.row(np.arange(rows.length), last)
    there = (row >= 0) & (row <= last)
    for x in (k, v):
      found = x[:, np.where(there, row, 0)][:, :, np.asarray(heads)].swapaxes(1, 2)
      yield jnp.where(there[:, None], found, jnp.zeros((), x.dtype))

  return _parts(pattern, k.shape[2], length, sparse, taken)


def attend(
  q: Float[Array, "B H Dk"],
  k: Float[Array, "B H Dk"],
  v: Float[Array, "B H Dv"],
  cache: Cache,
  *,
  step: Step,
  layer: Step = 0,
) -> tuple[Float[Array, "B H Dv"], Cache]:
  """Stores k and v as row `step`, then attends with q to the rows that the pattern allows.

  Scores, softmax and the sum are in float32; a row without keys gives zeros.

  Returns:
    The output in q's dtype, and the cache with the new row.
  """
  cache = tuple(_store(part, k, v, step, layer) for part in cache)
  outs = [_attend_group(q, parts, step, layer) for parts in by_heads(cache)]
  return in_order(outs, cache).astype(q.dtype), cache


def by_heads(cache: Cache) -> list[list[Part]]:
  """The parts that share a softmax, for each group of heads."""
  return [list(parts) for _, parts in itertools.groupby(cache, lambda part: part.heads)]


def in_order(outs: list[Float[Array, "B _ Dv"]], cache: Cache) -> Float[Array, "B H Dv"]:
  """What each of `by_heads` gave, by the numbers of the heads."""
  if len(outs) == 1:
    return outs[0]
  order = np.argsort(np.concatenate([parts[0].heads for parts in by_heads(cache)]))
  return jnp.concatenate(outs, axis=1)[:, order]


def _parts(
  pattern: patterns.Pattern, num_heads: int, length: int, sparse: bool, contents: Callable
) -> Cache:
  """What to keep for each different pattern of a head; (heads, rows) -> key, value fill it."""
  heads_of = {}
  for h in range(num_heads):
    heads_of.setdefault(pattern.of_head(h), []).append(h)
  return tuple(
    Part(*contents(heads, rows), tuple(heads), rows, seen)
    for one, heads in heads_of.items()
    for rows, seen in cache_rows.of_pattern(one, length, sparse=sparse)
  )


def _of_heads(x, heads: tuple[int, ...]):
  """Some heads of [B, H, D]."""
  return x if len(heads) == x.shape[1] else x[:, np.asarray(heads)]


def _store(part: Part, k, v, step: Step, layer: Step) -> Part:
  def put(room, x):
    row = _of_heads(x, part.heads)[None, :, :, None].astype(room.dtype)
    return jax.lax.dynamic_update_slice(room, row, (layer, 0, 0, part.rows.slot(step), 0))

  return dataclasses.replace(part, key=put(part.key, k), value=put(part.value, v))


def _attend_group(q, parts: list[Part], step: Step, layer: Step) -> Float[Array, "B H Dv"]:
  """One softmax over all parts, float32."""
  q = _of_heads(q, parts[0].heads).astype(jnp.float32) * q.shape[-1] ** -0.5

  def read(part, room):
    shape = (1, *room.shape[1:3], part.rows.size, room.shape[4])
    piece = jax.lax.dynamic_slice(room, (layer, 0, 0, part.rows.first(step), 0), shape)
    return piece[0].astype(jnp.float32)

  def score(n, part):
    products = jnp.einsum("BHD,BHKD->BHK", q, read(part, part.key), precision="highest")
    slots = part.rows.first(step) + jnp.arange(part.rows.size)
    return jnp.where(seen(parts, n, slots, step), products, -jnp.inf)

  # The finite floor and the guarded division keep a row without keys at zeros, not NaN.
  scores = [score(n, part) for n, part in enumerate(parts)]
  top = functools.reduce(jnp.maximum, (x.max(axis=-1, keepdims=True) for x in scores))
  weights = [jnp.exp(x - jnp.maximum(top, -1e30)) for x in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
  out = sum(
    jnp.einsum("BHK,BHKD->BHD", x, read(part, part.value), precision="highest")
    for x, part in zip(weights, parts, strict=True)
  )
  return out / jnp.where(total == 0, 1.0, total)


def seen(parts: list[Part], n: int, slots: Any, step: Step) -> Any:
  """Whether part n shows the row of each slot; a key of several parts is the first one's."""
  row = parts[n].rows.row(slots, step)
  shown = (row >= 0) & parts[n].pattern.allowed(step, row)
  for earlier in parts[:n]:
    shown &= ~earlier.pattern.allowed(step, row)
  return shown
