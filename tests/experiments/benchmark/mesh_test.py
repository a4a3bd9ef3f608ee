"""Steps on several devices: which rows there are, what is told, and a run on two."""

import json

import pytest

from experiments import cli
from experiments.benchmark.gpu import mesh
from experiments.benchmark.gpu.steps import meshed

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_rows_begin_with_one_device_and_have_each_axis_at_each_count():
  for body in mesh.BODIES:
    first, *others = mesh.rows_of(body, (2, 4))
    assert first.devices == 1 and first.scaling is None
    assert {row.devices for row in others} == {2, 4}
    axes = {(*row.axes.items(),) for row in others}
    of = mesh.BODIES[body]
    assert axes >= {((axis, n),) for axis in of.strong + of.weak for n in (2, 4)}
    for row in others:
      assert row.batch == first.batch * (row.devices if row.scaling == "weak" else 1)
      assert row.job()["changes"]["mesh"] == row.mesh and row.blocks in (None, "mosaic_gpu")
  mixed = [row.axes for row in mesh.rows_of("enwik8", (4, 8)) if len(row.axes) == 2]
  assert {"fsdp": 4, "tensor": 2} in mixed and {"data": 2, "sequence": 2} in mixed


@pytest.mark.parametrize("body", mesh.BODIES)
def test_all_rows_are_valid_runs(body):
  """What `validate` refuses would be a row without figures."""
  for row in mesh.rows_of(body, (2, 4, 8)):
    config = cli.recipe(mesh.BODIES[body].recipe)
    for group, values in row.job()["changes"].items():
      config[group].update(values)
    model, axes = config.model, config.mesh
    rows = axes.data * axes.fsdp
    assert config.data.batch_size % rows == 0
    assert model.num_heads % axes.tensor == 0 and model.seq_len % axes.sequence == 0
    if axes.sequence > 1:
      assert (model.seq_len // axes.sequence) % model.stride == 0


def test_kernels_that_run_side_by_side_hide_each_other():
  kernels = [("gemm", 30.0), ("ncclDevKernel_AllReduce", 10.0)] * 2  # of two devices
  figures = lambda ms: meshed.kernel_figures(kernels, 2, ms)
  assert figures(30.0) == dict(kernel_ms=40.0, nccl_ms=10.0, nccl_hidden=1.0)
  assert figures(35.0)["nccl_hidden"] == 0.5
  assert figures(50.0)["nccl_hidden"] == 0.0
  assert meshed.kernel_figures([("gemm", 30.0)], 1, 31.0)["nccl_hidden"] is None


def test_speed_and_losses_are_compared_with_one_device():
  alone = dict(ms=100.0, batch=8, losses=[2.0, 1.0])
  row = dict(ms=60.0, batch=16, devices=2, losses=[2.0, 1.5])
  got = mesh.compared(dict(row), alone)
  assert got["speed"] == 3.333 and got["efficiency"] == 1.667 and "losses_differ_by" not in got
  got = mesh.compared(row | dict(batch=8, losses=[2.0, 1.001]), alone)
  assert got["losses_differ_by"] == 1e-3
  assert mesh.compared(dict(ms=None, error="x"), alone) == dict(ms=None, error="x")


@pytest.mark.promotes
@pytest.mark.slow
def test_two_devices_lose_what_one_does(monkeypatch, tmp_path, capsys):
  small = mesh.BODIES["small"]
  changes = {**small.changes, "model": dict(small.changes["model"], num_layers=1, seq_len=64)}
  monkeypatch.setattr(mesh, "BODIES", {"small": small._replace(batch=2, changes=changes)})
  monkeypatch.setattr(mesh, "LOSSES", 3)
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
  assert mesh.run(tmp_path, devices=2)
  (path,) = tmp_path.iterdir()
  alone, *rows = json.loads(path.read_text())["rows"]
  assert len(alone["losses"]) == 3 and alone["losses"][0] > alone["losses"][-1]
  assert [row["axes"] for row in rows] == [{x: 2} for x in ("data", "fsdp", "tensor", "sequence")]
  for row in rows:
    assert row["losses_differ_by"] < 1e-5 and sum(row["moved_gb"].values()) > 0
    assert row["ms"] > 0 and row["efficiency"] > 0
  assert "efficiency" in capsys.readouterr().out


def test_more_devices_than_there_are_is_an_error(capsys):
  assert not mesh.run(None, devices=1_000)
  assert "--devices=1000: needs 2 to" in capsys.readouterr().out
