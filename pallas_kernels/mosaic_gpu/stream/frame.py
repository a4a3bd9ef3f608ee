"""Which pairs a streaming kernel computes by formula, and where their rows lie in memory.

A `Frame` is a pass at one size. Each view of the sequence has a class of its own (views.py,
summaries.py); lists of blocks are one more (listed.py):

    natural     [B, T, H, D]: one sequence
    columns     [B, T/l, l, H, D]: l sequences, of the rows at one place in their groups of l
    blocks      the same array: T/l sequences of l rows that are neighbours
    summaries   natural queries; keys are `width` columns of that array, row after row
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import Num

from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import pick
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.tiles import KeyTiles
from pallas_kernels.mosaic_gpu.stream.tiles import QueryTiles
from pallas_kernels.mosaic_gpu.stream.work import Work
from pallas_kernels.mosaic_gpu.views import Band

ROWS = 128  # what the rows of lse and delta are padded to
COPY_ROWS = 8  # the copy engine's tiles have 8 rows: a sequence has whole ones of them


class Frame:
  """A pass at one size: shapes, places in memory, tiles and masks; of a view, by its class.

  Attributes:
    sequences, length: R sequences of M rows each, of queries.
    padded: M in whole tiles of `ROWS`, as lse and delta have them.
    spare: rows that a sequence lacks to whole tiles of the copy engine.
    num_keys: of a sequence, with those that only fill tiles.
    has_full: whether there are tiles that need no mask.
    distance, window: a query attends to keys at least `distance` and less than `window` rows of its
      sequence before it; None: no end.
    scores: how logits are made; None where they are products times a factor.

  Args:
    pass_: what is swept.
    T: tokens; a multiple of the pass's stride, except for "natural".
    num_heads: query heads of q.
    num_kv_heads: heads of k and v.
    heads: the query heads of this launch.
    segments: whether segment ids mask as well.
    own: whether the keys j <= i of the query's own row are swept too, under the same softmax
      (forward and dq of finished summaries: a merged head in one sweep).
  """

  takes_segments = True
  scores = None

  def __init__(
    self,
    pass_: Pass,
    T: int,
    num_heads: int,
    num_kv_heads: int,
    heads: range | tuple[int, ...],
    segments: bool = False,
    own: bool = False,
  ):
    view, stride = pass_.view, pass_.stride
    if view != "natural" and T % stride:
      raise ValueError(f"{T=} must be a multiple of {stride=} in {view=}")
    if segments and not self.takes_segments:
      raise NotImplementedError(f"segment ids in {view=}")
    self.pass_, self.T, self.heads, self.segments, self.own = pass_, T, tuple(heads), segments, own
    band = Band.of(pass_)
    self.distance, self.window = band.near, band.far
    self.group = num_heads // num_kv_heads
    self.sequences, self.length = self.shape(T, stride)
    self.padded = -(-self.length // ROWS) * ROWS
    # Rows that lie past the end are zeros in memory: the copy engine takes whole groups.
    self.spare = -self.length % COPY_ROWS
    self.num_keys = self.length
    # A segment may end in any tile.
    self.has_full = not segments

  # ------------------------------------------------------------------------------------ arrays

  def shape(self, T: int, stride: int) -> tuple[int, int]:
    """Sequences, and rows of each."""
    raise NotImplementedError

  def folded(self, x: Num[Array, "B T H D"]) -> Num[Array, "B *T H D"]:
    """[B, T, H, D] as the view reads queries: free, except for sequences of odd lengths."""
    raise NotImplementedError

  def unfolded(self, x: Num[Array, "B *T H D"]) -> Num[Array, "B T H D"]:
    """The way back from `folded`."""
    raise NotImplementedError

  def keys(self, x: Num[Array, "B T H D"]) -> Num[Array, "B *T H D"]:
    """[B, T, Hkv, D] as the view reads keys."""
    return self.folded(x)

  def ids(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B R Mp"]:
    """Segment ids of every sequence of queries, or of keys, padded to whole tiles."""
    # And two tiles more: the first of three warpgroups may be at the last one, and ids, unlike
    # tiles, are not clipped.
    x = segment_ids.reshape(segment_ids.shape[0], self.sequences, -1)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % ROWS + 2 * TILE)])

  def lists(self, transposed: bool) -> dict[str, Array]:
    """Arrays that say what to sweep, of a launch over queries, or over keys."""
    del transposed
    return {}

  def further_inputs(
    self,
    k: Num[Array, "B S Hkv Dk"],
    v: Num[Array, "B S Hkv Dv"],
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    transposed: bool = False,
  ) -> dict[str, Array]:
    """What a launch reads besides q, k, v and what belongs to queries."""
    inputs = self.lists(transposed)
    if self.own and not transposed:
      inputs |= dict(own_k=self.folded(k), own_v=self.folded(v))
    if segment_ids is not None:
      inputs |= dict(ids=self.ids(segment_ids))
    if kv_segment_ids is not None:
      inputs |= dict(kv_ids=self.ids(kv_segment_ids))
    return inputs

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    """The shape of dk or dv as the kernel stores it, of the heads of the launch."""
    raise NotImplementedError

  def key_grads(self, x: Array) -> Array:
    """dk or dv without the rows that fill tiles."""
    return self.unfolded(x)

  # -------------------------------------------------------------------------- places in memory

  def head(self, h: Scalar) -> Scalar:
    """The query head of head h of the launch."""
    # Regular heads by arithmetic: comparing takes an instruction for each of them.
    step = self.heads[1] - self.heads[0] if len(self.heads) > 1 else 0
    if self.heads == tuple(self.heads[0] + n * step for n in range(len(self.heads))):
      return self.heads[0] + h * step
    return pick(h, self.heads)

  def kv_head(self, h: Scalar) -> Scalar:
    """The head of k and v that it reads."""
    return div(self.head(h), self.group)

  def tile(self, ref: Any, b: Scalar, r: Scalar, start: Scalar, size: int, h: Scalar) -> Any:
    """`size` rows of sequence r of an array as `folded` returns it."""
    raise NotImplementedError

  def copies(self, step: int) -> int:
    """Copies that fill a tile of `step` keys."""
    del step
    return 1

  def in_boxes(self, step: int, D: int, dtype: Any) -> bool:
    """Whether one copy fills a key tile with rows that lie apart (`Summaries.boxes`)."""
    del step, D, dtype
    return False

  def load_keys(self, copy: Callable, source: Any, item: Item, tile: Scalar, step: int) -> None:
    """Copies key tile `tile`; `copy(piece of the source, first row, rows)`."""
    rows = self.tile(source, item["b"], item["r"], tile * step, step, self.kv_head(item["h"]))
    copy(rows, 0, step)

  def store_keys(
    self,
    copy: Callable,
    target: Any,
    b: Scalar,
    r: Scalar,
    h: Scalar,
    first: Scalar,
    size: int,
  ) -> None:
    """Stores `size` keys from key `first` on into an array of `key_shape`."""
    copy(0, size, self.tile(target, b, r, first, size, h))

  # -------------------------------------------------------------------------------------- tiles

  def work(self, blocks: BlockSizes, batch: int, transposed: bool) -> Work:
    """The items of a launch over the queries of every sequence, or its keys."""
    num_rows = self.num_keys if transposed else self.length
    sizes = dict(b=batch, r=self.sequences, h=len(self.heads))
    return Work(sizes, -(-num_rows // blocks.rows), blocks.spread)

  def sweep_keys(self, item: Item, blocks: BlockSizes) -> KeyTiles:
    """What an item of queries sweeps."""
    # The longest items are dealt first (work.py): those of the last queries.
    q0 = (-(-self.length // blocks.rows) - 1 - item["tile"]) * blocks.rows
    return KeyTiles(self, item, q0, blocks)

  def sweep_queries(
    self, item: Item, k0: Scalar, blocks: BlockSizes, shares: int, batch: int
  ) -> QueryTiles:
    """What an item of keys, from key k0 on, sweeps; see `QueryTiles` for shares."""
    return QueryTiles(self, item, k0, blocks, shares, batch)

  def shares(self, batch: int, rows: int) -> int:
    """Shares of the queries that items of `rows` keys have apart, to be summed afterwards."""
    del batch, rows
    return 1

  def key_tiles(self, q0: Scalar, rows: int, step: int) -> tuple[Scalar, ...]:
    """The key tiles of queries q0 ... q0 + rows - 1 (rows past the end do not count).

    They are first ... end - 1, of which full_first ... full_end - 1 need no mask.

    Returns:
      first, full_first, full_end, end; the first two are one object where they are always equal.
    """
    distance, window = self.distance, self.window
    last = jnp.minimum(q0 + rows, self.length) - 1
    # The last query decides which tiles there are, the first one which of them all see in full; of
    # a window's other end it is the other way round.
    end = div(jnp.maximum(last - distance + step, 0), step)
    full = div(jnp.maximum(q0 - distance + 1, 0), step)
    first = full_first = 0 * end  # one object: `Tiles.tile` knows by it that none is before
    if window is not None:
      first = div(jnp.maximum(q0 - window + 1, 0), step)
      full_first = jnp.minimum(div(jnp.maximum(last - window + 1, 0) + step - 1, step), end)
    if self.segments:  # any tile may hold keys of another segment
      full_first = full = first
    return first, full_first, jnp.maximum(full, full_first), jnp.maximum(end, first)

  def query_tiles(self, k0: Scalar, keys: int, step: int) -> tuple[Scalar, ...]:
    """The tiles of queries that see any of the keys k0 ... k0 + keys - 1, as `key_tiles`."""
    distance, window = self.distance, self.window
    # Queries see keys before them: without a window, all from the first one on that sees key k0.
    end = jnp.int32(-(-self.length // step))
    last = self.last_key(k0, keys)
    first = jnp.minimum(div(self.first_query(k0), step), end)
    full = jnp.clip(div(last + distance + step - 1, step), first, end)
    full_end = end
    if window is not None:
      # The first key leaves the window first: from there on not all see all keys.
      full_end = jnp.maximum(div(k0 + window, step), full)
      end = jnp.minimum(end, div(last + window - 1, step) + 1)
      full_end = jnp.minimum(full_end, end)
      full = jnp.minimum(full, full_end)
    end = jnp.maximum(end, first)
    if self.segments:
      full = full_end = end
    return first, full, full_end, end

  def last_key(self, k0: Scalar, keys: int) -> Scalar:
    """The last one of keys k0 ... k0 + keys - 1 that exists."""
    return jnp.minimum(k0 + keys, self.num_keys) - 1

  def first_query(self, key: Scalar) -> Scalar:
    """The first query that can see a key or a later one, or a little before it."""
    return key + self.distance

  # -------------------------------------------------------------------------------------- masks

  def query_bounds(self, q0: Scalar, rows: int, layout: Any) -> tuple[Array, Array | None]:
    """Per query, what `key_places` may at most and must at least be; None: no lower bound."""
    i = q0 + gpu.iota((rows,), layout=layout)
    # Compared by row against `key_places`, so that a mask is one or two comparisons.
    low = None if self.window is None else i - (self.window - 1)
    return i - self.distance, low

  def key_places(self, k0: Scalar, keys: int, h: Scalar, layout: Any) -> Array:
    """Per key, where it stands among the queries: which row sees it first."""
    del h
    return k0 + gpu.iota((keys,), layout=layout)
