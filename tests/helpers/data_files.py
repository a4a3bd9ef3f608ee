"""Writes data sets in their published formats, small, out of the packaged samples' real bytes."""

import io
import os
import tarfile
from typing import ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from sparse_flax import data
from sparse_flax.data import samples

SEQ_LENS = {"cifar10": 3_072, "downsampled_imagenet/64x64": 12_288, "enwik8": 256, "audio": 256}


def open_split(name, path, split="train", seed=0):
  seq_len = SEQ_LENS.get(name, 3_072 if "cifar10" in name else 256)
  return data.open_dataset(name, path=str(path), split=split, seq_len=seq_len, split_seed=seed)


def check(name, path):
  return data.check(name, path=str(path), seq_len=SEQ_LENS.get(name, 256))


def everything(dataset):
  return [dataset.streams.read(i, 0, int(n)) for i, n in enumerate(dataset.streams.lengths)]


def cifar_bytes(images, labels):
  planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
  return np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8).tobytes()


def write_cifar10(folder, *, num=50, test=True):
  images = samples.cifar10_images()
  for i in range(1, 6):
    part = images[(i - 1) * num : i * num]
    (folder / f"data_batch_{i}.bin").write_bytes(cifar_bytes(part, np.arange(num) % 10))
  if test:
    (folder / "test_batch.bin").write_bytes(cifar_bytes(images[-20:], np.arange(20) % 10))
  return images[: 5 * num].reshape(5 * num, -1)


def png(image):
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, "PNG")
  return file.getvalue()


def write_tar(path, files):
  with tarfile.open(path, "w") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def images_of_64(num):
  tiles = samples.cifar10_images()[: 4 * num].reshape(num, 2, 2, 32, 32, 3)
  return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(num, 64, 64, 3)


def write_imagenet64(folder, *, validation=True):
  images = images_of_64(44)
  named = lambda split, part: {f"{split}_64x64/{i:07d}.png": png(x) for i, x in enumerate(part)}
  write_tar(folder / "train_64x64.tar", named("train", images[:40]))
  if validation:
    write_tar(folder / "valid_64x64.tar", named("valid", images[40:]))
  return images.reshape(44, -1)


def write_recordings(folder, num=8):
  codes = samples.violin_codes()
  written = {}
  (folder / "2009").mkdir()
  for i in range(num):
    part = codes[i * 30_000 : i * 30_000 + 15_000 + 1_000 * i]
    name = f"2009/piece {i}.wav" if i % 2 else f"piece {i}.WAV"
    data.write_wav(folder / name, data.mu_law_decode(part))
    written[name] = part
  (folder / "LICENSE.txt").write_text("not a recording")
  return written


class OwnCifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes what TFDS's cifar10 writes: another order, and ids that tell the first one."""

  name = "cifar10"
  VERSION = tfds.core.Version("3.0.2")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "none"

  def _info(self):
    features = {
      "id": tfds.features.Text(),
      "image": tfds.features.Image(shape=(32, 32, 3)),
      "label": tfds.features.ClassLabel(num_classes=10),
    }
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, description="", features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, image in enumerate(samples.cifar10_images()[:250]):
      yield i, {"id": f"train_{i:05d}", "image": io.BytesIO(png(image)), "label": 0}


class OwnImagenet64(OwnCifar10, skip_registration=True):
  name = "downsampled_imagenet"
  BUILDER_CONFIGS: ClassVar = [
    tfds.core.BuilderConfig(name="64x64", version="2.0.0", description="")
  ]

  def _info(self):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
    return tfds.core.DatasetInfo(builder=self, description="", features=features)

  def _split_generators(self, dl_manager):
    images = images_of_64(44)
    parts = {"train": images[:40], "validation": [*images[40:], images[0][:63]]}
    return {split: self._generate_examples(part) for split, part in parts.items()}

  def _generate_examples(self, images):
    for i, image in enumerate(images):
      yield i, {"image": io.BytesIO(png(image))}


def prepare_own(builder_class, folder):
  builder = builder_class(data_dir=folder, file_format="array_record")
  builder.download_and_prepare(download_dir=folder / "downloads")
  return folder / os.path.relpath(builder.data_dir, folder)
