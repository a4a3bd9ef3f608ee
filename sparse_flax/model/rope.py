"""Rotary positions (RoPE, arXiv:2104.09864): queries and keys turn by angles of where they are."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

ROPES = ("none", "tokens", "axes")  # of a SparseTransformer
AXES_THETA = 100.0  # places along an axis are fewer than tokens

Positions = Integer[Array | np.ndarray, "T"] | Integer[Array | np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Feature d and d + D / 2 of a head are a plane, turned by position * theta ** (-2 d / D).

  With a `shape`, positions count the places of a grid, the last axis first. Its axes share the
  planes evenly, and each of an axis' n planes is turned by the place along it * theta ** (-d / n).

  Halves, not neighbours, are paired, as in the weights of Llama in `transformers`, in Gemma and in
  `nnx.RoPE`; the first code of Llama and the paper pair features 2 d and 2 d + 1. Angles are in
  float32.
  """

  theta: float = 10_000.0
  shape: tuple[int, ...] = ()

  def __post_init__(self):
    real = isinstance(self.theta, numbers.Real) and not isinstance(self.theta, bool)
    if not real or not (math.isfinite(self.theta) and self.theta > 0):
      raise ValueError(f"rope(theta={self.theta!r}): must be a positive number, such as 10_000.0")
    if not all(isinstance(size, int | np.integer) and size >= 1 for size in self.shape):
      raise ValueError(
        f"rope(shape={self.shape}): must be whole numbers >= 1, such as (rows, columns, channels)"
      )

  def __call__(self, x: Float[Array, "B T H D"], positions: Positions) -> Float[Array, "B T H D"]:
    """Queries or keys x, turned.

    Raises:
      ValueError: the head size is odd, or has fewer planes than the grid has axes.
    """
    D, axes = x.shape[-1], len(self.shape) or 1
    if D % 2:
      raise ValueError(f"rope: the head size {D} must be even")
    if axes > D // 2:
      raise ValueError(f"rope(shape={self.shape}): the head size {D} must be at least {2 * axes}")
    positions = jnp.asarray(positions).reshape(-1, x.shape[1], 1, 1)  # of one sequence, or of each
    planes = [len(part) for part in np.array_split(np.arange(D // 2), axes)]
    rates = [(self.theta ** (-np.arange(n) / n)).astype(np.float32) for n in planes]
    places = [place.astype(jnp.float32) for place in self._along_axes(positions)]
    angles = jnp.concatenate(
      [place * rate.reshape(1, 1, 1, -1) for place, rate in zip(places, rates, strict=True)], -1
    )
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

  def _along_axes(self, positions: Integer[Array, "*B"]) -> list[Integer[Array, "*B"]]:
    """The place along each axis of the grid."""
    places = []
    for size in reversed(self.shape[1:]):
      places.append(positions % size)
      positions = positions // size
    return [positions, *reversed(places)]


def rope(theta: float = 10_000.0, shape: Sequence[int] = ()) -> Rope:
  """Rotary positions for the argument `rope` of attention layers.

  Args:
    theta: base of the wavelengths, from 2 pi to 2 pi theta tokens.
    shape: of a grid that the tokens fill row by row, such as (rows, columns, channels) of an image;
      then each of its axes has planes of its own. Default: a line.
  """
  return Rope(theta, tuple(shape))


def of_level(name: str, position_shape: tuple[int, ...], *, factor: int) -> Rope | None:
  """What turns the rows of a level of a SparseTransformer, which are `factor` tokens each.

  Args:
    name: one of ROPES.
    position_shape: of the tokens.
    factor: tokens of a row.
  """
  if name == "none":
    return None
  shape = position_shape
  while shape and math.prod(shape) * factor > math.prod(position_shape):
    shape = shape[:-1]
  # Groups of all that the last axes hold lie on a grid of the others, and else on a line.
  on_grid = math.prod(shape) * factor == math.prod(position_shape)
  if name == "tokens" or not on_grid:
    return Rope()
  return Rope(AXES_THETA, shape)
