"""The data sets of the paper: opened where TFDS prepared them, or prepared from published files.

Folders of one's own pictures are prepared in the same way.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from sparse_flax.data import dataset as dataset_lib
from sparse_flax.data import own
from sparse_flax.data import prepared as prepared_lib
from sparse_flax.data import raw

# Images of the published splits, to tell them from a part or from another set of that name.
_CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
_IMAGENET_COUNTS = {"train": 1_281_149, "validation": 49_999}


@dataclasses.dataclass(frozen=True)
class Published:
  """Where a data set may be found and how it is opened.

  Attributes:
    modality, image_shape: as in `Dataset`.
    folders: names of prepared folders, the preferred one first.
    files: names of published files, some of which tell that a folder is one of this set.
    builder: of the module of builders, the one that prepares it.
    check_files: finds the published files in a folder, or raises ValueError.
    open: (prepared, split, split_seed) -> (streams, remark).
  """

  modality: str
  image_shape: tuple[int, int, int] | None
  folders: Sequence[str]
  files: Sequence[str]
  builder: Callable[[Any], Any]
  check_files: Callable[[epath.Path], Any]
  open: Callable[[prepared_lib.Prepared, str, int], tuple[dataset_lib.Streams, str]]

  def is_in(self, folder: epath.Path) -> bool:
    """Whether something of the set lies there, sound or not."""
    return any((folder / name).exists() for name in (*self.folders, *self.files))

  def find(self, path: epath.Path) -> prepared_lib.Prepared | None:
    """The prepared set in `path`, or None if it holds published files ready to be prepared."""
    prepared = prepared_lib.find(path, self.folders)
    if prepared is None:
      self.check_files(path)
      prepared_lib.check_writable(path)
    return prepared

  def find_or_prepare(self, path: epath.Path) -> prepared_lib.Prepared:
    prepared = self.find(path)
    if prepared is None:
      prepared_lib.prepare(path, self.builder)
      prepared = prepared_lib.find(path, self.folders)
      assert prepared is not None, "what was just prepared is there"
    return prepared


def _open_cifar10(prepared, split, split_seed):
  source_split = "test" if split == "test" else "train"
  if source_split not in prepared.num_records:
    raise ValueError(
      f"the prepared {prepared.name} has no test split, for lack of test_batch.bin: "
      f"put that file there and delete {prepared.folder}"
    )
  images = _decode_cifar10(prepared, source_split)
  rows = np.arange(len(images))
  if split != "test":
    # 2,000 of 50,000, chosen like scikit-learn's train_test_split(test_size=2000, random_state=
    # split_seed) in the authors' later release: the first rows of this permutation are held out.
    order = np.random.RandomState(split_seed).permutation(len(images))
    held_out = len(images) // 25
    rows = order[:held_out] if split == "validation" else order[held_out:]
  remark = _count_remark(len(images), _CIFAR_COUNTS[source_split], source_split)
  return dataset_lib.Arrays([images[row] for row in rows]), remark


@functools.lru_cache(maxsize=1)  # train and validation share one array
def _decode_cifar10(prepared, split):
  source: Any = prepared_lib.open_split(prepared, split)
  images = np.empty((len(source), *raw.CIFAR_SHAPE), np.uint8)
  ids = []
  for start in range(0, len(source), 1000):  # many records at a time are read in parallel
    rows = range(start, min(start + 1000, len(source)))
    for row, example in zip(rows, source.__getitems__(rows), strict=True):
      images[row] = dataset_lib.decode_image(example["image"], raw.CIFAR_SHAPE)
      ids.append(example["id"])
  return images[np.argsort(ids)]  # TFDS shuffles when it writes; ids number the published order


def _open_imagenet64(prepared, split, split_seed):
  del split_seed  # the splits are published
  source_split = "train" if split == "train" else "validation"
  has_validation = "validation" in prepared.num_records
  source = prepared_lib.open_split(prepared, source_split if has_validation else "train")
  rows = range(len(source))
  remark = _count_remark(len(source), _IMAGENET_COUNTS[source_split], source_split)
  if not has_validation:
    held_out = max(len(source) // 20, 1)
    rows = rows[:-held_out] if split == "train" else rows[-held_out:]
    remark = f"not the published set: valid_64x64.tar is missing, {held_out:,} images are held out"
  return dataset_lib.LazyImages(source, raw.IMAGENET_SHAPE, rows), remark


def _count_remark(count, published, split):
  if count == published:
    return "the published set"
  return f"not the published set: {count:,} {split} images instead of {published:,}"


def _open_enwik8(prepared, split, split_seed):
  del split_seed  # the splits are published
  source = prepared_lib.open_split(prepared, split)
  length = (len(source) - 1) * dataset_lib.RECORD_BYTES + len(source[len(source) - 1]["bytes"])
  return dataset_lib.Records(source, "bytes", [0], [length]), "the published set"


def _open_audio(prepared, split, split_seed):
  source = prepared_lib.open_split(prepared, "train")
  first, lengths, names = [], [], []
  record = 0
  while record < len(source):
    example = source[record]
    first.append(record)
    lengths.append(int(example["length"]))
    names.append(example["recording"].decode())
    record += -(-lengths[-1] // dataset_lib.RECORD_BYTES)
  if raw_names := raw.audio_names(prepared.data_dir):
    changed = sorted(set(raw_names).symmetric_difference(names))
    if changed:
      raise ValueError(
        f"{changed[0]} was added or taken away after the set was prepared: delete {prepared.folder}"
      )
  if len(names) < 3:
    raise ValueError(f"holds {len(names)} recordings, but train, validation and test need one each")
  rows = _rows_of(split, len(names), split_seed)
  streams = dataset_lib.Records(
    source, "codes", [first[row] for row in rows], [lengths[row] for row in rows]
  )
  return streams, "a folder of recordings: not comparable with the paper's piano set"


def _rows_of(split, count, split_seed):
  """Of pictures or recordings: 5 % each, but one at least, for test and validation."""
  held_out = max(round(count * 0.05), 1)
  order = np.random.RandomState(split_seed).permutation(count)
  parts = np.split(order, [held_out, 2 * held_out])
  return np.sort(dict(zip(("test", "validation", "train"), parts, strict=True))[split])


def images(side: int, *, skip_damaged: bool) -> Published:
  """A folder of one's own pictures, as squares of side x side."""

  def open_images(prepared, split, split_seed):
    source = prepared_lib.open_split(prepared, "train")
    there = own.names(prepared.data_dir, own.PICTURES)
    if there and own.digest(there) != prepared_lib.metadata(prepared).get("files"):
      raise ValueError(
        "pictures were added or taken away after the set was prepared: delete "
        f"{prepared.folder.parent}"
      )
    if len(source) < 3:
      raise ValueError(f"{len(source)} pictures are left, but each split needs one")
    rows = _rows_of(split, len(source), split_seed).tolist()
    remark = f"a folder of pictures, the middle of each scaled to {side} x {side}"
    return dataset_lib.LazyImages(source, (side, side, 3), rows), remark

  return Published(
    modality="image",
    image_shape=(side, side, 3),
    folders=(f"image_folder{side}",),
    files=(),
    builder=lambda builders: builders.image_folder(side, skip_damaged=skip_damaged),
    check_files=own.picture_names,
    open=open_images,
  )


PUBLISHED = {
  "cifar10": Published(
    modality="image",
    image_shape=raw.CIFAR_SHAPE,
    folders=("cifar10_binary", "cifar10"),
    files=("data_batch_1.bin", "test_batch.bin"),
    builder=lambda builders: builders.Cifar10Binary,
    check_files=raw.cifar10_files,
    open=_open_cifar10,
  ),
  "downsampled_imagenet/64x64": Published(
    modality="image",
    image_shape=raw.IMAGENET_SHAPE,
    folders=("downsampled_imagenet64", "downsampled_imagenet/64x64"),
    files=tuple(raw.TAR_NAMES.values()),
    builder=lambda builders: builders.DownsampledImagenet64,
    check_files=raw.imagenet64_files,
    open=_open_imagenet64,
  ),
  "enwik8": Published(
    modality="text",
    image_shape=None,
    folders=("enwik8_bytes",),  # not "enwik8": the published file has that name
    files=("enwik8", "enwik8.zip"),
    builder=lambda builders: builders.Enwik8Bytes,
    check_files=raw.enwik8_file,
    open=_open_enwik8,
  ),
  "audio": Published(
    modality="audio",
    image_shape=None,
    folders=("audio_folder",),
    files=(),
    builder=lambda builders: builders.AudioFolder,
    check_files=raw.audio_files,
    open=_open_audio,
  ),
}
