"""Digests: the same on every sharding, another one for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.parallel import sharding
from sparse_flax.run import digest

RANDOM = np.random.RandomState(0)
ARRAY = RANDOM.standard_normal((8, 6, 4)).astype(np.float32)


def of(x) -> str:
  return digest.digests({"x": jnp.asarray(x)})["x"]


def test_names_dtypes_and_shapes_stand_in_it():
  found = digest.digests({"a": {"b": jnp.zeros((2, 3), jnp.bfloat16)}, "c": (jnp.int32(7),)})
  assert found.keys() == {"a/b", "c/0"}
  assert found["a/b"].startswith("bfloat16[2, 3] ") and found["c/0"].startswith("int32[] ")


def test_it_does_not_depend_on_where_the_array_lies():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, sequence=1)
  for spec in (jax.P(), jax.P("data"), jax.P("data", "fsdp", "tensor"), jax.P(None, None, "data")):
    assert of(jax.device_put(ARRAY, jax.NamedSharding(mesh, spec))) == of(ARRAY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_every_single_bit_counts(dtype):
  x = np.asarray(jnp.asarray(ARRAY * 50).astype(dtype))
  flat = x.reshape(-1).view(np.uint8)
  seen = {of(x)}
  bits = RANDOM.choice(8 * flat.size, 40, replace=False)
  for bit in bits:
    changed = x.copy()
    changed.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    seen.add(of(changed))
  assert len(seen) == len(bits) + 1


def test_order_sign_of_zero_and_shape_count():
  swapped = ARRAY.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  zeros = np.zeros((2, 2), np.float32)
  assert of(swapped) != of(ARRAY)
  assert of(-zeros) != of(zeros)
  assert of(zeros.reshape(4)) != of(zeros)


def test_what_has_no_digest_is_refused():
  with pytest.raises(ValueError, match="bool leaf: has no digest"):
    digest.digests({"x": jnp.ones(3, bool)})
