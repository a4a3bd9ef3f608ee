"""Streaming attention backward: a kernel for dq, which sweeps keys, and one for dk, dv.

Both compute the weights P = exp2(logits - lse) again, from the log-sum-exp of the whole softmax,
and dS = P (dP - delta). The second works on transposed tiles: P^T and dS^T come out of the matrix
units as the operands that dv += P^T dout and dk += dS^T q want.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import formula
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import listed
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu import stream_forward
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.softmax import safe_lse

TILES, VECTORS = ("q", "dout", "out"), ("lse", "delta", "dlse")  # what dq loads for each query


def default_dq_blocks(Dk: int, Dv: int) -> stream.BlockSizes:
  """Tiles that fit shared memory and registers."""
  if max(Dk, Dv) > 128:
    return stream.BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return stream.BlockSizes(step=64, stages=3, ahead=True)
  return stream.BlockSizes(step=64, stages=4, warpgroups=3)


def default_dkv_blocks(Dk: int, Dv: int) -> stream.BlockSizes:
  """Tiles that fit shared memory and registers."""
  if max(Dk, Dv) > 128:
    return stream.BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return stream.BlockSizes(step=64, stages=3)
  return stream.BlockSizes(step=64, stages=4, warpgroups=3)


def dq_kernel(
  schedule: stream.Schedule,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  lse: Float[Array, "B Hg R Mp"],
  delta: Float[Array, "B Hg R Mp"] | None,
  dout: Float[Array, "B T Hg Dv"],
  *,
  out: Float[Array, "B T Hg Dv"] | None = None,
  dlse: Float[Array, "B Hg R Mp"] | None = None,
  scale: float,
  heads: range | tuple[int, ...],
  blocks: stream.BlockSizes | None = None,
) -> tuple[Float[Array, "B T Hg Dk"], Float[Array, "B Hg R Mp"]]:
  """dq over the pairs of a schedule, and delta; arguments as for `backward`.

  Args:
    delta: rowsum(dout out) - dlse, 0 for rows without keys; None to make it of `out` and `dlse`.
  """
  _, T, H, Dk = q.shape
  frame = stream.Frame(schedule, T, H, k.shape[2], heads, segment_ids is not None)
  blocks = blocks or default_dq_blocks(Dk, v.shape[-1])
  how = dict(out=out, dlse=dlse, scale=scale, blocks=blocks)
  return sweep_keys(frame, q, k, v, segment_ids, lse, delta, dout, **how)


def sweep_keys(
  frame: stream.Frame, q, k, v, segment_ids, lse, delta, dout, *, out, dlse, scale, blocks
):
  """`dq_kernel`, of what a frame sweeps."""
  B, Dk, Dv, heads = q.shape[0], q.shape[-1], v.shape[-1], frame.heads
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs.update(lse=safe_lse(lse))
  made = delta is None
  more = dict(delta=delta, dlse=dlse, out=frame.folded(out) if made else None)
  inputs.update({name: x for name, x in more.items() if x is not None})
  num_loads = sum(name in inputs for name in (*TILES, *VECTORS))
  inputs.update(frame.lists(False))
  if frame.schedule.own:
    inputs.update(own_k=frame.folded(k), own_v=frame.folded(v))
  if segment_ids is not None:
    inputs.update(ids=frame.ids(segment_ids))
  dq = jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], len(heads), Dk), q.dtype)
  wgs, turns = blocks.warpgroups, blocks.held * blocks.warpgroups
  scratch = dict(
    q_s=gpu.smem(blocks.held, wgs, TILE, Dk, dtype=q.dtype),
    dout_s=gpu.smem(blocks.held, wgs, TILE, Dv, dtype=q.dtype),
    lse_s=gpu.vector(blocks.held, wgs, TILE),
    q_full=gpu.Barrier(num_barriers=turns, num_arrivals=num_loads),
    q_free=gpu.Barrier(num_barriers=turns),
    **stream_forward.ring(frame, blocks, Dk, Dv, q.dtype),
  )
  if made:
    scratch.update(out_s=gpu.smem(blocks.held, wgs, TILE, Dv, dtype=q.dtype))
  for name in ("delta", "dlse"):
    if more[name] is not None:
      scratch.update({f"{name}_s": gpu.vector(blocks.held, wgs, TILE)})
  if gpu.simulated():
    scratch.update(p_s=gpu.smem(wgs, TILE, blocks.step, dtype=q.dtype))
  work = frame.work(blocks, B, transposed=False)
  outputs = dict(dq=dq)
  if made:
    outputs.update(minus_delta=jax.ShapeDtypeStruct(lse.shape, jnp.float32))
  grads = gpu.launch(
    "stream_dq",
    functools.partial(_dq, frame=frame, blocks=blocks, work=work, scale=scale),
    inputs=inputs,
    outputs=outputs,
    scratch=scratch,
    grid=(work.num_blocks,),
    grid_names=("core",),
    num_threads=wgs + 1,
    thread_name="wg",
  )
  # XLA makes nothing of this sign and that of dkv_kernel.
  return frame.unfolded(grads[0]), -grads[1] if made else delta


def _dq(refs, *, frame, blocks, work, scale):
  refs, work = stream_forward.open_boxes(refs, frame, blocks), work.of(refs)
  wg = lax.axis_index("wg")

  @pl.when(wg == blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[0], action="decrease")
    held = [[x for x in names if x in refs] for names in (TILES, VECTORS)]
    stream_forward.produce(refs, frame, blocks, work, *held)

  @pl.when(wg < blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[1], action="increase")
    consume = lambda item, n, done: _Queries(refs, frame, blocks, item, n, done, wg, scale).run()
    work.each(consume, jnp.int32(0))
    gpu.wait_to_gmem(0)


class _Queries(stream_forward.Queries):
  """64 queries of an item, whose dq is summed."""

  def run(self):
    """Sums and writes dq; the steps taken so far."""
    refs, wg = self.refs, self.wg
    b, r, h = self.item["b"], self.item["r"], self.item["h"]
    self.masks = stream_forward.masks_of(refs, self.frame, self.sweep, self.item, self.base)
    gpu.barrier_wait(refs["q_full"].at[self.turn])
    place = self.place
    self.dout_s = refs["dout_s"].at[place, wg]
    self.lse = self.row("lse")
    self.minus_delta = self.make_minus_delta() if "out" in refs else -self.row("delta")
    dq = self.ahead() if self.blocks.ahead else self.in_turn()
    self.q_s[...] = (dq * self.factor).astype(self.dtype)
    gpu.commit_smem()
    gpu.to_gmem(self.q_s, self.frame.tile(refs["dq"], b, r, self.base, TILE, h))
    gpu.wait_to_gmem(0, wait_read_only=True)
    gpu.commit_reads()  # of dout and out
    gpu.barrier_arrive(refs["q_free"].at[self.turn])
    return self.done + self.sweep.num

  def row(self, name):
    place = self.refs[f"{name}_s"].at[self.place, self.wg]
    return gpu.load(place, layout=gpu.ROW, optimized=False)

  def make_minus_delta(self):
    """Sums and writes -delta."""
    refs, item = self.refs, self.item
    dout, out = (
      gpu.load(x, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
      for x in (self.dout_s, refs["out_s"].at[self.place, self.wg])
    )
    delta = (dout * out).sum(axis=1)
    minus_delta = self.row("dlse") - delta if "dlse" in refs else -delta
    minus_delta = jnp.where(self.lse == jnp.inf, 0.0, minus_delta)  # no keys

    @pl.when(self.base < self.frame.padded)
    def _():
      rows = pl.ds(self.base, TILE)
      refs["minus_delta"].at[item["b"], item["h"], item["r"], rows][...] = minus_delta

    return minus_delta

  def in_turn(self):
    """Each step: logits and dP, dS, its product. The warpgroups fill each other's gaps."""
    refs, tile = self.refs, (TILE, self.blocks.step)
    # dP starts as -delta: no subtraction afterwards.
    start = gpu.over_columns(self.minus_delta, self.blocks.step)

    def step(i, dq, kind):
      s = self.slot(i)
      body = lambda logits, dp: self.weights(i, kind, logits, dp)
      self.wait(s)
      p, dp = gpu.sums(body, tile, start)
      ds = (p * dp).astype(self.dtype)
      (dq,) = gpu.add_matmul((dq, (ds, refs["k_s"].at[s])), scratch=self.p_s)
      gpu.barrier_arrive(refs["k_free"].at[s])
      return dq

    return self.loops(step, 0, gpu.zeros((TILE, self.q_s.shape[-1])))

  def ahead(self):
    """The logits and dP of a step are made while the product of the step before runs."""
    refs, tile = self.refs, (TILE, self.blocks.step)

    def dlogits(i, *args):
      # Fresh sums cost nothing here, those that start as -delta as much as this.
      p, dp = self.weights(i, *args)
      ds = p * (dp + gpu.over_columns(self.minus_delta, self.blocks.step))
      # All of it is made before the next wait, and the product under way is waited for after it:
      # else its wait comes as early as it can.
      ds = lax.optimization_barrier(ds)
      pl.when(i + 1 < self.sweep.num)(lambda: self.wait(self.slot(i + 1)))
      return ds

    def step(i, carry, kind):
      dq, ds = carry
      before = self.slot(i - 1)

      def body(logits, dp, dq):
        add = lambda: dq.add_from_registers(ds, refs["k_s"].at[before])
        return dlogits(i, kind, logits, dp, add), dq.get()

      ds, dq = gpu.sums(body, tile, tile, dq, scratch=self.p_s)
      gpu.barrier_arrive(refs["k_free"].at[before])
      # Behind the barrier, so that the registers of the old ds are not overwritten in use.
      dq, ds = lax.optimization_barrier((dq, ds))
      return dq, ds.astype(self.dtype)

    first = jnp.int32(0)
    self.wait(self.slot(0))
    body = lambda logits, dp: dlogits(first, self.any_kind, logits, dp)
    ds = gpu.sums(body, tile, tile).astype(self.dtype)
    dq, ds = self.loops(step, 1, (gpu.zeros((TILE, self.q_s.shape[-1])), ds))
    last = self.slot(self.sweep.num - 1)
    (dq,) = gpu.add_matmul((dq, (ds, refs["k_s"].at[last])), scratch=self.p_s)
    gpu.barrier_arrive(refs["k_free"].at[last])
    return dq

  def wait(self, s):
    gpu.barrier_wait(self.refs["k_full"].at[s])
    gpu.barrier_wait(self.refs["v_full"].at[s])

  def weights(self, i, kind, logits, dp, meanwhile=None):
    """P, times the logits' derivative, and dP of step i; `meanwhile` starts one more product."""
    s, refs = self.slot(i), self.refs
    columns = lambda x: gpu.over_columns(x, self.blocks.step)
    logits.add(self.q_s, refs["k_s"].at[s].transpose((1, 0)))
    dp.add(self.dout_s, refs["v_s"].at[s].transpose((1, 0)))
    if meanwhile is not None:
      meanwhile()
    more = 0 if meanwhile is None else 1
    mask = None if kind is None else self.masks(i, s, kind)
    x, slope = logits.get(under_way=1 + more), None
    if self.frame.scores is not None:
      x, slope = self.masks.logits(i, x, kind)
    p = exp2_of(x * self.scale - columns(self.lse), mask)
    if slope is not None:
      p = p * seen(slope, mask)
    dp = dp.get(under_way=more)
    gpu.barrier_arrive(refs["v_free"].at[s])
    return p, dp


def sweep_values(
  frame: listed.Listed, q, k, v, segment_ids, lse, delta, dout, *, blocks, scale
) -> list[Float[Array, "B Hg R Mp"]]:
  """The gradients of the learned values of a frame's scores, by query; arguments as `sweep_keys`.

  Queries past the end may have any.
  """
  B, Dk, Dv = q.shape[0], q.shape[-1], v.shape[-1]
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs.update(lse=safe_lse(lse), delta=delta, **frame.lists(False))
  if segment_ids is not None:
    inputs.update(ids=frame.ids(segment_ids))
  wgs, turns = blocks.warpgroups, blocks.held * blocks.warpgroups
  vectors = {f"{name}_s": gpu.vector(blocks.held, wgs, TILE) for name in ("lse", "delta")}
  scratch = dict(
    q_s=gpu.smem(blocks.held, wgs, TILE, Dk, dtype=q.dtype),
    dout_s=gpu.smem(blocks.held, wgs, TILE, Dv, dtype=q.dtype),
    q_full=gpu.Barrier(num_barriers=turns, num_arrivals=4),
    q_free=gpu.Barrier(num_barriers=turns),
    **vectors,
    **stream_forward.ring(frame, blocks, Dk, Dv, q.dtype),
  )
  work = frame.work(blocks, B, transposed=False)
  rows = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
  number = len(formula.learned(frame.scores))
  return gpu.launch(
    "stream_dvalues",
    functools.partial(_dvalues, frame=frame, blocks=blocks, work=work, scale=scale),
    inputs=inputs,
    outputs={f"of_value{n}": rows for n in range(number)},
    scratch=scratch,
    grid=(work.num_blocks,),
    grid_names=("core",),
    num_threads=wgs + 1,
    thread_name="wg",
  )


def _dvalues(refs, *, frame, blocks, work, scale):
  work, wg = work.of(refs), lax.axis_index("wg")

  @pl.when(wg == blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[0], action="decrease")
    stream_forward.produce(refs, frame, blocks, work, ("q", "dout"), ("lse", "delta"))

  @pl.when(wg < blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[1], action="increase")
    consume = lambda item, n, done: _Values(refs, frame, blocks, item, n, done, wg, scale).run()
    work.each(consume, jnp.int32(0))


class _Values(_Queries):
  """64 queries of an item, for which the gradients of values are summed."""

  def run(self):
    """Sums and writes them; the steps taken so far."""
    refs, item = self.refs, self.item
    self.masks = stream_forward.masks_of(refs, self.frame, self.sweep, item, self.base)
    gpu.barrier_wait(refs["q_full"].at[self.turn])
    self.dout_s = refs["dout_s"].at[self.place, self.wg]
    self.lse, self.minus_delta = self.row("lse"), -self.row("delta")
    zeros = [gpu.full((TILE,), 0.0) for _ in formula.learned(self.frame.scores)]
    sums = self.loops(self.step, 0, tuple(zeros))

    @pl.when(self.base < self.frame.padded)
    def _():
      rows = pl.ds(self.base, TILE)
      for n, total in enumerate(sums):
        refs[f"of_value{n}"].at[item["b"], item["h"], item["r"], rows][...] = total

    gpu.commit_reads()
    gpu.barrier_arrive(refs["q_free"].at[self.turn])
    return self.done + self.sweep.num

  def step(self, i, sums, kind):
    """Adds step i."""
    refs, s = self.refs, self.slot(i)
    columns = lambda x: gpu.over_columns(x, self.blocks.step)

    def body(logits, dp):
      logits.add(self.q_s, refs["k_s"].at[s].transpose((1, 0)))
      dp.add(self.dout_s, refs["v_s"].at[s].transpose((1, 0)))
      mask = None if kind is None else self.masks(i, s, kind)
      x, *slopes = self.masks.slopes(i, logits.get(under_way=1), kind)
      p = exp2_of(x * self.scale - columns(self.lse), mask)
      ds = p * dp.get()
      return tuple(
        total + (ds * seen(slope, mask)).sum(axis=1)
        for total, slope in zip(sums, slopes, strict=True)
      )

    self.wait(s)
    # dP starts as -delta: no subtraction afterwards.
    sums = gpu.sums(body, (TILE, self.blocks.step), columns(self.minus_delta), scratch=self.p_s)
    for x in "kv":
      gpu.barrier_arrive(refs[f"{x}_free"].at[s])
    return sums


def seen(slope, mask):
  """The derivative where pairs attend: of others it may be anything."""
  return slope if mask is None else jnp.where(mask, slope, 0.0)


def exp2_of(x, mask):
  p = jnp.exp2(x)
  return p if mask is None else jnp.where(mask, p, 0.0)


def dkv_kernel(
  schedule: stream.Schedule,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  lse: Float[Array, "B Hg R Mp"],
  delta: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  *,
  scale: float,
  heads: range | tuple[int, ...],
  blocks: stream.BlockSizes | None = None,
  parts: str | None = None,
  shares: int | None = None,
) -> tuple[jax.Array, ...]:
  """dk, dv per query head over the pairs of a schedule; arguments as for `backward`.

  Keys of the queries' own rows do not count (`Schedule.own`): they are another schedule's.

  Args:
    parts: which of "k", "v" to compute in a launch; by default "kv", where registers hold both.
    shares: of the queries, whose gradients are summed afterwards; by default as many as give every
      core work where there are few summaries.
  """
  _, T, H, Dk = q.shape
  frame = stream.Frame(schedule, T, H, k.shape[2], heads, segment_ids is not None)
  blocks = blocks or default_dkv_blocks(Dk, v.shape[-1])
  how = dict(scale=scale, blocks=blocks, parts=parts, shares=shares)
  return sweep_queries(frame, q, k, v, segment_ids, lse, delta, dout, **how)


def sweep_queries(
  frame: stream.Frame,
  q,
  k,
  v,
  segment_ids,
  lse,
  delta,
  dout,
  *,
  scale: float,
  blocks: stream.BlockSizes,
  parts: str | None = None,
  shares: int | None = 1,
):
  """`dkv_kernel`, of what a frame sweeps."""
  B, Dk, Dv, heads = q.shape[0], q.shape[-1], v.shape[-1], frame.heads
  if parts is None and Dk + Dv > 256:
    arrays = frame, q, k, v, segment_ids, lse, delta, dout
    how = dict(scale=scale, blocks=blocks, shares=shares)
    return sweep_queries(*arrays, **how, parts="k") + sweep_queries(*arrays, **how, parts="v")
  parts = parts or "kv"
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs.update(lse=safe_lse(lse), minus_delta=-delta, **frame.lists(True))
  if segment_ids is not None:
    inputs.update(ids=frame.ids(segment_ids))
  num_tiles = -(-frame.num_keys // blocks.rows)
  if shares is None:
    items = B * len(heads) * frame.sequences * num_tiles
    few = frame.schedule.view == "summaries" and items < gpu.num_multiprocessors()
    shares = min(8, -(-2 * gpu.num_multiprocessors() // items)) if few else 1
  shape = dict(k=frame.key_shape(shares * B, Dk), v=frame.key_shape(shares * B, Dv))
  outputs = {f"d{x}": jax.ShapeDtypeStruct(shape[x], q.dtype) for x in parts}
  wgs, stages, step = blocks.warpgroups, blocks.stages, blocks.step
  pieces = frame.pieces(TILE)
  scratch = dict(
    k_s=gpu.smem(wgs, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(wgs, TILE, Dv, dtype=q.dtype),
    q_s=gpu.smem(stages, step, Dk, dtype=q.dtype),
    dout_s=gpu.smem(stages, step, Dv, dtype=q.dtype),
    lse_s=gpu.vector(stages, step),
    minus_delta_s=gpu.vector(stages, step),
    k_full=gpu.Barrier(num_barriers=wgs, num_arrivals=2 * pieces),
    k_free=gpu.Barrier(num_barriers=wgs),
    q_full=gpu.Barrier(num_barriers=stages, num_arrivals=4 if frame.segments else 3),
    dout_full=gpu.Barrier(num_barriers=stages),
    q_free=gpu.Barrier(num_barriers=stages, num_arrivals=wgs),
  )
  if frame.segments:
    scratch.update(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  if gpu.simulated():
    scratch.update(p_s=gpu.smem(wgs, TILE, step, dtype=q.dtype))
  work = frame.work(blocks, shares * B, transposed=True)
  how = dict(frame=frame, blocks=blocks, work=work, scale=scale, parts=parts, shares=shares)
  grads = gpu.launch(
    "stream_dkv",
    functools.partial(_dkv, **how),
    inputs=inputs,
    outputs=outputs,
    scratch=scratch,
    grid=(work.num_blocks,),
    grid_names=("core",),
    num_threads=wgs + 1,
    thread_name="wg",
  )
  grads = (frame.key_grads(x) for x in grads)
  if shares == 1:
    return tuple(grads)
  grads = (x.reshape(shares, B, *x.shape[1:]) for x in grads)
  return tuple(x.sum(axis=0, dtype=jnp.float32).astype(q.dtype) for x in grads)


def _dkv(refs, *, frame, blocks, work, scale, parts, shares):
  work = work.of(refs)
  wg = lax.axis_index("wg")

  @pl.when(wg == blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[0], action="decrease")
    _produce_queries(refs, frame, blocks, work, shares)

  @pl.when(wg < blocks.warpgroups)
  def _():
    gpu.set_max_registers(blocks.registers[1], action="increase")
    keys = _ListedKeys if isinstance(frame, listed.Listed) else _Keys
    work.each(
      lambda item, n, done: keys(refs, frame, blocks, item, done, wg, scale, parts, shares).run(),
      jnp.int32(0),
    )
    gpu.wait_to_gmem(0)


def _share(tiles, item, shares: int, batch: int):
  """The steps [first, end) of an item's share of the queries, and its batch row."""
  b, share = lax.rem(item["b"], jnp.int32(batch)), stream.div(item["b"], batch)
  if shares == 1:
    return 0 * tiles.num, tiles.num, b
  return stream.div(tiles.num * share, shares), stream.div(tiles.num * (share + 1), shares), b


def _produce_queries(refs, frame, blocks, work, shares):
  """Loads the keys of every item, and the tiles of queries that see them into the ring."""
  step = blocks.step
  slot = lambda n: lax.rem(n, jnp.int32(blocks.stages))

  def load_item(item, n, done):
    r = item["r"]
    k0 = item["tile"] * blocks.rows
    tiles = frame.query_tiles(item, k0, blocks.rows, step)
    first, end, b = _share(tiles, item, shares, refs["q"].shape[0])
    for wg in range(blocks.warpgroups):
      pl.when(n > 0)(lambda wg=wg: gpu.barrier_wait(refs["k_free"].at[wg]))
      for x in "kv":
        copy = lambda piece, first, size, x=x, wg=wg: gpu.to_smem(
          piece, refs[f"{x}_s"].at[wg, pl.ds(first, size)], refs["k_full"].at[wg]
        )
        tile = item["tile"] * blocks.warpgroups + wg
        frame.load_keys(copy, refs[x], item | dict(b=b), tile, TILE)

    def load_step(i, done):
      s = slot(done)
      q0, h = tiles.tile(i) * step, frame.query_head(item, tiles, i)
      rows = lambda name: refs[name].at[b, h, r, pl.ds(q0, step)]
      pl.when(done >= blocks.stages)(lambda: gpu.barrier_wait(refs["q_free"].at[s]))
      q_full, dout_full = refs["q_full"].at[s], refs["dout_full"].at[s]
      q = frame.tile(refs["q"], b, r, q0, step, frame.head(h))
      gpu.to_smem(q, refs["q_s"].at[s], q_full)
      for x in ("lse", "minus_delta"):
        gpu.to_smem(rows(x), refs[f"{x}_s"].at[s], q_full)
      if frame.segments:
        gpu.to_smem(refs["ids"].at[b, r, pl.ds(q0, step)], refs["ids_s"].at[s], q_full)
      gpu.to_smem(frame.tile(refs["dout"], b, r, q0, step, h), refs["dout_s"].at[s], dout_full)
      return done + 1

    return lax.fori_loop(first, end, load_step, done)

  done = work.each(load_item, jnp.int32(0))

  @pl.loop(jnp.maximum(done - blocks.stages, 0), done)
  def _(i):  # every completion of a barrier has to be observed
    gpu.barrier_wait(refs["q_free"].at[slot(i)])

  for wg in range(blocks.warpgroups):
    gpu.barrier_wait(refs["k_free"].at[wg])


class _Keys:
  """64 keys of an item, whose dk and dv are summed."""

  def __init__(self, refs, frame, blocks, item, done, wg, scale, parts, shares):
    self.refs, self.frame, self.blocks, self.parts = refs, frame, blocks, parts
    self.item, self.done, self.wg = item, done, wg
    self.factor, self.scale = scale, scale * gpu.LOG2E
    self.k0 = item["tile"] * blocks.rows
    self.base = self.k0 + wg * TILE
    self.tiles = frame.query_tiles(item, self.k0, blocks.rows, blocks.step)
    self.first, self.end, self.b = _share(self.tiles, item, shares, refs["q"].shape[0])
    self.k_s, self.v_s = refs["k_s"].at[wg], refs["v_s"].at[wg]
    self.p_s = refs["p_s"].at[wg] if "p_s" in refs else None
    self.dtype = refs["q_s"].dtype

  def run(self):
    """Sums and writes dk and dv; the steps taken so far."""
    refs, frame, wg = self.refs, self.frame, self.wg
    r, h = self.item["r"], self.item["h"]
    self.prepare_masks()
    gpu.barrier_wait(refs["k_full"].at[wg])
    buffers = dict(k=self.k_s, v=self.v_s)
    sums = tuple(gpu.zeros((TILE, buffers[x].shape[-1])) for x in self.parts)
    sums = self.loops(sums)
    for x, total in zip(self.parts, sums, strict=True):
      buffers[x][...] = (total * self.factor if x == "k" else total).astype(self.dtype)
    gpu.commit_smem()
    for x in self.parts:
      copy = lambda first, size, target, x=x: gpu.to_gmem(buffers[x].at[pl.ds(first, size)], target)
      frame.store_keys(copy, refs[f"d{x}"], self.item["b"], r, h, self.base, TILE)
    gpu.wait_to_gmem(0, wait_read_only=True)
    gpu.barrier_arrive(refs["k_free"].at[wg])
    return self.done + self.end - self.first

  def loops(self, sums):
    """Sums of all steps, a loop for those without a mask."""
    loop = lambda start, stop, masked, sums: lax.fori_loop(
      start, stop, functools.partial(self.step, masked=masked), sums
    )
    masked, hidden = self.bounds()
    if self.frame.has_full:
      sums = loop(self.first, masked, False, sums)
    sums = loop(masked, hidden, True, sums)
    pl.loop(hidden, self.end)(self.skip)
    return sums

  def bounds(self):
    """The first step that our own keys need a mask in, and the first one that sees none of them."""
    tiles, inside = self.tiles, lambda i: jnp.clip(i, self.first, self.end)
    if self.frame.schedule.window is not None:
      return inside(tiles.num_full), self.end
    # Other warpgroups may need masks longer, and begin earlier.
    own = self.frame.query_tiles(self.item, self.base, TILE, self.blocks.step)
    return inside(tiles.full_end - own.full_first), inside(tiles.full_end - own.first)

  def skip(self, i):
    """Lets the tile of step i pass."""
    s = self.slot(i)
    gpu.barrier_wait(self.refs["q_full"].at[s])
    gpu.barrier_wait(self.refs["dout_full"].at[s])
    gpu.barrier_arrive(self.refs["q_free"].at[s])

  def slot(self, i):
    return lax.rem(self.done + i - self.first, jnp.int32(self.blocks.stages))

  def prepare_masks(self):
    """What masks need of the keys."""
    frame, refs, r = self.frame, self.refs, self.item["r"]
    self.places = frame.key_places(self.base, TILE, self.item["h"], gpu.ROW)
    if frame.segments:
      ids = refs["ids"].at[self.b, r, pl.ds(self.base, TILE)]
      self.ids = gpu.load(ids, layout=gpu.ROW, optimized=False)

  def mask(self, i, s, number=None):
    """Which of [64 keys, step queries] attend in step i."""
    del number
    step = self.blocks.step
    high, low = self.frame.query_bounds(self.tiles.tile(i) * step, step, gpu.COLUMN)
    queries, keys = (lambda x: gpu.over_rows(x, TILE)), (lambda x: gpu.over_columns(x, step))
    mask = queries(high) >= keys(self.places)
    if low is not None:
      mask = mask & (queries(low) <= keys(self.places))
    if self.frame.segments:
      ids = gpu.load(self.refs["ids_s"].at[s], layout=gpu.COLUMN, optimized=False)
      mask = mask & (queries(ids) == keys(self.ids))
    return mask

  def step(self, i, sums, masked, number=None):
    """Adds step i; `number` is its block's, where lists say it."""
    refs, parts = self.refs, self.parts
    s = self.slot(i)
    q, dout = refs["q_s"].at[s], refs["dout_s"].at[s]
    rows = lambda name: gpu.over_rows(
      gpu.load(refs[name].at[s], layout=gpu.COLUMN, optimized=False), TILE
    )
    narrow = lambda x: x.astype(self.dtype)

    def body(logits, *others):
      *dp, dk, dv = (
        others if parts == "kv" else (*others, None) if parts == "k" else (None, *others)
      )
      # Behind a barrier, so that places in k and v do not stay in registers over the loop: there
      # are too few for those of both, and at large heads for either.
      k_s, v_s = (refs[name].at[lax.optimization_barrier(self.wg)] for name in ("k_s", "v_s"))
      logits.add(self.k_s if q.shape[-1] <= 64 else k_s, q.transpose((1, 0)))
      gpu.barrier_wait(refs["dout_full"].at[s])
      if dp:
        dp[0].add(v_s, dout.transpose((1, 0)))
      lse = rows("lse_s")
      x, slope = logits.get(under_way=len(dp)), None
      if self.frame.scores is not None:
        x, slope = self.logits(i, x, number)
      mask = self.mask(i, s, number) if masked else None
      p = exp2_of(x * self.scale - lse, mask)
      if dv is not None:
        dv.add_from_registers(narrow(p), dout)
      if dk is not None:
        dlogits = p * dp[0].get(under_way=0 if dv is None else 1)
        if slope is not None:
          dlogits = dlogits * seen(slope, mask)
        dk.add_from_registers(narrow(dlogits), q)
      return tuple(x.get() for x in (dk, dv) if x is not None)

    gpu.barrier_wait(refs["q_full"].at[s])
    # dP starts as -delta: no subtraction afterwards.
    starts = [(TILE, self.blocks.step)] + ([] if parts == "v" else [rows("minus_delta_s")])
    sums = gpu.sums(body, *starts, *sums, scratch=self.p_s)
    gpu.commit_reads()  # of lse and delta
    gpu.barrier_arrive(refs["q_free"].at[s])
    return sums


class _ListedKeys(_Keys):
  """64 keys whose queries are listed."""

  def prepare_masks(self):
    self.masks = listed.Masks(self.refs, self.frame, self, self.item, self.base, transposed=True)

  def loops(self, sums):
    tiles = self.tiles
    number = tiles.number(tiles.num_full)
    full = functools.partial(self.step, masked=False)
    sums = lax.fori_loop(jnp.int32(0), tiles.num_full, full, sums)
    return tiles.each(tiles.num_full, number, self.masked, sums)

  def masked(self, i, number, sums):
    """Adds step i, of a block that is masked, unless all its pairs are hidden."""
    add = lambda sums: self.step(i, sums, True, number)
    if not self.masks.hides:
      return add(sums)

    def skip(sums):
      self.skip(i)
      return sums

    return lax.cond(self.masks.hide(i, number), skip, add, sums)

  def mask(self, i, s, number=None):
    return self.masks(i, s, number)

  def logits(self, i, products, number):
    return self.masks.logits(i, products, number)


def backward(
  schedule: stream.Schedule,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  out: Float[Array, "B T Hg Dv"],
  lse: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  dlse: Float[Array, "B Hg R Mp"] | None = None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  dq_blocks: stream.BlockSizes | None = None,
  dkv_blocks: stream.BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Gradients of the heads `heads` over the pairs of a schedule.

  Args:
    schedule: the pairs.
    q, k, v, segment_ids, scale, heads: as for `forward`.
    out, dout: the result and its cotangent, of these heads.
    lse, dlse: the log-sum-exp in base 2 of the whole softmax, and the cotangent of the natural
      one, per sequence of the view. lse may be that of a union with other schedules' keys, in which
      case out is the union's as well and the gradients are this schedule's summands.
    dq_blocks, dkv_blocks: tile sizes of the two kernels.

  Returns:
    dq [B, T, Hg, Dk]; dk and dv per query head, [B, T, Hg, D], of summaries [B, T/l, width, Hg, D];
    delta, as lse.
  """
  rest, how = (q, k, v, segment_ids, lse), dict(scale=scale, heads=heads)
  made_of = dict(out=out, dlse=dlse)
  dq, delta = dq_kernel(schedule, *rest, None, dout, **made_of, **how, blocks=dq_blocks)
  dk, dv = dkv_kernel(schedule, *rest, delta, dout, **how, blocks=dkv_blocks)
  return dq, dk, dv, delta
