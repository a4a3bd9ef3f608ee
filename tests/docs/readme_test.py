"""The README's example runs, and the files and commands that it names exist."""

import re
import runpy

import pytest

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\]\(([^)#:]+)(?:#([\w-]+))?\)", README)


@pytest.mark.promotes
def test_the_example_runs(tmp_path, as_a_user):
  (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  path = tmp_path / "example.py"
  path.write_text(example)
  found = runpy.run_path(str(path))
  assert found["lse"].shape == (1, 4096, 8) and found["y"].shape == (2, 1000, 256)


def test_it_is_short():
  assert len(README.split()) < 1_200


@pytest.mark.parametrize(("path", "anchor"), sorted(set(LINKS)))
def test_links_lead_somewhere(path, anchor):
  assert (ROOT / path).exists()
  if anchor:
    headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
    assert anchor in [re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (experiments\.\w+)", README))))
def test_commands_exist(module):
  path = ROOT / module.replace(".", "/")
  assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize(
  "path", sorted(set(re.findall(r"(?:configs|docs|benchmarks|experiments)/[\w/]+\.\w+", README)))
)
def test_files_exist(path):
  assert (ROOT / path).exists()
