"""The order in which a model reads the bytes of an image: row by row, or patch by patch."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int32
from jaxtyping import Shaped

ORDERS = ("raster", "patches")


@dataclasses.dataclass(frozen=True)
class Order:
  """Which byte of an image each token is.

  In the order "patches" squares of `patch` x `patch` pixels follow each other row by row, inside
  of each its pixels row by row, and of each pixel its channels. The first and the last byte are
  those of the image in either order.

  >>> Order("patches", (2, 4, 1), 2).places.tolist()
  [0, 1, 4, 5, 2, 3, 6, 7]

  Attributes:
    name: one of ORDERS.
    shape: (rows, columns, channels) of an image; whatever else has positions is in "raster".
    patch: pixels of a side, which divides rows and columns.
  """

  name: str
  shape: tuple[int, ...]
  patch: int = 2

  def __post_init__(self):
    if self.name not in ORDERS:
      raise ValueError(f"order={self.name!r}: must be one of {ORDERS}")
    if self.is_raster:
      return
    if len(self.shape) != 3:
      raise ValueError(f"order={self.name!r}: must be 'raster' for what is no image")
    if self.patch < 1 or any(size % self.patch for size in self.shape[:2]):
      rows, columns, _ = self.shape
      raise ValueError(f"patch={self.patch}: must divide {rows} rows and {columns} columns")

  @classmethod
  def of(cls, model: Any) -> "Order":
    """That of `config.model`; of one without the fields row by row."""
    name, patch = getattr(model, "order", "raster"), getattr(model, "patch", 2)
    return cls(name, tuple(model.position_shape), patch)

  @property
  def is_raster(self) -> bool:
    return self.name == "raster"

  @property
  def places(self) -> Int32[np.ndarray, "T"]:
    """The byte of the image, counted row by row, that each token is."""
    return _places(self)

  @property
  def tokens_at(self) -> Int32[np.ndarray, "T"]:
    """The token that each byte of the image is."""
    return _tokens_at(self)

  def read(self, image: Shaped[np.ndarray, "*B T"]) -> Shaped[np.ndarray, "*B T"]:
    """Bytes that are row by row, as the model reads them."""
    return image if self.is_raster else image[..., self.places]

  def drawn(self, tokens: Shaped[np.ndarray, "*B T"]) -> Shaped[np.ndarray, "*B T"]:
    """Bytes that are as the model reads them, row by row; the inverse of `read`."""
    return tokens if self.is_raster else tokens[..., self.tokens_at]


@functools.lru_cache(maxsize=8)
def _places(order: Order) -> np.ndarray:
  places = np.arange(np.prod(order.shape), dtype=np.int32)
  if not order.is_raster:
    (rows, columns, channels), p = order.shape, order.patch
    cut = places.reshape(rows // p, p, columns // p, p, channels)
    places = np.ascontiguousarray(cut.swapaxes(1, 2).reshape(-1))
  places.flags.writeable = False
  return places


@functools.lru_cache(maxsize=8)
def _tokens_at(order: Order) -> np.ndarray:
  tokens = np.argsort(order.places).astype(np.int32)
  tokens.flags.writeable = False
  return tokens
