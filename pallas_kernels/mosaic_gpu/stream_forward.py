"""Streaming attention forward: a producer warpgroup feeds a ring of key tiles to compute warpgroups.

A thread block owns 64 queries per compute warpgroup, of one head of one sequence, and walks the key
tiles of its schedule: an online softmax in base 2, tiles that need no mask first.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.gpu import TILE

_NO_MAXIMUM = -1e30  # where a running maximum starts: finite, so that exp2(-inf - it) is 0


def default_blocks(Dk: int, Dv: int) -> stream.BlockSizes:
  """Tiles that fit shared memory and registers."""
  if max(Dk, Dv) > 128:
    return stream.BlockSizes(step=64)
  return stream.BlockSizes(stages=2 if max(Dk, Dv) > 64 else 3)


def forward(
  schedule: stream.Schedule,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  blocks: stream.BlockSizes | None = None,
) -> tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]]:
  """Attention of the heads `heads` over the pairs of a schedule.

  Args:
    schedule: the pairs.
    q, k, v: bfloat16 or float16, all heads; T a multiple of the stride of a strided view.
    segment_ids: int32; queries see keys of equal ids ("natural" and "blocks" views).
    scale: factor of the logits.
    heads: query heads to work on.
    blocks: tile sizes; by default what suits the head dimensions.

  Returns:
    The output, and the log-sum-exp of the logits in base 2, float32 per sequence of the view
    (Mp rows: the sequence rounded up to 128). Rows without keys get 0 and -inf.
  """
  B, T, H, Dk = q.shape
  Dv, Hg = v.shape[-1], len(heads)
  frame = stream.Frame(schedule, T, H, k.shape[2], heads, segment_ids is not None)
  blocks = blocks or default_blocks(Dk, Dv)
  rows = TILE * blocks.warpgroups
  shape = (B, T, Hg, Dv)
  out_type = (
    jax.ShapeDtypeStruct(jax.eval_shape(frame.folded, _like(shape, q)).shape, q.dtype),
    jax.ShapeDtypeStruct((B, Hg, frame.sequences, frame.padded), jnp.float32),
  )
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v))
  if schedule.own:
    inputs.update(own_k=k, own_v=v)
  if segment_ids is not None:
    inputs.update(ids=frame.ids(segment_ids))
  scratch = _scratch(frame, blocks, Dk, Dv, q.dtype)
  body = functools.partial(_kernel, frame=frame, blocks=blocks, scale=scale, dtype=q.dtype)

  def call(*refs):
    given, rest = refs[: len(inputs)], refs[len(inputs) :]
    named = dict(zip([*inputs, "out", "lse", *scratch], [*given, *rest], strict=True))
    body(named)

  out, lse = gpu.kernel(
    call,
    out_type=out_type,
    scratch_types=list(scratch.values()),
    num_threads=blocks.warpgroups + 1,
    thread_name="wg",
    **stream.over_grid(frame, blocks, B, -(-frame.length // rows), Hg),
  )(*inputs.values())
  return out.reshape(shape), lse


def _like(shape, x):
  return jax.ShapeDtypeStruct(shape, x.dtype)


def _scratch(frame, blocks, Dk, Dv, dtype):
  wgs, stages, step = blocks.warpgroups, blocks.stages, blocks.step
  scratch = dict(
    q_s=gpu.smem(wgs, TILE, Dk, dtype=dtype),
    k_s=gpu.smem(stages, step, Dk, dtype=dtype),
    v_s=gpu.smem(stages, step, Dv, dtype=dtype),
    lse_s=gpu.vector(wgs, TILE),
    q_full=gpu.Barrier(num_barriers=wgs),
    k_full=gpu.Barrier(
      num_barriers=stages, num_arrivals=frame.pieces(step) + (1 if frame.segments else 0)
    ),
    v_full=gpu.Barrier(num_barriers=stages, num_arrivals=frame.pieces(step)),
    k_free=gpu.Barrier(num_barriers=stages, num_arrivals=wgs),
    v_free=gpu.Barrier(num_barriers=stages, num_arrivals=wgs),
  )
  if Dk != Dv:
    scratch.update(out_s=gpu.smem(wgs, TILE, Dv, dtype=dtype))
  if frame.segments:
    scratch.update(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  if blocks.turns:
    scratch.update(turn=gpu.Barrier(num_arrivals=2))
  if gpu.simulated():
    scratch.update(p_s=gpu.smem(wgs, TILE, step, dtype=dtype))
  return scratch


def _kernel(refs, *, frame, blocks, scale, dtype):
  """One thread block: the last warpgroup loads, the others compute."""
  place = tuple(lax.axis_index(name) for name in ("b", "r", "h", "tile"))
  wg = lax.axis_index("wg")
  b, r, h, tile = place
  rows = TILE * blocks.warpgroups
  q0 = (-(-frame.length // rows) - 1 - tile) * rows  # the longest rows are the last ones
  sweep = Sweep(frame, blocks.step, q0, rows)

  @pl.when(wg == blocks.warpgroups)
  def _():
    gpu.set_max_registers(_registers(blocks)[0], action="decrease")
    produce(refs, frame, blocks, sweep, b, r, h)

  @pl.when(wg < blocks.warpgroups)
  def _():
    gpu.set_max_registers(_registers(blocks)[1], action="increase")
    _Consumer(refs, frame, blocks, sweep, (b, r, h), q0 + wg * TILE, wg, scale, dtype).run()


def _registers(blocks):
  return {1: (40, 240), 2: (40, 232), 3: (24, 160)}[blocks.warpgroups]


class Sweep:
  """The steps of a thread block of queries: tiles of the view, then of the queries' own rows."""

  def __init__(self, frame: stream.Frame, step: int, q0, rows: int):
    self.frame, self.step = frame, step
    self.tiles = frame.key_tiles(q0, rows, step)
    self.num_view = self.num = self.tiles.num
    if frame.schedule.own:
      self.own_first, count = frame.own_tiles(q0, rows, step)
      self.num = self.num_view + count
    else:
      # A sweep without tiles visits one all the same, whose mask hides every key: no loop, barrier
      # or epilogue has to know about it.
      self.num = jnp.maximum(self.num, 1)

  @property
  def num_full(self):
    return self.tiles.num_full

  def own_key(self, i):
    """First key of step i, one over the queries' own rows."""
    return self.own_first + (i - self.num_view) * self.step


def produce(refs, frame, blocks, sweep, b, r, h):
  """Loads the tiles of a sweep into the ring, as far ahead as it goes."""
  step = blocks.step
  pieces, pairs = frame.pieces(step), []
  for name in ("k", "v"):
    pairs.append(tuple(refs[f"{name}{end}"] for end in ("", "_s", "_full", "_free")))

  @pl.loop(0, sweep.num)
  def _(i):
    s = lax.rem(i, jnp.int32(blocks.stages))
    for name, (source, ring, full, free) in zip("kv", pairs, strict=True):
      copy = lambda piece, first, size, ring=ring, full=full: gpu.to_smem(
        piece, ring.at[s, pl.ds(first, size)], full.at[s]
      )

      def load_view(name=name, source=source, copy=copy, full=full):
        tile = sweep.tiles.tile(i)
        frame.load_keys(copy, source, b, r, h, tile, step)
        if frame.segments and name == "k":
          ids = refs["ids"].at[b, r, pl.ds(tile * step, step)]
          gpu.to_smem(ids, refs["ids_s"].at[s], full.at[s])

      def load_own(name=name, copy=copy):
        size = step // pieces
        for n in range(pieces):
          key = sweep.own_key(i) + n * size
          copy(refs[f"own_{name}"].at[b, pl.ds(key, size), frame.kv_head(h)], n * size, size)

      pl.when(i >= blocks.stages)(lambda free=free: gpu.barrier_wait(free.at[s]))
      if frame.schedule.own:
        pl.when(i < sweep.num_view)(load_view)
        pl.when(i >= sweep.num_view)(load_own)
      else:
        load_view()

  @pl.loop(jnp.maximum(sweep.num - blocks.stages, 0), sweep.num)
  def _(i):  # every completion of a barrier has to be observed
    for *_, free in pairs:
      gpu.barrier_wait(free.at[lax.rem(i, jnp.int32(blocks.stages))])


class Masks:
  """The pairs of 64 queries and the keys of a step that attend."""

  def __init__(self, refs, frame, sweep, place, base):
    self.refs, self.frame, self.sweep, self.base = refs, frame, sweep, base
    self.b, self.r, self.h = place
    self.bounds = frame.query_bounds(base, TILE, gpu.ROW)
    if frame.segments:
      ids = refs["ids"].at[self.b, self.r, pl.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def __call__(self, i, s, own: bool):
    """Which of [64, step] attend in step i, whose tile lies in slot s."""
    step = self.sweep.step
    if own:
      places = self.sweep.own_key(i) + gpu.iota((step,), layout=gpu.COLUMN)
      high, low = self.frame.own_bounds(self.base, TILE, gpu.ROW)
    else:
      places = self.frame.key_places(self.sweep.tiles.tile(i) * step, step, self.h, gpu.COLUMN)
      high, low = self.bounds
    rows, columns = (lambda x: gpu.over_columns(x, step)), (lambda x: gpu.over_rows(x, TILE))
    mask = rows(high) >= columns(places)
    if low is not None:
      mask = mask & (rows(low) <= columns(places))
    if self.frame.segments:
      ids = gpu.load(self.refs["ids_s"].at[s], layout=gpu.COLUMN, optimized=False)
      mask = mask & (rows(self.ids) == columns(ids))
      gpu.commit_smem()  # the next ids come by TMA, which does not wait for plain reads
    return mask


class _Consumer:
  """64 queries of a thread block."""

  def __init__(self, refs, frame, blocks, sweep, place, base, wg, scale, dtype):
    self.refs, self.frame, self.blocks, self.sweep = refs, frame, blocks, sweep
    self.place, self.base, self.wg, self.dtype = place, base, wg, dtype
    self.scale = scale * gpu.LOG2E
    self.q_s = refs["q_s"].at[wg]
    self.p_s = refs["p_s"].at[wg] if "p_s" in refs else None
    self.Dv = refs["v_s"].shape[-1]

  def run(self):
    refs, (b, r, h), wg = self.refs, self.place, self.wg
    q = self.frame.tile(refs["q"], b, r, self.base, TILE, self.frame.head(h))
    gpu.to_smem(q, self.q_s, refs["q_full"].at[wg])
    self.masks = Masks(refs, self.frame, self.sweep, self.place, self.base)
    gpu.barrier_wait(refs["q_full"].at[wg])
    acc, top, total = self.ahead() if self.blocks.ahead else self.in_turn()
    empty = total == 0
    weight = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
    out_s = refs.get("out_s", refs["q_s"]).at[wg]
    out_s[...] = (acc * gpu.over_columns(weight, self.Dv)).astype(self.dtype)
    lse = jnp.where(empty, -jnp.inf, top * self.scale + jnp.log2(total))
    refs["lse_s"].at[wg][...] = lse
    gpu.commit_smem()
    gpu.to_gmem(out_s, self.frame.tile(refs["out"], b, r, self.base, TILE, h))
    gpu.to_gmem(refs["lse_s"].at[wg], refs["lse"].at[b, h, r, pl.ds(self.base, TILE)])
    gpu.wait_to_gmem(0)

  def start(self):
    return gpu.zeros((TILE, self.Dv)), gpu.full((TILE,), _NO_MAXIMUM), gpu.full((TILE,), 0.0)

  def slot(self, i):
    return lax.rem(i, jnp.int32(self.blocks.stages))

  def loops(self, step, first, carry):
    """Runs step(i, carry, kind) over the steps from `first` on, a loop per kind of mask."""
    full, view = self.sweep.num_full, self.sweep.num_view
    loop = lambda start, stop, kind, carry: lax.fori_loop(
      start, stop, functools.partial(step, kind=kind), carry
    )
    if not self.frame.segments:
      carry = loop(first, full, None, carry)
    if not self.frame.schedule.own:
      return loop(jnp.maximum(full, first), self.sweep.num, "view", carry)
    carry = loop(jnp.maximum(full, first), view, "view", carry)
    return loop(jnp.maximum(view, first), self.sweep.num, "own", carry)

  def weights(self, x, top, total, mask):
    """exp2 of logits x under the running maximum; new maximum, sum of weights, rescaling."""
    if mask is not None:
      x = jnp.where(mask, x, -jnp.inf)
    new_top = jnp.maximum(top, x.max(axis=1))
    # Subtracted before it is scaled: logits of 1e10 would leave a rounding error of 2^9 to exp2.
    p = jnp.exp2((x - gpu.over_columns(new_top, x.shape[1])) * self.scale)
    keep = jnp.exp2((top - new_top) * self.scale)
    return p, new_top, total * keep + p.sum(axis=1), keep

  def in_turn(self):
    """Each step: logits, softmax, weighted sum. Two warpgroups fill each other's gaps."""
    refs, turns, last = self.refs, self.blocks.turns, self.blocks.warpgroups - 1

    def turn():
      if turns:
        gpu.barrier_arrive(refs["turn"])
        gpu.barrier_wait(refs["turn"])

    def step(i, carry, kind):
      acc, top, total = carry
      s = self.slot(i)
      gpu.barrier_wait(refs["k_full"].at[s])
      x = gpu.matmul(self.q_s, refs["k_s"].at[s].transpose((1, 0)), turn)
      mask = None if kind is None else self.masks(i, s, kind == "own")
      gpu.barrier_arrive(refs["k_free"].at[s])
      p, top, total, keep = self.weights(x, top, total, mask)
      acc = acc * gpu.over_columns(keep, self.Dv)
      p = p.astype(self.dtype)
      if turns:
        acc, top, total, p = lax.optimization_barrier((acc, top, total, p))
        gpu.barrier_arrive(refs["turn"])
      gpu.barrier_wait(refs["v_full"].at[s])
      if turns:
        gpu.barrier_wait(refs["turn"])
      acc = gpu.add_matmul(acc, p, refs["v_s"].at[s], self.p_s)
      gpu.barrier_arrive(refs["v_free"].at[s])
      return acc, top, total

    if turns:
      pl.when(self.wg == last)(turn)
    carry = self.loops(step, 0, self.start())
    if turns:
      pl.when(self.wg == 0)(turn)
    return carry

  def ahead(self):
    """The logits of a step are made while the weighted sum of the step before runs."""
    refs = self.refs

    def logits(i):
      s = self.slot(i)
      gpu.barrier_wait(refs["k_full"].at[s])
      return refs["k_s"].at[s].transpose((1, 0))

    def free(i):
      gpu.barrier_arrive(refs["k_free"].at[self.slot(i)])

    def step(i, carry, kind):
      acc, p, top, total = carry
      s, before = self.slot(i), self.slot(i - 1)
      k_t = logits(i)
      v = refs["v_s"].at[before]

      def softmax(x):
        mask = None if kind is None else self.masks(i, s, kind == "own")
        free(i)
        return self.weights(x, top, total, mask)

      wait = lambda: gpu.barrier_wait(refs["v_full"].at[before])
      new, acc = gpu.overlapped(self.q_s, k_t, softmax, acc, p, v, wait, self.p_s)
      gpu.barrier_arrive(refs["v_free"].at[before])
      p, top, total, keep = new
      # Behind the barrier, so that the registers of the old p are not overwritten in use.
      acc, p = lax.optimization_barrier((acc, p))
      return acc * gpu.over_columns(keep, self.Dv), p.astype(self.dtype), top, total

    acc, top, total = self.start()
    first = jnp.int32(0)
    x = gpu.matmul(self.q_s, logits(first))
    if self.frame.schedule.own:
      view = self.masks(first, first, False)
      mask = jnp.where(self.sweep.num_view > 0, view, self.masks(first, first, True))
    else:
      mask = self.masks(first, first, False)
    free(first)
    p, top, total, _ = self.weights(x, top, total, mask)
    acc, p, top, total = self.loops(step, 1, (acc, p.astype(self.dtype), top, total))
    s = self.slot(self.sweep.num - 1)
    gpu.barrier_wait(refs["v_full"].at[s])
    acc = gpu.add_matmul(acc, p, refs["v_s"].at[s], self.p_s)
    gpu.barrier_arrive(refs["v_free"].at[s])
    return acc, top, total
