"""Attention over a list of blocks, forward and backward, for a TPU's one core at a time.

A step has one block of queries and one of keys, of several heads, whose work is independent and
fills each other's gaps. Row statistics are replicated over the 128 lanes inside kernels, and lie
along the lanes in memory. Softmax in base 2. Keys have results over the transposed logits, [keys,
queries]: neither weights nor their gradients are transposed for a product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import hardware
from pallas_kernels import patterns
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_tpu.operands import LANES
from pallas_kernels.mosaic_tpu.operands import Operand
from pallas_kernels.mosaic_tpu.steps import FIRST
from pallas_kernels.mosaic_tpu.steps import FULL
from pallas_kernels.mosaic_tpu.steps import LAST
from pallas_kernels.mosaic_tpu.steps import PARTIAL
from pallas_kernels.mosaic_tpu.steps import Steps
from pallas_kernels.mosaic_tpu.steps import STORE
from pallas_kernels.scores import Scores

LOG2E = math.log2(math.e)
INTERLEAVED = 4  # heads whose instructions fill each other's gaps
VMEM = 64 << 20  # bytes that a kernel may use; TPU7x has that, the others twice
_NO_MAXIMUM = -1e30  # finite: exp2(-inf - it) is 0, also in a row without keys
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a launch sweeps.

  Attributes:
    one: its pass.
    block: queries and keys of a block.
    num_queries, num_keys: real ones of a sequence.
    scores: how logits are made.
    leaves: the layouts of the pattern, each of which has a table.
  """

  one: Pass
  block: int
  num_queries: int
  num_keys: int
  scores: Scores
  leaves: tuple[patterns.BlockLayout, ...] = ()

  @property
  def queries_end(self) -> bool:
    """Whether the last block has more queries than there are."""
    return self.num_queries % self.block > 0

  @property
  def keys_end(self) -> bool:
    """The same of keys."""
    return self.num_keys % self.block > 0

  @property
  def factor(self) -> float:
    """Of the gradients of products, where slopes do not have it."""
    return self.scores.scale if self.scores.only_scale else 1.0

  def positions(self, shape, row, column, transposed: bool):
    """Queries and keys of a part of a block that begins at `row` and `column`."""
    queries = row + lax.broadcasted_iota(jnp.int32, shape, 1 if transposed else 0)
    return queries, column + lax.broadcasted_iota(jnp.int32, shape, 0 if transposed else 1)

  def logits(self, products, queries, keys, h, slopes: bool = False):
    """In base 2; where asked for and not constant, the derivatives of the natural ones."""
    if self.scores.only_scale:
      return products * (self.scores.scale * LOG2E), None
    heads = jnp.full(products.shape, h, jnp.int32)
    make = lambda x: self.scores(x, queries, keys, heads)
    if not slopes:
      return make(products) * LOG2E, None
    logits, slope = jax.jvp(make, (products,), (jnp.ones_like(products),))
    return logits * LOG2E, slope

  def mask(self, queries, keys, refs):
    """The pairs that attend."""
    i, j = self.one.query_position(queries), self.one.key_position(keys)
    tables = [_spread(refs[f"table{n}"], self.block) for n in range(len(self.leaves))]
    if self.one.pattern is None:
      found = self.one.allowed(i, j)
    else:
      found = _pairs(self.one.pattern, i, j, iter(tables))
    found = jnp.broadcast_to(found, queries.shape)
    if "block_mask" in refs:
      found = found & _spread(refs["block_mask"], self.block)
    if self.keys_end:
      found = found & (keys < self.num_keys)
    if self.queries_end:
      found = found & (queries < self.num_queries)
    return found


def leaves_of(pattern) -> tuple[patterns.BlockLayout, ...]:
  """The layouts in a pattern, in the order in which masks need them."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    return sum((leaves_of(one) for one in pattern.patterns), ())
  return (pattern,) if isinstance(pattern, patterns.BlockLayout) else ()


def _pairs(pattern, i, j, tables):
  """`pattern.allowed`, with tables for layouts: a kernel cannot look up by position."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    join = jnp.logical_or if isinstance(pattern, patterns.Union) else jnp.logical_and
    return functools.reduce(join, [_pairs(one, i, j, tables) for one in pattern.patterns])
  if isinstance(pattern, patterns.BlockLayout):
    found = next(tables)
    return found & (j <= i) if pattern.causal else found
  return pattern.allowed(i, j)


# ----------------------------------------------------------------------------------------- kernels


def forward(step: "_Step") -> None:
  """out and lse of a row of blocks.

  All keys of a block at once: rows leave the first product one after another, and their softmax
  follows them.
  """
  top, total, acc = (step.refs[x] for x in ("top", "total", "acc"))
  step.hold("q")

  @pl.when(step.flags & FIRST != 0)
  def _():
    top[...] = jnp.full_like(top, _NO_MAXIMUM)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def attend(heads, masked):
    qs, ks, vs = (step.tiles(x, heads, masked) for x in "qkv")
    for n in heads:
      q, k, v = step.head("q", qs, n, alone=True), step.head("k", ks, n), step.head("v", vs, n)
      x = step.logits(_dot(q, k, _NT), n, masked)[0]
      # The maximum has to be one number for a row; the sum may stay one for each lane.
      old = top[n]
      new = jnp.maximum(old, _wide(_by_lanes(jnp.maximum, x).max(axis=1)[:, None], LANES))
      p = jnp.exp2(x - _wide(new, x.shape[1]))
      keep = jnp.exp2(old - new)
      top[n] = new
      total[n] = total[n] * keep + _by_lanes(jnp.add, p)
      acc[n] = acc[n] * _wide(keep, acc.shape[2]) + _dot(p.astype(v.dtype), v)

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    out, tiles = step.operands["out"], {}
    for n in step.heads:
      sums = _wide(total[n].sum(axis=1)[:, None], LANES)
      mean = acc[n] * _wide(jnp.where(sums == 0, 0.0, 1 / sums), acc.shape[2])
      step.refs["lse"][0, 0, n : n + 1] = _to_lanes(top[n] + jnp.log2(sums))
      t = out.tile_of(n)
      tiles[t] = jnp.where(out.lanes_of(mean.shape, n), mean, tiles[t]) if t in tiles else mean
    out.store(step.refs["out"], list(tiles.values()))


def dq(step: "_Step") -> None:
  """dq of a row of blocks. The unit that crosses lanes is idle: it spreads lse and delta."""
  lse, delta, acc = (step.refs[x] for x in ("lse_s", "delta_s", "acc"))
  step.hold("q")
  step.hold("dout")

  @pl.when(step.flags & FIRST != 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    for n in step.heads:
      lse[n] = _to_column(step.refs["lse"][0, 0, n : n + 1])
      delta[n] = _to_column(step.refs["delta"][0, 0, n : n + 1])

  def attend(heads, masked):
    qs, ks, vs, douts = (step.tiles(x, heads, masked) for x in ("q", "k", "v", "dout"))
    for n in heads:
      q, k = step.head("q", qs, n, alone=True), step.head("k", ks, n)
      x, slope = step.logits(_dot(q, k, _NT), n, masked, slopes=True)
      p = jnp.exp2(x - lse[n][:, :1])
      dout, v = step.head("dout", douts, n, alone=True), step.head("v", vs, n)
      ds = p * (_dot(dout, v, _NT) - delta[n][:, :1])
      ds = ds if slope is None else ds * slope
      # Zeros of other heads keep each one to its own lanes of what they share.
      acc[step.tile("q", n)] += _dot(ds.astype(k.dtype), step.head("k", ks, n, alone=True))

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    tiles = [acc[t] * step.sweep.factor for t in range(acc.shape[0])]
    step.operands["dq"].store(step.refs["dq"], tiles)


def backward(step: "_Step") -> None:
  """dk and dv of a column of blocks, and dq, where all of a sequence's fits into memory.

  dq of a row is complete when all columns are done, which steps at the end store.
  """
  lse, delta, dk, dv = (step.refs[x] for x in ("lse", "delta", "dk_s", "dv_s"))
  dq, block = step.refs.get("dq_s"), step.sweep.block
  mine = pl.ds(pl.multiple_of(step.row * block, block), block)

  if dq is not None:

    @pl.when(step.number == 0)
    def _():
      dq[...] = jnp.zeros_like(dq)

  step.hold("k")
  step.hold("v")

  @pl.when(step.flags & FIRST != 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def attend(heads, masked):
    qs, ks, vs, douts = (step.tiles(x, heads, masked) for x in ("q", "k", "v", "dout"))
    for n in heads:
      q, k = step.head("q", qs, n, alone=True), step.head("k", ks, n)
      x, slope = step.logits(_dot(k, q, _NT), n, masked, slopes=True)
      p = jnp.exp2(x - lse[0, 0, n : n + 1])
      dout, v = step.head("dout", douts, n, alone=True), step.head("v", vs, n)
      ds = p * (_dot(v, dout, _NT) - delta[0, 0, n : n + 1])
      ds = (ds if slope is None else ds * slope).astype(q.dtype)
      dv[step.tile("v", n)] += _dot(p.astype(dout.dtype), dout)
      dk[step.tile("k", n)] += _dot(ds, q)
      if dq is not None:
        dq[step.tile("q", n), mine] += _dot(ds, step.head("k", ks, n, alone=True), _TN)

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    tiles = [dk[t] * step.sweep.factor for t in range(dk.shape[0])]
    step.operands["dk"].store(step.refs["dk"], tiles)
    step.operands["dv"].store(step.refs["dv"], [dv[t] for t in range(dv.shape[0])])

  if dq is not None:

    @pl.when(step.flags & STORE != 0)
    def _():
      tiles = [dq[t, mine] * step.sweep.factor for t in range(dq.shape[0])]
      step.operands["dq"].store(step.refs["dq"], tiles)


class _Step:
  """The step that a kernel is in.

  Attributes:
    refs, operands: of arrays, results and scratch memory, by name.
    kinds: the flags that some step has.
    number, flags, row, column: of the step.
    first_head: the number of the first query head of the step.
    heads: which heads of the block there are: 0 ... n - 1.
    together: so many of them have their instructions interleaved.
  """

  def __init__(self, refs, operands, sweep, kinds, place, flags, first_head, transposed):
    self.refs, self.operands, self.sweep, self.kinds = refs, operands, sweep, kinds
    self.number, self.flags, self.first_head = pl.program_id(2), flags, first_head
    self.row, self.column, self.transposed = place >> 16, place & 0xFFFF, transposed
    self.heads = range(operands["q"].num)
    pair = 2 * operands["q"].count if operands["q"].sublanes else 1
    self.together = max(INTERLEAVED, pair)

  def each(self, attend: Callable) -> None:
    """A body for steps without masks, and one for those with: no mask code in the first."""
    for n in range(0, len(self.heads), self.together):
      heads = self.heads[n : n + self.together]
      for kind in (FULL, PARTIAL):
        if self.kinds & kind:
          pl.when(self.flags & kind != 0)(functools.partial(attend, heads, kind == PARTIAL))

  def hold(self, name: str) -> None:
    """Takes apart, once for a line, an array that stays for all of it."""
    if not self.operands[name].sublanes:
      return

    @pl.when(self.flags & FIRST != 0)
    def _():
      numbers = range(self.operands[name].num_tiles)
      tiles = self.operands[name].tiles(self.refs[name], numbers, self._left(name))
      for n, tile in tiles.items():
        self.refs[f"{name}_held"][n] = tile

  def tiles(self, name: str, heads, masked: bool) -> dict:
    """The tiles of an array that some heads need; what lies past its end is zero."""
    numbers = {self.tile(name, n) for n in heads}
    if f"{name}_held" in self.refs:
      return {n: self.refs[f"{name}_held"][n] for n in numbers}
    left = self._left(name) if masked else None
    return self.operands[name].tiles(self.refs[name], numbers, left)

  def _left(self, name: str):
    """Rows of a block that the array has; None where it has all."""
    sweep, of_queries = self.sweep, name in ("q", "dout")
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

  def head(self, name: str, tiles: dict, head: int, alone: bool = False):
    """That tile; `alone`: without the heads that share it."""
    tile = tiles[self.tile(name, head)]
    return self.operands[name].only(tile, self._of_array(name, head)) if alone else tile

  def logits(self, products, head: int, masked: bool, slopes: bool = False):
    """In base 2, -inf where a pair does not attend, and derivatives."""
    sweep = self.sweep
    row, column = self.row * sweep.block, self.column * sweep.block
    queries, keys = sweep.positions(products.shape, row, column, self.transposed)
    x, slope = sweep.logits(products, queries, keys, self.first_head + head, slopes)
    if not masked:
      return x, slope
    mask = sweep.mask(queries, keys, self.refs)
    if "ids_of_lines" in self.refs:
      mask = mask & (self.refs["ids_of_lines"][...] == self.refs["ids_of_others"][...])
    slope = None if slope is None else jnp.where(mask, slope, 0.0)
    return jnp.where(mask, x, -jnp.inf), slope


def _spread(table, block: int):
  """A table [groups of lines, others] as which of [block, others] attend."""
  found = table[...].astype(jnp.int32)
  size = block // found.shape[0]
  found = jnp.broadcast_to(found[:, None, :], (found.shape[0], size, found.shape[1]))
  return found.reshape(block, -1) != 0


def _dot(a, b, dims=_NN):
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _wide(x, size: int):
  """[rows, 1], or [rows, 128] of equal lanes, as [rows, size]."""
  if x.shape[1] == 1:
    return jnp.broadcast_to(x, (x.shape[0], size))
  if size < LANES:
    return x[:, :size]
  parts = [x] * (size // LANES) + [x[:, : size % LANES]] * (size % LANES > 0)
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _by_lanes(op, x):
  """op over groups of 128 lanes, [rows, size] -> [rows, 128]: no lane meets another one."""
  whole = x.shape[1] - x.shape[1] % LANES
  parts = [x[:, n : n + LANES] for n in range(0, whole, LANES)]
  if whole < x.shape[1]:  # of a short sequence: one block, whose last lanes nothing else fills
    unit = -jnp.inf if op is jnp.maximum else 0.0
    rest = x[:, whole:]
    fill = jnp.full((x.shape[0], LANES - rest.shape[1]), unit, x.dtype)
    parts.append(jnp.concatenate([rest, fill], axis=1))
  return functools.reduce(op, parts)


def _diagonal(rows: int):
  shape = rows, LANES
  return lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(jnp.int32, shape, 1)


def _to_lanes(x):
  """[rows, 128] of equal lanes -> [1, rows]: diagonals of squares, summed over sublanes."""
  squares = [x[n : n + LANES] for n in range(0, x.shape[0], LANES)]
  row = lambda one: jnp.where(_diagonal(len(one)), one, 0.0).sum(axis=0)[None, : len(one)]
  return jnp.concatenate([row(one) for one in squares], axis=1)


def _to_column(x):
  """[1, rows] -> [rows, 8] of equal lanes."""
  return jnp.transpose(jnp.broadcast_to(x, (8, x.shape[1])))


# ------------------------------------------------------------------------------------------ launch


def simulated() -> bool:
  """Whether kernels are interpreted: where programs are not built for a TPU."""
  return hardware.platform() != "tpu"


def tall_tiles() -> bool:
  """Whether a tile of bfloat16 has 16 sublanes: 8 heads or tokens then do not lie side by side."""
  return hardware.device_kind().startswith("TPU7")


@dataclasses.dataclass(frozen=True)
class Groups:
  """For every step over heads (a group of them): where arrays have it.

  Attributes:
    queries, keys: the number of the block of heads in the arrays of all heads.
    heads: the number of the first query head.
  """

  queries: np.ndarray
  keys: np.ndarray
  heads: np.ndarray


def launch(name, kernel, sweep: Sweep, steps: Steps, groups: Groups, inputs, outputs, scratch):
  """Runs a kernel over the steps of every sequence and group of heads.

  Args:
    name: of the kernel.
    kernel: of a `_Step`.
    sweep: what it sweeps.
    steps: of one sequence and group.
    groups: of heads.
    inputs: (array, kind) by name; kinds are those of `_spec`.
    outputs: (shape, kind) by name.
    scratch: shapes of memory, by name; (shape, dtype) where that is not float32.
  """
  transposed = kernel is backward
  num_rows, num_heads, num = steps.flags.shape
  batch, num_groups = inputs["q"][0].shape[0], len(groups.heads)
  arrays = inputs | outputs
  traced = not isinstance(steps.flags, np.ndarray)
  kinds = FULL | PARTIAL if traced else int(np.bitwise_or.reduce(steps.flags, axis=None))
  operands = {name: kind[1] for name, (_, kind) in arrays.items() if isinstance(kind[1], Operand)}
  for name_held in ("k", "v") if transposed else ("q", "dout"):
    if name_held in inputs and (held := operands[name_held]).sublanes:
      shape = held.num_tiles, held.rows, held.tile
      scratch = scratch | {f"{name_held}_held": (shape, inputs[name_held][0].dtype)}

  def body(place, flags, q_group, k_group, head, *refs):
    del q_group, k_group
    refs = dict(zip((*arrays, *scratch), refs, strict=True))
    b, h, i = (pl.program_id(n) for n in range(3))
    which = (b if num_rows > 1 else 0) * num_heads + (h if num_heads > 1 else 0)
    how = place[i], flags[which * num + i], head[h]
    kernel(_Step(refs, operands, sweep, kinds, *how, transposed))

  memory = [x if isinstance(x[0], tuple) else (x, jnp.float32) for x in scratch.values()]
  specs = [_spec(kind, x.shape, sweep, steps, transposed) for x, kind in arrays.values()]
  found = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(batch, num_groups, num),
      in_specs=specs[: len(inputs)],
      out_specs=specs[len(inputs) :],
      scratch_shapes=[pltpu.VMEM(*x) for x in memory],
    ),
    out_shape=[x for x, _ in outputs.values()],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
    ),
    interpret=simulated(),
    name=name,
  )
  return found(
    jnp.asarray(steps.place),
    jnp.asarray(steps.flags).reshape(-1),
    *(jnp.asarray(x, jnp.int32) for x in (groups.queries, groups.keys, groups.heads)),
    *(x for x, _ in inputs.values()),
  )


def _spec(kind: tuple, shape: tuple[int, ...], sweep: Sweep, steps: Steps, transposed: bool):
  """Blocks of an array.

  Kinds: ("queries" | "keys", Operand) of the arrays of all heads; ("q_results" | "k_results",
  Operand) of those of a launch, and "dq" of what is stored at the end; ("rows", n) of queries'
  numbers [B, groups, n, T]; ids of ("lines", 1) [B, T, 1] and of ("others", 1) [B, 1, T];
  ("table", lines of blocks to a group) [B or 1, H or 1, groups, entries of a group, others].
  """
  block, (name, what) = sweep.block, kind
  row = lambda place, i: place[i] >> 16
  column = lambda place, i: place[i] & 0xFFFF
  line, other = (column, row) if transposed else (row, column)
  match name:
    case "rows":
      index = lambda b, h, i, place, *_: (b, h, 0, row(place, i))
      return pl.BlockSpec((1, 1, what, block), index)
    case "lines":
      return pl.BlockSpec((None, block, 1), lambda b, h, i, place, *_: (b, line(place, i), 0))
    case "others":
      return pl.BlockSpec((None, 1, block), lambda b, h, i, place, *_: (b, 0, other(place, i)))
    case "table":

      def index(b, h, i, place, *_):
        b, h = b if shape[0] > 1 else 0, h if shape[1] > 1 else 0
        return b, h, line(place, i) // what, 0, other(place, i)

      return pl.BlockSpec((None, None, None, shape[3], block), index)

  first_store = steps.place.size - -(-sweep.num_queries // block)

  def index(b, h, i, place, flags, q_group, k_group, head):
    del flags, head
    group = dict(queries=q_group, keys=k_group).get(name)
    group = h if group is None else group[h]
    if name == "dq":
      at = jnp.maximum(i - first_store, 0)
    else:
      at = (row if name in ("queries", "q_results") else column)(place, i)
    if not what.sublanes:
      return b, at, group
    per_row = shape[3] // what.width
    return b, at, lax.div(group, per_row), lax.rem(group, per_row)

  return pl.BlockSpec(what.block, index)
