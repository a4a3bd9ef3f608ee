"""TFDS builders that write ArrayRecord files without TensorFlow, records in the published order.

All build shard by shard: TFDS's writer for other builders keeps a split in memory up to 1 GB and
then needs TensorFlow. They are not registered: `prepared.py` opens them by class, and so never
imports what a features.json names.
"""

import functools
import io
import itertools
import re
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from sparse_flax.data import dataset as dataset_lib
from sparse_flax.data import own
from sparse_flax.data import raw
from sparse_flax.data import recordings

_SHARD_BYTES = 2**28  # TFDS holds a shard's examples in memory until it is written
_IMAGES_A_SHARD = 16_384
_AUDIO_SHARDS = 64  # at most; the readers of all shards stay open
_BYTES = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "The published files, in the manual folder."
  DESCRIPTION: ClassVar[str]
  NOTES = False  # whether the builder has metadata
  FEATURES: ClassVar[dict[str, tfds.features.FeatureConnector]]

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(self.FEATURES),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict() if self.NOTES else None,
    )


class Cifar10Binary(_Builder, skip_registration=True):
  """CIFAR-10 from the binary version's files; features as in TFDS's own cifar10."""

  DESCRIPTION = "CIFAR-10 (Krizhevsky 2009) in the order of the published files"
  FEATURES: ClassVar = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=raw.CIFAR_SHAPE, encoding_format="png"),
    "label": tfds.features.ClassLabel(num_classes=10),
  }

  def _shard_iterators_per_split(self, dl_manager):
    files = raw.cifar10_files(dl_manager.manual_dir)
    return {
      split: [functools.partial(self._examples, split, i, paths[i]) for i in range(len(paths))]
      for split, paths in files.items()
    }

  def _examples(self, split, number, file):
    for i, (image, label) in enumerate(zip(*raw.cifar10_images(file), strict=True)):
      png = io.BytesIO()
      PIL.Image.fromarray(image).save(png, "PNG")
      png.seek(0)  # TFDS reads on from where it stands
      row = 10_000 * number + i  # unique, and as in TFDS for files of the published size
      yield row, {"id": f"{split}_{row:05d}", "image": png, "label": label}


class DownsampledImagenet64(_Builder, skip_registration=True):
  """ImageNet-64 (arXiv:1601.06759) from train_64x64.tar and, if there, valid_64x64.tar."""

  DESCRIPTION = "ImageNet downsampled to 64 x 64, PixelRNN release, in the order of the tar files"
  FEATURES: ClassVar = {
    "image": tfds.features.Image(shape=raw.IMAGENET_SHAPE, encoding_format="png")
  }

  def _shard_iterators_per_split(self, dl_manager):
    files = raw.imagenet64_files(dl_manager.manual_dir)
    return {split: _tar_shards(file) for split, file in files.items()}


def _tar_shards(file: epath.Path) -> list[functools.partial]:
  """One generator per 256 MB of a tar file; run in order, they stream it once."""
  size = file.stat().length
  num_shards = max(size // _SHARD_BYTES, 1)
  images = raw.tar_images(file)
  waiting = []  # an image that was read but belongs to the next shard

  def examples(shard: int) -> Iterator[tuple[int, dict]]:
    logging.info("%s: shard %d of %d", file, shard + 1, num_shards)
    end = size * (shard + 1) / num_shards
    for position, png in itertools.chain([waiting.pop()] if waiting else [], images):
      if position >= end:
        waiting.append((position, png))
        return
      yield position, {"image": io.BytesIO(png)}

  return [functools.partial(examples, shard) for shard in range(num_shards)]


class Enwik8Bytes(_Builder, skip_registration=True):
  """The first 10^8 bytes of a Wikipedia dump: 90 million train, 5 validation, 5 test."""

  DESCRIPTION = "enwik8 in consecutive records"
  FEATURES: ClassVar = {"bytes": _BYTES}

  def _shard_iterators_per_split(self, dl_manager):
    text = np.frombuffer(raw.enwik8_bytes(raw.enwik8_file(dl_manager.manual_dir)), np.uint8)
    return {
      split: [functools.partial(_text_examples, text[start:stop])]
      for split, (start, stop) in dataset_lib.split_positions(len(text)).items()
    }


def _text_examples(text):
  for i, record in enumerate(_cut(text)):
    yield i, {"bytes": record}


class AudioFolder(_Builder, skip_registration=True):
  """A folder of WAV and FLAC files as mono mu-law codes at 12 kHz, all in one split "train".

  Which recordings are held out depends on a seed, so it is decided when the set is opened. Each
  record knows the name and the number of codes of its whole recording.
  """

  DESCRIPTION = "8-bit mu-law codes, mono, 12 kHz, in consecutive records"
  FEATURES: ClassVar = {
    "codes": _BYTES,
    "recording": tfds.features.Text(),
    "length": tfds.features.Scalar(dtype=np.int64),
  }

  def _shard_iterators_per_split(self, dl_manager):
    files = list(raw.audio_files(dl_manager.manual_dir).items())
    shards = np.array_split(np.arange(len(files)), min(len(files), _AUDIO_SHARDS))
    return {"train": [functools.partial(_audio_examples, [files[i] for i in s]) for s in shards]}


def _audio_examples(files):
  for name, file in files:
    logging.info("reading %s", file)
    codes = recordings.load_codes(file)
    for i, record in enumerate(_cut(codes)):
      yield f"{name}/{i}", {"codes": record, "recording": name, "length": len(codes)}


class ImageFolder(_Builder, skip_registration=True):
  """A folder of pictures of any size as squares of SIDE x SIDE, all in one split "train".

  Which pictures are held out depends on a seed, so it is decided when the set is opened. The
  metadata tell which files it was prepared from.
  """

  DESCRIPTION = "the middle of each picture, scaled"
  NOTES = True
  SIDE: ClassVar[int]
  SKIP_DAMAGED: ClassVar[bool]

  def _shard_iterators_per_split(self, dl_manager):
    folder = epath.Path(dl_manager.manual_dir)
    names = own.picture_names(folder)
    self.info.metadata["files"] = own.digest(names)
    shards = np.array_split(np.array(names), -(-len(names) // _IMAGES_A_SHARD))
    return {"train": [functools.partial(self._examples, folder, shard) for shard in shards]}

  def _examples(self, folder, names):
    # Pillow decodes and scales without Python's lock.
    with futures.ThreadPoolExecutor() as threads:
      squares = threads.map(lambda name: self._square(folder / name), names.tolist())
      for name, png in zip(names.tolist(), squares, strict=True):
        if png is not None:
          yield name, {"image": io.BytesIO(png), "file": name}

  def _square(self, file: epath.Path) -> bytes | None:
    try:
      pixels = own.square(file.read_bytes(), self.SIDE)
    except ValueError as error:
      if not self.SKIP_DAMAGED:
        raise ValueError(
          f"{file} {error}; to leave out such files: --config.data.skip_damaged=True"
        ) from error
      print(f"left out: {file} {error}", file=sys.stderr, flush=True)
      return None
    png = io.BytesIO()
    PIL.Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


@functools.cache
def image_folder(side: int, *, skip_damaged: bool = False) -> type[ImageFolder]:
  """The builder of pictures of a size: prepared sets of several sizes lie side by side."""
  features = {
    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
    "file": tfds.features.Text(),
  }
  inside = dict(SIDE=side, SKIP_DAMAGED=skip_damaged, FEATURES=features, __module__=__name__)
  return type(ImageFolder)(f"ImageFolder{side}", (ImageFolder,), inside, skip_registration=True)


def named(name: str) -> type[_Builder] | None:
  """Our builder of a prepared set, "NAME/VERSION"; None if it is not ours."""
  if size := re.fullmatch(r"image_folder(\d+)/.*", name):
    return image_folder(int(size[1]))
  return next((x for x in ALL if name == f"{x.name}/{x.VERSION}"), None)


def _cut(values: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(values), dataset_lib.RECORD_BYTES):
    yield values[start : start + dataset_lib.RECORD_BYTES]


ALL = (Cifar10Binary, DownsampledImagenet64, Enwik8Bytes, AudioFolder)
