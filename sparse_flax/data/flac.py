"""FLAC files, read with soundfile."""

import hashlib
from typing import BinaryIO
from typing import cast

import numpy as np
from etils import epath
from jaxtyping import Float32

from sparse_flax.data import audio
from sparse_flax.data import compressed

_BLOCK = 2**20  # samples at a time: a header may promise more than there is memory for


def read(path: epath.PathLike) -> tuple[Float32[np.ndarray, "T C"], int]:
  """As `audio.read_wav`, for a FLAC file. Its own checksum of the sound, if it has one, must hold.

  Raises:
    ValueError: if the file is no FLAC file, cut off, damaged, or not what its header says, or
      soundfile cannot be imported.
  """
  path = epath.Path(path)
  check(path)
  soundfile = compressed.import_soundfile(path)

  blocks, checksum = [], hashlib.md5(usedforsecurity=False)
  try:
    with path.open("rb") as file:
      rate, bits, length, stored = _read_header(file)
      file.seek(0)
      with soundfile.SoundFile(cast(BinaryIO, file)) as sound:
        for block in sound.blocks(_BLOCK, dtype="int32", always_2d=True):
          blocks.append(block.astype(np.float32) / 2**31)
          # As they were before they were compressed.
          values = (np.asarray(block, np.int32) >> (32 - bits)).astype("<i4")
          values = values[..., None].view(np.uint8)[..., : -(-bits // 8)]
          checksum.update(values.tobytes())
  except soundfile.LibsndfileError as error:
    raise ValueError(f"{path} is damaged or cut off ({error.error_string})") from error
  decoded = sum(map(len, blocks))
  if decoded != length:
    raise ValueError(f"{path} has {decoded:,} samples, its header promises {length:,}")
  if any(stored) and checksum.digest() != stored:
    raise ValueError(f"{path} is damaged: its sound does not have its checksum")
  return np.concatenate(blocks), rate


def check(path: epath.PathLike) -> None:
  """Raises ValueError if `read` would, as far as the header tells."""
  path = epath.Path(path)
  compressed.import_soundfile(path)
  try:
    with path.open("rb") as file:
      rate, _, length, _ = _read_header(file)
    audio.check_rate(rate)
    if not length:
      raise ValueError(
        "does not say its length in its header, so that it may not be whole: write it again, "
        "for example by ffmpeg -i OLD.flac NEW.flac"
      )
  except ValueError as error:
    raise ValueError(f"{path} {error}") from error


def _read_header(file) -> tuple[int, int, int, bytes]:
  """(samples a second, bits, samples, MD5 of the sound); 0 samples or bytes are not known."""
  content = file.read(42)
  # The first block, of type 0, has 34 bytes; after sizes of frames, 20 bits are the rate, 3 the
  # channels, 5 the bits and 36 the length.
  if len(content) < 42 or content[:4] != b"fLaC" or content[4] & 127:
    raise ValueError("is not a FLAC file")
  fields = int.from_bytes(content[18:26])
  return fields >> 44, (fields >> 36 & 31) + 1, fields & (2**36 - 1), content[26:]
