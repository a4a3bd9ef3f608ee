"""A run as one HTML page that needs nothing else: curves, samples, and where the heads attend."""

import base64
import dataclasses
import json
import math
import pathlib
import string
import zlib
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import plotly.offline
from jaxtyping import Num
from jaxtyping import UInt8

from sparse_flax.view import sound
from sparse_flax.view.averages import Averages
from sparse_flax.view.maps import Layout
from sparse_flax.view.maps import Maps
from sparse_flax.view.report import charts as charts_lib
from sparse_flax.view.report import samples as samples_lib
from sparse_flax.view.report.charts import Chart
from sparse_flax.view.report.samples import escape

# Bytes in the page. With 5 MB for plotly.js and SAMPLE_BYTES it stays below 25 MB.
MAP_BYTES = 9_000_000
AVERAGE_BYTES = 3_000_000
SAMPLE_BYTES = 5_000_000  # of files; a third more in the page
_FEWEST_PLACES = 4


@dataclasses.dataclass(frozen=True)
class Attention:
  """What the explorer shows.

  Attributes:
    layout: of the model.
    tokens: the input of the maps.
    maps: of all layers.
    averages: over other inputs, of all layers.
    names: of each head of each layer.
  """

  layout: Layout
  tokens: UInt8[np.ndarray, "T"]
  maps: Maps
  averages: Averages
  names: Sequence[Sequence[str]]


def build(
  *,
  title: str,
  facts: Sequence[tuple[str, str]],
  records: Sequence[dict],
  unit: str,
  reference: tuple[str, float] | None,
  samples: Sequence[samples_lib.Sample],
  sample_command: str,
  attention: Attention,
) -> str:
  """The page.

  Args:
    title: names the run.
    facts: what the run is: names and values.
    records: of metrics.jsonl.
    unit: of the bits.
    reference: name and bits of a line to compare the curves with.
    samples: files, as `experiments.sample` names them.
    sample_command: how to make them.
    attention: for the explorer and the averages.
  """
  layout = attention.layout
  curves = charts_lib.curves(records, layout, unit=unit, reference=reference)
  curves = {"curves": curves} if curves.figure.data else {}
  drawn, left_out = samples_lib.to_html(samples)
  values, explorer, notes = attention_values(attention)
  averages = charts_lib.offsets(attention.averages, layout)
  numbers = charts_lib.numbers(attention.averages, layout, attention.names)
  if left_out:
    notes.append(f"Samples not shown, for their size or their content: {', '.join(left_out)}.")
  command = f"<code>{escape(sample_command)}</code>"
  no_curves = '<p class="none">metrics.jsonl has no records of training yet.</p>'
  no_samples = f'<p class="none">No samples of this step yet. Draw some with {command}</p>'
  charts = curves | explorer | averages | numbers
  figures = ",".join(f'"{name}":{chart.figure.to_json()}' for name, chart in charts.items())
  return string.Template(_file("page.html")).substitute(
    title=escape(title),
    facts="".join(_fact(name, value) for name, value in facts),
    curves=_charts(curves) or no_curves,
    samples=drawn or no_samples,
    said_of_heads=escape(_said_of_heads(layout)),
    explorer=_charts(explorer) or '<div id="text"></div>',
    said_of_averages=escape(_said_of_averages(attention)),
    averages=_charts(averages),
    numbers=_charts(numbers),
    notes="".join(f"<li>{escape(note)}</li>" for note in notes),
    style=_file("page.css"),
    data=_json(values),
    figures=figures,
    plotly=plotly.offline.get_plotlyjs(),
    script=_file("page.js"),
  )


def attention_values(attention: Attention) -> tuple[dict, dict[str, Chart], list[str]]:
  """The explorer's numbers, its charts, and a sentence for each thing that was left out for size.

  Maps and averages are packed by layer: base64 of zlib of the bytes, [H, ...].
  """
  layout, averages = attention.layout, attention.averages
  layers, maps, packed, notes = _fit(attention)
  relative, absolute = _averages_of(averages, layers)
  values = dict(
    modality=layout.modality,
    rate=sound.RATE,
    layout=dict(dataclasses.asdict(layout), cell_size=layout.cell_size),
    layers=layers,
    heads=[list(attention.names[layer]) for layer in layers],
    places=maps.places.tolist(),
    maps=dict(packed=packed, cells=maps.roots.shape[-1], tops=_rounded(maps.tops)),
    averages=dict(relative=relative, absolute=absolute),
  )
  explorer = {}
  if layout.modality == "image":
    shape = (layout.rows, layout.columns, layout.channels)
    explorer = charts_lib.image_explorer(attention.tokens.reshape(shape), maps.places)
  elif layout.modality == "audio":
    explorer = charts_lib.audio_explorer(attention.tokens, maps.places, layout)
  else:
    values["tokens"] = base64.b64encode(attention.tokens.tobytes()).decode()
  return values, explorer, notes


def pack(values: Num[np.ndarray, "L *shape"]) -> list[str]:
  """Each layer's bytes, compressed, as text."""
  return [base64.b64encode(zlib.compress(layer.tobytes(), 9)).decode() for layer in values]


def _fit(attention: Attention) -> tuple[list[int], Maps, list[str], list[str]]:
  """As many layers and places as there is room for: (layers, maps, packed maps, notes)."""
  num_layers, _, num_places, _ = attention.maps.roots.shape
  layers, maps, packed = list(range(num_layers)), attention.maps, None
  while packed is None or _size(packed) > MAP_BYTES:
    if packed is not None and len(maps.places) > _FEWEST_PLACES:
      maps = maps.some(layers=slice(None), places=slice(None, None, 2))
    elif packed is not None and len(layers) > 1:
      layers, maps = layers[::2], maps.some(layers=slice(None, None, 2), places=slice(None))
    elif packed is not None:
      break
    packed = pack(maps.roots)
  while len(layers) > 1 and _size_of_averages(attention.averages, layers) > AVERAGE_BYTES:
    layers, packed = layers[::2], packed[::2]
    maps = maps.some(layers=slice(None, None, 2), places=slice(None))
  notes = []
  if len(maps.places) < num_places:
    notes.append(f"For size, {len(maps.places)} of {num_places} places can be chosen.")
  if len(layers) < num_layers:
    notes.append(f"For size, {len(layers)} of {num_layers} layers can be chosen.")
  return layers, maps, packed, notes


def _averages_of(averages: Averages, layers: Sequence[int]) -> tuple[dict, dict | None]:
  """Those of some layers, packed: by offset, and by pixel if there are pixels."""
  relative = np.nan_to_num(averages.relative[layers])
  if averages.absolute is None:
    return dict(packed=pack(relative)), None
  return _rooted(relative), _rooted(np.nan_to_num(averages.absolute[layers]))


def _rooted(values: np.ndarray) -> dict:
  tops = values.max(axis=(2, 3))
  roots = np.sqrt(values / np.where(tops > 0, tops, 1)[..., None, None])
  return dict(packed=pack(np.round(255 * roots).astype(np.uint8)), tops=_rounded(tops))


def _size_of_averages(averages: Averages, layers: Sequence[int]) -> int:
  return sum(_size(part["packed"]) for part in _averages_of(averages, layers) if part)


def _size(packed: Sequence[str]) -> int:
  return sum(map(len, packed))


def _said_of_heads(layout: Layout) -> str:
  token = layout.token
  said = (
    f"The model predicts a {layout.whole} {token} by {token}. Each head of a layer shares out its "
    f"attention, 100% in all, over the {token}s before the predicted one and what stands for the "
    "start."
  )
  if layout.modality == "text":
    said += (
      " The darker a byte, the more attention it gets; the shade shows the square root. Choose an "
      "underlined byte: the one to predict."
    )
  return said


def _said_of_averages(attention: Attention) -> str:
  averages, layout = attention.averages, attention.layout
  return (
    f"Means over {averages.num_inputs} {layout.whole}s that the model was not trained on, and "
    f"{averages.num_places} predicted {layout.token}s of each."
  )


def _charts(charts: Mapping[str, Chart]) -> str:
  """Where page.js draws them, with titles and captions; empty without any."""
  figures = []
  for name, chart in charts.items():
    title = f"<b>{escape(chart.title)}</b> " if chart.title else ""
    figures.append(
      f"<figure><figcaption>{title}{escape(chart.caption)}</figcaption>"
      f'<div id="{name}" class="chart" style="height: {chart.height}"></div></figure>'
    )
  return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _fact(name: str, value: str) -> str:
  return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"


def _rounded(values: np.ndarray) -> list:
  """Nested lists of five digits, which take half the room."""
  if values.ndim > 1:
    return [_rounded(part) for part in values]
  return [float(f"{x:.4e}") if math.isfinite(x) else None for x in values]


def _json(values: dict) -> str:
  """JSON that may stand in a <script>."""
  text = json.dumps(values, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c").replace(">", "\\u003e")


def _file(name: str) -> str:
  return pathlib.Path(__file__).with_name(name).read_text()
