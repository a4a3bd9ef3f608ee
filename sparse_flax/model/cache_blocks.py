"""What a layer that chooses blocks keeps to decode: all keys and values in blocks, what it scores,
and the current list."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int

from sparse_flax.model.cache import Cache
from sparse_flax.model.cache_rows import Step

_ARRAYS = ("key", "value", "pooled", "pooled_value", "current", "tail", "lists")


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=list(_ARRAYS), meta_fields=["length"]
)
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Of one layer or of several like it: nk blocks of b tokens.

  A step reads the blocks of a list, as whole pieces, and what is pooled.

  Attributes:
    key: [*L, B, Hkv, nk, b, Dk].
    value: [*L, B, Hkv, nk, b, Dv].
    pooled: [*L, B, Hp, nk, D], what is scored of each block; of blocks that are not complete yet it
      says nothing.
    pooled_value: [*L, B, Hkv, nk, Dv], of recipes that attend to it; else None.
    current: [*L, B, b, 1, DI], what will be pooled of the current block; None where these are keys.
    tail: [*L, B, n, Hkv, Dk], the last keys before their convolution, newest last; or None.
    lists: int32 [*L, B, Hl, top], the blocks that steps read until the next anchor.
    length: steps of the whole sequence.
  """

  key: Any  # an array, or what JAX's transformations put in its place
  value: Any
  pooled: Any
  pooled_value: Any
  current: Any
  tail: Any
  lists: Any
  length: int

  @property
  def block_size(self) -> int:
    return self.key.shape[-2]

  def stored(self, k, v, of_index, step: Step, layer: Step) -> "Blocks":
    """With the keys and values [B, Hkv, D] of a step, and with its key [B, 1, DI] of an index."""
    block, place = step // self.block_size, step % self.block_size
    row = lambda room, x: _put(room, x[:, :, None, None], (layer, 0, 0, block, place, 0))
    current = self.current
    if of_index is not None:
      current = _put(current, of_index[:, None], (layer, 0, place, 0, 0))
    key, value = row(self.key, k), row(self.value, v)
    return dataclasses.replace(self, key=key, value=value, current=current)

  def with_tail(
    self, k: Float[Array, "B Hkv D"], layer: Step
  ) -> tuple[Float[Array, "B n Hkv D"], "Blocks"]:
    """The last keys before k, and the cache with k as the last one."""
    tail = _of_layer(self.tail, layer)
    after = jnp.concatenate([tail[:, 1:], k[:, None].astype(tail.dtype)], axis=1)
    return tail, dataclasses.replace(self, tail=_put(self.tail, after, (layer, 0, 0, 0, 0)))

  def with_pooled(self, pool: Callable, places: tuple, step: Step, layer: Step) -> "Blocks":
    """With the current block pooled as far as it goes, by pool([B, b, Hp, D], places)."""
    block = step // self.block_size

    def rows(room):
      shape = (1, *room.shape[1:3], 1, *room.shape[4:])
      piece = jax.lax.dynamic_slice(room, (layer, 0, 0, block, 0, 0), shape)
      return piece[0, :, :, 0].swapaxes(1, 2)  # [B, b, Hkv, D]

    def put(room, x):
      return _put(room, x.swapaxes(1, 2), (layer, 0, 0, block, 0))

    scored = rows(self.key) if self.current is None else _of_layer(self.current, layer)
    pooled, pooled_value = put(self.pooled, pool(scored, places[0])), self.pooled_value
    if pooled_value is not None:
      pooled_value = put(pooled_value, pool(rows(self.value), places[1]))
    return dataclasses.replace(self, pooled=pooled, pooled_value=pooled_value)

  def pooled_of(self, layer: Step) -> tuple[Float[Array, "B Hp nk D"], Any]:
    """Keys, and values or None."""
    values = None if self.pooled_value is None else _of_layer(self.pooled_value, layer)
    return _of_layer(self.pooled, layer), values

  def lists_of(self, layer: Step) -> Int[Array, "B Hl top"]:
    return _of_layer(self.lists, layer)

  def with_lists(self, lists: Int[Array, "B Hl top"], layer: Step) -> "Blocks":
    return dataclasses.replace(self, lists=_put(self.lists, lists, (layer, 0, 0, 0)))

  def attend_listed(
    self, q: Float[Array, "B H Dk"], lists: Int[Array, "B Hl top"], step: Step, layer: Step
  ) -> Float32[Array, "B H Dv"]:
    """Attention to the tokens of the listed blocks up to `step`."""
    B, Hkv, b = *self.key.shape[1:3], self.block_size
    per_list = max(lists.shape[1], Hkv)  # a list for all heads is that of each key head
    lists = jnp.repeat(lists, per_list // lists.shape[1], axis=1)
    head = jnp.arange(per_list) // (per_list // Hkv)
    row = jnp.arange(B)

    def read(room):
      # One gather of whole blocks, which also picks the layer: nothing else is read.
      blocks = room[layer, row[:, None, None], head[None, :, None], jnp.maximum(lists, 0)]
      return blocks.reshape(B, per_list, -1, blocks.shape[-1])

    tokens = lists[..., None] * b + jnp.arange(b, dtype=jnp.int32)[None, None, None]
    shown = (lists >= 0)[..., None] & (tokens <= step)
    return attend(q, read(self.key), read(self.value), shown.reshape(B, per_list, -1))[0]

  def attend_window(
    self, q: Float[Array, "B H Dk"], window: int, step: Step, layer: Step
  ) -> Float32[Array, "B H Dv"]:
    """Attention to the last `window` tokens, that of `step` included."""
    rows = self.key.shape[-3] * self.block_size
    size = min(window, rows)
    start = jnp.clip(step - size + 1, 0, rows - size)
    tokens = start + jnp.arange(size, dtype=jnp.int32)
    shown = (tokens <= step) & (tokens > step - window)
    return attend(q, *self._rows(start, size, layer), shown[None, None])[0]

  def attend_all(
    self, q: Float[Array, "B H Dk"], step: Step, layer: Step
  ) -> Float32[Array, "B H Dv"]:
    """Attention to every token up to `step`."""
    rows = self.key.shape[-3] * self.block_size
    shown = (jnp.arange(rows, dtype=jnp.int32) <= step)[None, None]
    return attend(q, *self._rows(jnp.int32(0), rows, layer), shown)[0]

  def _rows(self, start: Step, size: int, layer: Step) -> tuple[Array, ...]:
    """Neighbouring keys and values of a layer, [B, Hkv, size, D]."""

    def read(room):
      flat = room.reshape(*room.shape[:3], -1, room.shape[-1])
      shape = (1, *flat.shape[1:3], size, flat.shape[-1])
      return jax.lax.dynamic_slice(flat, (layer, 0, 0, start, 0), shape)[0]

    return read(self.key), read(self.value)


AnyCache = Cache | Blocks  # of a layer with a pattern, of one that chooses


def empty(
  shape: tuple[int, int],
  *,
  num_heads: int,
  sizes: tuple[int, int],
  length: int,
  block_size: int,
  index_size: int | None,
  pools_values: bool,
  tail: int,
  lists: tuple[int, int],
  dtype: jax.typing.DTypeLike,
) -> Blocks:
  """Before the first step.

  Args:
    shape: layers and sequences.
    num_heads: Hkv.
    sizes: Dk and Dv.
    length: steps.
    block_size: b.
    index_size: DI of an index, which has one key for all heads; None: keys are what is scored.
    pools_values: whether there are pooled values.
    tail: keys that a convolution reads beside the newest.
    lists: Hl and top.
    dtype: of all but the lists.
  """
  nk, zeros = -(-length // block_size), lambda *more: jnp.zeros((*shape, *more), dtype)
  scored = (num_heads, nk, sizes[0]) if index_size is None else (1, nk, index_size)
  return Blocks(
    key=zeros(num_heads, nk, block_size, sizes[0]),
    value=zeros(num_heads, nk, block_size, sizes[1]),
    pooled=zeros(*scored),
    pooled_value=zeros(num_heads, nk, sizes[1]) if pools_values else None,
    current=None if index_size is None else zeros(block_size, 1, index_size),
    tail=zeros(tail, num_heads, sizes[0]) if tail else None,
    lists=jnp.full((*shape, *lists), -1, jnp.int32),
    length=length,
  )


def filled(
  k: Float[Array, "B P Hkv Dk"],
  v: Float[Array, "B P Hkv Dv"],
  pooled: Float[Array, "B nb Hp D"],
  pooled_value: Float[Array, "B nb Hkv Dv"] | None,
  of_index: Float[Array, "B P 1 DI"] | None,
  raw: Float[Array, "B P Hkv Dk"] | None,
  *,
  tail: int,
  length: int,
  block_size: int,
  lists: tuple[int, int],
) -> Blocks:
  """The cache of one layer, without an axis for layers, after P steps, but for its lists.

  `of_index` are the keys of an index, `raw` those of attention before their convolution.
  """
  (B, P), nk = k.shape[:2], -(-length // block_size)

  def in_blocks(x):
    x = jnp.pad(x, [(0, 0), (0, nk * block_size - P), (0, 0), (0, 0)])
    return jnp.moveaxis(x.reshape(B, nk, block_size, *x.shape[2:]), 3, 1)

  def to_nk(x):
    return jnp.pad(x, [(0, 0), (0, nk - x.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)

  current = None
  if of_index is not None:
    there = of_index[:, P // block_size * block_size :]
    current = jnp.pad(there, [(0, 0), (0, block_size - there.shape[1]), (0, 0), (0, 0)])
  if raw is not None:
    raw = jnp.pad(raw, [(0, 0), (tail, 0), (0, 0), (0, 0)])[:, -tail:]
  return Blocks(
    key=in_blocks(k),
    value=in_blocks(v),
    pooled=to_nk(pooled),
    pooled_value=None if pooled_value is None else to_nk(pooled_value),
    current=current,
    tail=raw,
    lists=jnp.full((B, *lists), -1, jnp.int32),
    length=length,
  )


def attend(
  q: Float[Array, "B H Dk"],
  key: Float[Array, "B R N Dk"],
  value: Float[Array, "B R N Dv"],
  shown: Bool[Array, "Bs Rs N"],
) -> tuple[Float32[Array, "B H Dv"], Float32[Array, "B H"]]:
  """One query per head over the N rows that are shown of its group of heads, R groups; and the lse.

  A query that is shown nothing gets zeros and -inf.
  """
  (B, H, D), R = q.shape, key.shape[1]
  q = q.reshape(B, R, H // R, D).astype(jnp.float32) * D**-0.5
  product = functools.partial(jnp.einsum, precision="highest")
  logits = product("brgd,brnd->brgn", q, key.astype(jnp.float32))
  logits = jnp.where(shown[:, :, None], logits, -jnp.inf)
  top = jnp.maximum(logits.max(axis=-1, keepdims=True, initial=-jnp.inf), -1e30)
  weights = jnp.exp(logits - top)
  total = weights.sum(axis=-1, keepdims=True)
  safe = jnp.where(total == 0, 1.0, total)
  out = product("brgn,brnd->brgd", weights / safe, value.astype(jnp.float32))
  lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))
  return out.reshape(B, H, -1), lse.reshape(B, H)


def _put(room: Array, x: Array, start: tuple) -> Array:
  """x, without its axis of layers, at `start`."""
  return jax.lax.dynamic_update_slice(room, x[None].astype(room.dtype), start)


def _of_layer(room: Array, layer: Step) -> Array:
  return jax.lax.dynamic_index_in_dim(room, layer, axis=0, keepdims=False)
