"""Committed results and the documents' tables of them: equal, and each with its origin."""

import json
import re
import shutil

import pytest

from experiments.benchmark import cells
from experiments.benchmark import report
from experiments.benchmark import tables
from tests.helpers.paths import ROOT

RESULTS = sorted((ROOT / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_are_what_the_results_say(path):
  text = path.read_text()
  assert text.count("<!-- table:") == len(tables.BLOCK.findall(text)), "a table without an end"
  assert text == tables.rendered(text), "run python -m experiments.benchmark tables"


def test_every_table_is_somewhere():
  text = "".join(path.read_text() for path in tables.documents())
  assert sorted(name for _, name, _ in tables.BLOCK.findall(text)) == sorted(tables.TABLES)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_are_from(path):
  result = json.loads(path.read_text())
  assert result.keys() >= {"device", "versions", "date", "commit", "rows"}
  assert result["versions"].keys() >= {"jax", "jaxlib", "flax"}
  assert re.match(r"2\d{3}-\d\d-\d\d \d\d:\d\d UTC", result["date"]) and result["rows"]
  assert re.match(r"[0-9a-f]{7}", result["commit"])
  assert path.read_text() == json.dumps(result, indent=1) + "\n"


def test_a_result_is_written_with_its_origin(tmp_path, monkeypatch):
  monkeypatch.delenv("SPARSE_FLAX_COMMIT", raising=False)
  monkeypatch.chdir(tmp_path)  # what counts is the tree that the code is in
  report.write(tmp_path / "x.json", [dict(ms=1.0)], more=2)
  result = json.loads((tmp_path / "x.json").read_text())
  assert result["rows"] == [dict(ms=1.0)] and result["more"] == 2 and "gpu" not in result
  assert result["versions"].keys() >= {"python", "jax", "jaxlib", "flax"}
  assert result["device"].startswith("CPU (")
  if (ROOT / ".git").exists():
    assert re.fullmatch(r"[0-9a-f]{12}( with changes)?", result["commit"])


def test_a_new_result_changes_the_table_and_nothing_else(tmp_path):
  shutil.copy(ROOT / "benchmarks" / "memory_cpu.json", tmp_path)
  path = tmp_path / "memory_cpu.json"
  path.write_text(path.read_text().replace("317656696", "123456789"))
  text = "before\n\n<!-- table: memory -->\n| old |\n<!-- end -->\n\nafter\n"
  new = tables.rendered(text, tmp_path)
  assert new.startswith("before\n\n<!-- table: memory -->\n\n| attention |")
  assert "| dense, `reference` | 1,024 | none | 123.5 MB | 1,015.4 MB |" in new
  assert "(AMD EPYC, 2 cores, JAX 0.11.2, 2026-11-24, commit 012c36a," in new
  assert new.endswith("`benchmarks/memory_cpu.json`.)\n\n<!-- end -->\n\nafter\n")
  assert tables.rendered(new, tmp_path) == new


def test_an_unknown_table_is_refused():
  with pytest.raises(ValueError, match="table: memmory -->: no such table, there are sample,"):
    tables.rendered("<!-- table: memmory -->\n<!-- end -->")


def test_digits():
  numbers = (0.5711, 1.05, 10.94, 999.6, 2_175.5)
  assert [cells.digits(x) for x in numbers] == ["0.57", "1.05", "10.9", "1,000", "2,176"]
  assert cells.digits(0.5251, 4) == "0.525" and cells.digits(27.8629, 4) == "27.86"


def test_a_step_shows_what_was_measured():
  new = dict(body="audio", implementation="ours", attention="sparse", remat="full", batch=1)
  new |= dict(ms=300.04, tokens_per_second=218_422, mfu=0.314, peak_gb=7.254321, over_ours=1.0)
  peer = new | dict(implementation="pytorch", ms=600.0, peak_gb=None, over_ours=2.0)
  peer |= dict(attention="dense")
  failed = dict(body="audio", implementation="baseline", attention="sparse", remat="full", batch=1)
  failed |= dict(ms=None, error="out of memory")
  result = dict(rows=[new | dict(ours_share=0.089), peer, failed], bodies={}, baseline="f5fca96")
  header, row, other, last = cells.step(result)
  assert header[4:] == [
    "ms", "tokens/s", "MFU", "peak memory", "in our kernels", "this / ours",
  ]  # fmt: skip
  assert row[:4] == ["audio, 1", "ours", "sparse", "full"]
  assert row[4:] == ["300.0", "218,422", "31 %", "7.3 GB", "9 %", "1.00"]
  assert other[1:3] == ["PyTorch", "dense"] and other[4:] == [
    "600.0",
    "218,422",
    "31 %",
    "",
    "",
    "2.00",
  ]
  assert last[1] == "commit f5fca96" and last[4:] == [""] * 6
  header, row = cells.step(result | dict(rows=[new]))
  assert header[2] == "`remat`" and row[2] == "full"  # which all have the same attention
