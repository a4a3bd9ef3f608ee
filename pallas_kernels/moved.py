"""Modules that have moved: `import old.path` still gives the module of the new path.

One table per package, one finder for all: no file is left where a module was.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

PALLAS_KERNELS = {
  "pallas_kernels.bits": "pallas_kernels.lowering.bits",
  "pallas_kernels.blocks": "pallas_kernels.lowering.blocks",
  "pallas_kernels.lists": "pallas_kernels.lowering.lists",
  "pallas_kernels.passes": "pallas_kernels.lowering.passes",
  "pallas_kernels.mosaic_gpu.formula": "pallas_kernels.mosaic_gpu.stream.formula",
  "pallas_kernels.mosaic_gpu.listed": "pallas_kernels.mosaic_gpu.stream.listed",
  "pallas_kernels.decoding": "pallas_kernels.decode.triton",
  "pallas_kernels.decode_cluster": "pallas_kernels.decode.cluster",
  "pallas_kernels.decode_cluster.kernel": "pallas_kernels.decode.cluster.kernel",
  "pallas_kernels.decode_cluster.threads": "pallas_kernels.decode.cluster.ptx",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Answers for old paths only; before others, who would load a second copy of a file below one."""

  def __init__(self):
    self.new_paths: dict[str, str] = {}
    self.specs: dict[str, Any] = {}

  def find_spec(
    self,
    fullname: str,
    path: Any = None,
    target: types.ModuleType | None = None,
  ) -> importlib.machinery.ModuleSpec | None:
    if fullname not in self.new_paths:
      return None
    return importlib.util.spec_from_loader(fullname, self)

  def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
    module = importlib.import_module(self.new_paths[spec.name])
    self.specs[spec.name] = module.__spec__
    return module

  def exec_module(self, module: types.ModuleType) -> None:
    """It has run already. The import system gave it the spec of the old path: put it right."""
    assert module.__spec__ is not None  # the one of the old path
    module.__spec__ = self.specs.pop(module.__spec__.name)


_FINDER = _Finder()
sys.meta_path.insert(0, _FINDER)


def alias(package: str, new_paths: Mapping[str, str]) -> Callable[[str], types.ModuleType]:
  """Makes old module paths importable, and returns a `__getattr__` for the package.

  Args:
    package: whose modules they were.
    new_paths: old full path of each, and where it is now.
  """
  _FINDER.new_paths.update(new_paths)

  def module_of(name: str) -> types.ModuleType:
    if f"{package}.{name}" not in new_paths:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")

  return module_of
