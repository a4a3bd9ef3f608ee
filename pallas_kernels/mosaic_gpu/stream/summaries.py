"""Summaries: natural queries, and as keys a few columns of every row of l tokens."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Num

from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.stream.arrays import in_rows
from pallas_kernels.mosaic_gpu.stream.arrays import padded
from pallas_kernels.mosaic_gpu.stream.frame import COPY_ROWS
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import pick
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.views import Natural

# Keys are numbered as if every row had `slot` of them, so that a tile holds whole rows or lies
# within one; here l = 16, width = 3, start = 12, a slot of 8, tiles of 16 keys:
#
#   row 0 of k   . . . . . . . . [x x x x S S S .]    slot 0 | tile 0
#   row 1 of k   . . . . . . . . [x x x x S S S .]    slot 1 |
#   row 2 of k   . . . . . . . . [x x x x S S S .]    slot 2 | tile 1
#
# A slot begins where the copy engine can, at a multiple of 8 columns, and has a power of two of
# them up to 128, so that places are computed by shifts; masks hide what is no summary (x, .).

SLOTS = (8, 16, 32, 64, 128)  # sizes of slots; longer ones are multiples of the last
MAX_SHARES = 8  # of few keys; each share is a dk and dv in memory
NEVER = 1 << 30  # the query from which a key that is no summary is visible


class Summaries(Natural):
  """Queries of one sequence against `width` columns of every row.

  Attributes:
    slot: keys of a row, as they are numbered.
    room: columns of a row in dk and dv: whole tiles of the copy engine.
    num_rows: rows of the view.
    whole: whether slots hold nothing but summaries.
  """

  takes_segments = False

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
    super().__init__(pass_, T, num_heads, num_kv_heads, heads, segments, own)
    reach = pass_.width + max(start % COPY_ROWS for start in pass_.starts)
    self.slot = next((n for n in SLOTS if n >= reach), -(-reach // SLOTS[-1]) * SLOTS[-1])
    self.room = -(-reach // COPY_ROWS) * COPY_ROWS
    self.num_rows = T // pass_.stride
    self.num_keys = self.slot * self.num_rows
    self.whole = self.slot == pass_.width

  # ------------------------------------------------------------------------------------ arrays

  def keys(self, x: Array) -> Array:
    stride = self.pass_.stride
    return padded(in_rows(x, stride), 2, -stride % COPY_ROWS)

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return batch, self.num_rows, self.room, len(self.heads), D

  def key_grads(self, x: Array) -> Array:
    """[B, T/l, width, Hg, D] of the slots that the kernel stored."""
    width, starts = self.pass_.width, self.pass_.starts
    first = [starts[head % len(starts)] % COPY_ROWS for head in self.heads]
    if not any(first):
      return x if width == self.room else lax.slice_in_dim(x, 0, width, axis=2)
    return jnp.stack([x[:, :, n : n + width, h] for h, n in enumerate(first)], axis=3)

  def summaries_of(self, x: Num[Array, "B T Hg D"]) -> Num[Array, "B R width Hg D"]:
    """The rows of x, of the heads of the launch, that are summaries."""
    x, width, starts = in_rows(x, self.pass_.stride), self.pass_.width, self.pass_.starts
    if len(starts) == 1:
      return lax.slice_in_dim(x, starts[0], starts[0] + width, axis=2)
    first = [starts[head % len(starts)] for head in self.heads]
    return jnp.stack([x[:, :, n : n + width, h] for h, n in enumerate(first)], axis=3)

  def with_summaries(
    self, x: Num[Array, "B T Hg D"], summaries: Num[Array, "B R width Hg D"]
  ) -> Num[Array, "B T Hg D"]:
    """x with these rows in the place of its own: XLA writes them into x, if nobody else has it."""
    shape, x = x.shape, in_rows(x, self.pass_.stride)
    first = [self.pass_.starts[head % len(self.pass_.starts)] for head in self.heads]
    # Heads in turn have the starts in turn: as a further axis, one slice writes all with one start.
    turn = len(set(first))
    turn = turn if first == first[:turn] * (len(first) // turn) else len(first)
    split = lambda x: x.reshape(*x.shape[:3], -1, turn, x.shape[-1])
    x, summaries = split(x), split(summaries)
    for n, start in enumerate(first[:turn]):
      part = summaries[..., n : n + 1, :]
      x = lax.dynamic_update_slice(x, part, (0, 0, start, 0, n, 0))
    return x.reshape(shape)

  # -------------------------------------------------------------------------- places in memory

  def copies(self, step: int) -> int:
    return max(1, step // self.slot)

  def in_boxes(self, step: int, D: int, dtype: Any) -> bool:
    # A box is dense in memory, rows of a tile only where they are no wider than a swizzle's span.
    return self.copies(step) > 1 and gpu.one_span(D, dtype) and not gpu.simulated()

  def load_keys(
    self,
    copy: Callable,
    source: Any,
    item: Item,
    tile: Scalar,
    step: int,
    head: Scalar | None = None,
  ) -> None:
    b, h, slot = item["b"], item["h"], self.slot
    head = self.kv_head(h) if head is None else head
    start = self._slot_start(h)
    size, count = min(step, slot), self.copies(step)
    for n in range(count):
      row = tile * count + n if slot <= step else div(tile * step, slot)
      row = jnp.minimum(row, self.num_rows - 1)  # not the next sequence's; masked
      first = start if slot <= step else start + rem(tile * step, slot)
      copy(source.at[b, row, gpu.ds(first, size), head], n * size, size)

  def boxes(self, source: Any, b: Scalar, h: Scalar, tile: Scalar, step: int) -> Any:
    """Key tile `tile` as one piece of the source, [rows of the view, slot, D]."""
    start, count = self._slot_start(h), self.copies(step)
    rows, columns = gpu.ds(tile * count, count), gpu.ds(start, self.slot)
    return source.at[b, rows, columns, self.kv_head(h)]

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
    del r
    rows, count = min(size, self.slot), self.copies(size)
    for n in range(count):
      row = div(first, self.slot) + n
      column = rem(first, self.slot) if self.slot > size else 0
      # The copy engine clips spans, but takes single places as they are: into the next sequence.
      gpu.when(row < self.num_rows)(
        lambda n=n, row=row: copy(n * rows, rows, target.at[b, row, gpu.ds(column, rows), h])
      )

  def _slot_start(self, h: Scalar) -> Scalar:
    """The column where the slots of head h of the launch begin."""
    return self._of_start(h, lambda start: start - start % COPY_ROWS)

  def _of_start(self, h: Scalar, value: Callable[[int], int]) -> Scalar:
    """value(first summary column) of head h of the launch."""
    starts = self.pass_.starts
    return pick(rem(self.head(h), len(starts)), tuple(map(value, starts)))

  # -------------------------------------------------------------------------------------- tiles

  def shares(self, batch: int, rows: int) -> int:
    # Summaries are few keys of many queries each: without shares most cores would have no item.
    num_items = batch * len(self.heads) * -(-self.num_keys // rows)
    num_cores = gpu.num_multiprocessors()
    if num_items >= num_cores:
      return 1
    # The fewest rounds of items, by the length of an item; of equal ones the fewest shares.
    rounds = lambda shares: -(-num_items * shares // num_cores) / shares
    return min(range(1, MAX_SHARES + 1), key=rounds)

  def key_tiles(self, q0: Scalar, rows: int, step: int) -> tuple[Scalar, ...]:
    stride = self.pass_.stride
    last = jnp.minimum(q0 + rows, self.length) - 1
    row, last_row = div(q0, stride), div(last, stride)
    num_rows = last_row + (0 if self.pass_.finished else 1)
    end = div(num_rows * self.slot + step - 1, step)
    full = div(row * self.slot, step) if self.whole else 0 * row
    first = 0 * row
    return first, first, full, end

  def query_tiles(self, k0: Scalar, keys: int, step: int) -> tuple[Scalar, ...]:
    end = jnp.int32(-(-self.length // step))
    last = self.last_key(k0, keys)
    first = self.first_query(k0)
    full = (div(last, self.slot) + 1) * self.pass_.stride
    first = jnp.minimum(div(first, step), end)
    full = jnp.minimum(div(full + step - 1, step), end)
    return first, full if self.whole else end, end, end

  def first_query(self, key: Scalar) -> Scalar:
    return (div(key, self.slot) + int(self.pass_.finished)) * self.pass_.stride

  def own_tiles(self, q0: Scalar, rows: int, step: int) -> tuple[Scalar, Scalar]:
    """First key and number of tiles of the rows that the queries lie in."""
    last = jnp.minimum(q0 + rows, self.length) - 1
    first = div(self.row_of(q0), COPY_ROWS) * COPY_ROWS
    return first, div(last - first + step, step)

  def row_of(self, query: Scalar) -> Scalar:
    """The first token of a query's own row."""
    return div(query, self.pass_.stride) * self.pass_.stride

  # -------------------------------------------------------------------------------------- masks

  def row_starts(self, q0: Scalar, rows: int, layout: Any) -> Array:
    """Per query, the first token of its own row."""
    i = q0 + gpu.iota((rows,), layout=layout)
    return lax.div(i, jnp.full_like(i, self.pass_.stride)) * self.pass_.stride

  def key_places(self, k0: Scalar, keys: int, h: Scalar, layout: Any) -> Array:
    slot, n = self.slot, gpu.iota((keys,), layout=layout)
    if slot <= keys:
      shift = slot.bit_length() - 1
      row = div(k0, slot) + lax.shift_right_logical(n, jnp.full_like(n, shift))
      column = n & (slot - 1)
    else:
      row, column = div(k0, slot), rem(k0, slot) + n
    if self.pass_.finished:
      place = (row + 1) * self.pass_.stride + 0 * column
    else:
      place = row * self.pass_.stride + self._slot_start(h) + column
    if self.whole:
      return place
    column = column - self._of_start(h, lambda start: start % COPY_ROWS)
    is_summary = (column >= 0) & (column < self.pass_.width)
    return jnp.where(is_summary, place, jnp.full_like(place, NEVER))
