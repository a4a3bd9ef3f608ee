"""Lines and records of a run, with a clock of our own."""

import json
import math
import time

import pytest

from sparse_flax.train import metrics


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when told."""
  now = [100.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  return now


def records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def make(writer, lines, **settings):
  settings = dict(steps=10, log_every=4, unit="bits/dim", tokens_per_step=1_000) | settings
  return metrics.Progress(writer, peak_seconds=1.0, say=lines.append, **settings)


def test_rates_leave_out_compiling_and_pauses(tmp_path, clock):
  lines = []
  with metrics.Writer(tmp_path, step=0) as writer:
    progress = make(writer, lines)
    for step in range(1, 11):
      clock[0] += 60.0 if step == 1 else 2.0
      progress.add(step, {"loss": float(step), "grad_norm": 1.0})
      if step == 3:
        with progress.pause():
          clock[0] += 500.0
  assert lines == [
    "step 1/10  loss 1.00 nats  1.44 bits/dim",
    "step 4/10  loss 3.00 nats  4.33 bits/dim  500 tokens/s  50% MFU  ETA 12 s",
    "step 8/10  loss 6.50 nats  9.38 bits/dim  500 tokens/s  50% MFU  ETA 4 s",
    "step 10/10  loss 9.50 nats  13.71 bits/dim  500 tokens/s  50% MFU  ETA 0 s",
  ]
  assert [x["step"] for x in records(tmp_path)] == [1, 4, 8, 10]
  assert records(tmp_path)[1]["step_seconds"] == pytest.approx(2.0)
  assert "mfu" not in records(tmp_path)[0] and records(tmp_path)[0]["grad_norm"] == 1.0


def test_skipped_steps_are_counted_and_not_averaged(tmp_path, clock):
  lines = []
  with metrics.Writer(tmp_path, step=0) as writer:
    progress = make(writer, lines)
    progress.add(1, {"loss": math.inf, "grad_norm": math.nan, "skipped": 1.0})
    progress.add(2, {"loss": 7.0, "grad_norm": math.inf, "skipped": 1.0})
    assert progress.skipped_in_a_row == 2
    clock[0] += 4.0
    for step in (3, 4):
      progress.add(step, {"loss": 2.0, "grad_norm": 1.0, "skipped": 0.0})
    assert progress.skipped_in_a_row == 0
  assert lines[0] == "step 1/10  1 skipped"
  assert lines[1].startswith("step 4/10  loss 2.00 nats  2.89 bits/dim  1 skipped")
  assert records(tmp_path)[0].keys() == {"step", "time", "skipped"}


def test_evaluation_line_and_record(tmp_path):
  lines = []
  with metrics.Writer(tmp_path, step=0) as writer:
    result = dict(bits_per_byte=3.25, step=4, split="validation", bytes_scored=307_200)
    for ema in (True, False):
      make(writer, lines).evaluated(result | {"ema": ema})
  assert lines == [
    "step 4/10  validation 3.250 bits/dim  averaged weights, 307,200 bytes",
    "step 4/10  validation 3.250 bits/dim  307,200 bytes",
  ]
  assert records(tmp_path)[0]["validation_bits_per_byte"] == 3.25


def test_what_came_after_the_restored_step_is_dropped(tmp_path):
  with metrics.Writer(tmp_path, step=0) as writer:
    for step in (1, 2, 3, 4):
      writer.write(step, loss=1.0)
  with (tmp_path / "metrics.jsonl").open("a") as lines:
    lines.write('{"step": 2, "lo')  # killed while writing
  with metrics.Writer(tmp_path, step=2) as writer:
    writer.write(3, loss=2.0)
  assert [(x["step"], x["loss"]) for x in records(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
  assert sum(path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()) >= 1
