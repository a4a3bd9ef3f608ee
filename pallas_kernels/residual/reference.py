"""What the halves of a residual block are, in one screen: plain norms, masks as arrays, float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float


class Affine(NamedTuple):
  """x -> x kernel + bias."""

  kernel: Float[Array, "E N"]
  bias: Float[Array, "N"]

  def __call__(self, x: Float[Array, "R E"]) -> Float[Array, "R N"]:
    return jnp.dot(x, self.kernel, precision="highest") + self.bias[None]


class Norm(NamedTuple):
  """x -> gain (x - mean) / std + shift, over each row."""

  gain: Float[Array, "E"]
  shift: Float[Array, "E"]

  def __call__(self, x: Float[Array, "R E"], epsilon: float) -> Float[Array, "R E"]:
    x = x - x.mean(axis=1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + epsilon)
    return self.gain[None] * x + self.shift[None]


def enter(
  x: Float[Array, "R E"], norm: Norm, projections: tuple[Affine, Affine, Affine], *, epsilon: float
) -> tuple[Float[Array, "R N"], ...]:
  """q, k and v."""
  normed = norm(x, epsilon)
  return tuple(project(normed) for project in projections)


def leave(
  o: Float[Array, "R V"],
  x: Float[Array, "R E"],
  out: Affine,
  norm: Norm,
  up: Affine,
  down: Affine,
  *,
  kept: tuple[Bool[Array, "R E"], Bool[Array, "R E"]] | None,
  keep_probability: float,
  activation: Callable[[Float[Array, "R F"]], Float[Array, "R F"]],
  epsilon: float,
) -> Float[Array, "R E"]:
  """h + drop(down(f(up(norm(h))))) with h = x + drop(out(o))."""
  drop = lambda y, n: y if kept is None else jnp.where(kept[n], y / keep_probability, 0.0)
  h = x + drop(out(o), 0)
  return h + drop(down(activation(up(norm(h, epsilon)))), 1)
