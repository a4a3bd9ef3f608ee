"""The commands as processes of their own, and data in the published formats for them to read."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from sparse_flax.data import audio
from sparse_flax.data import samples
from tests.helpers import data_files
from tests.helpers import pod
from tests.helpers.paths import ROOT

SECONDS = 400  # of one command


def write_data(recipe: str, folder: pathlib.Path, *, pictures: int = 1) -> pathlib.Path:
  """The published format of the recipe's data set, of the package's real bytes.

  Args:
    recipe: of configs.
    folder: is made.
    pictures: different ones of CIFAR-10, a divisor of 50; with 1 all steps have the same batch.
  """
  folder.mkdir()
  if recipe == "cifar10":
    images = np.repeat(samples.cifar10_images()[:pictures], 50 // pictures, axis=0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
      (folder / name).write_bytes(data_files.cifar_bytes(images, np.zeros(50)))
  elif recipe == "enwik8":
    text = samples.enwik8_bytes().tobytes()
    (folder / "enwik8").write_bytes(text * 100)  # exactly 10**8 bytes, as published
  elif recipe == "imagenet64":  # one picture, many times
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

  def train_until(self, text: str, *args) -> str:
    """What `train` said until it was stopped, by SIGTERM once it had said `text`."""
    lines = []
    with self.start("train", *args) as child:
      for line in child.stdout:
        lines.append(line)
        if text in line:
          child.send_signal(signal.SIGTERM)
    said = "".join(lines)
    print(said)
    assert child.returncode == 75 and "STOPPED at step" in said, said
    return said


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """By step, in nats."""
  return {line["step"]: line["loss"] for line in pod.records(workdir) if "loss" in line}
