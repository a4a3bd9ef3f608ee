"""Attention over a list of blocks, forward and backward, for a TPU's one core at a time.

q, k and v are read as [B, T, heads * D], the order in which projections leave them: a tile is 8
tokens by 128 features, and a block's last index picks the head, so nothing is moved or split. Row
statistics are replicated over the 128 lanes inside kernels, and lie along the lanes in memory.
Softmax in base 2. Keys have results over the transposed logits, [keys, queries]: neither weights
nor their gradients are transposed for a product.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import patterns
from pallas_kernels.mosaic_tpu.steps import FIRST
from pallas_kernels.mosaic_tpu.steps import FULL
from pallas_kernels.mosaic_tpu.steps import LAST
from pallas_kernels.mosaic_tpu.steps import PARTIAL
from pallas_kernels.mosaic_tpu.steps import Steps
from pallas_kernels.passes import Pass
from pallas_kernels.scores import Scores

LANES = 128
LOG2E = math.log2(math.e)
_NO_MAXIMUM = -1e30  # finite: exp2(-inf - it) is 0, also in a row without keys
_VMEM = 48 << 20
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


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
  def rows_end(self) -> bool:
    """Whether queries past the last one have to be masked: there logits may be anything."""
    return not self.scores.only_scale and self.num_queries % self.block > 0

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
    if self.num_keys % self.block:
      found = found & (keys < self.num_keys)
    if self.rows_end:
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


def forward(refs, sweep: Sweep, step):
  """out and lse of a row of blocks.

  All keys of a block at once: rows leave the first product one after another, and their softmax
  follows them.
  """
  del sweep
  q, k, v, top, total, acc = (refs[x] for x in ("q", "k", "v", "top", "total", "acc"))

  @pl.when(step.flags & FIRST != 0)
  def _():
    top[...] = jnp.full_like(top, _NO_MAXIMUM)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def attend(masked):
    x = step.logits(_dot(q[...], k[...], _NT), masked)[0]
    # The maximum has to be one number for a row; the sum may stay one for each lane.
    old = top[...]
    new = jnp.maximum(old, _wide(_by_lanes(jnp.maximum, x).max(axis=1)[:, None], LANES))
    p = jnp.exp2(x - _wide(new, x.shape[1]))
    keep = jnp.exp2(old - new)
    top[...] = new
    total[...] = total[...] * keep + _by_lanes(jnp.add, p)
    acc[...] = acc[...] * _wide(keep, acc.shape[1]) + _dot(p.astype(v.dtype), v[...])

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    sums = _wide(total[...].sum(axis=1)[:, None], LANES)
    mean = acc[...] * _wide(jnp.where(sums == 0, 0.0, 1 / sums), acc.shape[1])
    refs["out"][...] = mean.astype(refs["out"].dtype)
    refs["lse"][...] = _to_lanes(top[...] + jnp.log2(sums))


def dq(refs, sweep: Sweep, step):
  """dq of a row of blocks. The unit that crosses lanes is idle: it spreads lse and delta."""
  q, k, v, dout, lse, delta, acc = (
    refs[x] for x in ("q", "k", "v", "dout", "lse_s", "delta_s", "acc")
  )

  @pl.when(step.flags & FIRST != 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    lse[...] = _to_column(refs["lse"][...])
    delta[...] = _to_column(refs["delta"][...])

  def attend(masked):
    x, slope = step.logits(_dot(q[...], k[...], _NT), masked, slopes=True)
    p = jnp.exp2(x - lse[:, :1])
    ds = p * (_dot(dout[...], v[...], _NT) - delta[:, :1])
    ds = ds if slope is None else ds * slope
    acc[...] += _dot(ds.astype(k.dtype), k[...])

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    refs["dq"][...] = (acc[...] * sweep.factor).astype(refs["dq"].dtype)


def dkv(refs, sweep: Sweep, step):
  """dk and dv of a column of blocks."""
  q, k, v, dout, lse, delta, dk, dv = (
    refs[x] for x in ("q", "k", "v", "dout", "lse", "delta", "dk_s", "dv_s")
  )

  @pl.when(step.flags & FIRST != 0)
  def _():
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def attend(masked):
    x, slope = step.logits(_dot(k[...], q[...], _NT), masked, slopes=True)
    p = jnp.exp2(x - lse[...])
    ds = p * (_dot(v[...], dout[...], _NT) - delta[...])
    ds = ds if slope is None else ds * slope
    dv[...] += _dot(p.astype(dout.dtype), dout[...])
    dk[...] += _dot(ds.astype(q.dtype), q[...])

  step.each(attend)

  @pl.when(step.flags & LAST != 0)
  def _():
    refs["dk"][...] = (dk[...] * sweep.factor).astype(refs["dk"].dtype)
    refs["dv"][...] = dv[...].astype(refs["dv"].dtype)


class _Step:
  """The step that a kernel is in."""

  def __init__(self, refs, sweep: Sweep, flags, row, column, h, transposed: bool):
    self.refs, self.sweep, self.flags, self.h = refs, sweep, flags, h
    self.row, self.column, self.transposed = row, column, transposed

  def each(self, attend: Callable):
    """A body for steps without masks, and one for those with: no mask code in the first."""
    pl.when(self.flags & FULL != 0)(functools.partial(attend, False))
    pl.when(self.flags & PARTIAL != 0)(functools.partial(attend, True))

  def logits(self, products, masked: bool, slopes: bool = False):
    """In base 2, -inf where a pair does not attend, and derivatives."""
    sweep = self.sweep
    row, column = self.row * sweep.block, self.column * sweep.block
    queries, keys = sweep.positions(products.shape, row, column, self.transposed)
    x, slope = sweep.logits(products, queries, keys, self.h, slopes)
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
  return jnp.tile(x, (1, size // LANES))


def _by_lanes(op, x):
  """op over groups of 128 lanes, [rows, size] -> [rows, 128]: no lane meets another one."""
  return functools.reduce(op, [x[:, n : n + LANES] for n in range(0, x.shape[1], LANES)])


def _diagonal():
  square = LANES, LANES
  return lax.broadcasted_iota(jnp.int32, square, 0) == lax.broadcasted_iota(jnp.int32, square, 1)


def _to_lanes(x):
  """[rows, 128] of equal lanes -> [1, rows]: diagonals of squares, summed over sublanes."""
  squares = [x[n : n + LANES] for n in range(0, x.shape[0], LANES)]
  rows = [jnp.where(_diagonal(), one, 0.0).sum(axis=0)[None] for one in squares]
  return jnp.concatenate(rows, axis=1)


def _to_column(x):
  """[1, rows] -> [rows, 8] of equal lanes."""
  return jnp.transpose(jnp.broadcast_to(x, (8, x.shape[1])))


# ------------------------------------------------------------------------------------------ launch


def simulated() -> bool:
  """Whether kernels are interpreted: where programs are not built for a TPU."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.default_backend() if device is None else device.platform) != "tpu"


def launch(name, kernel, sweep: Sweep, steps: Steps, lanes, inputs, outputs, scratch):
  """Runs a kernel over the steps of every sequence and head.

  Args:
    name: of the kernel.
    kernel: (refs, sweep, step).
    sweep: what it sweeps.
    steps: of one sequence and head.
    lanes: for every head of the launch where the arrays of all heads have it: that of the queries,
      of the keys, and the number of the query head.
    inputs: (array, kind) by name; kinds are those of `_spec`.
    outputs: (shape, kind) by name.
    scratch: shapes of float32 memory, by name.
  """
  transposed = kernel is dkv
  num_rows, num_heads, num = steps.flags.shape
  batch, heads = inputs["q"][0].shape[0], len(lanes[0])

  def body(place, flags, q_lane, kv_lane, head, *refs):
    del q_lane, kv_lane
    refs = dict(zip((*inputs, *outputs, *scratch), refs, strict=True))
    b, h, i = (pl.program_id(n) for n in range(3))
    which = (b if num_rows > 1 else 0) * num_heads + (h if num_heads > 1 else 0)
    row, column = place[i] >> 16, place[i] & 0xFFFF
    step = _Step(refs, sweep, flags[which * num + i], row, column, head[h], transposed)
    kernel(refs, sweep, step)

  spec = functools.partial(_spec, sweep=sweep, transposed=transposed)
  found = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(batch, heads, num),
      in_specs=[spec(kind, x.shape) for x, kind in inputs.values()],
      out_specs=[spec(kind, x.shape) for x, kind in outputs.values()],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
    ),
    out_shape=[x for x, _ in outputs.values()],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
    ),
    interpret=simulated(),
    name=name,
  )
  return found(
    jnp.asarray(steps.place),
    jnp.asarray(steps.flags).reshape(-1),
    *(jnp.asarray(x, jnp.int32) for x in lanes),
    *(x for x, _ in inputs.values()),
  )


def _spec(kind: tuple, shape: tuple[int, ...], sweep: Sweep, transposed: bool):
  """Blocks of an array.

  Kinds: ("queries", D) and ("keys", D) of all heads [B, T, heads * D], ("q_results", D) and
  ("k_results", D) of a launch's; ("rows",) [B, H, 1, T] of queries' numbers; ids of ("lines",)
  [B, T, 1] and of ("others",) [B, 1, T]; ("table", lines of blocks to a group) [B or 1, H or 1,
  groups, entries of a group, others].
  """
  block, (name, *size) = sweep.block, kind
  row = lambda place, i: place[i] >> 16
  column = lambda place, i: place[i] & 0xFFFF
  line, other = (column, row) if transposed else (row, column)
  match name:
    case "rows":
      index = lambda b, h, i, place, *_: (b, h, 0, row(place, i))
      return pl.BlockSpec((None, None, 1, block), index)
    case "lines":
      return pl.BlockSpec((None, block, 1), lambda b, h, i, place, *_: (b, line(place, i), 0))
    case "others":
      return pl.BlockSpec((None, 1, block), lambda b, h, i, place, *_: (b, 0, other(place, i)))
    case "table":

      def index(b, h, i, place, *_):
        b, h = b if shape[0] > 1 else 0, h if shape[1] > 1 else 0
        return b, h, line(place, i) // size[0], 0, other(place, i)

      return pl.BlockSpec((None, None, None, shape[3], block), index)
  along = row if name in ("queries", "q_results") else column

  def index(b, h, i, place, flags, q_lane, kv_lane, head):
    del flags, head
    lane = dict(queries=q_lane, keys=kv_lane).get(name)
    return b, along(place, i), h if lane is None else lane[h]

  return pl.BlockSpec((None, block, size[0]), index)
