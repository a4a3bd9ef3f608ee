"""Data sets from real bytes in the published formats, through our builders and back."""

import hashlib
import re
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
from etils import epath

from sparse_flax import data
from sparse_flax.data import builders
from sparse_flax.data import prepared
from sparse_flax.data import raw
from sparse_flax.data import samples
from tests.helpers import data_files as files


@pytest.fixture
def small_enwik8(monkeypatch):
  """Lets the first 1,000,000 bytes pass for all of enwik8."""
  monkeypatch.setattr(raw, "ENWIK8_BYTES", 1_000_000)
  return samples.enwik8_bytes()


# ------------------------------------------------------------------------------ There and back
def test_cifar10_from_the_binary_files(tmp_path):
  pixels = files.write_cifar10(tmp_path)
  assert files.check("cifar10", tmp_path) == []
  assert len(list(tmp_path.iterdir())) == 6  # checking writes nothing
  train, validation, test = (files.open_split("cifar10", tmp_path, split) for split in data.SPLITS)
  order = np.random.RandomState(0).permutation(250)  # as scikit-learn's train_test_split
  np.testing.assert_array_equal(files.everything(validation), pixels[order[:10]])
  np.testing.assert_array_equal(files.everything(train), pixels[order[10:]])
  expected_test = samples.cifar10_images()[-20:].reshape(20, -1)
  np.testing.assert_array_equal(files.everything(test), expected_test)
  assert train.image_shape == (32, 32, 3)
  assert train.identity["count"] == 240
  assert train.identity["remark"] == "not the published set: 250 train images instead of 50,000"
  other = files.open_split("cifar10", tmp_path, "validation", seed=1)
  assert other.identity["digest"] != validation.identity["digest"]
  # Once prepared, the published files are not needed any more.
  for file in tmp_path.glob("*.bin"):
    file.unlink()
  assert files.check("cifar10", tmp_path) == []
  assert files.open_split("cifar10", tmp_path).identity == train.identity


def test_images_of_a_grid(tmp_path):
  pixels = np.random.RandomState(0).randint(0, 256, (6, 8, 4, 3)).astype(np.uint8)
  rows = [np.concatenate(row, axis=1) for row in pixels.reshape(2, 3, 8, 4, 3)]
  PIL.Image.fromarray(np.concatenate(rows)).save(path := tmp_path / "grid.png")
  np.testing.assert_array_equal(samples.images_of_grid(path, (8, 4)), pixels)
  with pytest.raises(ValueError, match=r"grid\.png: is 12 x 16 pixels; .* of images of 5 x 8"):
    samples.images_of_grid(path, (8, 5))
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(ValueError, match=r"grid\.png: is not a picture that can be read"):
    samples.images_of_grid(path, (8, 4))


def test_cifar10_without_test_batch_has_the_other_splits(tmp_path):
  files.write_cifar10(tmp_path, test=False)
  assert files.open_split("cifar10", tmp_path, "validation").num_bytes == 10 * 3_072
  with pytest.raises(ValueError, match=r"data\.path=.*no test split, for lack of test_batch\.bin"):
    files.open_split("cifar10", tmp_path, "test")


def test_imagenet64_from_the_tar_files(tmp_path):
  pixels = files.write_imagenet64(tmp_path)
  name = "downsampled_imagenet/64x64"
  assert files.check(name, tmp_path) == []
  train, validation, test = (files.open_split(name, tmp_path, split) for split in data.SPLITS)
  np.testing.assert_array_equal(files.everything(train), pixels[:40])
  np.testing.assert_array_equal(files.everything(validation), pixels[40:])
  assert validation.identity | {"split": "test"} == test.identity
  assert "4 validation images instead of 49,999" in test.identity["remark"]
  batch = data.make_batches(train, seq_len=12_288, batch_size=40, seed=0)(3)
  np.testing.assert_array_equal(sorted(map(bytes, batch)), sorted(map(bytes, pixels[:40])))


def test_a_big_tar_file_is_streamed_into_several_shards(tmp_path, monkeypatch):
  monkeypatch.setattr(builders, "_SHARD_BYTES", 100_000)
  pixels = files.write_imagenet64(tmp_path)
  train = files.open_split("downsampled_imagenet/64x64", tmp_path)
  np.testing.assert_array_equal(files.everything(train), pixels[:40])
  assert len(list(tmp_path.glob("downsampled_imagenet64/1.0.0/*-train.array_record-*"))) > 2


def test_imagenet64_without_validation_holds_images_out_and_says_so(tmp_path):
  pixels = files.write_imagenet64(tmp_path, validation=False)
  train, validation = (
    files.open_split("downsampled_imagenet/64x64", tmp_path, split)
    for split in ("train", "validation")
  )
  np.testing.assert_array_equal(files.everything(train) + files.everything(validation), pixels[:40])
  assert validation.num_bytes == 2 * 12_288
  assert "valid_64x64.tar is missing, 2 images are held out" in train.identity["remark"]


@pytest.mark.parametrize("given", ["folder", "file", "zip"])
def test_enwik8_from_its_file(tmp_path, small_enwik8, given):
  file = tmp_path / "enwik8"
  file.write_bytes(small_enwik8.tobytes())
  if given == "zip":
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w", zipfile.ZIP_DEFLATED) as archive:
      archive.write(file, "enwik8")
    file.unlink()
  path = file if given == "file" else tmp_path
  assert files.check("enwik8", path) == []
  parts = [files.open_split("enwik8", path, split) for split in data.SPLITS]
  assert [part.num_bytes for part in parts] == [900_000, 50_000, 50_000]
  read = np.concatenate([files.everything(part)[0] for part in parts])
  np.testing.assert_array_equal(read, small_enwik8)
  np.testing.assert_array_equal(
    parts[0].streams.read(0, 123_456, 345_678), small_enwik8[123_456:345_678]
  )
  sample = files.open_split("enwik8_sample", "")
  assert parts[0].identity["digest"] == sample.identity["digest"]


def test_audio_is_split_by_recording(tmp_path):
  written = files.write_recordings(tmp_path)
  assert files.check("audio", tmp_path) == []
  codes = {bytes(part) for part in written.values()}
  splits = {split: files.open_split("audio", tmp_path, split, seed=4) for split in data.SPLITS}
  found = {split: {bytes(x) for x in files.everything(part)} for split, part in splits.items()}
  assert [len(found[split]) for split in data.SPLITS] == [6, 1, 1]
  assert set.union(*found.values()) == codes
  assert splits["train"].identity["count"] == 6
  again = files.open_split("audio", tmp_path, "test", seed=4)
  assert again.identity == splits["test"].identity
  others = {
    files.open_split("audio", tmp_path, "test", seed=s).identity["digest"] for s in range(6)
  }
  assert len(others) > 1


def test_bytes_of_any_file(tmp_path):
  (tmp_path / "book").write_bytes(bytes(range(200)))
  parts = [
    files.everything(files.open_split("bytes", tmp_path / "book", s))[0] for s in data.SPLITS
  ]
  assert [len(part) for part in parts] == [180, 10, 10]
  np.testing.assert_array_equal(np.concatenate(parts), np.arange(200))


def test_a_zip_file_is_bytes_too(tmp_path):
  (tmp_path / "book.zip").write_bytes(bytes(range(200)))
  assert files.open_split("bytes", tmp_path / "book.zip").num_bytes == 180


# ------------------------------------------------------------------------------ TFDS's own sets
def test_tfds_own_cifar10_is_the_same_data(tmp_path):
  own, ours = tmp_path / "own", tmp_path / "ours"
  own.mkdir()
  ours.mkdir()
  files.prepare_own(files.OwnCifar10, own)
  files.write_cifar10(ours)
  assert files.check("cifar10", own) == []
  for split in ("train", "validation"):
    identities = [files.open_split("cifar10", path, split).identity for path in (own, ours)]
    assert identities[0] | {"version": "cifar10_binary/1.0.0"} == identities[1]
    assert identities[0]["version"] == "cifar10/3.0.2"


def test_tfds_own_imagenet64_and_an_image_of_another_size_in_it(tmp_path):
  files.prepare_own(files.OwnImagenet64, tmp_path)
  name = "downsampled_imagenet/64x64"
  assert files.check(name, tmp_path) == []
  pixels = {bytes(x) for x in files.images_of_64(40)}
  assert {bytes(x) for x in files.everything(files.open_split(name, tmp_path))} == pixels
  with pytest.raises(ValueError, match=r"data\.path=.*image \d of .* is 63 x 64, not 64 x 64"):
    files.open_split(name, tmp_path, "validation")


# --------------------------------------------------------------------------------- The samples
def test_the_samples_are_what_the_provenance_says():
  text = (samples.FOLDER / "PROVENANCE.txt").read_text()
  violin, _ = data.read_wav(samples.FOLDER / "violin_30s.wav")
  contents = {
    "cifar10_1100.webp": samples.cifar10_images(),
    "enwik8_1000000.gz": samples.enwik8_bytes(),
    "violin_30s.wav": np.round(violin * 2**15).astype("<i2"),
  }
  assert samples.cifar10_images().shape == (1_100, 32, 32, 3)
  assert samples.enwik8_bytes().shape == (1_000_000,)
  assert violin.shape == (360_000, 1)
  for name, content in contents.items():
    listed = re.search(rf"^{re.escape(name)}\n.*?sha256: +([0-9a-f]{{64}})$", text, re.M | re.S)
    assert listed[1] == hashlib.sha256(content.tobytes()).hexdigest(), name


@pytest.mark.parametrize(
  "name, modality, num_bytes",
  [
    ("cifar10_sample", "image", [1_000 * 3_072, 100 * 3_072, 100 * 3_072]),
    ("enwik8_sample", "text", [900_000, 50_000, 50_000]),
    ("audio_sample", "audio", [324_000, 18_000, 18_000]),
  ],
)
def test_samples_open_without_a_path(name, modality, num_bytes):
  parts = [files.open_split(name, "", split) for split in data.SPLITS]
  assert [part.num_bytes for part in parts] == num_bytes
  assert {part.modality for part in parts} == {modality}
  seq_len = 3_072 if modality == "image" else 256
  assert data.check(name, path="", seq_len=seq_len) == []
  assert data.make_batches(parts[0], seq_len=seq_len, batch_size=4, seed=0)(0).shape == (4, seq_len)


# ------------------------------------------------------------------------------- Other processes
HOST = """
import sys
from sparse_flax import data
assert "tensorflow_datasets" not in sys.modules, "imported too early"
data_set = data.open_dataset("cifar10", path=sys.argv[1], split="train", seq_len=3072, split_seed=0)
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
print(data_set.identity["digest"])
"""


def test_another_process_needs_no_tensorflow(tmp_path):
  files.write_cifar10(tmp_path)
  command = [sys.executable, "-c", HOST, str(tmp_path)]
  host = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
  assert host.stdout.strip() == files.open_split("cifar10", tmp_path).identity["digest"]


def test_a_host_goes_on_when_another_one_was_faster(tmp_path, monkeypatch):
  pixels = files.write_cifar10(tmp_path)
  examples = builders.Cifar10Binary._examples

  def overtaken(self, *args):
    monkeypatch.setattr(builders.Cifar10Binary, "_examples", examples)
    prepared.prepare(epath.Path(tmp_path), lambda builders: builders.Cifar10Binary)
    return examples(self, *args)

  monkeypatch.setattr(builders.Cifar10Binary, "_examples", overtaken)
  train = files.open_split("cifar10", tmp_path)
  assert train.num_bytes == 240 * pixels.shape[1]
  assert [folder.name for folder in (tmp_path / "cifar10_binary").iterdir()] == ["1.0.0"]
