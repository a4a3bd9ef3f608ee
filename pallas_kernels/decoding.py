"""A decoding step on NVIDIA GPUs: the products and the attention of one token per sequence.

Such a step is a chain of small dependent pieces: what counts is how many kernels it has. Here a
layer has five. Weights and caches of all layers lie in one array each and are read in place, by the
number of the layer, since a slice would be a kernel more. In Pallas for Triton: rows are few, and
nothing has to overlap with anything. Without a GPU they run in Pallas's interpreter.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import hardware

Place = int | Int[Array, ""]  # a slot of a cache
WIDEST = 1_024  # features of a norm, which a program has at once
_ROWS = 16  # of a tile: the least that tensor cores take
_MOST = 512  # features of a product that are read at once; of more than twice as many, several
# programs take a share each: one would need too long
_CHUNK = 128  # slots of a cache that are read at once


def linear(
  x: Float[Array, "B E"],
  weight: Float[Array, "L E F"],
  bias: Float[Array, "L F"],
  layer: Int[Array, ""],
  *,
  norm: tuple[Float[Array, "L E"], Float[Array, "L E"]] | None = None,
  epsilon: float = 1e-5,
  activation: Callable[[Any], Any] | None = None,
  residual: Float[Array, "B F"] | None = None,
) -> Float[Array, "B F"]:
  """residual + activation(layer_norm(x) @ weight[layer] + bias[layer]), in x's dtype.

  Sums are in float32, as are the norm and the activation.

  Args:
    x: rows.
    weight: of all layers, in x's dtype.
    bias: of all layers.
    layer: whose.
    norm: gain and shift of all layers' norms, float32; None: x is taken as it is.
    epsilon: of the norm.
    activation: elementwise; None is none.
    residual: what is added at last.

  Raises:
    NotImplementedError: a norm over more than WIDEST features.
  """
  (B, E), F = x.shape, weight.shape[2]
  if norm is not None and E > WIDEST:
    raise NotImplementedError(f"norm over {E=} features: the kernel takes {WIDEST} at most")
  columns = 32 if F >= 512 else 16
  splits = 1 if norm is not None or E <= 2 * _MOST else pl.cdiv(E, _MOST)
  share = pl.cdiv(E, splits)  # of the features, for each program along the grid's last axis
  at_once = _up(E) if norm is not None else min(_up(share), _MOST)

  def kernel(layer_ref, x_ref, weight_ref, bias_ref, *refs):
    refs, out_ref = list(refs[:-1]), refs[-1]
    n = layer_ref[0]
    row, column = _within(0, _ROWS, B), _within(1, columns, F)
    here = row.there[:, None] & column.there[None]
    total = jnp.zeros((_ROWS, columns), jnp.float32)
    for start in range(0, share, at_once):
      first = pl.program_id(2) * share
      feature = _from(first + start, at_once, jnp.minimum(first + share, E))
      piece = _load(x_ref.at[row.at, feature.at], row.there[:, None] & feature.there[None])
      if norm is not None:
        gain, shift = (
          _load(ref.at[n, feature.at], feature.there) for ref in (refs.pop(0), refs.pop(0))
        )
        piece = _normed(piece.astype(jnp.float32), feature.there, E, epsilon)
        piece = piece * gain[None] + shift[None]
      there = feature.there[:, None] & column.there[None]
      matrix = _load(weight_ref.at[n, feature.at, column.at], there)
      how = dict(precision=_precision(x.dtype), preferred_element_type=jnp.float32)
      total += jnp.dot(piece.astype(x.dtype), matrix, **how)
    if splits == 1:
      bias = _load(bias_ref.at[n, column.at], column.there)
      before = None if residual is None else _load(refs.pop(0).at[row.at, column.at], here)
      total = finish(total, bias[None], before)
    triton.store(
      out_ref.at[pl.program_id(2), row.at, column.at], total.astype(out_ref.dtype), mask=here
    )

  def finish(total, bias, before):
    total += bias.astype(jnp.float32)
    total = total if activation is None else activation(total)
    return total if before is None else total + before.astype(jnp.float32)

  more = [*(norm or ()), *([] if residual is None else [residual])]
  out = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((splits, B, F), x.dtype if splits == 1 else jnp.float32),
    grid=(pl.cdiv(B, _ROWS), pl.cdiv(F, columns), splits),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=hardware.simulated("gpu"),
    name="decode_linear",
  )(layer.reshape(1), x, weight, bias, *more)
  if splits == 1:
    return out[0]
  return finish(out.sum(axis=0), bias[layer][None], residual).astype(x.dtype)


class Kept(NamedTuple):
  """Keys and values of some heads of all layers, of which a step reads a piece.

  Attributes:
    key: [L, B, H, slots, Dk].
    value: [L, B, H, slots, Dv].
    size: slots that a step reads.
    seen: (slots, step) -> whether the row in each is attended to.
  """

  key: Array
  value: Array
  size: int
  seen: Callable[[Any, Any], Any]


def attend(
  qkv: Float[Array, "B F"],
  kept: Sequence[Kept],
  layer: Int[Array, ""],
  step: Int[Array, ""],
  places: Sequence[tuple[Place, Place]],
  *,
  heads: tuple[int, ...],
  num_heads: int,
) -> tuple[Float[Array, "B H Dv"], list[tuple[Array, Array]]]:
  """Writes the step's keys and values, and attends to what is seen of `kept` in one softmax.

  Args:
    qkv: queries of all heads, then keys, then values.
    kept: caches; they are updated in place.
    layer: which of their layers.
    step: t.
    places: of each cache, the slot that is written and the first that is read.
    heads: which heads these are.
    num_heads: of the layer.

  Returns:
    The heads' outputs in qkv's dtype, and keys and values of each cache.
  """
  B, (Dk, Dv) = qkv.shape[0], (x.shape[-1] for x in kept[0][:2])
  scale = Dk**-0.5
  # The same for all layers, so that it is made once per step.
  where = [step, *(x for place in places for x in place), *heads]
  where = jnp.stack([jnp.asarray(x, jnp.int32) for x in where])

  def kernel(layer_ref, where_ref, qkv_ref, *refs):
    rooms, (out_ref, *written) = refs[: 2 * len(kept)], refs[2 * len(kept) :]
    b, h = pl.program_id(0), pl.program_id(1)
    n, t = layer_ref[0], where_ref[0]
    of, narrow, wide = where_ref[1 + 2 * len(kept) + h], _all(Dk), _all(Dv)
    part = lambda start, one: _load(qkv_ref.at[b, pl.ds(start, one.size)], one.there)
    q = part(of * Dk, narrow).astype(jnp.float32) * scale
    new_key = part((num_heads + of) * Dk, narrow)
    new_value = part(2 * num_heads * Dk + of * Dv, wide)
    top, total = jnp.float32(-1e30), jnp.float32(0.0)
    out = jnp.zeros((wide.size,), jnp.float32)
    for m, cache in enumerate(kept):
      slot, first = where_ref[1 + 2 * m], where_ref[2 + 2 * m]
      for room, new, one in ((0, new_key, narrow), (1, new_value, wide)):
        to = written[2 * m + room].at[n, b, h, slot, one.at]
        triton.store(to, new.astype(cache[room].dtype), mask=one.there)
      chunk = min(_CHUNK, _up(cache.size))

      def read(i, carry, m=m, cache=cache, slot=slot, first=first, chunk=chunk):
        top, total, out = carry
        index = i * chunk + jnp.arange(chunk)
        slots, there = first + index, index < cache.size
        fresh = (slots == slot)[:, None]  # not yet in memory, or not for this thread

        def rows(room, new, one):
          mask = there[:, None] & one.there[None]
          piece = _load(
            rooms[2 * m + room].at[n, b, h, pl.ds(first + i * chunk, chunk), one.at], mask
          )
          return jnp.where(fresh, new[None], piece).astype(jnp.float32)

        keys, values = rows(0, new_key, narrow), rows(1, new_value, wide)
        scores = jnp.sum(keys * q[None], axis=1)
        scores = jnp.where(there & cache.seen(slots, t), scores, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores))
        weights, before = jnp.exp(scores - higher), jnp.exp(top - higher)
        total = total * before + jnp.sum(weights)
        return higher, total, out * before + jnp.sum(weights[:, None] * values, axis=0)

      carry, chunks = (top, total, out), pl.cdiv(cache.size, chunk)
      once = chunks == 1
      top, total, out = read(0, carry) if once else jax.lax.fori_loop(0, chunks, read, carry)
    out = out / jnp.where(total == 0.0, 1.0, total)
    triton.store(out_ref.at[b, h, wide.at], out.astype(qkv.dtype), mask=wide.there)

  rooms = [x for cache in kept for x in cache[:2]]
  out, *rooms = pl.pallas_call(
    kernel,
    out_shape=[
      jax.ShapeDtypeStruct((B, len(heads), Dv), qkv.dtype),
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rooms),
    ],
    input_output_aliases={3 + n: 1 + n for n in range(len(rooms))},
    grid=(B, len(heads)),
    compiler_params=triton.CompilerParams(num_warps=8),
    interpret=hardware.simulated("gpu"),
    name="decode_attend",
  )(layer.reshape(1), where, qkv, *rooms)
  return out, list(zip(rooms[::2], rooms[1::2], strict=True))


class _Tile(NamedTuple):
  """Some places along an axis, and which of them are within an array."""

  at: Any
  there: Any
  size: int


def _within(axis: int, size: int, limit: int) -> _Tile:
  return _from(pl.program_id(axis) * size, size, limit)


def _from(start: Any, size: int, limit: Any) -> _Tile:
  return _Tile(pl.ds(start, size), start + jnp.arange(size) < limit, size)


def _all(count: int) -> _Tile:
  # A start that is not known while tracing: JAX refuses a slice that it knows to end beyond the
  # array, though nothing is read there.
  return _from(0 * pl.program_id(0), _up(count), count)


def _up(count: int) -> int:
  """The next power of two, as tiles need it; at least what tensor cores take."""
  return max(16, 1 << (count - 1).bit_length())


def _load(ref, mask):
  return triton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _normed(x, there, count: int, epsilon: float):
  mean = jnp.sum(x, axis=1, keepdims=True) / count
  apart = jnp.where(there[None], x - mean, 0.0)
  variance = jnp.sum(apart * apart, axis=1, keepdims=True) / count
  return apart * jax.lax.rsqrt(variance + epsilon)


def _precision(dtype) -> jax.lax.Precision | None:
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
