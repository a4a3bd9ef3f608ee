"""Where the heads of all layers attend for one input, small enough to be kept and looked at.

The unit of a map is a cell: a pixel of a picture, one of the bytes before the predicted one of a
text (and one cell for all earlier ones), an equal share of the time of a sound.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax.model import order as order_lib

TEXT_CELLS = 1_024  # bytes before the predicted one
AUDIO_CELLS = 512


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the tokens of a model lie: as pixels, or one after the other.

  Attributes:
    modality: "image", "text" or "audio".
    seq_len: T.
    rows, columns: of a picture; of text and audio, blocks of `stride` tokens and the tokens of one.
    channels: tokens of a pixel; 1 for text and audio.
    order: of the bytes of a picture.
  """

  modality: str
  seq_len: int
  rows: int
  columns: int
  channels: int = 1
  order: order_lib.Order | None = None

  @classmethod
  def of(cls, model) -> "Layout":
    """The layout of `config.model`."""
    if model.modality == "image":
      order = order_lib.Order.of(model)
      order = None if order.is_raster else order
      return cls(model.modality, model.seq_len, *model.position_shape, order=order)
    return cls(model.modality, model.seq_len, -(-model.seq_len // model.stride), model.stride)

  @property
  def whole(self) -> str:
    """What an input is called."""
    return {"image": "picture", "text": "text", "audio": "recording"}[self.modality]

  @property
  def token(self) -> str:
    """What a place is called."""
    return {"image": "pixel", "text": "byte", "audio": "sample"}[self.modality]

  @property
  def num_places(self) -> int:
    """What can be predicted: pixels, bytes or samples."""
    return self.seq_len // self.channels

  @property
  def cell_size(self) -> int:
    """Tokens of a sound in a cell."""
    return -(-self.seq_len // AUDIO_CELLS)

  @property
  def num_cells(self) -> int:
    match self.modality:
      case "image":
        return self.num_places
      case "text":
        return min(self.seq_len, TEXT_CELLS)
    return -(-self.seq_len // self.cell_size)

  def slots(self, places: Integer[np.ndarray, "P"]) -> Integer[np.ndarray, "Q"]:
    """The query rows that predict the tokens of some places, one place after the other."""
    rows = (places[:, None] * self.channels + np.arange(self.channels)).reshape(-1)
    return rows if self.order is None else self.order.tokens_at[rows].astype(rows.dtype)

  def in_rows(self, weights: Array | np.ndarray) -> Array | np.ndarray:
    """Weights [..., T] on slots as if the bytes of a picture were read row by row.

    Slot j holds token j - 1, and the last token is the last byte in either order.
    """
    if self.order is None:
      return weights
    return weights[..., np.concatenate([[0], 1 + self.order.tokens_at[:-1]])]


@dataclasses.dataclass(frozen=True)
class Maps:
  """Where every head looks to predict some places of one input.

  Attributes:
    places: P predicted pixels, bytes or samples.
    roots: 255 sqrt(weight / top), rounded: weights spread over many cells remain to be seen.
    tops: the largest weight of each map.
  """

  places: Integer[np.ndarray, "P"]
  roots: UInt8[np.ndarray, "L H P cells"]
  tops: Float32[np.ndarray, "L H P"]

  def weights(self) -> Float32[np.ndarray, "L H P cells"]:
    return self.tops[..., None] * np.square(self.roots.astype(np.float32) / np.float32(255))

  def some(self, *, layers: Sequence[int] | slice, places: slice) -> "Maps":
    """Those of some layers and of some places."""
    return Maps(
      self.places[places], self.roots[layers][:, :, places], self.tops[layers][..., places]
    )


def spread_places(layout: Layout, num: int) -> Integer[np.ndarray, "P"]:
  """At most `num` places: a grid over a picture, or evenly from the first eighth to the end."""
  if layout.modality == "image":
    side = max(1, int(num**0.5))
    y, x = (_middles(size, side) for size in (layout.rows, layout.columns))
    return (y[:, None] * layout.columns + x).reshape(-1)
  evenly = np.linspace(layout.seq_len // 8, layout.seq_len - 1, num)
  return np.unique(evenly.round().astype(int))


def random_places(layout: Layout, num: int, *, seed: int) -> Integer[np.ndarray, "P"]:
  """`num` places in order, each at random in an equal part of what follows the first eighth."""
  edges = np.linspace(layout.num_places // 8, layout.num_places, num + 1).astype(int)
  return np.random.RandomState(seed).randint(edges[:-1], edges[1:])


def make_maps(
  graphdef: nnx.GraphDef,
  params: dict,
  tokens: UInt8[np.ndarray, "T"],
  places: Integer[np.ndarray, "P"],
  layout: Layout,
) -> Maps:
  """The maps of one input for some places, by `attention_weights` of the model."""
  reduce = lambda weights: _quantised(_cells(layout.in_rows(weights[0]), places, layout))
  run = lambda params, tokens: nnx.merge(graphdef, params).attention_weights(
    tokens, layout.slots(places), reduce=reduce
  )
  roots, tops = jax.jit(run)(params, jnp.asarray(tokens[None]))
  return Maps(places, np.asarray(roots), np.asarray(tops))


def on_tokens(
  weights: Float[Array, "*Q T"] | Float[np.ndarray, "*Q T"],
) -> Float[Array, "*Q T"]:
  """Weights on slots as weights on tokens.

  The model shifts its input: slot j holds token j - 1, and slot 0 the start vector, which is no
  token, so that its weight falls away. The last token is in no slot.
  """
  return jnp.concatenate([weights[..., 1:], jnp.zeros_like(weights[..., :1])], axis=-1)


def on_pixels(
  weights: Float[Array, "*Q T"] | Float[np.ndarray, "*Q T"], shape: tuple[int, int, int]
) -> Float[Array, "*Q rows columns"]:
  """Weights on slots as weights on the pixels of a picture, its channels summed."""
  return on_tokens(weights).reshape(*weights.shape[:-1], *shape).sum(axis=-1)


def of_pixels(weights: Float[Array, "*B Q T"], layout: Layout) -> Float[Array, "*B P rows columns"]:
  """The same for predicted pixels: the mean over the queries of a pixel's channels."""
  shape = (layout.rows, layout.columns, layout.channels)
  by_query = on_pixels(weights, shape)
  by_pixel = by_query.reshape(*weights.shape[:-2], -1, layout.channels, *shape[:2])
  return by_pixel.mean(axis=-3)


def _cells(
  weights: Float[Array, "H Q T"], places: Integer[np.ndarray, "P"], layout: Layout
) -> Float[Array, "H P cells"]:
  if layout.modality == "image":
    return of_pixels(weights, layout).reshape(len(weights), len(places), -1)
  if layout.modality == "text":
    # Cell n is byte place - 1 - n, which slot place - n holds; the last is all that lies further
    # back, with the start vector.
    near = layout.num_cells - 1
    slots = places[:, None] - np.arange(near)
    held = jnp.take_along_axis(weights, np.maximum(slots, 0)[None], axis=-1)
    is_earlier = np.arange(layout.seq_len) <= np.maximum(0, places[:, None] - near)
    earlier = jnp.where(is_earlier[None], weights, 0.0).sum(axis=-1, keepdims=True)
    return jnp.concatenate([jnp.where((slots > 0)[None], held, 0.0), earlier], axis=-1)
  cells = layout.num_cells
  end = cells * layout.cell_size - layout.seq_len
  by_time = jnp.pad(weights[..., 1:], ((0, 0), (0, 0), (0, 1 + end)))  # slot j holds token j - 1
  return by_time.reshape(*weights.shape[:2], cells, -1).sum(axis=-1)


def _quantised(cells: Float[Array, "H P cells"]):
  cells = jnp.maximum(jnp.nan_to_num(cells), 0.0)
  tops = cells.max(axis=-1)
  roots = jnp.sqrt(cells / jnp.where(tops > 0, tops, 1.0)[..., None])
  return jnp.round(255.0 * roots).astype(jnp.uint8), tops


def _middles(size: int, num: int) -> np.ndarray:
  """`num` of `size` places, in the middles of equal parts."""
  return np.unique(((np.arange(min(num, size)) + 0.5) * size / min(num, size)).astype(int))
