"""The example of docs/data.md runs, and its table is what `experiments.prepare` fetches."""

import re
import runpy

import pytest

from experiments import prepare
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


@pytest.mark.promotes
@pytest.mark.one_day_in_three(2)
def test_the_example_runs(tmp_path, monkeypatch, as_a_user):
  (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  path = tmp_path / "example.py"
  path.write_text(example)
  monkeypatch.chdir(tmp_path)
  result = runpy.run_path(str(path))["result"]
  assert result["data"]["name"] == "arrays" and result["step"] == 2


def test_the_table_has_every_file():
  for known in prepare.SETS.values():
    for file in known.files:
      assert f"| `{file.name}` | {file.num_bytes:,} | `{file.sha256[:12]}` |" in PAGE
