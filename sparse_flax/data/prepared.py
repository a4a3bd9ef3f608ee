"""Finds, makes and opens TFDS folders in ArrayRecord format, without TensorFlow."""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import cast

from etils import epath


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared folder, as its dataset_info.json describes it."""

  data_dir: epath.Path
  name: str  # relative to data_dir: "cifar10/3.0.2"
  num_records: Mapping[str, int] = dataclasses.field(hash=False)  # of each split

  @property
  def folder(self) -> epath.Path:
    return self.data_dir / self.name


def find(data_dir: epath.Path, names: Sequence[str]) -> Prepared | None:
  """The newest version of the first of the named sets that a TFDS data_dir holds.

  Raises:
    ValueError: if that one was not written as ArrayRecord, or its description is broken.
  """
  for name in names:
    versions = [v for v in _subfolders(data_dir / name) if (v / "dataset_info.json").exists()]
    if not versions:
      continue
    folder = max(versions, key=lambda v: [int(part) for part in v.name.split(".")])
    try:
      info = json.loads((folder / "dataset_info.json").read_text())
      num_records = {s["name"]: sum(map(int, s["shardLengths"])) for s in info["splits"]}
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{folder}/dataset_info.json is broken ({error!r})") from error
    if info.get("fileFormat") != "array_record":
      raise ValueError(
        f"{folder} is stored as {info.get('fileFormat', 'tfrecord')}, which has no random access: "
        "prepare it with file_format='array_record', or give another folder"
      )
    return Prepared(data_dir, f"{name}/{folder.name}", num_records)
  return None


def _subfolders(folder):
  if not folder.is_dir():
    return []
  return [v for v in folder.iterdir() if all(part.isdecimal() for part in v.name.split("."))]


def prepare(data_dir: epath.Path, builder_of: Callable[[Any], Any]) -> None:
  """Writes the set of one of our builders from the published files in `data_dir` into it.

  When several hosts do this at once in one folder, the first to finish wins and all go on.

  Args:
    data_dir: the folder.
    builder_of: takes the module of the builders, and gives one of them.

  Raises:
    ValueError: if a file is broken or the folder cannot be written.
  """
  import tensorflow_datasets as tfds  # slow to import, and most runs read something smaller

  from sparse_flax.data import builders

  builder = builder_of(builders)(data_dir=data_dir, file_format="array_record")
  config = tfds.download.DownloadConfig(manual_dir=data_dir)
  print(f"Preparing {builder.name} in {data_dir}, once.", file=sys.stderr, flush=True)
  try:
    # TFDS prints and makes folders for downloads, of which there are none.
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as downloads:
      builder.download_and_prepare(download_dir=downloads, download_config=config)
  except OSError as error:
    if not builder.is_prepared():  # otherwise another host was faster
      raise ValueError(f"cannot be prepared: {error}") from error
  finally:
    with contextlib.suppress(OSError):  # leave no empty folder behind after a failure
      os.rmdir(data_dir / builder.name)


def check_writable(folder: epath.Path) -> None:
  """Raises ValueError if `prepare` could not write into a local folder."""
  if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
    raise ValueError(
      "cannot be written, but the set is prepared once into this folder: "
      "make it writable, or copy the files to a folder that is"
    )


def open_split(prepared: Prepared, split: str) -> Sequence:
  """A TFDS data source of dicts, one split; images come as they are stored, not decoded."""
  import tensorflow_datasets as tfds  # as above

  from sparse_flax.data import builders

  folder = prepared.folder
  if own := builders.named(prepared.name):
    builder = own(data_dir=prepared.data_dir)
  else:
    check_features(folder)
    builder = tfds.builder_from_directory(folder)
  missing = [p.name for p in builder.info.splits[split].filepaths if not p.exists()]
  if missing:
    raise ValueError(f"{folder} lacks {missing[0]}: delete the folder and prepare it again")
  decoders = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
  return cast(Any, builder).as_data_source(split, decoders=decoders)


def metadata(prepared: Prepared) -> dict[str, Any]:
  """What its builder has noted beside the set."""
  file = prepared.folder / "metadata.json"
  return json.loads(file.read_text()) if file.exists() else {}


def check_features(folder: epath.Path) -> None:
  """Raises ValueError if features.json makes TFDS import a module that is not TFDS's own."""

  def check(node):
    for key in ("pythonClassName", "python_class_name", "type"):  # TFDS follows each of them
      name = node.get(key)
      # A nested "type" is a message of its own and comes through here by itself.
      if isinstance(name, str) and name and not name.startswith("tensorflow_datasets."):
        raise ValueError(f"{folder}/features.json asks to import {name!r}, which is not TFDS's")
    return node

  json.loads((folder / "features.json").read_text(), object_hook=check)
