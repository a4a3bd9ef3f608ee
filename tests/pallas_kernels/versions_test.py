"""Which kernels run where: by device and release of JAX, and what is imported for them."""

import importlib
import json
import logging
import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh

from pallas_kernels import api
from pallas_kernels import hardware
from sparse_flax import sample
from tests.helpers.models import small_model
from tests.helpers.paths import ROOT

# `sample.generate` is the function, of which this is the module.
generation = importlib.import_module("sparse_flax.sample.generate")
BAD = "mosaic_gpu: known to fail with JAX {}: a name is gone"


def gpu(kind="NVIDIA H100 80GB HBM3"):
  device = AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.fixture(autouse=True)
def nothing_said():
  for said in (api._say_once, generation._say_once, hardware._warn_of_version):
    said.cache_clear()


def model():
  return nnx.eval_shape(lambda: small_model(width=256, compute_dtype="bfloat16", ff_mult=2.0))


def test_on_a_gpu_kernels_of_attention_and_of_steps_are_taken():
  with gpu():
    assert api.choose(None) == "mosaic_gpu"
    assert sample.best(model(), 2) in ("cluster", "triton")
  assert api.choose(None) == sample.best(model(), 2) == "xla"


def test_a_release_that_is_known_to_be_bad_has_no_kernels(monkeypatch, caplog):
  monkeypatch.setattr(hardware, "KNOWN_BAD_JAX", {jax.__version__: "a name is gone"})
  reason = BAD.format(jax.__version__)
  with gpu(), caplog.at_level(logging.WARNING):
    assert api.choose(None) == api.choose(None) == "xla"
    assert [record.message for record in caplog.records] == [f"{reason}; xla computes it"]
    assert sample.best(model(), 2) == "xla"
    for refused in (api.choose, api.load_backend):
      with pytest.raises(NotImplementedError, match=reason):
        refused("mosaic_gpu")
    for name in ("cluster", "mosaic_gpu"):  # what it was called before
      with pytest.raises(NotImplementedError, match=f"{name}: known to fail"):
        sample.step_kernels(name)
    with pytest.raises(NotImplementedError, match="triton: known to fail"):
      sample.step_kernels("triton")
  with pytest.raises(NotImplementedError, match=reason):
    api.choose("mosaic_gpu")  # the simulator is of the same release


def test_the_kernel_of_a_step_is_refused_where_there_is_no_gpu():
  with pytest.raises(NotImplementedError, match="not on cpu"):
    sample.step_kernels("mosaic_gpu")


def test_a_release_that_ran_on_no_gpu_runs_after_one_warning(monkeypatch, caplog):
  monkeypatch.setattr(hardware, "RAN_ON_A_GPU", ("0.1.2", "0.1.3"))
  with gpu(), caplog.at_level(logging.WARNING):
    for _ in range(2):
      assert api.choose(None) == "mosaic_gpu"
      assert sample.step_kernels("triton") and sample.step_kernels("mosaic_gpu")
  (record,) = caplog.records
  assert f"with JAX 0.1.2, 0.1.3; with JAX {jax.__version__}" in record.message


def test_a_release_that_ran_on_a_gpu_runs_in_silence(monkeypatch, caplog):
  monkeypatch.setattr(hardware, "RAN_ON_A_GPU", (jax.__version__,))
  with gpu(), caplog.at_level(logging.WARNING):
    assert api.choose(None) == "mosaic_gpu"
  assert not caplog.records


@pytest.mark.parametrize(
  ("kind", "capability"),
  [("NVIDIA H200", "9.0"), ("NVIDIA GH200 480GB", "9.0"), ("NVIDIA A100-SXM4-40GB", "unknown")],
)
def test_the_capability_of_a_gpu_that_is_not_here_is_in_its_name(kind, capability):
  with gpu(kind):
    assert hardware.compute_capability() == capability
    assert api.choose(None) == ("mosaic_gpu" if capability == "9.0" else "xla")
    if capability == "unknown":
      for refused in (api.choose, sample.step_kernels):
        with pytest.raises(NotImplementedError, match="made for compute capability 9"):
          refused("mosaic_gpu")


def test_the_packages_import_no_kernels():
  """Nor what they are written in, beyond what the requirements import themselves."""
  source = """
import json, sys
import chex, flax.linen, flax.nnx, jax, jax.numpy, jaxtyping, ml_collections, numpy, optax
import orbax.checkpoint
before = set(sys.modules)
import pallas_kernels, sparse_flax, sparse_flax.sample, sparse_flax.train
print(json.dumps(sorted(set(sys.modules) - before)))
"""
  child = [sys.executable, "-c", source]
  out = subprocess.run(child, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  ours, theirs = [], []
  for name in json.loads(out.splitlines()[-1]):
    (ours if name.startswith(("pallas_kernels", "sparse_flax")) else theirs).append(name)
  assert {"pallas_kernels", "sparse_flax.train"} <= set(ours)
  kernels = ("pallas_kernels.mosaic_", "pallas_kernels.decod", "sparse_flax.sample.cluster")
  assert not [name for name in ours if name.startswith(kernels)]
  written_in = ("pallas", "mosaic", "mlir", "triton")
  assert not [name for name in theirs if any(part in name for part in written_in)]
