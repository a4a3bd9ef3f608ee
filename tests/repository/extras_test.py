"""What is installed: the core imports without any extra, and what an extra lacks is said."""

import re
import subprocess
import sys
import tomllib

import pytest

from sparse_flax import extras
from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"PIL": "pillow", "etils.epath": "etils", "orbax.checkpoint": "orbax-checkpoint"}
NOT_IN_CORE = (
  "PIL", "chex", "matplotlib", "ml_collections", "plotly", "safetensors", "tensorboardX",
  "tensorflow_datasets",
)  # fmt: skip


def names(requirements: list[str]) -> set[str]:
  return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


@pytest.mark.parametrize("extra", extras.MODULES)
def test_what_tells_of_an_extra_is_installed_by_it(extra):
  installed = names(PROJECT["optional-dependencies"][extra])
  for module in extras.MODULES[extra]:
    assert PACKAGES.get(module, module).lower().replace("_", "-") in installed


def test_the_promised_packages_are_required():
  required = names(PROJECT["dependencies"])
  for extra in ("train", "data", "view"):
    required |= names(PROJECT["optional-dependencies"][extra])
  promised = "jax flax optax orbax-checkpoint tensorflow-datasets ml-collections chex"
  assert required >= set(promised.split())
  assert "pytest" in names(PROJECT["optional-dependencies"]["test"])


def test_the_core_imports_without_extras_and_the_rest_names_its_own():
  script = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_IN_CORE}))  # as if they were not installed
import pallas_kernels
assert "flax" not in sys.modules
import sparse_flax, sparse_flax.linen, sparse_flax.sample
assert sparse_flax.__version__ == pallas_kernels.__version__
import importlib
for name in ("data", "train", "run", "evaluate", "export", "sample.files", "view", "view.masks"):
  try:
    importlib.import_module("sparse_flax." + name)
  except ImportError as error:
    print(type(error).__name__, error)
"""
  command = [sys.executable, "-c", script]
  said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  lines = said.splitlines()
  assert len(lines) == 8 and all(
    line.startswith("MissingExtraError sparse_flax.") for line in lines
  )
  assert (
    "data needs PIL, tensorflow_datasets: pip install 'sparse-flax[data]', or [all]" in lines[0]
  )
  train = "needs chex, ml_collections, safetensors, tensorboardX: pip install 'sparse-flax[train]'"
  assert all(train in line for line in lines[1:6])
  assert lines[6] == lines[7] and "PIL, matplotlib, plotly: pip install 'sparse-flax[view]'" in said
