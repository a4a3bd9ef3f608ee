"""Streaming attention backward, gradients of queries: a sweep of keys, as forward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.block_sizes import dq_blocks
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.load_keys import key_rings
from pallas_kernels.mosaic_gpu.stream.load_keys import open_boxes
from pallas_kernels.mosaic_gpu.stream.load_keys import produce_keys
from pallas_kernels.mosaic_gpu.stream.load_keys import query_ring
from pallas_kernels.mosaic_gpu.stream.queries import Queries
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.weights import weights
from pallas_kernels.mosaic_gpu.stream.weights import where_attending

# Rings of q, k and v, and the producer: load_keys.py. A consumer, for 64 queries:
#
#   P = exp2(x - lse), x = q k^T      again, from the log-sum-exp of the whole softmax
#   dS = P (dP - delta)               dP = dout v^T, delta = rowsum(dout out) - dlse
#   dq = scale sum of dS k
#
#   in turn    k, v full | x, dP | v free | dS | dq += dS k, wait | k free
#   ahead      start x, dP | start dq += dS k of the step before | wait for x, dP | v free | next dS
#                     | next k, v full | wait for dq | k of the step before free
#
# k is needed twice, so that v is free first. dq is staged where q was, which saves memory.

TILES, VECTORS = ("q", "dout", "out"), ("lse", "delta", "dlse")  # what may be loaded with queries


def dq_kernel(
  frame: Frame,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  lse: Float[Array, "B Hg R Mp"],
  delta: Float[Array, "B Hg R Mp"] | None,
  dout: Float[Array, "B T Hg Dv"],
  *,
  out: Float[Array, "B T Hg Dv"] | None = None,
  dlse: Float[Array, "B Hg R Mp"] | None = None,
  scale: float,
  blocks: BlockSizes | None = None,
) -> tuple[Float[Array, "B T Hg Dk"], Float[Array, "B Hg R Mp"]]:
  """dq over the pairs of a frame, and delta; all else as for `forward_kernel`.

  Args:
    lse: the log-sum-exp in base 2 of the whole softmax, per sequence of the view. It may be that of
      a union with the keys of other frames: then out is the union's as well, and the gradients are
      this frame's summands.
    delta: rowsum(dout out) - dlse, 0 for rows without keys; None to make it of `out` and `dlse`.
    out, dout: the result and its cotangent, of the frame's heads.
    dlse: the cotangent of the natural log-sum-exp.
  """
  B, Dk, Dv, heads = q.shape[0], q.shape[-1], v.shape[-1], frame.heads
  blocks = blocks or dq_blocks(Dk, Dv)
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs |= dict(lse=safe_lse(lse))
  makes_delta = delta is None
  optional = dict(delta=delta, dlse=dlse, out=frame.folded(out) if makes_delta else None)
  inputs |= {name: x for name, x in optional.items() if x is not None}
  num_copies = sum(name in inputs for name in (*TILES, *VECTORS))
  inputs |= frame.further_inputs(k, v, segment_ids, kv_segment_ids)
  dq = jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], len(heads), Dk), q.dtype)
  lanes, ring = (blocks.held, blocks.warpgroups), query_ring(blocks, num_copies)
  scratch = ring.scratch(
    q=gpu.smem(*lanes, TILE, Dk, dtype=q.dtype),
    dout=gpu.smem(*lanes, TILE, Dv, dtype=q.dtype),
    lse=gpu.vector(*lanes, TILE),
  )
  rings, memory = key_rings(frame, blocks, Dk, Dv, q.dtype)
  scratch |= memory
  outputs = dict(dq=dq)
  if makes_delta:
    scratch |= dict(out_s=gpu.smem(*lanes, TILE, Dv, dtype=q.dtype))
    outputs |= dict(minus_delta=jax.ShapeDtypeStruct(lse.shape, jnp.float32))
  vectors = [name for name in ("delta", "dlse") if optional[name] is not None]
  scratch |= {f"{name}_s": gpu.vector(*lanes, TILE) for name in vectors}
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(blocks.warpgroups, TILE, blocks.step, dtype=q.dtype))
  work = frame.work(blocks, B, transposed=False)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings | dict(q=ring), scale=scale)
  grads = launch.run("stream_dq", _thread_block, inputs=inputs, outputs=outputs, scratch=scratch)
  # XLA cancels this sign and the one that dkv_kernel makes.
  return frame.unfolded(grads[0]), -grads[1] if makes_delta else delta


def _thread_block(launch: Launch, refs: Refs) -> None:
  launch = launch.of(open_boxes(refs, launch.frame, launch.blocks))
  wg = lax.axis_index("wg")

  def consume() -> None:
    launch.each_item(Dq, wg)
    gpu.wait_to_gmem(0)

  names = [tuple(x for x in each if x in refs) for each in (TILES, VECTORS)]
  launch.split(wg, lambda: produce_keys(launch, *names), consume)


class Dq(Queries):
  """64 queries of an item, whose dq a consumer accumulates."""

  def run(self) -> Scalar:
    """Accumulates and writes dq; the steps taken so far."""
    refs, item = self.refs, self.item
    self.tiles.prepare(refs, self.base)
    self.own.wait_full()
    self.dout_s = self.own["dout"]
    self.lse = self.vector("lse")
    self.minus_delta = self._make_minus_delta() if "out" in refs else -self.vector("delta")
    dq = self.ahead() if self.blocks.ahead else self.in_turn()
    self.q_s[...] = (dq * self.scale).astype(self.q_s.dtype)
    gpu.commit_smem()
    target = self.frame.tile(refs["dq"], item["b"], item["r"], self.base, TILE, item["h"])
    gpu.to_gmem(self.q_s, target)
    gpu.wait_to_gmem(0, wait_read_only=True)
    gpu.commit_reads()  # of dout and out
    self.own.release()
    return self.done + self.tiles.num

  def _make_minus_delta(self) -> jax.Array:
    """Computes and writes -delta."""
    dout, out = (
      gpu.load(x, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
      for x in (self.dout_s, self.own["out"])
    )
    delta = (dout * out).sum(axis=1)
    minus_delta = self.vector("dlse") - delta if "dlse" in self.refs else -delta
    minus_delta = jnp.where(self.lse == jnp.inf, 0.0, minus_delta)  # no keys

    @self.when_inside()
    def _() -> None:
      self.refs["minus_delta"].at[self.rows][...] = minus_delta

    return minus_delta

  # ------------------------------------------------------------------------------------ in turn

  def in_turn(self) -> jax.Array:
    """Each step: logits and dP, dS, its product."""
    # dP starts as -delta: no subtraction afterwards.
    self.start_of_dp = self.columns(self.minus_delta)
    return self.run_steps(self._step_in_turn, gpu.zeros((TILE, self.q_s.shape[-1])), first=0)

  def _step_in_turn(self, i: Scalar, dq: jax.Array, part: Scalar | str | None) -> jax.Array:
    k, v = self.k_and_v(i)
    body = lambda logits, dp: self._weights(i, part, logits, dp)
    k.wait_full()
    v.wait_full()
    p, dp = gpu.sums(body, (TILE, self.blocks.step), self.start_of_dp)
    ds = (p * dp).astype(self.q_s.dtype)
    (dq,) = gpu.add_matmul((dq, (ds, k["k"])), scratch=self.p_s)
    k.release()
    return dq

  # -------------------------------------------------------------------------------------- ahead

  def ahead(self) -> jax.Array:
    """The logits and dP of a step are made while the product of the step before runs."""
    first, tile = jnp.int32(0), (TILE, self.blocks.step)
    self._wait_full(0)
    body = lambda logits, dp: self._dlogits(first, self.first_part, logits, dp)
    ds = gpu.sums(body, tile, tile).astype(self.q_s.dtype)
    carry = gpu.zeros((TILE, self.q_s.shape[-1])), ds
    dq, ds = self.run_steps(self._step_ahead, carry, first=1)
    last = self.k(self.tiles.num - 1)
    (dq,) = gpu.add_matmul((dq, (ds, last["k"])), scratch=self.p_s)
    last.release()
    return dq

  def _step_ahead(self, i: Scalar, carry: tuple, part: Scalar | str | None) -> tuple:
    dq, ds = carry
    k_before, tile = self.k(i - 1), (TILE, self.blocks.step)

    def body(logits: Any, dp: Any, dq: Any) -> tuple:
      add = lambda: dq.add_from_registers(ds, k_before["k"])
      return self._dlogits(i, part, logits, dp, add), dq.get()

    ds, dq = gpu.sums(body, tile, tile, dq, scratch=self.p_s)
    k_before.release()
    # Behind the barrier, so that the registers of the old ds are not overwritten in use.
    dq, ds = lax.optimization_barrier((dq, ds))
    return dq, ds.astype(self.q_s.dtype)

  def _dlogits(
    self,
    i: Scalar,
    part: Scalar | str | None,
    logits: gpu.Sum,
    dp: gpu.Sum,
    start_product: Callable | None = None,
  ) -> jax.Array:
    """dS of step i; the keys and values of the next one are there."""
    p, dp = self._weights(i, part, logits, dp, start_product)
    # Fresh accumulators cost nothing here, those that start as -delta as much as this.
    ds = p * (dp + self.columns(self.minus_delta))
    # All of it is made before the next wait, and the product under way is waited for after it: else
    # its wait comes as early as it can.
    ds = lax.optimization_barrier(ds)
    gpu.when(i + 1 < self.tiles.num)(lambda: self._wait_full(i + 1))
    return ds

  # --------------------------------------------------------------------------------------- both

  def _weights(
    self,
    i: Scalar,
    part: Scalar | str | None,
    logits: gpu.Sum,
    dp: gpu.Sum,
    start_product: Callable | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """P, times the logits' derivative, and dP of step i, which leaves its values.

    `start_product` starts one more product while those two run.
    """
    k, v = self.k_and_v(i)
    # No barrier around the places of q and dout, as dkv has around those of k and v: nothing spills
    # here, and it would cost 25 instructions a step.
    logits.add(self.q_s, k["k"].transpose((1, 0)))
    dp.add(self.dout_s, v["v"].transpose((1, 0)))
    if start_product is not None:
      start_product()
    under_way = 0 if start_product is None else 1
    # The mask is made while the products run; dP is waited for after P's exponentials.
    mask = self.tiles.mask(i, k, part)
    x, derivative = self.tiles.logits(i, logits.get(under_way=1 + under_way), part)
    p = weights(x * self.scale_base_2 - self.columns(self.lse), mask)
    if derivative is not None:
      p = p * where_attending(derivative, mask)
    dp = dp.get(under_way=under_way)
    v.release()
    return p, dp

  def _wait_full(self, i: Scalar) -> None:
    for slot in self.k_and_v(i):
      slot.wait_full()
