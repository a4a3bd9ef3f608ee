"""How a pass over some heads becomes launches: which blocks, where heads lie, arrays and back.

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
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lowering import heads
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_tpu import kernels
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.operands import Operand
from pallas_kernels.mosaic_tpu.operands import SUBLANES

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


class Launches:
  """One pass over some heads.

  Attributes:
    block: queries and keys of a block; None where the layouts fit no block.
  """

  def __init__(self, heads, one: Pass, q, k, v, segment_ids, block_mask, scores, block_size):
    self.heads, self.one, self.masks = tuple(heads), one, (segment_ids, block_mask, block_size)
    self.T, self.S, self.H, self.Hkv = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    self.Dk, self.Dv, self.dtype = q.shape[-1], v.shape[-1], q.dtype
    self.group = self.H // self.Hkv
    self.stride = 1 if one.view == "natural" else min(one.stride, max(self.T, 1))
    if one.view == "summaries":
      self.stride = one.stride
    rows = -(-self.T // self.stride)
    num_queries = {"columns": rows, "blocks": self.stride}.get(one.view, self.T)
    num_keys = {"columns": rows, "blocks": self.stride, "summaries": rows * one.width}
    num_keys = num_keys.get(one.view, self.S)
    leaves = kernels.leaves_of(one.pattern) if one.pattern is not None else ()
    self.block_sizes = sorted(
      {leaf.block_size for leaf in leaves} | ({block_size} if block_mask is not None else set())
    )
    self.block = _block(max(num_queries, num_keys), self.block_sizes)
    if self.block is not None:
      self.sweep = kernels.Sweep(one, self.block, num_queries, num_keys, scores, leaves)

  def words(self) -> int:
    """Of scalar memory."""
    found = self.static_steps(transposed=True).place.size + -(-self.T // self.block)
    found = max(found, self.static_steps(transposed=False).place.size)
    ids, block_mask, _ = self.masks
    flags = 1
    if ids is not None or block_mask is not None:
      B = ids.shape[0] if ids is not None else block_mask.shape[0]
      flags = B * (len(self.heads) if self._masks_per_head else 1)
    place = self.place()
    return found * (1 + flags) + 3 * len(self.groups(place).heads)

  def static_steps(self, transposed: bool) -> steps.Steps:
    s = self.sweep
    end = transposed and s.queries_end
    return steps.steps_of(s.one, s.num_queries, s.num_keys, self.block, end, transposed)

  # ------------------------------------------------------------------------------- where heads lie

  @property
  def _masks_per_head(self) -> bool:
    return self.masks[1] is not None and self.masks[1].shape[1] > 1

  def place(self, most: int = kernels.INTERLEAVED) -> Place:
    """The cheapest place, with `most` heads in a step's lanes, or one tile of them."""
    H, first, num, group = self.H, self.heads[0], len(self.heads), self.group
    together = self.heads == tuple(range(first, first + num)) and not self._masks_per_head
    even = lambda count: H % count == first % count == num % count == 0
    sizes, padded = (self.Dk, self.Dv), (_up(self.Dk), _up(self.Dv))
    columns = self.one.view == "columns"
    apart = self.dtype.itemsize == 2 and kernels.tall_tiles()
    if together and group == 1:
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
      for count in (kernels.INTERLEAVED, 2, 1, H):
        keys = max(1, count // group)
        fits = count == 1 or (together and even(count) and 0 in (count % group, group % count))
        fits &= group == 1 or min(Dk, Dv) >= LANES  # narrow heads meet in one place of a tile
        fits &= count <= most or count * min(Dk, Dv) <= LANES
        arrays = ((count, rows * H), (keys, rows * self.Hkv))
        if fits and all(_are_tiles(n, size, total) for n, total in arrays for size in (Dk, Dv)):
          return Place(None, count, keys, Dk, Dv)
    raise AssertionError("a single padded head always fits")

  def operand(self, place: Place, size: int, of_keys: bool = False) -> Operand:
    count = place.keys if of_keys else place.count
    return Operand(size, count, self.block, place.sublanes is not None)

  def groups(self, place: Place) -> kernels.Groups:
    """The groups of heads, in the order of the results."""
    together = SUBLANES if place.sublanes == "heads" else place.count
    heads = np.asarray(self.heads)[::together]
    if self.one.view != "columns":
      rows, rows_k = np.zeros((1, 1), int), np.zeros((1, 1), int)
    elif place.sublanes == "tokens":
      rows = np.arange(self.stride // SUBLANES)[:, None] * self.H
      rows_k = rows
    else:
      rows = np.arange(self.stride)[:, None] * self.H
      rows_k = rows // self.group
    together_k = SUBLANES if place.sublanes == "heads" else place.keys
    flat = lambda x: np.broadcast_to(x, (len(rows), len(heads))).reshape(-1)
    return kernels.Groups(
      queries=flat((rows + heads) // together),
      keys=flat((rows_k + heads // self.group) // together_k),
      heads=flat(heads),
    )

  # ------------------------------------------------------------------------------------ launches

  def forward(self, q, k, v):
    """out [B, T, Hg, Dv] and the natural lse [B, T, Hg]."""
    place, block = self.place(), self.block
    inputs, out_op = self._inputs(place, q, k, v), self.operand(place, place.Dv)
    found, more = self.steps(transposed=False)
    outputs = dict(
      out=(self.result(place, inputs["q"], place.Dv, place.count), ("q_results", out_op)),
      lse=(self.rows_shape(place, inputs["q"]), ("rows", place.num)),
    )
    scratch = dict(top=(place.num, block, LANES), total=(place.num, block, LANES))
    scratch |= dict(acc=(place.num, block, out_op.tile))
    rest = self.sweep, found, self.groups(place), inputs | more, outputs, scratch
    out, lse = kernels.launch("attention_forward", kernels.forward, *rest)
    out = self.from_array(out, self.Dv, place.Dv, self.T)
    return out, self.from_rows(lse, place) * math.log(2)

  def backward(self, q, k, v, dout, lse, delta):
    """dq [B, T, Hg, Dk]; dk and dv [B, S, Hg or Hkv, D], of the latter for all heads."""
    place = self._one_backward()
    if place is not None:
      *dq, dk, dv = self._backward(place, True, q, k, v, dout, lse, delta)
    else:
      place = self.place()
      dq = [self._dq(place, q, k, v, dout, lse, delta)]
      dk, dv = self._backward(place, False, q, k, v, dout, lse, delta)
    return *dq, dk, dv

  def _one_backward(self) -> Place | None:
    """Where heads lie in a kernel that has all of dq in memory; None if that is too much."""
    padded = -(-self.sweep.num_queries // self.block) * self.block
    for most in (kernels.INTERLEAVED, 2, 1):
      place = self.place(most)
      q_op = self.operand(place, place.Dk)
      if q_op.num_tiles * max(q_op.tile, LANES) * padded * 4 <= _DQ:
        return place
    return None

  def _inputs(self, place: Place, q, k, v):
    operand = functools.partial(self.operand, place)
    return dict(
      q=(self.array(q, place, place.Dk), ("queries", operand(place.Dk))),
      k=(self.array(self.keys(k), place, place.Dk), ("keys", operand(place.Dk, of_keys=True))),
      v=(self.array(self.keys(v), place, place.Dv), ("keys", operand(place.Dv, of_keys=True))),
    )

  def _gradients(self, place: Place, q, k, v, dout, lse, delta):
    return self._inputs(place, q, k, v) | dict(
      dout=(self.array(dout, place, place.Dv), ("q_results", self.operand(place, place.Dv))),
      lse=(self.rows(lse * kernels.LOG2E, place, jnp.inf), ("rows", place.num)),
      delta=(self.rows(delta, place, 0.0), ("rows", place.num)),
    )

  def _dq(self, place: Place, *arrays):
    inputs, block = self._gradients(place, *arrays), self.block
    q_op = inputs["q"][1][1]
    found, more = self.steps(transposed=False)
    outputs = dict(dq=(self.result(place, inputs["q"], place.Dk, place.count), ("q_results", q_op)))
    scratch = dict(lse_s=(place.num, block, 8), delta_s=(place.num, block, 8))
    scratch |= dict(acc=(q_op.num_tiles, block, q_op.tile))
    rest = self.sweep, found, self.groups(place), inputs | more, outputs, scratch
    (dq,) = kernels.launch("attention_dq", kernels.dq, *rest)
    return self.from_array(dq, self.Dk, place.Dk, self.T)

  def _backward(self, place: Place, with_dq: bool, *arrays):
    inputs, block = self._gradients(place, *arrays), self.block
    q_op, k_op, v_op = (inputs[name][1][1] for name in "qkv")
    found, more = self.steps(transposed=True)
    num = -(-self.sweep.num_queries // block)
    outputs = dict(
      dk=(self.result(place, inputs["k"], place.Dk, place.keys), ("k_results", k_op)),
      dv=(self.result(place, inputs["k"], place.Dv, place.keys), ("k_results", v_op)),
    )
    scratch = dict(dk_s=(k_op.num_tiles, block, k_op.tile), dv_s=(v_op.num_tiles, block, v_op.tile))
    if with_dq:
      found = found.with_stores(num)
      outputs |= dict(dq=(self.result(place, inputs["q"], place.Dk, place.count), ("dq", q_op)))
      scratch |= dict(dq_s=(q_op.num_tiles, num * block, q_op.tile))
    rest = self.sweep, found, self.groups(place), inputs | more, outputs, scratch
    name = "attention_backward" if with_dq else "attention_dkv"
    dk, dv, *dq = kernels.launch(name, kernels.backward, *rest)
    dk, dv = self.from_keys(dk, self.Dk, place.Dk), self.from_keys(dv, self.Dv, place.Dv)
    return *(self.from_array(x, self.Dk, place.Dk, self.T) for x in dq), dk, dv

  def steps(self, transposed: bool):
    """The steps, and the arrays that mask."""
    found, more = self.static_steps(transposed), {}
    ids, block_mask, block_size = self.masks
    nq, nk = (-(-n // self.block) for n in (self.sweep.num_queries, self.sweep.num_keys))
    for n, leaf in enumerate(self.sweep.leaves):
      more[f"table{n}"] = self.table(
        leaf.of_head(0).layout[None, None], leaf.block_size, transposed
      )
    if block_mask is not None:
      mine = block_mask[:, np.asarray(self.heads)] if block_mask.shape[1] > 1 else block_mask
      more["block_mask"] = self.table(mine, block_size, transposed)
      found = found.masked(*_joined_blocks(mine, block_size, self.block, nq, nk))
    if ids is not None:
      fill = lambda x: jnp.pad(x, [(0, 0), (0, nq * self.block - self.T)], mode="edge")
      ids = fill(ids)
      more["ids_of_lines"] = ids[:, :, None], ("lines", 1)
      more["ids_of_others"] = ids[:, None, :], ("others", 1)
      ids = ids.reshape(ids.shape[0], -1, self.block)
      low, high = ids.min(axis=2), ids.max(axis=2)
      meet = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
      one_id = (low == high)[:, :, None] & (low == high)[:, None, :]
      same = one_id & (low[:, :, None] == low[:, None, :])
      found = found.masked(meet[:, None], same[:, None])
    return found, more

  def table(self, layout, size: int, transposed: bool):
    """A block table as an input: its entries along the other axis repeated for every token."""
    if transposed:
      layout = layout.swapaxes(2, 3)
    num = self.sweep.num_queries if transposed else self.sweep.num_keys
    lines = self.sweep.num_keys if transposed else self.sweep.num_queries
    num, lines = (-(-n // self.block) * self.block for n in (num, lines))
    per_block, span = max(1, self.block // size), max(1, size // self.block)
    groups = -(-lines // (self.block * span))
    layout = jnp.asarray(layout).astype(jnp.int8)
    layout = jnp.repeat(layout, size, axis=3)[..., :num]
    fill = lambda n, length: (0, max(0, length - n))
    shape = layout.shape
    layout = layout[:, :, : groups * per_block]
    layout = jnp.pad(
      layout, [(0, 0), (0, 0), fill(layout.shape[2], groups * per_block), fill(shape[3], num)]
    )
    return layout.reshape(*shape[:2], groups, per_block, num), ("table", span)

  # ----------------------------------------------------------------------------------- the views

  def keys(self, x):
    """Keys or values that the view has: [B, S, Hkv, D], of summaries those."""
    if self.one.view != "summaries":
      return x
    width, starts = self.one.width, self.one.starts
    x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
    x = x.reshape(x.shape[0], -1, self.stride, *x.shape[2:])
    found, *others = (x[:, :, start : start + width] for start in starts)
    which = jnp.arange(x.shape[3])[:, None] % len(starts)  # start of every head
    for n, part in enumerate(others, 1):
      found = jnp.where(which == n, part, found)
    return found.reshape(x.shape[0], -1, *x.shape[3:])

  def array(self, x, place: Place, D: int):
    """[B, T, H, D] as kernels read it: [sequences, rows, lanes], or with sublanes before lanes."""
    B, H = x.shape[0], x.shape[2]
    x = _padded(x, 3, D)
    if self.one.view in ("columns", "blocks"):
      x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
    if self.one.view == "columns":
      shape = {None: (-1,), "heads": (self.stride * H, D), "tokens": (self.stride, H * D)}
      x = x.reshape(B, x.shape[1] // self.stride, *shape[place.sublanes])
    else:
      rows = self.stride if self.one.view == "blocks" else x.shape[1]
      x = x.reshape(-1, rows, *((H, D) if place.sublanes else (H * D,)))
    return x

  def result(self, place: Place, like, D: int, count: int):
    """Of `count` heads for each group of heads, with the sequences and rows of an input."""
    B, rows, heads = *like[0].shape[:2], len(self.heads) // place.count * count
    stride = self.stride if self.one.view == "columns" else 1
    shape = {None: (stride * heads * D,), "heads": (stride * heads, D)}
    shape |= {"tokens": (stride, heads * D)}
    return jax.ShapeDtypeStruct((B, rows, *shape[place.sublanes]), self.dtype)

  def from_array(self, x, D: int, size: int, length: int):
    """A result of heads of `size` lanes as [B, length, heads, D]."""
    B, rows = x.shape[:2]
    heads = x.size // (B * rows * size)
    if self.one.view == "columns":
      x = x.reshape(B, rows * self.stride, heads // self.stride, size)
    else:
      whole = rows
      if self.one.view == "blocks":
        whole = -(-self.T // self.stride) * self.stride
      x = x.reshape(-1, whole, heads, size)
    return x[:, :length, :, :D]

  def from_keys(self, x, D: int, size: int):
    """dk or dv as [B, S, heads, D]: zeros where a view has none; those of one key's head added."""
    x = self.from_array(x, D, size, x.shape[1] if self.one.view == "summaries" else self.S)
    if self.one.view == "summaries":
      width, starts = self.one.width, self.one.starts
      x = x.reshape(x.shape[0], -1, width, *x.shape[2:])
      pad = lambda start: [(0, 0), (0, 0), (start, self.stride - start - width), (0, 0), (0, 0)]
      which = jnp.arange(x.shape[3])[:, None] % len(starts)
      mine = lambda n: x if len(starts) == 1 else jnp.where(which == n, x, 0)
      x = sum(jnp.pad(mine(n), pad(start)) for n, start in enumerate(starts))
      x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.S]
    if len(self.heads) == self.H:
      x = heads.sum_per_key_head(x, self.Hkv)
    return x

  def rows_shape(self, place: Place, like):
    """Of numbers of queries."""
    num = -(-self.sweep.num_queries // self.block) * self.block
    groups = len(self.groups(place).heads)
    return jax.ShapeDtypeStruct((like[0].shape[0], groups, place.num, num), jnp.float32)

  def rows(self, x, place: Place, fill: float):
    """Numbers of queries [B, T, Hg] as [sequences, groups, heads, T]; `fill` where none is."""
    B, heads = x.shape[0], x.shape[2]
    if self.one.view in ("columns", "blocks"):
      x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride, fill)
    if place.sublanes == "tokens":
      x = x.reshape(B, -1, self.stride // SUBLANES, SUBLANES, heads // place.count, place.count)
      x = x.transpose(0, 2, 4, 3, 5, 1)
    else:
      B = B * x.shape[1] // self.stride if self.one.view == "blocks" else B
      rows = x.size // (B * heads * (self.stride if self.one.view == "columns" else 1))
      x = x.reshape(B, rows, -1, place.num).transpose(0, 2, 3, 1)
    x = x.reshape(B, -1, place.num, x.shape[-1])
    return _padded(x, 3, -(-x.shape[3] // self.block) * self.block, fill)

  def from_rows(self, x, place: Place):
    """The way back, [B, T, Hg]."""
    x, B, heads = x[..., : self.sweep.num_queries], x.shape[0], len(self.heads)
    if place.sublanes == "tokens":
      x = x.reshape(B, self.stride // SUBLANES, -1, SUBLANES, place.count, x.shape[-1])
      x = x.transpose(0, 5, 1, 3, 2, 4)
    else:
      x = x.transpose(0, 3, 1, 2)
    if self.one.view == "blocks":
      B = x.size // heads // (-(-self.T // self.stride) * self.stride)
    return x.reshape(B, -1, heads)[:, : self.T]


def _are_tiles(count: int, size: int, total: int) -> bool:
  """Whether so many heads side by side are whole tiles, or all that an array has in one."""
  if count == total and total * size <= LANES:
    return True
  return count * size % LANES == 0 and (size % LANES == 0 or LANES % size == 0)


def _up(size: int) -> int:
  """Features as whole lanes."""
  return -(-size // LANES) * LANES


def _block(length: int, sizes) -> int | None:
  """Tokens of a block that blocks of `sizes` fill, or that fit into them."""
  if not sizes and length <= BLOCK:
    return max(16, -(-length // 16) * 16)
  fits = lambda block: all(
    (block % size == 0 and size % 8 == 0) or size % block == 0 for size in sizes
  )
  most = min(BLOCK, -(-length // LANES) * LANES)
  larger, smaller = range(most + LANES, BLOCK + 1, LANES), range(most, 0, -LANES)
  return next((n for n in (*smaller, *larger) if fits(n)), None)


def _joined_blocks(mask, size: int, block: int, nq: int, nk: int):
  """Whether some, and whether all entries of a block mask attend, in the blocks of a list."""
  split = max(1, size // block)
  mask = jnp.repeat(jnp.repeat(mask, split, axis=2), split, axis=3)
  per = max(1, block // size)
  shape = mask.shape
  mask = mask[:, :, : nq * per, : nk * per]
  fill = [(0, n * per - m) for n, m in zip((nq, nk), mask.shape[2:], strict=True)]
  cut = lambda x: x.reshape(*shape[:2], nq, per, nk, per)
  # What lies past the ends counts for neither.
  some = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill])).any(axis=(3, 5))
  every = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill], constant_values=True)).all(axis=(3, 5))
  return some, every


def _padded(x, axis: int, size: int, fill: float = 0.0):
  if x.shape[axis] == size:
    return x
  width = [(0, size - x.shape[axis] if n == axis else 0) for n in range(x.ndim)]
  return jnp.pad(x, width, constant_values=fill)
