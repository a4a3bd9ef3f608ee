"""From T rows to groups of k of them, and back, so that no row learns of a later one.

    rows      0    1 2 3    4 5 6    7 8 9 ...      k = 3
    groups    0      1        2        3            a group pools the rows up to 3 g
    serve     0 1 2  3 4 5    6 7 8    9 10 11      and serves the rows from 3 g on

Group g pools the k rows that end with row g k, and serves the k rows that begin with row g k. So it
has seen no row behind those that it serves, and k - 1 is the least shift for which that holds.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer

from sparse_flax.model import heads

POOLS = ("linear", "mean")
UPS = ("linear", "repeat")
FACTORS = range(2, 65)  # of a level


def num_groups(T: int, factor: int) -> int:
  """Groups of `factor` of T rows."""
  return -(-T // factor)


class Shorten(nnx.Module):
  """Group g of x is a product of rows g k - k + 1 ... g k, or their mean; rows before 0 are zeros.

  "linear" norms each row, before the zero rows are put in front of them, and multiplies the k rows
  of a group, side by side, by one matrix [k E, E']. "mean" has no weights. (Hourglass,
  arXiv:2110.13711, shifts its rows in the same way.)
  """

  norm: nnx.LayerNorm | None = None
  pool: nnx.Linear | None = None
  positions: nnx.Param | None = None

  def __init__(
    self,
    *,
    factor: int,
    width: int,
    inner_width: int,
    pool: Literal["linear", "mean"] | str = "linear",
    num_positions: int = 0,
    epsilon: float = 1e-5,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    kernel_init: nnx.Initializer,
    position_init: nnx.Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    """Args:
    factor: k, rows of a group.
    width: E, of the rows.
    inner_width: E', of the groups; equal to E for "mean".
    pool: one of POOLS.
    num_positions: rows of a table that is added to the groups by their number; 0: none.
    epsilon: of the norm.
    dtype: of the result; None keeps that of x and the weights.
    param_dtype: of the weights.
    kernel_init: of the matrix, beside 1 / k on the diagonal of each row's block where E' = E, with
      which the first values are near the mean.
    position_init: of the table.
    rngs: source of the initial values.

    Raises:
      ValueError: the mean would have another width.
    """
    if pool == "mean" and width != inner_width:
      raise ValueError(
        f"{pool=}: must be 'linear', for the widths {width} and {inner_width} differ"
      )
    self.factor = factor
    self.inner_width = inner_width
    if pool == "linear":
      self.norm = nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
      self.pool = nnx.Linear(
        factor * width,
        inner_width,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=_near_mean(kernel_init, factor) if width == inner_width else kernel_init,
        rngs=rngs,
      )
    if num_positions:
      assert position_init is not None, "a table has first values"
      table = position_init(rngs.params(), (num_positions, inner_width), param_dtype)
      self.positions = nnx.Param(table)

  def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B G F"]:
    """The groups of rows x, G = ceil(T / k)."""
    B, T, E = x.shape
    G = num_groups(T, self.factor)
    front = ((0, 0), (self.factor - 1, 0), (0, 0))
    rows = jnp.pad(self.rows(x), front)[:, : G * self.factor]
    return self.pooled(rows.reshape(B, G, self.factor, E), jnp.arange(G))

  def rows(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Rows as they are pooled."""
    return x if self.norm is None else self.norm(x).astype(x.dtype)

  def pooled(
    self, rows: Float[Array, "B *G k E"], number: Integer[Array, "*G"]
  ) -> Float[Array, "B *G F"]:
    """Groups of these numbers, of their k rows in order, as `rows` gives them."""
    if self.pool is None:
      z = rows.astype(jnp.float32).mean(axis=-2).astype(rows.dtype)
    else:
      z = heads.product(self.pool, rows.reshape(*rows.shape[:-2], -1))
    if self.positions is None:
      return z
    added = jnp.take(self.positions[...].astype(z.dtype), number, axis=0)
    return z + jnp.broadcast_to(added[None], z.shape)


class Lengthen(nnx.Module):
  """Rows g k ... g k + k - 1 of group g: k products of its norm, or k copies of it.

  With "linear" each place in a group has a matrix of its own.
  """

  spread: nnx.Linear | None = None

  def __init__(
    self,
    *,
    factor: int,
    width: int,
    inner_width: int,
    up: Literal["linear", "repeat"] | str = "linear",
    epsilon: float = 1e-5,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    out_init: nnx.Initializer,
    rngs: nnx.Rngs,
  ):
    """Args:
    factor: k, rows of a group.
    width: E, of the rows.
    inner_width: E', of the groups; equal to E for "repeat".
    up: one of UPS.
    epsilon: of the norm.
    dtype: of the result; None keeps that of the groups and the weights.
    param_dtype: of the weights.
    out_init: of the matrices [E', k E]: the end of a residual branch.
    rngs: source of the initial values.

    Raises:
      ValueError: a copy would have another width.
    """
    if up == "repeat" and width != inner_width:
      raise ValueError(f"{up=}: must be 'linear', for the widths {width} and {inner_width} differ")
    self.factor = factor
    self.norm = nnx.LayerNorm(inner_width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
    if up == "linear":
      self.spread = nnx.Linear(
        inner_width,
        factor * width,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=out_init,
        rngs=rngs,
      )

  def __call__(self, z: Float[Array, "B G F"], T: int) -> Float[Array, "B T E"]:
    """The first T rows of groups z, T <= k G."""
    rows = self.rows(z)
    return rows.reshape(len(z), -1, rows.shape[-1])[:, :T]

  def rows(self, z: Float[Array, "*B F"]) -> Float[Array, "*B k E"]:
    """The k rows of each group."""
    normed = self.norm(z).astype(z.dtype)
    if self.spread is None:
      return jnp.broadcast_to(normed[..., None, :], (*z.shape[:-1], self.factor, z.shape[-1]))
    return heads.product(self.spread, normed).reshape(*z.shape[:-1], self.factor, -1)


def _near_mean(noise: nnx.Initializer, factor: int) -> nnx.Initializer:
  """The mean of a group's rows, and noise."""

  def init(key, shape, *args, **options):
    drawn = noise(key, shape, *args, **options)
    mean = jnp.tile(jnp.eye(shape[1], dtype=drawn.dtype) / factor, (factor, 1))
    return drawn + mean.astype(drawn.dtype)

  return init
