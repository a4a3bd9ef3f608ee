"""Training steps of the paper's bodies on 1, 2, 4, ... GPUs of one host, by each axis of the mesh.

Weak: each device has the sequences of one. Strong: all share them. A mixture has two axes of which
none alone is as wide. "small" is a model in float32 whose losses are compared, not its time.

A process for each row, random bytes, the recipe's dropout and optimizer with one step of warm-up.
The losses of the first 20 steps are compared with those of one device that has the same sequences;
then steps are timed as by `step`. Efficiency: tokens per second and device over those of one.
`moved_gb` is what a device receives by the optimised program, `formula_gb` by docs/sharding.md, in
float32; `nccl_hidden` the share of the time of moving kernels that other kernels ran beside.
Blocks are computed by modules on several devices, and once by the kernels around attention.
"""

import math
import pathlib
from typing import Any
from typing import NamedTuple

import jax

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import timing
from sparse_flax.parallel import sharding

LOSSES = 20  # steps
SECONDS = 600  # of a row


class Body(NamedTuple):
  """What is trained: a recipe, the sequences of a device, and what is changed."""

  recipe: str
  batch: int
  changes: dict[str, dict[str, Any]] | None = None  # {group: {field: value}} of the config
  strong: tuple[str, ...] = ()  # axes that share the sequences of one device
  weak: tuple[str, ...] = ()  # axes that bring more sequences


BODIES = {
  "small": Body(
    "enwik8:quick",
    8,
    dict(model=dict(compute_dtype="float32", dropout=0.0, num_heads=8)),
    strong=sharding.AXES,
  ),
  "cifar10": Body("cifar10", 16, weak=("data", "fsdp"), strong=("data",)),
  "enwik8": Body("enwik8", 8, weak=("data", "fsdp"), strong=sharding.AXES),
  "audio": Body("audio", 1, strong=("tensor", "sequence")),
  "audio_262k": Body("audio:262k", 1, strong=("sequence",)),
  "audio_1m": Body("audio:1m", 1, strong=("sequence",)),
}
MIXTURES = (("fsdp", "tensor"), ("data", "sequence"))  # of enwik8, where there are four devices
PARTS = tuple(BODIES)


class Row(NamedTuple):
  """A row to be measured."""

  body: str
  axes: dict[str, int]  # of more than one device
  batch: int  # sequences of all devices
  scaling: str | None  # "weak" or "strong"; None: one device
  blocks: str | None  # of `residual.override`; None: what a recipe gets

  @property
  def devices(self) -> int:
    return math.prod(self.axes.values())

  @property
  def mesh(self) -> dict[str, int]:
    """config.mesh."""
    return dict.fromkeys(sharding.AXES, 1) | self.axes

  def job(self) -> dict[str, Any]:
    """What `steps.meshed` is given."""
    body = BODIES[self.body]
    changes = (body.changes or {}) | dict(
      data=dict(batch_size=self.batch),
      train=dict(accumulation=1),
      optim=dict(warmup_steps=1),
      mesh=self.mesh,
    )
    how = dict(losses=LOSSES, residual=self.blocks)
    return dict(recipe=body.recipe, changes=changes, **how)


def rows_of(body: str, counts: tuple[int, ...]) -> list[Row]:
  """One device first, then each count by each axis."""
  of = BODIES[body]
  rows = [Row(body, {}, of.batch, None, None)]
  for n in counts:
    weak = [({axis: n}, of.batch * n, "weak") for axis in of.weak]
    strong = [({axis: n}, of.batch, "strong") for axis in of.strong]
    if body == "enwik8" and n >= 4:
      strong += [({a: n // 2, b: 2}, of.batch, "strong") for a, b in MIXTURES]
    for axes, batch, scaling in weak + strong:
      rows.append(Row(body, axes, batch, scaling, None))
      # A row's products are no sums over devices: there the kernels around attention can serve.
      if "tensor" not in axes and body != "small":
        rows.append(Row(body, axes, batch, scaling, "mosaic_gpu"))
  return rows


def compared(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
  """The row with its speed and losses beside those of one device."""
  if not row.get("ms") or not alone.get("ms"):
    return row
  speed = alone["ms"] / row["ms"] * row["batch"] / alone["batch"]
  row |= dict(speed=round(speed, 3), efficiency=round(speed / row["devices"], 3))
  if row["batch"] == alone["batch"] and "losses" in row and "losses" in alone:
    pairs = zip(row["losses"], alone["losses"], strict=True)
    row |= dict(losses_differ_by=float(f"{max(abs(a - b) / b for a, b in pairs):.2e}"))
  return row


def run(out: pathlib.Path, only: tuple[str, ...] = (), *, devices: int | None = None) -> bool:
  """Measures, prints and writes mesh_scaling_DEVICE.json after each row; whether all have figures.

  Args:
    out: folder of the result.
    only: of PARTS; empty is all.
    devices: the most; None is all of the host.
  """
  print(__doc__, flush=True)
  devices = devices or jax.device_count()
  if not 2 <= devices <= jax.device_count():
    print(f"--devices={devices}: needs 2 to {jax.device_count()}, which JAX finds here", flush=True)
    return False
  counts = tuple(n for n in (2, 4, 8, 16) if n <= devices)
  todo = [row for body in BODIES if not only or body in only for row in rows_of(body, counts)]
  path, rows, alone = out / f"mesh_scaling_{report.short_device()}.json", [], {}
  progress = timing.Progress(len(todo))
  for case in todo:
    T = cli.recipe(BODIES[case.body].recipe).model.seq_len
    row = case._asdict() | dict(devices=case.devices, seq_len=T, ms=None)
    program = processes.Program("meshed", case.job())
    row |= processes.told_by(program, seconds=SECONDS)
    if row["ms"]:
      row["tokens_per_second"] = round(1e3 * case.batch * T / row["ms"])
    rows.append(compared(row, alone.setdefault(case.body, row)))
    report.save(path, rows)
    where = " x ".join(f"{axis} {n}" for axis, n in case.axes.items()) or "one device"
    progress(case.body, where, case.blocks or "", row.get("error") or f"{row['ms']} ms")
  show = lambda value, form: "" if value is None else form.format(value)
  table = [
    (row["body"], row["scaling"] or "", " x ".join(f"{a} {n}" for a, n in row["axes"].items()),
     row.get("blocks_by", ""), row["batch"], show(row["ms"], "{:,.1f}") or "failed",
     show(row.get("tokens_per_second"), "{:,}"), show(row.get("efficiency"), "{:.2f}"),
     show(sum(row.get("moved_gb", {}).values()), "{:.2f}"), show(row.get("nccl_hidden"), "{:.0%}"),
     show(row.get("losses_differ_by"), "{:.1e}"))
    for row in rows
  ]  # fmt: skip
  header = ("body", "scaling", "mesh", "blocks", "sequences", "ms", "tokens/s", "efficiency",
            "GB moved", "hidden", "losses differ")  # fmt: skip
  report.print_table(header, table)
  for row in (row for row in rows if "error" in row):
    print("FAILED", row["body"], row["axes"], row["blocks"])
    print(f"  {row['error']}")
  report.write(path, rows)
  return not any("error" in row for row in rows)
