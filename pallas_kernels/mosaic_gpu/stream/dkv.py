"""Streaming attention backward, gradients of keys and values: a sweep of queries.

Tiles are transposed, rows are keys: P^T and dS^T come out of the matrix units in registers as the
operands that the sums want.

    dv = sum of P^T dout        dk = scale sum of dS^T q

    memory      k, v: [keys of wg 0 | wg 1 | ..]       ring q: [q, lse, -delta | dout] [..] ..
    producer    k, v free -> load both                 q free -> load q, lse, -delta; then dout
    consumer    k, v full -> steps                     q full -> x^T; dout full -> dP^T;
                -> stage dk, dv there, store           dv += P^T dout, dk += dS^T q -> release q
                -> release k, v

A consumer has its keys, of one item at a time, to itself; a slot of q is free when all consumers
have released it, also those whose keys see none of its queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import drain
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.block_sizes import dkv_blocks
from pallas_kernels.mosaic_gpu.stream.dq import weights
from pallas_kernels.mosaic_gpu.stream.dq import where_attending
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.producer import copy_rows

# Dk + Dv up to which one launch makes both: dk and dv of 64 keys are (Dk + Dv) / 2 registers of a
# thread, 128 of the 240 there are at most.
MAX_TOGETHER = 256
# Heads up to this size leave registers to keep the place of k in.
MAX_IN_REGISTERS = 64


def dkv_kernel(
  frame: Frame,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  lse: Float[Array, "B Hg R Mp"],
  delta: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  *,
  scale: float,
  blocks: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
  """dk, dv over the pairs of a frame; all else as for `dq_kernel`.

  Keys of the queries' own rows do not count (`Schedule.own`): they are another schedule's.

  Returns:
    dk and dv per query head, [B, T, Hg, D], of summaries [B, T/l, width, Hg, D]; of lists per head
    of the launch, or per key head where whole groups are listed.
  """
  blocks = blocks or dkv_blocks(q.shape[-1], v.shape[-1])
  together = q.shape[-1] + v.shape[-1] <= MAX_TOGETHER
  arrays = q, k, v, segment_ids, lse, delta, dout
  grads = []
  for outputs in ["kv"] if together else ["k", "v"]:
    grads += _launch(frame, outputs, *arrays, scale, blocks)
  dk, dv = grads
  return dk, dv


def _launch(frame, parts: str, q, k, v, segment_ids, lse, delta, dout, scale, blocks):
  """Those gradients that `parts` names, of "k" and "v"."""
  B, Dk, Dv = q.shape[0], q.shape[-1], v.shape[-1]
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs |= dict(lse=safe_lse(lse), minus_delta=-delta)
  inputs |= frame.further_inputs(k, v, segment_ids, transposed=True)
  shares = frame.shares(B, blocks.rows)
  shapes = dict(k=frame.key_shape(shares * B, Dk), v=frame.key_shape(shares * B, Dv))
  outputs = {f"d{x}": jax.ShapeDtypeStruct(shapes[x], q.dtype) for x in parts}
  rings, scratch = _rings(frame, blocks, Dk, Dv, q.dtype)
  work = frame.work(blocks, shares * B, transposed=True)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings, scale=scale)
  body = functools.partial(_thread_block, parts=parts, shares=shares)
  grads = launch.run("stream_dkv", body, inputs=inputs, outputs=outputs, scratch=scratch)
  grads = (frame.key_grads(x) for x in grads)
  if shares == 1:
    return tuple(grads)
  grads = (x.reshape(shares, B, *x.shape[1:]) for x in grads)
  return tuple(x.sum(axis=0, dtype=jnp.float32).astype(q.dtype) for x in grads)


def _rings(frame: Frame, blocks: BlockSizes, Dk: int, Dv: int, dtype):
  """Keys and values, a slot for each consumer, and queries; and their memory."""
  wgs, stages, step = blocks.warpgroups, blocks.stages, blocks.step
  keys = Ring(name="k", num_slots=wgs, full=dict(k=2 * frame.copies(TILE)), readers=1)
  of_queries = 4 if frame.segments else 3  # q, lse, -delta, and ids
  queries = Ring(name="q", num_slots=stages, full=dict(q=of_queries, dout=1), readers=wgs)
  scratch = keys.scratch(
    k=gpu.smem(wgs, TILE, Dk, dtype=dtype), v=gpu.smem(wgs, TILE, Dv, dtype=dtype)
  )
  scratch |= queries.scratch(
    q=gpu.smem(stages, step, Dk, dtype=dtype),
    dout=gpu.smem(stages, step, Dv, dtype=dtype),
    lse=gpu.vector(stages, step),
    minus_delta=gpu.vector(stages, step),
  )
  if frame.segments:
    scratch |= dict(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(wgs, TILE, step, dtype=dtype))
  return dict(k=keys, q=queries), scratch


def key_slot(launch: Launch, n, wg) -> Slot:
  """Where the keys of a consumer lie, of each item n."""
  return Slot(launch.rings["k"], n, wg, None)


def _thread_block(launch: Launch, refs, parts: str, shares: int):
  launch = launch.of(refs)
  wg = lax.axis_index("wg")

  def consume():
    launch.each_item(functools.partial(Dkv, parts, shares), wg)
    gpu.wait_to_gmem(0)

  launch.split(wg, lambda: _produce(launch, shares), consume)


# ------------------------------------------------------------------------------------- producer


def _produce(launch: Launch, shares: int):
  """Loads the keys of every item, and the tiles of queries that see them into the ring."""
  num_steps = launch.work.each(functools.partial(_load_item, launch, shares), jnp.int32(0))
  drain(num_steps, launch.rings["q"])
  for wg in range(launch.blocks.warpgroups):
    key_slot(launch, None, wg).wait_free()


def _load_item(launch: Launch, shares: int, item, n, done):
  frame, blocks, refs = launch.frame, launch.blocks, launch.refs
  k0 = item["tile"] * blocks.rows
  tiles = frame.sweep_queries(item, k0, blocks, shares, refs["q"].shape[0])
  item = item | dict(b=tiles.b)
  for wg in range(blocks.warpgroups):
    slot = key_slot(launch, n, wg)
    gpu.when(n > 0)(slot.wait_free)
    for x in "kv":
      tile = item["tile"] * blocks.warpgroups + wg
      frame.load_keys(functools.partial(copy_rows, slot, x), refs[x], item, tile, TILE)
  step = functools.partial(_load_step, launch, item, tiles)
  return lax.fori_loop(tiles.first_step, tiles.last_step, step, done)


def _load_step(launch: Launch, item, tiles, i, done):
  frame, refs, step, (b, r) = launch.frame, launch.refs, launch.blocks.step, (item["b"], item["r"])
  slot = launch.rings["q"].slot(done)
  q0, h = tiles.tile(i) * step, tiles.head(i)
  rows = gpu.ds(q0, step)
  slot.wait_until_free()
  gpu.to_smem(frame.tile(refs["q"], b, r, q0, step, frame.head(h)), slot["q"], slot.full())
  for x in ("lse", "minus_delta"):
    gpu.to_smem(refs[x].at[b, h, r, rows], slot[x], slot.full())
  if frame.segments:
    gpu.to_smem(refs["ids"].at[b, r, rows], slot["ids"], slot.full())
  gpu.to_smem(frame.tile(refs["dout"], b, r, q0, step, h), slot["dout"], slot.full("dout"))
  return done + 1


# ------------------------------------------------------------------------------------- consumers


class Dkv:
  """64 keys of an item, whose dk and dv a consumer accumulates, or one of the two."""

  def __init__(self, parts: str, shares: int, launch: Launch, item: dict, n, done, wg):
    self.launch, self.parts, self.item, self.done, self.wg = launch, parts, item, done, wg
    self.frame, self.refs, self.step_size = launch.frame, launch.refs, launch.blocks.step
    self.scale, self.scale_base_2 = launch.scale, launch.scale * gpu.LOG2E
    k0, batch = item["tile"] * launch.blocks.rows, self.refs["q"].shape[0]
    self.base = k0 + wg * TILE
    self.tiles = self.frame.sweep_queries(item, k0, launch.blocks, shares, batch)
    self.own = key_slot(launch, n, wg)
    self.p_s = self.refs["p_s"].at[wg] if "p_s" in self.refs else None

  def run(self):
    """Accumulates and writes dk and dv; the steps taken so far."""
    self.tiles.prepare(self.refs, self.base)
    self.own.wait_full()
    buffers = {x: self.own[x] for x in self.parts}
    zeros = tuple(gpu.zeros((TILE, buffer.shape[-1])) for buffer in buffers.values())
    totals = self.tiles.run(self._step, zeros, skip=self._skip)
    for (x, buffer), total in zip(buffers.items(), totals, strict=True):
      buffer[...] = (total * self.scale if x == "k" else total).astype(buffer.dtype)
    gpu.commit_smem()
    for x, buffer in buffers.items():
      store = functools.partial(_store_rows, buffer)
      b, r, h = (self.item[name] for name in ("b", "r", "h"))
      self.frame.store_keys(store, self.refs[f"d{x}"], b, r, h, self.base, TILE)
    gpu.wait_to_gmem(0, wait_read_only=True)
    self.own.release()
    return self.done + self.tiles.last_step - self.tiles.first_step

  def _slot(self, i) -> Slot:
    """Where the queries of step i lie."""
    return self.launch.rings["q"].slot(self.done + i - self.tiles.first_step)

  def _skip(self, i, carry):
    """Lets the tile of step i pass."""
    slot = self._slot(i)
    slot.wait_full("q")
    slot.wait_full("dout")
    slot.release()
    return carry

  def _step(self, i, totals, part):
    slot = self._slot(i)
    slot.wait_full()
    starts = [(TILE, self.step_size)]
    if "k" in self.parts:  # dP starts as -delta: no subtraction afterwards
      starts.append(self._columns(slot["minus_delta"]))
    body = functools.partial(self._add, i, part, slot)
    totals = gpu.sums(body, *starts, *totals, scratch=self.p_s)
    gpu.commit_reads()  # of lse and delta
    slot.release()
    return totals

  def _add(self, i, part, slot: Slot, logits, *accumulators):
    """The totals with step i; `accumulators` are dP, where it is needed, and the totals."""
    q, dout, dtype = slot["q"], slot["dout"], slot["q"].dtype
    dp = accumulators[0] if "k" in self.parts else None
    totals = dict(zip(self.parts, accumulators[-len(self.parts) :], strict=True))
    # Behind a barrier, so that places in k and v do not stay in registers over the loop: there
    # are too few for those of both, and at large heads for either.
    k_s, v_s = (self.refs[x].at[lax.optimization_barrier(self.wg)] for x in ("k_s", "v_s"))
    logits.add(self.own["k"] if q.shape[-1] <= MAX_IN_REGISTERS else k_s, q.transpose((1, 0)))
    slot.wait_full("dout")
    if dp is not None:
      dp.add(v_s, dout.transpose((1, 0)))
    lse = self._columns(slot["lse"])
    x = logits.get(under_way=0 if dp is None else 1)
    x, derivative = self.tiles.logits(i, x, part)
    mask = self.tiles.mask(i, slot, part)
    p = weights(x * self.scale_base_2 - lse, mask)
    if "v" in totals:
      totals["v"].add_from_registers(p.astype(dtype), dout)
    if "k" in totals:
      dlogits = p * dp.get(under_way=1 if "v" in totals else 0)
      if derivative is not None:
        dlogits = dlogits * where_attending(derivative, mask)
      totals["k"].add_from_registers(dlogits.astype(dtype), q)
    return tuple(total.get() for total in totals.values())

  def _columns(self, row):
    """A value per query, over all keys."""
    return gpu.over_rows(gpu.load(row, layout=gpu.COLUMN, optimized=False), TILE)


def _store_rows(buffer, first: int, size: int, target):
  gpu.to_gmem(buffer.at[gpu.ds(first, size)], target)
