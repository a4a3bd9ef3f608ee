"""A record on the CPU: what it trains, writes and refuses, and what it says of the time."""

import json

import numpy as np
import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import record
from tests.helpers import tiny
from tests.helpers.paths import ROOT

# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def columns(line):
  return dict(zip(record.COLUMNS, (x.strip() for x in line.strip("|").split("|")), strict=True))


@pytest.mark.promotes  # optax's Adam mixes dtypes
@pytest.mark.one_day_in_six(4)
def test_a_record_is_trained_scored_and_entered(tmp_path):
  config = tiny.config(tiny.text_file(tmp_path / "text"), train=dict(ema_decay=0.0))
  folders = dict(workdir=tmp_path / "run", out=tmp_path / "out")
  (tmp_path / "out").mkdir()
  record.enter(tmp_path / "out" / "records.md", "| older |")
  lines = []
  how = dict(name="mine", seconds=1e4, split="test", say=lines.append, **folders)
  result = record.run(config, "tiny --config.seed=0", **how)
  *_, new, older = (tmp_path / "out" / "records.md").read_text().splitlines()
  assert older == "| older |" and lines[-1].endswith(new)
  cells = columns(new)
  assert cells["config"] == "`tiny --config.seed=0`" and cells["tokens"] == "768"
  assert cells["seed"] == "0" and cells["standard error"] == f"{result['standard_error']:.4f}"
  assert cells["result"] == f"{result['bits_per_byte']:.4f} bits/byte, weights as trained"
  assert cells["data"].startswith("bytes: train 1,800 sha256:")
  assert "; test 100 sha256:" in cells["data"]
  files = tmp_path / "out" / "runs" / "mine"
  assert cells["files"] == "[runs/mine](runs/mine)"
  names = {"metrics.jsonl", "config.json", "evaluation.json", "bits.npy"}
  assert {x.name for x in files.iterdir()} == names
  bits = np.load(files / "bits.npy")  # windows of the text differ in length, the last one alone
  assert bits.shape == (result["sequences"],) and bits.dtype == np.float32
  assert json.loads((files / "evaluation.json").read_text()) == result
  assert result["step"] == 6 and result["split"] == "test" and result["bytes_scored"] == 100
  assert sum(line.startswith("prediction: ") for line in lines) == 2
  with pytest.raises(ValueError, match=r"^--name=mine: .* is there already"):
    record.run(config, "tiny", **how)
  with pytest.raises(ValueError, match=r"^--workdir=.*run: must be new or empty"):
    record.run(config, "tiny", **(how | {"name": "other"}))


@pytest.mark.parametrize(
  ("budget", "expected"),
  [
    (1_000, ["prediction: 309 s of 1,000 s"] * 2),
    (
      200,
      [
        "prediction: 309 s of 200 s, too many; config.train.steps=63 would fit",
        "prediction: 309 s of 200 s, too many; config.train.steps=63 would fit",
      ],
    ),
  ],
  ids=["in-time", "too-long"],
)
def test_the_pace_predicts_the_whole(budget, expected):
  """A first step of 12 s, others of 3 s each."""
  now, lines = [100.0], []
  pace = record.Pace(100, budget, start=100.0, say=lines.append, clock=lambda: now[0])
  for step in range(100):
    now[0] += 3.0 if step else 12.0
    assert pace() is False
  assert lines == expected


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--name=a/b"], "--name=a/b: must be letters, digits and any of"),
    (["--seconds=0"], "--seconds=0.0: must be in (0, 10,000,000]"),
    (["--config.train.steps=0"], "config.train.steps=0: must be a whole number >= 1"),
    (["--second=9"], "--second: no such flag; did you mean --seconds?"),
  ],
)
def test_mistakes_leave_nothing(flags, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(["record", "--config=enwik8:quick", f"--out={tmp_path / 'out'}", *flags])
  assert stop.value.code == 2 and not any(tmp_path.iterdir())
  assert capsys.readouterr().err.startswith(message)


def test_a_record_comes_alone(capsys):
  with pytest.raises(SystemExit) as stop:
    command.main(["xla", "record"])
  assert stop.value.code == 2 and "must come first and alone" in capsys.readouterr().err


def test_every_line_of_the_ledger_has_its_files():
  text = (ROOT / "benchmarks" / record.LEDGER).read_text()
  assert text.startswith(record.HEAD)
  for line in text.removeprefix(record.HEAD).splitlines():
    cells = columns(line)
    folder = ROOT / "benchmarks" / cells["files"].partition("](")[2].strip(")")
    result = json.loads((folder / "evaluation.json").read_text())
    unit = cells["result"].split()[1].strip(",")
    assert line == record.row(result, unit=unit, files=f"runs/{folder.name}")
    assert (folder / "metrics.jsonl").is_file() and (folder / "config.json").is_file()
