"""Training steps of the paper's models on one GPU: ours, and those of what a user could take.

The step is the one that `experiments.train` runs for the recipe: dropout, what the recipe keeps for
the backward pass, AdamW with clipping, averaged weights, the state given up. The batch is what one
GPU gets. "pytorch" and "jax_cudnn" compute the same bodies with the tools of those libraries: the
first the same patterns, by FlexAttention, the second, as they have no other, dense attention. Each
has two rows: one keeps everything, one recomputes its blocks. "ours_modules" has our kernels for
attention alone. "baseline" is the step of another checkout.

A process for each row: no memory is shared, and one that dies takes no other with it. Time is that
from the end of a step to the end of the next, while the host is a step ahead, as in training. MFU
counts the model's operations, none twice, and of attention the pairs of its pattern: it compares
steps of one model, not sparse steps with dense ones. The share of our kernels is of the time of all
kernels of a step, by CUPTI. Peak memory is what XLA plans for, or what PyTorch's allocator held;
`in_use_gb` of ours is what JAX's allocator held. Fewer layers, where recomputation keeps depth from
costing memory: --only=cifar10_32,cifar10_64,cifar10,ours --remat=full,hidden,none.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import ml_collections

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import masks
from sparse_flax.model import layer_patterns
from sparse_flax.train import flops

ROOT = pathlib.Path(__file__).resolve().parents[3]
LIBRARIES = ("configs", "pallas_kernels", "sparse_flax")  # what is measured of a checkout
CHILD_SECONDS = 420  # of one row: importing, compiling, running
# Of JAX in the children, which have the device to themselves but for what this process holds.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}


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


@contextlib.contextmanager
def packages(checkout: pathlib.Path | None) -> Iterator[str]:
  """The folder to import from: the libraries of a checkout, and the benchmark of this one."""
  if checkout is None:
    yield str(ROOT)
    return
  with tempfile.TemporaryDirectory(prefix="step-baseline-") as folder:
    for name in LIBRARIES:
      os.symlink(checkout.resolve() / name, os.path.join(folder, name))
    os.symlink(ROOT / "experiments", os.path.join(folder, "experiments"))
    yield folder


def figures_of(case: Case, checkout: pathlib.Path | None) -> dict[str, Any]:
  """What the program of a row tells."""
  return told_by(WAYS[case.way].program, case.job(), checkout, seconds=CHILD_SECONDS)


def told_by(
  program: str,
  job: dict[str, Any],
  checkout: pathlib.Path | None = None,
  *,
  seconds: float,
  memory: dict[str, str] = MEMORY,
  on_start: Callable[[subprocess.Popen], None] = lambda process: None,
) -> dict[str, Any]:
  """What a program of `steps` tells, with an `error` where it did not come to its end.

  Args:
    program: the name of its module.
    job: what it is given.
    checkout: whose libraries are measured; None: these.
    seconds: after which it is killed.
    memory: JAX's variables of the environment for its share of the device.
    on_start: gets the process, for who may have to end it before.
  """
  name = f"experiments.benchmark.gpu.steps.{program}"
  command = (sys.executable, "-P", "-m", name, json.dumps(job))
  with packages(checkout) as path:
    env = {key: x for key, x in os.environ.items() if key != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    env = memory | env | {"PYTHONPATH": os.pathsep.join((path, env.get("PYTHONPATH", "")))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    # A session of its own: compilers of PyTorch are processes too, and end with it.
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    on_start(process)
    try:
      output, errors = process.communicate(timeout=seconds)
      last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
      error = f"exit status {process.returncode}: {last.strip()}"[:1_000]
    except subprocess.TimeoutExpired:
      error = f"not done within {seconds} s"
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
      output, errors = process.communicate()
  figures = child.told(output)
  return figures if process.returncode == 0 else {"error": error} | figures


def measure(case: Case, checkout: pathlib.Path | None = None) -> dict[str, Any]:
  """A row of the result."""
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
  ) | figures_of(case, checkout)
  return with_rates(row, config)


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
  path, rows = out / f"step_{report.short_device()}.json", []
  cases = cases_of(only, remats, bool(baseline))
  facts = dict(bodies={case.body: BODIES[case.body]._asdict() for case in cases})
  facts |= dict(baseline=baseline.name) if baseline else {}
  progress = timing.Progress(len(cases))
  for case in cases:
    row = measure(case, baseline if case.way == "baseline" else None)
    rows.append(row)
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
