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
Softmax = tuple[Any, Any, Any]  # its maximum, its total, and the weighted sum of values
WIDEST = 1_024  # features of a norm, which a program has at once
_ROWS = 16  # of a tile: the least that tensor cores take
# Features of a product that are read at once; of more than twice as many, several programs take a
# share each: one would need too long.
_MOST = 512
# Columns of a program: more programs where a product has few of them.
_WIDE, _NARROW = 32, 16
_MANY_COLUMNS = 512  # from which on the wide ones are enough programs
_CHUNK = 128  # slots of a cache that are read at once: their keys and values stay in registers
_LOWEST = -1e30  # below all scores, and finite: exp(-inf - lowest) is 0, not NaN


class Norm(NamedTuple):
  """The layer norms of all layers.

  Attributes:
    gain: [L, E], float32.
    shift: [L, E], float32.
    epsilon: that is added to the variance.
  """

  gain: Array
  shift: Array
  epsilon: float


def unsupported_norm(E: int) -> str | None:
  """Why a product cannot have a norm over so many features; None where it can."""
  return None if E <= WIDEST else f"norm over {E=} features: the kernel takes {WIDEST} at most"


def linear(
  x: Float[Array, "B E"],
  weight: Float[Array, "L E F"],
  bias: Float[Array, "L F"],
  layer: Int[Array, ""],
  *,
  norm: Norm | None = None,
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
    norm: of x; None: x is taken as it is.
    activation: elementwise; None is none.
    residual: what is added at last.

  Raises:
    NotImplementedError: a norm over more than WIDEST features.
  """
  (B, E), F = x.shape, weight.shape[2]
  if norm is not None and (reason := unsupported_norm(E)):
    raise NotImplementedError(reason)
  columns = _WIDE if F >= _MANY_COLUMNS else _NARROW
  # A norm needs all features of a row, so that its program cannot have a share of them only.
  splits = 1 if norm is not None or E <= 2 * _MOST else pl.cdiv(E, _MOST)
  share = pl.cdiv(E, splits)  # of the features, for each program along the grid's last axis
  at_once = _up(E) if norm is not None else min(_up(share), _MOST)

  def kernel(layer_ref: Any, x_ref: Any, weight_ref: Any, bias_ref: Any, *refs: Any) -> None:
    # gain and shift with a norm; the residual, if there is one; the output.
    refs, out_ref = list(refs[:-1]), refs[-1]
    n = layer_ref[0]
    row, column = _within(0, _ROWS, B), _within(1, columns, F)
    here = row.there[:, None] & column.there[None]
    total = jnp.zeros((_ROWS, columns), jnp.float32)
    # Unrolled: there are one or two pieces.
    for start in range(0, share, at_once):
      first = pl.program_id(2) * share
      feature = _from(first + start, at_once, jnp.minimum(first + share, E))
      piece = _load(x_ref.at[row.at, feature.at], row.there[:, None] & feature.there[None])
      # The norm is computed again by the program of every tile of columns: a kernel of its own
      # would take longer than that.
      if norm is not None:
        gain, shift = (
          _load(ref.at[n, feature.at], feature.there) for ref in (refs.pop(0), refs.pop(0))
        )
        piece = _normed(piece.astype(jnp.float32), feature.there, E, norm.epsilon)
        piece = piece * gain[None] + shift[None]
      there = feature.there[:, None] & column.there[None]
      matrix = _load(weight_ref.at[n, feature.at, column.at], there)
      precise = dict(precision=_precision(x.dtype), preferred_element_type=jnp.float32)
      total += jnp.dot(piece.astype(x.dtype), matrix, **precise)
    # Shares are summed outside, and only then finished.
    if splits == 1:
      bias = _load(bias_ref.at[n, column.at], column.there)
      before = None if residual is None else _load(refs.pop(0).at[row.at, column.at], here)
      total = finish(total, bias[None], before)
    triton.store(
      out_ref.at[pl.program_id(2), row.at, column.at], total.astype(out_ref.dtype), mask=here
    )

  def finish(total: Any, bias: Any, before: Any) -> Any:
    total += bias.astype(jnp.float32)
    total = total if activation is None else activation(total)
    return total if before is None else total + before.astype(jnp.float32)

  # Only what is there: a kernel has no optional arguments.
  extra = [] if norm is None else [norm.gain, norm.shift]
  extra += [] if residual is None else [residual]
  out = pl.pallas_call(
    kernel,
    # Shares in float32: rounding each would add up.
    out_shape=jax.ShapeDtypeStruct((splits, B, F), x.dtype if splits == 1 else jnp.float32),
    grid=(pl.cdiv(B, _ROWS), pl.cdiv(F, columns), splits),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=hardware.simulated("gpu"),
    name="decode_linear",
  )(layer.reshape(1), x, weight, bias, *extra)
  if splits == 1:
    return out[0]
  return finish(out.sum(axis=0), bias[layer][None], residual).astype(x.dtype)


class Cached(NamedTuple):
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
  caches: Sequence[Cached],
  layer: Int[Array, ""],
  step: Int[Array, ""],
  places: Sequence[tuple[Place, Place]],
  *,
  heads: tuple[int, ...],
  num_heads: int,
) -> tuple[Float[Array, "B H Dv"], list[tuple[Array, Array]]]:
  """Writes the step's keys and values, and attends to what is seen of `caches` in one softmax.

  Args:
    qkv: queries of all heads, then keys, then values.
    caches: they are updated in place.
    layer: which of their layers.
    step: t.
    places: of each cache, the slot that is written and the first that is read.
    heads: which heads these are.
    num_heads: of the layer.

  Returns:
    The heads' outputs in qkv's dtype, and keys and values of each cache.
  """
  B, (Dk, Dv) = qkv.shape[0], (x.shape[-1] for x in caches[0][:2])
  scale = Dk**-0.5
  # The same for all layers, so that it is made once per step.
  where = [step, *(x for place in places for x in place), *heads]
  where = jnp.stack([jnp.asarray(x, jnp.int32) for x in where])

  def kernel(layer_ref: Any, where_ref: Any, qkv_ref: Any, *refs: Any) -> None:
    table_refs, (out_ref, *written) = refs[: 2 * len(caches)], refs[2 * len(caches) :]
    b, h = pl.program_id(0), pl.program_id(1)
    n, t = layer_ref[0], where_ref[0]
    head, narrow, wide = where_ref[1 + 2 * len(caches) + h], _all(Dk), _all(Dv)
    # qkv has all heads' queries, then all keys, then all values.
    part = lambda start, tile: _load(qkv_ref.at[b, pl.ds(start, tile.size)], tile.there)
    q = part(head * Dk, narrow).astype(jnp.float32) * scale
    new_key = part((num_heads + head) * Dk, narrow)
    new_value = part(2 * num_heads * Dk + head * Dv, wide)
    # One online softmax over all caches.
    carry = jnp.float32(_LOWEST), jnp.float32(0.0), jnp.zeros((wide.size,), jnp.float32)
    for m, cache in enumerate(caches):
      slot, first = where_ref[1 + 2 * m], where_ref[2 + 2 * m]
      rows = [
        _Rows(table_refs[2 * m], (n, b, h), new_key, narrow),
        _Rows(table_refs[2 * m + 1], (n, b, h), new_value, wide),
      ]
      for x, out_rows in zip(rows, written[2 * m : 2 * m + 2], strict=True):
        to = out_rows.at[n, b, h, slot, x.tile.at]
        triton.store(to, x.new.astype(x.ref.dtype), mask=x.tile.there)
      carry = _softmax(carry, q, rows, cache, t, slot, first)
    # A row without keys gives zeros.
    _, total, out = carry
    out = out / jnp.where(total == 0.0, 1.0, total)
    triton.store(out_ref.at[b, h, wide.at], out.astype(qkv.dtype), mask=wide.there)

  tables = [x for cache in caches for x in cache[:2]]
  out, *tables = pl.pallas_call(
    kernel,
    out_shape=[
      jax.ShapeDtypeStruct((B, len(heads), Dv), qkv.dtype),
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tables),
    ],
    # After layer, where and qkv: the caches are updated in place.
    input_output_aliases={3 + n: 1 + n for n in range(len(tables))},
    # One program for a head of a sequence: nobody has to be joined with anybody.
    grid=(B, len(heads)),
    compiler_params=triton.CompilerParams(num_warps=8),
    interpret=hardware.simulated("gpu"),
    name="decode_attend",
  )(layer.reshape(1), where, qkv, *tables)
  return out, list(zip(tables[::2], tables[1::2], strict=True))


class _Rows(NamedTuple):
  """Keys or values of a head in a cache, and those of the step."""

  ref: Any
  head: tuple[Any, Any, Any]  # layer, sequence, head
  new: Any
  tile: "_Tile"  # of a row

  def read(self, first: Any, i: Any, there: Array, fresh: Array) -> Array:
    """Chunk i of the rows from `first` on, float32; `fresh` are the step's own."""
    mask = there[:, None] & self.tile.there[None]
    chunk = there.shape[0]
    at = pl.ds(first + i * chunk, chunk)
    piece = _load(self.ref.at[*self.head, at, self.tile.at], mask)
    return jnp.where(fresh, self.new[None], piece).astype(jnp.float32)


def _softmax(
  carry: Softmax, q: Array, rows: list[_Rows], cache: Cached, t: Any, slot: Any, first: Any
) -> Softmax:
  """The softmax after the rows of one more cache."""
  chunk = min(_CHUNK, _up(cache.size))

  def read(i: Any, carry: Any) -> tuple:
    top, total, out = carry
    index = i * chunk + jnp.arange(chunk)
    slots, there = first + index, index < cache.size
    fresh = (slots == slot)[:, None]  # not yet in memory, or not for this thread
    keys, values = (x.read(first, i, there, fresh) for x in rows)
    scores = jnp.sum(keys * q[None], axis=1)
    scores = jnp.where(there & cache.seen(slots, t), scores, -jnp.inf)
    higher = jnp.maximum(top, jnp.max(scores))
    weights, before = jnp.exp(scores - higher), jnp.exp(top - higher)
    total = total * before + jnp.sum(weights)
    return higher, total, out * before + jnp.sum(weights[:, None] * values, axis=0)

  chunks = pl.cdiv(cache.size, chunk)
  return read(0, carry) if chunks == 1 else jax.lax.fori_loop(0, chunks, read, carry)


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


def _load(ref: Any, mask: Array) -> Array:
  # Zeros, where there is nothing: they add nothing to a product.
  return triton.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _normed(x: Array, there: Array, count: int, epsilon: float) -> Array:
  # In two passes, since the row is in registers: no cancellation as with sums of squares.
  mean = jnp.sum(x, axis=1, keepdims=True) / count
  apart = jnp.where(there[None], x - mean, 0.0)
  variance = jnp.sum(apart * apart, axis=1, keepdims=True) / count
  return apart * jax.lax.rsqrt(variance + epsilon)


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
  # Else Triton would multiply float32 as TF32.
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
