"""Streaming attention backward, gradients of keys and values: a sweep of queries."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.block_sizes import dkv_blocks
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.load_queries import key_slot
from pallas_kernels.mosaic_gpu.stream.load_queries import produce_queries
from pallas_kernels.mosaic_gpu.stream.load_queries import rings_of
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.weights import weights
from pallas_kernels.mosaic_gpu.stream.weights import where_attending

# Rings of k and q, and the producer: load_queries.py. A consumer, for 64 keys, makes transposed
# tiles, whose rows are keys: P^T and dS^T come out of the matrix units in registers, as the left
# operands of dv and dk.
#
#   P^T = exp2(x^T - lse), x^T = k q^T       dS^T = P^T (dP^T - delta), dP^T = v dout^T
#   dv = sum of P^T dout                     dk = scale sum of dS^T q
#
#   a step     q full | start x^T | dout full | start dP^T | wait for x^T | P^T | start dv +=
#                     | wait for dP^T | dS^T | start dk +=, wait | q free

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
  kv_segment_ids: Int[Array, "B S"] | None,
  lse: Float[Array, "B Hg R Mp"],
  delta: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  *,
  scale: float,
  blocks: BlockSizes | None = None,
  before: Sequence[Float[Array, "B S Hg D"]] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """dk, dv over the pairs of a frame; all else as for `dq_kernel`.

  Keys of the queries' own rows do not count (`Frame.own`): they are another pass's.

  Args:
    before: dk and dv by other queries, of all positions, to be added; of summaries alone.

  Returns:
    dk and dv per query head, [B, T, Hg, D], of summaries [B, T/l, width, Hg, D]; of lists per head
    of the launch, or per key head where whole groups are listed.
  """
  blocks = blocks or dkv_blocks(q.shape[-1], v.shape[-1])
  together = q.shape[-1] + v.shape[-1] <= MAX_TOGETHER
  arrays = q, k, v, segment_ids, kv_segment_ids, lse, delta, dout
  grads = []
  before = dict(zip("kv", before or (), strict=False))
  for wanted in ["kv"] if together else ["k", "v"]:
    grads += _launch(frame, wanted, *arrays, before, scale, blocks)
  dk, dv = grads
  return dk, dv


def _launch(
  frame: Frame,
  wanted: str,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  kv_segment_ids: jax.Array | None,
  lse: jax.Array,
  delta: jax.Array,
  dout: jax.Array,
  before: dict[str, jax.Array],
  scale: float,
  blocks: BlockSizes,
) -> tuple[jax.Array, ...]:
  """Those gradients that `wanted` names, of "k" and "v"."""
  B, Dk, Dv = q.shape[0], q.shape[-1], v.shape[-1]
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs |= dict(lse=safe_lse(lse), minus_delta=-delta)
  inputs |= frame.further_inputs(k, v, segment_ids, kv_segment_ids, transposed=True)
  shares = frame.shares(B, blocks.rows)
  adds = bool(before) and shares == 1
  if adds:
    inputs |= {f"before_{x}": frame.keys(before[x]) for x in wanted}
  shapes = dict(k=frame.key_shape(shares * B, Dk), v=frame.key_shape(shares * B, Dv))
  outputs = {f"d{x}": jax.ShapeDtypeStruct(shapes[x], q.dtype) for x in wanted}
  rings, scratch = rings_of(frame, blocks, Dk, Dv, q.dtype)
  if gpu.simulated():  # its matrix instructions take no operand from registers
    scratch |= dict(p_s=gpu.smem(blocks.warpgroups, TILE, blocks.step, dtype=q.dtype))
  if adds:
    arrivals = len(wanted) * frame.copies(TILE)
    barriers = dict(num_barriers=blocks.warpgroups, num_arrivals=arrivals)
    scratch |= dict(before_full=gpu.Barrier(**barriers))
  work = frame.work(blocks, shares * B, transposed=True)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings, scale=scale)
  body = functools.partial(_thread_block, wanted=wanted, shares=shares)
  grads = launch.run("stream_dkv", body, inputs=inputs, outputs=outputs, scratch=scratch)
  grads = (frame.key_grads(x) for x in grads)
  # Shares are summed here, in float32 and in one order: equal bits in every run.
  if shares == 1:
    return tuple(grads)
  grads = (x.reshape(shares, B, *x.shape[1:]) for x in grads)
  sums = (x.sum(axis=0, dtype=jnp.float32) for x in grads)
  if before:
    added = (frame.summaries_of(before[x]).astype(jnp.float32) for x in wanted)
    sums = (x + y for x, y in zip(sums, added, strict=True))
  return tuple(x.astype(q.dtype) for x in sums)


def _thread_block(launch: Launch, refs: Refs, wanted: str, shares: int) -> None:
  launch = launch.of(refs)
  wg = lax.axis_index("wg")

  def consume() -> None:
    launch.each_item(functools.partial(Dkv, wanted, shares), wg)
    gpu.wait_to_gmem(0)

  launch.split(wg, lambda: produce_queries(launch, shares), consume)


class Dkv:
  """64 keys of an item, whose dk and dv a consumer accumulates, or one of the two."""

  def __init__(
    self,
    wanted: str,
    shares: int,
    launch: Launch,
    item: Item,
    n: Scalar,
    done: Scalar,
    wg: Scalar,
  ):
    self.launch, self.wanted, self.item, self.done, self.wg = launch, wanted, item, done, wg
    self.frame, self.refs, self.step_size = launch.frame, launch.refs, launch.blocks.step
    self.scale, self.scale_base_2 = launch.scale, launch.scale * gpu.LOG2E
    k0, batch = item["tile"] * launch.blocks.rows, self.refs["q"].shape[0]
    self.base = k0 + wg * TILE
    self.tiles = self.frame.sweep_queries(item, k0, launch.blocks, shares, batch)
    self.own = key_slot(launch, n, wg)
    self.p_s = self.refs["p_s"].at[wg] if "p_s" in self.refs else None

  def run(self) -> Scalar:
    """Accumulates and writes dk and dv; the steps taken so far."""
    self.tiles.prepare(self.refs, self.base)
    self.own.wait_full()
    buffers = {x: self.own[x] for x in self.wanted}
    zeros = tuple(gpu.zeros((TILE, buffer.shape[-1])) for buffer in buffers.values())
    totals = dict(zip(buffers, self.tiles.run(self._step, zeros, skip=self._skip), strict=True))
    if "k" in totals:
      totals["k"] = totals["k"] * self.scale
    # Staged where the keys were: nothing reads those any more.
    if "before_full" in self.refs:
      self._load_before(buffers)
      totals = {x: total + pairs.load(buffers[x]) for x, total in totals.items()}
    for x, buffer in buffers.items():
      buffer[...] = totals[x].astype(buffer.dtype)
    gpu.commit_smem()
    for x, buffer in buffers.items():
      # Of summaries not one piece, but one for each row of the view.
      store = functools.partial(_store_rows, buffer)
      b, r, h = (self.item[name] for name in ("b", "r", "h"))
      self.frame.store_keys(store, self.refs[f"d{x}"], b, r, h, self.base, TILE)
    gpu.wait_to_gmem(0, wait_read_only=True)
    self.own.release()
    return self.done + self.tiles.end_step - self.tiles.first_step

  def _load_before(self, buffers: dict[str, Any]) -> None:
    """What other queries have given these keys, into the buffers."""
    full, tile = self.refs["before_full"].at[self.wg], div(self.base, TILE)
    gpu.commit_reads()
    for x, buffer in buffers.items():
      copy = functools.partial(_load_rows, buffer, full)
      source = self.refs[f"before_{x}"]  # of the heads of the launch, as dk and dv
      self.frame.load_keys(copy, source, self.item, tile, TILE, head=self.item["h"])
    gpu.barrier_wait(full)

  def _slot(self, i: Scalar) -> Slot:
    """Where the queries of step i lie."""
    return self.launch.rings["q"].slot(self.done + i - self.tiles.first_step)

  def _skip(self, i: Scalar, carry: Any) -> Any:
    """Lets the tile of step i pass."""
    slot = self._slot(i)
    slot.wait_full("q")
    slot.wait_full("dout")
    slot.release()
    return carry

  def _step(self, i: Scalar, totals: tuple, part: Scalar | str | None) -> tuple:
    slot = self._slot(i)
    slot.wait_full()
    starts = [(TILE, self.step_size)]
    if "k" in self.wanted:  # dP starts as -delta: no subtraction afterwards
      starts.append(self._columns(slot["minus_delta"]))
    body = functools.partial(self._add, i, part, slot)
    totals = gpu.sums(body, *starts, *totals, scratch=self.p_s)
    gpu.commit_reads()  # of lse and delta
    slot.release()
    return totals

  def _add(
    self,
    i: Scalar,
    part: Scalar | str | None,
    slot: Slot,
    logits: gpu.Sum,
    *accumulators: gpu.Sum,
  ) -> tuple[jax.Array, ...]:
    """The totals with step i; `accumulators` are dP, where it is needed, and the totals."""
    q, dout, dtype = slot["q"], slot["dout"], slot["q"].dtype
    dp = accumulators[0] if "k" in self.wanted else None
    totals = dict(zip(self.wanted, accumulators[-len(self.wanted) :], strict=True))
    # Behind a barrier, so that places in k and v do not stay in registers over the loop: there
    # are too few for those of both, and at large heads for either. They would be spilled: all 30
    # spills of a step at D = 128.
    k_s, v_s = (self.refs[x].at[lax.optimization_barrier(self.wg)] for x in ("k_s", "v_s"))
    logits.add(self.own["k"] if q.shape[-1] <= MAX_IN_REGISTERS else k_s, q.transpose((1, 0)))
    slot.wait_full("dout")
    if dp is not None:
      dp.add(v_s, dout.transpose((1, 0)))
    # Loaded while the products run: before them it would hold 32 registers.
    lse = self._columns(slot["lse"])
    x = logits.get(under_way=0 if dp is None else 1)
    x, derivative = self.tiles.logits(i, x, part)
    mask = self.tiles.mask(i, slot, part)
    p = weights(x * self.scale_base_2 - lse, mask)
    if "v" in totals:  # at once: the product runs while dS is made
      totals["v"].add_from_registers(p.astype(dtype), dout)
    if "k" in totals:
      dlogits = p * dp.get(under_way=1 if "v" in totals else 0)
      if derivative is not None:
        dlogits = dlogits * where_attending(derivative, mask)
      totals["k"].add_from_registers(dlogits.astype(dtype), q)
    return tuple(total.get() for total in totals.values())

  def _columns(self, row: Any) -> jax.Array:
    """A value per query, over all keys."""
    return gpu.over_rows(gpu.load(row, layout=gpu.COLUMN, optimized=False), TILE)


def _store_rows(buffer: Any, first: int, size: int, target: Any) -> None:
  gpu.to_gmem(buffer.at[gpu.ds(first, size)], target)


def _load_rows(buffer: Any, full: Any, source: Any, first: int, size: int) -> None:
  gpu.to_smem(source, buffer.at[gpu.ds(first, size)], full)
