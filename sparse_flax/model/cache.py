"""Attention of one new query over the keys and values of earlier steps, of which only those are
kept and read that the pattern needs."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import patterns
from pallas_kernels import scores as scores_lib
from sparse_flax.model import cache_masks
from sparse_flax.model import cache_rows
from sparse_flax.model.cache_rows import Step


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["key", "value"],
  meta_fields=["heads", "rows", "pattern", "queries_per_key", "length"],
)
@dataclasses.dataclass(frozen=True)
class Part:
  """Keys and values that one pattern reads, of some heads of one layer or of several like it.

  Attributes:
    key: [*L, B, Hkv, rows.length, Dk], of `key_heads`.
    value: [*L, B, Hkv, rows.length, Dv].
    heads: the numbers of the query heads in the layer.
    rows: which rows of the sequence lie where.
    pattern: of each of the heads, which decides what of the rows is seen.
    queries_per_key: neighbouring query heads of the layer that share a key head.
    length: steps of the whole sequence; None where nobody said.
  """

  key: Any  # an array, or what JAX's transformations put in its place
  value: Any
  heads: tuple[int, ...]
  rows: cache_rows.Rows
  pattern: patterns.Pattern
  queries_per_key: int = 1
  length: int | None = None

  @property
  def key_heads(self) -> tuple[int, ...]:
    """The numbers of the key heads in the layer that the heads read."""
    return _key_heads(self.heads, self.queries_per_key)


# Parts of the same heads follow each other: they share a softmax.
Cache = tuple[Part, ...]


def init_cache(
  pattern: patterns.Pattern,
  *,
  num_layers: int,
  length: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  batch_size: int,
  k_size: int,
  v_size: int,
  dtype: jax.typing.DTypeLike,
  sparse: bool = True,
) -> Cache:
  """An empty cache for `length` steps; k_size and v_size are Dk and Dv, of one head.

  Query heads of one pattern share the keys of their key head; those of another pattern keep what
  they read for themselves. With sparse=False it keeps, and every step reads, all rows; what is
  computed is the same.
  """

  def empty(key_heads, rows):
    shape = (num_layers, batch_size, len(key_heads), rows.length)
    return (jnp.zeros((*shape, size), dtype) for size in (k_size, v_size))

  queries_per_key = num_heads // (num_kv_heads or num_heads)
  return _parts(pattern, num_heads, queries_per_key, length, sparse, empty)


def fill(
  pattern: patterns.Pattern,
  k: Float[Array, "B P Hkv Dk"],
  v: Float[Array, "B P Hkv Dv"],
  *,
  length: int,
  num_heads: int | None = None,
  sparse: bool = True,
) -> Cache:
  """The cache of one layer, without an axis for layers, as steps 0 to P - 1 leave it.

  `num_heads` are those of queries; None: as many as keys have.
  """
  last, num_heads = k.shape[1] - 1, num_heads or k.shape[2]

  def taken(key_heads, rows):
    row = rows.row(np.arange(rows.length), last)
    there = (row >= 0) & (row <= last)
    for x in (k, v):
      gathered = x[:, np.where(there, row, 0)][:, :, np.asarray(key_heads)].swapaxes(1, 2)
      yield jnp.where(there[:, None], gathered, jnp.zeros((), x.dtype))

  return _parts(pattern, num_heads, num_heads // k.shape[2], length, sparse, taken)


def attend(
  q: Float[Array, "B H Dk"],
  k: Float[Array, "B Hkv Dk"],
  v: Float[Array, "B Hkv Dv"],
  cache: Cache,
  *,
  step: Step,
  layer: Step = 0,
  score_fn: Callable | None = None,
  masks: cache_masks.Masks | None = None,
) -> tuple[Float[Array, "B H Dv"], Cache]:
  """Stores k and v as row `step`, then attends with q to the rows that the pattern allows.

  Scores, softmax and the sum are in float32; a row without keys gives zeros. `score_fn` and `masks`
  are those of `sparse_attention` for the whole sequence.

  Returns:
    The output in q's dtype, and the cache with the new row.
  """
  if score_fn is not None and not callable(score_fn):
    raise ValueError(f"{score_fn=}: must be a function of (logit, i, j, h), or None")
  held, masks = [], masks or cache_masks.Masks()
  masks.check(*q.shape[:2], cache[0].length)
  scores = scores_lib.Scores(1.0, None, score_fn).traced(held)
  cache = tuple(_store(part, k, v, step, layer) for part in cache)
  change = functools.partial(_change, scores, tuple(held), masks, step)
  outs = [_attend_group(q, parts, step, layer, change) for parts in by_heads(cache)]
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
  pattern: patterns.Pattern,
  num_heads: int,
  queries_per_key: int,
  length: int,
  sparse: bool,
  contents: Callable,
) -> Cache:
  """What to keep for each different pattern of a head; (key heads, rows) -> key, value fill it."""
  heads_of = {}
  for h in range(num_heads):
    heads_of.setdefault(pattern.of_head(h), []).append(h)
  return tuple(
    Part(
      *contents(_key_heads(heads, queries_per_key), rows),
      tuple(heads),
      rows,
      seen,
      queries_per_key,
      length,
    )
    for head_pattern, heads in heads_of.items()
    for rows, seen in cache_rows.of_pattern(head_pattern, length, sparse=sparse)
  )


def _key_heads(heads: Sequence[int], queries_per_key: int) -> tuple[int, ...]:
  return tuple(dict.fromkeys(h // queries_per_key for h in heads))


def _of_heads(x, heads: tuple[int, ...]):
  """Some heads of [B, H, D]."""
  return x if len(heads) == x.shape[1] else x[:, np.asarray(heads)]


def _store(part: Part, k, v, step: Step, layer: Step) -> Part:
  def put(room, x):
    row = _of_heads(x, part.key_heads)[None, :, :, None].astype(room.dtype)
    return jax.lax.dynamic_update_slice(room, row, (layer, 0, 0, part.rows.slot(step), 0))

  return dataclasses.replace(part, key=put(part.key, k), value=put(part.value, v))


def _attend_group(
  q, parts: list[Part], step: Step, layer: Step, change: Callable
) -> Float[Array, "B H Dv"]:
  """One softmax over all parts, float32; `change` is `_change` for (part, products, row)."""
  q = _of_heads(q, parts[0].heads).astype(jnp.float32) * q.shape[-1] ** -0.5
  share = _shared_keys(parts[0])

  def read(part, room):
    shape = (1, *room.shape[1:3], part.rows.size, room.shape[4])
    piece = jax.lax.dynamic_slice(room, (layer, 0, 0, part.rows.first(step), 0), shape)
    piece = piece[0].astype(jnp.float32)
    return piece if share is not None else piece[:, _key_of_each(part)]

  def score(n, part):
    products = _by_key_head("BHD,BHKD->BHK", "BHCD,BHKD->BHCK", q, read(part, part.key), share)
    slots = part.rows.first(step) + jnp.arange(part.rows.size)
    products = change(part, products, lambda: part.rows.row(slots, step))
    return jnp.where(seen(parts, n, slots, step), products, -jnp.inf)

  # The finite floor and the guarded division keep a row without keys at zeros, not NaN.
  scores = [score(n, part) for n, part in enumerate(parts)]
  top = functools.reduce(jnp.maximum, (x.max(axis=-1, keepdims=True) for x in scores))
  weights = [jnp.exp(x - jnp.maximum(top, -1e30)) for x in scores]
  total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
  out = sum(
    _by_key_head("BHK,BHKD->BHD", "BHCK,BHKD->BHCD", x, read(part, part.value), share)
    for x, part in zip(weights, parts, strict=True)
  )
  return out / jnp.where(total == 0, 1.0, total)


def _change(
  scores, held: tuple, masks: cache_masks.Masks, step: Step, part: Part, products, row_of: Callable
):
  """Products as `score_fn` and the masks make them; `row_of()` are the rows of the slots."""
  if scores.score_fn is not None:
    heads = np.asarray(part.heads, np.int32)[:, None]
    pair = jnp.asarray(step, jnp.int32), row_of().astype(jnp.int32)
    products = scores(products, *pair, heads, held=held)
  if masks.segment_ids is not None or masks.block_mask is not None:
    shown = masks.allowed(part.heads, step, row_of())
    products = jnp.where(shown, products, -jnp.inf)
  return products


def _key_of_each(part: Part) -> np.ndarray:
  """For each of the heads, which of the part's key heads it reads."""
  return np.searchsorted(part.key_heads, np.asarray(part.heads) // part.queries_per_key)


def _shared_keys(part: Part) -> int | None:
  """How many neighbouring heads read each key head; None where that differs between them."""
  share, left = divmod(len(part.heads), len(part.key_heads))
  even = not left and (_key_of_each(part) == np.repeat(np.arange(len(part.key_heads)), share)).all()
  return share if even else None


def _by_key_head(single: str, grouped: str, x, y, share: int | None):
  """The product of x [B, H, _] and y [B, Hkv, K, D], without a copy of y for every head."""
  if share is None or share == 1:
    return jnp.einsum(single, x, y, precision="highest")
  B, H, _ = x.shape
  out = jnp.einsum(grouped, x.reshape(B, H // share, share, -1), y, precision="highest")
  return out.reshape(B, H, -1)


def seen(parts: list[Part], n: int, slots: Any, step: Step) -> Any:
  """Whether part n shows the row of each slot; a key of several parts is the first one's."""
  row = parts[n].rows.row(slots, step)
  shown = (row >= 0) & parts[n].pattern.allowed(step, row)
  for earlier in parts[:n]:
    shown &= ~earlier.pattern.allowed(step, row)
  return shown
