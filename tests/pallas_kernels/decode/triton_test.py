"""The kernels of a decoding step: on a GPU as they are, elsewhere in Pallas's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType

from pallas_kernels.decode import triton as kernels
from sparse_flax import sample
from sparse_flax.model import cache as cache_lib
from sparse_flax.sample import triton
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL
from tests.helpers.models import small_model
from tests.sparse_flax.model.cache_test import assert_equal_logits
from tests.sparse_flax.model.cache_test import at_once
from tests.sparse_flax.model.cache_test import CYCLES
from tests.sparse_flax.model.cache_test import decoded_logits
from tests.sparse_flax.model.cache_test import PATTERNS

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def normal(*shape, seed=0, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, expected, dtype):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=TOLERANCE[dtype] * scale)


@pytest.mark.smoke(
  "norm-16-64-32-float32",
  "norm-2-2048-16-float32",
  "activation-19-40-70-bfloat16",
  "residual-3-300-520-bfloat16",
  daily=3,
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
  "B, E, F",
  [(1, 12, 24), (16, 64, 32), (19, 40, 70), (3, 300, 520), (5, 1_040, 24), (2, 2_048, 16)],
  ids=str,
)
@pytest.mark.parametrize("what", ["norm", "activation", "residual"])
def test_a_product_with_what_is_around_it(B, E, F, dtype, what):
  x, residual = 2.0 + normal(B, E, dtype=dtype), normal(B, F, seed=1, dtype=dtype)
  weight = normal(3, E, F, seed=2, dtype=dtype) / E**0.5
  bias = normal(3, F, seed=3, dtype=dtype)
  norm = kernels.Norm(normal(3, E, seed=4), normal(3, E, seed=5), epsilon=1e-5)
  if what == "norm" and E > kernels.WIDEST:
    with pytest.raises(NotImplementedError, match="takes 1024 at most"):
      kernels.linear(x, weight, bias, jnp.int32(1), norm=norm)
    return
  more = dict(
    norm=dict(norm=norm), activation=dict(activation=jnp.tanh), residual=dict(residual=residual)
  )
  got = kernels.linear(x, weight, bias, jnp.int32(1), **more[what])
  assert got.dtype == x.dtype

  expected = np.asarray(x, np.float64)
  if what == "norm":
    expected = expected - expected.mean(axis=1, keepdims=True)
    expected /= np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-5)
    expected = expected * np.asarray(norm[0][1]) + np.asarray(norm[1][1])
  expected = expected @ np.asarray(weight[1], np.float64) + np.asarray(bias[1], np.float64)
  if what == "activation":
    expected = np.tanh(expected)
  if what == "residual":
    expected += np.asarray(residual, np.float64)
  assert_close(got, expected, dtype)


@pytest.mark.smoke("7-fixed", "22-strided", "7-per-head", daily=2)
@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "layout"])  # has a table
@pytest.mark.parametrize("step", [0, 7, 22])
def test_attention_is_that_of_the_other_way(name, step):
  B, H, Dk, Dv, S = 3, 4, 5, 7, SMALL["seq_len"]
  sizes = dict(num_layers=2, num_heads=H, batch_size=B, k_size=Dk, v_size=Dv, dtype="float32")
  cache = cache_lib.init_cache(PATTERNS[name], length=S, **sizes)
  rng = np.random.default_rng(step)
  cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), cache)
  qkv = normal(B, H * (2 * Dk + Dv))
  q, k, v = jnp.split(qkv, (H * Dk, 2 * H * Dk), axis=1)
  heads = lambda x: x.reshape(B, H, -1)
  where = dict(step=jnp.int32(step), layer=jnp.int32(1))
  expected, stored = jax.jit(cache_lib.attend)(heads(q), heads(k), heads(v), cache, **where)
  attend = jax.jit(triton.attend, static_argnames="num_heads")
  got, kept = attend(qkv, cache, **where, num_heads=H)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(stored), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("fixed-bfloat16", daily=1)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cycle", ["dense", "fixed", "block-summary", "heads-and-layers"])
def test_teacher_forced_decoding_gives_the_logits_of_the_whole_sequence(cycle, dtype):
  layers = CYCLES[cycle]
  more = dict(attention_layers=layers, num_layers=2 * len(layers), compute_dtype=dtype)
  model, tokens = small_model(qk_ratio=0.5, **more), random_tokens()
  got = decoded_logits(model, tokens, P=5, kernels=triton)
  assert_equal_logits(got, at_once(model, tokens), TOLERANCE[dtype])


@pytest.mark.one_day_in_three(2)
def test_samples_are_those_of_the_other_way():
  graphdef, params = nnx.split(small_model(), nnx.Param)
  params = nnx.to_pure_dict(params)
  how = dict(key=jax.random.key(0), num=3)
  draw = lambda name: sample.generate(graphdef, params, **how, implementation=name)
  np.testing.assert_array_equal(draw("triton"), draw("xla"))


@pytest.mark.parametrize("cycle", ["fixed", "heads-and-layers"])
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_a_step_lowers_for_a_gpu(cycle):
  layers = CYCLES[cycle]
  model = small_model(attention_layers=layers, num_layers=len(layers), compute_dtype="bfloat16")
  step = lambda model, token, caches: model.decode_step(
    token, 7, caches, run_blocks=triton.run_blocks_of(model.groups, 3)
  )
  h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  how = dict(axis_types=(AxisType.Auto,), abstract_device=h100)
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), **how)):
    traced = jax.jit(step).trace(model, jnp.zeros(3, jnp.int32), model.init_cache(3))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("xla.gpu.triton") >= 5 * len(layers)
