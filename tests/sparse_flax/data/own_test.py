"""Folders of one's own: pictures, texts and recordings in the formats that people have."""

import io
import json
import sys

import numpy as np
import PIL.Image
import pytest
import soundfile
from etils import epath

from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import train
from sparse_flax.data import audio
from sparse_flax.data import own
from sparse_flax.data import samples
from sparse_flax.run import checkpoint
from tests.helpers import data_files
from tests.helpers import tiny

SIDE = 32


def encoded(image: PIL.Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def halves(width=60, height=40, mode="RGB") -> PIL.Image.Image:
  """Left of the middle red, right of it blue."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
  return PIL.Image.fromarray(pixels).convert(mode)


@pytest.fixture
def pictures(tmp_path):
  """As many as splits need, in each format, of several sizes, below each other."""
  (tmp_path / "more").mkdir()
  for n, kind in enumerate(("PNG", "JPEG", "WEBP") * 8):
    image = halves(50 + 3 * n, 90 - 2 * n)
    (tmp_path / ("more" if n % 2 else ".") / f"{n:02d}.{kind.lower()}").write_bytes(
      encoded(image, kind)
    )
  (tmp_path / "notes.txt").write_text("no picture")
  return tmp_path


def open_split(path, name, split="train", seq_len=3 * SIDE * SIDE, **options):
  return data.open_dataset(
    name, path=str(path), split=split, seq_len=seq_len, split_seed=0, **options
  )


def test_pictures_become_squares(pictures):
  assert data.name_for("cifar10_sample", str(pictures)) == "images"
  assert data.name_for("cifar10", str(pictures)) == "images"
  assert data.check("images", path=str(pictures), seq_len=3_072) == []
  splits = {split: open_split(pictures, "images", split) for split in data.SPLITS}
  assert [len(x.streams.lengths) for x in splits.values()] == [22, 1, 1]
  assert splits["train"].image_shape == (SIDE, SIDE, 3) and "32 x 32" in splits["train"].remark
  for dataset in splits.values():
    for n in range(len(dataset.streams.lengths)):
      pixels = dataset.streams.read(n, 0, 3_072).reshape(SIDE, SIDE, 3).astype(int)
      left, right = pixels[:, : SIDE // 2 - 2], pixels[:, SIDE // 2 + 2 :]
      np.testing.assert_allclose(left.mean(axis=(0, 1)), [254, 0, 0], atol=6)
      np.testing.assert_allclose(right.mean(axis=(0, 1)), [0, 0, 254], atol=6)
  # Prepared once for each size, and found again.
  small = open_split(pictures, "images", seq_len=3 * 16 * 16)
  assert small.image_shape == (16, 16, 3)
  assert open_split(pictures, "images").identity == splits["train"].identity
  (pictures / "one_more.png").write_bytes(encoded(halves(), "PNG"))
  with pytest.raises(ValueError, match="were added or taken away after the set was prepared"):
    open_split(pictures, "images")


@pytest.mark.parametrize(
  ("image", "corner"),
  [
    (halves(mode="L"), (76, 76, 76)),
    (halves(mode="P"), (255, 0, 0)),
    (PIL.Image.new("RGBA", (40, 60), (255, 0, 0, 0)), (255, 255, 255)),
    (PIL.Image.new("RGBA", (40, 60), (255, 0, 0, 255)), (255, 0, 0)),
    (PIL.Image.new("LA", (40, 60), (0, 255)), (0, 0, 0)),
    (PIL.Image.new("I;16", (40, 60), 0), (0, 0, 0)),
    (PIL.Image.new("CMYK", (40, 60)), (255, 255, 255)),
  ],
  ids=lambda x: getattr(x, "mode", ""),
)
def test_pictures_of_all_kinds_are_as_they_are_seen(image, corner):
  kind = "JPEG" if image.mode == "CMYK" else "PNG"
  pixels = own.square(encoded(image, kind), 16)
  assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
  np.testing.assert_allclose(pixels[2, 2].astype(int), corner, atol=2)


def test_a_picture_stands_as_its_camera_says():
  exif = PIL.Image.Exif()
  exif[0x0112] = 3  # turned by half a circle
  pixels = own.square(encoded(halves(64, 64), "JPEG", exif=exif, quality=95), 16)
  assert pixels[8, 2, 2] > 200 and pixels[8, 13, 0] > 200


def test_a_damaged_picture_is_named_and_left_out_when_asked(pictures, capfd):
  (pictures / "broken.png").write_bytes(encoded(halves(), "PNG")[:60])
  with pytest.raises(ValueError, match=r"broken.png cannot be decoded .*data.skip_damaged=True"):
    open_split(pictures, "images")
  dataset = open_split(pictures, "images", skip_damaged=True)
  assert len(dataset.streams.lengths) == 22
  assert "left out: " in (said := capfd.readouterr().err) and "broken.png" in said


def test_what_is_wrong_with_pictures_is_said(tmp_path):
  (problem,) = data.check("images", path=str(tmp_path), seq_len=3_072)
  assert "holds 0 pictures" in problem
  (problem,) = data.check("images", path=str(tmp_path), seq_len=3_000)
  assert "model.seq_len=3000 must be 3 * side * side" in problem


@pytest.fixture
def texts(tmp_path):
  (tmp_path / "b").mkdir()
  (tmp_path / "a.txt").write_text("first " * 20)
  (tmp_path / "b" / "c.md").write_bytes(b"second\n")
  lines = [json.dumps(dict(text=f"third {n}", body="x")) for n in range(3)]
  (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n\n")
  (tmp_path / "picture.png").write_bytes(b"none")
  return tmp_path


def test_texts_follow_each_other(texts):
  assert data.name_for("enwik8_sample", str(texts)) == "texts"
  assert data.name_for("enwik8", str(texts)) == "texts"
  assert data.name_for("enwik8", str(texts / "a.txt")) == "bytes"
  whole = [
    data_files.everything(open_split(texts, "texts", split, seq_len=8))[0] for split in data.SPLITS
  ]
  expected = b"first " * 20 + b"\nsecond\n" + b"third 0\nthird 1\nthird 2\n"
  assert np.concatenate(whole).tobytes() == expected
  assert b"x\nx\nx\n" in own.text_bytes(data_path(texts), "body")
  assert data.check("texts", path=str(texts), seq_len=8) == []
  with pytest.raises(ValueError, match=r"d.jsonl, line 1, has no text in data.field='tex'; it has"):
    open_split(texts, "texts", field="tex")
  (texts / "d.jsonl").write_text("{\n")
  with pytest.raises(ValueError, match=r"d.jsonl, line 1, is not JSON"):
    open_split(texts, "texts")


def data_path(path):
  return epath.Path(path)


def test_a_folder_without_texts_is_said(tmp_path):
  assert data.name_for("enwik8", str(tmp_path)) == "enwik8"
  (problem,) = data.check("texts", path=str(tmp_path), seq_len=8)
  assert "holds no text (.jsonl, .md, .txt)" in problem


def test_recordings_of_all_formats_are_read(tmp_path):
  """The same sound in each of them; those that lose something are near it."""
  sound = audio.mu_law_decode(samples.violin_codes()[: 12_000 * 3])
  at_24k = np.repeat(sound, 2)
  soundfile.write(tmp_path / "a.mp3", at_24k, 24_000, format="MP3")
  soundfile.write(tmp_path / "b.ogg", at_24k, 24_000, format="OGG", subtype="VORBIS")
  soundfile.write(tmp_path / "c.flac", sound, 12_000)
  soundfile.write(tmp_path / "d.wav", sound, 12_000, subtype="FLOAT")
  dataset = [open_split(tmp_path, "audio", split, seq_len=256) for split in data.SPLITS]
  streams = [x for part in dataset for x in data_files.everything(part)]
  assert len(streams) == 4
  power = [np.mean(audio.mu_law_decode(x).astype(float) ** 2) for x in streams]
  np.testing.assert_allclose(power, np.mean(sound.astype(float) ** 2), rtol=0.25)
  other = tmp_path / "other"
  other.mkdir()
  (other / "e.mp3").write_bytes(b"no sound" * 100)
  (problem,) = data.check("audio", path=str(other), seq_len=256)
  assert "e.mp3 is no such file, or damaged" in problem


@pytest.mark.parametrize("name", ["a.flac", "a.mp3", "a.ogg"])
def test_a_machine_without_soundfile_says_so_for_the_files_that_need_it(
  name, tmp_path, monkeypatch
):
  audio.write_wav(tmp_path / "a.wav", np.zeros(20_000, np.float32))
  assert data.check("audio", path=str(tmp_path), seq_len=256) == []
  monkeypatch.setitem(sys.modules, "soundfile", None)
  assert data.check("audio", path=str(tmp_path), seq_len=256) == []
  (tmp_path / name).write_bytes(b"whatever")
  (problem,) = data.check("audio", path=str(tmp_path), seq_len=256)
  assert f"{name} needs soundfile, which cannot be imported" in problem


@pytest.mark.one_day_in_six(3)
@pytest.mark.promotes  # optax's Adam mixes dtypes
def test_arrays_of_a_program_are_trained_on(tmp_path):
  config = tiny.config(tmp_path / "nothing")
  text = np.random.RandomState(0).randint(97, 123, (20, 100)).astype(np.uint8)
  datasets = {"train": text[:18], "validation": (row.tobytes() for row in text[18:])}
  result = train.train(config, str(tmp_path / "run"), datasets=datasets, say=lambda line: None)
  assert result["data"]["name"] == "arrays" and result["bytes_scored"] == 200
  config, _, params, step = checkpoint.restore_params(tmp_path / "run")
  test = data.of_arrays(text[:1], split="test", modality="text")
  assert evaluate.evaluate(config, params, dataset=test, step=step)["bytes_scored"] == 100
  with pytest.raises(ValueError, match=r"data.name='arrays': such data are given by a program"):
    evaluate.evaluate(config, params, split="test", step=step)
  with pytest.raises(ValueError, match="'validation' is missing"):
    train.train(config, str(tmp_path / "other"), datasets={"train": text})
  with pytest.raises(ValueError, match="hold int64 of shape"):
    train.train(
      config, str(tmp_path / "other"), datasets=dict(train=text.astype(int), validation=text)
    )
  images = np.zeros((2, 4, 4, 3), np.uint8)
  of_images = data.of_arrays(images, split="train", modality="image")
  with pytest.raises(ValueError, match="modality='text': must be 'image'"):
    train.train(config, str(tmp_path / "other"), datasets=dict(train=of_images, validation=text))
  config.model.modality = "image"
  with pytest.raises(ValueError, match=r"seq_len=32: must be 48 for images of \(4, 4, 3\)"):
    evaluate.checked(of_images, config)
  assert data.of_arrays(images, split="test", modality="image").image_shape == (4, 4, 3)
