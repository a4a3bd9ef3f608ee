"""The residual block: attention, then feed-forward, each after its own norm."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Key

from pallas_kernels import patterns
from sparse_flax.model import attention
from sparse_flax.model import cache as cache_lib

# Kernels that compute a block themselves are handed these.
NORM_EPSILON = 1e-5
GELU_SLOPE = 1.702  # with which u sigmoid(slope u) is close to the GELU


def activation(u: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
  """f(u) = u sigmoid(1.702 u)."""
  return u * jax.nn.sigmoid(GELU_SLOPE * u)


class FeedForward(nnx.Module):
  """W_2 f(W_1 x + b_1) + b_2 with f(u) = u sigmoid(1.702 u) (arXiv:1904.10509, Eq. 13)."""

  def __init__(
    self,
    *,
    width: int,
    hidden: int,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: nnx.Initializer,
    out_init: nnx.Initializer,
    rngs: nnx.Rngs,
  ):
    linear = lambda inputs, outputs, init: nnx.Linear(
      inputs, outputs, dtype=dtype, param_dtype=param_dtype, kernel_init=init, rngs=rngs
    )
    self.up = linear(width, hidden, kernel_init)
    self.down = linear(hidden, width, out_init)

  def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.down(activation(self.up(x)))


class Block(nnx.Module):
  """h + a + m, where a = attention(norm(h)) and m = feed_forward(norm(h + a)).

  Dropout falls on the ends of the two branches and nowhere else. Norms are in float32, the
  residual stream has `dtype`. (arXiv:1904.10509, Eq. 9-14.)
  """

  def __init__(
    self,
    *,
    width: int,
    num_heads: int,
    pattern: patterns.Pattern,
    qk_ratio: int | float,
    ff_mult: int | float,
    dropout: int | float,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    implementation: str | None,
    kernel_init: nnx.Initializer,
    out_init: nnx.Initializer,
    rngs: nnx.Rngs,
  ):
    linear = dict(
      dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, out_init=out_init, rngs=rngs
    )
    norm = lambda: nnx.LayerNorm(width, epsilon=NORM_EPSILON, dtype=jnp.float32, rngs=rngs)
    self.dropout = dropout
    self.attention_norm = norm()
    self.attention = attention.SparseSelfAttention(
      width=width,
      num_heads=num_heads,
      pattern=pattern,
      qk_ratio=qk_ratio,
      implementation=implementation,
      **linear,
    )
    self.feed_forward_norm = norm()
    self.feed_forward = FeedForward(width=width, hidden=round(ff_mult * width), **linear)

  def __call__(
    self, x: Float[Array, "B T E"], *, dropout_key: Key[Array, ""] | None = None
  ) -> Float[Array, "B T E"]:
    keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x = x + drop(self.attention(self._normed(x)), self.dropout, key=keys[0])
    return x + drop(self._feed(x), self.dropout, key=keys[1])

  def with_weights(
    self, x: Float[Array, "B T E"], rows: Integer[np.ndarray, "Q"]
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B H Q T"]]:
    """The block's output, and the attention probabilities of the query rows `rows`."""
    return self(x), self.attention.weights(self._normed(x), rows)

  def prefill(
    self, x: Float[Array, "B P E"], length: int, *, sparse: bool = True
  ) -> tuple[Float[Array, "B P E"], cache_lib.Cache]:
    """`__call__`, and the block's cache, for `length` steps, as P of them leave it."""
    a, cache = self.attention.prefill(self._normed(x), length, sparse=sparse)
    x = x + a
    return x + self._feed(x), cache

  def decode_step(
    self,
    x: Float[Array, "B E"],
    step: Integer[Array, ""],
    cache: cache_lib.Cache,
    *,
    layer: Integer[Array, ""],
  ) -> tuple[Float[Array, "B E"], cache_lib.Cache]:
    """Row `step` of `__call__`, given the keys and values of the rows before it."""
    a, cache = self.attention.decode_step(self._normed(x), step, cache, layer=layer)
    x = x + a
    return x + self._feed(x), cache

  def _normed(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.attention_norm(x).astype(x.dtype)

  def _feed(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.feed_forward(self.feed_forward_norm(x).astype(x.dtype))


def drop(
  x: Float[Array, "*B"], rate: int | float, *, key: Key[Array, ""] | None
) -> Float[Array, "*B"]:
  """Zeros a share `rate` of x and scales up the rest; no key means no dropout."""
  if key is None or rate == 0.0:
    return x
  alive = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(alive, x / (1.0 - rate), 0.0).astype(x.dtype)
