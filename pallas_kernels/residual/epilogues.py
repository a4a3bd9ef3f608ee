"""What follows a product: pure functions of float32 tiles, the same in a kernel and outside it.

A tile is [rows, columns] of the product's result. What belongs to a row, such as its mean, is
[rows]; what belongs to a column, such as its bias, is [columns]; a mask is packed, bit c % 32 of
word c // 32 for column c. In a kernel a tile is one warpgroup's, in XLA it is the whole array.

Norms come after the product. With W' = gain W less the means of its columns, b' = b + bias W and
s = the column sums of W' as it is rounded, norm(x) W + b is rstd (x W' - mean s) + b': the product
reads x as it is in memory.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int32
from jaxtyping import Num
from jaxtyping import UInt32

from pallas_kernels.residual import activations

WORD = 32  # columns whose mask is one word
SLOPE = activations.GELU_SLOPE


def over_columns(values: Num[Array, " rows"], num: int) -> Num[Array, "rows num"]:
  """One value per row -> the same in every column."""
  # Not by None and arithmetic: a kernel's compiler finds registers for this alone.
  return lax.broadcast_in_dim(values, (values.shape[0], num), [0])


def over_rows(values: Num[Array, " columns"], num: int) -> Num[Array, "num columns"]:
  """One value per column -> the same in every row."""
  return lax.broadcast_in_dim(values, (num, values.shape[0]), [1])


# ----------------------------------------------------------------------------------------- norms


def moments(
  total: Float32[Array, " rows"], squares: Float32[Array, " rows"], width: int, eps: float
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"]]:
  """mean and 1 / std of rows of `width` numbers, of the sums of these and of their squares."""
  mean = total * (1 / width)
  # The difference of two large numbers may come out below zero.
  variance = jnp.maximum(squares * (1 / width) - mean * mean, 0.0)
  return mean, lax.rsqrt(variance + eps)


def row_sums(
  x: Float32[Array, "rows columns"],
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"]]:
  """The sums that `moments` takes, of a part of the columns. x: as it is rounded."""
  return x.sum(axis=1), (x * x).sum(axis=1)


def normalised(
  x: Float32[Array, "rows columns"], mean: Float32[Array, " rows"], rstd: Float32[Array, " rows"]
) -> Float32[Array, "rows columns"]:
  """(x - mean) rstd."""
  num = x.shape[1]
  # In this order one instruction; its error is that of mean rstd, a few units of 2^-24.
  return x * over_columns(rstd, num) - over_columns(mean * rstd, num)


def affine_rows(
  acc: Float32[Array, "rows columns"],
  mean: Float32[Array, " rows"],
  rstd: Float32[Array, " rows"],
  sums: Float32[Array, " columns"],
  bias: Float32[Array, " columns"],
) -> Float32[Array, "rows columns"]:
  """norm(x) W + b of acc = x W': rstd (acc - mean sums) + bias."""
  rows, columns = acc.shape
  centred = acc - over_columns(mean, columns) * over_rows(sums, rows)
  return over_columns(rstd, columns) * centred + over_rows(bias, rows)


def norm_back(
  grad: Float32[Array, "rows columns"],
  xhat: Float32[Array, "rows columns"],
  mean_product: Float32[Array, " rows"],
) -> Float32[Array, "rows columns"]:
  """The gradient of x times std: grad - xhat mean(grad xhat), of a grad without a mean over a row.

  Args:
    grad: of xhat, the normalised x. Times rstd where the result shall be the gradient of x itself;
      then the mean is of that. It has no mean where it is a product with weights whose columns have
      none. What is added to the result may be added to it before.
    xhat: the normalised x.
    mean_product: mean of grad xhat over the whole row, of which the tile may be a part.
  """
  return grad - xhat * over_columns(mean_product, grad.shape[1])


# ------------------------------------------------------------------------------------ activation


def gelu(u: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
  """u sigmoid(1.702 u), by a tanh: that is one operation of a GPU, a sigmoid is two."""
  half = 0.5 * u
  return half + half * jnp.tanh(SLOPE * half)


def gelu_slope(u: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
  """Twice the derivative of `gelu`, less one: what costs least to make."""
  z = (0.5 * SLOPE) * u
  t = jnp.tanh(z)
  # sigmoid = (1 + t) / 2, and u times its derivative z (1 - t^2) / 2.
  return t + z * (1.0 - t * t)


def relu2(u: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
  """max(u, 0)^2."""
  positive = jnp.maximum(u, 0.0)
  return positive * positive


def relu2_slope(u: Float32[Array, "rows columns"]) -> Float32[Array, "rows columns"]:
  """Twice the derivative of `relu2`, less one, as `activation_back` takes it."""
  return 4.0 * jnp.maximum(u, 0.0) - 1.0


def activation_back(
  grad: Float32[Array, "rows columns"],
  slope: Float32[Array, "rows columns"],
  rstd: Float32[Array, " rows"],
) -> Float32[Array, "rows columns"]:
  """The gradient of u from that of f(u), times rstd, as the product that follows wants it.

  Args:
    grad: of f(u).
    slope: 2 f'(u) - 1.
    rstd: of the rows.
  """
  half = grad * over_columns(0.5 * rstd, grad.shape[1])
  return half + half * slope


class Activation(NamedTuple):
  """f, and 2 f' - 1."""

  value: Callable[[Float32[Array, "rows columns"]], Float32[Array, "rows columns"]]
  slope: Callable[[Float32[Array, "rows columns"]], Float32[Array, "rows columns"]]


ACTIVATIONS = {
  "quick_gelu": Activation(gelu, gelu_slope),
  "relu2": Activation(relu2, relu2_slope),
}


# --------------------------------------------------------------------------------------- dropout


def kept(
  words: Sequence[UInt32[Array, " rows"]] | UInt32[Array, "rows words"],
  places: Int32[Array, " word"] | None = None,
) -> Bool[Array, "rows columns"]:
  """Packed masks as booleans, 32 columns for each word.

  Args:
    words: each a row's mask of 32 columns, in order; or an array of them.
    places: 0 ... 31; in a kernel, in the layout of a tile's columns.
  """
  if not isinstance(words, Sequence):
    words = [words[:, n] for n in range(words.shape[1])]
  if places is None:
    places = jnp.arange(WORD, dtype=jnp.int32)
  rows = words[0].shape[0]
  # A bit of its own for each column: what does not depend on the row is computed once.
  bits = over_rows(jnp.left_shift(jnp.uint32(1), places.astype(jnp.uint32)), rows)
  parts = [over_columns(word, WORD) & bits for word in words]
  tiles = parts[0] if len(parts) == 1 else lax.concatenate(parts, 1)
  return tiles != jnp.uint32(0)


def drop(
  x: Float32[Array, "rows columns"], keep: Bool[Array, "rows columns"] | None, rate: float
) -> Float32[Array, "rows columns"]:
  """x where `keep`, over 1 - rate; else 0. The same forward and backward. keep None: x."""
  # A factor, as in `dropout.masked`: numbers chosen would be rounded first, and chosen by halves.
  return x if keep is None else x * jnp.where(keep, 1 / (1 - rate), 0.0)


def drop_add(
  acc: Float32[Array, "rows columns"],
  bias: Float32[Array, " columns"],
  residual: Float32[Array, "rows columns"],
  keep: Bool[Array, "rows columns"] | None,
  rate: float,
) -> Float32[Array, "rows columns"]:
  """residual + drop(acc + bias)."""
  return residual + drop(acc + over_rows(bias, acc.shape[0]), keep, rate)
