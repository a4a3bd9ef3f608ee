"""One training step of the paper's models on a GPU, with sparse attention and with dense.

The step is the one that `experiments.train` runs for the recipe: dropout, recomputation as the
recipe has it, AdamW with clipping, averaged weights, the state given up. The batch is what one GPU
gets. "sparse" is the recipe's attention, "merged" has both halves of strided attention in every
layer, under one softmax, and "dense" every earlier token; "dots" keeps the results of matmuls and
of attention instead of computing them again.

MFU counts the model's operations, none twice, and of attention the pairs of its pattern: it
compares steps of one model, not sparse steps with dense ones. The share of our kernels is of the
time of all kernels of a step, by CUPTI.
"""

import collections
import concurrent.futures
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import ml_collections
from flax import nnx

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu import training
from pallas_kernels import api
from sparse_flax.model import transformer
from sparse_flax.train import flops

STEPS = 6
SECONDS = 2.0  # of measuring per program, but at least 3 steps
OUR_KERNELS = "mosaic"  # part of the names of all kernels in Mosaic, which XLA's own do not have


class Body(NamedTuple):
  """One of the paper's models, and the ways in which it is measured."""

  recipe: str  # of configs
  batch: int  # sequences of a step
  modes: tuple[str, ...]  # of MODES


# What each mode changes of config.model.
MODES: dict[str, dict[str, Any]] = {
  "sparse": {},
  "dots": dict(remat="dots"),
  "merged": dict(attention_layers=("strided",)),
  "dense": dict(attention_layers=("dense",)),
}
BODIES = {
  "enwik8": Body("enwik8", 4, ("sparse", "dots", "dense")),
  "cifar10": Body("cifar10", 16, ("sparse", "merged", "dense")),
  "imagenet64": Body("imagenet64", 4, ("sparse", "merged", "dense")),
  "audio64k": Body("audio", 1, ("sparse", "merged", "dense")),
}
PARTS = tuple(BODIES)


def config_of(name: str, mode: str) -> ml_collections.ConfigDict:
  """The recipe of a body on one device, with what a mode changes."""
  body = BODIES[name]
  config = cli.recipe(body.recipe)
  config.model.update(MODES[mode])
  config.data.batch_size = body.batch
  config.train.accumulation = 1
  config.mesh.update(dict.fromkeys(config.mesh, 1))
  return config


class Program(NamedTuple):
  """A compiled step, and the implementations of attention that it contains."""

  training: training.Training
  step: jax.stages.Compiled
  implementations: tuple[str, ...]


def compiled(config: ml_collections.ConfigDict) -> Program:
  """The step of a config; nothing has run."""
  made = training.prepare(config)
  with jax.set_mesh(made.mesh):
    traced = made.step.trace(*made.shapes)
    return Program(made, traced.lower().compile(), api.implementations_in(traced.jaxpr))


def compile_all(jobs: dict[Hashable, Callable[[], Any]]) -> dict[Hashable, Any]:
  """Runs the jobs, each of which compiles a program, in threads; what one raises is its result.

  In one process, unlike the other benchmarks: the matmuls of all are then tuned alike.
  """

  def attempt(job):
    try:
      return job()
    except Exception as error:  # whatever a compiler says, the other programs go on
      return error

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))


def steps_of(program: Program) -> Iterator[dict[str, jax.Array]]:
  """Runs a step each time it is asked, and gives what the step records."""
  state, tokens = program.training.first_state(), program.training.tokens()
  key = jax.random.key(1)
  while True:
    state, record = program.step(state, tokens, key)
    yield record


def figures(program: Program) -> dict[str, Any]:
  """Median time of a step, the host's part included, its last loss, and its kernels."""
  steps, seconds = steps_of(program), []
  jax.block_until_ready(next(steps))
  while len(seconds) < 3 or (sum(seconds) < SECONDS and len(seconds) < STEPS):
    begin = time.perf_counter()
    record = jax.block_until_ready(next(steps))
    seconds.append(time.perf_counter() - begin)
  return dict(
    ms=round(1e3 * statistics.median(seconds), 3),
    loss=float(record["loss"]),
    **kernel_shares(timing.kernels_of(lambda: next(steps))),
  )


def kernel_shares(kernels: list[tuple[str, float]]) -> dict[str, Any]:
  """Time of all kernels of a step, and that of ours, by name and together; None where none ran."""
  if not kernels:
    return dict(kernel_ms=None, ours_ms=None, ours_share=None, ours={})
  ours = collections.Counter()
  for name, ms in kernels:
    if OUR_KERNELS in name:
      ours[name] += ms
  total = sum(ms for _, ms in kernels)
  return dict(
    kernel_ms=round(total, 3),
    ours_ms=round(ours.total(), 3),
    ours_share=round(ours.total() / total, 4),
    ours={name: round(ms, 3) for name, ms in ours.most_common()},
  )


def measure(name: str, mode: str, program: Program | Exception) -> dict[str, Any]:
  """A row of the result."""
  config = config_of(name, mode)
  B, T = config.data.batch_size, config.model.seq_len
  model = nnx.merge(*transformer.graph_and_shapes(**config.model))
  row = dict(
    body=name,
    attention="sparse" if mode == "dots" else mode,
    patterns=[repr(pattern) for pattern in model.patterns],
    remat=config.model.remat,
    dropout=config.model.dropout,
    batch=B,
    seq_len=T,
  )
  try:
    if isinstance(program, Exception):
      raise program
    row["implementation"] = ", ".join(program.implementations)
    row |= figures(program)
  except Exception as error:  # one that does not fit must not take the others with it
    return row | dict(ms=None, error=timing.text(error))
  peak = flops.peak_flops(jax.devices()[0].device_kind)
  needed = flops.train_flops(config.model, batch_size=B)
  return row | dict(
    tokens_per_second=round(1e3 * B * T / row["ms"]),
    mfu=round(1e3 * needed / (row["ms"] * peak), 4) if peak else None,
    peak_gb=round(report.num_bytes(program.step) / 1e9, 3),
    temp_bytes=program.step.memory_analysis().temp_size_in_bytes,
  )


def measure_all(names: list[str]) -> list[dict[str, Any]]:
  cases = [(name, mode) for name in names for mode in BODIES[name].modes]
  job = lambda case: lambda: compiled(config_of(*case))
  # One step of each body first: the others then find their matmuls tuned, all alike.
  first = [(name, BODIES[name].modes[0]) for name in names]
  programs = compile_all({case: job(case) for case in first})
  programs |= compile_all({case: job(case) for case in cases if case not in first})
  rows, progress = [], timing.Progress(len(cases))
  for case in cases:
    row = measure(*case, programs.pop(case))
    rows.append(row)
    progress(*case, row.get("error") or f"{row['ms']} ms")
  return rows


def compare(rows: list[dict[str, Any]]) -> None:
  """Adds how many times longer the step with dense attention takes."""
  dense = {row["body"]: row["ms"] for row in rows if row["attention"] == "dense"}
  for row in rows:
    if row["ms"] and dense.get(row["body"]):
      row["dense_ratio"] = round(dense[row["body"]] / row["ms"], 3)


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes step_<device>.json; whether all rows have figures."""
  print(__doc__, flush=True)
  rows = measure_all(timing.chosen(BODIES, only))
  compare(rows)
  show = lambda value, form: "" if value is None else form.format(value)
  table = [
    (row["body"], row["attention"], row["remat"], show(row["ms"], "{:,.1f}") or "failed",
     show(row.get("tokens_per_second"), "{:,}"), show(row.get("mfu"), "{:.1%}"),
     show(row.get("peak_gb"), "{:.2f}"), show(row.get("ours_share"), "{:.1%}"),
     show(row.get("dense_ratio"), "{:.2f}"))
    for row in rows
  ]  # fmt: skip
  header = ("body", "attention", "remat", "ms", "tokens/s", "MFU", "GB", "ours", "dense / it")
  report.print_table(header, table)
  for row in rows:
    if "error" in row:
      print("FAILED", row["body"], row["attention"], row["remat"])
      print(f"  {row['error']}")
  bodies = {name: body._asdict() for name, body in BODIES.items()}
  report.write(out / f"step_{report.short_device()}.json", rows, bodies=bodies)
  return not any("error" in row for row in rows)
