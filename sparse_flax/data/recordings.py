"""Reads recordings of any rate and channel count as mono mu-law codes at 12 kHz."""

import math

import numpy as np
from etils import epath
from jaxtyping import UInt8

from sparse_flax.data import audio
from sparse_flax.data import compressed
from sparse_flax.data import flac

_READERS = {".wav": audio.read_wav, ".flac": flac.read}


def load_codes(path: epath.PathLike) -> UInt8[np.ndarray, "T"]:
  """The mu-law codes of a WAV, FLAC, MP3 or Ogg file: channels averaged, resampled to 12 kHz.

  Raises:
    ValueError: if the file is not what its name and its header say, is cut off or holds no sound.
  """
  path = epath.Path(path)
  samples, rate = _READERS.get(path.suffix.lower(), compressed.read)(path)
  if not len(samples):
    raise ValueError(f"{path} holds no sound")
  mono = samples.mean(axis=1)
  if rate != audio.SAMPLE_RATE:
    from scipy import signal  # which takes as long to import as JAX

    common = math.gcd(rate, audio.SAMPLE_RATE)
    mono = signal.resample_poly(mono, audio.SAMPLE_RATE // common, rate // common)
  return audio.mu_law_encode(mono)
