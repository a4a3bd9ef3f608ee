"""Opens a data set by its name in the config, or says what is wrong with its path."""

import contextlib
import functools
import os
from collections.abc import Iterable
from collections.abc import Mapping
from typing import cast

import numpy as np
from etils import epath

from sparse_flax.data import dataset as dataset_lib
from sparse_flax.data import far_recall
from sparse_flax.data import own
from sparse_flax.data import published
from sparse_flax.data import raw
from sparse_flax.data import samples

SPLITS = ("train", "validation", "test")
# What ships with the package, and which set that is a sample of.
SAMPLES = {"cifar10_sample": "cifar10", "enwik8_sample": "enwik8", "audio_sample": "audio"}
# Of one's own: pictures in a folder, texts in a folder, any file.
OWN = ("images", "texts", "bytes")
ARRAYS = "arrays"  # the name of what a program gives: no path tells where it is
NAMES = (*published.PUBLISHED, *OWN, *SAMPLES, far_recall.NAME)
_MIN_BYTES = 20  # so that each of the splits of 90, 5 and 5 % has a byte


def open_dataset(
  name: str,
  *,
  path: str,
  split: str,
  seq_len: int,
  split_seed: int,
  field: str = "text",
  skip_damaged: bool = False,
  recall: Mapping[str, int] | None = None,
) -> dataset_lib.Dataset:
  """Opens one split of a data set; published files are prepared first, once, beside themselves.

  Args:
    name: "cifar10", "enwik8", "downsampled_imagenet/64x64" or "audio"; "images" and "texts" for a
      folder of them, "bytes" for any file; "cifar10_sample", "enwik8_sample", "audio_sample",
      which ship with the package; or "far_recall", which is made while it is read.
    path: a TFDS data_dir that holds the prepared set (ours, or TFDS's own cifar10 and
      downsampled_imagenet/64x64), or the folder of the published files; a file for "bytes", and
      possibly for "enwik8"; "" for the samples.
    split: "train", "validation" or "test".
      cifar10: validation is 2,000 images of train, chosen by split_seed.
      downsampled_imagenet/64x64: test is the published validation split; without the file of that
      split, both are the last twentieth of the training images.
      audio, images: 5 % of the recordings or pictures each are validation and test, chosen by
      split_seed.
      enwik8, texts, bytes, enwik8_sample, audio_sample: 90, 5 and 5 % by position.
      cifar10_sample: the last 100 images are both validation and test.
    seq_len: bytes of a window, which must be the size of an image for images.
    split_seed: chooses what is held out, where the published set does not say.
    field: of the objects in .jsonl files of "texts" that holds the text.
    skip_damaged: leaves out pictures of "images" that cannot be read, and says so.
    recall: fields of `far_recall.Sizes`.

  Returns:
    The split. Big sets are read when they are used.

  Raises:
    ValueError: naming the field, if the name, path, split or seq_len or a file there is wrong.
  """
  modality, image_shape = _properties(name, seq_len)
  if split not in SPLITS:
    raise ValueError(f"{split=} must be one of {', '.join(SPLITS)}")
  _check_image_size(name, image_shape, seq_len)
  read = functools.partial(_open_path, split_seed=split_seed, field=field, seq_len=seq_len)
  with _naming_path(path):
    if name == far_recall.NAME:
      _check_no_path(name, path)
      streams, remark = _open_recall(seq_len, split, recall), "synthetic: records and questions"
      version = far_recall.VERSION
    elif name in SAMPLES:
      _check_no_path(name, path)
      streams, remark = _open_sample(name, split), "a small sample: not comparable with any paper"
      version = "1.0.0"
    else:
      streams, remark, version = read(name, _existing(path), split, skip_damaged=skip_damaged)
    return dataset_lib.Dataset(name, split, modality, image_shape, streams, version, remark)


def of_arrays(
  arrays: Iterable[np.ndarray | bytes],
  *,
  split: str,
  modality: str,
  remark: str = "arrays that a program gave",
) -> dataset_lib.Dataset:
  """One split of a data set that is in memory, for `train.train(datasets=...)`.

  Args:
    arrays: images [H, W, 3], texts, recordings as codes: an array of them, or what gives one after
      the other. No window reaches from one into the next.
    split: "train", "validation" or "test".
    modality: "image", "text" or "audio".
    remark: what they are, for the record of a result.

  Raises:
    ValueError: nothing is there, or something other than bytes.
  """
  streams = [np.frombuffer(x, np.uint8) if isinstance(x, bytes) else np.asarray(x) for x in arrays]
  wrong = next((x for x in streams if x.dtype != np.uint8), None)
  if wrong is not None or not streams:
    found = "nothing" if wrong is None else f"{wrong.dtype} of shape {wrong.shape}"
    raise ValueError(f"the arrays of {split!r} hold {found}: must be uint8, or bytes")
  image_shape = None
  if modality == "image":
    if streams[0].ndim != 3 or any(x.shape != streams[0].shape for x in streams):
      raise ValueError(f"the images of {split!r} must be [H, W, 3], all of the same size")
    image_shape = cast(tuple[int, int, int], streams[0].shape)
  return dataset_lib.Dataset(
    ARRAYS, split, modality, image_shape, dataset_lib.Arrays(streams), "1.0.0", remark
  )


def name_for(name: str, path: str) -> str:
  """The set that is meant by a name with a path beside it, by what lies there.

  A sample of the package means the set that it is of. What is none of that set's files is one's
  own: another file of text, a folder of texts or of pictures. Other names stay.
  """
  name = SAMPLES.get(name, name) if path else name
  if not path or name not in published.PUBLISHED:
    return name
  file, source = epath.Path(path).expanduser(), published.PUBLISHED[name]
  if source.modality == "text" and file.is_file() and file.suffix != ".zip":
    # A file called enwik8 of another size is a damaged one.
    return name if file.name == "enwik8" or file.stat().length == raw.ENWIK8_BYTES else "bytes"
  mine = {"image": ("images", own.PICTURES), "text": ("texts", own.TEXTS)}
  if source.modality not in mine or not file.is_dir() or source.is_in(file):
    return name
  of_mine, suffixes = mine[source.modality]
  return of_mine if own.names(file, suffixes) else name


def check(
  name: str, *, path: str, seq_len: int, recall: Mapping[str, int] | None = None
) -> list[str]:
  """What is wrong with a data set, without writing and without reading much of it.

  Returns:
    Messages as "data.path='...': what would be right"; empty if nothing seems wrong.
  """
  problems = []
  try:
    _, image_shape = _properties(name, seq_len)
  except ValueError as error:
    return [str(error)]
  try:
    _check_image_size(name, image_shape, seq_len)
  except ValueError as error:
    problems.append(str(error))
  try:
    with _naming_path(path):
      if name == far_recall.NAME:
        problems += filter(None, [far_recall.Sizes(**(recall or {})).problem(seq_len)])
      if name in (*SAMPLES, far_recall.NAME):
        _check_no_path(name, path)
      else:
        _check_path(name, _existing(path), seq_len)
  except ValueError as error:
    problems.append(str(error))
  return problems


def _properties(name, seq_len):
  if name == ARRAYS:
    raise ValueError(
      f"data.name={ARRAYS!r}: such data are given by a program, to train.train(datasets=...) and "
      "evaluate.evaluate(dataset=...)"
    )
  if name in ("bytes", "texts", far_recall.NAME):
    return "text", None
  if name == "images":
    if side := own.side_of(seq_len):
      return "image", (side, side, 3)
    raise ValueError(
      f"model.{seq_len=} must be 3 * side * side for data.name='images', as 3,072 for 32 x 32"
    )
  if name in NAMES:
    source = published.PUBLISHED[SAMPLES.get(name, name)]
    return source.modality, source.image_shape
  raise ValueError(f"data.name={name!r} must be one of {', '.join(NAMES)}")


def _check_image_size(name, image_shape, seq_len):
  if image_shape and seq_len != np.prod(image_shape):
    raise ValueError(f"model.{seq_len=} must be {np.prod(image_shape)}, an image of {name}")


def _source(name, seq_len, skip_damaged=False):
  """What opens a folder."""
  if name == "images":
    _, shape = _properties(name, seq_len)
    assert shape is not None  # of images
    return published.images(shape[0], skip_damaged=skip_damaged)
  return published.PUBLISHED[name]


@contextlib.contextmanager
def _naming_path(path):
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:  # the last: broken ArrayRecord files
    raise ValueError(f"data.path={os.fspath(path)!r}: {error}") from error


def _open_recall(seq_len, split, recall):
  sizes = far_recall.Sizes(**(recall or {}))
  if problem := sizes.problem(seq_len):
    raise ValueError(problem)
  return far_recall.Recall(seq_len, split, sizes)


def _check_no_path(name, path):
  if os.fspath(path) and name == far_recall.NAME:
    raise ValueError(f"must be empty, for data.name={name!r} is made while it is read")
  if os.fspath(path):
    raise ValueError(
      f"must be empty, for data.name={name!r} ships with the package and reads no path; "
      f"to read this one take data.name={SAMPLES[name]!r}"
    )


def _existing(path):
  if not os.fspath(path):
    raise ValueError("give the folder of the published files, or of the prepared set")
  local = epath.Path(path).expanduser()
  if not local.exists():
    raise ValueError("no such file or folder")
  return local


def _open_path(name, path, split, *, split_seed, field, seq_len, skip_damaged):
  if path.is_file():
    text, remark = _open_file(name, path), "a file of your own"
    return _part(text, split), "the published set" if name == "enwik8" else remark, "1.0.0"
  _check_folder(name)
  if name == "texts":
    text = np.frombuffer(own.text_bytes(path, field), np.uint8)
    if len(text) < _MIN_BYTES:
      raise ValueError(f"its texts have {len(text)} bytes, but three splits need {_MIN_BYTES}")
    return _part(text, split), "a folder of texts of your own", "1.0.0"
  source = _source(name, seq_len, skip_damaged)
  prepared = source.find_or_prepare(path)
  streams, remark = source.open(prepared, split, split_seed)
  return streams, remark, prepared.name


def _part(text, split):
  start, stop = dataset_lib.split_positions(len(text))[split]
  return dataset_lib.Arrays([text[start:stop]])


def _check_folder(name):
  if name == "bytes":
    raise ValueError("must be a file, whose bytes are the data; a folder of texts is 'texts'")


def _open_file(name, path):
  _check_file(name, path)
  if name == "enwik8" and path.suffix == ".zip":
    return np.frombuffer(raw.enwik8_bytes(path), np.uint8)
  if os.path.exists(path):
    return np.memmap(path, np.uint8, mode="r")
  return np.frombuffer(path.read_bytes(), np.uint8)  # far away: gs:// and the like


def _check_file(name, path):
  if name not in ("bytes", "enwik8"):
    raise ValueError("is a file, but must be a folder")
  if name == "enwik8":
    raw.enwik8_file(path)
  elif path.stat().length < _MIN_BYTES:
    raise ValueError(f"has {path.stat().length} bytes, but needs {_MIN_BYTES} for its three splits")


def _check_path(name, path, seq_len):
  if path.is_file():
    _check_file(name, path)
    _check_length(path.stat().length, seq_len)
    return
  _check_folder(name)
  if name == "texts":
    # More than are read of .jsonl, whose lines hold other fields too.
    _check_length(sum((path / x).stat().length for x in own.text_names(path)), seq_len)
  else:
    _source(name, seq_len).find(path)


def _check_length(num_bytes, seq_len):
  train, _ = dataset_lib.split_positions(num_bytes)["validation"]
  if train < seq_len:
    raise ValueError(f"its train split has {train:,} bytes, less than model.{seq_len=}")


def _open_sample(name, split):
  if name == "cifar10_sample":
    images = samples.cifar10_images()
    return dataset_lib.Arrays(images[:1000] if split == "train" else images[1000:])
  text = samples.enwik8_bytes() if name == "enwik8_sample" else samples.violin_codes()
  return _part(text, split)
