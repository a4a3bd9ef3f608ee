"""The programs of examples/, as people start them: their losses fall and their files are there."""

import ast
import os
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from sparse_flax import data
from tests.helpers import data_files
from tests.helpers.paths import ROOT

EXAMPLES = ("images", "language_model", "long_audio")
LIBRARY = {"sparse_flax", "jax", "flax", "optax", "numpy"}
MOST_LINES = 260


def start(name, *flags):
  command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, flags)]
  quick = dict(PYTHONPATH=str(ROOT), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  how = dict(env=os.environ | quick, capture_output=True, text=True, timeout=300)
  return subprocess.run(command, check=False, **how)


def check_losses(name, *flags):
  """Those of the log, and that of what was held out, fall from what chance has."""
  done = start(name, *flags)
  assert done.returncode == 0, done.stderr
  found = [float(x) for x in re.findall(r"(\d+\.\d+) bits/(?:byte|dim)", done.stdout)]
  assert len(found) >= 3 and found[0] == 8.0 and max(found[-2:]) < 7.9, done.stdout


@pytest.mark.one_day_in_six(0)
def test_a_language_model_of_ones_own_text(tmp_path):
  (tmp_path / "text").write_bytes(b"the same again and again, " * 200)
  out = tmp_path / "sample.txt"
  flags = [f"--text={tmp_path / 'text'}", "--steps=8", "--prompt=the same", f"--out={out}"]
  check_losses("language_model", *flags)
  assert out.read_bytes().startswith(b"the same") and out.stat().st_size == 256


@pytest.mark.one_day_in_six(0)
def test_a_model_of_ones_own_pictures(tmp_path):
  (tmp_path / "pictures").mkdir()
  for n in range(40):
    picture = np.full((12, 20, 3), 100 + 50 * (n % 2), np.uint8)
    (tmp_path / "pictures" / f"{n}.png").write_bytes(data_files.png(picture))
  out = tmp_path / "samples.png"
  flags = [f"--folder={tmp_path / 'pictures'}", "--size=8", "--steps=30", "--num=2", f"--out={out}"]
  check_losses("images", *flags)
  with PIL.Image.open(out) as picture:
    assert picture.size == (2 * 100 + 4, 2 * 100 + 4)  # of 8 pixels, 12 times enlarged


@pytest.mark.one_day_in_six(1)
def test_a_model_of_ones_own_recordings(tmp_path):
  time = np.arange(12_000) / data.SAMPLE_RATE
  data.write_wav(tmp_path / "tone.wav", 0.5 * np.sin(880 * np.pi * time))
  out = tmp_path / "sample.wav"
  flags = [f"--folder={tmp_path}", "--length=512", "--steps=8", "--seconds=0.02", f"--out={out}"]
  check_losses("long_audio", *flags)
  samples, rate = data.read_wav(out)
  assert rate == data.SAMPLE_RATE and samples.shape == (512, 1)
  # What is given is the end of the tone, by its codes of 8 bits.
  np.testing.assert_allclose(
    samples[:272, 0], 0.5 * np.sin(880 * np.pi * time[10_800:11_072]), atol=0.02
  )


def test_a_mistake_is_one_line(tmp_path):
  done = start("language_model", f"--text={tmp_path / 'no' / 'where'}")
  assert done.returncode == 1 and done.stdout == ""
  assert done.stderr == f"--text: data.path='{tmp_path}/no/where': no such file or folder\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_needs_only_what_is_installed(name):
  source = (ROOT / "examples" / f"{name}.py").read_text()
  assert len(source.splitlines()) <= MOST_LINES
  imported = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      imported.add(node.module.partition(".")[0])
    elif isinstance(node, ast.Import):
      imported |= {alias.name.partition(".")[0] for alias in node.names}
  assert imported <= LIBRARY | sys.stdlib_module_names


def test_all_examples_are_tried():
  assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)
