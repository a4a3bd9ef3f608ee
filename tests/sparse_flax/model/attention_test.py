"""SparseSelfAttention as a layer of somebody else's model."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax import SparseSelfAttention
from sparse_flax.model.attention import apart
from sparse_flax.parallel import sharding
from tests.helpers.arrays import assert_close
from tests.helpers.models import nnx_mode  # noqa: F401

PATTERN = patterns.PerHead((patterns.Local(3), patterns.Column(4)))


def make_layer(**overrides):
  options = dict(width=12, num_heads=2, pattern=PATTERN, rngs=nnx.Rngs(0), **overrides)
  return SparseSelfAttention(**options)


def attention_by_hand(layer, x):
  """The definition, head by head and row by row, in float64."""
  array = lambda variable: np.asarray(variable[...], np.float64)
  apply = lambda linear, x: x @ array(linear.kernel) + array(linear.bias)
  q, k, v = (apply(linear, np.float64(x)) for linear in (layer.query, layer.key, layer.value))
  heads = []
  for h in range(2):
    cut = lambda y: np.split(y, 2, axis=-1)[h]
    scores = cut(q) @ cut(k).swapaxes(1, 2) / np.sqrt(cut(q).shape[-1])
    weights = np.exp(scores) * PATTERN.of_head(h).mask(x.shape[1])
    heads.append(weights / weights.sum(-1, keepdims=True) @ cut(v))
  return apply(layer.out, np.concatenate(heads, axis=-1))


@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("implementation", [None, "reference"], ids=["best", "reference"])
@pytest.mark.parametrize("qk_ratio", [1.0, 0.5])
def test_it_is_scaled_masked_softmax_attention(qk_ratio, implementation, nnx_mode):  # noqa: F811
  layer = make_layer(qk_ratio=qk_ratio, implementation=implementation)
  for linear in (layer.query, layer.key, layer.value, layer.out):  # biases count too
    linear.bias[...] = jax.random.normal(jax.random.key(5), linear.bias.shape)
  x = jax.random.normal(jax.random.key(1), (2, 11, 12))
  assert layer.query.kernel.shape == (12, 12 * qk_ratio)
  np.testing.assert_allclose(
    jax.jit(lambda m, x: m(x))(layer, x), attention_by_hand(layer, x), atol=1e-5
  )


def test_compilers_keep_its_products_apart():
  x = jnp.arange(6.0).reshape(2, 3)
  weigh = lambda x: sum(n * y for n, y in enumerate(apart(x, 3)))
  np.testing.assert_array_equal(jax.grad(lambda x: weigh(x).sum())(x), jnp.full((2, 3), 3.0))
  np.testing.assert_array_equal(jax.vmap(weigh)(x), 3 * x)
  layer, operands = make_layer(), r"optimization_barrier %\w+, %\w+, %\w+ "
  program = jax.jit(lambda x: layer(x)).lower(jnp.ones((2, 11, 12))).as_text()
  assert len(re.findall(operands, program)) == 1


def test_weights_are_the_probabilities_it_uses():
  layer = make_layer(implementation="reference")
  x = jax.random.normal(jax.random.key(1), (2, 11, 12))
  weights = layer.weights(x)
  np.testing.assert_array_equal(np.asarray(weights[0] > 0), PATTERN.mask(11))
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
  v = layer.value(x).reshape(2, 11, 2, 6)
  out = jnp.einsum("BHTS,BSHD->BTHD", weights, v).reshape(2, 11, 12)
  np.testing.assert_allclose(layer.out(out), layer(x), atol=1e-5)
  np.testing.assert_allclose(layer.weights(x, np.array([7, 2])), weights[:, :, np.array([7, 2])])


def test_dtype_is_for_computing_and_param_dtype_for_keeping():
  layer = make_layer(dtype="bfloat16")
  assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}
  x = jax.random.normal(jax.random.key(1), (2, 11, 12))
  out = layer(x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), make_layer()(x), atol=0.02)


def test_no_weights_but_plain_arrays_and_no_random_state_inside():
  params = nnx.to_pure_dict(nnx.state(make_layer()))
  names = {
    jax.tree_util.keystr(p, simple=True, separator="/")
    for p, _ in jax.tree.leaves_with_path(params)
  }
  parts = ("query", "key", "value", "out")
  assert names == {f"{part}/{kind}" for part in parts for kind in ("kernel", "bias")}


def test_hooks_set_the_initial_values():
  layer = make_layer(
    kernel_init=nnx.initializers.ones_init(), out_init=nnx.initializers.zeros_init()
  )
  assert (layer.query.kernel[...] == 1).all() and (layer.value.kernel[...] == 1).all()
  assert (layer.out.kernel[...] == 0).all()


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(num_heads=5), "num_heads=5 must divide width=12"),
    (dict(num_heads=0), "num_heads=0 must divide width=12"),
    (dict(qk_ratio=0.25), "qk_ratio=0.25"),
    (dict(qk_ratio=0.0), "qk_ratio=0.0"),
    (dict(qk_ratio=0.3), "qk_ratio=0.3"),
  ],
  ids=str,
)
def test_sizes_that_do_not_fit_are_refused(overrides, message):
  options = {**dict(width=12, num_heads=2, pattern=PATTERN), **overrides}
  with pytest.raises(ValueError, match=message):
    SparseSelfAttention(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("pattern", [patterns.Strided(4), patterns.Fixed(8, 2, 4)], ids=str)
def test_devices_share_sequences_and_heads_and_gather_nothing(pattern):
  """Heads are sharded where they keep their numbers in the pattern."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 24, 4, 8))
  attend = functools.partial(sparse_attention, pattern=pattern)
  loss = lambda attend, *x: (attend(*x) ** 2).sum()
  expected = jax.grad(functools.partial(loss, attend), (0, 1, 2))(q, k, v)
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2, sequence=1)
  shared = functools.partial(sharding.over_devices, pattern=pattern)
  with jax.set_mesh(mesh):
    by_batch = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put((q, k, v), by_batch)
    program = jax.jit(jax.grad(functools.partial(loss, shared), (0, 1, 2)), out_shardings=by_batch)
    lowered = program.lower(*x)
    compiled = lowered.compile()
    got = compiled(*x)
  # Addresses stand in those calls: no other process would find the program in the cache.
  assert "CustomSPMDPartitioning" not in lowered.as_text()
  for a, b in zip(got, expected, strict=True):
    assert_close(a, b, tolerance=1e-5, what=str(pattern))
  whole = re.findall(r"all-gather[^=]*= f32\[4,24", compiled.as_text())
  assert not whole, "sequences of other devices were gathered"


def test_what_does_not_come_out_even_is_computed_everywhere():
  q = jax.random.normal(jax.random.key(0), (3, 24, 4, 8))
  attend = functools.partial(sparse_attention, pattern=patterns.Local(4))
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=1, tensor=1, sequence=1)):
    got = sharding.over_devices(q, q, q, pattern=patterns.Local(4))
  assert_close(got, attend(q, q, q), tolerance=1e-6, what="out")
