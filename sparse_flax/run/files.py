"""Files of a run, on a disk or in an object store: there whole or not at all."""

import os
import uuid

from etils import epath


def write(path: epath.Path, content: bytes) -> None:
  """Writes a file that others may read, or write as well, meanwhile: they find the old or the new.

  Whoever is killed before the end leaves a file NAME.*.tmp beside it.
  """
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  temporary.write_bytes(content)
  temporary.replace(path)


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is that of an object store, such as gs://..., which cannot append."""
  return "://" in os.fspath(path)
