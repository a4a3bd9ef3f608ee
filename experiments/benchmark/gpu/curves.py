"""The first 200 steps of each recipe by the modules of its layers, and by the kernels.

The recipes as they are, on real bytes of the package, but for smaller batches and a warm-up of 50
steps. What is computed the same differs by rounding alone: the modules run twice, with two seeds of
dropout, and the kernels once, with the first of these. Kernels whose losses lie nearer to those of
that seed than those of another seed do not change what is learned.

A process for each run, several at a time, for nothing is timed. Losses are in bits per byte.
"""

import concurrent.futures
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import matplotlib.figure
import numpy as np

from experiments.benchmark import report
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import step
from experiments.benchmark.gpu import timing

STEPS, WARM_UP = 200, 50
EVERY = 5  # steps between those that are written down
LAST = 50  # steps over which differences are averaged
BATCHES = {"cifar10": 8, "enwik8": 4, "imagenet64": 2, "audio": 1}  # recipe: sequences per step
PARTS = tuple(BATCHES)
# Side by side: the memory that they need together is below that of an H100.
WORKERS, CHILD_SECONDS = 6, 540
MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Run(NamedTuple):
  """A row of the result."""

  recipe: str  # NAME or NAME:VARIANT of configs
  implementation: str  # "modules" or "mosaic_gpu"
  seed: int  # of dropout


WAYS = (("modules", 0), ("modules", 1), ("mosaic_gpu", 0))
COLORS = ("#0072b2", "#56b4e9", "#d55e00")


def job_of(run: Run) -> dict[str, Any]:
  """What `steps.losses` is given."""
  changes = dict(
    data=dict(batch_size=BATCHES[run.recipe]),
    train=dict(accumulation=1),
    optim=dict(warmup_steps=WARM_UP),
    mesh=step.ALONE,
  )
  by = dict(residual=run.implementation, seed=run.seed)
  return dict(recipe=run.recipe, changes=changes, steps=STEPS, **by)


def measure(run: Run) -> dict[str, Any]:
  """A row; `losses` of the steps 1, 5, 10, ... are None where it failed."""
  row = run._asdict() | dict(batch=BATCHES[run.recipe], losses=None)
  program = processes.Program("losses", job_of(run))
  return row | processes.told_by(program, seconds=CHILD_SECONDS, memory=MEMORY)


def steps_shown() -> list[int]:
  return [n for n in range(1, STEPS + 1) if n == 1 or n % EVERY == 0]


def gaps_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """By recipe: mean distance of losses of the last steps, from those of the modules' first seed."""
  by = {(row["recipe"], row["implementation"], row["seed"]): row["losses"] for row in rows}
  gaps = []
  for recipe in dict.fromkeys(row["recipe"] for row in rows):
    first, *others = (by.get((recipe, *way)) for way in WAYS)
    if not all(losses and len(losses) == STEPS for losses in (first, *others)):
      continue
    away = [np.subtract(losses, first)[-LAST:] for losses in others]
    gaps.append(
      dict(
        recipe=recipe,
        first=first[0],
        last=round(float(np.mean(first[-LAST:])), 4),
        of_seeds=round(float(np.abs(away[0]).mean()), 6),
        of_kernels=round(float(np.abs(away[1]).mean()), 6),
        shift_of_kernels=round(float(away[1].mean()), 6),
      )
    )
  return gaps


def draw(rows: list[dict[str, Any]]) -> matplotlib.figure.Figure:
  """The curves of each recipe, and below them how far they are from the modules' first seed."""
  recipes = list(dict.fromkeys(row["recipe"] for row in rows))
  figure = matplotlib.figure.Figure(figsize=(4.2 * len(recipes), 6), layout="constrained")
  grid = figure.subplots(2, len(recipes), squeeze=False, sharex=True, height_ratios=(2, 1))
  by = {(row["recipe"], row["implementation"], row["seed"]): row["losses"] for row in rows}
  for recipe, (above, below) in zip(recipes, grid.T, strict=True):
    first = by.get((recipe, *WAYS[0]))
    for way, color in zip(WAYS, COLORS, strict=True):
      losses = by.get((recipe, *way))
      if not losses:
        continue
      steps = np.arange(1, len(losses) + 1)
      style = dict(color=color, lw=1, label=f"{way[0]}, seed {way[1]}")
      above.plot(steps, losses, **style)
      if first and way != WAYS[0]:
        both = min(len(first), len(losses))
        below.plot(steps[:both], np.subtract(losses[:both], first[:both]), **style)
    above.set(title=recipe)
    above.grid(alpha=0.3)
    below.set(xlabel="step")
    below.grid(alpha=0.3)
  grid[0, 0].set(ylabel="bits per byte")
  grid[1, 0].set(ylabel="less modules, seed 0")
  grid[0, 0].legend()
  return figure


def save(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """The JSON, of some of the steps, and the picture, of all, beside it."""
  shown = steps_shown()
  thin = lambda losses: losses and [losses[n - 1] for n in shown if n <= len(losses)]
  facts = dict(steps=shown, warm_up=WARM_UP, averaged=LAST, gaps=gaps_of(rows))
  report.save(path, [row | dict(losses=thin(row["losses"])) for row in rows], **facts)
  draw(rows).savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes curves_<device>.json and .png; whether all came to their ends."""
  print(__doc__, flush=True)
  path, rows = out / f"curves_{report.short_device()}.json", {}
  runs = [Run(recipe, *way) for recipe in timing.chosen(BATCHES, only) for way in WAYS]
  progress = timing.Progress(len(runs))
  with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
    # Those that take the longest first.
    waiting = {pool.submit(measure, run): run for run in reversed(runs)}
    for done in concurrent.futures.as_completed(waiting):
      ended, row = waiting[done], done.result()
      rows[ended] = row
      save(path, [rows[run] for run in runs if run in rows])
      last = f"{row['losses'][-1]:.3f} bits" if row["losses"] else "no step"
      progress(*ended._replace(seed=f"seed {ended.seed}"), row.get("error") or last)
  result = [rows[run] for run in runs]
  header = ("recipe", "first", f"last {LAST}", "|seed 1 - seed 0|", "|kernels - modules|", "mean")
  fields = ("first", "last", "of_seeds", "of_kernels", "shift_of_kernels")
  report.print_table(
    header, [(gap["recipe"], *(f"{gap[x]:.4f}" for x in fields)) for gap in gaps_of(result)]
  )
  for row in result:
    if "error" in row:
      print("FAILED", row["recipe"], row["implementation"], row["seed"], row["error"])
  print(f"\nwrote {path} and {path.with_suffix('.png')}, on {jax.devices()[0].device_kind}")
  return not any("error" in row for row in result)
