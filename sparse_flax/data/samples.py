"""The small real samples that ship with the package; samples/PROVENANCE.txt has their origins."""

import gzip

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from sparse_flax.data import audio

FOLDER = epath.Path(__file__).parent / "samples"
_GRID = (44, 25)  # images down and across


def cifar10_images() -> UInt8[np.ndarray, "N 32 32 3"]:
  """The first 1,100 images of CIFAR-10's data_batch_1.bin, in order."""
  with (FOLDER / "cifar10_1100.webp").open("rb") as file, PIL.Image.open(file) as image:
    grid = np.asarray(image.convert("RGB"))
  down, across = _GRID
  return grid.reshape(down, 32, across, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def enwik8_bytes() -> UInt8[np.ndarray, "T"]:
  """The first 1,000,000 bytes of enwik8."""
  return np.frombuffer(gzip.decompress((FOLDER / "enwik8_1000000.gz").read_bytes()), np.uint8)


def violin_codes() -> UInt8[np.ndarray, "T"]:
  """30 seconds of a solo violin as mu-law codes at 12 kHz."""
  samples, _ = audio.read_wav(FOLDER / "violin_30s.wav")
  return audio.mu_law_encode(samples[:, 0])
