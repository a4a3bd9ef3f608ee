"""MP3 and Ogg files, read with soundfile."""

import types
from typing import BinaryIO
from typing import cast

import numpy as np
from etils import epath
from jaxtyping import Float32

from sparse_flax.data import audio


def import_soundfile(path: epath.PathLike) -> types.ModuleType:
  """soundfile, whose shared library only whoever has such files needs.

  Raises:
    ValueError: it cannot be imported; the message names the file.
  """
  try:
    import soundfile
  except (ImportError, OSError) as error:
    raise ValueError(
      f"{path} needs soundfile, which cannot be imported ({error}): pip install 'sparse-flax[data]'"
    ) from error
  return soundfile


def read(path: epath.PathLike) -> tuple[Float32[np.ndarray, "T C"], int]:
  """As `audio.read_wav`, for an MP3 or an Ogg file.

  Raises:
    ValueError: the file is none, or damaged, or has an impossible rate.
  """
  return _open(path, lambda sound: sound.read(dtype="float32", always_2d=True))


def check(path: epath.PathLike) -> None:
  """Raises ValueError if `read` would, as far as the beginning tells."""
  _open(path, lambda sound: None)


def _open(path, read):
  path = epath.Path(path)
  soundfile = import_soundfile(path)
  try:
    with path.open("rb") as file, soundfile.SoundFile(cast(BinaryIO, file)) as sound:
      audio.check_rate(sound.samplerate)
      return read(sound), sound.samplerate
  except soundfile.LibsndfileError as error:
    raise ValueError(f"{path} is no such file, or damaged ({error.error_string})") from error
  except ValueError as error:
    raise ValueError(f"{path} {error}") from error
