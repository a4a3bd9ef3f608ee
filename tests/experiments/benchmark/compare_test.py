"""Runs that are compared: the same sequences, steps, time, and curves."""

import json
import shutil

import numpy as np
import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import compare
from sparse_flax.train import flops
from tests.helpers.paths import ROOT

RUN = ROOT / "benchmarks" / "runs" / "record-8000"


@pytest.fixture
def runs(tmp_path):
  """A run, and one of a quarter of its blocks in half of its seconds, of fewer bits."""
  for name in ("flat", "short"):
    shutil.copytree(RUN, tmp_path / "runs" / name)
  folder = tmp_path / "runs" / "short"
  config = json.loads((folder / "config.json").read_text())
  config["model"]["num_layers"] //= 4
  (folder / "config.json").write_text(json.dumps(config))
  change(folder, seconds=270.0)
  noise = np.random.RandomState(0).normal(scale=0.2, size=10_000)
  np.save(folder / "bits.npy", np.float32(np.load(RUN / "bits.npy") - 0.1 + noise))
  return tmp_path


def change(folder, **values):
  path = folder / "evaluation.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_runs_are_compared_with_the_first(runs, capsys):
  assert command.main(["compare", "--runs=flat,short", "--name=both", f"--out={runs}"]) == 0
  flat, short = json.loads((runs / "both.json").read_text())["rows"]
  assert short["difference"] == pytest.approx(-0.1, abs=0.01)
  # That of the noise, and not that of the images, which is several times as large.
  assert short["difference_error"] == pytest.approx(0.2 / 100, rel=0.05)
  assert short["difference_error"] < 0.5 * flat["standard_error"]
  assert short["at"] == "equal steps" and short["seconds_over"] == 0.5
  model = compare.run_lib.load_config(RUN).model
  assert flat["pflop"] == pytest.approx(8e-12 * flops.train_flops(model, batch_size=32), rel=1e-3)
  assert 0.25 < short["flops_over"] < 0.35  # embeddings and logits are as many
  # 540 s: a step takes 0.06 s.
  assert short["steps_in_equal_time"] == pytest.approx(8_000 + 270 / 0.06, rel=0.01)
  assert (runs / "both.png").is_file() and "steps in equal time" in capsys.readouterr().out
  change(runs / "runs" / "short", seconds=530.0, step=7_000)
  _, short = compare.run(["flat", "short"], name="again", out=runs)
  assert short["at"] == "equal time"


def test_curves_are_against_steps_operations_and_seconds(runs):
  flat, short = found = [compare.read(runs / "runs" / name) for name in ("flat", "short")]
  by_steps, by_flops, by_seconds = compare.draw(found).axes
  for n, run in enumerate(found):
    x, y = by_steps.lines[n].get_data()
    assert x[-1] == 8_000 and (y == run.curve.bits).all()
    assert by_seconds.lines[n].get_xdata()[-1] == pytest.approx(run.result["seconds"])
  ends = [line.get_xdata()[-1] for line in by_flops.lines]
  assert ends[0] / ends[1] == pytest.approx(flat.step_flops / short.step_flops)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ("flat", "--runs=flat: must be two names or more"),
    ("flat,flat", "--runs=flat,flat: must be two names or more, each once"),
    ("flat,none", "--runs=none: must be a run of `record` in"),
    ("flat,../flat", "--runs=../flat: must be letters, digits"),
    ("flat,short", "--runs=short: min_context is 5, and of flat 0: must have scored the same"),
  ],
)
def test_mistakes_leave_nothing(names, message, runs, capsys):
  change(runs / "runs" / "short", min_context=5)
  with pytest.raises(SystemExit) as stop:
    command.main(["compare", f"--runs={names}", f"--out={runs}"])
  assert stop.value.code == 2 and capsys.readouterr().err.startswith(message)
  assert [x.name for x in runs.iterdir()] == ["runs"]
