"""A block's decoding step in five kernels, for NVIDIA GPUs; elsewhere they are simulated.

`Block.decode_step` says what it is.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import api
from pallas_kernels.decode import triton as kernels
from sparse_flax import model as model_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["attention_norm", "qkv", "out", "feed_forward_norm", "up", "down"],
  meta_fields=["num_heads", "epsilon"],
)
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of some layers like each other, stacked: (kernel, bias) and (scale, bias) of each part.

  Matrices are in the dtype of their products; those of queries, keys and values are one. Both norms
  have the same epsilon.
  """

  attention_norm: Any
  qkv: Any
  out: Any
  feed_forward_norm: Any
  up: Any
  down: Any
  num_heads: int
  epsilon: float


def supported(
  groups: Sequence[model_lib.Block], caches: Sequence[model_lib.cache.Cache], batch_size: int
) -> str | None:
  """Why the kernels cannot compute the steps of a model; None where they can.

  Args:
    groups: the model's; their weights may be shapes only.
    caches: of each entry of the groups: any.
    batch_size: any.
  """
  del caches, batch_size
  return kernels.unsupported_norm(groups[0].feed_forward.up.kernel.shape[1])


def weights_of(layers: model_lib.Block) -> Weights:
  """The weights of the layers that are stacked in a block."""
  attention, feed = layers.attention, layers.feed_forward
  qkv = attention.query, attention.key, attention.value
  narrow = lambda x: x.astype(feed.up.dtype)
  joined = lambda name: jnp.concatenate([getattr(x, name)[...] for x in qkv], axis=-1)
  pair = lambda layer: (narrow(layer.kernel[...]), narrow(layer.bias[...]))
  norm = lambda layer: (layer.scale[...], layer.bias[...])
  return Weights(
    attention_norm=norm(layers.attention_norm),
    qkv=(narrow(joined("kernel")), narrow(joined("bias"))),
    out=pair(attention.out),
    feed_forward_norm=norm(layers.feed_forward_norm),
    up=pair(feed.up),
    down=pair(feed.down),
    num_heads=attention.num_heads,
    epsilon=layers.attention_norm.epsilon,
  )


def run_blocks_of(groups: Sequence[model_lib.Block], batch_size: int) -> Callable:
  """`run_blocks` of `SparseTransformer.decode_step`; weights are made ready here, once.

  Args:
    groups: the model's.
    batch_size: any.
  """
  del batch_size
  weights = [weights_of(layers) for layers in groups]
  num_groups = len(weights[0].qkv[0])

  def run_blocks(x, step, caches):
    def run_group(n, carry):
      x, after = carry[0], []
      for layer, cache in zip(weights, carry[1], strict=True):
        x, cache = decode_step(x, layer, step, cache, layer=n)
        after.append(cache)
      return x, tuple(after)

    # Kernels read the weights of all layers in place; a scan would slice, and so copy, them.
    with api.computed_by("triton"):
      return jax.lax.fori_loop(0, num_groups, run_group, (x, caches))

  return run_blocks


def decode_step(
  x: Float[Array, "B E"],
  weights: Weights,
  step: Integer[Array, ""],
  cache: model_lib.cache.Cache,
  *,
  layer: Integer[Array, ""],
) -> tuple[Float[Array, "B E"], model_lib.cache.Cache]:
  """`Block.decode_step` of one of the layers."""
  linear = functools.partial(kernels.linear, layer=layer)
  norm = functools.partial(kernels.Norm, epsilon=weights.epsilon)
  qkv = linear(x, *weights.qkv, norm=norm(*weights.attention_norm))
  a, cache = attend(qkv, cache, step=step, layer=layer, num_heads=weights.num_heads)
  x = linear(a.reshape(len(a), -1), *weights.out, residual=x)
  up = linear(
    x, *weights.up, norm=norm(*weights.feed_forward_norm), activation=model_lib.activation
  )
  return linear(up, *weights.down, residual=x), cache


def attend(
  qkv: Float[Array, "B F"],
  cache: model_lib.cache.Cache,
  *,
  step: Integer[Array, ""],
  layer: Integer[Array, ""],
  num_heads: int,
) -> tuple[Float[Array, "B H Dv"], model_lib.cache.Cache]:
  """`cache.attend`, a kernel for each group of heads that have the same pattern.

  qkv has the queries of all heads, then their keys, then their values.
  """
  outs, after = [], []
  for parts in model_lib.cache.by_heads(cache):
    caches, places = [], []
    for n, part in enumerate(parts):
      seen = functools.partial(model_lib.cache.seen, parts, n)
      caches.append(kernels.Cached(part.key, part.value, part.rows.size, seen))
      slot = jnp.minimum(part.rows.slot(step), part.rows.length - 1)
      places.append((slot, part.rows.first(step)))
    heads = dict(heads=parts[0].heads, num_heads=num_heads)
    out, tables = kernels.attend(qkv, caches, layer, step, places, **heads)
    outs.append(out)
    after += [
      dataclasses.replace(part, key=key, value=value)
      for part, (key, value) in zip(parts, tables, strict=True)
    ]
  return model_lib.cache.in_order(outs, cache), tuple(after)
