"""Every result that the documents quote is that of a run whose files are kept."""

import json
import re

import pytest

from tests.helpers.paths import ROOT

RUNS = ROOT / "benchmarks" / "runs"
ROWS = re.findall(
  r"^\| .* \| ([\d.]+)M \| ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+)M \| `([\w.,=-]+)` \|$",
  (ROOT / "docs" / "results.md").read_text(),
  re.MULTILINE,
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1])
def test_a_row_is_what_the_run_gave(row):
  _, bits, error, seconds, tokens, name = row
  result = json.loads((RUNS / name / "evaluation.json").read_text())
  assert bits == f"{result['bits_per_byte']:.3f}" and error == f"{result['standard_error']:.3f}"
  assert seconds == f"{result['seconds']:.0f}" and tokens == f"{result['tokens'] / 1e6:.0f}"
  assert (RUNS / name / "metrics.jsonl").stat().st_size and (RUNS / name / "config.json").exists()


def test_every_run_has_its_row():
  assert {row[-1] for row in ROWS} == {folder.name for folder in RUNS.iterdir()}


def test_the_readme_quotes_the_best_of_the_record_recipe():
  (quoted,) = re.findall(r"`:record`.* \| ([\d.]+) \(", (ROOT / "README.md").read_text())
  best = min(float(row[1]) for row in ROWS)
  assert abs(float(quoted) - best) <= 0.005
