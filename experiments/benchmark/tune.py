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
WARPGROUPS, BLOCK_K, STAGES = (1, 2, 3, 4), (64, 128), (2, 3)
ROWS_PER_WARPGROUP = 64
SHARED_BYTES = 227 * 1024  # of one SM, of Hopper
ERROR = 2e-2  # of bfloat16 results that are summed in another order


def candidates(
  kind: str, direction: tuning.Direction, rows: int, head_dim: int
) -> list[tuning.BlockSizes]:
  """Sizes whose q, k and v tiles fit in shared memory and are no longer than the sequence.

  So far all kernels have the same ones; those that one of them cannot have fail to compile.
  """
  del kind, direction
  longest = ROWS_PER_WARPGROUP * math.ceil(rows / ROWS_PER_WARPGROUP)
  found = []
  for warpgroups, block_k, stages in itertools.product(WARPGROUPS, BLOCK_K, STAGES):
    block_q = ROWS_PER_WARPGROUP * warpgroups
    shared = 2 * head_dim * (block_q + 2 * stages * block_k)
    if shared <= SHARED_BYTES and max(block_q, block_k) <= longest:
      found.append(tuning.BlockSizes(block_q, block_k, stages, warpgroups))
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
