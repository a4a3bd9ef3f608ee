"""A block's decoding step in five kernels, for NVIDIA GPUs. `Block.decode_step` says what it is."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import decoding
from sparse_flax import decode
from sparse_flax.block import Block


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["attention_norm", "qkv", "out", "feed_forward_norm", "up", "down"],
  meta_fields=["num_heads"],
)
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of some layers like each other, stacked: (kernel, bias) and (scale, bias) of each part.

  Matrices are in the dtype of their products; those of queries, keys and values are one.
  """

  attention_norm: Any
  qkv: Any
  out: Any
  feed_forward_norm: Any
  up: Any
  down: Any
  num_heads: int


def weights_of(block: Block) -> Weights:
  """The weights of the layers that are stacked in a block."""
  attention, feed = block.attention, block.feed_forward
  qkv = attention.query, attention.key, attention.value
  narrow = lambda x: x.astype(feed.up.dtype)
  joined = lambda name: jnp.concatenate([getattr(x, name)[...] for x in qkv], axis=-1)
  pair = lambda layer: (narrow(layer.kernel[...]), narrow(layer.bias[...]))
  norm = lambda layer: (layer.scale[...], layer.bias[...])
  return Weights(
    attention_norm=norm(block.attention_norm),
    qkv=(narrow(joined("kernel")), narrow(joined("bias"))),
    out=pair(attention.out),
    feed_forward_norm=norm(block.feed_forward_norm),
    up=pair(feed.up),
    down=pair(feed.down),
    num_heads=attention.num_heads,
  )


def decode_step(
  x: Float[Array, "B E"],
  weights: Weights,
  step: Integer[Array, ""],
  cache: decode.Cache,
  *,
  layer: Integer[Array, ""],
) -> tuple[Float[Array, "B E"], decode.Cache]:
  """`Block.decode_step` of one of the layers."""
  linear = functools.partial(decoding.linear, layer=layer)
  qkv = linear(x, *weights.qkv, norm=weights.attention_norm)
  a, cache = attend(qkv, cache, step=step, layer=layer, num_heads=weights.num_heads)
  x = linear(a.reshape(len(a), -1), *weights.out, residual=x)
  up = linear(x, *weights.up, norm=weights.feed_forward_norm, activation=_activation)
  return linear(up, *weights.down, residual=x), cache


def _activation(u):
  return u / (1.0 + jnp.exp(-1.702 * u))


def attend(
  qkv: Float[Array, "B F"],
  cache: decode.Cache,
  *,
  step: Integer[Array, ""],
  layer: Integer[Array, ""],
  num_heads: int,
) -> tuple[Float[Array, "B H Dv"], decode.Cache]:
  """`decode.attend`, a kernel for each group of heads that have the same pattern.

  qkv has the queries of all heads, then their keys, then their values.
  """
  outs, heads, after = [], [], []
  for some, parts in itertools.groupby(cache, lambda part: part.heads):
    parts = list(parts)
    kept, places = [], []
    for n, part in enumerate(parts):
      seen = functools.partial(decode.seen, parts, n)
      kept.append(decoding.Kept(part.key, part.value, part.rows.size, seen))
      slot = jnp.minimum(part.rows.slot(step), part.rows.length - 1)
      places.append((slot, part.rows.first(step)))
    out, rooms = decoding.attend(qkv, kept, layer, step, places, heads=some, num_heads=num_heads)
    outs.append(out)
    heads += some
    after += [
      dataclasses.replace(part, key=key, value=value)
      for part, (key, value) in zip(parts, rooms, strict=True)
    ]
  if len(outs) == 1:
    return outs[0], tuple(after)
  return jnp.concatenate(outs, axis=1)[:, np.argsort(heads)], tuple(after)
