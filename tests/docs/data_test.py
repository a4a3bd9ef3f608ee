"""The table of docs/data.md is what `experiments.prepare` fetches."""

from experiments import prepare
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


def test_the_table_has_every_file():
  for known in prepare.SETS.values():
    for file in known.files:
      assert f"| `{file.name}` | {file.num_bytes:,} | `{file.sha256[:12]}` |" in PAGE
