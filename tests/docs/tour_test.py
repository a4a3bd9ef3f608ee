"""The notebook experiments/tour.ipynb runs from end to end, and is kept as executed.

After a change, `python -m tests.docs.tour_test` executes it in place.
"""

import importlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests.helpers.paths import ROOT

PATH = ROOT / "experiments" / "tour.ipynb"
SIZE = 1_500_000  # bytes; GitHub shows it in full


def read():
  notebook = nbformat.read(PATH, as_version=4)
  nbformat.validate(notebook)
  return notebook


def execute(notebook, folder):
  """Runs all cells in a kernel of their own, started in `folder`."""
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    kernel_name="python3",
    coalesce_streams=True,
    record_timing=False,
    resources={"metadata": {"path": str(folder)}},
  ).execute()


def code_cells(notebook):
  return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def pictures(cell):
  return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def said(cell):
  return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def check_outputs(cells):
  """What both the file and a run from scratch must show; a run of any length."""
  assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
  for cell in cells.values():
    problems = [x for x in cell.outputs if x.output_type == "error" or x.get("name") == "stderr"]
    assert not problems, f"{cell.id}: {problems}"
  for name in ("draw", "combine", "keys", "weights", "config", "sample", "complete", "visualize"):
    assert pictures(cells[name]), name
  assert re.search(r"^strided +reaches 100%", said(cells["reach"]), re.MULTILINE)
  assert "8.0000 bits per byte before training" in said(cells["check-model"])
  assert "that of byte 41" in said(cells["check-model"])
  assert "  computed   attention by xla, remat none\ncompiling ..." in said(cells["run-training"])
  score = re.match(r"([\d.]+) bits/dim\b", said(cells["evaluate"]))
  assert float(score[1]) < 8.0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A folder of its own for all that a kernel writes; the packages come from this repository."""
  for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
    (tmp_path / name).mkdir()
    monkeypatch.setenv(name, str(tmp_path / name))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compilation takes most of the time
  monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows pictures inline
  # Fills a cache at its first use on a machine, which inside a cell would be told on stderr.
  importlib.import_module("matplotlib.font_manager")
  (tmp_path / "work").mkdir()
  return tmp_path / "work"


@pytest.mark.one_day_in_six(3)
def test_it_runs(elsewhere, monkeypatch):
  monkeypatch.setenv("TOUR_STEPS", "10")
  notebook = read()
  execute(notebook, elsewhere)
  check_outputs(code_cells(notebook))
  assert list(elsewhere.iterdir()) == []
  assert [path.name[:5] for path in (elsewhere.parent / "TMPDIR").glob("tour-*")] == ["tour-"]


def test_the_file_is_as_executed():
  check_outputs(code_cells(read()))
  assert PATH.stat().st_size < SIZE
  assert "step 300/300" in said(code_cells(read())["run-training"])  # not the short run of tests


def test_ids_are_names():
  ids = [cell.id for cell in read().cells]
  assert len(set(ids)) == len(ids)
  assert [x for x in ids if not re.fullmatch(r"[a-z]+(-[a-z]+)*", x)] == []


@pytest.mark.parametrize("command", (("check",), ("format", "--check")), ids=" ".join)
def test_its_code_is_clean(command):
  ruff = [sys.executable, "-m", "ruff", *command, str(PATH)]
  done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
  executed = read()
  execute(executed, PATH.parent)
  nbformat.write(executed, PATH)
