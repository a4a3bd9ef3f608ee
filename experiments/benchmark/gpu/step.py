"""Training steps of the paper's models on one GPU: ours, and those of what a user could take.

The step is the one that `experiments.train` runs for the recipe: dropout, what the recipe keeps for
the backward pass, AdamW with clipping, averaged weights, the state given up. The batch is what one
GPU gets. "pytorch" and "jax_cudnn" compute the same bodies with the tools of those libraries: the
first the same patterns, by FlexAttention, the second, as they have no other, dense attention. Each
has two rows: one keeps everything, one recomputes its blocks. "ours_modules" has our kernels for
attention alone. "baseline" is the step of another checkout.

A process for each row: no memory is shared, and one that dies takes no other with it. Those of
"ours" and "baseline" compile side by side, and then each has the GPU to itself; `compile_s` has the
others in it. Time is that from the end of a step to the end of the next, while the host is a step
ahead, as in training. MFU counts the model's operations, none twice, and of attention the pairs of
its pattern: it compares steps of one model, not sparse steps with dense ones. The share of our
kernels is of the time of all kernels of a step, by CUPTI. Peak memory is what XLA plans for, or
what PyTorch's allocator held; `in_use_gb` of ours is what JAX's allocator held. Fewer layers, where
recomputation keeps depth from costing memory: --only=cifar10_32,cifar10_64,cifar10,ours
--remat=full,hidden,none.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import ml_collections

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import masks
from sparse_flax.model import layer_patterns
from sparse_flax.train import flops

CHILD_SECONDS = 420  # of one row: importing, compiling, running
IN_TURNS_SECONDS = 900  # of one that waits for others


class Body(NamedTuple):
  """One of the paper's models, as it is measured."""

  recipe: str  # NAME or NAME:VARIANT of configs
  batch: int  # sequences of a step
  changes: dict[str, dict[str, Any]] | None = None  # {group: {field: value}} of the config
  default: bool = True  # else only where `only` names it

  def on_one_device(self, **model: Any) -> dict[str, dict[str, Any]]:
    """What differs from the recipe: {group: {field: value}}; `model` goes over the body's own."""
    changes = {group: dict(values) for group, values in (self.changes or {}).items()}
    return changes | {
      "model": changes.get("model", {}) | model,
      "data": changes.get("data", {}) | dict(batch_size=self.batch),
      "train": changes.get("train", {}) | dict(accumulation=1),
      "mesh": ALONE,
    }

  def config(self, **model: Any) -> ml_collections.ConfigDict:
    """The recipe of this checkout on one device, with the changes."""
    config = cli.recipe(self.recipe)
    for group, values in self.on_one_device(**model).items():
      config[group].update(values)
    return config


class Way(NamedTuple):
  """A way to compute a body."""

  program: str  # of the modules in `steps`
  attention: str = "sparse"  # of ATTENTION
  residual: str | None = None  # of pallas_kernels.residual.override
  default: bool = True  # else only where `only` names it


BODIES = {
  "cifar10": Body("cifar10", 16),
  "enwik8": Body("enwik8", 8),
  "imagenet64": Body("imagenet64", 4),
  "audio": Body("audio", 1),
  "cifar10_32": Body("cifar10", 16, dict(model=dict(num_layers=32)), default=False),
  "cifar10_64": Body("cifar10", 16, dict(model=dict(num_layers=64)), default=False),
}
# What each changes of config.model: "merged" has both halves of strided attention in every layer.
ATTENTION: dict[str, dict[str, Any]] = {
  "sparse": {},
  "merged": dict(attention_layers=("strided",)),
  "dense": dict(attention_layers=("dense",)),
}
# In this order, so that a run that is stopped has ours.
WAYS = {
  "ours": Way("ours"),
  "baseline": Way("ours"),
  "pytorch": Way("pytorch"),
  "jax_cudnn": Way("plain_jax", "dense"),
  "ours_modules": Way("ours", residual="modules", default=False),
  "ours_merged": Way("ours", "merged", default=False),
  "ours_dense": Way("ours", "dense", default=False),
  "pytorch_dense": Way("pytorch", "dense", default=False),
}
PARTS = (*BODIES, *WAYS)
PEERS_REMAT = ("none", "full")  # what their steps keep of a block: everything, or its input
ALONE = dict.fromkeys(("data", "fsdp", "tensor", "sequence"), 1)  # config.mesh of one device


class Case(NamedTuple):
  """A row to be measured."""

  body: str
  way: str
  remat: str | None  # of config.model; None: the recipe's

  def changes(self) -> dict[str, dict[str, Any]]:
    """What differs from the recipe: {group: {field: value}}."""
    return BODIES[self.body].on_one_device(**self._model())

  def config(self) -> ml_collections.ConfigDict:
    """The recipe of this checkout on one device, with the changes."""
    return BODIES[self.body].config(**self._model())

  def _model(self) -> dict[str, Any]:
    return ATTENTION[WAYS[self.way].attention] | ({"remat": self.remat} if self.remat else {})

  def job(self) -> dict[str, Any]:
    """What the program of the row is given."""
    if WAYS[self.way].program == "ours":
      job = dict(recipe=BODIES[self.body].recipe, changes=self.changes())
      asked_for = WAYS[self.way].residual
      return job | (dict(residual=asked_for) if asked_for else {})
    config = self.config()
    model = config.model.to_dict()
    model |= {"remat": model["remat"] if model["remat"] in PEERS_REMAT else PEERS_REMAT[-1]}
    return dict(
      model=model,
      patterns=[masks.described(pattern) for pattern in layer_patterns.patterns_of(**model)],
      optim=config.optim.to_dict(),
      ema_decay=config.train.ema_decay,
      batch=config.data.batch_size,
    )


def cases_of(only: tuple[str, ...], remats: tuple[str, ...], baseline: bool) -> list[Case]:
  """Ours first, then each peer's; a peer has one row for all `remats` that recompute something."""
  bodies = [name for name in BODIES if name in only] or [x for x in BODIES if BODIES[x].default]
  default = [name for name, way in WAYS.items() if way.default and (baseline or name != "baseline")]
  cases = {}
  for way in [name for name in WAYS if name in only] or default:
    for body in bodies:
      for remat in remats or ((None,) if WAYS[way].program == "ours" else PEERS_REMAT):
        case = Case(body, way, None if way == "baseline" else remat)
        cases.setdefault(json.dumps([case.way, case.job()], sort_keys=True), case)
  return list(cases.values())


def row_of(case: Case, figures: dict[str, Any]) -> dict[str, Any]:
  """A row of the result, of what its program told."""
  config = case.config()
  model, (B, T) = config.model, (config.data.batch_size, config.model.seq_len)
  row = dict(
    body=case.body,
    implementation=case.way,
    attention=WAYS[case.way].attention,
    patterns=[repr(pattern) for pattern in layer_patterns.patterns_of(**model)],
    remat=model.remat,
    dropout=model.dropout,
    batch=B,
    seq_len=T,
    ms=None,
  )
  return with_rates(row | figures, config)


def with_rates(row: dict[str, Any], config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The row of a config, where it has a time with tokens per second and MFU."""
  if row["ms"] is None:
    return row
  B, model = config.data.batch_size, config.model
  peak = flops.peak_flops(jax.devices()[0].device_kind)
  needed = flops.train_flops(model, batch_size=B)
  return row | dict(
    tokens_per_second=round(1e3 * B * model.seq_len / row["ms"]),
    mfu=round(1e3 * needed / (row["ms"] * peak), 4) if peak else None,
  )


def measured(
  cases: list[Case], baseline: pathlib.Path | None
) -> Iterator[tuple[Case, dict[str, Any]]]:
  """Each case and what its program told. Peers run one at a time: some take all of the memory."""
  ours = [case for case in cases if WAYS[case.way].program == "ours"]
  checkout = lambda case: baseline if case.way == "baseline" else None
  programs = {case: processes.Program("ours", case.job(), checkout(case)) for case in ours}
  yield from processes.told_in_turns(programs, seconds=IN_TURNS_SECONDS)
  for case in cases:
    if case not in programs:
      program = processes.Program(WAYS[case.way].program, case.job())
      yield case, processes.told_by(program, seconds=CHILD_SECONDS)


def compare(rows: list[dict[str, Any]]) -> None:
  """Adds how many times longer a step takes than ours, the fastest of that body."""
  ours = {}
  for row in rows:
    if row["implementation"] == "ours" and row["ms"]:
      ours[row["body"]] = min(row["ms"], ours.get(row["body"], row["ms"]))
  for row in rows:
    if row["ms"] and row["body"] in ours:
      row["over_ours"] = round(row["ms"] / ours[row["body"]], 3)


def run(
  out: pathlib.Path,
  only: tuple[str, ...] = (),
  *,
  remats: tuple[str, ...] = (),
  baseline: pathlib.Path | None = None,
) -> bool:
  """Measures, prints and writes step_<device>.json after every row; whether all have figures."""
  print(__doc__, flush=True)
  if "baseline" in only and not baseline:
    print("baseline: --baseline=DIR names its checkout", flush=True)
    return False
  path, found = out / f"step_{report.short_device()}.json", {}
  rows: list[dict[str, Any]] = []
  cases = cases_of(only, remats, bool(baseline))
  facts = dict(bodies={case.body: BODIES[case.body]._asdict() for case in cases})
  facts |= dict(baseline=baseline.name) if baseline else {}
  progress = timing.Progress(len(cases))
  for case, figures in measured(cases, baseline):
    found[case] = row = row_of(case, figures)
    rows = [found[case] for case in cases if case in found]
    compare(rows)
    report.save(path, rows, **facts)
    progress(case.body, case.way, row["remat"], row.get("error") or f"{row['ms']} ms")
  show = lambda value, form: "" if value is None else form.format(value)
  table = [
    (row["body"], row["implementation"], row["remat"], show(row["ms"], "{:,.1f}") or "failed",
     show(row.get("tokens_per_second"), "{:,}"), show(row.get("mfu"), "{:.1%}"),
     show(row.get("peak_gb"), "{:.2f}"), show(row.get("ours_share"), "{:.1%}"),
     show(row.get("over_ours"), "{:.2f}"))
    for row in rows
  ]  # fmt: skip
  header = ("body", "implementation", "remat", "ms", "tokens/s", "MFU", "GB", "ours", "it / ours")
  report.print_table(header, table)
  failed = [row for row in rows if "error" in row]
  for row in failed:
    print("FAILED", row["body"], row["implementation"], row["remat"])
    print(f"  {row['error']}")
  report.write(path, rows, **facts)
  return not failed
