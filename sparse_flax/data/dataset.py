"""What every data set becomes: byte streams with a name, a split and a fingerprint."""

import copy
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import Protocol
from typing import runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import Int
from jaxtyping import UInt8

RECORD_BYTES = 10_000  # of text and audio; divides enwik8's splits evenly
_DIGEST_RECORDS = 1_000  # at each end


@runtime_checkable
class Streams(Protocol):
  """Byte strings by number, of which any part can be read. An image, a text, a recording is one."""

  lengths: Int[np.ndarray, "N"]

  def read(self, index: int, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
    """Bytes [start, stop) of one stream."""


class Arrays:
  """Streams held in memory (or mapped into it): one row of an array, or one array, each."""

  def __init__(self, arrays: np.ndarray | list[np.ndarray]):
    self.arrays = arrays
    if isinstance(arrays, np.ndarray):
      self.lengths = np.full(len(arrays), arrays[0].size)
    else:
      self.lengths = np.array([array.size for array in arrays])

  def read(self, index: int, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
    return self.arrays[index].reshape(-1)[start:stop]


class LazyImages:
  """Encoded images of one size in a TFDS data source, decoded when they are read."""

  def __init__(self, source: Sequence, shape: tuple[int, int, int], rows: Sequence[int]):
    self.source, self.shape, self.rows = source, shape, rows
    self.lengths = np.full(len(rows), np.prod(shape))

  def read(self, index: int, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
    row = self.rows[index]
    try:
      return decode_image(self.source[row]["image"], self.shape).reshape(-1)[start:stop]
    except ValueError as error:
      raise ValueError(f"image {row} of {self.source!r}: {error}") from error


class Records:
  """Streams cut into consecutive records of RECORD_BYTES in a TFDS data source."""

  def __init__(self, source: Sequence, key: str, first: Sequence[int], lengths: Sequence[int]):
    self.source, self.key, self.first = source, key, first
    self.lengths = np.array(lengths)

  def read(self, index: int, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
    records = range(start // RECORD_BYTES, -(-stop // RECORD_BYTES))
    pieces = [self.source[int(self.first[index]) + i][self.key] for i in records]
    skipped = records.start * RECORD_BYTES
    return np.concatenate(pieces)[start - skipped : stop - skipped]


def decode_image(data: bytes, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "H W 3"]:
  """The pixels of an encoded image; ValueError if it is none, or not of `shape`."""
  try:
    with PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
      pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
  except (OSError, SyntaxError) as error:  # how Pillow reports broken files
    raise ValueError(f"cannot be decoded ({error})") from error
  if pixels.shape != shape:
    raise ValueError(f"is {pixels.shape[0]} x {pixels.shape[1]}, not {shape[0]} x {shape[1]}")
  return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """One split of one data set.

  Attributes:
    name: as in `config.data.name`.
    split: "train", "validation" or "test".
    modality: "image", "text" or "audio".
    image_shape: (rows, columns, channels), or None.
    streams: the bytes. A window never reaches from one stream into the next.
    version: which preparation of which data.
    remark: how the data relates to the published set.
    identity: name, version, split, count (of images, bytes or recordings), num_bytes, digest,
      remark: goes with every result. A run refuses to go on where any of it but the remark differs.
    places: which byte of an image each token of a window is; None: they are in order.
  """

  name: str
  split: str
  modality: str
  image_shape: tuple[int, int, int] | None
  streams: Streams
  version: str
  remark: str
  identity: dict[str, Any] = dataclasses.field(init=False)
  places: Int[np.ndarray, "T"] | None = dataclasses.field(init=False, default=None)

  def __post_init__(self):
    if not self.num_bytes:
      raise ValueError(f"{self.name}: the {self.split} split is empty")
    identity = dict(
      name=self.name,
      version=self.version,
      split=self.split,
      count=self.num_bytes if self.modality == "text" else len(self.streams.lengths),
      num_bytes=self.num_bytes,
      digest=self._digest(),
      remark=self.remark,
    )
    object.__setattr__(self, "identity", identity)

  @property
  def num_bytes(self) -> int:
    return int(self.streams.lengths.sum())

  def read_at(self, places: Int[np.ndarray, "T"] | None) -> "Dataset":
    """The same images, whose windows have their bytes in another order."""
    ordered = copy.copy(self)
    object.__setattr__(ordered, "places", places)
    return ordered

  def _digest(self) -> str:
    """sha256 over the first and the last 1,000 records: images, or 10,000 bytes of the rest."""
    size = int(np.prod(self.image_shape)) if self.image_shape else RECORD_BYTES
    digest = hashlib.sha256()
    for record in _ends(self.streams, size):
      digest.update(record.tobytes())
    return f"sha256:{digest.hexdigest()}"


def _ends(streams: Streams, size: int) -> Iterator[UInt8[np.ndarray, "T"]]:
  ends = np.cumsum(-(-streams.lengths // size))  # of each stream, counted in records
  count = int(ends[-1])
  chosen = range(count)
  if count > 2 * _DIGEST_RECORDS:
    chosen = [*chosen[:_DIGEST_RECORDS], *chosen[-_DIGEST_RECORDS:]]
  for record in chosen:
    index = int(np.searchsorted(ends, record, side="right"))
    length = int(streams.lengths[index])
    start = (record - int(ends[index]) - (-length // size)) * size
    yield streams.read(index, start, min(start + size, length))


def split_positions(num_bytes: int) -> dict[str, tuple[int, int]]:
  """Where each split of one long text begins and ends: 90, 5 and 5 per cent."""
  train, validation = num_bytes * 90 // 100, num_bytes * 95 // 100
  return {"train": (0, train), "validation": (train, validation), "test": (validation, num_bytes)}
