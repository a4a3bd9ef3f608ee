"""The commands on a GPU, with the recipes as they are: full width, kernels that nobody named.

Each case is a run: train, stop by SIGTERM, go on, evaluate, sample, visualize, export, every
command a process of its own. Only batch, steps and warm-up are less than the recipe's.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from sparse_flax.data import audio
from sparse_flax.data import samples
from tests.helpers import data_files
from tests.helpers.paths import ROOT

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
STEPS = 24
SECONDS = 400  # of one command
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
# 12,288 steps, each with dense caches of 12,288 rows in 30 layers, take minutes; cifar10:dense runs
# the same code.
NOT_SAMPLED = {"enwik8:dense"}


def write_data(recipe: str, folder: pathlib.Path) -> pathlib.Path:
  """The published format of the recipe's data set, of the package's real bytes."""
  folder.mkdir()
  # Of pictures one, many times, so that all steps have the same batch.
  if recipe == "cifar10":
    images = np.repeat(samples.cifar10_images()[:1], 50, axis=0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
      (folder / name).write_bytes(data_files.cifar_bytes(images, np.zeros(50)))
  elif recipe == "enwik8":
    text = samples.enwik8_bytes().tobytes()
    (folder / "enwik8").write_bytes(text * 100)  # exactly 10**8 bytes, as published
  elif recipe == "imagenet64":
    picture = data_files.png(data_files.images_of_64(1)[0])
    for split in ("train", "valid"):
      files = {f"{split}_64x64/{n:07d}.png": picture for n in range(20)}
      data_files.write_tar(folder / f"{split}_64x64.tar", files)
  else:
    codes = samples.violin_codes()
    for n in range(4):  # one recording each for validation and test
      audio.write_wav(folder / f"piece {n}.wav", audio.mu_law_decode(np.roll(codes, n * 9_999)))
  return folder


class Commands:
  """Runs `python -m experiments.NAME` and keeps what it printed."""

  def __init__(self, cache: pathlib.Path):
    self.environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(cache),  # going on needs the same program again
      "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
      "PYTHONUNBUFFERED": "1",
    }
    for name in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION"):  # of tests, not of users
      self.environment.pop(name, None)

  def start(self, name: str, *args) -> subprocess.Popen:
    command = [sys.executable, "-m", f"experiments.{name}", *map(str, args)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipe)

  def __call__(self, name: str, *args) -> str:
    start = time.monotonic()
    child = self.start(name, *args)
    said, _ = child.communicate(timeout=SECONDS)
    print(f"$ {name} {' '.join(map(str, args))}  [{time.monotonic() - start:.0f} s]\n{said}")
    assert child.returncode == 0, said
    return said


def bits(workdir: pathlib.Path) -> dict[int, float]:
  """The loss of every step, in bits."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] / math.log(2) for line in lines if "loss" in line}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_from_training_to_export(name, tmp_path):
  recipe, batch, workdir = name.partition(":")[0], RUNS[name], tmp_path / "run"
  data, commands = write_data(recipe, tmp_path / "data"), Commands(tmp_path / "cache")
  changes = {
    "data.path": data,
    "data.batch_size": batch,
    "train.steps": STEPS,
    "train.log_every": 1,
    "optim.warmup_steps": 1,
    "eval.monitor_batches": 2,
  }
  training = [f"--config=configs/{recipe}.py{name.removeprefix(recipe)}", f"--workdir={workdir}"]
  training += [f"--config.{field}={value}" for field, value in changes.items()]

  lines = []
  with commands.start("train", *training) as child:
    for line in child.stdout:
      lines.append(line)
      if f"step 4/{STEPS}" in line:
        child.send_signal(signal.SIGTERM)
  said = "".join(lines)
  print(said)
  assert child.returncode == 75 and "STOPPED at step" in said, said
  assert "attention by mosaic_gpu, blocks by mosaic_gpu\n" in said
  said = commands("train", *training)
  assert "RESUMING" in said
  losses = bits(workdir)
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
  said = Commands(tmp_path / "cache")("quickstart", f"--workdir={tmp_path / 'run'}")
  assert "Done in" in said
