"""Folders of one's own: pictures of any size become squares of one, texts one string of bytes."""

import hashlib
import io
import json
import math
import pathlib
from collections.abc import Iterable
from collections.abc import Iterator

import numpy as np
import PIL.Image
import PIL.ImageOps
from etils import epath
from jaxtyping import UInt8

PICTURES = (".jpeg", ".jpg", ".png", ".webp")
TEXTS = (".jsonl", ".md", ".txt")
_FORMATS = ("JPEG", "PNG", "WEBP")
_BACKGROUND = "white"  # of what is transparent


def names(folder: epath.Path, suffixes: Iterable[str]) -> list[str]:
  """Relative names of all files below a folder with one of the suffixes, in order."""
  files = (file for file in walk(folder) if file.suffix.lower() in suffixes)
  return sorted(file.relative_to(folder).as_posix() for file in files)


def walk(folder: epath.Path) -> Iterator[pathlib.PurePath]:
  """All files below a folder."""
  for path in folder.iterdir():  # epath has no recursive glob
    if path.is_dir():
      yield from walk(path)
    else:
      yield path


def picture_names(folder: epath.Path) -> list[str]:
  """Relative names of all pictures below a folder, in order.

  Raises:
    ValueError: there are fewer than three, one for each split.
  """
  found = names(folder, PICTURES)
  if len(found) < 3:
    raise ValueError(
      f"holds {len(found)} pictures ({', '.join(PICTURES)}), but train, validation and test need "
      "one each"
    )
  return found


def digest(names: list[str]) -> str:
  """Of the names of the files that a set was prepared from."""
  return hashlib.sha256("\n".join(names).encode()).hexdigest()


def side_of(num_bytes: int) -> int | None:
  """The side of a square of so many bytes, three a pixel; None if there is none."""
  side = math.isqrt(num_bytes // 3)
  return side if side and 3 * side * side == num_bytes else None


def square(content: bytes, side: int) -> UInt8[np.ndarray, "side side 3"]:
  """The middle of an encoded picture, scaled: as it is seen, what is transparent on white.

  Raises:
    ValueError: it is no picture, or damaged.
  """
  try:
    with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
      image.draft("RGB", (2 * side, 2 * side))  # JPEG: decoded no larger than is needed
      upright = PIL.ImageOps.exif_transpose(image)
      if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        behind = PIL.Image.new("RGBA", upright.size, _BACKGROUND)
        upright = PIL.Image.alpha_composite(behind, upright)
      return np.asarray(PIL.ImageOps.fit(upright.convert("RGB"), (side, side)))
  except PIL.UnidentifiedImageError as error:
    raise ValueError(f"is none of {', '.join(_FORMATS)}") from error
  except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
    raise ValueError(f"cannot be decoded ({error})") from error


def text_names(folder: epath.Path) -> list[str]:
  """Relative names of all texts below a folder, in order.

  Raises:
    ValueError: there are none.
  """
  if found := names(folder, TEXTS):
    return found
  raise ValueError(f"holds no text ({', '.join(TEXTS)})")


def text_bytes(folder: epath.Path, field: str) -> bytes:
  """All texts of a folder, one after the other, a newline behind each; UTF-8 or not.

  Args:
    folder: of the files.
    field: of the objects in .jsonl files that holds the text.

  Raises:
    ValueError: naming the file and the line that has no such text.
  """
  parts = []
  for name in text_names(folder):
    content = (folder / name).read_bytes()
    is_lines = name.lower().endswith(".jsonl")
    parts += _field_of_lines(name, content, field) if is_lines else [content]
  return b"".join(part if part.endswith(b"\n") else part + b"\n" for part in parts)


def _field_of_lines(name: str, content: bytes, field: str) -> Iterator[bytes]:
  for number, line in enumerate(content.splitlines(), start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError as error:
      raise ValueError(f"{name}, line {number}, is not JSON ({error})") from error
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
      have = f"; it has {', '.join(map(repr, value))}" if isinstance(value, dict) else ""
      raise ValueError(f"{name}, line {number}, has no text in data.field={field!r}{have}")
    yield text.encode("utf-8", "surrogatepass")
