"""Sound as bytes: 8-bit mu-law codes and WAV files, with numpy and the standard library."""

import dataclasses
import io
import struct
import wave
from typing import IO

import numpy as np
from etils import epath
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import UInt8

SAMPLE_RATE = 12_000  # Hz, of all audio here (arXiv:1904.10509, section 7.4)
_SLOWEST, _FASTEST = 1_000, 768_000  # Hz, of recordings
_MU = 255.0

# The numbers in a WAV file, by format tag and bits: integers, rounded up to bytes, and floats.
_DTYPES = {
  (1, 8): np.dtype("u1"),
  (1, 16): np.dtype("<i2"),
  (1, 24): np.dtype("V3"),
  (1, 32): np.dtype("<i4"),
  (3, 32): np.dtype("<f4"),
  (3, 64): np.dtype("<f8"),
}
_EXTENSIBLE = 0xFFFE  # the tag of headers that have the true one before these 14 bytes:
_GUID_TAIL = bytes.fromhex("00000000 1000 8000 00aa00389b71")
# Sizes that programs write who do not know theirs yet, and into a pipe cannot go back to correct
# them: the largest there is, or the largest with a sign, less a header or rounded down.
_OPEN_SIZES = (range(0xFFFF_FF00, 0x1_0000_0000), range(0x7FFF_F000, 0x8000_0001))
_MOST_BEYOND = 1_024  # bytes of tags or padding behind the last chunk of a WAV file
_LOUDEST = 16.0  # of floats, which may be some way above full scale


def mu_law_encode(samples: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
  """8-bit mu-law codes of sound pressure.

    y = sign(x) ln(1 + 255 |x|) / ln 256,    code = floor((y + 1) / 2 * 255 + 0.5)

  Args:
    samples: any shape, in [-1, 1]; what lies outside is clipped (resampling overshoots a little).

  Returns:
    Codes of the same shape; silence is 128.
  """
  x = np.clip(samples.astype(np.float64), -1.0, 1.0)
  y = np.sign(x) * np.log1p(_MU * np.abs(x)) / np.log1p(_MU)
  return np.floor((y + 1.0) / 2.0 * _MU + 0.5).astype(np.uint8)


def mu_law_decode(codes: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
  """Sound pressure in [-1, 1] of 8-bit mu-law codes, the inverse of `mu_law_encode`.

    y = 2 code / 255 - 1,    x = sign(y) (256^|y| - 1) / 255

  Encoding the result gives the same codes again.
  """
  y = 2.0 * codes.astype(np.float64) / _MU - 1.0
  return (np.sign(y) * np.expm1(np.abs(y) * np.log1p(_MU)) / _MU).astype(np.float32)


def write_wav(
  path: epath.PathLike, samples: Float[np.ndarray, "T"], *, rate: int = SAMPLE_RATE
) -> None:
  """Writes mono sound in [-1, 1] (beyond is clipped) as a WAV file of 16 bits at `rate` Hz."""
  epath.Path(path).write_bytes(wav_of(samples, rate=rate))


def wav_of(samples: Float[np.ndarray, "T"], *, rate: int = SAMPLE_RATE) -> bytes:
  """The bytes of the file that `write_wav` writes."""
  pcm = np.clip(np.round(samples.astype(np.float64) * 32_768), -32_768, 32_767).astype("<i2")
  file = io.BytesIO()
  with wave.open(file, "wb") as wav:
    wav.setnchannels(1)
    wav.setsampwidth(2)
    wav.setframerate(rate)
    wav.writeframes(pcm.tobytes())
  return file.getvalue()


def read_wav(path: epath.PathLike) -> tuple[Float32[np.ndarray, "T C"], int]:
  """Reads a WAV file of integers of up to 32 bits, or of 32 or 64-bit floats.

  Integers of other sizes than whole bytes are the upper bits of the bytes they lie in. Sizes that
  were left open, as by programs that write into a pipe, mean all there is.

  Returns:
    (samples, rate): T samples of C channels, and the rate in Hz. Integers are in [-1, 1); floats
    come as they are.

  Raises:
    ValueError: if the file is no such WAV file, is shorter or longer than its header says, or has
      an impossible rate or floats that are no sound.
  """
  return _open_wav(path, _read_samples)


def check_wav(path: epath.PathLike) -> None:
  """Raises ValueError if the header and the size of a file tell that `read_wav` would."""
  _open_wav(path, lambda file, header: None)


def check_rate(rate: int) -> None:
  """Raises ValueError if no recording has so many samples a second."""
  if not _SLOWEST <= rate <= _FASTEST:
    raise ValueError(
      f"says {rate:,} Hz in its header, but must be a recording at {_SLOWEST:,} to {_FASTEST:,} Hz"
    )


@dataclasses.dataclass(frozen=True)
class _WavHeader:
  dtype: np.dtype  # of the numbers; V3 for 24 bits, which numpy has no type for
  channels: int
  rate: int
  size: int  # bytes of sound


def _open_wav(path, read):
  path = epath.Path(path)
  try:
    with path.open("rb") as file:
      return read(file, _read_header(file, path.stat().length))
  except ValueError as error:
    raise ValueError(f"{path} {error}") from error


def _read_header(file: IO[bytes], length: int) -> _WavHeader:
  """Reads up to the first byte of sound of a file of `length` bytes."""
  riff, riff_size, kind = _unpack(file, "<4sI4s")
  if (riff, kind) != (b"RIFF", b"WAVE"):
    raise ValueError("is not a WAV file: it does not begin with RIFF and WAVE")
  fields = None
  chunk, size = _unpack(file, "<4sI")
  while chunk != b"data":
    start = file.tell()
    if chunk == b"fmt ":
      fields = _read_format(file, size)
    file.seek(start + size + size % 2)
    chunk, size = _unpack(file, "<4sI")
  if fields is None:
    raise ValueError("is not a WAV file: it has no format before its sound")
  start = file.tell()
  is_open = lambda size: any(size in sizes for sizes in _OPEN_SIZES)
  end, available = riff_size + 8, length - start
  if size == 0:  # none at all, unless the size of the whole was left open as well
    open_ended = is_open(riff_size) or end <= start
  else:
    open_ended = is_open(size) and size > available
  if open_ended:
    size = available
  if available < size:
    raise ValueError(
      f"is cut off: its header promises {size:,} bytes of sound, {available:,} are there"
    )
  # Programs that add tags do not always correct the size of the whole.
  beyond = length - max(_end_of_chunks(file, start + size + size % 2, length), end)
  if beyond > _MOST_BEYOND:
    raise ValueError(f"goes on for {beyond:,} bytes behind the end that its header tells")
  file.seek(start)
  dtype, channels, rate = fields
  return _WavHeader(dtype, channels, rate, size - size % (channels * dtype.itemsize))


def _end_of_chunks(file: IO[bytes], position: int, length: int) -> int:
  """The end of the whole chunks that follow each other from `position` on."""
  while position + 8 <= length:
    file.seek(position)
    name, size = _unpack(file, "<4sI")
    if not (name.isascii() and name.decode().isprintable()) or position + 8 + size > length:
      break
    position += 8 + size + size % 2
  return position


def _read_format(file: IO[bytes], size: int) -> tuple[np.dtype, int, int]:
  """(dtype, channels, rate) of a chunk "fmt " of `size` bytes."""
  tag, channels, rate, _, frame_bytes, bits = _unpack(file, "<HHIIHH")
  if tag == _EXTENSIBLE and size >= 40:
    _, _, _, tag, tail = _unpack(file, "<HHIH14s")
    tag = tag if tail == _GUID_TAIL else _EXTENSIBLE
  dtype = _DTYPES.get((tag, -(-bits // 8) * 8 if tag == 1 else bits))
  if dtype is None or not channels or frame_bytes != channels * dtype.itemsize:
    raise ValueError(
      "is not a WAV file of integers of up to 32 bits or floats of 32 or 64 bits: its header "
      f"says format {tag}, {bits} bits, {channels} channels, {frame_bytes} bytes for all"
    )
  check_rate(rate)
  return dtype, channels, rate


def _unpack(file, layout):
  content = file.read(struct.calcsize(layout))
  if len(content) < struct.calcsize(layout):
    raise ValueError("is not a WAV file, or cut off: it ends before its sound begins")
  return struct.unpack(layout, content)


def _read_samples(file: IO[bytes], header: _WavHeader):
  data, dtype = file.read(header.size), header.dtype
  if dtype.kind == "f":
    values = np.frombuffer(data, dtype)
    loudest = np.abs(values).max(initial=0.0)
    if not loudest <= _LOUDEST:  # NaN is the largest of all
      raise ValueError(
        f"holds {loudest:g}: floats must be finite, and sound between -1 and 1 (at most {_LOUDEST})"
      )
  elif dtype.kind == "V":  # put each value into the top of 32 bits
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
  elif dtype.kind == "u":
    values = np.frombuffer(data, dtype).astype(np.float32) / 128 - 1
  else:
    values = np.frombuffer(data, dtype).astype(np.float32) / 2.0 ** (8 * dtype.itemsize - 1)
  return values.astype(np.float32).reshape(-1, header.channels), header.rate
