"""The benchmark of the products around attention in Pallas's simulator, on a CPU: not timed."""

import json

import pytest

from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import residual
from experiments.benchmark.gpu import timing
from pallas_kernels.residual import gradients
from pallas_kernels.residual import kernels
from pallas_kernels.residual.outer import Cut
from pallas_kernels.residual.plan import Sizes

TINY = residual.Shape(R=136, E=128, F=128, widths=(128, 128, 128))


@pytest.fixture
def no_gpu(monkeypatch):
  """Tiny shapes, this process, and 2 ms for every call."""
  monkeypatch.setattr(attention, "COPY_BYTES", 2**20)
  monkeypatch.setattr(residual, "SQUARE", 1_024)
  monkeypatch.setattr(residual, "SHAPES", {"tiny": TINY})
  monkeypatch.setattr(timing, "WORKERS", 0)
  monkeypatch.setattr(timing, "kernel_ms", lambda program, *args: (2.0, ["kernel"]))
  monkeypatch.setattr(gradients, "CUTS", (Cut(height=128, ranges=2),))
  for name in kernels.SIZES:
    depth = 32 if name == "enter_back" else 64
    monkeypatch.setitem(
      kernels.SIZES, name, {(4096, 4096): Sizes(columns=128, depth=depth, stages=2)}
    )


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke("drop_add,narrow_back", daily=0)
@pytest.mark.parametrize("names", ["drop_add,narrow_back", ",".join(residual.NAMES)])
def test_rows_have_errors_and_shares(no_gpu, names, tmp_path):
  names = tuple(names.split(","))
  assert residual.run(tmp_path, names)
  (path,) = tmp_path.iterdir()
  rows = {row["kernel"]: row for row in json.loads(path.read_text())["rows"]}
  assert set(rows) == set(names)
  for row in rows.values():
    assert 0 < max(row["errors"]) < residual.BOUND
    assert row["share"] == pytest.approx(max(row["memory_ms"], row["products_ms"]) / 2.0, abs=1e-4)


def test_wrong_results_are_failures(no_gpu, monkeypatch, tmp_path):
  right = kernels.multiply
  monkeypatch.setattr(kernels, "multiply", lambda *args: right(*args) * 1.02)
  assert not residual.run(tmp_path, ("multiply",))


@pytest.mark.parametrize(
  ("name", "units"),
  # U = [R, E]: what is read and written once, as counted by hand at E = 256 and F = 512.
  dict(enter=3, drop_add_attention=3, widen=5, drop_add=4, narrow_back=5, widen_back=6, multiply=2,
       enter_back=7, enter_gradients=3, leave_gradients=8).items(),
)  # fmt: skip
def test_bytes(name, units):
  shape = residual.SHAPES["cifar10"]
  expected = units * 2 * shape.R * shape.E
  assert residual.num_bytes(shape, name) == pytest.approx(expected, rel=0.08)


def test_all_candidates_say_what_they_are():
  for name, sizes in residual.CANDIDATES.items():
    assert len(set(sizes)) == len(sizes)
    assert name in residual.NAMES
