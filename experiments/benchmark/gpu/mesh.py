"""Training steps of the paper's bodies on one device, and sharded over two by each axis.

Where rows alone are sharded, once with blocks by their modules and once by the kernels around
attention, which serve on several devices only if they are asked for.

Data are random bytes, time is that of eight steps one after the other after four others. The first
losses show that all compute the same.
"""

import pathlib
import time

import jax
import ml_collections

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import training
from pallas_kernels import residual
from sparse_flax.parallel import sharding

BODIES = {"audio": 1, "enwik8": 2}  # sequences per step
PARTS = tuple(BODIES)
# The axis, and the implementation of blocks.
WAYS = (
  (None, None),
  ("fsdp", "modules"),
  ("fsdp", "mosaic_gpu"),
  ("tensor", None),
  ("sequence", "modules"),
  ("sequence", "mosaic_gpu"),
)
WARM, STEPS = 4, 8


def measure(config: ml_collections.ConfigDict, blocks: str | None = None) -> dict:
  """Milliseconds of a step, and the losses of the first ones.

  Args:
    config: of a recipe.
    blocks: what `residual.override` is given.
  """
  made = training.prepare(config)
  with jax.set_mesh(made.mesh), residual.override(blocks):
    state, tokens, losses = made.first_state(), made.tokens(), []
    for _ in range(WARM):
      state, record = made.step(state, tokens, jax.random.key(1))
      losses.append(float(record["loss"]))
    start = time.perf_counter()
    for _ in range(STEPS):
      state, record = made.step(state, tokens, jax.random.key(1))
    jax.block_until_ready(state)
  return dict(ms=1e3 * (time.perf_counter() - start) / STEPS, losses=losses)


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Prints the table and writes mesh_DEVICE.json; whether there are devices to shard over."""
  print(__doc__, flush=True)
  if jax.device_count() < 2:
    print("needs two devices")
    return False
  rows = []
  for name, batch_size in BODIES.items():
    if only and name not in only:
      continue
    for axis, blocks in WAYS:
      if axis == "fsdp" and batch_size % 2:
        continue
      config = cli.recipe(name)
      config.mesh.update(dict.fromkeys(sharding.AXES, 1) | ({axis: 2} if axis else {}))
      config.data.batch_size = batch_size
      config.train.accumulation = 1
      row = dict(body=name, batch=batch_size, axis=axis, blocks=blocks) | measure(config, blocks)
      where = f"{name} {axis or 'one device'} {blocks or ''}"
      print(f"  {where}: {row['ms']:.1f} ms, losses {row['losses']}", flush=True)
      rows.append(row)
  alone = {row["body"]: row["ms"] for row in rows if row["axis"] is None}
  table = [
    (row["body"], row["axis"] or "", row["blocks"] or "", f"{row['ms']:.1f}",
     f"{alone[row['body']] / row['ms']:.2f}")
    for row in rows
  ]  # fmt: skip
  report.print_table(("body", "axis of 2", "blocks", "ms", "speed, one = 1"), table)
  report.write(out / f"mesh_{report.short_device()}.json", rows)
  return True
