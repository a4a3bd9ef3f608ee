"""The README's examples run, and the files and commands that it names exist."""

import pathlib
import re
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.promotes
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, tmp_path, as_a_user):
  path = tmp_path / "example.py"
  path.write_text(EXAMPLES[number])
  names = runpy.run_path(str(path))
  assert ("y" in names and names["y"].shape == (2, 1000, 256)) or names["lse"].shape == (1, 4096, 8)


def test_there_are_examples():
  assert len(EXAMPLES) == 2


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (experiments\.\w+)", README))))
def test_commands_exist(module):
  path = ROOT / module.replace(".", "/")
  assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize(
  "path", sorted(set(re.findall(r"(?:configs|docs|benchmarks)/[\w/]+\.\w+", README)))
)
def test_files_exist(path):
  assert (ROOT / path).exists()
