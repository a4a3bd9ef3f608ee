"""Arrays cut into rows, and filled up to whole tiles."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def in_rows(x: Array, stride: int) -> Array:
  """[B, T, H, D] -> [B, T/l, l, H, D]; no copy."""
  return x.reshape(x.shape[0], -1, stride, *x.shape[2:])


def padded(x: Array, axis: int, num_rows: int) -> Array:
  """x with `num_rows` more rows of zeros."""
  return jnp.pad(x, [(0, num_rows if n == axis else 0) for n in range(x.ndim)]) if num_rows else x


def cut(x: Array, axis: int, length: int) -> Array:
  """x with so many rows alone."""
  return x if x.shape[axis] == length else lax.slice_in_dim(x, 0, length, axis=axis)
