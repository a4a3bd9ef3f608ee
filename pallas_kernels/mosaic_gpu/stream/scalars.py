"""Numbers that are not known when a kernel is traced."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Scalar = int | jax.Array  # traced, mostly
Item = dict[str, Any]  # what a consumer works on at one time: b, r, h, tile, .. (work.py)
Refs = Mapping[str, Any]  # memory of a kernel by name: inputs, outputs, scratch


def div(n: Scalar, size: int) -> Scalar:
  """n // size of numbers that are not negative."""
  return lax.div(n, jnp.int32(size))


def rem(n: Scalar, size: int) -> Scalar:
  """n % size of numbers that are not negative."""
  return lax.rem(n, jnp.int32(size))


def pick(n: Scalar, table: tuple[int, ...]) -> Scalar:
  """table[n]."""
  # By comparing: a kernel has no arrays of constants, and divides slowly.
  value = jnp.where(n == 0, table[0], table[-1])
  for place, entry in enumerate(table[1:-1], 1):
    value = jnp.where(n == place, entry, value)
  return value
