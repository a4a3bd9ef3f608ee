"""What the streaming kernels sweep: a schedule is, per tile of queries, a range of key tiles.

The kernels (stream_forward.py, stream_backward.py) walk long rows of key tiles through a ring in
shared memory. Which tiles, where they lie in memory and which of their pairs attend is decided
here, with formulas alone: tiles without mask code come first, then those that positions mask.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import Num

from pallas_kernels.mosaic_gpu import gpu

ROWS = 128  # what the rows of lse and delta are padded to
_NEVER = 1 << 30  # the position from which a key of no block is visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The pairs of a pass, by formula.

  Attributes:
    view: "natural": one sequence [B, T, H, D]. "columns": [B, T/l, l, H, D], a sequence per
      residue. "blocks": the same array, a sequence per row. "summaries": natural queries against
      `width` columns of every row.
    stride: l, tokens per row of the view; T must be a multiple of it, except for "natural".
    distance: a query attends to keys at least that many rows of its sequence before it.
    window: keys back a query can see, itself included ("natural" only).
    width: summary columns of each row.
    starts: first summary column; query head h uses starts[h % len(starts)].
    finished: whether summaries of the query's own row are left out; else its j <= i count.
    own: whether the keys j <= i of the query's own row are swept too, under the same softmax
      (forward and dq of finished summaries: a merged head in one sweep).
  """

  view: Literal["natural", "columns", "blocks", "summaries"]
  stride: int = 1
  distance: int = 0
  window: int | None = None
  width: int = 0
  starts: tuple[int, ...] = (0,)
  finished: bool = False
  own: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """How a kernel is cut.

  Attributes:
    step: rows per step of the ring: keys in forward and dq, queries in dkv; a power of two.
    warpgroups: compute warpgroups of a thread block, which own 64 rows of the other side each.
    stages: steps that the ring holds.
    ahead: whether the first product of a step is issued before the last one of the step before.
    spread: whether all heads work on their longest rows first, or one head after the other.
    held: tiles of queries in shared memory (forward, dq); with 2, the next one loads early.
    teams: sets of warpgroups in a thread block, each with a ring and with items of its own (forward
      of lists): while some wait, others compute.
  """

  step: int = 128
  warpgroups: int = 2
  stages: int = 2
  ahead: bool = False
  spread: bool = True
  held: int = 1
  teams: int = 1

  @property
  def rows(self) -> int:
    """Rows that a thread block owns."""
    return gpu.TILE * self.warpgroups

  @property
  def registers(self) -> tuple[int, int]:
    """Registers of a thread that loads, of one that computes: 65,536 for all of them."""
    if self.teams * self.warpgroups == 4:
      return 24, 104
    return {1: (40, 240), 2: (40, 232), 3: (24, 160)}[self.warpgroups]


class Frame:
  """A schedule at one size: shapes, tiles and masks.

  Attributes:
    scores: how logits are made; None where they are products times a factor.

  Args:
    schedule: what is swept.
    T: tokens.
    num_heads: query heads of q.
    num_kv_heads: heads of k and v.
    heads: the query heads of this launch.
    segments: whether segment ids mask as well.
  """

  scores = None

  def __init__(self, schedule: Schedule, T, num_heads, num_kv_heads, heads, segments=False):
    one = self.schedule = schedule
    if one.view != "natural" and T % one.stride:
      raise ValueError(f"{T=} must be a multiple of stride={one.stride} in view={one.view!r}")
    if segments and one.view not in ("natural", "blocks"):
      raise NotImplementedError(f"segment ids in view={one.view!r}")
    self.T, self.heads, self.segments = T, tuple(heads), segments
    self.group = num_heads // num_kv_heads
    rows, row = (T // one.stride, one.stride) if one.view != "natural" else (1, T)
    self.sequences, self.length = {
      "natural": (1, T),
      "columns": (row, rows),
      "blocks": (rows, row),
      "summaries": (1, T),
    }[one.view]
    self.padded = -(-self.length // ROWS) * ROWS
    # The copy engine takes rows in groups of 8: whole ones, from the first row of one on.
    self.spare = -self.length % 8
    # Summary keys of a row, padded so that a tile holds whole rows or lies within one.
    self.slot = 0
    if one.view == "summaries":
      reach = one.width + max(start % 8 for start in one.starts)
      powers = (8, 16, 32, 64, 128)
      self.slot = next((p for p in powers if p >= reach), -(-reach // 128) * 128)
      self.room = -(-reach // 8) * 8
      self.num_rows = rows
    self.num_keys = self.slot * rows if one.view == "summaries" else self.length
    self.has_full = not segments  # tiles that need no mask

  # ------------------------------------------------------------------------------------ arrays

  def folded(self, x: Num[Array, "B T H D"]) -> Num[Array, "B *T H D"]:
    """[B, T, H, D] as the view reads queries: free, except for sequences of odd lengths."""
    axis = 2 if self.schedule.view == "blocks" else 1
    if self.schedule.view in ("columns", "blocks"):
      x = self._in_rows(x)
    return _pad(x, axis, self.spare)

  def unfolded(self, x: Num[Array, "B *T H D"]) -> Num[Array, "B T H D"]:
    """The way back from `folded`."""
    axis = 2 if self.schedule.view == "blocks" else 1
    if self.spare:
      x = lax.slice_in_dim(x, 0, self.length, axis=axis)
    return x.reshape(x.shape[0], self.T, *x.shape[-2:])

  def keys(self, x: Num[Array, "B T H D"]) -> Num[Array, "B *T H D"]:
    """[B, T, Hkv, D] as the view reads keys."""
    if self.schedule.view != "summaries":
      return self.folded(x)
    stride = self.schedule.stride
    return _pad(self._in_rows(x), 2, -stride % 8)

  def _in_rows(self, x):
    return x.reshape(x.shape[0], -1, self.schedule.stride, *x.shape[2:])

  def ids(self, segment_ids: Int[Array, "B T"]) -> Int[Array, "B R Mp"]:
    """Segment ids of every sequence, padded to whole tiles, also of three warpgroups."""
    x = segment_ids.reshape(segment_ids.shape[0], self.sequences, self.length)
    return jnp.pad(x, [(0, 0), (0, 0), (0, self.padded + 2 * gpu.TILE - self.length)])

  def lists(self, transposed: bool) -> dict[str, Array]:
    """Arrays that say what to sweep."""
    del transposed
    return {}

  # -------------------------------------------------------------------------- places in memory

  def head(self, h):
    """The query head of head h of the launch."""
    step = self.heads[1] - self.heads[0] if len(self.heads) > 1 else 0
    if self.heads == tuple(self.heads[0] + n * step for n in range(len(self.heads))):
      return self.heads[0] + h * step
    return _pick(h, self.heads)

  def kv_head(self, h):
    return div(self.head(h), self.group)

  def tile(self, ref, b, r, start, size, h):
    """`size` rows of a sequence of an array as `folded` returns it."""
    match self.schedule.view:
      case "columns":
        return ref.at[b, pl.ds(start, size), r, h]
      case "blocks":
        return ref.at[b, r, pl.ds(start, size), h]
    return ref.at[b, pl.ds(start, size), h]

  def pieces(self, step: int) -> int:
    """Copies that fill a key tile piece by piece."""
    return max(1, step // self.slot) if self.slot else 1

  def in_boxes(self, step: int, D: int, dtype) -> bool:
    """Whether one copy fills a key tile with the summaries of several rows."""
    return self.pieces(step) > 1 and gpu.one_span(D, dtype) and not gpu.simulated()

  def load_keys(self, copy, source, item, tile, step):
    """Copies key tile `tile`; `copy(piece of the source, first row, rows)`."""
    b, r, h = item["b"], item["r"], item["h"]
    if not self.slot:
      copy(self.tile(source, b, r, tile * step, step, self.kv_head(h)), 0, step)
      return
    start = self._pick_start(h, lambda start: start - start % 8)
    rows, count = min(step, self.slot), self.pieces(step)
    for n in range(count):
      row = tile * count + n if self.slot <= step else div(tile * step, self.slot)
      row = jnp.minimum(row, self.num_rows - 1)  # not the next sequence's; masked
      first = start if self.slot <= step else start + lax.rem(tile * step, jnp.int32(self.slot))
      copy(source.at[b, row, pl.ds(first, rows), self.kv_head(h)], n * rows, rows)

  def boxes(self, source, b, h, tile, step):
    """Key tile `tile` of summaries as one piece of the source, [rows of the view, slot, D]."""
    start, count = self._pick_start(h, lambda start: start - start % 8), self.pieces(step)
    rows, columns = pl.ds(tile * count, count), pl.ds(start, self.slot)
    return source.at[b, rows, columns, self.kv_head(h)]

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    """The shape of dk or dv as the kernel stores it: as `keys`, of summaries [B, T/l, c, Hg, D]."""
    heads = len(self.heads)
    if self.slot:
      return (batch, self.num_rows, self.room, heads, D)
    length = self.length + self.spare
    return {
      "natural": (batch, length, heads, D),
      "columns": (batch, length, self.sequences, heads, D),
      "blocks": (batch, self.sequences, length, heads, D),
    }[self.schedule.view]

  def key_grads(self, x):
    """dk or dv without the rows that fill tiles: [B, T, Hg, D], or [B, T/l, width, Hg, D]."""
    if not self.slot:
      return self.unfolded(x)
    width, starts = self.schedule.width, self.schedule.starts
    first = [starts[head % len(starts)] % 8 for head in self.heads]
    if not any(first):
      return x if width == self.room else lax.slice_in_dim(x, 0, width, axis=2)
    return jnp.stack([x[:, :, n : n + width, h] for h, n in enumerate(first)], axis=3)

  def store_keys(self, copy, target, b, r, h, first, size):
    """Stores `size` keys from key `first` on into an array of `key_shape`."""
    if not self.slot:
      copy(0, size, self.tile(target, b, r, first, size, h))
      return
    rows, count = min(size, self.slot), self.pieces(size)
    for n in range(count):
      row = div(first, self.slot) + n
      column = lax.rem(first, jnp.int32(self.slot)) if self.slot > size else 0
      # The copy engine clips spans, but takes single places as they are: into the next sequence.
      pl.when(row < self.num_rows)(
        lambda n=n, row=row: copy(n * rows, rows, target.at[b, row, pl.ds(column, rows), h])
      )

  # -------------------------------------------------------------------------------------- tiles

  def first_row(self, item, rows: int):
    """The first query of an item of `rows`: the longest rows of tiles are the last ones."""
    return (-(-self.length // rows) - 1 - item["tile"]) * rows

  def key_tiles(self, item, q0, rows: int, step: int) -> "Tiles":
    """The key tiles of queries q0 ... q0 + rows - 1 (rows past the end do not count)."""
    del item
    one = self.schedule
    last = jnp.minimum(q0 + rows, self.length) - 1
    if self.slot:
      row, last_row = div(q0, one.stride), div(last, one.stride)
      end = div((last_row + (0 if one.finished else 1)) * self.slot + step - 1, step)
      full = div(row * self.slot, step) if self.whole else 0 * row
      first = 0 * row
      return Tiles(first, first, full, end)
    end = div(jnp.maximum(last - one.distance + step, 0), step)
    full = div(jnp.maximum(q0 - one.distance + 1, 0), step)
    first = full_first = 0 * end
    if one.window is not None:
      first = div(jnp.maximum(q0 - one.window + 1, 0), step)
      full_first = jnp.minimum(div(jnp.maximum(last - one.window + 1, 0) + step - 1, step), end)
    if self.segments:
      full_first = full = first
    return Tiles(first, full_first, jnp.maximum(full, full_first), jnp.maximum(end, first))

  def query_tiles(self, item, k0, keys: int, step: int) -> "Tiles":
    """The tiles of queries that see any of the keys k0 ... k0 + keys - 1."""
    del item
    one, end = self.schedule, jnp.int32(-(-self.length // step))
    last = jnp.minimum(k0 + keys, max(self.num_keys, 2)) - 1
    if self.slot:
      first = self.first_query(k0)
      full = (div(last, self.slot) + 1) * one.stride
      first = jnp.minimum(div(first, step), end)
      full = jnp.minimum(div(full + step - 1, step), end)
      return Tiles(first, full if self.whole else end, end, end)
    first = jnp.minimum(div(self.first_query(k0), step), end)
    full = jnp.clip(div(last + one.distance + step - 1, step), first, end)
    full_end = end
    if one.window is not None:
      full_end = jnp.maximum(div(k0 + one.window, step), full)
      end = jnp.minimum(end, div(last + one.window - 1, step) + 1)
      full_end = jnp.minimum(full_end, end)
      full = jnp.minimum(full, full_end)
    end = jnp.maximum(end, first)
    if self.segments:
      full = full_end = end
    return Tiles(first, full, full_end, end)

  @property
  def whole(self) -> bool:
    """Whether tiles of keys hold nothing but keys."""
    return self.slot in (0, self.schedule.width)

  def query_head(self, item, tiles, i):
    """The head whose queries step i of an item of keys sees, of the launch."""
    del tiles, i
    return item["h"]

  def work(self, blocks: BlockSizes, batch: int, transposed: bool) -> "Work":
    """The items of a launch over the queries of every sequence, or its keys."""
    num_rows = self.num_keys if transposed else self.length
    return Work(self, blocks, batch, -(-num_rows // blocks.rows))

  def _pick_start(self, h, what: Callable[[int], int]):
    """what(first summary column) of head h of the launch."""
    starts = self.schedule.starts
    return _pick(lax.rem(self.head(h), jnp.int32(len(starts))), tuple(map(what, starts)))

  def first_query(self, key):
    """The first query that can see a key or a later one, or a little before it."""
    if self.slot:
      return (div(key, self.slot) + int(self.schedule.finished)) * self.schedule.stride
    return key + self.schedule.distance

  def own_tiles(self, q0, rows: int, step: int):
    """First key and number of tiles of the rows that the queries lie in."""
    last = jnp.minimum(q0 + rows, self.length) - 1
    first = div(div(q0, self.schedule.stride) * self.schedule.stride, 8) * 8
    return first, div(last - first + step, step)

  # -------------------------------------------------------------------------------------- masks

  def query_bounds(self, q0, rows: int, layout):
    """Per query, what `key_places` may at most and must at least be; None: no lower bound."""
    i = q0 + gpu.iota((rows,), layout=layout)
    low = None if self.schedule.window is None else i - (self.schedule.window - 1)
    return i - self.schedule.distance, low

  def row_start(self, q0, rows: int, layout):
    """Per query, the first token of its own row."""
    i = q0 + gpu.iota((rows,), layout=layout)
    return lax.div(i, jnp.full_like(i, self.schedule.stride)) * self.schedule.stride

  def key_places(self, k0, keys: int, h, layout):
    """Per key, where it stands among the queries: which row sees it first."""
    one, n = self.schedule, gpu.iota((keys,), layout=layout)
    if not self.slot:
      return k0 + n
    if self.slot <= keys:
      shift = self.slot.bit_length() - 1
      row = div(k0, self.slot) + lax.shift_right_logical(n, jnp.full_like(n, shift))
      column = n & (self.slot - 1)
    else:
      row, column = div(k0, self.slot), lax.rem(k0, jnp.int32(self.slot)) + n
    if one.finished:
      place = (row + 1) * one.stride + 0 * column
    else:
      place = row * one.stride + self._pick_start(h, lambda start: start - start % 8) + column
    if self.whole:
      return place
    column = column - self._pick_start(h, lambda start: start % 8)
    return jnp.where((column >= 0) & (column < one.width), place, jnp.full_like(place, _NEVER))


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tiles [first, end), of which [full_first, full_end) need no mask; those are swept first.

  Then those before them, backwards, then those after them: the sweep goes away from the full ones.
  """

  first: Any
  full_first: Any
  full_end: Any
  end: Any

  @property
  def num_full(self):
    return self.full_end - self.full_first

  @property
  def num(self):
    return self.end - self.first

  def tile(self, i):
    """The tile of step i."""
    if self.full_first is self.first:  # none before them
      return self.first + i
    before = self.full_end - 1 - i
    masked = jnp.where(before >= self.first, before, self.first + i)
    return jnp.where(i < self.num_full, self.full_first + i, masked)


def div(n, size: int):
  """n // size of numbers that are not negative."""
  return lax.div(n, jnp.int32(size))


def _pad(x, axis: int, spare: int):
  """x with `spare` more rows of zeros."""
  return jnp.pad(x, [(0, spare if n == axis else 0) for n in range(x.ndim)]) if spare else x


def _pick(n, table: tuple[int, ...]):
  """table[n], as a value that is not known when the kernel is traced."""
  value = jnp.where(n == 0, table[0], table[-1])
  for place, entry in enumerate(table[1:-1], 1):
    value = jnp.where(n == place, entry, value)
  return value


def of_teams(scratch: dict, teams: int) -> dict:
  """Shared memory and barriers for several teams."""
  if teams == 1:
    return scratch
  wider = {}
  for name, one in scratch.items():
    if isinstance(one, gpu.Barrier):
      wider[name] = dataclasses.replace(one, num_barriers=(teams, *one.num_barriers))
    else:
      whole = one.inner_aval.update(shape=(teams, *one.inner_aval.shape))
      wider[name] = dataclasses.replace(one, inner_aval=whole)
  return wider


def of_team(refs: dict, scratch: dict, team) -> dict:
  """The refs of one team, of those that `of_teams` made of `scratch`."""
  mine = lambda ref, one: Row(ref, team) if isinstance(one, gpu.Barrier) else ref.at[team]
  return refs | {name: mine(refs[name], one) for name, one in scratch.items()}


class Row:
  """A row of barriers. The simulator takes all indices at once alone."""

  def __init__(self, ref, n):
    self.ref, self.n = ref, n

  @property
  def at(self):
    return self

  def __getitem__(self, place):
    return self.ref.at[self.n, place]


class Work:
  """The items of a launch, a tile of rows of one sequence and head each, dealt to thread blocks.

  The kernels are persistent, one thread block per core, so that the loads of an item run while the
  one before ends. Items come in order of falling length and are dealt to and fro: every block gets
  about the same work.
  """

  def __init__(self, frame: Frame, blocks: BlockSizes, batch: int, num_tiles: int):
    sizes = dict(b=batch, r=frame.sequences, h=len(frame.heads))
    tiles = dict(tile=num_tiles)
    self.sizes = tiles | sizes if blocks.spread else sizes | tiles
    self.num = math.prod(self.sizes.values())
    self.num_blocks = min(self.num, gpu.num_multiprocessors())

  def count(self):
    """Items dealt to this thread block."""
    rounds, rest = divmod(self.num, self.num_blocks)
    return rounds + (self._place(jnp.int32(rounds)) < rest).astype(jnp.int32)

  def of(self, refs, core=None) -> "Work":
    """What a thread block has to do, inside the kernel."""
    del refs, core
    return self

  def each(self, body: Callable, carry):
    """carry = body(item, its number in this thread block, carry) for the items dealt to it.

    An item is a dict of b, r, h and tile.
    """

    def step(n, carry):
      number, item = n * self.num_blocks + self._place(n), {}
      for name, size in reversed(self.sizes.items()):
        item[name] = lax.rem(number, jnp.int32(size))
        number = div(number, size)
      return body(item, n, carry)

    return lax.fori_loop(0, self.count(), step, carry)

  def _place(self, n):
    """Which item of round n is ours."""
    mine = lax.axis_index("core")
    return jnp.where(lax.rem(n, jnp.int32(2)) == 0, mine, self.num_blocks - 1 - mine)
