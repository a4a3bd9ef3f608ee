"""The charts of the report: figures, those of a head filled in by `page.js`, and captions."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax.view import averages as averages_lib
from sparse_flax.view import sound
from sparse_flax.view.averages import Averages
from sparse_flax.view.maps import Layout

BLUE, ORANGE, VERMILION = "#0072b2", "#e69f00", "#d55e00"
_LEGEND = dict(orientation="h", x=0, y=1, yanchor="bottom", font_size=13)
_BARE = dict(l=0, r=0, t=0, b=0)
_SHADES = "the shade shows the square root, so that little attention can be seen too"


@dataclasses.dataclass(frozen=True)
class Chart:
  """A figure and what stands above it, which the page, unlike plotly, breaks into lines.

  Attributes:
    figure: for plotly.
    title: a few words; "" is none.
    caption: what is to be seen, for people who do not know it.
    height: in CSS, where 100cqi is the width.
  """

  figure: go.Figure
  title: str = ""
  caption: str = ""
  height: str = "clamp(280px, 45cqi, 420px)"


def curves(
  records: Sequence[dict],
  layout: Layout,
  *,
  unit: str,
  reference: tuple[str, float] | None = None,
) -> Chart:
  """Bits against steps, training and validation.

  Args:
    records: of metrics.jsonl; fields that are missing, null or not finite are left out.
    layout: of the model.
    unit: of the bits.
    reference: name and bits of a line to compare with.
  """
  figure = go.Figure()
  for field, name, style in (
    ("bits_per_byte", "training", dict(mode="lines", line=dict(color=BLUE, width=1.5))),
    (
      "validation_bits_per_byte",
      "validation",
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
  of_colours = "red, green and blue of each " if layout.modality == "image" else "each "
  caption = (
    f"How many bits the model needs for {of_colours}{layout.token}: less is better, and 8 is "
    "guessing. Validation is of inputs that it was not trained on, by the averaged weights if "
    "the run keeps them."
  )
  # Room for the legend, above.
  return Chart(_styled(figure, hovermode="x unified", margin_t=36), caption=caption)


def image_explorer(
  image: UInt8[np.ndarray, "rows columns channels"], places: Integer[np.ndarray, "P"]
) -> dict[str, Chart]:
  """The original with the places to choose from, and the map of a head."""
  rows, columns, channels = image.shape
  original, attention = go.Figure(), go.Figure()
  shown = image if channels == 3 else image.repeat(3, axis=2)
  original.add_trace(go.Image(z=shown.tolist(), hoverinfo="x+y"))
  y, x = np.divmod(places, columns)
  dots = go.Scatter(x=x.tolist(), y=y.tolist(), mode="markers", showlegend=False)
  dots.update(hovertemplate="predict row %{y}, column %{x}<extra></extra>")
  dots.update(marker=dict(size=9, color="rgba(255,255,255,0.4)", line=dict(color="#333", width=1)))
  original.add_trace(dots)
  empty = np.zeros((rows, columns)).tolist()
  hover = "row %{y}, column %{x}: %{customdata:.2%}<extra></extra>"
  attention.add_heatmap(z=empty, customdata=empty, hovertemplate=hover, **_shades("gray"))
  for figure in (original, attention):  # the predicted pixel's frame; page.js moves it
    frame = dict(line=dict(color=ORANGE, width=3), x0=-0.5, x1=0.5, y0=-0.5, y1=0.5)
    figure.add_shape(type="rect", **frame)
    hidden = dict(showgrid=False, zeroline=False, ticks="", showticklabels=False)
    figure.update_xaxes(range=[-0.5, columns - 0.5], constrain="domain", **hidden)
    figure.update_yaxes(range=[rows - 0.5, -0.5], scaleanchor="x", **hidden)
    _styled(figure, dragmode=False, margin=_BARE)
  height = _picture_height(original, rows, columns)
  return dict(
    original=Chart(original, "The picture", "Choose a dot: the pixel to predict.", height),
    attention=Chart(
      attention,
      "What the head attends to",
      f"White: the pixel that gets the most attention; {_SHADES}.",
      height,
    ),
  )


def audio_explorer(
  tokens: UInt8[np.ndarray, "T"], places: Integer[np.ndarray, "P"], layout: Layout
) -> dict[str, Chart]:
  """The waveform with the places to choose from, and the weight of a head over time."""
  seconds = sound.seconds(np.arange(layout.num_cells) * layout.cell_size)
  end = float(sound.seconds(layout.num_cells * layout.cell_size))
  _, pressure = sound.waveform(tokens)
  padded = np.pad(pressure, (0, layout.num_cells * layout.cell_size - len(tokens)), mode="edge")
  cells = padded.reshape(layout.num_cells, -1)
  envelope = np.stack([cells.min(axis=1), cells.max(axis=1)], axis=1).reshape(-1)
  original, attention = go.Figure(), go.Figure()
  wave = go.Scatter(x=seconds.repeat(2).tolist(), y=envelope.round(4).tolist(), mode="lines")
  original.add_trace(wave.update(line=dict(color="#666", width=1), hoverinfo="skip"))
  at = sound.seconds(places).tolist()
  dots = go.Scatter(x=at, y=[0.0] * len(at), mode="markers")
  dots.update(hovertemplate="predict %{x:.4f} s<extra></extra>")
  dots.update(marker=dict(size=9, color="#fff", line=dict(color=ORANGE, width=2)))
  original.add_trace(dots)
  bars = go.Bar(x=seconds.tolist(), y=[0.0] * layout.num_cells)
  bars.update(hovertemplate="%{x:.4f} s: %{y:.2%}<extra></extra>")
  attention.add_trace(bars.update(marker=dict(color=BLUE, line_width=0), offset=0))
  for figure in (original, attention):  # the predicted sample's line; page.js moves it
    line = dict(line=dict(color=ORANGE, width=2), x0=0, x1=0, y0=0, y1=1)
    figure.add_shape(type="line", xref="x", yref="paper", **line)
    figure.update_xaxes(title="seconds", range=[0, end])
    _styled(figure, bargap=0, showlegend=False, dragmode=False)
  original.update_yaxes(title="pressure")
  attention.update_yaxes(title="attention", rangemode="tozero", tickformat=".2~p")
  cell = f"each {layout.cell_size} samples" if layout.cell_size > 1 else "each sample"
  return dict(
    original=Chart(original, "The recording", "Choose a dot: the sample to predict."),
    attention=Chart(
      attention, "What the head attends to", f"The share of its attention on {cell}."
    ),
  )


def offsets(averages: Averages, layout: Layout) -> dict[str, Chart]:
  """The mean weight of a head by offset, and for pictures on each pixel; empty at first."""
  if averages.distances is not None:
    figure = go.Figure()
    distances = averages.distances.tolist()
    line = dict(mode="lines+markers", line=dict(color=BLUE, width=1), marker_size=5)
    hover = "%{x:,} back: %{y:.3~p}<extra></extra>"
    figure.add_scatter(x=distances, y=[None] * len(distances), hovertemplate=hover, **line)
    figure.update_xaxes(title=f"{layout.token}s back", type="log", dtick=1)
    figure.update_yaxes(title="attention", type="log", tickformat=".1~p", dtick=1, automargin=True)
    caption = f"The share of its attention that goes to a {layout.token} so far back."
    return dict(offsets=Chart(_styled(figure), caption=caption))
  rows, columns = layout.rows, layout.columns
  charts = {}
  for name, title, caption, x, y, titles in (
    (
      "offsets",
      "Around the predicted pixel",
      "That pixel is the middle of the lower edge. Bright places, so many rows and columns away "
      f"from it, get the most attention; {_SHADES}.",
      range(1 - columns, columns),
      range(1 - rows, 1),
      ("columns to the right", "rows below"),
    ),
    (
      "pixels",
      "In the picture",
      "The same attention by the pixel that it goes to.",
      range(columns),
      range(rows),
      ("column", "row"),
    ),
  ):
    figure = go.Figure()
    heat = go.Heatmap(x=list(x), y=list(y), z=np.zeros((len(y), len(x))).tolist())
    hover = f"{titles[1]} %{{y}}, {titles[0]} %{{x}}: %{{customdata:.3%}}<extra></extra>"
    figure.add_trace(heat.update(hovertemplate=hover, **_shades("Cividis")))
    figure.update_xaxes(constrain="domain", title=titles[0])
    ends = [max(y) + 0.5, min(y) - 0.5]
    figure.update_yaxes(range=ends, scaleanchor="x", title=titles[1], constrain="domain")
    _styled(figure, dragmode=False)
    charts[name] = Chart(figure, title, caption, _picture_height(figure, len(y), len(x)))
  return charts


def numbers(averages: Averages, layout: Layout, names: Sequence[Sequence[str]]) -> dict[str, Chart]:
  """A small picture of layers x heads for each number, by its name.

  Args:
    averages: of all layers.
    layout: of the model.
    names: of each head of each layer, for the hover text.
  """
  num_layers, num_heads = averages.numbers["row"].shape
  written = num_layers <= 24 and num_heads <= 8
  charts = {}
  for key, (title, caption) in averages_lib.meanings(layout).items():
    values = averages.numbers[key]
    z = [[float(x) if math.isfinite(x) else None for x in row] for row in values]
    number = "%{z:.3r}" if key == "distance" else "%{z:.0%}"
    heat = go.Heatmap(z=z, customdata=[list(row) for row in names], colorscale="Blues", zmin=0)
    heat.update(
      zmax=None if key == "distance" else 1,
      showscale=False,
      xgap=2,
      ygap=2 if num_layers <= 48 else 0,
    )
    heat.update(
      hovertemplate=f"layer %{{y}}, %{{customdata}}: {number}<extra></extra>",
      texttemplate=number if written else None,
    )
    figure = go.Figure(heat)
    figure.update_xaxes(title="head", dtick=max(1, num_heads // 8))
    figure.update_yaxes(title="layer", autorange="reversed", dtick=max(1, num_layers // 16))
    _styled(figure, dragmode=False)
    margin = figure.layout.margin
    height = f"{margin.t + margin.b + min(640, 44 * num_layers)}px"  # 44: wide enough for a finger
    charts[key] = Chart(figure, title, caption, height)
  return charts


def is_number(value) -> bool:
  """Whether a JSON value can be drawn."""
  usable = isinstance(value, int | float) and not isinstance(value, bool)
  return usable and math.isfinite(value)


def _shades(colours: str) -> dict:
  """Of bytes that are 255 sqrt(weight / top)."""
  return dict(colorscale=colours, zmin=0, zmax=255, showscale=False)


def _picture_height(figure: go.Figure, rows: int, columns: int) -> str:
  """With which square pixels fill the width between the margins."""
  margin = figure.layout.margin
  sides, ends = margin.l + margin.r, margin.t + margin.b
  return f"calc((100cqi - {sides}px) * {rows / columns:.4f} + {ends}px)"


def _styled(figure: go.Figure, **layout) -> go.Figure:
  font = dict(family="system-ui, sans-serif", size=13, color="#222")
  margin = dict(l=56, r=12, t=12, b=46)
  figure.update_layout(template="plotly_white", font=font, margin=margin, legend=_LEGEND)
  for update in (figure.update_xaxes, figure.update_yaxes):
    update(ticklabelstandoff=4)  # the first labels of both axes are clear of each other
  return figure.update_layout(**layout)
