"""Multi-head self-attention over the pairs that a pattern allows: the layer to import."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import api
from pallas_kernels import patterns
from pallas_kernels import reference
from sparse_flax.model import cache as cache_lib
from sparse_flax.parallel import sharding


class SparseSelfAttention(nnx.Module):
  """out = concat_h(softmax(q_h k_h^T / sqrt(Dk), over the pattern's pairs) v_h) W_p + b_p.

  q, k, v and the projection back have biases. arXiv:1904.10509, Eq. 2-8: a union of patterns is
  its merged head (Eq. 7), `patterns.PerHead` its multi-head attention (Eq. 8).

    layer = SparseSelfAttention(
        width=512, num_heads=8, pattern=patterns.Strided(128), rngs=nnx.Rngs(0))
    y = layer(x)  # [B, T, 512] -> [B, T, 512], any T
  """

  def __init__(
    self,
    *,
    width: int,
    num_heads: int,
    pattern: patterns.Pattern,
    qk_ratio: int | float = 1.0,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    kernel_init: nnx.Initializer | None = None,
    out_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Args:
    width: E, the model width; a multiple of num_heads.
    num_heads: H. Values have E / H features per head.
    pattern: which pairs attend.
    qk_ratio: width of all queries (and keys) over E; 0.5 is the paper's half-size.
    dtype: of the computation; None takes it from x and the weights. Softmax is in float32.
    param_dtype: of the weights.
    implementation: of `sparse_attention`; None is the best one that works here.
    kernel_init: of query, key and value; default: normal, variance 0.125 / fan_in.
    out_init: of the projection back; default: `kernel_init`.
    rngs: source of the initial values.

    Raises:
      ValueError: num_heads does not divide width or qk_ratio * width.
    """
    qk_width = round(qk_ratio * width)
    if num_heads < 1 or width < 1 or width % num_heads:
      raise ValueError(f"{num_heads=} must divide {width=}")
    if qk_width < 1 or qk_width != qk_ratio * width or qk_width % num_heads:
      raise ValueError(f"{qk_ratio=}: qk_ratio * {width=} must be a multiple of {num_heads=}")
    api.load_backend(implementation)
    kernel_init = kernel_init or nnx.initializers.variance_scaling(0.125, "fan_in", "normal")
    linear = lambda features, init: nnx.Linear(
      width, features, dtype=dtype, param_dtype=param_dtype, kernel_init=init, rngs=rngs
    )
    self.num_heads = num_heads
    self.pattern = pattern
    self.implementation = implementation
    self.query = linear(qk_width, kernel_init)
    self.key = linear(qk_width, kernel_init)
    self.value = linear(width, kernel_init)
    self.out = linear(width, out_init or kernel_init)

  def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    return self._attend(*self._heads(x))

  def weights(
    self, x: Float[Array, "B T E"], rows: Integer[np.ndarray, "Q"] | None = None
  ) -> Float[Array, "B H Q T"]:
    """The float32 probabilities of the query rows `rows` (None: of all rows)."""
    q, k, _ = self._heads(x)
    return reference.attention_weights(q, k, pattern=self.pattern, rows=rows)

  def init_cache(
    self, batch_size: int, length: int, *, num_layers: int = 1, sparse: bool = True
  ) -> cache_lib.Cache:
    """Room for the keys and values of `length` steps, for `num_layers` layers like this one.

    Args:
      batch_size: B.
      length: steps.
      num_layers: L.
      sparse: keep what the pattern needs; False keeps, and reads, everything.

    Raises:
      ValueError: the pattern lets a query attend to later keys.
    """
    if not self.pattern.causal:
      raise ValueError(f"pattern={self.pattern}: decoding needs one with causal=True")
    return cache_lib.init_cache(
      self.pattern,
      num_layers=num_layers,
      length=length,
      num_heads=self.num_heads,
      batch_size=batch_size,
      k_size=self.key.out_features // self.num_heads,
      v_size=self.value.out_features // self.num_heads,
      dtype=self.key.dtype or self.key.param_dtype,
      sparse=sparse,
    )

  def prefill(
    self, x: Float[Array, "B P E"], length: int, *, sparse: bool = True
  ) -> tuple[Float[Array, "B P E"], cache_lib.Cache]:
    """`__call__`, and the cache, without an axis for layers, as P steps of `length` leave it."""
    q, k, v = self._heads(x)
    cache = cache_lib.fill(self.pattern, k, v, length=length, sparse=sparse)
    return self._attend(q, k, v), cache

  def decode_step(
    self,
    x: Float[Array, "B E"],
    step: Integer[Array, ""],
    cache: cache_lib.Cache,
    *,
    layer: int | Integer[Array, ""] = 0,
  ) -> tuple[Float[Array, "B E"], cache_lib.Cache]:
    """Row `step` of `__call__`, given the keys and values of the rows before it.

    Args:
      x: the layer's input of this step alone.
      step: 0, 1, 2, ...; each step once and in this order.
      cache: from `init_cache`, then from the step before.
      layer: which layer of the cache is this one's.

    Returns:
      The layer's output of this step, and the cache with this step's key and value.
    """
    out, cache = cache_lib.attend(*self._heads(x), cache, step=step, layer=layer)
    return _product(self.out, out.reshape(*x.shape[:-1], -1)), cache

  def _attend(self, q, k, v) -> Float[Array, "B T E"]:
    how = dict(pattern=self.pattern, implementation=self.implementation)
    out = sharding.over_devices(q, k, v, **how)
    return _product(self.out, out.reshape(*out.shape[:2], -1))

  def _heads(self, x: Float[Array, "*B E"]) -> tuple[Float[Array, "*B H D"], ...]:
    layers = self.query, self.key, self.value
    products = map(_product, layers, apart(x, 3))
    return tuple(y.reshape(*y.shape[:-1], self.num_heads, -1) for y in products)


def _product(layer: nnx.Linear, x: Float[Array, "*B E"]) -> Float[Array, "*B F"]:
  return layer(x, out_sharding=sharding.of_product(x, layer.kernel[...]))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def apart(x: Float[Array, "*B E"], n: int) -> tuple[Float[Array, "*B E"], ...]:
  """x, n times, as if these were different arrays.

  XLA joins small products of one array; q, k and v are then slices of the joint result, which no
  kernel can read before they are copied: 15 ms of 187 in a step of CIFAR-10's model on an H100.
  """
  return jax.lax.optimization_barrier((x,) * n)


@apart.defjvp
def _apart_jvp(n, primals, tangents):
  return apart(*primals, n), tangents * n
