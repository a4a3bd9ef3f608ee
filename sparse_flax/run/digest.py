"""Digests of arrays, taken where the arrays lie: Orbax restores a flipped bit without a word."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import UInt32

# Odd, so that products with them are one-to-one.
_PLACES, _FIRST, _SECOND = (np.uint32(x) for x in (0x9E3779B1, 0xC2B2AE3D, 0x85EBCA77))


def digests(tree: Any) -> dict[str, str]:
  """{path: "dtype[shape] digest"} of every leaf, the same however the leaves are sharded.

  The digest is two sums, modulo 2**32, over all elements: of a hash of their bits and places, and
  of that times an odd hash of the place. Both are one-to-one in the bits, so a change of one
  element always changes both sums; changes of several escape with a chance of about 2**-60. All
  processes have to call this, and all get the result.

  Raises:
    ValueError: a leaf of a type that has no digest.
  """
  sums = jax.device_get(_all_sums(tree))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    name_of(path): f"{leaf.dtype}{list(leaf.shape)} {int(a):08x}{int(b):08x}"
    for (path, leaf), (a, b) in zip(leaves, jax.tree.leaves(sums), strict=True)
  }


def name_of(path: tuple) -> str:
  """The name of a leaf: "params/groups/0/attention/query/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def of_json(values: Any) -> str:
  """SHA-256 of plain values."""
  text = json.dumps(values, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _all_sums(tree):
  return jax.tree.map(_sums, tree)


def _sums(x: Array) -> UInt32[Array, "2"]:
  words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
  if x.dtype.itemsize not in words or x.dtype == bool:
    raise ValueError(f"{x.dtype} leaf: has no digest; must be numbers of 1, 2 or 4 bytes")
  bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):  # no reshape: every device sums what it holds
    at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = place + at * np.uint32(stride % 2**32)
    stride *= x.shape[axis]
  h = (bits ^ (place * _PLACES)) * _FIRST  # products and shifted xors are one-to-one
  h = (h ^ (h >> np.uint32(15))) * _SECOND
  h = h ^ (h >> np.uint32(13))
  # The last axis stays for a second sum: CPUs add rows as vectors.
  rows = tuple(range(x.ndim - 1))
  total = lambda terms: jnp.sum(terms, axis=rows, dtype=jnp.uint32).sum(dtype=jnp.uint32)
  weight = place * _SECOND
  weight = (weight ^ (weight >> np.uint32(15))) * np.uint32(2) + np.uint32(1)
  return jnp.stack([total(h), total(h * weight)])
