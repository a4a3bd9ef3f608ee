"""Integers that are not known when a kernel is traced."""

import jax.numpy as jnp
from jax import lax


def div(n, size: int):
  """n // size of numbers that are not negative."""
  return lax.div(n, jnp.int32(size))


def rem(n, size: int):
  """n % size of numbers that are not negative."""
  return lax.rem(n, jnp.int32(size))


def pick(n, table: tuple[int, ...]):
  """table[n]: kernels have no arrays of constants, so by comparing."""
  value = jnp.where(n == 0, table[0], table[-1])
  for place, entry in enumerate(table[1:-1], 1):
    value = jnp.where(n == place, entry, value)
  return value
