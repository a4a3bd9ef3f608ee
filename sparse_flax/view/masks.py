"""Pictures of patterns, drawn from their masks: pairs that attend, blocks that a kernel visits."""

import textwrap
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.patches
import numpy as np
from jaxtyping import Bool
from jaxtyping import Int
from jaxtyping import UInt8

from pallas_kernels import patterns

# Blue and orange of Okabe and Ito stay apart for every kind of colour blindness.
FIRST, SECOND, BOTH = (0, 114, 178), (230, 159, 0), (34, 34, 59)
SKIPPED, FUTURE = (232, 232, 236), (255, 255, 255)
MASKED = (250, 231, 191)  # SECOND, faint: pairs that a visited block holds in vain
_INK, _FAINT = "#22223b", "#6b6b7b"

_SIDE = 6  # the paper's Figure 3: pictures of 6 x 6 pixels, stride 6
_LENGTH = _SIDE * _SIDE
_QUERY = 21  # row 3, column 3
_BLOCK = 3  # tokens a side; kernels take 64 to 128
_COLUMNS = (
  ("Dense", (patterns.Dense(),), ("every head",)),
  (
    "Strided",
    (patterns.Local(_SIDE), patterns.Column(_SIDE)),
    ("head 1: local", "head 2: column"),
  ),
  (
    "Fixed",
    (patterns.Block(_SIDE), patterns.Summary(_SIDE, 1)),
    ("head 1: block", "head 2: summary"),
  ),
)


def colours(
  parts: Sequence[Bool[np.ndarray, "rows columns"]], past: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "rows columns 3"]:
  """One or two masks in their colours, BOTH where they meet.

  Args:
    parts: the masks of the first and perhaps a second head.
    past: what may be attended to at all; SKIPPED where no mask has it.
  """
  picture = np.where(past[..., None], np.uint8(SKIPPED), np.uint8(FUTURE))
  picture[parts[0]] = FIRST
  if len(parts) > 1:
    picture[parts[1]] = SECOND
    picture[parts[0] & parts[1]] = BOTH
  return picture


def visited_blocks(
  mask: Bool[np.ndarray, "T S"], block_size: int
) -> Bool[np.ndarray, "blocks_q blocks_k"]:
  """The blocks that hold any allowed pair; the sizes must be multiples of `block_size`."""
  T, S = mask.shape
  return mask.reshape(T // block_size, block_size, S // block_size, block_size).any(axis=(1, 3))


def kernel_order(
  pattern: patterns.Pattern, T: int
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
  """The order of queries and of keys in which a kernel reads the sequence.

  Column by column for `Column`, summaries first for the keys of `Summary`, else as it is.
  """
  positions = np.arange(T)
  match pattern:
    case patterns.Column(stride=stride):
      by_column = np.argsort(positions % stride, kind="stable")
      return by_column, by_column
    case patterns.Summary(stride=stride, width=width, start=start):
      place = positions % stride
      is_summary = (place >= start) & (place < start + width)
      return positions, np.argsort(~is_summary, kind="stable")
  return positions, positions


def draw_overview() -> matplotlib.figure.Figure:
  """Dense, strided and fixed attention: what heads see, the masks, the blocks a kernel visits."""
  figure = matplotlib.figure.Figure(figsize=(12, 10.9), facecolor="white")
  for n, (title, parts, names) in enumerate(_COLUMNS):
    left, width = 0.062 + 0.318 * n, 0.284
    figure.text(left + width / 2, 0.964, title, size=24, weight="bold", ha="center", color=_INK)
    _draw_seen(figure, parts, names, left=left, width=width)
    _draw_mask(figure, parts, left=left, width=width)
    _draw_blocks(figure, parts, left=left, width=width)
  for middle, text in ((0.83, "one query"), (0.54, "all queries"), (0.24, "blocks visited")):
    figure.text(0.018, middle, text, size=17, rotation=90, va="center", ha="center", color=_FAINT)
  for n, (colour, text) in enumerate(
    ((FIRST, "head 1"), (SECOND, "head 2"), (BOTH, "both"), (SKIPPED, "skipped past"))
  ):
    _draw_key(figure, 0.2 + 0.165 * n, 0.022, 0.02, colour, text, size=16)
  return figure


def _draw_seen(figure, parts, names, *, left, width) -> None:
  """What the query sees of a picture read row by row, per head."""
  past = patterns.Dense().mask(_LENGTH)[_QUERY].reshape(_SIDE, _SIDE)
  for n, (x, part) in enumerate(zip(_places(len(parts), left, width), parts, strict=True)):
    axes = _axes(figure, x, 0.762, 0.131)
    seen = part.mask(_LENGTH)[_QUERY].reshape(_SIDE, _SIDE)
    blank = np.zeros_like(seen)
    _show(axes, colours([seen] if n == 0 else [blank, seen], past), grid=1)
    row, column = divmod(_QUERY, _SIDE)
    axes.plot(column, row, "o", color=_INK, markersize=9, markeredgecolor="white", clip_on=False)
    axes.set_title(names[n], size=15, color=_INK, pad=6)


def _draw_mask(figure, parts, *, left, width) -> None:
  axes = _axes(figure, left, 0.386, width)
  masks = [part.mask(_LENGTH) for part in parts]
  _show(axes, colours(masks, patterns.Dense().mask(_LENGTH)), grid=1)
  pairs = int(np.any(masks, axis=0).sum())
  axes.text(
    0.97,
    0.96,
    f"{pairs} pairs",
    size=17,
    transform=axes.transAxes,
    ha="right",
    va="top",
    color=_INK,
  )
  axes.set_xlabel("key \N{RIGHTWARDS ARROW}", size=15, color=_FAINT, labelpad=3)
  if parts == _COLUMNS[0][1]:
    axes.set_ylabel("\N{LEFTWARDS ARROW} query", size=15, color=_FAINT, labelpad=3)


def _draw_blocks(figure, parts, *, left, width) -> None:
  past = patterns.Dense().mask(_LENGTH)
  for n, (x, part) in enumerate(zip(_places(len(parts), left, width), parts, strict=True)):
    axes = _axes(figure, x, 0.172, 0.131)
    queries, keys = kernel_order(part, _LENGTH)
    visited = visited_blocks(part.mask(_LENGTH)[queries][:, keys], _BLOCK)
    in_order = np.array_equal(keys, np.arange(_LENGTH))
    shown = visited_blocks(past, _BLOCK) & in_order  # elsewhere the past is no triangle
    _show(axes, colours([visited] if n == 0 else [visited & False, visited], shown), grid=1)
    order = {patterns.Column: "by column", patterns.Summary: "keys gathered"}
    text = f"{int(visited.sum())} blocks\n{order.get(type(part), 'in order')}"
    axes.set_xlabel(text, size=15, color=_INK, labelpad=5, linespacing=1.25)


def _places(count: int, left: float, width: float) -> tuple[float, ...]:
  """Left ends of one or two small panels over the width of a large one."""
  return (left + width / 2 - 0.131 / 2,) if count == 1 else (left, left + width - 0.131)


def _axes(figure, left: float, bottom: float, width: float):
  ratio = figure.get_figwidth() / figure.get_figheight()
  return figure.add_axes((left, bottom, width, width * ratio))


def _show(axes, picture: UInt8[np.ndarray, "rows columns 3"], *, grid: int = 0) -> None:
  """The picture, a cell per entry, with white lines between the cells if `grid` is their width."""
  rows, columns, _ = picture.shape
  axes.imshow(picture, interpolation="nearest" if grid else "auto", aspect="auto")
  axes.set_xticks([])
  axes.set_yticks([])
  if grid:
    for n in range(1, columns):
      axes.axvline(n - 0.5, color="white", linewidth=grid)
    for n in range(1, rows):
      axes.axhline(n - 0.5, color="white", linewidth=grid)
  for spine in axes.spines.values():
    spine.set_color("#b8b8c4")


def draw_layers(
  layers: Sequence[tuple[str, patterns.Pattern]], *, T: int, num_heads: int | Sequence[int]
) -> matplotlib.figure.Figure:
  """The masks of the first T queries and keys, one panel per layer and set of like heads.

  Args:
    layers: name and pattern of each layer of the cycle.
    T: tokens.
    num_heads: H, of all or of each.
  """
  panels, sizes = {}, {}
  counts = [num_heads] * len(layers) if isinstance(num_heads, int) else num_heads
  for (name, pattern), count in zip(layers, counts, strict=True):
    sizes[name] = count
    for h in range(count):
      panels.setdefault((name, pattern.of_head(h)), []).append(h)
  columns = min(4, len(panels))
  rows = -(-len(panels) // columns)
  figure = matplotlib.figure.Figure(figsize=(3.2 * columns, 3.6 * rows), layout="constrained")
  past = patterns.Dense().mask(T)
  for n, ((name, pattern), heads) in enumerate(panels.items()):
    axes = figure.add_subplot(rows, columns, n + 1)
    _show(axes, colours([pattern.mask(T)], past))
    some = len(heads) < sizes[name]
    axes.set_title(f"{name}, heads {', '.join(map(str, heads))}" if some else name, size=12)
    axes.set_xlabel(f"key 0 ... {T - 1}", color=_FAINT)
    axes.set_ylabel("\N{LEFTWARDS ARROW} query", color=_FAINT)
  return figure


def tile_colours(mask: Bool[np.ndarray, "T T"], tile: int) -> UInt8[np.ndarray, "T T 3"]:
  """A mask's pairs, FIRST in tiles that are full and SECOND in others, where the rest is MASKED.

  Tiles without pairs are SKIPPED, but for the later keys of a causal mask, which are FUTURE.
  """
  whole = lambda tiles: np.kron(tiles, np.ones((tile, tile), bool))
  picture = colours([mask & False, mask], _past(mask))
  picture[whole(visited_blocks(mask, tile)) & ~mask] = MASKED
  picture[whole(~visited_blocks(~mask, tile))] = FIRST
  return picture


def draw_tiles(
  panels: Sequence[tuple[str, Bool[np.ndarray, "T T"]]], *, tile: int
) -> matplotlib.figure.Figure:
  """Masks side by side, each with its name and the share of tiles that hold pairs.

  Args:
    panels: name and mask of each.
    tile: tokens of a tile, which divides T.
  """
  columns, gap, above, below, dpi = min(5, len(panels)), 30, 60, 60, 100
  rows, side = -(-len(panels) // columns), 2 * len(panels[0][1])  # two pixels per pair: all alike
  width, height = columns * (side + gap) + gap, rows * (side + above + below) + below
  figure = matplotlib.figure.Figure((width / dpi, height / dpi), dpi=dpi, facecolor="white")
  for n, (name, mask) in enumerate(panels):
    row, column = divmod(n, columns)
    left, top = gap + column * (side + gap), above + row * (side + above + below)
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    _show(axes, tile_colours(mask, tile), grid=0)
    axes.set_title("\n".join(textwrap.wrap(name, 26)), size=13, color=_INK, pad=5)
    past = _past(mask)
    share = visited_blocks(mask, tile).sum() / visited_blocks(past, tile).sum()
    which = "all" if past.all() else "causal"
    axes.set_xlabel(f"{share:.0%} of {which} tiles", size=13, color=_FAINT, labelpad=5)
  for n, (colour, text) in enumerate(
    (
      (FIRST, "pairs of full tiles"),
      (SECOND, "pairs of partial tiles"),
      (MASKED, "masked in these"),
      (SKIPPED, "tiles skipped"),
    )
  ):
    _draw_key(figure, 0.14 + 0.19 * n, 20 / height, 20 / width, colour, text, size=13)
  return figure


def _past(mask: Bool[np.ndarray, "T T"]) -> Bool[np.ndarray, "T T"]:
  """What the queries of a mask may attend to at all: if it has no later keys, those so far."""
  causal = not np.triu(mask, 1).any()
  return np.tri(len(mask), dtype=bool) if causal else np.ones_like(mask)


def _draw_key(figure, x: float, y: float, width: float, colour, text: str, *, size: int) -> None:
  """A square of a colour, and what it means."""
  height = width * figure.get_figwidth() / figure.get_figheight()
  square = matplotlib.patches.Rectangle((x, y), width, height, color=np.divide(colour, 255))
  figure.add_artist(square)
  figure.text(x + 1.4 * width, y + height / 2, text, size=size, va="center", color=_INK)
