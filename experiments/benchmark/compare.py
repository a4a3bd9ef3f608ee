"""Compares runs of `record`, sequence by sequence, and draws their curves.

  python -m experiments.benchmark compare --runs=NAME,NAME[,NAME ...] [--name=compare]
    [--out=benchmarks]

The names are of folders in OUT/runs; all others are compared with the first. A difference is the
mean, over the sequences that both scored, of bits less the first run's, with its standard error,
which is several times smaller than those of the two means (`evaluate.paired_difference`). "equal
steps": as many as the first run, of as many tokens. "equal time": seconds within 5 % of its.
"steps in equal time" is how many steps of a run, at its pace, would take as long as the first run:
for the run to make next. PFLOP are of all training steps, by `flops.train_flops`.

OUT/NAME.json gets a row for each run, and OUT/NAME.png the bits on the validation split against
steps, operations and seconds.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import matplotlib.figure
import numpy as np
from jaxtyping import Float

from experiments import cli
from experiments.benchmark import plots
from experiments.benchmark import report
from sparse_flax import evaluate
from sparse_flax import run as run_lib
from sparse_flax.train import flops
from sparse_flax.train import metrics

FILES = ("config.json", "evaluation.json", "metrics.jsonl", "bits.npy")
# What two runs must have scored alike for their sequences to be the same.
SCORED = ("data", "split", "context", "min_context", "sequences")
NEAR = 0.05  # of equal seconds


class Run(NamedTuple):
  """What `record` keeps of a run.

  Attributes:
    name: of its folder.
    result: evaluation.json.
    bits: of each sequence.
    unit: of these.
    step_tokens: of a step, over all sequences.
    step_flops: operations of a step.
    step_seconds: median, without evaluations and compilation; None where it was too short to tell.
    curve: steps, seconds and bits on the validation split.
  """

  name: str
  result: dict[str, Any]
  bits: Float[np.ndarray, "N"]
  unit: str
  step_tokens: int
  step_flops: float
  step_seconds: float | None
  curve: plots.Curve


def read(folder: pathlib.Path) -> Run:
  """A run of OUT/runs.

  Raises:
    ValueError: there is none, or it lacks a file.
  """
  for file in FILES:
    if not (folder / file).is_file():
      raise ValueError(
        f"--runs={folder.name}: must be a run of `record` in {folder.parent}, and has no {file}"
      )
  config = run_lib.load_config(folder)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  paces = [line["step_seconds"] for line in lines if "step_seconds" in line]
  batch_size = config.data.batch_size
  return Run(
    name=folder.name,
    result=json.loads((folder / "evaluation.json").read_text()),
    bits=np.load(folder / "bits.npy"),
    unit=metrics.UNIT[config.model.modality],
    step_tokens=batch_size * config.model.seq_len,
    step_flops=flops.train_flops(config.model, batch_size=batch_size),
    step_seconds=statistics.median(paces) if paces else None,
    curve=plots.curve(folder),
  )


def rows_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """A row for each run, with its differences from the first.

  Raises:
    ValueError: a run did not score what the first one did.
  """
  base, rows = runs[0], []
  for run in runs:
    for field in SCORED:
      own, other = _told(run.result[field]), _told(base.result[field])
      if own != other:
        raise ValueError(
          f"--runs={run.name}: {field} is {own}, and of {base.name} {other}: must have scored the "
          "same sequences"
        )
    row = dict(
      name=run.name,
      **{x: run.result[x] for x in ("config", "seed", "commit", "machine", "date", "step")},
      seconds=run.result["seconds"],
      step_seconds=run.step_seconds,
      pflop=round(run.result["step"] * run.step_flops / 1e15, 3),
      bits=run.result["bits_per_byte"],
      standard_error=run.result["standard_error"],
    )
    if run is not base:
      difference, error = evaluate.paired_difference(run.bits, base.bits)
      row |= dict(difference=difference, difference_error=error)
      row |= _beside(run, base)
    rows.append(row)
  return rows


def _beside(run: Run, base: Run) -> dict[str, Any]:
  """What a run spent, over what the first one did."""
  step, seconds = run.result["step"], run.result["seconds"]
  over = lambda mine, other: round(mine / other, 3)
  same_steps = (step, run.step_tokens) == (base.result["step"], base.step_tokens)
  at = ["equal steps"] * same_steps
  at += ["equal time"] * (abs(seconds / base.result["seconds"] - 1) <= NEAR)
  found = dict(
    at=", ".join(at),
    flops_over=over(step * run.step_flops, base.result["step"] * base.step_flops),
    seconds_over=over(seconds, base.result["seconds"]),
  )
  if run.step_seconds:
    more = (base.result["seconds"] - seconds) / run.step_seconds
    found["steps_in_equal_time"] = max(0, step + int(more))
  return found


def _told(value: Any) -> Any:
  """Of data their digest: the rest may be told otherwise by another version."""
  return value["digest"] if isinstance(value, dict) else value


def draw(runs: Sequence[Run]) -> matplotlib.figure.Figure:
  """Validation bits of each run against steps, PFLOP and seconds."""
  figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained", facecolor="white")
  labels = ("steps", "PFLOP, forward and backward", "seconds, compilation included")
  for n, (axes, label) in enumerate(zip(figure.subplots(1, 3, sharey=True), labels, strict=True)):
    for run in runs:
      steps, seconds, bits = run.curve
      along = (steps, [x * run.step_flops / 1e15 for x in steps], seconds)[n]
      axes.plot(along, bits, "o-", markersize=3, label=run.name)
    axes.set(xlabel=label, xscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if n == 0:
      axes.set_ylabel(f"{runs[0].unit}, validation")
      axes.legend(frameon=False, fontsize=9)
  return figure


def run(names: Sequence[str], *, name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """Compares, prints and writes; returns the rows.

  Args:
    names: of folders in `out`/runs, the first of which the others are compared with.
    name: of the two files.
    out: the folder of the ledger.

  Raises:
    ValueError: a mistake in an argument, or runs that cannot be compared; nothing is written then.
  """
  if len(names) < 2 or len({*names}) < len(names):
    raise ValueError(f"--runs={','.join(names)}: must be two names or more, each once")
  for text, flag in ((name, "name"), *((x, "runs") for x in names)):
    if not re.fullmatch(r"[\w.,=-]+", text) or text.startswith("."):
      raise ValueError(f"--{flag}={text}: must be letters, digits and any of _.,=-")
  runs = [read(out / "runs" / x) for x in names]
  rows = rows_of(runs)
  show = lambda row, field, form: form.format(row[field]) if row.get(field) is not None else ""
  table = [
    (row["name"], row["step"], f"{row['seconds']:,.0f}", f"{row['pflop']:,.1f}",
     f"{row['bits']:.4f}", show(row, "difference", "{:+.4f}"),
     show(row, "difference_error", "{:.4f}"), row.get("at", ""),
     show(row, "flops_over", "{:.2f}"), show(row, "seconds_over", "{:.2f}"),
     show(row, "steps_in_equal_time", "{:,}"))
    for row in rows
  ]  # fmt: skip
  header = ("run", "steps", "seconds", "PFLOP", runs[0].unit, "difference", "error", "at",
            "x FLOP", "x seconds", "steps in equal time")  # fmt: skip
  report.print_table(header, table)
  (out / f"{name}.json").write_text(run_lib.to_json({"rows": rows}))
  draw(runs).savefig(out / f"{name}.png", dpi=100, metadata={"Software": None})
  print(f"\nwrote {out / name}.json and .png", flush=True)
  return rows


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--runs", required=True, metavar="NAME,NAME", help="the first is the base")
  parser.add_argument("--name", default="compare", help="of the two files")
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("benchmarks"), help="folder of the ledger"
  )
  args = parser.parse_args(argv)
  with cli.readable_errors():
    run(args.runs.split(","), name=args.name, out=args.out)
  return 0
