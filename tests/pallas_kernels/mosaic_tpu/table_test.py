"""What the TPU compiler said of all kernels and training steps, and the command that asks it."""

import itertools
import json

from experiments.benchmark.tpu import aot
from experiments.benchmark.tpu import compiler
from tests.helpers.paths import ROOT
from tests.helpers.tpu_rows import check_rows

TABLE = ROOT / "benchmarks" / "tpu_aot.json"


def test_the_table_has_what_is_claimed_and_no_failure():
  found = json.loads(TABLE.read_text())["rows"]
  there = {row["job"] for row in found}
  assert not [row["job"] for row in found if "error" in row]
  assert there == set(aot.jobs())
  assert all(row["hbm_need"] <= row["hbm"] for row in found if "hbm" in row)
  check_rows([row for row in found if "case" in row])


def test_the_command_prints_and_writes_the_table(tmp_path, monkeypatch, capsys):
  there = {}
  for row in json.loads(TABLE.read_text())["rows"]:
    there.setdefault(row["job"], []).append(row)
  (tmp_path / "libtpu-1.2.3.dist-info").mkdir()
  monkeypatch.setattr(compiler, "libtpu_path", lambda: str(tmp_path / "libtpu" / "libtpu.so"))
  failed = dict(job="step/v5e/none/1", error="no such config")
  monkeypatch.setattr(aot, "jobs", lambda: [*there, failed["job"]])
  monkeypatch.setattr(aot, "compile_jobs", lambda name: there.get(name, [failed]))
  assert not aot.run(tmp_path)
  written = json.loads((tmp_path / "tpu_aot.json").read_text())
  assert written["rows"] == [*itertools.chain(*there.values()), failed]
  assert written["compiler"] == "libtpu-1.2.3"
  assert "no such config" in capsys.readouterr().out
