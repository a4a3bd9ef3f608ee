"""A function is traced once: what a trace imports must not change the context it was traced in."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

_HEAD = """
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh

num_traces = 0


def counted(function):
  def run(*args):
    global num_traces
    num_traces += 1
    return function(*args)

  return run


def h100():
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def program(function, *args):
  # The kernels' own code among it; what these are lowered to has names that count up.
  with h100():
    traced = function.trace(*args)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    return str(traced.jaxpr)
"""


def run(source: str) -> None:
  """In a new interpreter, where no kernel has been imported."""
  child = subprocess.run(
    [sys.executable, "-c", _HEAD + source], cwd=ROOT, capture_output=True, text=True
  )
  assert child.returncode == 0, child.stderr


def test_a_call_under_a_users_jit_is_traced_at_most_twice_to_the_same_program():
  run("""
from pallas_kernels import patterns
from pallas_kernels import sparse_attention

x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
attend = lambda x: sparse_attention(
  x, x, x, pattern=patterns.Local(128), implementation="mosaic_gpu")
attend = jax.jit(counted(attend))
assert len({program(attend, x) for _ in range(3)}) == 1
assert num_traces <= 2, num_traces
""")


def test_a_training_step_is_traced_once():
  run("""
from configs import cifar10
from sparse_flax import train

config = cifar10.get_config().copy_and_resolve_references()
with config.unlocked():
  config.model.update(num_layers=4, implementation="mosaic_gpu")
with h100():  # the first place that knows the device
  init, step = train.make_step(config)
key = jax.random.key(0)
args = jax.eval_shape(init, key), jax.ShapeDtypeStruct((2, 3_072), jnp.uint8), key
step = jax.jit(counted(step))
assert len({program(step, *args) for _ in range(2)}) == 1
assert num_traces == 1, num_traces
""")


@pytest.mark.one_day_in_six(0)
@pytest.mark.smoke("mosaic_gpu", daily=0)
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_training_goes_on_after_its_first_step_with_simulated_kernels(implementation, tmp_path):
  """What lowering imports must not change the context either; train refuses a second trace."""
  changes = {
    "model.implementation": implementation,
    "model.compute_dtype": "bfloat16",
    "model.seq_len": 64,
    "model.width": 64,
    "model.num_heads": 2,
    "model.num_layers": 1,
    "model.attention_layers": ("local",),
    "model.summary_width": 0,
    "model.stride": 16,
    "model.position_shape": (4, 16),
    "data.batch_size": 1,
    "train.steps": 3,
    "train.log_every": 1,
    "eval.min_context": 0,
    "eval.monitor_batches": 1,
    "eval.pictures": 0,
  }
  command = [sys.executable, "-m", "experiments.train", "--config=configs/enwik8.py:quick"]
  command += [f"--config.{field}={value}" for field, value in changes.items()]
  command += [f"--workdir={tmp_path / 'run'}"]
  child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert child.returncode == 0, child.stderr
  assert f"attention by {implementation}, remat none\n" in child.stdout
  assert "step 3/3" in child.stdout
