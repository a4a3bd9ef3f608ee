"""Trains a recipe in one go, scores it on the split that is reported, and enters it in the ledger.

  python -m experiments.benchmark record --config.data.path=FOLDER
  python -m experiments.benchmark record --config=NAME[:VARIANT] [--config.group.field=value ...]
    [--seconds=1200] [--split=test] [--name=NAME] [--workdir=DIR] [--out=benchmarks]

--config is cifar10:record where it is not given. The seconds that count begin when the data are
prepared and end when the last checkpoint is saved: compilation and evaluations on the way included,
Python's own start and the final score not. --seconds is what they may come to: the number of steps
is the config's, and a line after a twentieth of them and one halfway predict the whole from the
pace so far. A run that was stopped cannot be gone on with here.

OUT/runs/NAME/ gets metrics.jsonl, config.json, evaluation.json and bits.npy, the bits per byte of
each sequence of the split, and OUT/records.md a line, above the older ones. The checkpoints stay in
WORKDIR.
"""

import datetime
import pathlib
import re
import time
from collections.abc import Callable
from collections.abc import Sequence

import ml_collections
import numpy as np
from etils import epath

from experiments import cli
from experiments.benchmark import report
from sparse_flax import evaluate
from sparse_flax import run as run_lib
from sparse_flax import train
from sparse_flax.train import metrics

CONFIG = "--config=cifar10:record"
LEDGER = "records.md"
COLUMNS = (
  "date", "config", "commit", "device", "seconds", "tokens", "data", "seed", "result",
  "standard error", "files",
)  # fmt: skip
HEAD = f"""# Records

One line for each run of `python -m experiments.benchmark record`, the newest first. Seconds are
from prepared data to the last checkpoint, compilation and evaluations on the way included. The
result is the exact negative log-likelihood of the whole split. Data: what was trained on and what
was scored, each with its count and the beginning of its digest.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""


class Pace:
  """Predicts the seconds of a run; its calls are those of `stop` in `train.train`, one a step."""

  def __init__(
    self,
    steps: int,
    budget: float,
    *,
    start: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
  ):
    """Args:
    steps: of the run.
    budget: seconds that it may take.
    start: when it began, by the clock.
    say: takes the predictions.
    clock: in seconds.
    """
    self._steps, self._budget, self._start, self._say = steps, budget, start, say
    self._clock, self._done, self._first = clock, 0, 0.0
    self._told = {max(2, steps // 20), steps // 2}

  def __call__(self) -> bool:
    """Counts a step; False, as nothing is to stop."""
    self._done += 1
    now = self._clock() - self._start
    if self._done == 1:  # it compiled
      self._first = now
    elif self._done in self._told:
      self._say(self._prediction(now, (now - self._first) / (self._done - 1)))
    return False

  def _prediction(self, now: float, per_step: float) -> str:
    whole = now + (self._steps - self._done) * per_step
    line = f"prediction: {whole:,.0f} s of {self._budget:,.0f} s"
    if whole <= self._budget:
      return line
    fitting = self._done + int(max(self._budget - now, 0.0) / per_step)
    return f"{line}, too many; config.train.steps={fitting} would fit"


def run(
  config: ml_collections.ConfigDict,
  described: str,
  *,
  name: str,
  seconds: float,
  split: str,
  workdir: pathlib.Path,
  out: pathlib.Path,
  say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> dict:
  """Trains, scores and enters the line.

  Args:
    config: of the run.
    described: the config and its overrides, as they stand in the ledger.
    name: of the folder in `out`/runs.
    seconds: that training may take.
    split: that is reported.
    workdir: of the run; new.
    out: the folder of the ledger.
    say: takes the lines that a person shall read.

  Returns:
    What evaluation.json holds.

  Raises:
    ValueError: a mistake in an argument or the config; nothing has been written then.
    run.NonFiniteError, run.StorageError: as of `train.train`.
  """
  folder = out / "runs" / name
  if not re.fullmatch(r"[\w.,=-]+", name) or name.startswith("."):
    raise ValueError(f"--name={name}: must be letters, digits and any of _.,=-")
  if folder.exists():
    raise ValueError(f"--name={name}: {folder} is there already; choose another name")
  if workdir.exists() and any(workdir.iterdir()):
    raise ValueError(f"--workdir={workdir}: must be new or empty: a record is trained in one go")
  if not _has_our_head(out / LEDGER):
    raise ValueError(
      f"--out={out}: {LEDGER} there must begin with the head that this version writes"
    )
  config = run_lib.checked(config)
  # Prepared before the clock starts; and a run whose split is missing is refused now.
  scored = evaluate.open_dataset(config, split)
  trained = evaluate.open_dataset(config, "train")
  origin = report.origin()
  start = time.monotonic()
  pace = Pace(config.train.steps, seconds, start=start, say=say)
  train.train(config, str(workdir), say=say, stop=pace)
  took = time.monotonic() - start
  _, _, params, step = run_lib.restore_params(workdir, config.train.steps)
  bits = []
  result = evaluate.evaluate(config, params, dataset=scored, step=step, on_sequences=bits.append)
  result |= dict(
    config=described,
    seed=config.seed,
    seconds=round(took, 1),
    tokens=config.train.steps * config.data.batch_size * config.model.seq_len,
    trained_on=trained.identity,
    machine=origin.pop("device"),
    **origin,
  )
  folder.mkdir(parents=True)
  for file in ("metrics.jsonl", "config.json"):
    (folder / file).write_bytes((workdir / file).read_bytes())
  (folder / "evaluation.json").write_text(run_lib.to_json(result))
  np.save(folder / "bits.npy", bits[0].astype(np.float32))
  line = row(result, unit=metrics.UNIT[config.model.modality], files=f"runs/{name}")
  enter(out / LEDGER, line)
  say(f"{HEAD.splitlines()[-2]}\n{line}")
  return result


def row(result: dict, *, unit: str, files: str) -> str:
  """A line of the ledger, of what evaluation.json holds."""
  data = lambda identity: f"{identity['split']} {identity['count']:,} {identity['digest'][:19]}"
  weights = "averaged" if result["ema"] else "as trained"
  error = result.get("standard_error")
  cells = (
    result["date"],
    f"`{result['config']}`",
    result["commit"],
    result["machine"],
    f"{result['seconds']:,.0f}",
    f"{result['tokens']:,}",
    f"{result['data']['name']}: {data(result['trained_on'])}; {data(result['data'])}",
    str(result["seed"]),
    f"{result['bits_per_byte']:.4f} {unit}, weights {weights}",
    "" if error is None else f"{error:.4f}",
    f"[{files}]({files})",
  )
  return f"| {' | '.join(cells)} |"


def enter(ledger: pathlib.Path, line: str) -> None:
  """Puts a line above the others; the ledger is made where there is none."""
  text = ledger.read_text() if ledger.exists() else HEAD
  run_lib.files.write(epath.Path(ledger), f"{HEAD}{line}\n{text.removeprefix(HEAD)}".encode())


def _has_our_head(ledger: pathlib.Path) -> bool:
  """Whether a ledger, if there is one, has the columns of this version."""
  return not ledger.exists() or ledger.read_text().startswith(HEAD)


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__, takes_config=True)
  parser.add_argument("--seconds", type=float, default=1_200, help="that training may take")
  parser.add_argument("--split", choices=("validation", "test"), default="test")
  parser.add_argument("--name", help="of the folder; default: CONFIG-VARIANT-DATE-seedSEED")
  parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/NAME")
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("benchmarks"), help="folder of the ledger"
  )
  cli.add_compilation_cache(parser)
  given = any(re.match(r"--?config(=|$)", x) for x in argv)
  args, config, called = cli.parse_config(parser, [*([] if given else [CONFIG]), *argv])
  today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
  name = args.name or f"{called}-{today}-seed{config.seed}"
  with cli.readable_errors():
    if not 0 < args.seconds <= 1e7:
      raise ValueError(f"--seconds={args.seconds}: must be in (0, 10,000,000]")
    cli.keep_compiled(args.compilation_cache)
    try:
      run(
        config,
        described(argv),
        name=name,
        seconds=args.seconds,
        split=args.split,
        workdir=args.workdir or pathlib.Path("runs") / name,
        out=args.out,
      )
    except run_lib.NonFiniteError as error:
      cli.fail(str(error), status=cli.NOT_FINITE)
  return 0


def described(argv: Sequence[str]) -> str:
  """The config and its overrides, without what says nothing about the result.

  >>> described(["--config=enwik8:quick", "--config.data.path=x", "--config.seed=1", "--seconds=9"])
  'enwik8:quick --config.seed=1'
  """
  joined = re.sub(r"(?m)^(--?config[\w.]*)\n(?!-)", r"\1=", "\n".join(argv))  # NAME VALUE too
  argv = joined.split("\n")
  chosen = [x for x in argv if re.match(r"--?config=", x)] or [CONFIG]
  others = [x for x in argv if re.match(r"--?config\.", x) and "config.data.path" not in x]
  return " ".join([chosen[0].partition("=")[2], *others])
