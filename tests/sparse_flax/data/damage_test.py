"""Files whose headers or contents are not what they say: read whole, or refused by name."""

import io
import struct
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest
import soundfile
from etils import epath

from sparse_flax import data
from sparse_flax.data import audio
from sparse_flax.data import flac
from sparse_flax.data import raw
from sparse_flax.data import recordings
from tests.helpers import data_files as files

TONE = 0.5 * np.sin(np.arange(2_400) / 5)
PCM = np.round(TONE * 2**15).astype("<i2").tobytes()
GUID = b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"


# ------------------------------------------------------------------------------------------- tar
@pytest.fixture(scope="module")
def archive(tmp_path_factory):
  """(content, members) of a sound train_64x64.tar of 40 images."""
  folder = tmp_path_factory.mktemp("tar")
  files.write_imagenet64(folder, validation=False)
  with tarfile.open(folder / "train_64x64.tar") as tar:
    return (folder / "train_64x64.tar").read_bytes(), tar.getmembers()


def read_tar(folder, content):
  file = epath.Path(folder) / "train_64x64.tar"
  file.write_bytes(content)
  return [png for _, png in raw.tar_images(file)]


def replaced(content, position, new):
  return content[:position] + new + content[position + len(new) :]


def test_a_sound_archive_is_read_to_its_end(tmp_path, archive):
  content, members = archive
  assert len(read_tar(tmp_path, content)) == len(members) == 40
  assert len(read_tar(tmp_path, content[: members[9].offset] + bytes(1_024))) == 9


TAR_DAMAGE = {
  "a bit of a header": lambda content, at: replaced(content, at.offset + 40, b"\xff"),
  "size of a file": lambda content, at: replaced(content, at.offset + 124, b"7"),
  "a header of zeros": lambda content, at: replaced(content, at.offset, bytes(512)),
  "a hole of zeros": lambda content, at: replaced(content, at.offset, bytes(3 * at.size)),
  "half a header": lambda content, at: content[: at.offset + 200] + bytes(1_024),
  "one archive behind another": lambda content, at: content + content,
}


@pytest.mark.parametrize("damage", TAR_DAMAGE)
def test_images_behind_a_damaged_place_are_not_lost_in_silence(tmp_path, archive, damage):
  content, members = archive
  with pytest.raises(ValueError, match=r"train_64x64\.tar is damaged at byte [\d,]+: "):
    read_tar(tmp_path, TAR_DAMAGE[damage](content, members[20]))


def test_an_archive_without_an_end_is_cut_off(tmp_path, archive):
  content, members = archive
  with pytest.raises(ValueError, match=r"train_64x64\.tar is cut off"):
    read_tar(tmp_path, content[: members[20].offset] + bytes(512))


def test_a_damaged_archive_leaves_nothing_half_prepared(tmp_path, archive):
  content, members = archive
  (tmp_path / "train_64x64.tar").write_bytes(replaced(content, members[20].offset, b"\xff"))
  with pytest.raises(ValueError, match=r"data\.path=.*train_64x64\.tar is damaged at byte"):
    files.open_split("downsampled_imagenet/64x64", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["train_64x64.tar"]


def test_any_flipped_bit_of_an_archive_is_named(tmp_path, archive):
  content, members = archive
  small = content[: members[3].offset]
  rng = np.random.default_rng(0)
  for position in rng.integers(0, len(small), 100).tolist():
    member = next(m for m in reversed(members[:3]) if m.offset <= position)
    damaged = replaced(small, position, bytes([small[position] ^ 1 << int(rng.integers(8))]))
    if position >= member.offset_data + member.size:
      continue  # between two files
    with pytest.raises(ValueError, match=r"train_64x64\.tar"):
      read_tar(tmp_path, damaged + bytes(1_024))


def test_an_image_of_16_bits_is_not_clipped(tmp_path):
  file = io.BytesIO()
  PIL.Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(file, "PNG")
  files.write_tar(tmp_path / "train_64x64.tar", {"a.png": file.getvalue()})
  (problem,) = files.check("downsampled_imagenet/64x64", tmp_path)
  assert "a.png in train_64x64.tar is a PNG of mode I;16" in problem


def test_a_damaged_zip_of_enwik8_is_named(tmp_path, monkeypatch):
  with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as file:
    file.writestr("enwik8", bytes(1_000))
  monkeypatch.setattr(raw, "ENWIK8_BYTES", 1_000)
  whole = (tmp_path / "enwik8.zip").read_bytes()
  (tmp_path / "enwik8.zip").write_bytes(replaced(whole, 500, b"\x01"))
  with pytest.raises(ValueError, match=r"data\.path=.*enwik8\.zip is damaged \(Bad CRC-32"):
    files.open_split("enwik8", tmp_path / "enwik8.zip")


# ------------------------------------------------------------------------------------------- WAV
def wav(
  content=PCM,
  *,
  tag=1,
  bits=16,
  channels=1,
  rate=12_000,
  fields=(),
  frame=None,
  riff=None,
  size=None,
):
  """The bytes of a WAV file; `fields` go behind the usual sixteen bytes of its format."""
  frame = channels * bits // 8 if frame is None else frame
  form = struct.pack("<HHIIHH", tag, channels, rate, frame * rate & 2**32 - 1, frame, bits)
  form += b"".join(fields)
  size = len(content) if size is None else size
  body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
  riff = len(body) + len(content) if riff is None else riff
  return b"RIFF" + struct.pack("<I", riff) + body + content


def read_wav(folder, content):
  (folder / "sound.wav").write_bytes(content)
  return audio.read_wav(folder / "sound.wav")


OPEN = 2**32 - 1
PIPES = {
  "ffmpeg": dict(riff=OPEN, size=OPEN),
  "sox": dict(riff=0x7FFFF024, size=0x7FFFF000),
  "less the header": dict(riff=OPEN, size=OPEN - 36),
  "as signed numbers": dict(riff=2**31 - 1, size=2**31 - 1),
  "zeros": dict(riff=0, size=0),
  "of no sound yet": dict(riff=36, size=0),
  "of the riff only": dict(riff=OPEN, size=2 * len(TONE)),
  "a size of 0": dict(riff=OPEN, size=0),
}


@pytest.mark.parametrize("program", PIPES)
def test_sizes_that_were_left_open_mean_all_there_is(tmp_path, program):
  samples, rate = read_wav(tmp_path, wav(**PIPES[program]))
  assert rate == 12_000
  np.testing.assert_array_equal(samples[:, 0] * 2**15, np.frombuffer(PCM, "<i2"))


def test_half_a_frame_at_the_end_of_a_pipe_is_left_out(tmp_path):
  samples, _ = read_wav(tmp_path, wav(PCM[:-2] + b"\1", channels=2, riff=OPEN, size=OPEN))
  assert samples.shape == (len(TONE) // 2 - 1, 2)


def test_a_file_of_no_sound_has_none_whatever_follows(tmp_path):
  chunk = b"LIST" + struct.pack("<I", 2_000) + bytes(2_000)
  content = wav(b"", riff=36 + len(chunk)) + chunk
  samples, _ = read_wav(tmp_path, content)
  assert samples.shape == (0, 1)
  with pytest.raises(ValueError, match=r"sound\.wav holds no sound"):
    recordings.load_codes(tmp_path / "sound.wav")


@pytest.mark.parametrize("bits", [4, 12, 20, 28])
def test_integers_are_the_upper_bits_of_their_bytes(tmp_path, bits):
  width = -(-bits // 8)
  values = np.array([0, 1, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))])
  stored = (values << 8 * width - bits) + (128 if width == 1 else 0)
  content = b"".join(int(x).to_bytes(width, "little", signed=width > 1) for x in stored)
  samples, _ = read_wav(tmp_path, wav(content, bits=bits, frame=width))
  np.testing.assert_array_equal(samples[:, 0], (values / 2 ** (bits - 1)).astype(np.float32))


def chunk(name, content):
  return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


TAGS = chunk(b"LIST", bytes(3_001)) + chunk(b"id3 ", bytes(2_000))


@pytest.mark.parametrize("content", [PCM, TONE.astype("<f4").tobytes()], ids=["16bits", "floats"])
def test_tags_may_follow_the_sound_though_the_header_does_not_count_them(tmp_path, content):
  form = dict(tag=1) if content is PCM else dict(tag=3, bits=32)
  alone, _ = read_wav(tmp_path, wav(content, **form))
  for tags in (TAGS, TAGS + bytes(1_024)):
    np.testing.assert_array_equal(read_wav(tmp_path, wav(content, **form) + tags)[0], alone)


@pytest.mark.parametrize(
  "tags", [TAGS[:-1], TAGS + bytes(1_025), b"\0" + TAGS], ids=["cut off", "zeros", "no chunks"]
)
def test_what_follows_the_sound_and_is_no_chunk_is_refused(tmp_path, tags):
  with pytest.raises(ValueError, match=r"sound\.wav goes on for [\d,]+ bytes behind the end"):
    read_wav(tmp_path, wav() + tags)


@pytest.mark.parametrize("extensible", [False, True], ids=["plain", "extensible"])
@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_read_as_they_are(tmp_path, bits, extensible):
  content = np.stack([TONE, -1.5 * TONE], axis=1).astype(f"<f{bits // 8}").tobytes()
  form = dict(tag=3)
  if extensible:
    form = dict(tag=0xFFFE, fields=[struct.pack("<HHIH", 22, bits, 0, 3), GUID])
  samples, _ = read_wav(tmp_path, wav(content, bits=bits, channels=2, **form))
  assert samples.dtype == np.float32
  np.testing.assert_allclose(samples, np.stack([TONE, -1.5 * TONE], axis=1), rtol=1e-6)
  codes = recordings.load_codes(tmp_path / "sound.wav")
  np.testing.assert_array_equal(codes, data.mu_law_encode(samples.mean(axis=1)))


def test_integers_in_an_extensible_file_are_read(tmp_path):
  fields = [struct.pack("<HHIH", 22, 16, 0, 1), GUID]
  samples, _ = read_wav(tmp_path, wav(tag=0xFFFE, fields=fields))
  np.testing.assert_array_equal(samples[:, 0] * 2**15, np.frombuffer(PCM, "<i2"))


LOUD = {"NaN": np.nan, "infinity": -np.inf, "integers as floats": 20_000.0, "1e300": 1e300}


@pytest.mark.parametrize("case", LOUD)
def test_floats_that_are_no_sound_are_refused(tmp_path, case):
  content = np.append(TONE, LOUD[case]).astype("<f8").tobytes()
  with pytest.raises(ValueError, match=r"sound\.wav holds .*floats must be finite"):
    read_wav(tmp_path, wav(content, tag=3, bits=64))


WRONG_WAV = {
  "0 Hz": (dict(rate=0), "says 0 Hz in its header"),
  "999 Hz": (dict(rate=999), "says 999 Hz in its header"),
  "4 MHz": (dict(rate=4_000_003), "says 4,000,003 Hz in its header"),
  "2**31 Hz": (dict(rate=2**31), "says 2,147,483,648 Hz in its header"),
  "no channels": (dict(channels=0, frame=2), "0 channels"),
  "0 bits": (dict(bits=0, frame=2), "0 bits"),
  "40 bits": (dict(bits=40), "40 bits"),
  "20 bits in 4 bytes": (dict(bits=20, frame=4), "20 bits, 1 channels, 4 bytes"),
  "floats of 31 bits": (dict(tag=3, bits=31, frame=4), "format 3, 31 bits"),
  "ADPCM": (dict(tag=2, bits=4, frame=1), "format 2, 4 bits"),
  "24 bits in 4 bytes": (dict(bits=24, frame=4), "24 bits, 1 channels, 4 bytes"),
  "another extension": (
    dict(tag=0xFFFE, fields=[struct.pack("<HHIH", 22, 16, 0, 1), bytes(14)]),
    "format 65534",
  ),
  "cut off": (dict(size=len(PCM) + 2), "is cut off: its header promises 4,802 bytes"),
  "cut off at 3 GB": (dict(size=3 * 2**30), "is cut off: its header promises 3,221,225,472"),
  "goes on": (dict(size=2_000, riff=2_036), "goes on for 2,800 bytes behind the end"),
}


@pytest.mark.parametrize("case", WRONG_WAV)
def test_a_header_that_cannot_be_true_is_named_before_the_sound_is_read(tmp_path, case):
  change, message = WRONG_WAV[case]
  (tmp_path / "sound.wav").write_bytes(wav(**change))
  for refuse in (audio.check_wav, audio.read_wav, recordings.load_codes):
    with pytest.raises(ValueError) as error:
      refuse(tmp_path / "sound.wav")
    assert str(error.value).startswith(str(tmp_path / "sound.wav")) and message in str(error.value)


def test_a_format_behind_the_sound_is_none(tmp_path):
  with pytest.raises(ValueError, match=r"sound\.wav is not a WAV file: it has no format"):
    read_wav(
      tmp_path, b"RIFF" + struct.pack("<I", 100) + b"WAVEdata" + struct.pack("<I", 64) + bytes(64)
    )


# ------------------------------------------------------------------------------------------ FLAC
@pytest.fixture(scope="module")
def flac_bytes():
  file = io.BytesIO()
  stereo = np.stack([TONE, np.random.default_rng(0).normal(size=len(TONE)) * 0.1], axis=1)
  soundfile.write(file, np.tile(stereo, (8, 1)), 44_100, format="FLAC", subtype="PCM_16")
  return file.getvalue()


def with_length(content, samples):
  """The number of samples is the last 36 bits before the checksum."""
  fields = int.from_bytes(content[18:26]) >> 36 << 36 | samples
  return replaced(content, 18, fields.to_bytes(8))


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_flac_of_all_widths_is_read(tmp_path, subtype):
  soundfile.write(tmp_path / "a.flac", TONE, 48_000, subtype=subtype)
  expected, _ = soundfile.read(tmp_path / "a.flac", dtype="float32", always_2d=True)
  samples, rate = flac.read(tmp_path / "a.flac")
  assert rate == 48_000
  np.testing.assert_array_equal(samples, expected)


FLAC_DAMAGE = {
  "length left open": (lambda x: with_length(x, 0), "does not say its length"),
  "half its length": (lambda x: with_length(x, 9_600), "is damaged: its sound does not have"),
  "twice its length": (lambda x: with_length(x, 38_400), "is damaged or cut off"),
  "longer than memory": (lambda x: with_length(x, 2**36 - 1), "is damaged or cut off"),
  "checksum": (lambda x: replaced(x, 30, b"\0\0"), "is damaged: its sound does not have"),
  "1 Hz": (lambda x: replaced(x, 18, b"\0\0\1"), "Hz in its header"),
  "cut off": (lambda x: x[: len(x) * 9 // 10], "is damaged or cut off"),
  "in its header": (lambda x: x[:30], "is not a FLAC file"),
  "a text": (lambda x: b"Not sound, whatever its name says." * 9, "is not a FLAC file"),
}


@pytest.mark.parametrize("damage", FLAC_DAMAGE)
def test_flac_that_lies_is_named(tmp_path, flac_bytes, damage):
  change, message = FLAC_DAMAGE[damage]
  (tmp_path / "a.flac").write_bytes(change(flac_bytes))
  with pytest.raises(ValueError) as error:
    recordings.load_codes(tmp_path / "a.flac")
  assert str(error.value).startswith(f"{tmp_path / 'a.flac'} ") and message in str(error.value)


def test_flac_without_a_length_is_refused_before_anything_is_written(tmp_path, flac_bytes):
  files.write_recordings(tmp_path)
  (tmp_path / "open.flac").write_bytes(with_length(flac_bytes, 0))
  (problem,) = files.check("audio", tmp_path)
  assert "open.flac does not say its length in its header" in problem


def test_any_flipped_bit_of_flac_changes_nothing_or_is_named(tmp_path, flac_bytes):
  (tmp_path / "a.flac").write_bytes(flac_bytes)
  whole, _ = flac.read(tmp_path / "a.flac")
  rng, refused = np.random.default_rng(0), 0
  for position in rng.integers(21, len(flac_bytes), 60).tolist():
    flipped = bytes([flac_bytes[position] ^ 1 << int(rng.integers(8))])
    (tmp_path / "b.flac").write_bytes(replaced(flac_bytes, position, flipped))
    try:
      np.testing.assert_array_equal(flac.read(tmp_path / "b.flac")[0], whole)
    except ValueError as error:
      refused += "b.flac" in str(error)
  assert refused > 50
