"""Tile sizes of every kernel on five shapes, the best into pallas_kernels/tuning.json.

All candidates, and those that failed, are kept in the JSON of this command. Backward is timed with
forward before it. A candidate whose results are not those of the kernel's default is refused, and
one has to be faster than the default by more than the noise, twice.
"""

import collections
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import report
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import timing
from pallas_kernels import hardware
from pallas_kernels import sparse_attention
from pallas_kernels import tuning
from pallas_kernels.lowering import passes
from pallas_kernels.mosaic_gpu import sizes
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.resident import short

# Kernels, and the sequence that each sees. The merged patterns run the same ones.
ROWS = {
  "local": lambda shape: shape.T,
  "column": lambda shape: shape.T // shape.stride,
  "block": lambda shape: shape.stride,
  "summary": lambda shape: shape.T,
  "dense": lambda shape: shape.T,
}
PARTS = (*timing.SHAPES, *ROWS)
DIRECTIONS = ("fwd", "bwd")
DENSE_SHAPES = ("enwik8",)  # heads of more than 64 features take lists, whose sizes are fixed
ERROR = 2e-2  # of bfloat16 results that are summed in another order
GAIN = 0.01  # less is noise
PROJECTIONS = 32  # by the bits of one word

# ------------------------------------------------------------------------------------- candidates


def problem(kind: str, shape: timing.Shape) -> sizes.Sweep:
  """What a kernel's sizes depend on."""
  (pass_,) = passes.passes_of(attention.PATTERNS[kind](shape))
  return sizes.Sweep(pass_, shape.T, shape.D, shape.D, jnp.dtype(jnp.bfloat16))


def effective(kind: str, shape: timing.Shape, direction: tuning.Direction, candidate):
  """What a kernel makes of a candidate: equal for those that it cannot tell apart."""
  of = problem(kind, shape)
  with tuning.override(kind, direction, candidate):
    if direction == "fwd":
      own = sizes.resident(of, merged=False) or sizes.window(of)
      return own or sizes.streamed(of)["forward_blocks"]
    streamed = lambda: sizes.streamed(of) | dict(forward_blocks=None)
    return sizes.window_backward(of) or sizes.resident_backward(of) or streamed()


def candidates(
  kind: str, shape: timing.Shape, direction: tuning.Direction
) -> list[tuning.BlockSizes]:
  """Sizes worth a try, each different from the default and from the others for the kernel."""
  distinct, known = [], [effective(kind, shape, direction, None)]
  for candidate in _wishes(kind, shape, direction):
    cut = effective(kind, shape, direction, candidate)
    if cut not in known:
      distinct.append(candidate)
      known.append(cut)
  return distinct[:4] if kind == "dense" else distinct


def _wishes(kind: str, shape: timing.Shape, direction: tuning.Direction) -> list[tuning.BlockSizes]:
  """What a kernel does not read of `BlockSizes` does not vary; what does not fit, it makes less."""
  if kind == "local":
    of = problem(kind, shape)
    reach = of.band.last(of.view.num_tiles)
    if direction == "bwd":
      return [tuning.BlockSizes(TILE, TILE, 1, warpgroups) for warpgroups in (1, 2)]
    # Two tiles of logits at a time spill where four warpgroups share the registers.
    several = (3, 4) if shape.D <= 32 else (2, 3) if shape.D <= 64 else (1, 2)
    return [
      tuning.BlockSizes(TILE * warpgroups, TILE * keys, stages, warpgroups, at_once)
      for warpgroups in several
      for keys in (warpgroups, warpgroups + reach)  # in walks; all at once
      for stages in (1, 2, 3)[keys == warpgroups :][:2]
      for at_once in ((1,) if warpgroups == 4 else (2, 1))
    ]
  if kind in ("column", "block"):
    if direction == "fwd":
      return [tuning.BlockSizes(TILE, TILE, 1, warpgroups) for warpgroups in (1, 2, 4)]
    of = problem(kind, shape)
    if short.takes(of.view, of.band, shape.D, shape.D):
      return []
    pairs = itertools.product((1, 2, 4), (1, 2))
    own = [tuning.BlockSizes(TILE * own, TILE, 1, warpgroups) for own, warpgroups in pairs]
    return [*own, tuning.BlockSizes(4 * TILE, 4 * TILE, 1, 2)]  # all of four tiles, with their dS
  return _near_default(kind, shape, direction)


def _near_default(kind, shape: timing.Shape, direction) -> list[tuning.BlockSizes]:
  """One thing or two of a streaming kernel's default changed."""
  default = effective(kind, shape, direction, None)
  if direction == "bwd":
    default = default["dq_blocks"]
  step, stages, warpgroups = default.step, default.stages, default.warpgroups
  other = 192 - step  # of 64 and 128
  in_others = stages * step // other
  wishes = [
    tuning.BlockSizes(TILE * warpgroups, step, stages + 1, warpgroups),
    tuning.BlockSizes(TILE * warpgroups, other, in_others, warpgroups),
    tuning.BlockSizes(TILE * (warpgroups - 1), step, stages, warpgroups - 1),
    tuning.BlockSizes(TILE * (warpgroups + 1), step, stages, warpgroups + 1),
    tuning.BlockSizes(TILE * warpgroups, step, stages - 1, warpgroups),
    tuning.BlockSizes(TILE * warpgroups, other, in_others + 1, warpgroups),
  ]
  # Tiles that a warpgroup has for itself: queries and output; q, dout and out of dq.
  own = default.held + 1 if direction == "fwd" else 3 * default.held
  shared = lambda s: 2 * shape.D * (own * s.block_q + 2 * s.stages * s.block_k)
  return [
    s for s in wishes
    if s.stages >= 2 and 1 <= s.warpgroups <= 3 and shared(s) <= sizes.SHARED_BYTES
  ]  # fmt: skip


# -------------------------------------------------------------------------------------- measuring


def build(kind: str, shape: timing.Shape, direction: tuning.Direction, candidate):
  """What is timed, with these sizes. Dense returns its log-sum-exp: without it, it is cuDNN's."""
  options = dict(pattern=attention.PATTERNS[kind](shape), implementation=attention.OURS)
  if kind == "dense":
    attend = lambda q, k, v: sparse_attention(q, k, v, return_lse=True, **options)[0]
  else:
    attend = functools.partial(sparse_attention, **options)
  wrap = {"fwd": timing.forward_alone, "bwd": timing.with_gradients}[direction]

  def function(*arrays):
    with tuning.override(kind, direction, candidate):
      return wrap(attend)(*arrays)

  return function, shape.arrays


def job(kind: str, name: str, direction: tuning.Direction, candidate) -> timing.Job:
  arguments = kind, timing.SHAPES[name], direction, candidate
  return timing.Job(build, arguments, cost={"fwd": 1, "bwd": 3}[direction], look=sketch)


def sketch(x: jax.Array) -> jax.Array:
  """A tensor [B, T, H, D] as [1 + PROJECTIONS, B, H]: norms, and sums with random signs.

  Of each head, so that a wrong tile is not lost in the norm of a long batch.
  """
  x = x.astype(jnp.float32)
  bits = jax.random.bits(jax.random.key(1), x.shape, jnp.uint32)
  project = lambda n: jnp.where((bits >> n) & 1 == 1, x, -x).sum(axis=(1, 3))
  norms = jnp.sqrt(jnp.square(x).sum(axis=(1, 3)))
  return jnp.concatenate(
    [norms[None], jax.lax.map(project, jnp.arange(PROJECTIONS, dtype=jnp.uint32))]
  )


def relative_error(got: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> float:
  """The largest relative error of a head of the results, in the Euclidean norm, by their sketches.

  For random signs s, the mean of (s (a - b))^2 is |a - b|^2. The estimate by 32 of them is less
  than half of it in 5 of a million cases. NaN where there is one in a result.
  """
  errors = []
  for a, b in zip(got, expected, strict=True):
    estimates = np.sqrt(np.square(a[1:] - b[1:]).mean(axis=0))
    errors.append(np.max(estimates / np.maximum(b[0], 1e-6)))
  return float(np.max(errors))


def tune(case: tuple, shape: timing.Shape, tried: list, measured, progress) -> list[dict]:
  """A row per candidate of a case: ms, or error; one of them is the best.

  Args:
    case: kind, name of the shape, direction.
    tried: the candidates, first None: the kernel's default.
    measured: of `gpu.measuring`, by (*case, candidate).
  """
  kind, name, direction = case
  truth, rows = None, []

  def attempt(candidate) -> tuple[float | None, str | None]:
    """ms or error. The truth is the default's result, or the first one's that works."""
    nonlocal truth
    result = measured((*case, candidate))
    error = result.error or _wrong(result.seen, truth or result.seen)
    if error:  # not every size is one that a kernel can have
      return None, error
    truth = truth or result.seen
    return round(result.ms, 5), None

  for candidate in tried:
    ms, error = attempt(candidate)
    row = dict(shape=name, kind=kind, direction=direction, rows=ROWS[kind](shape))
    row |= dict(head_dim=shape.D, sizes=candidate and vars(candidate), ms=ms)
    row |= dict(error=error) if error else {}
    rows.append(row)
    progress(*case, _words(row["sizes"]), error or f"{ms} ms")
  best = _best(rows, lambda row: attempt(tried[rows.index(row)]))
  for row in rows:
    row["best"] = row is best
  return rows


def _wrong(seen: tuple[np.ndarray, ...], truth: tuple[np.ndarray, ...]) -> str | None:
  error = relative_error(seen, truth)  # of a truth with itself: NaN where it has one, else 0
  return None if error <= ERROR else f"relative error {error:.1e} against the default"


def _best(rows: list[dict], again) -> dict | None:
  """The fastest row: the default's, unless another is faster by `GAIN`, and is again after that."""
  default = rows[0]
  best = min((row for row in rows if row["ms"]), key=lambda row: row["ms"], default=None)
  if best is None or not default["ms"]:
    return best
  for row in (default, best):
    if best["ms"] > (1 - GAIN) * default["ms"]:
      return default
    ms, error = again(row)
    if error:
      row |= dict(ms=None, error=error)
      return None if row is default else default
    row["ms"] = min(row["ms"], ms)
  return best if best["ms"] <= (1 - GAIN) * default["ms"] else default


def _words(sizes: dict | None) -> str:
  return "default" if sizes is None else " ".join(f"{k}={v}" for k, v in sizes.items())


# ---------------------------------------------------------------------------------------- command


def update(table: dict, rows: list[dict]) -> dict:
  """The table with the best of these rows; where the default was best, without an entry."""
  table = dict(table)
  for row in (row for row in rows if row["best"]):
    where = (row[part] for part in ("kind", "direction", "rows", "head_dim"))
    key = tuning.Key(hardware.device_kind(), *where, "bfloat16")
    table.pop(key, None)
    if row["sizes"]:
      table[key] = tuning.BlockSizes(**row["sizes"])
  return table


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints, writes tuning.json and tune_<device>.json; whether each case has a best."""
  print(__doc__, flush=True)
  cases = [
    (kind, name, direction)
    for kind in timing.chosen(ROWS, only)
    for name in timing.chosen(timing.SHAPES, only)
    for direction in DIRECTIONS
    if kind != "dense" or name in DENSE_SHAPES
  ]
  tried = {
    (kind, name, direction): [None, *candidates(kind, timing.SHAPES[name], direction)]
    for kind, name, direction in cases
  }
  nums = collections.Counter(kind for (kind, _, _), sizes in tried.items() for _ in sizes)
  print("programs:", ", ".join(f"{num} {kind}" for kind, num in nums.items()), flush=True)
  jobs = {(*case, candidate): job(*case, candidate) for case in cases for candidate in tried[case]}
  table, rows = tuning.TABLE, []
  with timing.measuring(jobs) as measured:
    progress = timing.Progress(len(jobs))
    for case in cases:
      new_rows = tune(case, timing.SHAPES[case[1]], tried[case], measured, progress)
      rows += new_rows
      # After every case: what was measured is kept, whatever comes.
      table = update(table, new_rows)
      tuning.write(table)
  table = [
    (f"{row['kind']} {row['shape']}", row["direction"], row["ms"], _words(row["sizes"]),
     "best" if row["best"] else "")
    for row in rows
    if row["best"] or row["sizes"] is None
  ]  # fmt: skip
  report.print_table(("kernel, shape", "direction", "ms", "sizes", ""), table)
  report.write(out / f"tune_{report.short_device()}.json", rows)
  return sum(row["best"] for row in rows) == len(cases)
