"""Nothing that is read can run: no pickle, no eval, and names that stay where they belong."""

import ast
import stat

import pytest

from experiments import cli
from sparse_flax.run import checkpoint
from tests.helpers.paths import ROOT

FILES = sorted(
  path for folder in ("configs", "experiments", "pallas_kernels", "sparse_flax", "tests")
  for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("*.py"))  # fmt: skip
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "torch"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"extractall", "deserialize_and_load"}
FUNCTIONS = {"os.system", "torch.load"}
STEPS = ROOT / "experiments/benchmark/gpu/steps"
PEERS = tuple(
  STEPS / f"{name}.py" for name in ("pytorch", "flex_attention", "flex_blocks")
)  # which compute, and read nothing


def offences(tree: ast.AST, calls: set[str] = CALLS, modules: set[str] = MODULES) -> list[str]:
  found = []
  for node in ast.walk(tree):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    found += [name for name in names if modules & set(name.split("."))]
    if not isinstance(node, ast.Call):
      continue
    function = node.func
    if isinstance(function, ast.Name) and function.id in calls:
      found.append(function.id)
    if isinstance(function, ast.Attribute) and function.attr in METHODS:
      found.append(function.attr)
    if ast.unparse(function) in FUNCTIONS:
      found.append(ast.unparse(function))
    for keyword in node.keywords:
      constant = isinstance(keyword.value, ast.Constant) and keyword.value.value
      if keyword.arg in ("allow_pickle", "shell") and constant:
        found.append(keyword.arg)
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_read_from_data(path):
  # Tests run the examples of the documentation.
  calls = CALLS - {"exec", "compile"} if path.is_relative_to(ROOT / "tests") else CALLS
  modules = MODULES - {"torch"} if path in PEERS else MODULES
  assert offences(ast.parse(path.read_text()), calls, modules) == []


@pytest.mark.parametrize(
  "text",
  [
    "import pickle",
    "from cloudpickle import loads",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'eval')",
    "__import__('os')",
    "import torch",
    "os.system('ls')",
    "serialize_executable.deserialize_and_load(x)",
    "np.load(path, allow_pickle=True)",
    "archive.extractall(folder)",
    "subprocess.run('ls', shell=True)",
  ],
)
def test_the_ban_bans(text):
  assert offences(ast.parse(text))


@pytest.mark.parametrize(
  "filename", ["configs/cifar10.py:../outside", "../../x.py:/etc", "..:..", "a.py:b\\..\\c", ":"]
)
def test_the_name_of_a_run_is_one_folder_of_runs(filename, tmp_path):
  name = cli.run_name(filename)
  assert (tmp_path / name).resolve().parent == tmp_path.resolve() and name not in ("", ".", "..")


def test_checkpoints_hold_no_code(tmp_path):
  import jax.numpy as jnp

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    weights = {"a": jnp.ones(3)}
    checkpoints.save({"step": jnp.int32(1), "params": weights, "ema": weights})
  for path in (tmp_path / "checkpoints").rglob("*"):
    if path.is_file():
      assert path.suffix not in (".pkl", ".pickle", ".py", ".so")
      assert not path.read_bytes().startswith((b"\x80\x04", b"\x80\x05")), "a pickle"
      assert not path.stat().st_mode & stat.S_IXUSR
