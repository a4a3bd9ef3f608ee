"""The numbers of a run: a line for people, a JSON record and a TensorBoard point for programs."""

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator

from etils import epath

from sparse_flax import run
from sparse_flax.train import boards

_REMOTE_SECONDS = 30.0

is_remote = run.files.is_remote

UNIT = {"image": "bits/dim", "text": "bits/byte", "audio": "bits/byte"}
# What is said of weights that are averaged, and of those that are not.
AVERAGED = {True: "averaged (EMA)", False: "of the last update (not averaged)"}


class Writer:
  """Appends to `metrics.jsonl` (a line per record) and `tensorboard/` in a run's folder.

  On a local disk each line is flushed when it is written. Object stores cannot append: there both
  are written anew, every `_REMOTE_SECONDS` at most, and at the end.
  """

  def __init__(self, workdir: epath.PathLike, *, step: int, wandb: boards.WandB | None = None):
    """Opens both for appending; what an earlier process wrote beyond `step` is dropped.

    Args:
      workdir: the run's folder.
      step: how many are done.
      wandb: gets what TensorBoard gets, and is closed with it.
    """
    workdir = epath.Path(workdir)
    self._path, self._folder = workdir / "metrics.jsonl", workdir / "tensorboard"
    self._kept = _drop_later_lines(self._path, step)
    self._remote = is_remote(workdir)
    self._copied = time.monotonic()
    local = self._folder
    if self._remote:
      self._temporary = tempfile.TemporaryDirectory()
      local = self._temporary.name
    else:
      self._lines = self._path.open("a")
    self._tensorboard = boards.TensorBoard(os.fspath(local), step=step)
    self._boards = (self._tensorboard, *([wandb] if wandb else []))

  def write(self, step: int, **values: float | int) -> None:
    """One record: the step, the time in seconds since 1970, and what is finite of `values`."""
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    record = {"step": step, "time": round(time.time(), 3), **values}
    line = json.dumps(record, allow_nan=False) + "\n"
    for board in self._boards:
      board.scalars(step, values)
    if not self._remote:
      self._lines.write(line)
      self._lines.flush()
      return
    self._kept.append(line)
    if time.monotonic() - self._copied > _REMOTE_SECONDS:
      self._copy()

  def show(self, step: int, shown: boards.Shown) -> None:
    """Pictures, texts and sounds of a step, for the boards alone."""
    for board in self._boards:
      board.show(step, shown)

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, *error) -> None:
    for board in self._boards:
      board.close(failed=any(x is not None for x in error))
    if self._remote:
      self._copy()
      self._temporary.cleanup()
    else:
      self._lines.close()

  def _copy(self) -> None:
    self._copied = time.monotonic()
    self._path.write_text("".join(self._kept))
    self._tensorboard.flush()
    self._folder.mkdir(parents=True, exist_ok=True)
    for path in epath.Path(self._temporary.name).iterdir():
      path.copy(self._folder / path.name, overwrite=True)


def append_line(path: epath.Path, record: dict) -> None:
  """Adds a JSON line to a file anywhere."""
  finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
  line = json.dumps({name: finite(x) for name, x in record.items()}, allow_nan=False) + "\n"
  if is_remote(path):
    path.write_text((path.read_text() if path.exists() else "") + line)
  else:
    with path.open("a") as lines:
      lines.write(line)


def _drop_later_lines(path: epath.Path, step: int) -> list[str]:
  """Leaves what was written up to `step`, and returns it."""
  if not path.exists():
    return []
  lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True)
  earlier = [line for line in lines if _step_of(line) <= step]
  if earlier != lines:
    run.files.write(path, "".join(earlier).encode())
  return earlier


def _step_of(line: str) -> int | float:
  """Infinite for what a killed process was writing, or a disk has damaged."""
  try:
    step = json.loads(line)["step"] if line.endswith("\n") else None
  except (ValueError, KeyError, TypeError):
    step = None
  return step if isinstance(step, int) else math.inf


class Progress:
  """Turns the metrics of steps into a run's lines and records.

  Rates count from the end of the first step on, which leaves compilation out, and leave out what
  happens inside `pause`.
  """

  def __init__(
    self,
    writer: Writer | None,
    *,
    steps: int,
    log_every: int,
    unit: str,
    tokens_per_step: int,
    peak_seconds: float | None,
    say: Callable[[str], None],
  ):
    """Args:
    writer: takes the records; None where another process has it.
    steps: of the whole run.
    log_every: steps between two lines; the first and the last step always have one.
    unit: of UNIT.
    tokens_per_step: of all devices.
    peak_seconds: what a step would take at the devices' peak; None where that is not known.
    say: takes the lines.
    """
    self._writer, self._steps, self._log_every, self._unit = writer, steps, log_every, unit
    self._tokens_per_step, self._peak_seconds, self._say = tokens_per_step, peak_seconds, say
    # (step, seconds): the first one here, and that of the last line.
    self._first: tuple[int, float] | None = None
    self._last: tuple[int, float] = (0, 0.0)
    self._paused = 0.0  # seconds
    self._losses, self._skipped = [], 0  # since the last line
    self.skipped_in_a_row = 0

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """What happens inside, evaluation or saving, takes no time."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def add(self, step: int, record: dict[str, float | int]) -> None:
    """Takes the metrics of one step that has just ended.

    Args:
      step: how many steps are done.
      record: "loss" in nats and whatever else shall be recorded; "skipped" is 1 where an overflow
        left the weights as they were.
    """
    now = (step, time.perf_counter() - self._paused)
    if record.get("skipped"):
      self._skipped += 1
      self.skipped_in_a_row += 1
    else:
      self._losses.append(record["loss"])
      self.skipped_in_a_row = 0
    if self._first is None:
      self._first = self._last = now
    elif step % self._log_every and step != self._steps:
      return
    self._log(now, {k: v for k, v in record.items() if k not in ("loss", "skipped")})
    self._last, self._losses, self._skipped = now, [], 0

  def _log(self, now: tuple[int, float], others: dict[str, float | int]) -> None:
    values = dict(others, skipped=self._skipped)
    if self._losses:
      values["loss"] = statistics.fmean(self._losses)
      values["bits_per_byte"] = values["loss"] / math.log(2)
    seconds_left = None
    if now[0] > self._last[0]:
      rate = lambda since: (now[1] - since[1]) / (now[0] - since[0])
      values["step_seconds"] = rate(self._last)
      values["tokens_per_second"] = self._tokens_per_step / values["step_seconds"]
      if self._peak_seconds:
        values["mfu"] = self._peak_seconds / values["step_seconds"]
      seconds_left = rate(self._first) * (self._steps - now[0])
    self._say(
      progress_line(now[0], self._steps, values, unit=self._unit, seconds_left=seconds_left)
    )
    self._write(now[0], **values)

  def evaluated(self, result: dict) -> None:
    """Takes what evaluation found after the newest step."""
    bits, step = result["bits_per_byte"], result["step"]
    weights = "averaged weights, " if result["ema"] else ""
    right = f"{100 * result['accuracy']:.1f}% right  " if "accuracy" in result else ""
    self._say(
      f"step {step:,}/{self._steps:,}  {result['split']} {bits:.3f} {self._unit}  {right}"
      f"{weights}{result['bytes_scored']:,} bytes"
    )
    accuracy = {"validation_accuracy": result["accuracy"]} if right else {}
    self._write(step, validation_bits_per_byte=bits, **accuracy)

  def _write(self, step: int, **values: float | int) -> None:
    if self._writer is not None:
      self._writer.write(step, **values)


def progress_line(
  step: int,
  steps: int,
  values: dict[str, float | int],
  *,
  unit: str,
  seconds_left: float | None = None,
) -> str:
  """What a person sees of the steps since the last line; what is not known is left out.

  >>> values = dict(loss=2.31, bits_per_byte=3.33, tokens_per_second=412e3, mfu=0.41)
  >>> progress_line(1200, 10_000, values, unit="bits/dim", seconds_left=4320.0)
  'step 1,200/10,000  loss 2.31 nats  3.33 bits/dim  412k tokens/s  41% MFU  ETA 1 h 12 min'
  """
  parts = [f"step {step:,}/{steps:,}"]
  if "loss" in values:
    parts += [f"loss {values['loss']:.2f} nats", f"{values['bits_per_byte']:.2f} {unit}"]
  if "index_loss" in values:
    parts.append(f"index loss {values['index_loss']:.3f}")
  if values.get("skipped"):
    parts.append(f"{values['skipped']} skipped")
  if "tokens_per_second" in values:
    parts.append(f"{short(values['tokens_per_second'])} tokens/s")
  if "mfu" in values:
    parts.append(f"{100 * values['mfu']:.0f}% MFU")
  if seconds_left is not None:
    parts.append(f"ETA {duration(seconds_left)}")
  return "  ".join(parts)


def short(number: float | int) -> str:
  """Three digits and a letter.

  >>> [short(x) for x in (9.5, 412_345, 94_949_888, 3.5e15)]
  ['9.5', '412k', '94.9M', '3.5P']
  """
  for letter in ("", "k", "M", "G", "T"):
    if abs(number) < 999.5:
      return f"{number:.3g}{letter}"
    number /= 1_000
  return f"{number:.3g}P"


def duration(seconds: float | int) -> str:
  """Two units at most.

  >>> [duration(x) for x in (12, 200, 4320, 138_000)]
  ['12 s', '3 min 20 s', '1 h 12 min', '38 h 20 min']
  """
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3_600:
    return f"{seconds // 60} min {seconds % 60} s"
  return f"{seconds // 3_600} h {seconds % 3_600 // 60} min"
