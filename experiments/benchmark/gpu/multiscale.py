"""Models of several scales beside flat ones: training steps, and steps of sampling.

Training steps are those of `step`: the recipe's optimizer, its dropout for text and none elsewhere,
random bytes. Models of one group have equal batches. TFLOP are of a forward pass over one sequence,
by `flops.forward_flops`; `over_flat` is the tokens per second over those of the flat model.

Sampling is by steps in the middle of a sequence, with random weights, and is compared with the flat
model's by the same implementation. From the first byte on, the likeliest bytes by cached steps are
compared with those of a pass over the whole sequence; these may differ where two are nearly alike,
and a row fails where the byte that was chosen is not among the likeliest.

A process for each training step, and for each model and implementation of sampling. All compile
side by side, and then each has the GPU to itself; `compile_s` has the others in it.

Models are trained by `python -m experiments.benchmark record` and compared by `compare`: see
docs/multiscale.md.
"""

import pathlib
from typing import Any
from typing import NamedTuple

from experiments.benchmark import report
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import step
from experiments.benchmark.gpu import timing
from sparse_flax.model import levels
from sparse_flax.train import flops

KINDS = ("steps", "sampling")
SECONDS = 420  # of a row, the time that it waits for others included
CHECKED = 96  # bytes of each sequence
STEPS = 240  # of a call that is timed; whole groups of all models
FLAT = "flat"


class Sampling(NamedTuple):
  """How a model is sampled from."""

  implementations: tuple[str, ...]  # of a step
  batches: tuple[int, ...] = (16, 64)
  checked: int = CHECKED  # 0 where a pass over the sequence would take too much memory


class Model(NamedTuple):
  """A model of a group."""

  body: step.Body
  sampling: Sampling | None = None


# Twice the paper's feed-forward width, as in `cifar10:record`, so that fewer layers do.
_IMAGE = dict(ff_mult=4.0, qk_ratio=1.0, dropout=0.0)
_TEXT = dict(seq_len=8_192, position_shape=(64, 128))
_BOTH, _FEW = Sampling(("cluster", "triton")), Sampling(("triton",))

# {group: {name: model}}; the flat one comes first.
GROUPS = {
  "cifar10": {
    FLAT: Model(step.Body("cifar10", 32, dict(model=dict(_IMAGE, num_layers=24))), _BOTH),
    "shorten": Model(
      step.Body(
        "cifar10:shorten",
        32,
        dict(model=dict(_IMAGE, num_layers=2, num_layers_after=2, inner=dict(num_layers=20))),
      ),
      _BOTH,
    ),
    "patches": Model(
      step.Body(
        "cifar10:patches",
        32,
        dict(
          model=dict(
            _IMAGE,
            num_layers=2,
            num_layers_after=2,
            inner=dict(num_layers=2, num_layers_after=2, inner=dict(num_layers=16)),
          )
        ),
      ),
      _FEW,  # the one kernel of a step has no width of 384
    ),
  },
  "enwik8": {
    FLAT: Model(step.Body("enwik8", 8, dict(model=dict(_TEXT, num_layers=12)))),
    "shorten": Model(
      step.Body(
        "enwik8:shorten",
        8,
        dict(
          model=dict(
            _TEXT,
            num_layers=2,
            num_layers_after=1,
            stride=128,
            inner=dict(shorten=4, num_layers=9),
          )
        ),
      )
    ),
    "megabyte": Model(
      step.Body(
        "enwik8:megabyte",
        8,
        dict(
          model=dict(_TEXT, num_layers_after=3, inner=dict(num_layers=9, width=768, num_heads=12))
        ),
      )
    ),
  },
  "audio": {
    FLAT: Model(step.Body("audio:1m", 1)),
    "shorten": Model(step.Body("audio:1m-shorten", 1)),
  },
  "photographs": {
    # 24 layers of width 512 on bytes, as many as the other has on patches.
    FLAT: Model(
      step.Body(
        "imagenet64",
        1,
        dict(
          model=dict(
            seq_len=196_608,
            position_shape=(256, 256, 3),
            num_layers=24,
            stride=768,  # one row of 256 pixels
            dropout=0.0,
          )
        ),
      ),
      Sampling(("cluster",), (4,), 0),
    ),
    "patches": Model(step.Body("photographs", 1), Sampling(("cluster",), (4,), 0)),
  },
}
PARTS = (*KINDS, *GROUPS, *(f"{group}_{name}" for group in GROUPS for name in GROUPS[group]))


class Case(NamedTuple):
  """What one process measures."""

  kind: str  # of KINDS
  group: str
  name: str
  implementation: str | None  # of a step of sampling

  @property
  def model(self) -> Model:
    return GROUPS[self.group][self.name]

  @property
  def title(self) -> str:
    return f"{self.group}_{self.name}"

  @property
  def program(self) -> str:
    """Of the modules in `steps`."""
    return "ours" if self.kind == "steps" else "sampled"

  def job(self) -> dict[str, Any]:
    """What its program is given, but for its turn."""
    body, sampling = self.model.body, self.model.sampling
    job = dict(recipe=body.recipe, changes=body.on_one_device())
    if self.kind == "steps":
      return job
    assert sampling is not None
    how = dict(implementation=self.implementation, batches=sampling.batches)
    return job | how | dict(checked=sampling.checked, steps=STEPS)

  def rows(self, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the result, of what its program told."""
    config = self.model.body.config()
    model = config.model
    row = dict(
      kind=self.kind,
      group=self.group,
      name=self.name,
      seq_len=model.seq_len,
      tflop=round(flops.forward_flops(model) / 1e12, 4),
      levels=[
        dict(rows=x.length, layers=x.depth, width=x.width, patterns=[repr(p) for p in x.patterns])
        for x in levels.specs_of(**model)
      ],
    )
    if self.kind == "steps":
      row |= dict(batch=config.data.batch_size, remat=model.remat, dropout=model.dropout)
      return [step.with_rates(row | dict(ms=None) | figures, config)]
    figures, sampling = dict(figures), self.model.sampling
    assert sampling is not None
    of_batch = {B: figures.pop(f"batch_{B}", {}) for B in sampling.batches}
    row |= dict(implementation=self.implementation)
    rows = [
      row | dict(batch=B, ms_per_step=None) | of_batch[B] | (figures if n == 0 else _error(figures))
      for n, B in enumerate(sampling.batches)
    ]
    for row in rows:
      if row["ms_per_step"]:
        row["seconds_per_sequence"] = round(row["ms_per_step"] * model.seq_len / 1e3, 2)
    return rows


def _error(figures: dict[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in figures.items() if name == "error"}


def cases_of(only: tuple[str, ...]) -> list[Case]:
  """Those of some kinds, groups or models, or of all; training steps first."""
  kinds = [kind for kind in KINDS if kind in only] or KINDS
  models = [(group, name) for group in GROUPS for name in GROUPS[group]]
  named = [(g, n) for g, n in models if g in only or f"{g}_{n}" in only]
  cases = []
  for kind in kinds:
    for group, name in named or models:
      sampling = GROUPS[group][name].sampling
      ways = (None,) if kind == "steps" else sampling.implementations if sampling else ()
      cases += [Case(kind, group, name, way) for way in ways]
  return cases


def compare(rows: list[dict[str, Any]]) -> None:
  """Adds how many times the tokens per second of the flat model a row has."""
  speed = lambda row: row.get("tokens_per_second") or row.get("bytes_per_second")
  key = lambda row: tuple(row.get(x) for x in ("kind", "group", "implementation", "batch"))
  flat = {key(row): speed(row) for row in rows if row["name"] == FLAT and speed(row)}
  for row in rows:
    if speed(row) and key(row) in flat:
      row["over_flat"] = round(speed(row) / flat[key(row)], 3)


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes multiscale_DEVICE.json after every row; whether all have figures.

  Args:
    out: folder of the result.
    only: of PARTS; empty is all.
  """
  print(__doc__, flush=True)
  path, cases = out / f"multiscale_{report.short_device()}.json", cases_of(only)
  progress, found = timing.Progress(len(cases)), {}
  rows: list[dict[str, Any]] = []
  programs = {case: processes.Program(case.program, case.job()) for case in cases}
  for case, figures in processes.told_in_turns(programs, seconds=SECONDS):
    found[case] = case.rows(figures)
    rows = [row for case in cases for row in found.get(case, [])]
    compare(rows)
    report.save(path, rows)
    first = found[case][0]
    speed = first.get("ms") or first.get("ms_per_step")
    progress(case.kind, case.title, case.implementation or "",
             first.get("error") or f"{speed} ms")  # fmt: skip
  show = lambda value, form: "" if value is None else form.format(value)
  table = [
    (row["kind"], f"{row['group']} {row['name']}", row.get("implementation") or row["remat"],
     row["batch"], show(row.get("ms") or row.get("ms_per_step"), "{:,.3f}") or "failed",
     show(row.get("tokens_per_second") or row.get("bytes_per_second"), "{:,}"),
     show(row.get("over_flat"), "{:.2f}"), row["tflop"], show(row.get("peak_gb"), "{:.2f}"),
     show(row.get("alike"), "{:.1%}"))
    for row in rows
  ]  # fmt: skip
  header = ("kind", "model", "by", "batch", "ms", "tokens/s", "x flat", "TFLOP", "GB", "alike")
  report.print_table(header, table)
  failed = [row for row in rows if "error" in row]
  for row in failed:
    print("FAILED", row["kind"], row["group"], row["name"], row.get("implementation") or "",
          f"x {row['batch']}")  # fmt: skip
    print(f"  {row['error']}")
  report.write(path, rows)
  return not failed
