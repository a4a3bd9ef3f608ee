"""Gains and biases of norms, folded into the weights that follow; and their gradients, for nothing.

    norm(x) W + b = x^ W' + b',  x^ = (x - mean) / std,  W' = C (gain W),  b' = b + shift W

gain W by rows; C takes off each column its mean, which a row of x^ does not feel: its sum is 0. So
the gradient of x^, d W'^T, has no mean over a row that the norm's would have to take off, but for
the rounding of W', 1 part in 20,000. And the gradient of gain W, C dW', is the same whether rows of
x^ or of x / std were multiplied for dW'.

With the gradients dW' and db' of W' and b': dW = gain C dW' + shift db'^T, dgain = sums of W C dW'
over columns, dshift = W db'. Nothing passes over activations, and no gain is divided by.
"""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


class Linear(NamedTuple):
  """x -> x kernel + bias, of one layer or, with an axis in front, of many.

  Attributes:
    kernel: in the dtype of the stream; it has no gradient.
    bias: float32.
    master: float32, in the place of the kernel where gradients flow: what arrives here is that of
      the kernel, as exact as it was summed. Its values are nothing that anyone reads.
    sums: float32, of the columns of the kernel as it is rounded, after a norm; without gradients.
  """

  kernel: Float[Array, "*L E N"]
  bias: Float[Array, "*L N"]
  master: Float[Array, "*L E N"] | None
  sums: Float[Array, "*L N"] | None = None


class Joint(NamedTuple):
  """Several products of the same rows as one, without gradients."""

  kernel: Float[Array, "*L E N"]
  bias: Float[Array, "*L N"]
  sums: Float[Array, "*L N"]


class EnterWeights(NamedTuple):
  """Of the norm in front of attention, and of q, k and v; `joint` where one kernel makes all."""

  query: Linear
  key: Linear
  value: Linear
  joint: Joint | None = None


class LeaveWeights(NamedTuple):
  """Of the projection back, of the second norm, and of the feed-forward part."""

  out: Linear
  up: Linear
  down: Linear


def linear(
  kernel: Float[Array, "*L E N"], bias: Float[Array, "*L N"], dtype: jax.typing.DTypeLike
) -> Linear:
  """Without a norm in front."""
  master = wide(kernel)
  return Linear(jax.lax.stop_gradient(master).astype(dtype), wide(bias), master)


def after_norm(
  kernel: Float[Array, "*L E N"],
  bias: Float[Array, "*L N"],
  *,
  gain: Float[Array, "*L E"],
  shift: Float[Array, "*L E"],
  dtype: jax.typing.DTypeLike,
) -> Linear:
  """With the gain and bias (`shift`) of the norm in front of it."""
  folded, bias, master = _fold(*map(wide, (kernel, bias, gain, shift)), jnp.dtype(dtype))
  folded = jax.lax.stop_gradient(folded)
  return Linear(folded, bias, master, wide(folded).sum(axis=-2))


def joint(*layers: Linear) -> Joint:
  """Layers of one norm, side by side."""
  beside = lambda name: jnp.concatenate([getattr(x, name) for x in layers], axis=-1)
  return Joint(*(jax.lax.stop_gradient(beside(name)) for name in Joint._fields))


def without_masters(weights: Any) -> Any:
  """EnterWeights or LeaveWeights without what nobody reads."""
  is_linear = lambda x: isinstance(x, Linear)
  cut = lambda x: x._replace(master=None) if is_linear(x) else x
  return jax.tree.map(cut, weights, is_leaf=is_linear)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fold(kernel, bias, gain, shift, dtype):
  # A sum, not a product: no device rounds its operands.
  moved = bias + (shift[..., None] * kernel).sum(axis=-2)
  return _centred(gain[..., None] * kernel).astype(dtype), moved, kernel


def _fold_forward(kernel, bias, gain, shift, dtype):
  return _fold(kernel, bias, gain, shift, dtype), (kernel, gain, shift)


def _fold_backward(dtype, kept, cotangents):
  del dtype
  (kernel, gain, shift), (_, dbias, dfolded) = kept, cotangents
  dfolded = _centred(dfolded)
  dkernel = gain[..., None] * dfolded + shift[..., None] * dbias[..., None, :]
  dgain = (dfolded * kernel).sum(axis=-1)
  dshift = (kernel * dbias[..., None, :]).sum(axis=-1)
  return dkernel, dbias, dgain, dshift


_fold.defvjp(_fold_forward, _fold_backward)


def _centred(kernel: Float[Array, "*L E N"]) -> Float[Array, "*L E N"]:
  """Less the mean of each column."""
  return kernel - kernel.mean(axis=-2, keepdims=True)


def wide_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
  """Of sums and statistics: float32, or float64 of that."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def wide(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  return x.astype(wide_dtype(x.dtype))
