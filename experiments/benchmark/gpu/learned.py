"""Attention to blocks that are chosen while a model runs (docs/learned.md), on a GPU, bfloat16.

rates: 16 heads, beside cuDNN's dense causal attention of the same shape and direction in the same
run; `rate` is visited tiles of 128 x 128 per ms over cuDNN's, whose tiles on the diagonal count
whole too. Lists have 1/16 or 1/32 of all blocks, about 1/8 and 1/16 of the causal ones.
  given           the indices are there; `rate_of_attention` leaves out what is no attention kernel:
                  the lists of tiles that are made of the indices, and a number per row
  with_selection  pooling, selection, lists and attention
  select          pooling and selection alone; `share` is of with_selection, forward + backward
memory: forward + backward of each recipe's layer on given projections, 1,048,576 tokens, 8 heads of
64: the peak that JAX's allocator held, less what is projected beside q, k, v, over the bytes of
q, k, v, out, their gradients, log-sum-exp, indices and lists (of nsa three outs).
step: a training step of a model of 4 layers, every second one of the recipe, at this length.
decode: bytes per second of 8 sequences of 32,768 bytes by a model of 8 such layers, beside dense
caches.
flex: PyTorch's FlexAttention with a mask of the indices of "given", made in `building_ms`; heads of
128, where there are any.

Times of rates are of kernels, from CUPTI, medians of rounds over all cases; `wall_ms` of the others
is from the beginning of a call to its end. What the library does not support is told as that, with
its reason.
"""

import functools
import importlib.util
import pathlib
import statistics
import time
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp

from experiments.benchmark import report
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import block_sparse
from experiments.benchmark.gpu import learned_models
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import drawn
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import sparse_attention

OURS = "mosaic_gpu"
H = block_sparse.H
ROUNDS = 3  # as in block_sparse
SHAPES = {f"d{D}_t{T}": block_sparse.Shape(T, D) for T in (32_768, 131_072) for D in (128, 64)}
SHARES = (16, 32)  # a list has this part of all blocks
FORMS = {"b128": (128, 128), "b64": (64, 128), "b128_q16": (128, 16)}  # block_size, query_block
MODELS = ("memory", "step", "decode")
KINDS = ("rates", *MODELS, "flex")
PARTS = (*KINDS, *SHAPES, *learned_models.RECIPES)
FLEX_SECONDS = 100  # of all shapes: each compiles two programs
UNSUPPORTED = "NotImplementedError: "  # how the library refuses


class Case(NamedTuple):
  """What a row of rates measures."""

  shape: str
  kind: str  # "dense", "given", "with_selection" or "select"
  form: str | None = None
  top: int | None = None
  direction: str = "fwd"


def cases(shape_names: list[str]) -> list[Case]:
  """Of the chosen shapes, cuDNN's dense runs first."""
  chosen = [Case(x, "dense", direction=way) for x in shape_names for way in attention.DIRECTIONS]
  for shape in shape_names:
    for form, (b, _) in FORMS.items():
      usual = form == next(iter(FORMS))
      for share in SHARES if usual else SHARES[:1]:
        of = shape, SHAPES[shape].T // b // share
        kinds = ("given",) if form == "b128_q16" else ("given", "with_selection")
        chosen += [
          Case(of[0], kind, form, of[1], way) for kind in kinds for way in attention.DIRECTIONS
        ]
        chosen += [Case(of[0], "select", form, of[1])] if usual else []
  return chosen


# --------------------------------------------------------------------------------------------- jobs


def build(shape: block_sparse.Shape, kind: str, form: str | None, top: int | None, direction: str):
  """What is timed, and what makes its arguments. Lists are drawn here, in the worker."""
  wrap = {"fwd": timing.forward_alone, "fwdbwd": timing.with_gradients}[direction]
  if kind == "dense" or form is None or top is None:
    return wrap(attention.cudnn), shape.arrays
  b, Q = FORMS[form]
  sizes: dict[str, Any] = dict(block_size=b, query_block=Q)
  attend = functools.partial(sparse_attention, implementation=OURS, **sizes)
  select = lambda q, k: select_blocks(q, pool_blocks(k, b), top=top, **sizes)
  if kind == "select":
    return select, lambda: shape.arrays()[:2]
  if kind == "with_selection":
    return wrap(lambda q, k, v: attend(q, k, v, block_indices=select(q, k))), shape.arrays

  def with_indices(q, k, v, dout, indices):
    return wrap(functools.partial(attend, block_indices=indices))(q, k, v, dout)

  indices = drawn.lists(shape.T, b, Q, top, H)[None]
  return with_indices, lambda: (*shape.arrays(), jnp.asarray(indices))


def cost(case: Case) -> float:
  """Of compiling it: about the number of our kernels in it."""
  if case.kind in ("dense", "select"):
    return 0.5
  return {"fwd": 1, "fwdbwd": 3}[case.direction]


# --------------------------------------------------------------------------------------------- rows


def measure(wanted: list[Case]) -> list[dict]:
  """The rows of rates without what compares them."""
  jobs = {
    case: timing.Job(
      build, (SHAPES[case.shape], *case[1:]), cost(case), clock=learned_models.clock_kernels
    )
    for case in wanted
  }
  rows, found = [describe(case) for case in wanted], {case: [] for case in wanted}
  with block_sparse.giving_back(), timing.measuring(jobs) as measured:
    progress = timing.Progress(ROUNDS * len(jobs))
    for _ in range(ROUNDS):
      for case, row in zip(wanted, rows, strict=True):
        if "ms" in row:  # it has failed
          continue
        result = measured(case)
        if result.error:
          row |= failed(result.error)
        else:
          found[case].append(result)
          row |= dict(result.bytes, kernels=list(dict.fromkeys(result.kernels)))
        progress(*case, result.error or f"{result.ms:.5f} ms")
  for case, row in zip(wanted, rows, strict=True):
    if "ms" in row:
      continue
    each = found[case]
    median = lambda values: round(statistics.median(values), 5)
    row |= dict(ms=median(x.ms for x in each), all_ms=[round(x.ms, 5) for x in each])
    row |= dict(attention_ms=median(x.more["attention_ms"] for x in each))
    if case.form is not None:
      row |= work_of(SHAPES[case.shape].T, *FORMS[case.form], case.top)
  return rows


def failed(error: str) -> dict[str, Any]:
  """What a row has in the place of its figures."""
  if error.startswith(UNSUPPORTED):
    return dict(ms=None, unsupported=error.removeprefix(UNSUPPORTED))
  return dict(ms=None, error=error)


def describe(case: Case) -> dict[str, Any]:
  """A row before it is measured."""
  shape = SHAPES[case.shape]
  row = dict(part="rates", shape=case.shape, head_dim=shape.D, seq_len=shape.T, num_heads=H)
  row |= dict(kind=case.kind, form=case.form, direction=case.direction, top=case.top)
  if case.form is not None:
    row |= dict(zip(("block_size", "query_block"), FORMS[case.form], strict=True))
  return row


@functools.cache
def work_of(T: int, b: int, Q: int, top: int) -> dict[str, float]:
  """Visited tiles of all heads, their share of the causal ones, and of them what was listed."""
  tiles = drawn.num_tiles(T, b, Q, top, H)
  entries = H * drawn.count(T, b, Q, top) * (Q / drawn.TILE) * (b / drawn.TILE)
  density = round(tiles / dense_tiles(T), 5)
  return dict(tiles=tiles, density=density, occupancy=round(entries / tiles, 4))


def dense_tiles(T: int) -> int:
  nq = -(-T // drawn.TILE)
  return H * nq * (nq + 1) // 2


def compare(rows: list[dict]) -> None:
  """Adds to rows of rates and of FlexAttention what compares them with others of the same run."""
  dense = {(row["shape"], row["direction"]): row["ms"] for row in rows if row["kind"] == "dense"}
  whole = {
    (row["shape"], row["form"], row["top"]): row["ms"]
    for row in rows
    if (row["kind"], row["direction"]) == ("with_selection", "fwdbwd")
  }
  for row in rows:
    if not row["ms"] or row["kind"] == "dense":
      continue
    if row["kind"] == "select":
      both = whole.get((row["shape"], row["form"], row["top"]))
      row["share"] = both and round(row["ms"] / both, 4)
      continue
    of = dense.get((row["shape"], row["direction"]))
    rate = lambda ms, of=of, row=row: (
      of and round(row["tiles"] / dense_tiles(row["seq_len"]) * of / ms, 4)
    )
    row["rate"] = rate(row["ms"])
    if row.get("attention_ms"):
      row["rate_of_attention"] = rate(row["attention_ms"])


# ----------------------------------------------------------------------------------- FlexAttention


def measure_flex(shape_names: list[str]) -> list[dict]:
  """Rows of FlexAttention over the indices of "given"; none where there is no PyTorch."""
  if importlib.util.find_spec("torch") is None:
    print("flex: skipped, PyTorch is not installed", flush=True)
    return []
  form, (b, Q) = next(iter(FORMS.items()))
  shapes = {}
  for name in [x for x in shape_names if SHAPES[x].D == 128] or shape_names:
    T = SHAPES[name].T
    shapes[name] = dict(T=T, D=SHAPES[name].D, tops=[T // b // share for share in SHARES])
  job = dict(H=H, block_size=b, shapes=shapes)
  program, rows = processes.Program("flex_blocks", job), []
  told = processes.told_by(program, seconds=FLEX_SECONDS)
  for name, shape in shapes.items():
    for top in shape["tops"]:
      found = told.get(f"{name} {top}")
      for way in attention.DIRECTIONS:
        row = describe(Case(name, "flex_attention", form, top, way)) | dict(part="flex")
        if found:
          row |= dict(ms=round(found["building"] + found[way], 5), attention_ms=found[way])
          row |= dict(building_ms=found["building"], **work_of(shape["T"], b, Q, top))
        else:
          row |= dict(ms=None, error=told.get("error", "was not told"))
        rows.append(row)
        print(f"{name}, top {top}, flex_attention, {way}, {row['ms']} ms", flush=True)
  return rows


# ------------------------------------------------------------------------------------------ command


def print_tables(rows: list[dict]) -> None:
  show = lambda value, digits: "" if value is None else f"{value:,.{digits}f}"
  state = lambda row: "not supported" if "unsupported" in row else "failed"
  table = [
    (f"{row['shape']} {row['kind']}", row["form"] or "", show(row["top"], 0), row["direction"],
     show(row.get("density"), 4), show(row["ms"], 4) or state(row),
     show(row.get("attention_ms"), 4), show(row.get("rate"), 3),
     show(row.get("rate_of_attention"), 3), show(row.get("occupancy"), 2),
     show(row.get("share"), 3))
    for row in rows
    if row["part"] in ("rates", "flex")
  ]  # fmt: skip
  header = ("shape, kind", "form", "top", "direction", "density", "ms", "attention")
  if table:
    header = (*header, "rate", "of attention", "occupancy", "share")
    report.print_table(header, table)
  learned_models.print_tables(rows)
  refused = {}
  for row in rows:
    names = ("part", "shape", "kind", "form", "top", "direction", "model", "implementation")
    of = [row[key] for key in names if row.get(key) is not None]
    if "unsupported" in row:
      refused.setdefault(row["unsupported"], []).append(of)
    elif "error" in row:
      print("FAILED", *of)
      print(f"  {row['error']}")
  for reason, (first, *others) in refused.items():
    print("NOT SUPPORTED", *first, f"and {len(others)} like it" if others else "")
    print(f"  {reason}")


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes learned_<device>.json; whether no row has failed."""
  print(__doc__, flush=True)
  begin = time.perf_counter()
  shapes, kinds = timing.chosen(SHAPES, only), timing.chosen(KINDS, only)
  recipes = timing.chosen(learned_models.RECIPES, only)
  path, rows = out / f"learned_{report.short_device()}.json", []
  facts = dict(
    shapes={name: dict(B=1, H=H, **vars(SHAPES[name])) for name in shapes},
    forms=FORMS,
    recipes={name: vars(learned_models.RECIPES[name]) for name in recipes},
  )

  def done(part: str) -> None:
    """What comes next may take long, or not end."""
    compared = [row for row in rows if row["part"] in ("rates", "flex")]
    compare(compared)
    learned_models.compare(rows)
    report.save(path, rows, **facts)
    print(f"{part}: {time.perf_counter() - begin:.0f} s since the beginning", flush=True)

  if "rates" in kinds:
    rows += measure(cases(shapes))
    done("rates")
  if parts := [kind for kind in MODELS if kind in kinds]:
    rows += learned_models.measure(parts, recipes)
    done(", ".join(parts))
  if "flex" in kinds:
    rows += measure_flex(shapes)
    done("flex")
  print_tables(rows)
  report.write(path, rows, **facts)
  return not any("error" in row for row in rows)
