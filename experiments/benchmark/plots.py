"""python -m experiments.benchmark plots: the plots of documents, drawn from benchmarks/*.json."""

import json
import pathlib
from typing import NamedTuple

import matplotlib.figure

from experiments.benchmark import cells
from experiments.benchmark import tables

PICTURES = tables.ROOT / "docs" / "pictures"
_OURS, _PEER, _DENSE = "#0072b2", "#d55e00", "#999999"
_SHAPE = dict(T=32_768, D=128)


def block_sparse(results: pathlib.Path) -> matplotlib.figure.Figure:
  """Left: random blocks against cuDNN's dense attention. Right: the paper's patterns against it."""
  figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained", facecolor="white")
  left, right = figure.subplots(1, 2)
  _by_share(left, json.loads((results / "block_sparse_h100.json").read_text()))
  _paper_patterns(right, json.loads((results / "attention_h100.json").read_text()))
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  return figure


def _by_share(axes, result: cells.Result) -> None:
  """Milliseconds over the share of causal blocks that are visited, forward and backward."""
  shape = f"d{_SHAPE['D']}_t{_SHAPE['T']}"
  rows = [row for row in result["rows"] if row["shape"] == shape and row["direction"] == "fwdbwd"]
  (dense,) = (r["ms"] for r in rows if (r["pattern"], r["implementation"]) == ("dense", "cudnn"))
  ours = sorted((r["density"], r["ms"]) for r in rows if r["pattern"] == "random")
  shares = [share for share, _ in ours]
  axes.plot(shares, [ms for _, ms in ours], "o-", color=_OURS, label="sparse_attention")
  axes.plot(shares, [dense] * len(ours), "--", color=_PEER, label="cuDNN, dense")
  axes.set(xscale="log", yscale="log", xlabel="visited blocks, share of the causal ones")
  axes.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], ["1/16", "1/8", "1/4", "1/2", "1"], minor=False)
  axes.set_xticks([], minor=True)
  ticks = [2, 4, 8, 16, 32]
  axes.set_yticks(ticks, [str(ms) for ms in ticks])
  axes.set_yticks([], minor=True)
  axes.set_ylabel("ms, forward + backward")
  axes.set_title(f"Random blocks, T = {_SHAPE['T']:,}, D = {_SHAPE['D']}, 16 heads", size=11)
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)


def _paper_patterns(axes, result: cells.Result) -> None:
  """Milliseconds of the paper's patterns and of dense attention for enwik8's shape."""
  rows = cells.by(result["rows"], "shape", "pattern", "implementation", "direction")
  bars = (
    ("strided", "strided", "mosaic_gpu"),
    ("fixed", "fixed", "mosaic_gpu"),
    ("dense, by\ncuDNN", "dense", "cudnn"),
  )
  times = [rows["enwik8", pattern, by, "fwdbwd"]["ms"] for _, pattern, by in bars]
  colours = [_PEER if by == "cudnn" else _OURS for *_, by in bars]
  drawn = axes.bar([label for label, *_ in bars], times, color=colours, width=0.6)
  axes.bar_label(drawn, [f"{ms:.2f}" for ms in times], padding=2)
  axes.set_ylabel("ms, forward + backward")
  sizes = result["shapes"]["enwik8"]
  axes.set_title(f"The paper's patterns, T = {sizes['T']:,}, D = {sizes['D']}", size=11)


def steps(results: pathlib.Path) -> matplotlib.figure.Figure:
  """Training steps of the paper's models: ours, and the same bodies by what others have."""
  result = json.loads((results / "step_h200.json").read_text())
  fastest = cells.fastest_steps(result)
  bars = (
    ("ours", "sparse-flax", _OURS),
    ("pytorch", "PyTorch,\nFlexAttention", _PEER),
    ("jax_cudnn", "JAX, cuDNN's\ndense", _DENSE),
  )
  figure = matplotlib.figure.Figure(figsize=(10, 2.9), layout="constrained", facecolor="white")
  for axes, body in zip(figure.subplots(1, len(result["bodies"])), result["bodies"], strict=True):
    times = [fastest[body, way] for way, *_ in bars]
    drawn = axes.bar([name for _, name, _ in bars], times, color=[x for *_, x in bars], width=0.7)
    axes.bar_label(
      drawn, [f"{ms:,.0f} ms\n{ms / times[0]:.1f} x" for ms in times], padding=2, size=9
    )
    axes.set_title(cells.MODELS[body], size=11)
    axes.set_ylim(0, 1.3 * max(times))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
  return figure


def records(results: pathlib.Path) -> matplotlib.figure.Figure:
  """Bits/dim on the validation split over the seconds of each run in the ledger."""
  figure = matplotlib.figure.Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
  axes = figure.subplots()
  for folder in sorted((results / "runs").iterdir()):
    _, seconds, bits = curve(folder)
    axes.plot(seconds, bits, "o-", markersize=4, label=folder.name)
  axes.set(xscale="log", xlabel="seconds, compilation included", ylabel="bits/dim, validation")
  ticks = [30, 60, 120, 240, 480, 1_200]
  axes.set_xticks(ticks, [f"{x:,}" for x in ticks], minor=False)
  axes.set_xticks([], minor=True)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=9)
  return figure


def contexts(results: pathlib.Path) -> matplotlib.figure.Figure:
  """Bits per byte of the last bytes of each window against the bytes given before them."""
  figure = matplotlib.figure.Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
  axes, ticks = figure.subplots(), {}
  for path in _context_curves(results):
    curve = json.loads(path.read_text())
    points, last = curve["contexts"], curve["last"]
    # On a logarithmic axis no context stands where the last bytes themselves are all there is.
    found = [point["context"] + last for point in points]
    bits = [point["bits_per_byte"] for point in points]
    errors = [point["more_error"] or 0.0 for point in points]
    label = f"{path.parent.name}, the last {last:,} of {curve['sequences']:,} windows"
    axes.errorbar(found, bits, errors, fmt="o-", markersize=4, capsize=2, label=label)
    ticks |= {at: f"{point['context']:,}" for at, point in zip(found, points, strict=True)}
  axes.set(xscale="log", xlabel="bytes given before them", ylabel="bits/byte")
  axes.set_xticks(list(ticks), list(ticks.values()), size=8, rotation=45)
  axes.set_xticks([], minor=True)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, fontsize=9, title="errors: of differences from the longest")
  return figure


def _context_curves(results: pathlib.Path) -> list[pathlib.Path]:
  """Those of runs that have one, by `python -m experiments.evaluate --context_curve=BYTES`."""
  return sorted(results.glob("runs/*/context_curve.json"))


class Curve(NamedTuple):
  """Of the evaluations of a run on the validation split."""

  steps: list[int]
  seconds: list[float]  # from prepared data on
  bits: list[float]


def curve(folder: pathlib.Path) -> Curve:
  """That of a run: its last evaluation came when its seconds were over."""
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  scored = [line for line in lines if "validation_bits_per_byte" in line]
  seconds = json.loads((folder / "evaluation.json").read_text())["seconds"]
  start = scored[-1]["time"] - seconds
  return Curve(
    [x["step"] for x in scored],
    [x["time"] - start for x in scored],
    [x["validation_bits_per_byte"] for x in scored],
  )


def run(results: pathlib.Path) -> None:
  """Draws every plot from a folder of results."""
  plots = {"block-sparse": block_sparse, "records": records, "steps": steps}
  if _context_curves(results):
    plots["contexts"] = contexts
  for name, draw in plots.items():
    path = PICTURES / f"{name}.png"
    # Without the version of matplotlib the same plot is the same file.
    draw(results).savefig(path, dpi=100, metadata={"Software": None})
    print(path.relative_to(tables.ROOT), flush=True)
