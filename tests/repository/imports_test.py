"""The rooms: data flows configs -> experiments -> sparse_flax -> pallas_kernels, and inside the two
libraries each room imports only rooms that are listed before it."""

import importlib
import subprocess
import sys

import pytest

import sparse_flax
from pallas_kernels import moved as kernels_moved
from sparse_flax import moved
from tests.helpers.paths import ROOT
from tests.repository import figures

HOUSE = ("pallas_kernels", "sparse_flax", "configs", "experiments")
MAY_IMPORT = {
  "pallas_kernels": {"pallas_kernels"},
  "sparse_flax": {"pallas_kernels", "sparse_flax"},
  "configs": {"configs"},
  "experiments": {"pallas_kernels", "sparse_flax", "experiments"},
}
# Modules and rooms of each library: nothing imports what comes after it.
ORDER = {
  "pallas_kernels": (
    "moved", "hardware", "patterns", "functions", "scores", "tuning", "lowering", "protocol",
    "offset", "segments", "reference", "partitioning", "selection", "xla", "mosaic_gpu",
    "mosaic_tpu", "decode", "api", "residual",
  ),
  "sparse_flax": (
    "moved", "extras", "parallel", "model", "data", "run", "export", "evaluate", "train", "view",
    "sample", "linen",
  ),
}  # fmt: skip


NEW_PATHS = moved.NEW_PATHS | kernels_moved.PALLAS_KERNELS


def files():
  return [path for part in HOUSE for path in figures.files(part)]


def room(name: str) -> str:
  """The part of a library that a full name lies in; "" is the face of the library itself."""
  parts = name.split(".")
  return parts[1] if len(parts) > 1 and parts[1] in ORDER[parts[0]] else ""


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
  part = path.relative_to(ROOT).parts[0]
  own = room(figures.module_name(path)) if part in ORDER else ""
  for name in figures.imported(path):
    top = name.partition(".")[0]
    assert top not in HOUSE or top in MAY_IMPORT[part], f"{path} imports {name}"
    if part == "configs":
      assert top in ("configs", "ml_collections", "math"), f"{path} imports {name}"
    if part == "pallas_kernels":
      assert top not in ("flax", "ml_collections", "optax"), f"{path} imports {name}"
    if part in ORDER:
      launching = name.startswith(("absl.flags", "absl.app", "argparse"))
      assert not launching, f"{path} imports {name}: libraries know no flags"
    if part == top and own:
      other = room(name)
      assert other, f"{path} imports {name} from the face of its own library"
      assert ORDER[part].index(other) <= ORDER[part].index(own), f"{path} imports {name}"


@pytest.mark.parametrize("library", ORDER)
def test_every_room_is_listed(library):
  there = {
    path.stem for path in (ROOT / library).iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
  }  # fmt: skip
  assert there - {"__init__"} == set(ORDER[library])


@pytest.mark.parametrize("old", NEW_PATHS)
def test_old_paths_give_the_modules_of_the_new_ones(old):
  new = importlib.import_module(NEW_PATHS[old])
  assert importlib.import_module(old) is new
  assert new.__spec__.name == new.__name__ == NEW_PATHS[old]
  package, _, name = old.rpartition(".")
  assert getattr(importlib.import_module(package), name) is new


def test_an_unknown_name_is_none_of_the_package():
  with pytest.raises(AttributeError, match="'sparse_flax' has no attribute 'no_such_name'"):
    _ = sparse_flax.no_such_name
  with pytest.raises(ImportError):
    importlib.import_module("sparse_flax.no_such_name")


def test_the_libraries_load_no_backend_of_kernels():
  script = """
import sys
import flax.nnx, jax, optax, jaxtyping
before = set(sys.modules)
import pallas_kernels, sparse_flax
new = set(sys.modules) - before
print(*sorted(name for name in new if "mosaic" in name or "triton" in name or "pallas." in name))
"""
  done = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == []
