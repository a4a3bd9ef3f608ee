"""Rotary positions (RoPE, arXiv:2104.09864): queries and keys turn by angles of where they are."""

import dataclasses
import math
import numbers

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

Positions = Integer[Array | np.ndarray, "T"] | Integer[Array | np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Feature d and d + D / 2 of a head are a plane, turned by position * theta ** (-2 d / D).

  Halves, not neighbours, are paired, as in the weights of Llama in `transformers`, in Gemma and in
  `nnx.RoPE`; the first code of Llama and the paper pair features 2 d and 2 d + 1. Angles are in
  float32.
  """

  theta: float = 10_000.0

  def __post_init__(self):
    real = isinstance(self.theta, numbers.Real) and not isinstance(self.theta, bool)
    if not real or not (math.isfinite(self.theta) and self.theta > 0):
      raise ValueError(f"rope(theta={self.theta!r}): must be a positive number, such as 10_000.0")

  def __call__(self, x: Float[Array, "B T H D"], positions: Positions) -> Float[Array, "B T H D"]:
    """Queries or keys x, turned.

    Raises:
      ValueError: the head size is odd.
    """
    D = x.shape[-1]
    if D % 2:
      raise ValueError(f"rope: the head size {D} must be even")
    rates = self.theta ** (-2.0 / D * np.arange(D // 2))
    places = jnp.asarray(positions).astype(jnp.float32)
    places = places.reshape(-1, x.shape[1], 1, 1)  # of one sequence, or of each
    angles = places * rates.astype(np.float32).reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rope(theta: float = 10_000.0) -> Rope:
  """Rotary positions for the argument `rope` of attention layers.

  Args:
    theta: base of the wavelengths, from 2 pi to 2 pi theta tokens.
  """
  return Rope(theta)
