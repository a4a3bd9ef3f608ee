"""A pass over some heads as its kernels read it: which blocks, where heads lie, arrays and back.

The cheapest place of heads in the arrays that kernels read: what needs no copy in memory.
- [B, T, H * D], heads side by side in lanes, is the order that projections leave. A program whose
  arguments are [B, T, H, D] has them, where D = 128 and H is a multiple of 8, in tiles of 8 heads
  of a token; these the kernels read as they are ("heads" in sublanes).
- A column's tokens are one row of every tile of 8 neighbouring tokens: 8 columns are read at once
  ("tokens" in sublanes), or 8 heads of one column as above. Strides that are no multiples of 8, and
  fewer keys' than queries' heads, have the copy [B, M, stride * H * D] instead.
- Heads of 32 or 64 features share the lanes of a tile. Those of other sizes, of several queries'
  heads to one of keys, and of masks per head, are padded to whole tiles in memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import hardware
from pallas_kernels.lowering import heads
from pallas_kernels.lowering.heads import Heads
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_tpu import grid
from pallas_kernels.mosaic_tpu import kernels
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu import sweep
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.operands import Operand
from pallas_kernels.mosaic_tpu.operands import SUBLANES
from pallas_kernels.mosaic_tpu.sweep import Sweep

BLOCK = 512  # tokens at most; blocks of layouts have to fit
_DQ = 32 << 20  # bytes of memory that dq of a sequence may take, for one backward kernel


@dataclasses.dataclass(frozen=True)
class Place:
  """Where the heads of a launch lie.

  Attributes:
    sublanes: None, or what lies in them: "heads" or "tokens".
    count: heads of queries side by side in a block's lanes.
    keys: heads of keys there.
    Dk, Dv: features of a head in the arrays.
  """

  sublanes: str | None
  count: int
  keys: int
  Dk: int
  Dv: int

  @property
  def num(self) -> int:
    """Heads of a block, or columns of heads."""
    return self.count * (SUBLANES if self.sublanes else 1)


@dataclasses.dataclass(frozen=True)
class View:
  """One pass over some heads.

  Attributes:
    plan: of the call.
    heads: of queries.
    pass_: which pairs.
    block: queries and keys of a block; None where the layouts fit no block.
  """

  plan: Plan = dataclasses.field(compare=False, repr=False)  # which has this view
  heads: Heads
  pass_: Pass
  block: int | None

  @property
  def T(self) -> int:
    return self.plan.T

  @property
  def H(self) -> int:
    return self.plan.H

  @property
  def group(self) -> int:
    """Query heads of a key head."""
    return self.plan.H // self.plan.Hkv

  @property
  def stride(self) -> int:
    return _stride(self.plan, self.pass_)

  @functools.cached_property
  def sweep(self) -> Sweep:
    """What the kernels sweep."""
    num_queries, num_keys = _lengths(self.plan, self.pass_)
    scores, leaves = self.plan.scores, _leaves_of(self.pass_)
    return Sweep(self.pass_, self.block, num_queries, num_keys, scores, leaves)

  def words(self) -> int:
    """Of scalar memory."""
    num = self.static_steps(transposed=True).place.size + -(-self.T // self.block)
    num = max(num, self.static_steps(transposed=False).place.size)
    plan, flags = self.plan, 1
    if plan.segment_ids or plan.block_mask is not None:
      B = plan.B if plan.segment_ids else plan.block_mask[0]
      flags = B * (len(self.heads) if self._masks_per_head else 1)
    return num * (1 + flags) + 3 * len(self.groups(self.place()).heads)

  def static_steps(self, transposed: bool) -> steps.Steps:
    # By row, queries past the end spoil nothing: their results are cut off.
    s = self.sweep
    end = transposed and s.queries_end
    return steps.steps_of(s.pass_, s.num_queries, s.num_keys, self.block, end, transposed)

  # ------------------------------------------------------------------------------- where heads lie

  @property
  def _masks_per_head(self) -> bool:
    return self.plan.block_mask is not None and self.plan.block_mask[1] > 1

  def place(self, most: int = kernels.INTERLEAVED) -> Place:
    """The cheapest place, with `most` heads in a step's lanes, or one tile of them."""
    H, first, num, group = self.H, self.heads[0], len(self.heads), self.group
    # Blocks of lanes have heads that are neighbours, and one mask.
    together = self.heads == tuple(range(first, first + num)) and not self._masks_per_head
    even = lambda count: H % count == first % count == num % count == 0
    sizes, padded = (self.plan.Dk, self.plan.Dv), (_up(self.plan.Dk), _up(self.plan.Dv))
    columns = self.pass_.view == "columns"
    # Tiles of 16 sublanes would be half empty with 8 tokens, and kernels cannot take those apart.
    apart = self.plan.dtype.itemsize == 2 and hardware.has_tall_tiles()
    if together and group == 1:
      # A program's arguments have this order as they are: no copy.
      if sizes == (LANES, LANES) and even(SUBLANES):
        return Place("heads", 1, 1, *sizes)
      if columns and self.stride % SUBLANES == 0 and max(sizes) <= LANES and not apart:
        for Dk, Dv in (sizes, padded):
          for count in (LANES // min(Dk, Dv), H):
            one_tile = count * max(Dk, Dv) <= LANES  # loads with a stride know no second one
            if one_tile and even(count) and all(_are_tiles(count, n, H) for n in (Dk, Dv)):
              return Place("tokens", count, count, Dk, Dv)
    rows = self.stride if columns else 1
    for Dk, Dv in (sizes, padded):
      # The most heads first: what they compute fills each other's gaps.
      for count in (kernels.INTERLEAVED, 2, 1, H):
        # Query heads of one key head share its block.
        keys = max(1, count // group)
        fits = count == 1 or (together and even(count) and 0 in (count % group, group % count))
        fits &= group == 1 or min(Dk, Dv) >= LANES  # narrow heads meet in one place of a tile
        fits &= count <= most or count * min(Dk, Dv) <= LANES
        arrays = ((count, rows * H), (keys, rows * self.plan.Hkv))
        if fits and all(_are_tiles(n, size, total) for n, total in arrays for size in (Dk, Dv)):
          return Place(None, count, keys, Dk, Dv)
    raise AssertionError("a single padded head always fits")

  def operand(self, place: Place, size: int, of_keys: bool = False) -> Operand:
    count = place.keys if of_keys else place.count
    return Operand(size, count, self.block, place.sublanes is not None)

  def groups(self, place: Place) -> grid.Groups:
    """The groups of heads, in the order of the results."""
    together = SUBLANES if place.sublanes == "heads" else place.count
    heads = np.asarray(self.heads)[::together]
    if self.pass_.view != "columns":
      rows, rows_k = np.zeros((1, 1), int), np.zeros((1, 1), int)
    elif place.sublanes == "tokens":
      rows = np.arange(self.stride // SUBLANES)[:, None] * self.H
      rows_k = rows
    else:
      rows = np.arange(self.stride)[:, None] * self.H
      # Columns lie side by side in lanes, each with all of its heads: keys have fewer.
      rows_k = rows // self.group
    together_k = SUBLANES if place.sublanes == "heads" else place.keys
    flat = lambda x: np.broadcast_to(x, (len(rows), len(heads))).reshape(-1)
    return grid.Groups(
      queries=flat((rows + heads) // together),
      keys=flat((rows_k + heads // self.group) // together_k),
      heads=flat(heads),
    )

  def place_of_one_backward(self) -> Place | None:
    """Where heads lie in a kernel that has all of dq in memory; None if that is too much."""
    padded = -(-self.sweep.num_queries // self.block) * self.block
    # Fewer heads at a time before a second kernel: each head's dq takes memory.
    for most in (kernels.INTERLEAVED, 2, 1):
      place = self.place(most)
      q_op = self.operand(place, place.Dk)
      if q_op.num_tiles * max(q_op.tile, LANES) * padded * 4 <= _DQ:
        return place
    return None

  # ----------------------------------------------------------------------------- arrays and back

  def keys(self, x: Array) -> Array:
    """Keys or values that the view has: [B, S, Hkv, D], of summaries those."""
    if self.pass_.view != "summaries":
      return x
    width, starts = self.pass_.width, self.pass_.starts
    x = padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
    x = x.reshape(x.shape[0], -1, self.stride, *x.shape[2:])
    # Heads take turns among the starts; those that share keys have one (`backend._lowered`).
    joined, *others = (x[:, :, start : start + width] for start in starts)
    which = jnp.arange(x.shape[3])[:, None] % len(starts)  # start of every head
    for n, part in enumerate(others, 1):
      joined = jnp.where(which == n, part, joined)
    return joined.reshape(x.shape[0], -1, *x.shape[3:])

  def array(self, x: Array, place: Place, D: int) -> Array:
    """[B, T, H, D] as kernels read it: [sequences, rows, lanes], or with sublanes before lanes."""
    B, H = x.shape[0], x.shape[2]
    # Features that are no whole lanes: zeros change no product.
    x = padded(x, 3, D)
    if self.pass_.view in ("columns", "blocks"):
      x = padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
    if self.pass_.view == "columns":
      shape = {None: (-1,), "heads": (self.stride * H, D), "tokens": (self.stride, H * D)}
      x = x.reshape(B, x.shape[1] // self.stride, *shape[place.sublanes])
    else:
      rows = self.stride if self.pass_.view == "blocks" else x.shape[1]
      x = x.reshape(-1, rows, *((H, D) if place.sublanes else (H * D,)))
    return x

  def result(self, place: Place, like: Any, D: int, count: int) -> jax.ShapeDtypeStruct:
    """Of `count` heads for each group of heads, with the sequences and rows of an input."""
    B, rows, heads = *like[0].shape[:2], len(self.heads) // place.count * count
    stride = self.stride if self.pass_.view == "columns" else 1
    shape = {None: (stride * heads * D,), "heads": (stride * heads, D)}
    shape |= {"tokens": (stride, heads * D)}
    return jax.ShapeDtypeStruct((B, rows, *shape[place.sublanes]), self.plan.dtype)

  def from_array(self, x: Array, D: int, size: int, length: int) -> Array:
    """A result of heads of `size` lanes as [B, length, heads, D]."""
    B, rows = x.shape[:2]
    heads = x.size // (B * rows * size)
    if self.pass_.view == "columns":
      x = x.reshape(B, rows * self.stride, heads // self.stride, size)
    else:
      whole = rows
      if self.pass_.view == "blocks":
        whole = -(-self.T // self.stride) * self.stride
      x = x.reshape(-1, whole, heads, size)
    # What was padded, at the end of the sequence and of the features, goes.
    return x[:, :length, :, :D]

  def from_keys(self, x: Array, D: int, size: int) -> Array:
    """dk or dv as [B, S, heads, D]: zeros where a view has none; those of one key's head added."""
    x = self.from_array(x, D, size, x.shape[1] if self.pass_.view == "summaries" else self.plan.S)
    if self.pass_.view == "summaries":
      width, starts = self.pass_.width, self.pass_.starts
      x = x.reshape(x.shape[0], -1, width, *x.shape[2:])
      pad = lambda start: [(0, 0), (0, 0), (start, self.stride - start - width), (0, 0), (0, 0)]
      which = jnp.arange(x.shape[3])[:, None] % len(starts)
      of_start = lambda n: x if len(starts) == 1 else jnp.where(which == n, x, 0)
      # A head has gradients at its own start alone, zeros where other heads have theirs.
      x = sum(jnp.pad(of_start(n), pad(start)) for n, start in enumerate(starts))
      x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.plan.S]
    if len(self.heads) == self.H:
      x = heads.sum_per_key_head(x, self.plan.Hkv)
    return x

  def rows_shape(self, place: Place, like: Any) -> jax.ShapeDtypeStruct:
    """Of numbers of queries."""
    num = -(-self.sweep.num_queries // self.block) * self.block
    groups = len(self.groups(place).heads)
    return jax.ShapeDtypeStruct((like[0].shape[0], groups, place.num, num), jnp.float32)

  def rows(self, x: Array, place: Place, fill: float) -> Array:
    """Numbers of queries [B, T, Hg] as [sequences, groups, heads, T]; `fill` where none is."""
    B, heads = x.shape[0], x.shape[2]
    if self.pass_.view in ("columns", "blocks"):
      x = padded(x, 1, -(-x.shape[1] // self.stride) * self.stride, fill)
    if place.sublanes == "tokens":
      x = x.reshape(B, -1, self.stride // SUBLANES, SUBLANES, heads // place.count, place.count)
      x = x.transpose(0, 2, 4, 3, 5, 1)
    else:
      B = B * x.shape[1] // self.stride if self.pass_.view == "blocks" else B
      rows = x.size // (B * heads * (self.stride if self.pass_.view == "columns" else 1))
      x = x.reshape(B, rows, -1, place.num).transpose(0, 2, 3, 1)
    x = x.reshape(B, -1, place.num, x.shape[-1])
    return padded(x, 3, -(-x.shape[3] // self.block) * self.block, fill)

  def from_rows(self, x: Array, place: Place) -> Array:
    """The way back, [B, T, Hg]."""
    x, B, heads = x[..., : self.sweep.num_queries], x.shape[0], len(self.heads)
    if place.sublanes == "tokens":
      x = x.reshape(B, self.stride // SUBLANES, -1, SUBLANES, place.count, x.shape[-1])
      x = x.transpose(0, 5, 1, 3, 2, 4)
    else:
      x = x.transpose(0, 3, 1, 2)
    if self.pass_.view == "blocks":
      B = x.size // heads // (-(-self.T // self.stride) * self.stride)
    return x.reshape(B, -1, heads)[:, : self.T]


def view_of(plan: Plan, of_group: Heads, pass_: Pass) -> View:
  """How a pass over some heads is read."""
  return View(plan, of_group, pass_, _block(max(_lengths(plan, pass_)), block_sizes(plan, pass_)))


def block_sizes(plan: Plan, pass_: Pass) -> list[int]:
  """Of what masks by blocks, layouts and the block mask."""
  sizes = {leaf.block_size for leaf in _leaves_of(pass_)}
  return sorted(sizes | ({plan.block_size} if plan.block_mask is not None else set()))


def _leaves_of(pass_: Pass) -> tuple:
  """The layouts of a pass."""
  return () if pass_.pattern is None else sweep.leaves_of(pass_.pattern)


def _stride(plan: Plan, pass_: Pass) -> int:
  if pass_.view == "summaries":
    return pass_.stride
  return 1 if pass_.view == "natural" else min(pass_.stride, plan.T)


def _lengths(plan: Plan, pass_: Pass) -> tuple[int, int]:
  """Queries and keys of a sequence of the view."""
  stride = _stride(plan, pass_)
  rows = -(-plan.T // stride)
  num_queries = {"columns": rows, "blocks": stride}.get(pass_.view, plan.T)
  num_keys = {"columns": rows, "blocks": stride, "summaries": rows * pass_.width}
  return num_queries, num_keys.get(pass_.view, plan.S)


def _are_tiles(count: int, size: int, total: int) -> bool:
  """Whether so many heads side by side are whole tiles, or all that an array has in one."""
  if count == total and total * size <= LANES:
    return True
  return count * size % LANES == 0 and (size % LANES == 0 or LANES % size == 0)


def _up(size: int) -> int:
  """Features as whole lanes."""
  return -(-size // LANES) * LANES


def _block(length: int, sizes: Any) -> int | None:
  """Tokens of a block that blocks of `sizes` fill, or that fit into them."""
  # A short sequence is one block; 16 rows are a tile of bfloat16.
  if not sizes and length <= BLOCK:
    return max(16, -(-length // 16) * 16)
  fits = lambda block: all(
    (block % size == 0 and size % 8 == 0) or size % block == 0 for size in sizes
  )
  most = min(BLOCK, -(-length // LANES) * LANES)
  # The largest up to the length of the sequence, else the next above it.
  larger, smaller = range(most + LANES, BLOCK + 1, LANES), range(most, 0, -LANES)
  return next((n for n in (*smaller, *larger) if fits(n)), None)


def padded(x: Array, axis: int, size: int, fill: float = 0.0) -> Array:
  if x.shape[axis] == size:
    return x
  width = [(0, size - x.shape[axis] if n == axis else 0) for n in range(x.ndim)]
  return jnp.pad(x, width, constant_values=fill)
