"""Pictures of where learned heads attend: over a picture, a text or a sound."""

from collections.abc import Sequence

import matplotlib.colors
import matplotlib.figure
import matplotlib.patches
import numpy as np
from jaxtyping import Float
from jaxtyping import UInt8

from sparse_flax.view import sound
from sparse_flax.view.maps import on_pixels
from sparse_flax.view.maps import on_tokens

FRAME = "#e69f00"
_HEAT = matplotlib.colors.LinearSegmentedColormap.from_list("heat", ["#ffffff", "#0072b2"])
_CONTEXT = 64  # bytes of text before the predicted one
_BINS = 400  # of a sound


def visible(weights: Float[np.ndarray, "*B"]) -> Float[np.ndarray, "*B"]:
  """Square roots, the largest 1: weights spread over many keys remain to be seen."""
  top = weights.max(initial=0.0)
  return np.sqrt(weights / top) if top > 0 else np.zeros_like(weights)


def draw_image(
  image: UInt8[np.ndarray, "rows columns channels"],
  pixels: Sequence[int],
  weights: Float[np.ndarray, "P H C T"],
  *,
  title: str,
  heads: Sequence[str],
) -> matplotlib.figure.Figure:
  """Where the heads of a layer look to predict some pixels; white is the most attended.

  Args:
    image: the original.
    pixels: P predicted pixels, counted row by row.
    weights: of the query slots of each pixel's C channels, which are averaged.
    title: of the layer.
    heads: a name for each head.
  """
  rows, columns = len(pixels), 1 + len(heads)
  figure = matplotlib.figure.Figure(
    figsize=(max(5.0, 2.0 * columns), 2.0 * rows + 0.7), layout="constrained"
  )
  figure.suptitle(title)
  grid = figure.subplots(rows, columns, squeeze=False)
  maps = np.asarray(on_pixels(weights, image.shape)).mean(axis=2)
  for n, pixel in enumerate(pixels):
    y, x = divmod(pixel, image.shape[1])
    original = image if image.shape[2] == 3 else image.repeat(3, axis=2)
    panels = [original, *(visible(one) for one in maps[n])]
    for axes, panel in zip(grid[n], panels, strict=True):
      axes.imshow(panel, cmap="gray", vmin=0, vmax=None if panel is original else 1)
      frame = matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1)
      frame.set(facecolor="none", edgecolor=FRAME, linewidth=1.5)
      axes.add_patch(frame)
      axes.set(xticks=[], yticks=[])
    grid[n, 0].set_ylabel(f"row {y}, column {x}")
  for axes, name in zip(grid[0], ["original", *heads], strict=True):
    axes.set_title(name, size=10)
  return figure


def draw_text(
  tokens: UInt8[np.ndarray, "T"],
  places: Sequence[int],
  weights: Float[np.ndarray, "P H T"],
  *,
  title: str,
  heads: Sequence[str],
) -> matplotlib.figure.Figure:
  """Where the heads of a layer look to predict some bytes, over the bytes before each.

  Args:
    tokens: the text.
    places: P predicted bytes.
    weights: of their query slots.
    title: of the layer.
    heads: a name for each head.
  """
  figure, panels = _panels(len(places), len(heads), title)
  for axes, place, slots in zip(panels, places, weights, strict=True):
    start = max(0, place - _CONTEXT)
    shown = np.asarray(on_tokens(slots))[:, start:place]
    # The start vector and whatever lies further back, in one column.
    earlier = slots[:, : start + 1].sum(axis=1, keepdims=True)
    bars = np.concatenate([earlier, shown], axis=1)
    _heat(axes, visible(bars), heads)
    letters = [_letter(x) for x in tokens[start:place]]
    axes.set_xticks(range(len(letters) + 1), ["earlier ", *letters], family="monospace", size=9)
    axes.tick_params(length=0)
    axes.get_xticklabels()[0].set_rotation(90)
    axes.set_title(f"predicts {_letter(tokens[place])}, byte {place:,}", size=10)
  return figure


def draw_audio(
  tokens: UInt8[np.ndarray, "T"],
  places: Sequence[int],
  weights: Float[np.ndarray, "P H T"],
  *,
  title: str,
  heads: Sequence[str],
) -> matplotlib.figure.Figure:
  """Where the heads of a layer look to predict some samples, over time, below the waveform.

  Args:
    tokens: mu-law codes.
    places: P predicted samples.
    weights: of their query slots.
    title: of the layer.
    heads: a name for each head.
  """
  figure, panels = _panels(len(places) + 1, len(heads), title)
  T = len(tokens)
  seconds = sound.seconds(T)
  panels[0].plot(*sound.waveform(tokens), color="0.4", lw=0.5)
  panels[0].set(xlim=(0, seconds), ylabel="sound")
  edges = np.unique(np.linspace(0, T, min(T, _BINS) + 1).astype(int))[:-1]
  for axes, place, one in zip(panels[1:], places, np.asarray(on_tokens(weights)), strict=True):
    binned = np.add.reduceat(one, edges, axis=1)
    _heat(axes, visible(binned), heads, extent=(0, seconds, len(heads) - 0.5, -0.5))
    at = sound.seconds(place)
    for marked in (axes, panels[0]):
      marked.axvline(at, color=FRAME)
    axes.set_title(f"predicts the sample at {at:.4g} s", size=10)
  panels[-1].set_xlabel("seconds")
  return figure


def _panels(rows: int, num_heads: int, title: str):
  height = 0.9 + 0.24 * num_heads
  figure = matplotlib.figure.Figure(figsize=(12, rows * height + 0.5), layout="constrained")
  figure.suptitle(title)
  return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]


def _heat(axes, values, heads, *, extent: tuple[float | int, ...] | None = None) -> None:
  axes.imshow(values, cmap=_HEAT, vmin=0, vmax=1, aspect="auto", extent=extent)
  axes.set_yticks(range(len(heads)), heads, size=8)


def _letter(byte: np.integer) -> str:
  """A byte as one visible sign."""
  if byte == ord(" "):
    return "\N{OPEN BOX}"
  if byte == ord("$"):
    return r"\$"  # a bare one would begin a formula
  return chr(byte) if 33 <= byte < 127 else "\N{MIDDLE DOT}"
