"""The residual block: attention, then feed-forward, each after its own norm."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Key
from jaxtyping import UInt32

from pallas_kernels import patterns
from pallas_kernels import residual
from pallas_kernels.residual import activations
from pallas_kernels.residual import dropout
from sparse_flax.model import attention
from sparse_flax.model import cache_blocks
from sparse_flax.model import heads
from sparse_flax.model import learned
from sparse_flax.model import learned_attention
from sparse_flax.parallel import sharding

# Kernels that compute a block themselves are handed these.
NORM_EPSILON = 1e-5
GELU_SLOPE = activations.GELU_SLOPE

Bits = residual.Bits


def activation(u: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
  """f(u) = u sigmoid(1.702 u)."""
  return u * jax.nn.sigmoid(GELU_SLOPE * u)


# f of a feed-forward part, by its name.
ACTIVATIONS = {
  "quick_gelu": activation,
  "relu2": activations.ACTIVATIONS["relu2"].value,
}


class Weights(NamedTuple):
  """Of a block as `enter` and `leave` take them, or with an axis in front of many blocks.

  Attributes:
    enter: before attention.
    leave: behind it.
    gains: of the norms of queries and keys; None: there are no such norms.
  """

  enter: residual.EnterWeights
  leave: residual.LeaveWeights
  gains: tuple[Array, Array] | None


def seeds_of(key: Key[Array, "*B"]) -> UInt32[Array, "*B 2 2"]:
  """For the two branches of blocks with these keys."""
  return dropout.seed_of(jnp.vectorize(jax.random.split, signature="()->(n)")(key))


class FeedForward(nnx.Module):
  """W_2 f(W_1 x + b_1) + b_2 (arXiv:1904.10509, Eq. 13).

  f(u) = u sigmoid(1.702 u) is the paper's, "quick_gelu"; f(u) = max(u, 0)^2 is "relu2".
  """

  def __init__(
    self,
    *,
    width: int,
    hidden: int,
    dtype: jax.typing.DTypeLike,
    param_dtype: jax.typing.DTypeLike,
    kernel_init: nnx.Initializer,
    out_init: nnx.Initializer,
    activation: str = "quick_gelu",
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    linear = lambda inputs, outputs, init: nnx.Linear(
      inputs, outputs, dtype=dtype, param_dtype=param_dtype, kernel_init=init, rngs=rngs
    )
    self.up = linear(width, hidden, kernel_init)
    self.down = linear(hidden, width, out_init)

  def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.down(ACTIVATIONS[self.activation](checkpoint_name(self.up(x), "residual_u")))


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
    activation: str = "quick_gelu",
    qk_norm: bool = False,
    rope: heads.RotaryFn | None = None,
    recipe: learned.Recipe | None = None,
    stage: learned.Stage = None,
    rngs: nnx.Rngs,
  ):
    linear = dict(
      dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, out_init=out_init, rngs=rngs
    )
    norm = lambda: nnx.LayerNorm(width, epsilon=NORM_EPSILON, dtype=jnp.float32, rngs=rngs)
    self.dropout = dropout
    self.attention_norm = norm()
    layer: dict[str, Any] = dict(
      width=width,
      num_heads=num_heads,
      qk_ratio=qk_ratio,
      implementation=implementation,
      qk_norm=qk_norm,
      rope=rope,
      **linear,
    )
    if recipe is None:
      self.attention = attention.SparseSelfAttention(pattern=pattern, **layer)
    else:
      self.attention = learned_attention.LearnedSelfAttention(recipe=recipe, stage=stage, **layer)
    self.feed_forward_norm = norm()
    self.feed_forward = FeedForward(
      width=width, hidden=round(ff_mult * width), activation=activation, **linear
    )

  def __call__(
    self,
    x: Float[Array, "B T E"],
    *,
    dropout_key: Key[Array, ""] | None = None,
    bits: Bits | None = None,
  ) -> Float[Array, "B T E"]:
    """Args:
    x: the residual stream.
    dropout_key: None turns dropout off.
    bits: of `keep_bits`, read where there is no key: for who computes the block twice.
    """
    if dropout_key is not None:
      bits = self.keep_bits(x, seeds_of(dropout_key))
    weights = self.weights()
    if weights is not None and x.dtype == self.attention.key.dtype:
      stream = residual.start(x, self.options, drops=bits is not None)
      return residual.end(self.run(stream, weights, bits), self.options)
    return self._behind(x, self.attention(self._normed(x)), bits)

  def in_stage(
    self,
    x: Float[Array, "B T E"],
    bits: Bits | None = None,
    *,
    stage: learned.Stage = None,
    losses: bool = False,
  ) -> tuple[Float[Array, "B T E"], dict[str, Array]]:
    """`__call__` in a stage of learned attention, and the losses of that if they are asked for."""
    a = self.attention
    if not isinstance(a, learned_attention.LearnedSelfAttention):
      return self(x, bits=bits), {}
    found = a(self._normed(x), stage=stage, losses=losses)
    out, lost = found if losses else (found, {})
    return self._behind(x, out, bits), lost

  def _behind(self, x: Array, a: Array, bits: Bits | None) -> Float[Array, "B T E"]:
    """The stream behind the block, given what its attention makes of x."""
    of_attention, of_feed_forward = (None, None) if bits is None else bits
    x = x + masked(a, of_attention, self.dropout)
    x = checkpoint_name(x, "residual_h")
    return x + masked(self._feed(x), of_feed_forward, self.dropout)

  def keep_bits(self, x: Float[Array, "B T E"], seeds: UInt32[Array, "2 2"] | None) -> Bits | None:
    """What dropout keeps at the ends of the two branches; None where it keeps everything."""
    if seeds is None or self.dropout == 0.0:
      return None
    return tuple(bits_like(x, self.dropout, seed) for seed in seeds)

  def weights(self) -> Weights | None:
    """Folded and in the dtype of the stream, once for all rows and all that is computed again.

    None where `run` does not serve, by `residual.choose`.
    """
    a, f = self.attention, self.feed_forward
    if self.options.implementation is None:
      return None
    after = lambda norm, layer: residual.after_norm(
      layer.kernel[...],
      layer.bias[...],
      gain=norm.scale[...],
      shift=norm.bias[...],
      dtype=a.key.dtype,
    )
    alone = lambda layer: residual.linear(layer.kernel[...], layer.bias[...], a.key.dtype)
    query, key, value = (after(self.attention_norm, layer) for layer in (a.query, a.key, a.value))
    if a.placing is None:
      # A bias of keys adds the same to all scores of a row, which its softmax does not feel: the
      # sum over rows that would be its gradient is zero, and need not be computed.
      key = key._replace(bias=jax.lax.stop_gradient(key.bias))
    entering = query, key, value
    leaving = (alone(a.out), after(self.feed_forward_norm, f.up), alone(f.down))
    beside = residual.joint(*entering) if self.options.implementation == "mosaic_gpu" else None
    gains = None if a.query_norm is None else (a.query_norm.scale[...], a.key_norm.scale[...])
    return Weights(residual.EnterWeights(*entering, beside), residual.LeaveWeights(*leaving), gains)

  @property
  def options(self) -> residual.Options:
    """Of the two halves."""
    a, axes = self.attention, sharding.row_axes()
    widths = tuple(layer.kernel.shape[-1] for layer in (a.query, a.key, a.value))
    E, F = self.feed_forward.up.kernel.shape[-2:]
    name = residual.choose(
      a.key.dtype or a.key.param_dtype,
      E,
      F,
      widths,
      self.feed_forward.activation,
      implementation=a.implementation,
      row_axes=axes,
      refused=self._why_no_halves(),
    )
    return residual.Options(NORM_EPSILON, self.feed_forward.activation, self.dropout, name, axes)

  def _why_no_halves(self) -> str | None:
    """What keeps this block from two functions around attention; None: nothing does."""
    a, f = self.attention, self.feed_forward
    if isinstance(a, learned_attention.LearnedSelfAttention):
      return "learned attention reads the normed stream"
    if any(layer.bias is None for layer in (a.query, a.key, a.value, a.out, f.up, f.down)):
      return "a layer has no bias"
    if a.key.dtype is None:
      return "the layers have no dtype"
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
      return "under explicit axes each product of gradients would need a sharding"
    return None

  def run(self, stream: residual.Stream, weights: Weights, bits: Bits | None) -> residual.Stream:
    """`__call__` by weights of `weights`, which may be those of one of many blocks like this one.

    Args:
      stream: of `residual.start`, or of the block before.
      weights: of this block.
      bits: of `keep_bits`; None turns dropout off.
    """
    return self._halves(stream, weights, bits)[0]

  def with_weights(
    self, x: Float[Array, "B T E"], rows: Integer[np.ndarray, "Q"]
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B H Q T"]]:
    """The block's output, and the attention probabilities of the query rows `rows`."""
    return self(x), self.attention.weights(self._normed(x), rows)

  def chosen(self, x: Float[Array, "B T E"]) -> Bool[Array, "B Hl nq nk"]:
    """Which blocks of keys the lists of attention have, in a block whose attention chooses."""
    return self.attention.chosen(self._normed(x))

  def prefill(
    self, x: Float[Array, "B P E"], length: int, *, sparse: bool = True
  ) -> tuple[Float[Array, "B P E"], cache_blocks.AnyCache]:
    """`__call__`, and the block's cache, for `length` steps, as P of them leave it."""
    weights = self.weights()
    if weights is not None and x.dtype == self.attention.key.dtype:
      stream, (k, v) = self._halves(residual.start(x, self.options, drops=False), weights, None)
      cache = self.attention.filled(k, v, length, sparse=sparse)
      return residual.end(stream, self.options), cache
    a, cache = self.attention.prefill(self._normed(x), length, sparse=sparse)
    x = x + a
    return x + self._feed(x), cache

  def decode_step(
    self,
    x: Float[Array, "B E"],
    step: Integer[Array, ""],
    cache: cache_blocks.AnyCache,
    *,
    layer: Integer[Array, ""],
  ) -> tuple[Float[Array, "B E"], cache_blocks.AnyCache]:
    """Row `step` of `__call__`, given the keys and values of the rows before it."""
    a, cache = self.attention.decode_step(self._normed(x), step, cache, layer=layer)
    x = x + a
    return x + self._feed(x), cache

  def _halves(self, stream, weights, bits):
    """The stream behind the block, and the block's keys and values."""
    options = self.options
    q, k, v, x = residual.enter(stream, weights.enter, options)
    q, k, v = self.attention.split(q, k, v)
    if self.attention.placing is not None:
      positions = self.attention.checked_positions(None, x)
      gains = weights.gains or (None, None)
      q, k = (
        self.attention.placed(y, name, positions, gain=gain)
        for y, name, gain in zip((q, k), ("q", "k"), gains, strict=True)
      )
    o = self.attention.attended(q, k, v)
    return residual.leave(o, x, weights.leave, bits, options), (k, v)

  def _normed(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.attention_norm(x).astype(x.dtype)

  def _feed(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.feed_forward(self.feed_forward_norm(x).astype(x.dtype))


def drop(
  x: Float[Array, "*B E"], rate: int | float, *, key: Key[Array, ""] | None
) -> Float[Array, "*B E"]:
  """Zeros a share `rate` of x and scales up what is left; no key means no dropout."""
  if key is None or rate == 0.0:
    return x
  return masked(x, bits_like(x, rate, dropout.seed_of(key)), rate)


def bits_like(
  x: Float[Array, "*B E"], rate: int | float, seed: UInt32[Array, "2"]
) -> UInt32[Array, "*B W"]:
  """Which elements of arrays like x are kept."""
  return dropout.keep_bits(seed, rate, x.shape, sharding=sharding.of_rows(x))


def masked(
  x: Float[Array, "*B E"], bits: UInt32[Array, "*B W"] | None, rate: int | float
) -> Float[Array, "*B E"]:
  """What dropout leaves of x; without bits x itself."""
  return x if bits is None else dropout.masked(x, bits, rate)
