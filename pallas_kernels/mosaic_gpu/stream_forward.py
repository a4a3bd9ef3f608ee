"""Streaming attention forward: one warpgroup loads key tiles into a ring, the others compute.

A thread block owns 64 queries per compute warpgroup, of one head of one sequence, and walks the key
tiles of its schedule: an online softmax in base 2, tiles that need no mask first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import listed
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.gpu import TILE


def default_blocks(Dk: int, Dv: int) -> stream.BlockSizes:
  """Tiles that fit shared memory and registers."""
  if max(Dk, Dv) > 128:
    return stream.BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return stream.BlockSizes(ahead=True)
  if max(Dk, Dv) > 32:
    return stream.BlockSizes(stages=3, warpgroups=3, held=2)
  return stream.BlockSizes(step=64, stages=6, warpgroups=3, held=2)


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
    scale: factor of the logits, positive.
    heads: query heads to work on.
    blocks: tile sizes; by default what suits the head dimensions.

  Returns:
    The output, and the log-sum-exp of the logits in base 2, float32 per sequence of the view
    (Mp rows: the sequence rounded up to 128). Rows without keys get 0 and -inf.
  """
  if scale <= 0:
    raise NotImplementedError(f"{scale=}: must be positive, the running maximum is that of q k")
  _, T, H, Dk = q.shape
  frame = stream.Frame(schedule, T, H, k.shape[2], heads, segment_ids is not None)
  return sweep(frame, q, k, v, segment_ids, scale, blocks or default_blocks(Dk, v.shape[-1]))


def sweep(frame: stream.Frame, q, k, v, segment_ids, scale: float, blocks: stream.BlockSizes):
  """`forward`, of what a frame sweeps."""
  B, Dk, Dv, heads = q.shape[0], q.shape[-1], v.shape[-1], frame.heads
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), **frame.lists(False))
  if frame.schedule.own:
    inputs.update(own_k=frame.folded(k), own_v=frame.folded(v))
  if segment_ids is not None:
    inputs.update(ids=frame.ids(segment_ids))
  out = jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], len(heads), Dv), q.dtype)
  lse = jax.ShapeDtypeStruct((B, len(heads), frame.sequences, frame.padded), jnp.float32)
  work = frame.work(blocks, B, transposed=False)
  scratch = _scratch(frame, blocks, Dk, Dv, q.dtype)
  how = dict(frame=frame, blocks=blocks, work=work, scratch=scratch, scale=scale)
  body = functools.partial(_kernel, **how)
  out, lse = gpu.launch(
    "stream_forward",
    body,
    inputs=inputs,
    outputs=dict(out=out, lse=lse),
    scratch=stream.of_teams(scratch, blocks.teams),
    grid=(-(-work.num_blocks // blocks.teams),),
    grid_names=("core",),
    num_threads=blocks.teams * (blocks.warpgroups + 1),
    thread_name="wg",
  )
  return frame.unfolded(out), lse


def _scratch(frame, blocks, Dk, Dv, dtype):
  wgs, step = blocks.warpgroups, blocks.step
  scratch = dict(
    q_s=gpu.smem(blocks.held, wgs, TILE, Dk, dtype=dtype),
    out_s=gpu.smem(wgs, TILE, Dv, dtype=dtype),
    lse_s=gpu.vector(wgs, TILE),
    q_full=gpu.Barrier(num_barriers=blocks.held * wgs),
    q_free=gpu.Barrier(num_barriers=blocks.held * wgs),
    **ring(frame, blocks, Dk, Dv, dtype),
  )
  if gpu.simulated():
    scratch.update(p_s=gpu.smem(wgs, TILE, step, dtype=dtype))
  return scratch


def ring(frame, blocks, Dk, Dv, dtype):
  """Shared memory and barriers of the key tiles on their way."""
  wgs, stages, step = blocks.warpgroups, blocks.stages, blocks.step
  scratch = {}
  for x, D in dict(k=Dk, v=Dv).items():
    ids = 1 if frame.segments and x == "k" else 0
    boxes = frame.in_boxes(step, D, dtype)
    scratch[f"{x}_s"] = (
      gpu.smem_in_boxes(stages, step, frame.slot, D, dtype)
      if boxes
      else gpu.smem(stages, step, D, dtype=dtype)
    )
    arrivals = (1 if boxes else frame.pieces(step)) + ids
    scratch[f"{x}_full"] = gpu.Barrier(num_barriers=stages, num_arrivals=arrivals)
    scratch[f"{x}_free"] = gpu.Barrier(num_barriers=stages, num_arrivals=wgs)
  if frame.segments:
    scratch.update(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  return scratch


def open_boxes(refs, frame, blocks):
  """`refs` with the rings as tiles, and as boxes (`k_box`, `v_box`) where they are that too."""
  refs = dict(refs)
  for x in "kv":
    if frame.in_boxes(blocks.step, refs[x].shape[-1], refs[x].dtype):
      refs[f"{x}_s"], refs[f"{x}_box"] = refs[f"{x}_s"]
  return refs


def _kernel(refs, *, frame, blocks, work, scratch, scale):
  """One thread block: the last warpgroup of a team loads, the others compute."""
  refs, wg, core = open_boxes(refs, frame, blocks), lax.axis_index("wg"), lax.axis_index("core")
  if blocks.teams > 1:
    team, wg = stream.div(wg, blocks.warpgroups + 1), lax.rem(wg, jnp.int32(blocks.warpgroups + 1))
    refs, core = stream.of_team(refs, scratch, team), core * blocks.teams + team
  work = work.of(refs, core)

  @pl.when(wg == blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[0], action="decrease")
    produce(refs, frame, blocks, work, tiles=("q",))

  @pl.when(wg < blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[1], action="increase")
    consume = lambda item, n, done: _Softmax(refs, frame, blocks, item, n, done, wg, scale).run()
    work.each(consume, jnp.int32(0))
    gpu.wait_to_gmem(0)


class Sweep:
  """The steps of an item of queries: tiles of the view, then of the queries' own rows."""

  def __init__(self, frame: stream.Frame, blocks: stream.BlockSizes, item):
    rows, step = blocks.rows, blocks.step
    self.q0 = frame.first_row(item, rows)
    self.frame, self.step = frame, step
    self.tiles = frame.key_tiles(item, self.q0, rows, step)
    self.num_view = self.num = self.tiles.num
    if frame.schedule.own:
      self.own_first, count = frame.own_tiles(self.q0, rows, step)
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


def produce(refs, frame, blocks, work, tiles, vectors=()):
  """Loads the queries of every item, and its key tiles as far ahead as the ring goes.

  Args:
    tiles: names of the arrays of queries [B, ..., H, D] to load.
    vectors: names of those of rows [B, Hg, R, Mp].
  """
  step = blocks.step
  pairs = [tuple(refs[f"{x}{end}"] for end in ("", "_s", "_full", "_free")) for x in "kv"]
  slot = lambda n: lax.rem(n, jnp.int32(blocks.stages))

  def load_item(item, n, done):
    b, r, h = item["b"], item["r"], item["h"]
    sweep = Sweep(frame, blocks, item)
    place = lax.rem(n, jnp.int32(blocks.held))
    for wg in range(blocks.warpgroups):
      turn = place * blocks.warpgroups + wg
      pl.when(n >= blocks.held)(lambda turn=turn: gpu.barrier_wait(refs["q_free"].at[turn]))
      base = sweep.q0 + wg * TILE
      sources = {x: frame.tile(refs[x], b, r, base, TILE, h) for x in tiles}
      sources["q"] = frame.tile(refs["q"], b, r, base, TILE, frame.head(h))
      # Unlike tiles, rows of single values are not clipped: those past the end are not used.
      rows = pl.ds(jnp.minimum(base, frame.padded - TILE), TILE)
      sources.update({x: refs[x].at[b, h, r, rows] for x in vectors})
      for name, source in sources.items():
        gpu.to_smem(source, refs[f"{name}_s"].at[place, wg], refs["q_full"].at[turn])

    def load_step(i, done):
      s = slot(done)
      for name, (source, buffer, full, free) in zip("kv", pairs, strict=True):
        copy = lambda piece, first, size, buffer=buffer, full=full: gpu.to_smem(
          piece, buffer.at[s, pl.ds(first, size)], full.at[s]
        )

        def load_view(name=name, source=source, copy=copy, full=full):
          tile = sweep.tiles.tile(i)
          if f"{name}_box" in refs:
            box = frame.boxes(source, b, h, tile, step)
            gpu.to_smem(box, refs[f"{name}_box"].at[s], full.at[s])
          else:
            frame.load_keys(copy, source, item, tile, step)
          if frame.segments and name == "k":
            ids = refs["ids"].at[b, r, pl.ds(tile * step, step)]
            gpu.to_smem(ids, refs["ids_s"].at[s], full.at[s])

        def load_own(name=name, copy=copy):
          pieces = 1 if f"{name}_box" in refs else frame.pieces(step)
          size = step // pieces
          for n in range(pieces):
            key = sweep.own_key(i) + n * size
            copy(refs[f"own_{name}"].at[b, pl.ds(key, size), frame.kv_head(h)], n * size, size)

        pl.when(done >= blocks.stages)(lambda free=free: gpu.barrier_wait(free.at[s]))
        if frame.schedule.own:
          pl.when(i < sweep.num_view)(load_view)
          pl.when(i >= sweep.num_view)(load_own)
        else:
          load_view()
      return done + 1

    return lax.fori_loop(0, sweep.num, load_step, done)

  done = work.each(load_item, jnp.int32(0))

  @pl.loop(jnp.maximum(done - blocks.stages, 0), done)
  def _(i):  # every completion of a barrier has to be observed
    for *_, free in pairs:
      gpu.barrier_wait(free.at[slot(i)])

  drain_held(refs, blocks, work)


def drain_held(refs, blocks, work):
  """Observes that the last items were used."""
  count = work.count()

  @pl.loop(jnp.maximum(count - blocks.held, 0), count)
  def _(n):
    for wg in range(blocks.warpgroups):
      turn = lax.rem(n, jnp.int32(blocks.held)) * blocks.warpgroups + wg
      gpu.barrier_wait(refs["q_free"].at[turn])


class Masks:
  """The pairs of 64 queries and the keys of a step that attend."""

  hides = True

  def __init__(self, refs, frame, sweep, item, base):
    self.refs, self.frame, self.sweep, self.base = refs, frame, sweep, base
    self.h = item["h"]
    self.bounds = frame.query_bounds(base, TILE, gpu.ROW)
    if frame.segments:
      ids = refs["ids"].at[item["b"], item["r"], pl.ds(base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def hide(self, i, kind: str):
    """Whether no pair of step i attends: a tile that other warpgroups need."""
    frame, last = self.frame, self.base + TILE - 1
    if kind == "own":
      key = self.sweep.own_key(i)
      row = stream.div(self.base, frame.schedule.stride) * frame.schedule.stride
      return (key > last) | (key + self.sweep.step <= row)
    key = self.sweep.tiles.tile(i) * self.sweep.step
    hidden = frame.first_query(key) > last
    if frame.schedule.window is not None:
      hidden = hidden | (key + self.sweep.step + frame.schedule.window - 1 <= self.base)
    return hidden

  def __call__(self, i, s, kind: str):
    """Which of [64, step] attend in step i, whose tile lies in slot s.

    `kind` says what the step sweeps: the "view", the queries' "own" rows, or "any" of the two.
    """
    frame, step = self.frame, self.sweep.step
    high, low = self.bounds
    if kind in ("view", "any"):
      places = frame.key_places(self.sweep.tiles.tile(i) * step, step, self.h, gpu.COLUMN)
    if kind in ("own", "any"):
      own_places = self.sweep.own_key(i) + gpu.iota((step,), layout=gpu.COLUMN)
      low = frame.row_start(self.base, TILE, gpu.ROW)
    if kind == "own":
      places = own_places
    if kind == "any":  # arithmetic: a scalar does not select between arrays in a kernel
      own = (i >= self.sweep.num_view).astype(jnp.int32)
      places, low = own_places * own + places * (1 - own), low * own
    rows, columns = (lambda x: gpu.over_columns(x, step)), (lambda x: gpu.over_rows(x, TILE))
    mask = rows(high) >= columns(places)
    if low is not None:
      mask = mask & (rows(low) <= columns(places))
    if self.frame.segments:
      ids = gpu.load(self.refs["ids_s"].at[s], layout=gpu.COLUMN, optimized=False)
      mask = mask & (rows(self.ids) == columns(ids))
      gpu.commit_reads()
    return mask


def masks_of(refs, frame, sweep, item, base):
  """`Masks`, or those of lists."""
  make = listed.Masks if isinstance(frame, listed.Listed) else Masks
  return make(refs, frame, sweep, item, base)


class Queries:
  """64 queries of an item: item number n of the thread block, which took `done` steps before."""

  def __init__(self, refs, frame, blocks, item, n, done, wg, scale):
    self.refs, self.frame, self.blocks = refs, frame, blocks
    self.item, self.done, self.wg = item, done, wg
    self.factor, self.scale = scale, scale * gpu.LOG2E
    self.sweep = Sweep(frame, blocks, item)
    self.base = self.sweep.q0 + wg * TILE
    self.place = lax.rem(n, jnp.int32(blocks.held))
    self.turn = self.place * blocks.warpgroups + wg
    self.q_s = refs["q_s"].at[self.place, wg]
    self.p_s = refs["p_s"].at[wg] if "p_s" in refs else None
    self.Dv, self.dtype = refs["v_s"].shape[-1], refs["v_s"].dtype
    self.any_kind = "any" if frame.schedule.own else "view"
    if isinstance(frame, listed.Listed):
      self.any_kind = self.sweep.tiles.number(jnp.int32(0))

  def slot(self, i):
    return lax.rem(self.done + i, jnp.int32(self.blocks.stages))

  def loops(self, step, first, carry):
    """Runs step(i, carry, kind) over the steps from `first` on, a loop per kind of mask."""
    full, view = self.sweep.num_full, self.sweep.num_view
    step = self.unless_hidden(step)
    loop = lambda start, stop, kind, carry: lax.fori_loop(
      start, stop, functools.partial(step, kind=kind), carry
    )
    if isinstance(self.frame, listed.Listed):
      masked, tiles = jnp.maximum(full, first), self.sweep.tiles
      number = tiles.number(masked)
      carry = loop(first, masked, None, carry)
      return tiles.each(masked, number, lambda i, n, carry: step(i, carry, n), carry)
    if self.frame.has_full:
      carry = loop(first, full, None, carry)
    if not self.frame.schedule.own:
      return loop(jnp.maximum(full, first), self.sweep.num, "view", carry)
    carry = loop(jnp.maximum(full, first), view, "view", carry)
    return loop(jnp.maximum(view, first), self.sweep.num, "own", carry)

  def unless_hidden(self, step):
    """`step`, but steps whose pairs are all hidden only let their tile pass."""
    if self.blocks.ahead or not self.masks.hides:
      return step

    def masked(i, carry, kind):
      if kind is None:
        return step(i, carry, kind)
      use = functools.partial(step, i, kind=kind)
      return lax.cond(self.masks.hide(i, kind), functools.partial(self.skip, i), use, carry)

    return masked

  def skip(self, i, carry):
    """Lets the tile of step i pass."""
    for x in "kv":
      gpu.barrier_wait(self.refs[f"{x}_full"].at[self.slot(i)])
      gpu.barrier_arrive(self.refs[f"{x}_free"].at[self.slot(i)])
    return carry


class _Softmax(Queries):
  """64 queries of an item, whose output is summed."""

  def run(self):
    """Attends, writes out and lse; the steps taken so far."""
    refs, wg = self.refs, self.wg
    b, r, h = self.item["b"], self.item["r"], self.item["h"]
    self.masks = masks_of(refs, self.frame, self.sweep, self.item, self.base)
    gpu.barrier_wait(refs["q_full"].at[self.turn])
    acc, top, total = self.ahead() if self.blocks.ahead else self.in_turn()
    gpu.barrier_arrive(refs["q_free"].at[self.turn])
    mean, lse = softmax.finish(acc, top, total, self.factor)
    gpu.wait_to_gmem(0, wait_read_only=True)  # the item before leaves its buffers
    out_s, lse_s = refs["out_s"].at[wg], refs["lse_s"].at[wg]
    out_s[...] = mean.astype(self.dtype)
    lse_s[...] = lse
    gpu.commit_smem()
    gpu.to_gmem(out_s, self.frame.tile(refs["out"], b, r, self.base, TILE, h))

    # Unlike tiles, rows of single values are not clipped where an axis ends.
    @pl.when(self.base < self.frame.padded)
    def _():
      gpu.to_gmem(lse_s, refs["lse"].at[b, h, r, pl.ds(self.base, TILE)])

    return self.done + self.sweep.num

  def start(self):
    return gpu.zeros((TILE, self.Dv)), gpu.full((TILE,), softmax.NO_MAXIMUM), gpu.full((TILE,), 0.0)

  def weights(self, x, top, total, mask):
    """exp2 of logits x under the running maximum; new maximum, sum of weights, rescaling."""
    if mask is not None:
      x = jnp.where(mask, x, -jnp.inf)
    (p,), new_top, keep = softmax.weights([x], top, self.factor)
    return p, new_top, total * keep + p.sum(axis=1), keep

  def in_turn(self):
    """Each step: logits, softmax, weighted sum. The warpgroups fill each other's gaps."""
    refs = self.refs

    def step(i, carry, kind):
      acc, top, total = carry
      s = self.slot(i)
      gpu.barrier_wait(refs["k_full"].at[s])
      (x,) = gpu.matmul((self.q_s, refs["k_s"].at[s].transpose((1, 0))))
      if self.frame.scores is not None:
        x, _ = self.masks.logits(i, x, kind)
      mask = None if kind is None else self.masks(i, s, kind)
      gpu.barrier_arrive(refs["k_free"].at[s])
      p, top, total, keep = self.weights(x, top, total, mask)
      acc = acc * gpu.over_columns(keep, self.Dv)
      gpu.barrier_wait(refs["v_full"].at[s])
      (acc,) = gpu.add_matmul((acc, (p.astype(self.dtype), refs["v_s"].at[s])), scratch=self.p_s)
      gpu.barrier_arrive(refs["v_free"].at[s])
      return acc, top, total

    return self.loops(step, 0, self.start())

  def ahead(self):
    """The logits of a step are made while the weighted sum of the step before runs."""
    refs = self.refs

    def attend(i, top, total, kind, x):
      if self.frame.scores is not None:
        x, _ = self.masks.logits(i, x, kind)
      mask = None if kind is None else self.masks(i, self.slot(i), kind)
      gpu.barrier_arrive(refs["k_free"].at[self.slot(i)])
      p, *new = self.weights(x, top, total, mask)
      # All of them are made before the wait, and the sum under way is waited for after it: else its
      # wait comes as early as it can.
      p = lax.optimization_barrier(p)
      gpu.barrier_wait(refs["v_full"].at[self.slot(i)])
      return p, *new

    def step(i, carry, kind):
      acc, p, top, total = carry
      s, before = self.slot(i), self.slot(i - 1)
      gpu.barrier_wait(refs["k_full"].at[s])

      def body(logits, acc):
        logits.add(self.q_s, refs["k_s"].at[s].transpose((1, 0)))
        acc.add_from_registers(p, refs["v_s"].at[before])
        return attend(i, top, total, kind, logits.get(under_way=1)), acc.get()

      new, acc = gpu.sums(body, (TILE, self.blocks.step), acc, scratch=self.p_s)
      gpu.barrier_arrive(refs["v_free"].at[before])
      p, top, total, keep = new
      # Behind the barrier, so that the registers of the old p are not overwritten in use.
      acc, p = lax.optimization_barrier((acc, p))
      return acc * gpu.over_columns(keep, self.Dv), p.astype(self.dtype), top, total

    acc, top, total = self.start()
    first, s = jnp.int32(0), self.slot(0)
    gpu.barrier_wait(refs["k_full"].at[s])
    (x,) = gpu.matmul((self.q_s, refs["k_s"].at[s].transpose((1, 0))))
    p, top, total, _ = attend(first, top, total, self.any_kind, x)
    acc, p, top, total = self.loops(step, 1, (acc, p.astype(self.dtype), top, total))
    s = self.slot(self.sweep.num - 1)
    (acc,) = gpu.add_matmul((acc, (p, refs["v_s"].at[s])), scratch=self.p_s)
    gpu.barrier_arrive(refs["v_free"].at[s])
    return acc, top, total
