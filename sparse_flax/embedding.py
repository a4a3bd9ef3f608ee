"""Byte and position embeddings, and the shift by one slot that makes the model predict."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

VOCABULARY = 256  # raw bytes; audio is 8-bit mu-law


class Embedding(nnx.Module):
  """h_t = W_e[x_t] + sum_j W_j[pos_j(t)], then moved one slot to the right behind a start vector.

  Slot t holds the byte *and the position* of t - 1, and slot 0 the start vector, which has no
  position: the position of the byte being predicted is never given. pos_0, pos_1, ... are the
  digits of t in the mixed base `position_shape`, for example (row, column, channel) of a picture
  or (t // stride, t % stride) of text. (arXiv:1904.10509, Eq. 15.)
  """

  def __init__(
    self,
    *,
    width: int,
    position_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    token_init: nnx.Initializer,
    position_init: nnx.Initializer,
    rngs: nnx.Rngs,
  ):
    """Args:
    width: E, the model width.
    position_shape: rows of each position table; their product is the longest sequence.
    dtype: of the result; None keeps `param_dtype`. The sum itself, and in the gradient that
      over all tokens, is taken in float32.
    param_dtype: of the tables.
    token_init: initialiser of the byte table and of the start vector.
    position_init: initialiser of the position tables.
    rngs: source of the initial values.
    """
    self.position_shape = tuple(position_shape)
    self.dtype = dtype or param_dtype
    table = lambda rows, init: nnx.Embed(
      rows,
      width,
      dtype=jnp.float32,
      param_dtype=param_dtype,
      embedding_init=init,
      rngs=rngs,
    )
    self.tokens = table(VOCABULARY, token_init)
    self.positions = nnx.List([table(rows, position_init) for rows in self.position_shape])
    self.start = nnx.Param(token_init(rngs.params(), (1, 1, width), param_dtype))

  def __call__(self, tokens: Integer[Array, "B T"]) -> Float[Array, "B T E"]:
    """The network's input: slot t for predicting tokens[:, t]."""
    T = tokens.shape[1]
    if math.prod(self.position_shape) < T:
      raise ValueError(f"{T=} tokens have no positions in position_shape={self.position_shape}")
    # Shifted as bytes, before the embedding: devices that share a sequence pass on a byte.
    before = jax.lax.pad(tokens, jnp.zeros((), tokens.dtype), [(0, 0, 0), (1, -1, 0)])
    return self._slots(before, jnp.arange(T))

  def decode_step(
    self, token: Integer[Array, "B"], step: Integer[Array, ""]
  ) -> Float[Array, "B E"]:
    """Slot `step` alone: `token` is the byte before it (ignored at step 0)."""
    return self._slots(token[:, None], jnp.reshape(step, (1,)))[:, 0]

  def _slots(
    self, before: Integer[Array, "B T"], steps: Integer[Array, "T"]
  ) -> Float[Array, "B T E"]:
    """Slots `steps`, given the byte before each of them."""
    x = self.tokens(before) + self._at(jnp.maximum(steps - 1, 0))[None]
    start = self.start[...].astype(x.dtype)
    return jnp.where(steps[None, :, None] == 0, start, x).astype(self.dtype)

  def _at(self, index: Integer[Array, "*T"]) -> Float[Array, "*T E"]:
    digits = jnp.unravel_index(index, self.position_shape)
    return sum(table(digit) for table, digit in zip(self.positions, digits, strict=True))
