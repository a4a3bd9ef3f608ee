"""The README's examples run, and the files and commands that it names exist."""

import re
import runpy

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RESULTS = [
  ("y", (2, 1000, 256)),
  ("lse", (1, 4096, 8)),
  ("drawn", (2, 64)),
  ("out", (1, 256, 2, 16)),
]


@pytest.mark.promotes
@pytest.mark.parametrize("number", range(len(RESULTS)))
def test_examples_run(number, tmp_path, as_a_user):
  path = tmp_path / "example.py"
  path.write_text(EXAMPLES[number])
  name, shape = RESULTS[number]
  assert runpy.run_path(str(path))[name].shape == shape


def test_there_are_examples():
  assert len(EXAMPLES) == len(RESULTS)


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (experiments\.\w+)", README))))
def test_commands_exist(module):
  path = ROOT / module.replace(".", "/")
  assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize(
  "path", sorted(set(re.findall(r"(?:configs|docs|benchmarks|experiments)/[\w/]+\.\w+", README)))
)
def test_files_exist(path):
  assert (ROOT / path).exists()
