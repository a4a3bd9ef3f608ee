"""What is recorded as the implementation is what a program contains, not what was chosen."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh

from pallas_kernels import api
from pallas_kernels import hardware
from pallas_kernels import mosaic_gpu
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax import evaluate
from sparse_flax import sample
from sparse_flax.model import transformer
from tests.helpers import tiny
from tests.helpers.models import SMALL

LOCAL = patterns.Local(8)


def found(function, *args, **how):
  return api.implementations_in(jax.jit(functools.partial(function, **how)).trace(*args).jaxpr)


def array(dtype="bfloat16", *, heads=2, size=64):
  return jax.ShapeDtypeStruct((1, 256, heads, size), jnp.dtype(dtype))


def attend(x, **how):
  return sparse_attention(x, x, x, **how)


def shapes_of(**model):
  """A model whose weights are shapes only."""
  return nnx.merge(*transformer.graph_and_shapes(**(SMALL | model)))


def h100():
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_each_implementation_is_found_by_its_name():
  for name in api.IMPLEMENTATIONS:
    assert found(attend, array(), pattern=LOCAL, implementation=name) == (name,)
  assert found(lambda x: x, array()) == ()


def test_all_are_found_where_layers_differ():
  both = lambda x: attend(attend(x, implementation="reference"), pattern=LOCAL)
  assert found(both, array()) == ("reference", "xla")


def test_they_are_found_in_loops_and_gradients_and_where_nothing_is_traced_again():
  layer = jax.checkpoint(lambda x, _: (attend(x, pattern=patterns.Strided(8)), None))
  stack = lambda x: jax.lax.scan(layer, x, length=3)[0].astype("float32").sum()
  branches = lambda x: jax.lax.cond(x[0, 0, 0, 0] > 0, stack, lambda x: 0.0, x)
  step = jax.jit(jax.vmap(jax.value_and_grad(branches)))
  for _ in range(2):
    x = jnp.zeros((2, 1, 32, 2, 8))
    assert api.implementations_in(step.trace(x).jaxpr) == ("xla",)


def test_for_a_gpu_float32_is_computed_by_xla_whatever_is_chosen(caplog):
  with h100(), caplog.at_level(logging.ERROR):
    assert api.choose(None) == "mosaic_gpu"
    assert found(attend, array("float32"), pattern=LOCAL) == ("xla",)
    assert found(attend, array("bfloat16"), pattern=LOCAL) == ("mosaic_gpu",)


def test_cudnn_is_named_where_it_is_called(monkeypatch):
  monkeypatch.setattr(hardware, "is_here", lambda: True)
  monkeypatch.setattr(mosaic_gpu, "cudnn_attention", lambda q, k, v, *, scale: q * scale)
  layers = lambda x: attend(attend(x, deterministic=False), pattern=LOCAL)
  with h100():
    assert found(layers, array()) == ("cudnn", "mosaic_gpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_float32_for_a_gpu(dtype, caplog):
  build = dict(seq_len=128, stride=16, position_shape=(8, 16), width=64, implementation=None)
  with h100(), caplog.at_level(logging.ERROR):
    run = lambda model, tokens: model(tokens)
    model = shapes_of(**build, compute_dtype=dtype)
    names = found(run, model, jax.ShapeDtypeStruct((1, 128), jnp.uint8))
  assert names == (("xla",) if dtype == "float32" else ("mosaic_gpu",))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  config = tiny.config(tiny.text_file(tmp_path_factory.mktemp("data") / "text"))
  with config.unlocked():
    config.model.implementation = None
  graphdef, shapes = transformer.graph_and_shapes(**config.model)
  return config, graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_an_evaluation_records_what_computed_it(case, monkeypatch, caplog):
  config, _, params = case
  monkeypatch.setattr(hardware, "platform", lambda: "gpu")
  monkeypatch.setattr(hardware, "compute_capability", lambda: "9.0")
  with caplog.at_level(logging.ERROR):
    result = evaluate.evaluate(config, params, split="test", step=0)
    assert api.choose(None) == "mosaic_gpu" and result["attention"] == "xla"


@pytest.mark.parametrize("length", [0, 30])
def test_sampling_says_what_computes_prompts_and_steps(length, case):
  _, graphdef, params = case
  said, prompts = [], [np.zeros(length, np.uint8)]
  how = dict(key=jax.random.key(0), num=1, prompts=prompts)
  sample.generate(graphdef, params, **how, on_programs=lambda *names: said.append(names))
  assert said == [("xla" if length else "", "xla")]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("name", sample.IMPLEMENTATIONS)
def test_the_kernels_of_a_step_are_found(name):
  build = dict(seq_len=128, stride=16, position_shape=(8, 16), width=256)
  with h100():
    model = shapes_of(**build, attention_layers=("local",), compute_dtype="bfloat16")
    caches = jax.eval_shape(lambda: model.init_cache(2))

    def step(model, token, caches):
      kernels = sample.step_kernels(name)
      run_blocks = kernels and kernels.run_blocks_of(model.groups, 2)
      return model.decode_step(token, 3, caches, run_blocks=run_blocks)

    assert found(step, model, jax.ShapeDtypeStruct((2,), jnp.uint8), caches) == (name,)
