"""What is wrong with a data set is named before anything is written, and runs no foreign code."""

import gzip
import json
import os
import re
import zipfile

import numpy as np
import pytest

from sparse_flax import data
from sparse_flax.data import samples
from tests.helpers import data_files as files


def edit(path, change):
  path.write_bytes(change(path.read_bytes()))


WRONG = {
  "no path": ("cifar10", lambda p: "", "give the folder"),
  "missing": ("cifar10", lambda p: p / "nowhere", "no such file or folder"),
  "empty": ("cifar10", lambda p: p, "data_batch_1.bin to data_batch_5.bin"),
  "file": ("audio", lambda p: p.joinpath("x").write_text("x") and p / "x", "must be a folder"),
  "no tar": ("downsampled_imagenet/64x64", lambda p: p, "train_64x64.tar and valid_64x64.tar"),
  "no text": ("enwik8", lambda p: p, "the file enwik8 or enwik8.zip"),
  "no sound": ("audio", lambda p: p, "no recording (.flac, .mp3, .oga, .ogg, .wav)"),
  "folder": ("bytes", lambda p: p, "must be a file"),
  "tiny file": ("bytes", lambda p: p.joinpath("x").write_text("x") and p / "x", "needs 20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_path_is_named_with_what_would_be_right(tmp_path, case):
  name, make, message = WRONG[case]
  path = make(tmp_path)
  (problem,) = files.check(name, path)
  assert problem.startswith(f"data.path={str(path)!r}: ")
  assert message in problem
  with pytest.raises(ValueError, match=re.escape(problem)):
    files.open_split(name, path)


def broken_cifar10(folder):
  files.write_cifar10(folder)
  edit(folder / "data_batch_3.bin", lambda content: content[:-1_000])


def broken_tar(folder):
  files.write_imagenet64(folder)
  edit(folder / "train_64x64.tar", lambda content: content[: len(content) // 2])


def tar_of_other_images(folder):
  files.write_tar(folder / "train_64x64.tar", {"a.png": files.png(np.zeros((32, 64, 3), np.uint8))})


def tar_of_texts(folder):
  files.write_tar(folder / "train_64x64.tar", {"a.png": b"not an image"})


def tar_of_nothing(folder):
  files.write_tar(folder / "train_64x64.tar", {"README": b"no images here"})


def short_enwik8(folder):
  (folder / "enwik8").write_bytes(samples.enwik8_bytes().tobytes())


def other_zip(folder):
  with zipfile.ZipFile(folder / "enwik8.zip", "w") as archive:
    archive.writestr("enwik9", "x")


def no_zip(folder):
  (folder / "enwik8.zip").write_bytes(gzip.compress(b"x"))


def text_as_wav(folder):
  files.write_recordings(folder)
  (folder / "piece 9.wav").write_text("not sound at all, only a name that says so")


def cut_wav(folder):
  files.write_recordings(folder)
  edit(folder / "piece 4.WAV", lambda content: content[:-100])


def text_as_flac(folder):
  (folder / "piece.flac").write_text("not sound")


BROKEN = {
  "cifar10": (broken_cifar10, "cifar10", "data_batch_3.bin has 152,650 bytes, not a multiple"),
  "tar": (broken_tar, "downsampled_imagenet/64x64", "train_64x64.tar .* is cut off"),
  "size": (tar_of_other_images, "downsampled_imagenet/64x64", "a.png .* of 64 x 32, not a PNG"),
  "texts": (tar_of_texts, "downsampled_imagenet/64x64", "a.png in .* is not a PNG image"),
  "nothing": (tar_of_nothing, "downsampled_imagenet/64x64", "holds no PNG image"),
  "enwik8": (short_enwik8, "enwik8", "1,000,000 bytes, enwik8 has exactly 100,000,000"),
  "zip": (other_zip, "enwik8", "enwik8.zip is not the published archive"),
  "no-zip": (no_zip, "enwik8", "enwik8.zip is not the published archive"),
  "wav": (text_as_wav, "audio", "piece 9.wav is not a WAV file"),
  "cut-wav": (cut_wav, "audio", "piece 4.WAV is cut off"),
  "flac": (text_as_flac, "audio", "piece.flac is not a FLAC file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_found_before_anything_is_written(tmp_path, case):
  make, name, message = BROKEN[case]
  make(tmp_path)
  before = sorted(tmp_path.rglob("*"))
  (problem,) = files.check(name, tmp_path)
  assert problem.startswith(f"data.path={str(tmp_path)!r}: ")
  assert re.search(message, problem)
  with pytest.raises(ValueError, match=re.escape(problem)):
    files.open_split(name, tmp_path)
  assert sorted(tmp_path.rglob("*")) == before


def test_a_file_broken_in_its_middle_leaves_nothing_half_prepared(tmp_path):
  images = files.images_of_64(3)
  pngs = {
    "0.png": files.png(images[0]),
    "1.png": files.png(images[1][:32]),
    "2.png": files.png(images[2]),
  }
  files.write_tar(tmp_path / "train_64x64.tar", pngs)
  with pytest.raises(ValueError, match=r"1\.png in train_64x64\.tar is a PNG of 64 x 32"):
    files.open_split("downsampled_imagenet/64x64", tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["train_64x64.tar"]


def test_labels_beyond_9_are_not_cifar10(tmp_path):
  files.write_cifar10(tmp_path)
  edit(tmp_path / "data_batch_2.bin", lambda content: b"\x63" + content[1:])
  with pytest.raises(ValueError, match=r"data_batch_2\.bin has labels beyond 9"):
    files.open_split("cifar10", tmp_path)


def test_two_recordings_cannot_be_split_in_three(tmp_path):
  files.write_recordings(tmp_path, num=2)
  with pytest.raises(ValueError, match="holds 2 recordings"):
    files.open_split("audio", tmp_path)


def test_recordings_added_later_are_noticed(tmp_path):
  files.write_recordings(tmp_path)
  files.open_split("audio", tmp_path)
  data.write_wav(tmp_path / "new.wav", np.zeros(1000))
  with pytest.raises(ValueError, match=r"new\.wav was added or taken away"):
    files.open_split("audio", tmp_path)


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
  files.write_cifar10(tmp_path)
  with monkeypatch.context() as context:
    context.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    (problem,) = files.check("cifar10", tmp_path)
    assert "cannot be written" in problem
  (tmp_path / "cifar10_binary").write_text("a file where the folder would be")
  with pytest.raises(ValueError, match=r"data\.path=.*cannot be prepared"):
    files.open_split("cifar10", tmp_path)


def test_a_set_stored_as_tfrecord_is_refused(tmp_path):
  info = files.prepare_own(files.OwnCifar10, tmp_path) / "dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  (problem,) = files.check("cifar10", tmp_path)
  assert "is stored as tfrecord" in problem
  assert "file_format='array_record'" in problem


@pytest.mark.parametrize("cut", ["half", "all"])
def test_a_broken_prepared_file_is_an_error_of_the_path(tmp_path, cut):
  files.write_imagenet64(tmp_path)
  name = "downsampled_imagenet/64x64"
  files.open_split(name, tmp_path)
  (file,) = tmp_path.glob("downsampled_imagenet64/1.0.0/*-train.array_record-*")
  if cut == "half":
    edit(file, lambda content: content[: len(content) // 2])
  else:
    file.unlink()
  with pytest.raises(ValueError, match=r"data\.path="):
    files.open_split(name, tmp_path)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"name": "cifar11"}, "data.name='cifar11' must be one of cifar10, "),
    ({"split": "dev"}, "split='dev' must be one of train, validation, test"),
    ({"seq_len": 1_024}, "model.seq_len=1024 must be 3072"),
  ],
  ids=["name", "split", "seq_len"],
)
def test_wrong_arguments(change, message):
  right = dict(name="cifar10_sample", path="", split="train", seq_len=3_072, split_seed=0)
  with pytest.raises(ValueError, match=re.escape(message)):
    data.open_dataset(**right | change)


def test_check_names_all_problems(tmp_path):
  problems = data.check("cifar10", path=str(tmp_path / "nowhere"), seq_len=1_024)
  assert [problem.split("=")[0] for problem in problems] == ["model.seq_len", "data.path"]
  (tmp_path / "book").write_bytes(bytes(100))
  (problem,) = data.check("bytes", path=str(tmp_path / "book"), seq_len=91)
  assert "train split has 90 bytes, less than model.seq_len=91" in problem


# --------------------------------------------------------------------------------- Foreign code
@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
def test_a_folder_cannot_make_us_import_its_module(tmp_path, monkeypatch, key):
  (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  features = files.prepare_own(files.OwnCifar10, tmp_path) / "features.json"
  content = json.loads(features.read_text())
  del content["pythonClassName"]
  features.write_text(json.dumps({key: "evil.Feature", **content}))
  with pytest.raises(ValueError, match=r"features\.json asks to import 'evil\.Feature'"):
    files.open_split("cifar10", tmp_path)


def test_our_own_folders_are_read_without_their_features_file(tmp_path):
  files.write_cifar10(tmp_path)
  identity = files.open_split("cifar10", tmp_path, "test").identity
  features = tmp_path / "cifar10_binary" / "1.0.0" / "features.json"
  features.write_text('{"pythonClassName": "evil.Feature"}')
  assert files.open_split("cifar10", tmp_path, "test").identity == identity
