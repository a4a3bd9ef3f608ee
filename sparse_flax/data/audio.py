"""Sound as bytes: 8-bit mu-law codes and WAV files, with numpy and the standard library."""

import wave

import numpy as np
from etils import epath
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import UInt8

SAMPLE_RATE = 12_000  # Hz, of all audio here (arXiv:1904.10509, section 7.4)
_MU = 255.0


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
  pcm = np.clip(np.round(samples.astype(np.float64) * 32_768), -32_768, 32_767).astype("<i2")
  with epath.Path(path).open("wb") as file, wave.open(file, "wb") as wav:
    wav.setnchannels(1)
    wav.setsampwidth(2)
    wav.setframerate(rate)
    wav.writeframes(pcm.tobytes())


def read_wav(path: epath.PathLike) -> tuple[Float32[np.ndarray, "T C"], int]:
  """Reads a WAV file of 8, 16, 24 or 32-bit integers.

  Returns:
    (samples, rate): T samples of C channels in [-1, 1), and the rate in Hz.

  Raises:
    ValueError: if the file is no such WAV file, or shorter than its header says.
  """
  return _open_wav(path, _read_samples)


def check_wav(path: epath.PathLike) -> None:
  """Raises ValueError if `read_wav` would, having read only the header and seen the size."""
  _open_wav(path, lambda wav: None)


def _open_wav(path, read):
  path = epath.Path(path)
  try:
    with path.open("rb") as file, wave.open(file) as wav:
      size = wav.getnframes() * wav.getnchannels() * wav.getsampwidth()
      available = path.stat().length - file.tell()
      if available < size:
        raise ValueError(
          f"{path} is cut off: its header promises {size:,} bytes of sound, {available:,} are there"
        )
      return read(wav)
  except (wave.Error, EOFError) as error:
    raise ValueError(
      f"{path} is not a WAV file of 8 to 32-bit integers ({error or 'it ends too early'})"
    ) from error


def _read_samples(wav: wave.Wave_read):
  channels, width, rate, length = wav.getparams()[:4]
  data = wav.readframes(length)
  if width == 1:  # the only unsigned one
    values = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
  elif width == 3:  # numpy has no 24-bit type: put each value into the top of 32 bits
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
  else:
    values = np.frombuffer(data, f"<i{width}").astype(np.float32) / 2.0 ** (8 * width - 1)
  return values.astype(np.float32).reshape(-1, channels), rate
