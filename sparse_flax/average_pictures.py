"""Pictures of where heads attend on the average of many inputs."""

from collections.abc import Sequence

import matplotlib.figure

from sparse_flax.attention_averages import Averages
from sparse_flax.attention_pictures import FRAME
from sparse_flax.attention_pictures import visible


def draw(
  averages: Averages, layers: Sequence[int], names: Sequence[Sequence[str]]
) -> matplotlib.figure.Figure:
  """The mean weight of every head at each offset from the predicted place.

  Args:
    averages: of all layers.
    layers: those to draw.
    names: of each head of each layer.
  """
  rows, columns = len(layers), averages.relative.shape[1]
  size = (max(7.0, 2.9 * columns), 1.75 * rows + 0.9)
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  of = f"{averages.num_inputs} inputs, {averages.num_places} places of each"
  shade = "" if averages.distances is not None else "; shade: root of the weight"
  figure.suptitle(f"mean weight by offset from the predicted place ({of}{shade})")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
  for line, layer in zip(grid, layers, strict=True):
    for h, axes in enumerate(line):
      relative = averages.relative[layer, h]
      if averages.distances is not None:
        seen = relative > 0
        axes.plot(averages.distances[seen], relative[seen], ".-", color="#0072b2", lw=0.6, ms=3)
        axes.set(xscale="log", yscale="log" if seen.any() else "linear")
        axes.grid(alpha=0.3)
      else:
        height, width = relative.shape
        around = (-(width // 2) - 0.5, width // 2 + 0.5, 0.5, 0.5 - height)
        axes.imshow(visible(relative), cmap="cividis", vmin=0, vmax=1, extent=around)
        axes.plot(0, 0, "s", markersize=4, markerfacecolor="none", color=FRAME)
      axes.set_title(f"layer {layer}, {names[layer][h]}", size=9)
      axes.tick_params(labelsize=7)
  is_picture = averages.distances is None
  figure.supxlabel("columns to the right" if is_picture else "distance back, tokens", size=10)
  figure.supylabel("rows below" if is_picture else "mean weight of a token", size=10)
  return figure
