"""Block-sparse attention on a GPU beside cuDNN's dense causal attention, bfloat16, 16 heads.

Kernel times from CUPTI, medians of three rounds over all cases. Random layouts have blocks of
128 x 128, the diagonal among them, and for each head others; `density` is the share of the causal
blocks that a head visits, of all other patterns the share of the causal pairs that attend. With the
ms of cuDNN's dense causal attention of the same shape and direction, from the same run:
speedup_vs_cudnn_dense: those ms over ours.
rate_vs_cudnn_dense: visited blocks per ms, over cuDNN's: every block that holds a pair counts whole
on both sides, also the blocks on the diagonal; dense causal attention has nq (nq + 1) / 2.
rate_vs_cudnn_dense_by_pairs: attending pairs per ms over cuDNN's, T (T + 1) / 2 pairs, exactly.
Beside the rows: what making the lists of blocks costs on the host (tracemalloc: numpy's memory).
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import report
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import timing
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import blocks
from pallas_kernels.lowering import lists

OURS = "mosaic_gpu"
BLOCK = 128
H = 16
ROUNDS = 3  # over all cases: the clock of a GPU depends on what ran before; medians count
CORES = 132  # to deal items to, on the host
DENSITIES = (1, 0.9, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
MEAN_DOCUMENT = 4_096  # tokens
WINDOWS = (1_024, 4_096)  # keys
SINKS = 64
ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of q, k, v and the output, with B = 1 and H query heads."""

  T: int
  D: int
  Hkv: int = H

  def arrays(self) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, [B, T, H, D] in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (H, self.Hkv, self.Hkv, H)
    normal = lambda key, num: jax.random.normal(key, (1, self.T, num, self.D), jnp.bfloat16)
    return tuple(normal(key, num) for key, num in zip(keys, heads, strict=True))

  def arrays_of_documents(self) -> tuple[jax.Array, ...]:
    """And segment ids."""
    return *self.arrays(), jnp.asarray(documents(self.T)[None])


RANDOM_SHAPES = {
  "d128_t32768": Shape(32_768, 128),
  "d128_t65536": Shape(65_536, 128),
  "d64_t32768": Shape(32_768, 64),
  "d64_t65536": Shape(65_536, 64),
}
SHAPES = RANDOM_SHAPES | {
  "d128_t32768_gqa": Shape(32_768, 128, Hkv=4),
  "d128_t131072": Shape(131_072, 128),
}
KINDS = ("random", "window", "documents", "gqa", "memory", "host")
PARTS = (*SHAPES, *KINDS)

# ----------------------------------------------------------------------------------------- patterns


def num_causal(T: int) -> int:
  """Blocks of dense causal attention, per head."""
  nq = -(-T // BLOCK)
  return nq * (nq + 1) // 2


def num_visited(T: int, density: float) -> int:
  """Blocks of each head of a random layout."""
  return round(density * num_causal(T))


def random_layout(T: int, density: float, num_heads: int, seed: int = 0) -> patterns.BlockLayout:
  """Of each head: the diagonal, and others of the causal blocks drawn up to the number wanted."""
  nq = T // BLOCK
  layout = np.zeros((num_heads, nq, nq), bool)
  n, m = np.tril_indices(nq, -1)
  rng = np.random.default_rng(seed)
  for head in layout:
    np.fill_diagonal(head, True)
    drawn = rng.choice(n.size, num_visited(T, density) - nq, replace=False)
    head[n[drawn], m[drawn]] = True
  return patterns.BlockLayout(layout, BLOCK)


def documents(T: int, seed: int = 0) -> np.ndarray:
  """Segment ids int32 [T] of documents cut at random, MEAN_DOCUMENT tokens long on average."""
  begins = np.zeros(T, np.int32)
  rng = np.random.default_rng(seed)
  begins[1 + rng.choice(T - 1, T // MEAN_DOCUMENT - 1, replace=False)] = 1
  return begins.cumsum(dtype=np.int32)


def near(i, j):
  return i - j < WINDOWS[0]


def less_near(i, j):
  return i - j < WINDOWS[1]


def first(i, j):
  return j < SINKS


# Those that are a pattern whatever the shape, with functions of this module: each is compiled once.
FORMULAS = {
  "where_window_1024": patterns.Where(near),
  "where_window_4096": patterns.Where(less_near),
  **{f"window_{window}": patterns.Local(window) for window in WINDOWS},
  "window_sinks": patterns.Local(WINDOWS[0]) | patterns.Where(first),
}
# Of the host's cost, 16 heads of the longest sequence.
HOST_SHAPE = "d128_t131072"
HOST_DENSITY = 1 / 16
HOST_FORMULAS = {
  "local_column": patterns.Local(WINDOWS[0]) | patterns.Column(512),
  "where_window_1024": FORMULAS["where_window_1024"],
}


class Case(NamedTuple):
  """What a row measures; `density` is that of a random layout."""

  shape: str
  pattern: str
  density: float | None
  implementation: str
  direction: str


class Work(NamedTuple):
  """Of all heads: the blocks that hold pairs, and the pairs."""

  visited: int
  pairs: int


@functools.cache
def work_of(shape: Shape, pattern: str, density: float | None) -> Work:
  T, nq = shape.T, shape.T // BLOCK
  half = lambda n: n * (n + 1) // 2
  if pattern in FORMULAS:
    formula = FORMULAS[pattern]
    visited, pairs = blocks.blocks_of(formula, T, T, BLOCK, BLOCK).some.sum(), formula.num_pairs(T)
  elif pattern == "documents":
    ids = documents(T)
    begins = np.searchsorted(ids, ids[::BLOCK])  # of the documents that blocks begin in
    visited = (np.arange(begins.size) - begins // BLOCK + 1).sum()
    pairs = half(np.bincount(ids)).sum()
  elif pattern == "dense":
    visited, pairs = num_causal(T), half(T)
  else:
    visited = num_visited(T, density)
    pairs = (visited - nq) * BLOCK**2 + nq * half(BLOCK)
  return Work(H * int(visited), H * int(pairs))


# --------------------------------------------------------------------------------------------- jobs


def build(shape: Shape, pattern: str, density: float | None, implementation: str, direction: str):
  """What is timed. Layouts are drawn here, in the worker: they are large."""
  wrap = {"fwd": timing.forward_alone, "fwdbwd": timing.with_gradients}[direction]
  if implementation == "cudnn":
    return wrap(attention.cudnn), shape.arrays
  if implementation == "cudnn_window":
    window = FORMULAS[pattern].window
    return wrap(functools.partial(attention.cudnn, window=window)), shape.arrays
  ours = functools.partial(sparse_attention, implementation=OURS)
  if pattern == "documents":

    def with_ids(q, k, v, dout, ids):  # an argument: what is made of ids is part of the work
      attend = functools.partial(ours, pattern=patterns.Dense(), segment_ids=ids)
      return wrap(attend)(q, k, v, dout)

    return with_ids, shape.arrays_of_documents
  if pattern in FORMULAS:
    chosen = FORMULAS[pattern]
  else:
    chosen = random_layout(shape.T, density, {"random": H, "random_gqa": 1}[pattern])
  return wrap(functools.partial(ours, pattern=chosen)), shape.arrays


def cases(shape_names: list[str], kinds: list[str]) -> list[Case]:
  """Of the chosen kinds on the chosen shapes, after cuDNN's dense runs on those that have any."""
  chosen = []

  def add(kind, shape, pattern, density=None, by=OURS, directions=attention.DIRECTIONS):
    if kind in kinds and shape in shape_names:
      chosen.extend(Case(shape, pattern, density, by, direction) for direction in directions)

  for shape in RANDOM_SHAPES:
    for density in DENSITIES:
      add("random", shape, "random", density)
  for pattern in FORMULAS:
    add("window", "d128_t32768", pattern)
    if isinstance(FORMULAS[pattern], patterns.Local):
      add("window", "d128_t32768", pattern, by="cudnn_window")
  add("documents", "d128_t32768", "documents")
  add("gqa", "d128_t32768_gqa", "random_gqa", 1 / 8)
  add("memory", "d128_t131072", "random", 1 / 16, directions=("fwdbwd",))
  dense = dict.fromkeys((case.shape, case.direction) for case in chosen)
  return [Case(shape, "dense", None, "cudnn", way) for shape, way in dense] + chosen


def cost(case: Case) -> float:
  """Of compiling it: about the number of our kernels in it."""
  return {"fwd": 1, "fwdbwd": 3}[case.direction] if case.implementation == OURS else 0.5


# --------------------------------------------------------------------------------------------- rows


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
  """Workers that begin here free memory: each would keep the gigabytes that it once had.

  Kernel times do not see it. An allocator that was chosen outside stays.
  """
  before = os.environ.get(ALLOCATOR)
  os.environ[ALLOCATOR] = before or "platform"
  try:
    yield
  finally:
    if before is None:
      del os.environ[ALLOCATOR]


def measure(wanted: list[Case]) -> list[dict]:
  """The rows without what compares them: ms and bytes, or an error."""
  jobs = {case: timing.Job(build, (SHAPES[case.shape], *case[1:]), cost(case)) for case in wanted}
  rows = [describe(case) for case in wanted]
  times = {case: [] for case in wanted}
  with giving_back(), timing.measuring(jobs) as measured:
    progress = timing.Progress(ROUNDS * len(jobs))
    for _ in range(ROUNDS):
      for case, row in zip(wanted, rows, strict=True):
        result = measured(case)
        times[case].append(result.ms)
        if result.error:
          row |= dict(ms=None, error=result.error)
        else:
          row |= dict(**result.bytes, kernels=list(result.kernels))
        progress(*case, result.error or f"{result.ms:.5f} ms")
  for case, row in zip(wanted, rows, strict=True):
    if "error" not in row:
      ms = statistics.median(times[case])
      work = row["pairs"] * attention.FLOPS[case.direction] * row["head_dim"]
      row |= dict(ms=round(ms, 5), all_ms=[round(each, 5) for each in times[case]])
      row |= dict(tflops=round(work / ms / 1e9, 1), tokens_per_s=round(row["seq_len"] / ms * 1e3))
  return rows


def describe(case: Case) -> dict:
  """A row before it is measured."""
  shape, work = SHAPES[case.shape], work_of(SHAPES[case.shape], case.pattern, case.density)
  density = case.density
  if density is None:
    density = round(work.pairs / work_of(shape, "dense", None).pairs, 6)
  return dict(
    shape=case.shape,
    pattern=case.pattern,
    head_dim=shape.D,
    seq_len=shape.T,
    num_heads=H,
    num_kv_heads=shape.Hkv,
    density=density,
    direction=case.direction,
    implementation=case.implementation,
    visited_blocks=work.visited,
    pairs=work.pairs,
  )


def compare(rows: list[dict]) -> None:
  """Adds the ratios to cuDNN's dense causal attention to the rows; None where that failed."""
  dense = {
    (row["shape"], row["direction"]): row for row in rows if row["implementation"] == "cudnn"
  }
  for row in rows:
    if not row["ms"]:
      continue
    of = dense[row["shape"], row["direction"]]
    ratio = of["ms"] and of["ms"] / row["ms"]
    times = lambda share, ratio=ratio: ratio and round(share * ratio, 4)
    row["speedup_vs_cudnn_dense"] = times(1)
    row["rate_vs_cudnn_dense"] = times(row["visited_blocks"] / of["visited_blocks"])
    row["rate_vs_cudnn_dense_by_pairs"] = times(row["pairs"] / of["pairs"])


def crossovers(rows: list[dict]) -> list[dict]:
  """Per shape and direction: the highest density at which random layouts beat cuDNN's dense."""
  faster = {}
  for row in rows:
    if row["pattern"] == "random" and row.get("speedup_vs_cudnn_dense"):
      won = faster.setdefault((row["shape"], row["direction"]), [])
      won += [row["density"]] if row["speedup_vs_cudnn_dense"] > 1 else []
  return [
    dict(shape=shape, direction=direction, density=max(won, default=None))
    for (shape, direction), won in faster.items()
  ]


# --------------------------------------------------------------------------------------------- host


def host_rows() -> list[dict]:
  """What the lists of blocks cost this process, for 16 heads of the longest sequence."""
  T = SHAPES[HOST_SHAPE].T
  rows = []
  for name in ("random", *HOST_FORMULAS):
    row = dict(pattern=name, seq_len=T, num_heads=H, block=BLOCK)
    try:
      pattern = HOST_FORMULAS.get(name) or random_layout(T, HOST_DENSITY, H)
      row |= host_cost(pattern, T)
    except Exception as error:  # one that fails must not take the others with it
      row |= dict(lists_seconds=None, error=timing.text(error))
    rows.append(row)
  return rows


def host_cost(pattern: patterns.Pattern, T: int) -> dict:
  """Seconds, and then, as watching memory takes time, the peak of a second run."""
  problem = lists.Problem(1, T, T, tuple(range(H)), group=1, joined=True, num_cores=CORES)

  def both_ways():
    blocks.blocks_of.cache_clear()
    make = lists.by_queries.__wrapped__, lists.by_keys.__wrapped__
    return [lower(pattern, problem, with_bits=False) for lower in make]

  start = time.perf_counter()
  of_queries, _ = both_ways()
  seconds = time.perf_counter() - start
  tracemalloc.start()
  try:
    both_ways()
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  visited = int(of_queries.items[:, lists.FIELDS.index("num")].sum())
  return dict(
    visited_blocks=visited, lists_seconds=round(seconds, 4), lists_peak_mb=round(peak / 1e6, 2)
  )


# ------------------------------------------------------------------------------------------ command


def print_tables(rows: list[dict], host: list[dict], crossover: list[dict]) -> None:
  show = lambda value, digits: "" if value is None else f"{value:,.{digits}f}"
  table = [
    (f"{row['shape']} {row['pattern']}", show(row["density"], 4), row["implementation"],
     row["direction"], show(row["ms"], 4) or "failed", show(row.get("tflops"), 0),
     show(row.get("speedup_vs_cudnn_dense"), 2), show(row.get("rate_vs_cudnn_dense"), 3),
     show(row.get("rate_vs_cudnn_dense_by_pairs"), 3),
     show(row.get("temp_bytes") and row["temp_bytes"] / 1e6, 1))
    for row in rows
  ]  # fmt: skip
  header = ("shape, pattern", "density", "by", "direction", "ms", "TFLOPS")
  ratios = ("cudnn / it", "rate, blocks", "rate, pairs", "temporaries, MB")
  if table:
    report.print_table((*header, *ratios), table)
  if crossover:
    print("\nthe highest density at which random layouts are faster than cuDNN's dense attention")
    table = [
      (crossing["shape"], crossing["direction"], show(crossing["density"], 4))
      for crossing in crossover
    ]
    report.print_table(("shape", "direction", "density"), table)
  if host:
    print("\nlists of blocks, both ways, on the host")
    table = [
      (row["pattern"], f"{row['seq_len']:,}", row["num_heads"],
       show(row["lists_seconds"], 3) or "failed", show(row.get("lists_peak_mb"), 1))
      for row in host
    ]  # fmt: skip
    report.print_table(("pattern", "T", "heads", "seconds", "peak, MB"), table)
  for row in (*rows, *host):
    if "error" in row:
      names = ("shape", "pattern", "density", "implementation", "direction")
      print("FAILED", *(row[key] for key in names if key in row))
      print(f"  {row['error']}")


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes block_sparse_<device>.json; whether all rows have figures."""
  print(__doc__, flush=True)
  shapes, kinds = timing.chosen(SHAPES, only), timing.chosen(KINDS, only)
  wanted = cases(shapes, kinds)
  rows = measure(wanted) if wanted else []
  compare(rows)
  crossover = crossovers(rows)
  host = host_rows() if "host" in kinds and HOST_SHAPE in shapes else []
  print_tables(rows, host, crossover)
  report.write(
    out / f"block_sparse_{report.short_device()}.json",
    rows,
    shapes={name: dict(B=1, H=H, **vars(SHAPES[name])) for name in shapes},
    crossover=crossover,
    host=host,
  )
  return not any("error" in row for row in (*rows, *host))
