"""The site's reference has every public name."""

import importlib
import inspect
import pkgutil
import re

import pytest

import sparse_flax
from tests.helpers.paths import ROOT

PAGES = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
ENTRIES = re.findall(r"(?:auto\w+|py:data):: (\S+)", PAGES)
NOT_FOR_USERS = {"extras", "moved"}  # which extra an import lacks, where old imports lead
PUBLIC = (
  "pallas_kernels", "pallas_kernels.patterns", "pallas_kernels.residual", "sparse_flax",
  *(f"sparse_flax.{x.name}" for x in pkgutil.iter_modules(sparse_flax.__path__)
    if x.name not in NOT_FOR_USERS),
)  # fmt: skip


def public(module) -> dict:
  """What `__all__` lists, else the functions and classes that the module or its files define."""
  if names := getattr(module, "__all__", None):
    return {name: getattr(module, name) for name in names}
  own = lambda x: getattr(x, "__module__", "").startswith(module.__name__)
  kinds = (inspect.isfunction, inspect.isclass)
  return {
    name: value
    for name, value in vars(module).items()
    if name[0] != "_" and any(kind(value) for kind in kinds) and own(value)
  }


def entry(name: str):
  module, _, attribute = name.rpartition(".")
  found = getattr(importlib.import_module(module), attribute, None)
  return importlib.import_module(name) if found is None else found


@pytest.fixture(scope="module")
def entries() -> list:
  return [entry(name) for name in ENTRIES]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_entry(name, entries):
  missing = [
    f"{name}.{x}"
    for x, value in public(importlib.import_module(name)).items()
    if not any(value is one for one in entries) and getattr(value, "__name__", "") not in PUBLIC
  ]
  assert missing == []


def test_no_entry_is_there_twice():
  assert len(ENTRIES) == len(set(ENTRIES))
