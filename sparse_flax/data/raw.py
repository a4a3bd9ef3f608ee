"""The files in which the data sets are published: where they are, whether they are sound."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from sparse_flax.data import audio
from sparse_flax.data import compressed
from sparse_flax.data import flac
from sparse_flax.data import own

CIFAR_SHAPE = (32, 32, 3)
IMAGENET_SHAPE = (64, 64, 3)
CIFAR_ROW = 1 + 3 * 32 * 32  # a label byte, then the red, the green and the blue plane
ENWIK8_BYTES = 100_000_000
TAR_NAMES = {"train": "train_64x64.tar", "validation": "valid_64x64.tar"}
_TAR_END = 1_024  # zeros, at least, behind the last file
_PNG_MODES = ("RGB", "L", "P", "1")  # what becomes three bytes a pixel and loses nothing


def cifar10_files(folder: epath.Path) -> dict[str, list[epath.Path]]:
  """The binary version's files per split, sizes checked. Only the first train file is a must."""
  train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
  if not train[0].exists():
    raise ValueError(
      "holds neither a prepared cifar10 nor data_batch_1.bin to data_batch_5.bin and "
      "test_batch.bin (the folder cifar-10-batches-bin from the archive cifar-10-binary.tar.gz)"
    )
  test = [folder / "test_batch.bin"]
  files = {"train": [f for f in train if f.exists()], "test": [f for f in test if f.exists()]}
  for file in files["train"] + files["test"]:
    size = file.stat().length
    if not size or size % CIFAR_ROW:
      raise ValueError(
        f"{file.name} has {size:,} bytes, not a multiple of {CIFAR_ROW:,} (the published one has "
        "30,730,000): it is cut off or another format; fetch cifar-10-binary.tar.gz again"
      )
  return {split: paths for split, paths in files.items() if paths}


def cifar10_images(file: epath.Path) -> tuple[UInt8[np.ndarray, "N 32 32 3"], list[int]]:
  """Images, as row, column, channel, and labels of one binary file."""
  rows = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, CIFAR_ROW)
  if rows[:, 0].max() > 9:
    raise ValueError(f"{file.name} has labels beyond 9: it is not of CIFAR-10's binary version")
  return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0].tolist()


def enwik8_file(path: epath.Path) -> epath.Path:
  """The file `enwik8` (or enwik8.zip) in a folder, size checked; `path` may be the file itself."""
  names = [path / "enwik8", path / "enwik8.zip"] if path.is_dir() else [path]
  file = next((name for name in names if name.is_file()), None)
  if file is None:
    raise ValueError("holds neither a prepared enwik8 nor the file enwik8 or enwik8.zip")
  try:
    size = _zip_size(file) if file.suffix == ".zip" else file.stat().length
  except (zipfile.BadZipFile, KeyError) as error:
    raise ValueError(f"{file.name} is not the published archive of enwik8 ({error})") from error
  if size != ENWIK8_BYTES:
    raise ValueError(
      f"{file.name} has {size:,} bytes, enwik8 has exactly {ENWIK8_BYTES:,}; "
      "for another text take data.name='bytes'"
    )
  return file


def enwik8_bytes(file: epath.Path) -> bytes:
  """The text in what `enwik8_file` found."""
  if file.suffix != ".zip":
    return file.read_bytes()
  try:
    with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
      return archive.read("enwik8")
  except (zipfile.BadZipFile, zlib.error, EOFError) as error:
    raise ValueError(f"{file.name} is damaged ({error}): fetch it again") from error


def _zip_size(file):
  with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
    return archive.getinfo("enwik8").file_size


def imagenet64_files(folder: epath.Path) -> dict[str, epath.Path]:
  """The tar file of each split; train must be there. Checks their ends and first images."""
  files = {split: folder / name for split, name in TAR_NAMES.items() if (folder / name).exists()}
  if "train" not in files:
    raise ValueError(
      "holds neither a prepared downsampled_imagenet/64x64 nor train_64x64.tar and valid_64x64.tar"
    )
  for file in files.values():
    with file.open("rb") as raw:
      size = file.stat().length
      raw.seek(max(size - _TAR_END, 0))
      if size < _TAR_END or any(raw.read()):
        raise ValueError(f"{file.name} ({size:,} bytes) is cut off or not a tar file")
    next(tar_images(file))
  return files


def tar_images(file: epath.Path) -> Iterator[tuple[int, bytes]]:
  """Streams (position in the tar file, PNG bytes) of each image; nothing is unpacked to disk.

  Raises:
    ValueError: if an image is damaged or none of 64 x 64, or if the archive does not go on to the
      end of the file.
  """
  has_images = False
  try:
    with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
      for member in tar:
        if member.isfile() and member.name.endswith(".png"):
          has_images = True
          content = tar.extractfile(member)
          assert content is not None  # as of all files
          png = content.read()
          _check_png(f"{member.name} in {file.name}", png)
          yield member.offset, png
      # tarfile takes a header that it cannot read for the end.
      _check_end(file.name, raw, tar.offset)
  except tarfile.TarError as error:
    raise ValueError(f"{file.name} is cut off or not a tar file ({error})") from error
  if not has_images:
    raise ValueError(f"{file.name} holds no PNG image")


def _check_end(name, raw, position):
  """Raises ValueError unless zeros, two blocks of them at least, are all from `position` on."""
  raw.seek(position)
  zeros = 0
  while content := raw.read(2**20):
    if any(content):
      raise ValueError(
        f"{name} is damaged at byte {position:,}: there is neither the header of a file nor the "
        "end of the archive, so that the rest would be lost; fetch it again"
      )
    zeros += len(content)
  if zeros < _TAR_END:
    raise ValueError(f"{name} is cut off: it does not end in {_TAR_END:,} zeros")


def _check_png(name, png):
  try:
    with PIL.Image.open(io.BytesIO(png), formats=("PNG",)) as image:
      size, mode = image.size, image.mode
      image.verify()  # the checksums of its parts; pixels are not decoded
  except PIL.UnidentifiedImageError as error:
    raise ValueError(f"{name} is not a PNG image") from error
  except (OSError, SyntaxError) as error:  # how Pillow reports broken files
    raise ValueError(f"{name} is damaged ({error})") from error
  if size != IMAGENET_SHAPE[:2]:
    raise ValueError(f"{name} is a PNG of {size[0]} x {size[1]}, not a PNG of 64 x 64")
  if mode not in _PNG_MODES:
    raise ValueError(f"{name} is a PNG of mode {mode}, whose pixels are not 3 bytes each")


def audio_files(folder: epath.Path) -> dict[str, epath.Path]:
  """All recordings below a folder by relative name; their headers are checked."""
  files = {name: folder / name for name in audio_names(folder)}
  if not files:
    raise ValueError(f"holds no prepared audio_folder and no recording ({', '.join(AUDIO)})")
  for file in files.values():
    AUDIO[file.suffix.lower()](file)
  return files


def audio_names(folder: epath.Path) -> list[str]:
  """Relative names of all recordings below a folder, in order."""
  return own.names(folder, AUDIO)


AUDIO: dict[str, Callable[[epath.Path], None]] = {
  ".flac": flac.check,
  ".mp3": compressed.check,
  ".oga": compressed.check,
  ".ogg": compressed.check,
  ".wav": audio.check_wav,
}
