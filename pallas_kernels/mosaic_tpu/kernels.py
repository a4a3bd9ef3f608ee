"""Attention over a list of blocks, forward and backward, for a TPU's one core at a time.

A step has one block of queries and one of keys, of several heads, whose work is independent and
fills each other's gaps. Row statistics are replicated over the 128 lanes inside kernels, and lie
along the lanes in memory. Softmax in base 2. Keys have results over the transposed logits, [keys,
queries]: neither weights nor their gradients are transposed for a product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.steps import FIRST
from pallas_kernels.mosaic_tpu.steps import FULL
from pallas_kernels.mosaic_tpu.steps import LAST
from pallas_kernels.mosaic_tpu.steps import PARTIAL
from pallas_kernels.mosaic_tpu.steps import STORE

INTERLEAVED = 4  # heads whose instructions fill each other's gaps
_NO_MAXIMUM = -1e30  # finite: exp2(-inf - it) is 0, also in a row without keys
# The axes that a product sums over: the last of both, those of a b, the first of both.
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def forward(step: "Step") -> None:
  """out and lse of a row of blocks.

  All keys of a block at once: rows leave the first product one after another, and their softmax
  follows them.
  """
  top, total, acc = (step.refs[x] for x in ("top", "total", "acc"))
  # The queries of a row stay for all of its steps: they are taken apart once.
  step.hold("q")

  @pl.when(step.flags & FIRST != 0)
  def _() -> None:
    top[...] = jnp.full_like(top, _NO_MAXIMUM)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def attend(heads: Any, masked: bool) -> None:
    qs, ks, vs = (step.tiles(x, heads, masked) for x in "qkv")
    for n in heads:
      q, k, v = step.head("q", qs, n, alone=True), step.head("k", ks, n), step.head("v", vs, n)
      # Alone, of the factors, is q: zeros of its neighbours' lanes take their products out of the
      # sum.
      x = step.logits(_dot(q, k, _NT), n, masked)[0]
      # The maximum has to be one number for a row; the sum may stay one for each lane.
      old = top[n]
      new = jnp.maximum(old, _wide(_by_lanes(jnp.maximum, x).max(axis=1)[:, None], LANES))
      p = jnp.exp2(x - _wide(new, x.shape[1]))
      # What was summed under the old maximum counts for less under the new one.
      keep = jnp.exp2(old - new)
      top[n] = new
      total[n] = total[n] * keep + _by_lanes(jnp.add, p)
      # Lanes of heads that share the tile of v fill with what nobody reads: the end selects its
      # own.
      acc[n] = acc[n] * _wide(keep, acc.shape[2]) + _dot(p.astype(v.dtype), v)

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _() -> None:
    out, tiles = step.operands["out"], {}
    for n in step.heads:
      # Only here do the lanes of a sum meet: once a row of blocks, not once a block.
      sums = _wide(total[n].sum(axis=1)[:, None], LANES)
      # A row without keys has the result 0; its lse, of log2(0), is -inf.
      mean = acc[n] * _wide(jnp.where(sums == 0, 0.0, 1 / sums), acc.shape[2])
      step.refs["lse"][0, 0, n : n + 1] = _to_lanes(top[n] + jnp.log2(sums))
      t = out.tile_of(n)
      tiles[t] = jnp.where(out.lanes_of(mean.shape, n), mean, tiles[t]) if t in tiles else mean
    out.store(step.refs["out"], list(tiles.values()))


def dq(step: "Step") -> None:
  """dq of a row of blocks. The unit that crosses lanes is idle: it spreads lse and delta."""
  lse, delta, acc = (step.refs[x] for x in ("lse_s", "delta_s", "acc"))
  step.hold("q")
  step.hold("dout")

  @pl.when(step.flags & FIRST != 0)
  def _() -> None:
    acc[...] = jnp.zeros_like(acc)
    for n in step.heads:
      # Along the lanes in memory, where 128 times as many would be moved otherwise; here once a
      # row.
      lse[n] = _to_column(step.refs["lse"][0, 0, n : n + 1])
      delta[n] = _to_column(step.refs["delta"][0, 0, n : n + 1])

  def attend(heads: Any, masked: bool) -> None:
    qs, ks, vs, douts = (step.tiles(x, heads, masked) for x in ("q", "k", "v", "dout"))
    for n in heads:
      q, k = step.head("q", qs, n, alone=True), step.head("k", ks, n)
      x, derivative = step.logits(_dot(q, k, _NT), n, masked, derivatives=True)
      # No maximum is taken: lse is that of the whole softmax, so that weights are at most 1.
      p = jnp.exp2(x - lse[n][:, :1])
      dout, v = step.head("dout", douts, n, alone=True), step.head("v", vs, n)
      # dout alone, for the sum over the lanes of v; v may keep its neighbours.
      ds = p * (_dot(dout, v, _NT) - delta[n][:, :1])
      ds = ds if derivative is None else ds * derivative
      # Zeros of other heads keep each one to its own lanes of what they share.
      acc[step.tile("q", n)] += _dot(ds.astype(k.dtype), step.head("k", ks, n, alone=True))

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _() -> None:
    # The scale, left out of every step, comes in once.
    tiles = [acc[t] * step.sweep.factor for t in range(acc.shape[0])]
    step.operands["dq"].store(step.refs["dq"], tiles)


def backward(step: "Step") -> None:
  """dk and dv of a column of blocks, and dq, where all of a sequence's fits into memory.

  dq of a row is complete when all columns are done, which steps at the end store.
  """
  lse, delta, dk, dv = (step.refs[x] for x in ("lse", "delta", "dk_s", "dv_s"))
  dq, block = step.refs.get("dq_s"), step.sweep.block
  # That a traced start is a multiple, as whole tiles need, the compiler cannot see by itself.
  rows_of_dq = pl.ds(pl.multiple_of(step.row * block, block), block)

  if dq is not None:

    @pl.when(step.number == 0)
    def _() -> None:
      # Steps of any column may be the first to meet a row.
      dq[...] = jnp.zeros_like(dq)

  step.hold("k")
  step.hold("v")

  @pl.when(step.flags & FIRST != 0)
  def _() -> None:
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def attend(heads: Any, masked: bool) -> None:
    qs, ks, vs, douts = (step.tiles(x, heads, masked) for x in ("q", "k", "v", "dout"))
    for n in heads:
      q, k = step.head("q", qs, n, alone=True), step.head("k", ks, n)
      x, derivative = step.logits(_dot(k, q, _NT), n, masked, derivatives=True)
      # Queries lie along the lanes here, as their numbers do in memory: nothing has to turn.
      p = jnp.exp2(x - lse[0, 0, n : n + 1])
      dout, v = step.head("dout", douts, n, alone=True), step.head("v", vs, n)
      ds = p * (_dot(v, dout, _NT) - delta[0, 0, n : n + 1])
      ds = (ds if derivative is None else ds * derivative).astype(q.dtype)
      dv[step.tile("v", n)] += _dot(p.astype(dout.dtype), dout)
      dk[step.tile("k", n)] += _dot(ds, q)
      if dq is not None:
        # [keys, queries] times k over the keys: the one product here whose first factor is turned.
        dq[step.tile("q", n), rows_of_dq] += _dot(ds, step.head("k", ks, n, alone=True), _TN)

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _() -> None:
    tiles = [dk[t] * step.sweep.factor for t in range(dk.shape[0])]
    step.operands["dk"].store(step.refs["dk"], tiles)
    step.operands["dv"].store(step.refs["dv"], [dv[t] for t in range(dv.shape[0])])

  if dq is not None:

    @pl.when(step.flags & STORE != 0)
    def _() -> None:
      tiles = [dq[t, rows_of_dq] * step.sweep.factor for t in range(dq.shape[0])]
      step.operands["dq"].store(step.refs["dq"], tiles)


class Step:
  """The step that a kernel is in.

  Attributes:
    refs, operands: of arrays, results and scratch memory, by name.
    kinds: the flags that some step has.
    number, flags, row, column: of the step.
    first_head: the number of the first query head of the step.
    heads: which heads of the block there are: 0 ... n - 1.
    together: so many of them have their instructions interleaved.
  """

  def __init__(
    self,
    refs: Any,
    operands: Any,
    sweep: Any,
    kinds: Any,
    place: Any,
    flags: Any,
    first_head: Any,
    transposed: bool,
  ):
    self.refs, self.operands, self.sweep, self.kinds = refs, operands, sweep, kinds
    self.number, self.flags, self.first_head = pl.program_id(2), flags, first_head
    self.row, self.column, self.transposed = place >> 16, place & 0xFFFF, transposed
    self.heads = range(operands["q"].num)
    # Of bfloat16 two sublanes come out of one word: a group of heads has both, or they would be
    # loaded twice.
    pair = 2 * operands["q"].count if operands["q"].sublanes else 1
    self.together = max(INTERLEAVED, pair)

  def each(self, attend: Callable) -> None:
    """A body for steps without masks, and one for those with: no mask code in the first."""
    for n in range(0, len(self.heads), self.together):
      heads = self.heads[n : n + self.together]
      for kind in (FULL, PARTIAL):
        # Code for a kind that no step has would only cost compilation and memory.
        if self.kinds & kind:
          pl.when(self.flags & kind != 0)(functools.partial(attend, heads, kind == PARTIAL))

  def hold(self, name: str) -> None:
    """Takes apart, once for a line, an array that stays for all of it."""
    # Without sublanes a tile is a slice of the block: nothing has to be taken apart.
    if not self.operands[name].sublanes:
      return

    @pl.when(self.flags & FIRST != 0)
    def _() -> None:
      numbers = range(self.operands[name].num_tiles)
      tiles = self.operands[name].tiles(self.refs[name], numbers, self._left(name))
      for n, tile in tiles.items():
        self.refs[f"{name}_held"][n] = tile

  def tiles(self, name: str, heads: Any, masked: bool) -> dict:
    """The tiles of an array that some heads need; what lies past its end is zero."""
    numbers = {self.tile(name, n) for n in heads}
    if f"{name}_held" in self.refs:
      return {n: self.refs[f"{name}_held"][n] for n in numbers}
    # What a step without a mask sums over are whole blocks, by how steps are listed.
    left = self._left(name) if masked else None
    return self.operands[name].tiles(self.refs[name], numbers, left)

  def _left(self, name: str) -> Any:
    """Rows of a block that the array has; None where it has all."""
    sweep, of_queries = self.sweep, name in ("q", "dout")
    # Past the end of an array a block holds whatever was in memory, maybe NaN, which a weight of 0
    # does not undo in a product.
    if not (sweep.queries_end if of_queries else sweep.keys_end):
      return None
    if of_queries:
      return sweep.num_queries - self.row * sweep.block
    return sweep.num_keys - self.column * sweep.block

  def _of_array(self, name: str, head: int) -> int:
    """The head of an array that query head `head` uses."""
    return head * self.operands[name].num // len(self.heads)

  def tile(self, name: str, head: int) -> int:
    """Which tile of an array query head `head` uses."""
    return self.operands[name].tile_of(self._of_array(name, head))

  def head(self, name: str, tiles: dict, head: int, alone: bool = False) -> Any:
    """That tile; `alone`: without the heads that share it."""
    tile = tiles[self.tile(name, head)]
    return self.operands[name].only(tile, self._of_array(name, head)) if alone else tile

  def logits(self, products: Any, head: int, masked: bool, derivatives: bool = False) -> tuple:
    """In base 2, -inf where a pair does not attend, and derivatives."""
    sweep = self.sweep
    row, column = self.row * sweep.block, self.column * sweep.block
    queries, keys = sweep.positions(products.shape, row, column, self.transposed)
    x, derivative = sweep.logits(products, queries, keys, self.first_head + head, derivatives)
    if not masked:
      return x, derivative
    mask = sweep.mask(queries, keys, self.refs)
    if "ids_of_lines" in self.refs:
      mask = mask & (self.refs["ids_of_lines"][...] == self.refs["ids_of_others"][...])
    # Of pairs that do not attend a derivative may be NaN, which a weight of 0 does not undo.
    derivative = None if derivative is None else jnp.where(mask, derivative, 0.0)
    return jnp.where(mask, x, -jnp.inf), derivative


def _dot(a: Any, b: Any, dims: tuple = _NN) -> Array:
  # The matrix unit multiplies bfloat16: only at this precision does float32 stay float32.
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _wide(x: Array, size: int) -> Array:
  """[rows, 1], or [rows, 128] of equal lanes, as [rows, size]."""
  if x.shape[1] == 1:
    return jnp.broadcast_to(x, (x.shape[0], size))
  if size < LANES:
    return x[:, :size]
  parts = [x] * (size // LANES) + [x[:, : size % LANES]] * (size % LANES > 0)
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _by_lanes(op: Callable, x: Array) -> Array:
  """op over groups of 128 lanes, [rows, size] -> [rows, 128]: no lane meets another one."""
  whole = x.shape[1] - x.shape[1] % LANES
  parts = [x[:, n : n + LANES] for n in range(0, whole, LANES)]
  if whole < x.shape[1]:  # of a short sequence: one block, whose last lanes nothing else fills
    # What changes neither a maximum nor a sum.
    unit = -jnp.inf if op is jnp.maximum else 0.0
    last = x[:, whole:]
    fill = jnp.full((x.shape[0], LANES - last.shape[1]), unit, x.dtype)
    parts.append(jnp.concatenate([last, fill], axis=1))
  return functools.reduce(op, parts)


def _diagonal(rows: int) -> Array:
  shape = rows, LANES
  return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


def _to_lanes(x: Array) -> Array:
  """[rows, 128] of equal lanes -> [1, rows]: diagonals of squares, summed over sublanes."""
  squares = [x[n : n + LANES] for n in range(0, x.shape[0], LANES)]
  row = lambda x: jnp.where(_diagonal(len(x)), x, 0.0).sum(axis=0)[None, : len(x)]
  return jnp.concatenate([row(square) for square in squares], axis=1)


def _to_column(x: Array) -> Array:
  """[1, rows] -> [rows, 8] of equal lanes."""
  return jnp.transpose(jnp.broadcast_to(x, (8, x.shape[1])))
