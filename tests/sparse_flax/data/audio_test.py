"""mu-law against hand-computed values, WAV files of all widths, resampling of real rates."""

import math
import wave

import numpy as np
import pytest

from sparse_flax import data
from sparse_flax.data import recordings
from sparse_flax.data import samples


@pytest.mark.parametrize(
  "sample, code",
  # code = floor((sign(x) ln(1 + 255 |x|) / ln 256 + 1) / 2 * 255 + 0.5)
  [
    (-1.0, 0),
    (-0.5, 16),
    (-0.001, 122),
    (0.0, 128),
    (0.001, 133),
    (0.5, 239),
    (1.0, 255),
    (3, 255),
  ],
)
def test_mu_law_codes(sample, code):
  assert data.mu_law_encode(np.array([sample], np.float32))[0] == code


def test_mu_law_decodes_to_the_middle_of_its_code():
  codes = np.arange(256, dtype=np.uint8)
  decoded = data.mu_law_decode(codes)
  np.testing.assert_array_equal(data.mu_law_encode(decoded), codes)
  np.testing.assert_allclose(decoded, -decoded[::-1], atol=1e-7)
  assert (decoded[0], decoded[255]) == (-1, 1)
  expected = (256 ** (2 * 200 / 255 - 1) - 1) / 255
  np.testing.assert_allclose(decoded[200], expected, rtol=1e-6)


def test_wav_files_come_back_exactly(tmp_path):
  pcm = np.random.default_rng(0).integers(-(2**15), 2**15, 1000)
  data.write_wav(tmp_path / "a.wav", (pcm / 2**15).astype(np.float32))
  back, rate = data.read_wav(tmp_path / "a.wav")
  assert rate == 12_000
  np.testing.assert_array_equal(back[:, 0] * 2**15, pcm)


def write_pcm(path, values, *, width, rate=12_000):
  """Integers [T, C] as a WAV file; of 8-bit ones 128 is silence, as in the format."""
  with wave.open(str(path), "wb") as wav:
    wav.setnchannels(values.shape[1])
    wav.setsampwidth(width)
    wav.setframerate(rate)
    raw = values.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width]
    wav.writeframes(raw.tobytes())


@pytest.mark.parametrize("width", [1, 2, 3, 4], ids=lambda w: f"{8 * w}bits")
def test_all_widths_are_read(tmp_path, width):
  top = 2 ** (8 * width - 1)
  values = np.array([[0, -top], [top // 2, -top // 4]])
  write_pcm(tmp_path / "a.wav", values + (128 if width == 1 else 0), width=width)
  back, _ = data.read_wav(tmp_path / "a.wav")
  np.testing.assert_array_equal(back, [[0, -1], [0.5, -0.25]])


def test_overshooting_sound_is_clipped_not_wrapped(tmp_path):
  data.write_wav(tmp_path / "a.wav", np.array([1.5, -1.5, 1.0]))
  back, _ = data.read_wav(tmp_path / "a.wav")
  np.testing.assert_allclose(back[:, 0], [1, -1, 1], atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_recordings_become_mono_at_12_khz(tmp_path, rate):
  seconds = 0.5
  tone = lambda rate: 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
  stereo = np.stack([tone(rate) * 1.5, tone(rate) * 0.5], axis=1) * 2**15
  write_pcm(tmp_path / "a.wav", np.round(stereo), width=2, rate=rate)
  codes = recordings.load_codes(tmp_path / "a.wav")
  assert len(codes) == math.ceil(seconds * 12_000)
  middle = slice(100, -100)  # the filter rings at the ends
  np.testing.assert_allclose(data.mu_law_decode(codes)[middle], tone(12_000)[middle], atol=0.02)


def test_a_recording_at_12_khz_is_only_encoded():
  codes = recordings.load_codes(samples.FOLDER / "violin_30s.wav")
  np.testing.assert_array_equal(codes, samples.violin_codes())


def test_a_text_file_is_no_wav(tmp_path):
  (tmp_path / "a.wav").write_text("This is not sound, whatever its name says.")
  with pytest.raises(ValueError, match=r"a\.wav is not a WAV file"):
    data.read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("cut", [1, 700_000, 720_020], ids=["a byte", "most", "in the header"])
def test_a_truncated_wav_is_named(tmp_path, cut):
  whole = (samples.FOLDER / "violin_30s.wav").read_bytes()
  (tmp_path / "a.wav").write_bytes(whole[:-cut])
  with pytest.raises(ValueError, match=r"a\.wav is (cut off|not a WAV file)"):
    data.read_wav(tmp_path / "a.wav")


def test_silence_of_no_length_is_refused(tmp_path):
  write_pcm(tmp_path / "a.wav", np.zeros((0, 1)), width=2)
  with pytest.raises(ValueError, match="holds no sound"):
    recordings.load_codes(tmp_path / "a.wav")
