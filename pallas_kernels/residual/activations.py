"""Functions between the two products of a feed-forward part, each with its derivative."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

GELU_SLOPE = 1.702  # with which u sigmoid(slope u) is close to the GELU


class Activation(NamedTuple):
  """f, and u -> (f(u), f'(u)), elementwise."""

  value: Callable[[Float[Array, "*B"]], Float[Array, "*B"]]
  with_derivative: Callable[[Float[Array, "*B"]], tuple[Float[Array, "*B"], Float[Array, "*B"]]]


def _quick_gelu(u: Float[Array, "*B"]) -> Float[Array, "*B"]:
  return u * _sigmoid(u)


def _quick_gelu_with_derivative(u: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], ...]:
  s = _sigmoid(u)
  return u * s, s + GELU_SLOPE * u * s * (1.0 - s)


def _sigmoid(u: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Of slope u by one tanh: as exact as 2^-24, of 1, not of the result."""
  return 0.5 + 0.5 * jnp.tanh(0.5 * GELU_SLOPE * u)


def _relu_with_derivative(u: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], ...]:
  return jax.nn.relu(u), (u > 0).astype(u.dtype)


def _relu2(u: Float[Array, "*B"]) -> Float[Array, "*B"]:
  return jnp.square(jnp.maximum(u, 0))


def _relu2_with_derivative(u: Float[Array, "*B"]) -> tuple[Float[Array, "*B"], ...]:
  positive = jnp.maximum(u, 0)
  return jnp.square(positive), 2 * positive


ACTIVATIONS = {
  "quick_gelu": Activation(_quick_gelu, _quick_gelu_with_derivative),
  "relu2": Activation(_relu2, _relu2_with_derivative),
  "relu": Activation(jax.nn.relu, _relu_with_derivative),
}
