"""Byte and position embeddings, and the shift by one slot that makes the model predict."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Shaped

from pallas_kernels import residual
from sparse_flax.model import order as order_lib

VOCABULARY = 256  # raw bytes; audio is 8-bit mu-law


def check_bytes(tokens: Shaped[np.ndarray | Array, "..."], name: str = "tokens") -> None:
  """Raises ValueError unless all are integers in [0, 255]; of traced values only the dtype counts.

  A table has no row beyond 255, and takes negative numbers for rows counted from its end.
  """
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"{name} of dtype {tokens.dtype}: must be integers in [0, {VOCABULARY - 1}]")
  if tokens.dtype == jnp.uint8 or isinstance(tokens, jax.core.Tracer) or not tokens.size:
    return
  if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
    return  # other processes have a share
  tokens = np.asarray(tokens)  # under jit jax.numpy would trace even what is known
  least, most = int(tokens.min()), int(tokens.max())
  if least < 0 or most >= VOCABULARY:
    wrong = least if least < 0 else most
    raise ValueError(f"{name} with the value {wrong}: must be integers in [0, {VOCABULARY - 1}]")


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
    order: order_lib.Order | None = None,
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
    order: which place each token has; None: that of its number.
    rngs: source of the initial values.
    """
    self.position_shape = tuple(position_shape)
    self.dtype = dtype or param_dtype
    self.order = order
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
    """The network's input: slot t for predicting tokens[:, t].

    Raises:
      ValueError: the tokens are more than there are positions, or no bytes as far as can be told.
    """
    check_bytes(tokens)
    T = tokens.shape[1]
    if math.prod(self.position_shape) < T:
      raise ValueError(f"{T=} tokens have no positions in position_shape={self.position_shape}")
    # Shifted as bytes, before the embedding: devices that share a sequence pass on a byte.
    before = jax.lax.pad(tokens, jnp.zeros((), tokens.dtype), [(0, 0, 0), (1, -1, 0)])
    return self._slots(before, jnp.arange(T))

  def decode_step(
    self, token: Integer[Array, "B"], step: Integer[Array, ""]
  ) -> Float[Array, "B E"]:
    """Slot `step` alone: `token` is the byte before it (at step 0 any)."""
    check_bytes(token, "token")
    return self._slots(token[:, None], jnp.reshape(step, (1,)))[:, 0]

  def _slots(
    self, before: Integer[Array, "B T"], steps: Integer[Array, "T"]
  ) -> Float[Array, "B T E"]:
    """Slots `steps`, given the byte before each of them."""
    if jnp.issubdtype(before.dtype, jnp.signedinteger):
      # Traced numbers cannot be checked: a negative one gives NaN, as one beyond the table does.
      before = before.astype(jnp.uint32)
    # What comes back for the sum was rounded to its dtype: a product in it loses nothing.
    x = rows_of(self.tokens.embedding[...].astype(jnp.float32), before, self.dtype)
    # For each sequence, though all have the same: what comes back is then not added up before the
    # product that makes its gradient, and is as narrow as for bytes.
    x = x + self._at(jnp.maximum(steps - 1, 0)[None] + jnp.zeros_like(before, steps.dtype))
    start = self.start[...].astype(x.dtype)
    return jnp.where(steps[None, :, None] == 0, start, x).astype(self.dtype)

  def _at(self, index: Integer[Array, "B T"]) -> Float[Array, "B T E"]:
    if self.order is not None:
      index = jnp.take(jnp.asarray(self.order.places), index, mode="clip")
    digits = jnp.unravel_index(index, self.position_shape)
    tables = (table.embedding[...].astype(jnp.float32) for table in self.positions)
    return sum(rows_of(x, n, self.dtype) for x, n in zip(tables, digits, strict=True))


def rows_of(
  table: Float[Array, "V E"], index: Integer[Array, "*B"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*B E"]:
  """table[index], NaN beyond it; the gradient is a product, of operands in `dtype`.

  A scatter adds in an order that changes from run to run on a GPU, one addition after the other.
  """
  return _rows(table, index, table.shape[0], dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rows(table, index, size, dtype):
  del size, dtype
  return jnp.take(table, index, axis=0)


def _rows_forward(table, index, size, dtype):
  return _rows(table, index, size, dtype), index


def _rows_backward(size, dtype, index, dy):
  hits = index[..., None] == jnp.arange(size, dtype=index.dtype).reshape((1,) * index.ndim + (-1,))
  exact = dict(precision="highest")  # no rounding of float32
  dtable = residual.weight_gradient(hits.astype(dtype), dy.astype(dtype), **exact)
  return dtable.astype(dy.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
