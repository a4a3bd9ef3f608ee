"""The benchmark of loss curves, with a tiny model in a process of its own."""

import json

import numpy as np
import pytest

from experiments.benchmark.gpu import curves
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import losses
from sparse_flax.data import samples

TINY = dict(
  seq_len=32, width=16, num_layers=1, num_heads=2, ff_mult=2.0, stride=8, summary_width=2,
  sub_blocks=2, position_shape=(4, 8), dropout=0.1, compute_dtype="float32",
)  # fmt: skip
# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def told(away: float, noise: float = 0.0):
  """200 losses that fall from 8 bits, then differ by a constant, and in turns by more and less."""
  falling = np.linspace(8.0, 6.0, curves.STEPS) + away
  return [float(x) for x in falling + noise * np.resize([1.0, -1.0], curves.STEPS)]


@pytest.mark.one_day_in_three(1)
@pytest.mark.promotes
def test_a_run_tells_the_loss_of_every_step(monkeypatch, capsys):
  monkeypatch.setattr(losses, "EVERY", 2)
  monkeypatch.setitem(curves.BATCHES, "enwik8:quick", 3)
  monkeypatch.setattr(curves, "STEPS", 5)
  job = curves.job_of(curves.Run("enwik8:quick", "xla", 1))
  job["changes"]["model"] = TINY
  losses.measure(json.loads(json.dumps(job)))
  figures = child.told(capsys.readouterr().out)
  assert len(figures["losses"]) == 5 and figures["losses"][0] == pytest.approx(8.0)
  assert figures["blocks_by"] == "xla"
  assert figures["losses"][1:] != pytest.approx([8.0] * 4)


def test_rows_gaps_and_the_picture_are_written(monkeypatch, tmp_path, capsys):
  answers = {
    ("modules", 0): dict(losses=told(0.0)),
    ("modules", 1): dict(losses=told(0.25, 0.5)),
    ("mosaic_gpu", 0): dict(losses=told(-0.125)),
  }
  answer = lambda program, **how: answers[program.job["residual"], program.job["seed"]]
  monkeypatch.setattr(curves.processes, "told_by", answer)
  assert curves.run(tmp_path, ("audio",))
  picture, path = sorted(tmp_path.iterdir(), key=lambda path: path.suffix == ".json")
  result = json.loads(path.read_text())
  assert picture.read_bytes().startswith(b"\x89PNG") and picture.stem == path.stem
  assert [row["implementation"] for row in result["rows"]] == ["modules", "modules", "mosaic_gpu"]
  assert result["steps"][:3] == [1, 5, 10] and result["steps"][-1] == 200
  row = result["rows"][2]
  assert (row["recipe"], row["seed"], row["batch"]) == ("audio", 0, 1)
  assert row["losses"] == [answers["mosaic_gpu", 0]["losses"][n - 1] for n in result["steps"]]
  (gap,) = result["gaps"]
  assert gap["of_seeds"] == pytest.approx(0.5) and gap["of_kernels"] == pytest.approx(0.125)
  assert gap["shift_of_kernels"] == pytest.approx(-0.125) and gap["first"] == 8.0
  answers["mosaic_gpu", 0] = dict(error="no kernel", losses=told(0.0)[:40])
  assert not curves.run(tmp_path, ("audio",))
  assert json.loads(path.read_text())["gaps"] == []
  assert "FAILED audio mosaic_gpu 0 no kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("modality", "seq_len", "count"),
  [("image", 3_072, 1_100), ("image", 12_288, 275), ("text", 12_288, 81), ("audio", 65_536, 5)],
)
def test_windows_are_the_packages_bytes(modality, seq_len, count):
  windows = losses.windows_of(modality, seq_len)
  assert windows.shape == (count, seq_len) and windows.dtype == np.uint8
  if modality == "image":
    side = round((seq_len / 3) ** 0.5)
    corner = windows[0].reshape(side, side, 3)[-32:, -32:]
    images = samples.cifar10_images()
    np.testing.assert_array_equal(corner, images[(side // 32) ** 2 - 1])
  batches = losses.batches_of(modality, seq_len, 2, 3)
  assert batches.shape == (3, 2, seq_len)
  np.testing.assert_array_equal(batches, losses.batches_of(modality, seq_len, 2, 3))
