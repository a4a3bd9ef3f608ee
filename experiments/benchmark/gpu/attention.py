"""Attention on a GPU beside cuDNN and the roofline, forward and forward + backward, bfloat16.

Kernel times from CUPTI. The roofline of a row is the larger of the time to move its tensors once at
this device's copy bandwidth (4 forward, 12 forward + backward) and of the time of its matmuls at
the rate at which cuDNN's dense causal attention does the same shape and direction, both measured in
this run. Ratios: the peer's time over ours. "flex_attention" is of PyTorch, compiled, by events of
the device, in a process for each shape.
"""

import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp

from experiments.benchmark import report
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import masks
from pallas_kernels import patterns
from pallas_kernels import sparse_attention

PATTERNS = {
  "local": lambda shape: patterns.Local(shape.stride),
  "column": lambda shape: patterns.Column(shape.stride),
  "block": lambda shape: patterns.Block(shape.stride),
  "summary": lambda shape: patterns.Summary(shape.stride, shape.width),
  "strided": lambda shape: patterns.Strided(shape.stride),
  "fixed": lambda shape: patterns.Fixed(shape.stride, shape.width),
  "dense": lambda shape: patterns.Dense(),
}
PARTS = (*timing.SHAPES, *PATTERNS)
OURS = "mosaic_gpu"
DIRECTIONS = ("fwd", "fwdbwd")
# Tensors of [B, T, H, D]: q, k, v, out; and q, k, v, out, dout, dq, dk, dv.
TENSORS = {"fwd": 4, "fwdbwd": 4 + 8}
# FLOPs per pair and feature: two matmuls, and the five of the backward pass.
FLOPS = {"fwd": 4, "fwdbwd": 4 + 10}
COPY_BYTES = 2**30
COPIED = ("bfloat16", "float32")  # element types: the rate of the faster copy counts


# -------------------------------------------------------------------------------------------- peers


def cudnn(q, k, v, window=None):
  """Causal attention by cuDNN, over the last `window` keys where it is given."""
  left = None if window is None else (window - 1, 0)
  attend = jax.nn.dot_product_attention
  return attend(q, k, v, is_causal=True, local_window_size=left, implementation="cudnn")


def transposed_cudnn(q, k, v, stride):
  """Column attention as it is done by hand: columns to the front, dense causal, and back."""
  B, T, H, D = q.shape
  columns = lambda x: x.reshape(B, T // stride, stride, H, D).swapaxes(1, 2)
  out = cudnn(*(columns(x).reshape(B * stride, T // stride, H, D) for x in (q, k, v)))
  return out.reshape(B, stride, T // stride, H, D).swapaxes(1, 2).reshape(q.shape)


# Name: the pattern it computes, and how.
PEERS = {
  "cudnn": ("dense", lambda shape: cudnn),
  "cudnn_window": ("local", lambda shape: lambda q, k, v: cudnn(q, k, v, shape.stride)),
  "transpose_cudnn": (
    "column",
    lambda shape: lambda q, k, v: transposed_cudnn(q, k, v, shape.stride),
  ),
}

FLEX = "flex_attention"
FLEX_PATTERNS = ("local", "column", "strided", "fixed")  # whose masks `steps.masks` has
FLEX_SECONDS = 300  # of a shape: each pattern compiles two programs

# --------------------------------------------------------------------------------------- arithmetic


def num_bytes(shape: timing.Shape, direction: str) -> int:
  return TENSORS[direction] * 2 * shape.B * shape.T * shape.H * shape.D


def num_flops(shape: timing.Shape, name: str, direction: str) -> float:
  """Of the matmuls over the pattern's pairs, exactly."""
  pairs = PATTERNS[name](shape).num_pairs(shape.T)
  return FLOPS[direction] * shape.D * shape.B * shape.H * pairs


def roofline_ms(
  shape: timing.Shape, name: str, direction: str, copy_gb_per_s: float, dense_tflops: float
) -> float:
  """No kernel that moves every tensor once, and multiplies at cuDNN's rate, is faster."""
  memory = num_bytes(shape, direction) / copy_gb_per_s / 1e6
  return max(memory, num_flops(shape, name, direction) / dense_tflops / 1e9)


# --------------------------------------------------------------------------------------------- rows


def build_copy(dtype: str):
  """Negation: a plain copy is removed, or made by a memory copy, which is no kernel to CUPTI."""
  return jnp.negative, lambda: (jnp.ones(COPY_BYTES // jnp.dtype(dtype).itemsize, dtype),)


def build(shape: timing.Shape, pattern: str, implementation: str, direction: str):
  """What is timed: a peer, or a pattern by an implementation of `sparse_attention`."""
  if implementation in PEERS:
    attend = PEERS[implementation][1](shape)
  else:
    options = dict(pattern=PATTERNS[pattern](shape), implementation=implementation)
    attend = functools.partial(sparse_attention, **options)
  wrap = {"fwd": timing.forward_alone, "fwdbwd": timing.with_gradients}[direction]
  return wrap(attend), shape.arrays


def cost(pattern: str, implementation: str, direction: str) -> float:
  """Of compiling it: about the number of our kernels in it."""
  if implementation in PEERS:
    return 0.5
  passes = 2 if pattern in ("strided", "fixed") else 1
  return passes * {"fwd": 1, "fwdbwd": 3}[direction]


def cases(pattern_names: list[str]) -> list[tuple[str, str, str]]:
  """(pattern, implementation, direction) of one shape, ours beside the peers."""
  keys = []
  for pattern in dict.fromkeys((*pattern_names, "dense")):  # the roofline needs the dense rate
    names = [peer for peer, (computed, _) in PEERS.items() if computed == pattern]
    names += [OURS] if pattern in pattern_names else []
    keys += [(pattern, name, direction) for direction in DIRECTIONS for name in names]
  return keys


def measure(shapes: dict[str, timing.Shape], pattern_names: list[str]):
  """Copy rates in GB/s per element type, and the rows without what compares them: ms, or error."""
  copies = {("copy", dtype): timing.Job(build_copy, (dtype,), cost=0.1) for dtype in COPIED}
  jobs = {
    (name, *case): timing.Job(build, (shape, *case), cost(*case))
    for name, shape in shapes.items()
    for case in cases(pattern_names)
  }
  rates, rows = {}, []
  with timing.measuring(copies | jobs) as measured:
    for key in copies:
      copy = measured(key)
      if copy.error:
        raise RuntimeError(f"no copy bandwidth, no roofline: {copy.error}")
      rates[key[1]] = round(2 * COPY_BYTES / copy.ms / 1e6, 1)
    progress = timing.Progress(len(jobs))
    for key in jobs:
      result = measured(key)
      row = dict(zip(("shape", "pattern", "implementation", "direction"), key, strict=True))
      if result.error:
        row |= dict(ms=None, error=result.error)
      else:
        row |= dict(ms=round(result.ms, 5), kernels=list(result.kernels))
      rows.append(row)
      progress(*key, result.error or f"{row['ms']} ms")
  return rates, rows


def measure_flex(shapes: dict[str, timing.Shape], pattern_names: list[str]) -> list[dict]:
  """The rows of FlexAttention, as those of `measure`."""
  names, rows = [name for name in FLEX_PATTERNS if name in pattern_names], []
  for shape_name, shape in shapes.items() if names else ():
    described = {name: masks.described(PATTERNS[name](shape)) for name in names}
    sizes = {name: getattr(shape, name) for name in "BTHD"}
    program = processes.Program(FLEX, sizes | dict(patterns=described))
    told = processes.told_by(program, seconds=FLEX_SECONDS)
    for name, direction in itertools.product(names, DIRECTIONS):
      row = dict(shape=shape_name, pattern=name, implementation=FLEX, direction=direction)
      found = told.get(name)
      error = {} if found else dict(error=told.get("error", "was not told"))
      rows.append(row | dict(ms=found and found[direction]) | error)
      print(f"{shape_name}, {name}, {FLEX}, {direction}, {rows[-1]['ms']} ms", flush=True)
  return rows


def compare(rows: list[dict], shape: timing.Shape, copy: float) -> None:
  """Adds roofline, bandwidth, rate and the ratios to the peers to the rows of one shape."""
  peer_ms = {
    (row["implementation"], row["direction"]): row["ms"]
    for row in rows
    if row["implementation"] in PEERS
  }
  flex_ms = {
    (row["pattern"], row["direction"]): row["ms"] for row in rows if row["implementation"] == FLEX
  }
  for row in rows:
    pattern, direction, ms = row["pattern"], row["direction"], row["ms"]
    dense = peer_ms.get(("cudnn", direction))
    if dense:
      rate = num_flops(shape, "dense", direction) / dense / 1e9
      row["roofline_ms"] = round(roofline_ms(shape, pattern, direction, copy, rate), 5)
    else:
      row["roofline_ms"] = None
    if not ms:
      continue
    row["gb_per_s"] = round(num_bytes(shape, direction) / ms / 1e6, 1)
    row["tflops"] = round(num_flops(shape, pattern, direction) / ms / 1e9, 1)
    row["fraction"] = row["roofline_ms"] and round(row["roofline_ms"] / ms, 4)
    row["peer_ratios"] = {
      peer: round(peer_ms[peer, direction] / ms, 3)
      for peer, (computes, _) in PEERS.items()
      if computes in (pattern, "dense") and peer_ms.get((peer, direction))
    }
    if flex := flex_ms.get((pattern, direction)):
      row["peer_ratios"][FLEX] = round(flex / ms, 3)


def summarize(rows: list[dict]) -> list[dict]:
  """Per pattern and implementation: mean and least fraction of the roofline over the shapes."""
  groups = {}
  for row in rows:
    key = row["pattern"], row["implementation"], row["direction"]
    groups.setdefault(key, []).append((row.get("fraction"), row["shape"]))
  result = []
  for (pattern, implementation, direction), pairs in groups.items():
    entry = dict(pattern=pattern, implementation=implementation, direction=direction)
    known = [pair for pair in pairs if pair[0]]
    entry |= dict(shapes=len(known), failed=len(pairs) - len(known))
    if known:
      mean = math.exp(sum(math.log(fraction) for fraction, _ in known) / len(known))
      least, where = min(known)
      entry |= dict(geometric_mean=round(mean, 4), minimum=least, minimum_at=where)
    result.append(entry)
  return result


# ------------------------------------------------------------------------------------------ command


def print_tables(rows: list[dict], summary: list[dict]) -> None:
  show = lambda value, digits: "" if value is None else f"{value:,.{digits}f}"
  table = []
  for row in rows:
    ratios = row.get("peer_ratios", {})
    names = (f"{row['shape']} {row['pattern']}", row["implementation"], row["direction"])
    figures = [
      show(row["ms"], 4) or "failed",
      show(row.get("gb_per_s"), 0),
      show(row["roofline_ms"], 4),
      show(row.get("fraction"), 3),
    ]
    table.append((*names, *figures, *(show(ratios.get(peer), 2) for peer in (*PEERS, FLEX))))
  header = ("shape, pattern", "by", "direction", "ms", "GB/s", "roofline", "share")
  report.print_table((*header, "cudnn / it", "window / it", "transposed / it", "flex / it"), table)
  print("\nshare of the roofline over the shapes")
  table = [
    (e["pattern"], e["implementation"], e["direction"], show(e.get("geometric_mean"), 3),
     show(e.get("minimum"), 3), e.get("minimum_at", ""), e["failed"])
    for e in summary
  ]  # fmt: skip
  header = ("pattern", "by", "direction", "geometric mean", "least", "at", "failed")
  report.print_table(header, table)
  for row in rows:
    if "error" in row:
      print("FAILED", *(row[key] for key in ("shape", "pattern", "implementation", "direction")))
      print(f"  {row['error']}")


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes attention_<device>.json; whether all rows have figures."""
  print(__doc__, flush=True)
  shapes = {name: timing.SHAPES[name] for name in timing.chosen(timing.SHAPES, only)}
  pattern_names = timing.chosen(PATTERNS, only)
  copies, rows = measure(shapes, pattern_names)
  copy = max(copies.values())
  print(f"copy bandwidth: {copy:,.0f} GB/s {copies}\n", flush=True)
  finish(out, copies, shapes, rows)  # FlexAttention compiles for minutes, which may not be had
  rows += measure_flex(shapes, pattern_names)
  print_tables(rows, finish(out, copies, shapes, rows))
  return not any("error" in row for row in rows)


def finish(
  out: pathlib.Path,
  copies: dict[str, float],
  shapes: dict[str, timing.Shape],
  rows: list[dict],
) -> list[dict]:
  """Compares the rows, writes them, and returns their summary."""
  copy = max(copies.values())
  for name, shape in shapes.items():
    compare([row for row in rows if row["shape"] == name], shape, copy)
  summary = summarize(rows)
  report.write(
    out / f"attention_{report.short_device()}.json",
    rows,
    copy_gb_per_s=copy,
    copies_gb_per_s=copies,
    shapes={name: vars(shape) for name, shape in shapes.items()},
    summary=summary,
  )
  return summary
