"""Reads recordings of any rate and channel count as mono mu-law codes at 12 kHz."""

import math

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sparse_flax.data import audio
from sparse_flax.data import flac


def load_codes(path: epath.PathLike) -> UInt8[np.ndarray, "T"]:
  """The mu-law codes of a WAV or FLAC file: channels averaged, resampled to 12 kHz.

  Raises:
    ValueError: if the file is not what its name and its header say, is cut off or holds no sound,
      or if FLAC cannot be read because soundfile is not installed.
  """
  path = epath.Path(path)
  read = flac.read if path.suffix.lower() == ".flac" else audio.read_wav
  samples, rate = read(path)
  if not len(samples):
    raise ValueError(f"{path} holds no sound")
  mono = samples.mean(axis=1)
  if rate != audio.SAMPLE_RATE:
    from scipy import signal  # which takes as long to import as JAX

    common = math.gcd(rate, audio.SAMPLE_RATE)
    mono = signal.resample_poly(mono, audio.SAMPLE_RATE // common, rate // common)
  return audio.mu_law_encode(mono)
