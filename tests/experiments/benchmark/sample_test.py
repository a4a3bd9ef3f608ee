"""The benchmark of sampling: its bytes, its rows, and what is committed."""

import json

import pytest

from experiments.benchmark.gpu import sample
from experiments.benchmark.gpu import timing
from tests.helpers.paths import ROOT

FOLDER = ROOT / "benchmarks"
FIELDS = {"name", "implementation", "batch", "ms_per_step", "floor_ms", "launches", "launch_ms"}


@pytest.fixture
def small(monkeypatch):
  """The quickstart's model in the place of the paper's, two steps, kernels as one would count."""
  monkeypatch.setattr(sample, "PARTS", ("cifar10:quick",))
  monkeypatch.setattr(sample, "STEPS", 2)
  monkeypatch.setattr(sample, "CALLS", 1)
  monkeypatch.setattr(timing, "kernels_of", lambda call, times=1: [("kernel", 0.5)] * 10**5)


@pytest.mark.one_day_in_six(1)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_floor_is_of_weights_and_of_what_a_step_reads(small):
  sparse, dense = (
    sample.measure("cifar10:quick", 1e9, sparse=sparse, implementation="xla")
    for sparse in (True, False)
  )
  B, H, D, T, stride = 16, 4, 16, 3_072, 96
  rows = 2 * (stride + T // stride)  # two heads of each kind
  assert sparse["cache_bytes_read"] == 2 * 4 * B * D * rows
  assert dense["cache_bytes_read"] == dense["cache_bytes"] == 2 * 4 * B * D * H * T
  assert sparse["cache_bytes"] == 2 * 4 * B * D * 2 * (stride + T)
  assert sparse["weight_bytes"] == dense["weight_bytes"] > 4 * 64 * 256
  for row in (sparse, dense):
    assert row["floor_ms"] == pytest.approx((row["weight_bytes"] + row["cache_bytes_read"]) / 1e6)


@pytest.mark.one_day_in_three(2)
def test_the_command_writes_every_row(small, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sample.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(sample, "launch_ms", lambda groups: 1e-3)
  more = dict(step="xla", bytes_per_second=1.0, cache_bytes=1)
  row = dict.fromkeys(FIELDS - {"launch_ms"}, 1.0) | more
  monkeypatch.setattr(sample, "measure", lambda name, rate, **how: row | dict(name=name))
  assert sample.run(tmp_path)
  (path,) = tmp_path.iterdir()
  rows = json.loads(path.read_text())["rows"]
  assert len(rows) == len(sample.VARIANTS) and all(row.keys() >= FIELDS for row in rows)
  assert rows[0]["bound_ms"] == pytest.approx(1.0 + 1e-3)


def test_what_is_committed_is_what_is_claimed():
  rows = json.loads((FOLDER / "sample_h100.json").read_text())["rows"]
  found = {(row["name"], row["implementation"], row["step"]): row for row in rows}
  for name, batch in (("cifar10", 64), ("imagenet64", 16)):
    sparse, dense = found[name, "sparse", "triton"], found[name, "dense", "triton"]
    assert sparse.keys() >= FIELDS and sparse["batch"] == dense["batch"] == batch
    assert sparse["ms_per_step"] < 0.25 * dense["ms_per_step"]
    best = found[name, "sparse", "cluster"]
    assert best["ms_per_step"] <= 3 * best["floor_ms"]
  (row,) = json.loads((FOLDER / "sample_cpu.json").read_text())["rows"]
  assert row["steps"] == 3_072 and row["batch"] == 16
  assert row["seconds"] <= 8 and row["faster"] >= 50
