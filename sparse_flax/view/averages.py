"""Where the heads of all layers attend on the average of many inputs: what a head is for.

A head that looks at its row, at its column, at the whole picture, or at one place whatever the
input, is told by its mean weight at each offset from the predicted place and at each place, and by
a few numbers.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.axes
import matplotlib.figure
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax.view import maps as maps_lib
from sparse_flax.view.draw import FRAME
from sparse_flax.view.draw import visible
from sparse_flax.view.maps import Layout

_LAYER_BYTES = 2**27  # the weights of one layer, for two inputs
_MOST_PLACES = 128
_MOST_PANELS = 4  # in a line, of several layers
_AROUND = 5  # rows and columns of the predicted pixel's neighbourhood, drawn again, enlarged
_LEAST = 1e-7  # of texts and sounds, smaller means are not drawn: they would stretch the axis
_EXACT = 256  # distances with a value of their own; further away they share one, 12 per doubling


@dataclasses.dataclass(frozen=True)
class Averages:
  """Means over inputs and over predicted places.

  Attributes:
    num_inputs: how many.
    num_places: predicted places of each.
    relative: mean weight at an offset, over the places that have a key there. Pictures: [L, H,
      rows, 2 columns - 1], the predicted pixel in the middle of the last row. Text and audio:
      [L, H, bins] by distance, per token.
    absolute: of pictures, mean weight on each pixel: [L, H, rows, columns].
    distances: of text and audio, the first distance of each bin; 1 is the token just before.
    numbers: by the names of `meanings`, [L, H] each. `change` is the share of the weight that
      lies elsewhere for another input, from 0 to 1; NaN where there is one input only. Also
      `recent`, the share on the last `columns` pixels, bytes or samples, and of a picture on those
      of the predicted pixel itself; `above`, that on the own column, or the one left of it, in the
      rows above (of text and audio, on steps of `columns` before the own block); and `start`, that
      on the start vector.
  """

  num_inputs: int
  num_places: int
  relative: Float32[np.ndarray, "L H *offsets"]
  absolute: Float32[np.ndarray, "L H rows columns"] | None
  distances: Integer[np.ndarray, "bins"] | None
  numbers: dict[str, Float32[np.ndarray, "L H"]]


def meanings(layout: Layout) -> dict[str, tuple[str, str]]:
  """What each number of a head is called, and what it says in words."""
  token = layout.token
  if layout.modality == "image":
    row = "Own row", f"The share of its attention that goes to the row of the predicted {token}."
    column = "Own column", f"The share that goes to the column of the predicted {token}."
  else:
    row = (
      "Own block",
      f"The share that goes to the predicted {token}'s block of {layout.columns:,}.",
    )
    column = (
      f"Steps of {layout.columns:,} {token}s",
      (
        f"The share that goes to the {token} just before the predicted one, the one "
        f"{layout.columns:,} earlier, and so on."
      ),
    )
  return dict(
    row=row,
    column=column,
    distance=("Distance", f"How many {token}s away the places it attends to are, on average."),
    change=(
      "Change with the input",
      f"How much of its attention moves when the {layout.whole} is another one. 0%: the "
      "same places whatever the input, 100%: entirely other ones.",
    ),
  )


def pick_places(layout: Layout, num_heads: int, *, seed: int) -> Integer[np.ndarray, "P"]:
  """At most 128 places in order, each at random in its part of what follows the first eighth.

  Fewer where the weights of a layer would not fit into 128 MiB.
  """
  bytes_of_place = 2 * num_heads * layout.channels * layout.seq_len * 4
  first = layout.num_places // 8
  num = min(_MOST_PLACES, layout.num_places - first, max(1, _LAYER_BYTES // bytes_of_place))
  return maps_lib.random_places(layout, num, seed=seed)


def average(
  graphdef: nnx.GraphDef,
  params: dict,
  inputs: UInt8[np.ndarray, "N T"],
  places: Integer[np.ndarray, "P"],
  layout: Layout,
  *,
  on_progress: Callable[[int], None] = lambda num_inputs: None,
) -> Averages:
  """Averages over N inputs, two at a time; of an odd number > 1 the last is left out.

  `on_progress` is called with the number of inputs that are done.
  """
  reduce = lambda weights: _sums(weights, places, layout)
  run = jax.jit(
    lambda params, tokens: nnx.merge(graphdef, params).attention_weights(
      tokens, layout.slots(places), reduce=reduce
    )
  )
  size = min(2, len(inputs))
  batches = [inputs[n : n + size] for n in range(0, len(inputs) - size + 1, size)]
  total = None
  for n, tokens in enumerate(batches, start=1):
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), run(params, jnp.asarray(tokens)))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    on_progress(n * size)
  num_inputs = size * len(batches)
  each = num_inputs * len(places)
  numbers = {name: total[name] / each for name in ("row", "column", "recent", "above", "start")}
  with np.errstate(divide="ignore", invalid="ignore"):
    numbers["distance"] = total["distance"] / total["on_tokens"]
  pairs = len(batches) * len(places) if size == 2 else np.nan
  numbers["change"] = total["change"] / pairs
  relative, distances = _per_offset(total["relative"] / num_inputs, places, layout)
  as_float32 = lambda x: x.astype(np.float32)
  return Averages(
    num_inputs=num_inputs,
    num_places=len(places),
    relative=as_float32(relative),
    absolute=as_float32(total["absolute"] / each) if "absolute" in total else None,
    distances=distances,
    numbers={name: as_float32(values) for name, values in numbers.items()},
  )


def draw(
  averages: Averages, layers: Sequence[int], names: Sequence[Sequence[str]]
) -> matplotlib.figure.Figure:
  """The mean weight of every head at each offset from the predicted place.

  Args:
    averages: of all layers.
    layers: those to draw, side by side where their heads are few.
    names: of each head of each layer.
  """
  num_heads = averages.relative.shape[1]
  beside = min(len(layers), max(1, _MOST_PANELS // num_heads))
  rows, columns = -(-len(layers) // beside), beside * num_heads
  size = (max(7.0, 2.9 * columns), 1.75 * rows + 0.9)
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  of = f"{averages.num_inputs} inputs, {averages.num_places} places of each"
  is_picture = averages.distances is None
  is_small = is_picture and averages.relative.shape[2] < 3 * _AROUND
  told = "; shade: root of the weight" if is_picture else ""
  told += "; framed: the nearest pixels, enlarged" if is_picture and not is_small else ""
  place = "predicted pixel (orange)" if is_picture else "predicted place"
  figure.suptitle(f"mean weight by offset from the {place}\n({of}{told})")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
  panels = grid.reshape(rows * beside, num_heads)
  for axes in panels[len(layers) :].flat:
    axes.set_axis_off()
  for line, layer in zip(panels, layers, strict=False):
    for h, axes in enumerate(line):
      relative = averages.relative[layer, h]
      if not is_picture:
        seen = relative > _LEAST
        axes.plot(averages.distances[seen], relative[seen], ".-", color="#0072b2", lw=0.6, ms=3)
        axes.set(xscale="log", yscale="log" if seen.any() else "linear")
        axes.grid(alpha=0.3)
      else:
        shades = visible(relative)
        _draw_offsets(axes, shades, marker_size=4)
        if not is_small:
          _draw_nearest(axes, shades)
      axes.set_title(f"layer {layer}, {names[layer][h]}", size=9)
      axes.tick_params(labelsize=7)
  figure.supxlabel("columns to the right" if is_picture else "distance back, tokens", size=10)
  figure.supylabel("rows above" if is_picture else "mean weight of a token", size=10)
  return figure


def _draw_offsets(
  axes: matplotlib.axes.Axes, shades: Float[np.ndarray, "rows columns"], *, marker_size: int
) -> None:
  """The predicted pixel is the middle one of the last row."""
  height, width = shades.shape
  extent = (-width / 2, width / 2, -0.5, height - 0.5)
  axes.imshow(shades, cmap="cividis", vmin=0, vmax=1, extent=extent)
  axes.plot(0, 0, "s", markersize=marker_size, markerfacecolor="none", color=FRAME)


def _draw_nearest(axes: matplotlib.axes.Axes, shades: Float[np.ndarray, "rows columns"]) -> None:
  """In the upper left corner, left of the own column, which has most of what is seen so far up."""
  middle = shades.shape[1] // 2
  nearest = axes.inset_axes((0.03, 0.4, 0.42, 0.55), anchor="NW", xticks=[], yticks=[])
  around = shades[-_AROUND:, middle - _AROUND + 1 : middle + _AROUND]
  _draw_offsets(nearest, around, marker_size=9)
  nearest.spines[:].set_color("white")


def _sums(
  weights: Float[Array, "B H Q T"], places: Integer[np.ndarray, "P"], layout: Layout
) -> dict:
  """What is averaged of one layer, summed over inputs and places: a dict of [H, ...]."""
  weights = jnp.nan_to_num(layout.in_rows(weights))
  start = dict(start=weights[..., 0].sum(axis=(0, 2)) / layout.channels)
  if layout.modality == "image":
    return start | _sums_of_image(maps_lib.of_pixels(weights, layout), places, layout)
  return start | _sums_of_sequence(weights, places, layout)


def _sums_of_image(
  maps: Float[Array, "B H P rows columns"], places: Integer[np.ndarray, "P"], layout: Layout
):
  y, x = np.divmod(places, layout.columns)
  rows, columns = np.arange(layout.rows), np.arange(layout.columns)
  distance = np.hypot(rows[:, None] - y[:, None, None], columns - x[:, None, None])
  change = _change(maps.reshape(*maps.shape[:3], -1))
  # The query of a pixel's first channel stands on the pixel to the left, or at the end of a row.
  is_near = (columns == x[:, None]) | (columns == (x[:, None] - 1) % layout.columns)
  ago = places[:, None, None] - (rows[:, None] * layout.columns + columns)
  is_recent = (ago >= 0) & (ago <= layout.columns)
  is_above = (rows < y[:, None])[:, :, None] & is_near[:, None]
  maps = maps.sum(axis=0)
  # Around every place a window that has the place in the middle of its last row.
  around = ((0, 0), (0, 0), (layout.rows - 1, 0), (layout.columns - 1,) * 2)
  padded = jnp.pad(maps, around)
  window = (len(maps), layout.rows, 2 * layout.columns - 1)
  cut = lambda array, y, x: jax.lax.dynamic_slice(array, (jnp.int32(0), y, x), window)
  starts = (jnp.asarray(y, jnp.int32), jnp.asarray(x, jnp.int32))
  return dict(
    relative=jax.vmap(cut, in_axes=(1, 0, 0))(padded, *starts).sum(axis=0),
    absolute=maps.sum(axis=1),
    row=maps[:, np.arange(len(y)), y].sum(axis=(1, 2)),
    column=maps[:, np.arange(len(x)), :, x].sum(axis=(0, 2)),
    recent=jnp.where(is_recent[None], maps, 0.0).sum(axis=(1, 2, 3)),
    above=jnp.where(is_above[None], maps, 0.0).sum(axis=(1, 2, 3)),
    distance=jnp.einsum("hpyx,pyx->h", maps, distance.astype(np.float32)),
    on_tokens=maps.sum(axis=(1, 2, 3)),
    change=change,
  )


def _sums_of_sequence(
  weights: Float[Array, "B H P T"], places: Integer[np.ndarray, "P"], layout: Layout
):
  slots = np.arange(layout.seq_len)
  change = _change(weights)
  weights = weights.sum(axis=0)
  # Blocks and columns are counted by slots, as the patterns do.
  share = lambda chosen: jnp.where(chosen[None], weights, 0.0).sum(axis=(1, 2))
  is_block = slots // layout.columns == places[:, None] // layout.columns
  is_step = slots % layout.columns == places[:, None] % layout.columns
  # Slot j holds the token at distance place + 1 - j; from the first distance on, to the left.
  to_left = jnp.pad(weights[..., :0:-1], ((0, 0), (0, 0), (0, layout.seq_len)))
  cut = lambda array, start: jax.lax.dynamic_slice_in_dim(array, start, layout.seq_len, axis=1)
  starts = jnp.asarray(layout.seq_len - 1 - places, jnp.int32)
  by_distance = jax.vmap(cut, in_axes=(1, 0))(to_left, starts).sum(axis=0)
  return dict(
    relative=by_distance,
    row=share(is_block),
    column=share(is_step),
    recent=by_distance[:, : layout.columns].sum(axis=1),
    above=share(is_step & ~is_block),
    distance=by_distance @ np.arange(1, layout.seq_len + 1, dtype=np.float32),
    on_tokens=by_distance.sum(axis=1),
    change=change,
  )


def _change(maps: Float[Array, "B H P cells"]) -> Float[Array, "H"]:
  """The share of the weight that the second input has elsewhere than the first."""
  return 0.5 * jnp.abs(maps[0] - maps[-1]).sum(axis=(1, 2))


def _per_offset(sums: np.ndarray, places: Integer[np.ndarray, "P"], layout: Layout):
  """Sums over places as means over those with a key at the offset; and the bins' distances."""
  if layout.modality == "image":
    y, x = np.divmod(places, layout.columns)
    dy = np.arange(1 - layout.rows, 1)
    dx = np.arange(1 - layout.columns, layout.columns)
    inside = (x[:, None] + dx >= 0) & (x[:, None] + dx < layout.columns)
    counts = (y[:, None] + dy >= 0).T.astype(int) @ inside.astype(int)
    return sums / np.maximum(counts, 1), None
  counts = (np.arange(1, layout.seq_len + 1) <= places[:, None]).sum(axis=0)
  last = int(places.max())  # the longest distance there is
  firsts = np.arange(1, min(_EXACT, last) + 1)
  if last > _EXACT:
    octaves = np.log2(last / _EXACT)
    spaced = _EXACT * 2 ** np.linspace(0, octaves, round(12 * octaves) + 2)[:-1]
    firsts = np.unique(np.concatenate([firsts, np.ceil(spaced).astype(int)]))
  add = lambda values: np.add.reduceat(values[..., :last], firsts - 1, axis=-1)
  return add(sums) / np.maximum(add(counts), 1), firsts
