"""The small real samples that ship with the package; samples/PROVENANCE.txt has their origins."""

import gzip

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from sparse_flax.data import audio

_FORMATS = ("WEBP", "PNG")
FOLDER = epath.Path(__file__).parent / "samples"


def cifar10_images() -> UInt8[np.ndarray, "N 32 32 3"]:
  """The first 1,100 images of CIFAR-10's data_batch_1.bin, in order."""
  return images_of_grid(FOLDER / "cifar10_1100.webp", (32, 32))


def images_of_grid(
  path: epath.PathLike, size: tuple[int, int]
) -> UInt8[np.ndarray, "N rows columns 3"]:
  """The images of a WebP or PNG file that has them side by side, row by row, without gaps.

  Args:
    path: of the file.
    size: rows and columns of each.

  Raises:
    ValueError: it is no such file.
  """
  rows, columns = size
  try:
    with epath.Path(path).open("rb") as file, PIL.Image.open(file, formats=_FORMATS) as image:
      grid = np.asarray(image.convert("RGB"))
  except (OSError, SyntaxError) as error:  # how Pillow reports what it cannot read
    raise ValueError(f"{path}: is not a picture that can be read ({error})") from error
  down, across = grid.shape[0] // rows, grid.shape[1] // columns
  if grid.shape[:2] != (down * rows, across * columns):
    raise ValueError(
      f"{path}: is {grid.shape[1]} x {grid.shape[0]} pixels; must be a grid of images of "
      f"{columns} x {rows}"
    )
  return grid.reshape(down, rows, across, columns, 3).swapaxes(1, 2).reshape(-1, rows, columns, 3)


def enwik8_bytes() -> UInt8[np.ndarray, "T"]:
  """The first 1,000,000 bytes of enwik8."""
  return np.frombuffer(gzip.decompress((FOLDER / "enwik8_1000000.gz").read_bytes()), np.uint8)


def violin_codes() -> UInt8[np.ndarray, "T"]:
  """30 seconds of a solo violin as mu-law codes at 12 kHz."""
  samples, _ = audio.read_wav(FOLDER / "violin_30s.wav")
  return audio.mu_law_encode(samples[:, 0])
