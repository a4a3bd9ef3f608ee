"""The charts of the report, as plotly figures; those of a head are filled in by `page.js`."""

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Integer
from jaxtyping import UInt8
from plotly.subplots import make_subplots

from sparse_flax.view import averages as averages_lib
from sparse_flax.view import sound
from sparse_flax.view.averages import Averages
from sparse_flax.view.maps import Layout

BLUE, ORANGE, VERMILION = "#0072b2", "#e69f00", "#d55e00"
_LEGEND = dict(orientation="h", x=0, y=1, yanchor="bottom", font_size=13)
_NARROW = dict(l=4, r=4, t=30, b=4)
_TICKS = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)  # of weights whose roots are drawn


def curves(
  records: Sequence[dict], *, unit: str, reference: tuple[str, float] | None = None
) -> go.Figure:
  """Bits against steps, training and validation.

  Args:
    records: of metrics.jsonl; fields that are missing, null or not finite are left out.
    unit: of the bits.
    reference: name and bits of a line to compare with.
  """
  figure = go.Figure()
  for field, name, style in (
    ("bits_per_byte", "training", dict(mode="lines", line=dict(color=BLUE, width=1.5))),
    (
      "validation_bits_per_byte",
      "validation, averaged weights",
      dict(mode="lines+markers", line_color=VERMILION, marker_size=8),
    ),
  ):
    points = [(record["step"], record[field]) for record in records if is_number(record.get(field))]
    if points:
      steps, bits = zip(*points, strict=True)
      figure.add_scatter(x=steps, y=bits, name=name, **style)
  if reference and figure.data:
    name, bits = reference
    figure.add_hline(y=bits, line=dict(color="#555", dash="dot"), annotation_text=f"{name}, {bits}")
  figure.update_xaxes(title="step")
  figure.update_yaxes(title=unit)
  return _styled(figure, height=420, hovermode="x unified")


def image_explorer(
  image: UInt8[np.ndarray, "rows columns channels"], places: Integer[np.ndarray, "P"]
) -> go.Figure:
  """The original with the places to choose from, and beside it the map of a head."""
  rows, columns, channels = image.shape
  shown = image if channels == 3 else image.repeat(3, axis=2)
  figure = make_subplots(1, 2, horizontal_spacing=0.06, subplot_titles=("original", "attention"))
  figure.add_trace(go.Image(z=shown.tolist(), hoverinfo="x+y"), 1, 1)
  empty = np.zeros((rows, columns)).tolist()
  hover = "row %{y}, column %{x}: weight %{customdata:.4f}<extra></extra>"
  map_ = go.Heatmap(z=empty, customdata=empty, hovertemplate=hover, **_shades("gray"))
  figure.add_trace(map_, 1, 2)
  y, x = np.divmod(places, columns)
  dots = go.Scatter(x=x.tolist(), y=y.tolist(), mode="markers", showlegend=False)
  dots.update(hovertemplate="predict row %{y}, column %{x}<extra></extra>")
  dots.update(marker=dict(size=7, color="rgba(255,255,255,0.25)", line=dict(color="#fff", width=1)))
  figure.add_trace(dots, 1, 1)
  for n in (1, 2):  # the predicted pixel's frame; page.js moves it
    frame = dict(line=dict(color=ORANGE, width=3), x0=-0.5, x1=0.5, y0=-0.5, y1=0.5)
    figure.add_shape(type="rect", row=1, col=n, **frame)
    figure.update_xaxes(range=[-0.5, columns - 0.5], constrain="domain", row=1, col=n)
    anchor = "x" if n == 1 else "x2"
    figure.update_yaxes(range=[rows - 0.5, -0.5], scaleanchor=anchor, row=1, col=n)
  return _plain(_styled(figure, height=570, dragmode=False)).update_layout(margin=_NARROW)


def audio_explorer(
  tokens: UInt8[np.ndarray, "T"], places: Integer[np.ndarray, "P"], layout: Layout
) -> go.Figure:
  """The waveform with the places to choose from, and below it the weight of a head over time."""
  seconds = sound.seconds(np.arange(layout.num_cells) * layout.cell_size)
  _, pressure = sound.waveform(tokens)
  padded = np.pad(pressure, (0, layout.num_cells * layout.cell_size - len(tokens)), mode="edge")
  cells = padded.reshape(layout.num_cells, -1)
  envelope = np.stack([cells.min(axis=1), cells.max(axis=1)], axis=1).reshape(-1)
  figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
  wave = go.Scatter(x=seconds.repeat(2).tolist(), y=envelope.round(4).tolist(), mode="lines")
  figure.add_trace(wave.update(line=dict(color="#666", width=1), name="sound"), 1, 1)
  bars = go.Bar(x=seconds.tolist(), y=[0.0] * layout.num_cells, name="weight")
  figure.add_trace(bars.update(marker=dict(color=BLUE, line_width=0), offset=0), 2, 1)
  at = sound.seconds(places).tolist()
  dots = go.Scatter(x=at, y=[0.0] * len(at), mode="markers", name="places to choose")
  dots.update(marker=dict(size=9, color="#fff", line=dict(color=ORANGE, width=2)))
  figure.add_trace(dots, 1, 1)
  figure.add_shape(
    type="line", xref="x", yref="paper", x0=0, x1=0, y0=0, y1=1, line=dict(color=ORANGE, width=2)
  )
  figure.update_yaxes(title="sound", row=1, col=1)
  figure.update_yaxes(title="weight", rangemode="tozero", row=2, col=1)
  figure.update_xaxes(title="seconds", row=2, col=1)
  figure.update_layout(bargap=0, showlegend=False)
  return _styled(figure, height=460)


def offsets(averages: Averages, layout: Layout) -> go.Figure:
  """The mean weight of a head by offset, and for pictures on each pixel; empty at first."""
  if averages.distances is not None:
    figure = go.Figure()
    distances = averages.distances.tolist()
    line = dict(mode="lines+markers", line=dict(color=BLUE, width=1), marker_size=5)
    figure.add_scatter(x=distances, y=[None] * len(distances), **line)
    figure.update_xaxes(title="distance back from the predicted token", type="log")
    figure.update_yaxes(title="mean weight of a token", type="log", exponentformat="power")
    return _styled(figure, height=400)
  rows, columns = layout.rows, layout.columns
  figure = make_subplots(
    1,
    2,
    column_widths=[(2 * columns - 1) / (3 * columns - 1), columns / (3 * columns - 1)],
    horizontal_spacing=0.08,
    subplot_titles=("by offset from the predicted pixel", "by pixel"),
  )
  hover = "{} %{{y}}, {} %{{x}}: mean weight %{{customdata:.5f}}<extra></extra>"
  for n, (x, y, words) in enumerate(
    (
      (range(1 - columns, columns), range(1 - rows, 1), ("rows", "columns")),
      (range(columns), range(rows), ("row", "column")),
    )
  ):
    heat = go.Heatmap(x=list(x), y=list(y), z=np.zeros((len(y), len(x))).tolist())
    heat.update(hovertemplate=hover.format(*words), **_shades("Cividis"))
    figure.add_trace(heat, 1, n + 1)
    figure.update_xaxes(constrain="domain", title=("columns to the right", "column")[n], col=n + 1)
    anchor = ("x", "x2")[n]
    figure.update_yaxes(range=[max(y) + 0.5, min(y) - 0.5], scaleanchor=anchor, col=n + 1)
    figure.update_yaxes(title=("rows below", "row")[n], constrain="domain", col=n + 1)
  return _styled(figure, height=430, dragmode=False)


def numbers(averages: Averages, layout: Layout, names: Sequence[Sequence[str]]) -> go.Figure:
  """A small picture of layers x heads for each number.

  Args:
    averages: of all layers.
    layout: of the model.
    names: of each head of each layer, for the hover text.
  """
  image = layout.modality == "image"
  titles = averages_lib.IMAGE_NUMBERS if image else averages_lib.SEQUENCE_NUMBERS
  num_layers, num_heads = averages.numbers["row"].shape
  figure = make_subplots(
    1, len(titles), shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=[*titles.values()]
  )
  written = num_layers <= 24 and num_heads <= 8
  for n, key in enumerate(titles):
    values = averages.numbers[key]
    z = [[float(x) if math.isfinite(x) else None for x in row] for row in values]
    digits = ".1f" if key == "distance" else ".2f"
    heat = go.Heatmap(z=z, customdata=[list(row) for row in names], colorscale="Blues", zmin=0)
    heat.update(
      zmax=None if key == "distance" else 1,
      showscale=False,
      xgap=2,
      ygap=2 if num_layers <= 48 else 0,
    )
    heat.update(
      hovertemplate=f"layer %{{y}}, %{{customdata}}: %{{z:{digits}}}<extra></extra>",
      texttemplate=f"%{{z:{digits}}}" if written else None,
    )
    figure.add_trace(heat, 1, n + 1)
    figure.update_xaxes(title="head", dtick=max(1, num_heads // 8), col=n + 1)
    figure.update_yaxes(autorange="reversed", dtick=max(1, num_layers // 16), col=n + 1)
  figure.update_yaxes(title="layer", col=1)
  figure.update_annotations(font_size=13)
  height = 130 + min(640, max(40, 28 * num_layers))
  return _styled(figure, height=height, dragmode=False)


def is_number(value) -> bool:
  """Whether a JSON value can be drawn."""
  usable = isinstance(value, int | float) and not isinstance(value, bool)
  return usable and math.isfinite(value)


def _shades(colours: str) -> dict:
  """Of bytes that are 255 sqrt(weight / top)."""
  ticks = [255 * tick**0.5 for tick in _TICKS]
  bar = dict(tickvals=ticks, ticktext=[f"{tick:g}" for tick in _TICKS], thickness=10)
  bar["title"] = dict(text="of the largest", side="right", font_size=11)
  return dict(colorscale=colours, zmin=0, zmax=255, colorbar=bar, showscale=False)


def _plain(figure: go.Figure) -> go.Figure:
  figure.update_xaxes(showgrid=False, zeroline=False, ticks="", showticklabels=False)
  figure.update_yaxes(showgrid=False, zeroline=False, ticks="", showticklabels=False)
  return figure


def _styled(figure: go.Figure, *, height: int, **layout) -> go.Figure:
  font = dict(family="system-ui, sans-serif", size=13, color="#222")
  margin = dict(l=60, r=20, t=40, b=50)
  figure.update_layout(template="plotly_white", height=height, font=font, margin=margin)
  return figure.update_layout(legend=_LEGEND, **layout)
