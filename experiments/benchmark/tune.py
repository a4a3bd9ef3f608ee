"""Tile sizes of every kernel on five shapes, the best into pallas_kernels/tuning.json.

All candidates, and those that failed, are kept in the JSON of this command. Backward is timed with
forward before it. A candidate whose results are not those of the kernel's default is refused.
"""

import functools
import itertools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp

from experiments.benchmark import attention
from experiments.benchmark import gpu
from experiments.benchmark import report
from pallas_kernels import sparse_attention
from pallas_kernels import tuning

# Kernels, and the sequence that each sees. The merged patterns run the same ones.
ROWS = {
  "local": lambda shape: shape.T,
  "column": lambda shape: shape.T // shape.stride,
  "block": lambda shape: shape.stride,
  "summary": lambda shape: shape.T,
  "dense": lambda shape: shape.T,
}
PARTS = (*gpu.SHAPES, *ROWS)
SHARED_BYTES = 227 * 1024  # of one SM, of Hopper
TILE = 64  # rows of a warpgroup's matrix instruction
ERROR = 2e-2  # of bfloat16 results that are summed in another order


def candidates(
  kind: str, direction: tuning.Direction, rows: int, head_dim: int
) -> list[tuning.BlockSizes]:
  """Sizes worth a try; those that a kernel cannot have, it makes smaller, or fails to compile.

  What a kernel does not read of `BlockSizes` does not vary.
  """
  tiles, found = math.ceil(rows / TILE), []
  if kind == "local":
    for warpgroups, stages in itertools.product((1, 2, 3), range(2, 10)):
      if 2 * head_dim * TILE * (warpgroups + 2 * stages) <= SHARED_BYTES:
        found.append(tuning.BlockSizes(TILE, TILE, stages, warpgroups))
    return found if direction == "fwd" else [size for size in found if size.warpgroups == 1]
  if kind in ("column", "block"):  # forward, all tiles of a sequence are a block's own
    for own, warpgroups in itertools.product((1, 2, 4), (1, 2)):
      if warpgroups <= own <= tiles and (direction == "bwd" or own == min(4, tiles)):
        found.append(tuning.BlockSizes(TILE * own, TILE, 1, warpgroups))
    return found
  for warpgroups, block_k, stages in itertools.product((1, 2, 3), (64, 128), (2, 3, 4, 6)):
    if 2 * head_dim * (TILE * warpgroups + 2 * stages * block_k) <= SHARED_BYTES:
      found.append(tuning.BlockSizes(TILE * warpgroups, block_k, stages, warpgroups))
  return found


def call(kind: str, shape: gpu.Shape, direction: str):
  """What is timed. Dense returns its log-sum-exp: without it, it is cuDNN's."""
  how = dict(pattern=attention.PATTERNS[kind](shape), implementation=attention.OURS)
  if kind == "dense":
    attend = lambda q, k, v: sparse_attention(q, k, v, return_lse=True, **how)[0]
  else:
    attend = functools.partial(sparse_attention, **how)
  return attend if direction == "fwd" else gpu.with_gradients(attend)


def compiler(kind: str, shape: gpu.Shape, direction: str, sizes, arguments):
  def job():
    with tuning.override(kind, direction, sizes):
      return gpu.compiler(call(kind, shape, direction), *arguments)()

  return job


def tune(kind: str, name: str, shape: gpu.Shape, direction: str) -> list[dict]:
  """A row per candidate, the kernel's default first: ms, or error; one of them is the best."""
  arrays = shape.arrays()
  arguments = arrays[:3] if direction == "fwd" else arrays
  rows_of_view = ROWS[kind](shape)
  tried = [None, *candidates(kind, direction, rows_of_view, shape.D)]
  job = lambda sizes: compiler(kind, shape, direction, sizes, arguments)
  truth, result = None, []
  for sizes, program in gpu.compile_all({sizes: job(sizes) for sizes in tried}).items():
    row = dict(shape=name, kind=kind, direction=direction, rows=rows_of_view, head_dim=shape.D)
    row |= dict(sizes=sizes and vars(sizes), ms=None)
    try:
      results = gpu.working(program)(*arguments)
      if truth is None:
        truth = results  # of the default; of the first that works where the default does not
      elif (error := _error(results, truth)) > ERROR:
        raise ValueError(f"relative error {error:.1e} against the default")
      row["ms"] = round(gpu.kernel_ms(program, *arguments)[0], 5)
    except Exception as error:  # not every size is one that a kernel can have
      row["error"] = gpu.text(error)
    result.append(row)
    print(*row.values(), file=sys.stderr, flush=True)
  best = min((row for row in result if row["ms"]), key=lambda row: row["ms"], default=None)
  for row in result:
    row["best"] = row is best
  return result


def update(table: dict, rows: list[dict]) -> dict:
  """The table with the best of these rows; where the default was best, without an entry."""
  table = dict(table)
  for row in (row for row in rows if row["best"]):
    where = (row[part] for part in ("kind", "direction", "rows", "head_dim"))
    key = tuning.Key(tuning.device_kind(), *where, "bfloat16")
    table.pop(key, None)
    if row["sizes"]:
      table[key] = tuning.BlockSizes(**row["sizes"])
  return table


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints, writes tuning.json and tune_<device>.json; whether each case has a best."""
  print(__doc__, flush=True)
  table, rows = tuning.TABLE, []
  cases = itertools.product(gpu.chosen(ROWS, only), gpu.chosen(gpu.SHAPES, only), ("fwd", "bwd"))
  for kind, name, direction in cases:
    found = tune(kind, name, gpu.SHAPES[name], direction)
    rows += found
    # After every case: what was measured is kept, whatever comes.
    table = update(table, found)
    tuning.write(table)
  shown = [row for row in rows if row["best"] or row["sizes"] is None]
  table = [
    (f"{row['kind']} {row['shape']}", row["direction"], row["ms"],
     "default" if row["sizes"] is None else " ".join(f"{k}={v}" for k, v in row["sizes"].items()),
     "best" if row["best"] else "")
    for row in shown
  ]  # fmt: skip
  report.print_table(("kernel, shape", "direction", "ms", "sizes", ""), table)
  report.write(out / f"tune_{report.short_device()}.json", rows, gpu=report.gpu_state())
  best = {(row["kind"], row["shape"], row["direction"]) for row in rows if row["best"]}
  return len(best) == len({(row["kind"], row["shape"], row["direction"]) for row in rows})


@jax.jit
def _error(got, expected) -> jax.Array:
  """The largest relative error of the tensors, in the Euclidean norm."""
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())
  errors = jax.tree.map(lambda a, b: norm(a - b) / jnp.maximum(norm(b), 1e-6), got, expected)
  return jnp.max(jnp.stack(jax.tree.leaves(errors)))
