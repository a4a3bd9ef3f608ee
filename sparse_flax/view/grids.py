"""Grids of small images as one PNG file."""

import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from etils import epath
from jaxtyping import UInt8

Pixels = UInt8[np.ndarray, "rows columns channels"]

GREY = 128  # of pixels not given
_BACKGROUND, _INK = 250, 40
_GAP = 4  # pixels between images
_CELL = 96  # pixels; smaller images are enlarged by a whole factor up to about this
_CAPTION = 20  # pixels, height of the line above the columns


def draw_grid(
  rows: Sequence[Sequence[Pixels | None]], *, captions: Sequence[str] = ()
) -> PIL.Image.Image:
  """Images side by side on a light background, each pixel as a square of whole pixels.

  Args:
    rows: images of one shape; 1 (grey) or 3 channels. None leaves a place empty.
    captions: a word above each column, for none by default.
  """
  height, width, _ = next(image.shape for row in rows for image in row if image is not None)
  scale = max(1, _CELL // max(height, width))
  stride_y, stride_x = scale * height + _GAP, scale * width + _GAP
  top = _CAPTION if captions else 0
  columns = max(len(row) for row in rows)
  canvas = PIL.Image.new(
    "RGB", (columns * stride_x + _GAP, top + len(rows) * stride_y + _GAP), (_BACKGROUND,) * 3
  )
  for y, row in enumerate(rows):
    for x, image in enumerate(row):
      if image is not None:
        large = image.repeat(scale, axis=0).repeat(scale, axis=1)
        large = np.broadcast_to(large, (*large.shape[:2], 3))
        place = (_GAP + x * stride_x, _GAP + top + y * stride_y)
        canvas.paste(PIL.Image.fromarray(np.ascontiguousarray(large)), place)
  draw, font = PIL.ImageDraw.Draw(canvas), PIL.ImageFont.load_default(size=13)
  for x, caption in enumerate(captions):
    middle = _GAP + x * stride_x + scale * width / 2
    draw.text((middle, _GAP / 2 + _CAPTION / 2), caption, fill=(_INK,) * 3, font=font, anchor="mm")
  return canvas


def save_grid(
  path: str | os.PathLike,
  rows: Sequence[Sequence[Pixels | None]],
  *,
  captions: Sequence[str] = (),
) -> None:
  """Writes `draw_grid(rows, captions=captions)` as a PNG file."""
  with epath.Path(path).open("wb") as file:
    draw_grid(rows, captions=captions).save(file, format="PNG")


def with_unknown(pixels: UInt8[np.ndarray, "*shape"], *, known: int) -> UInt8[np.ndarray, "*shape"]:
  """`pixels` with all but the first `known` bytes grey."""
  flat = pixels.reshape(-1).copy()
  flat[known:] = GREY
  return flat.reshape(pixels.shape)
