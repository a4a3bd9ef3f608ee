"""The commands on a GPU, with the recipes as they are: full width, kernels that nobody named.

Each case is a run: train, stop by SIGTERM, go on, evaluate, sample, visualize, export, every
command a process of its own. Only batch, steps and warm-up are less than the recipe's.
"""

import math
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.helpers import commands as commands_lib

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
STEPS = 24
# config: sequences per step, and what is written for it.
RUNS = {
  "cifar10": 8,
  "cifar10:fixed": 8,
  "cifar10:dense": 8,
  "enwik8": 2,
  "enwik8:strided": 2,
  "enwik8:dense": 2,
  "imagenet64": 2,
  "audio": 1,
}
# The recipes have all of their layers, variants as many as compile quickly.
VARIANT_LAYERS = 8
# 12,288 steps, each with dense caches of 12,288 rows in 30 layers, take minutes; cifar10:dense runs
# the same code.
NOT_SAMPLED = {"enwik8:dense"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_training_to_export(name, tmp_path):
  recipe, batch, workdir = name.partition(":")[0], RUNS[name], tmp_path / "run"
  data = commands_lib.write_data(recipe, tmp_path / "data")
  commands = commands_lib.Commands(tmp_path / "cache")
  changes = {
    "data.path": data,
    "data.batch_size": batch,
    "train.steps": STEPS,
    "train.log_every": 1,
    "optim.warmup_steps": 1,
    "eval.monitor_batches": 2,
  }
  if ":" in name:
    changes["model.num_layers"] = VARIANT_LAYERS
  training = [f"--config=configs/{recipe}.py{name.removeprefix(recipe)}", f"--workdir={workdir}"]
  training += [f"--config.{field}={value}" for field, value in changes.items()]

  said = commands.train_until(f"step 4/{STEPS}", *training)
  assert "attention by mosaic_gpu, blocks by mosaic_gpu, remat hidden\n" in said
  said = commands("train", *training)
  assert "RESUMING" in said
  losses = {step: nats / math.log(2) for step, nats in commands_lib.losses(workdir).items()}
  assert list(losses) == list(range(1, STEPS + 1))
  assert losses[1] == pytest.approx(8.0, abs=1e-5)
  assert losses[STEPS] <= losses[1] - 0.1, losses

  said = commands("evaluate", f"--workdir={workdir}", "--split=validation", "--min_context=0")
  assert "attention mosaic_gpu" in said
  if name not in NOT_SAMPLED:
    said = commands("sample", f"--workdir={workdir}", "--num=2")
    assert "attention of the steps by" in said
    assert pathlib.Path(said.splitlines()[-1]).is_file()
  said = commands("visualize", f"--workdir={workdir}", "--num=1", "--examples=2")
  pictures = [pathlib.Path(line) for line in said.splitlines() if line.startswith(str(workdir))]
  assert "report.html" in [path.name for path in pictures]
  assert all(path.stat().st_size for path in pictures)

  commands("export", f"--workdir={workdir}", f"--out={tmp_path / 'export'}")
  weights = safetensors.numpy.load_file(tmp_path / "export" / "model.safetensors")
  assert all(np.isfinite(x).all() for x in weights.values())


def test_the_quickstart(tmp_path):
  said = commands_lib.Commands(tmp_path / "cache")("quickstart", f"--workdir={tmp_path / 'run'}")
  assert "Done in" in said
