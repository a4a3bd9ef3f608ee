"""Gradients of the learned values of a score function, by query: their sums are the values'."""

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
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.dq import Dq
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.listed import Listed
from pallas_kernels.mosaic_gpu.stream.load_keys import key_rings
from pallas_kernels.mosaic_gpu.stream.load_keys import produce_keys
from pallas_kernels.mosaic_gpu.stream.load_keys import query_ring
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.weights import weights
from pallas_kernels.mosaic_gpu.stream.weights import where_attending

# Rings of q, k and v, and the producer: load_keys.py. A consumer, for 64 queries:
#
#   dvalue = rowsum of P (dP - delta) dlogit/dvalue       P, dP and delta as in dq.py
#
#   in turn    k, v full | x, dP | dlogits | dvalues | k, v free
#
# One more sweep of the keys, for calls that want these gradients: dq's kernel is without them.

TILES, VECTORS = ("q", "dout"), ("lse", "delta")  # what is loaded with queries


def dvalues_kernel(
  frame: Listed,
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
  blocks: BlockSizes,
) -> list[Float[Array, "B Hg R Mp"]]:
  """The gradients of the learned values of a frame's scores, by query; all else as `dq_kernel`.

  Queries past the end may have any.
  """
  B, Dk, Dv = q.shape[0], q.shape[-1], v.shape[-1]
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v), dout=frame.folded(dout))
  inputs |= dict(lse=safe_lse(lse), delta=delta)
  inputs |= frame.further_inputs(k, v, segment_ids, kv_segment_ids)
  lanes, ring = (blocks.held, blocks.warpgroups), query_ring(blocks, len(TILES) + len(VECTORS))
  scratch = ring.scratch(
    q=gpu.smem(*lanes, TILE, Dk, dtype=q.dtype),
    dout=gpu.smem(*lanes, TILE, Dv, dtype=q.dtype),
    lse=gpu.vector(*lanes, TILE),
    delta=gpu.vector(*lanes, TILE),
  )
  rings, memory = key_rings(frame, blocks, Dk, Dv, q.dtype)
  work = frame.work(blocks, B, transposed=False)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings | dict(q=ring), scale=scale)
  rows = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
  outputs = {f"of_value{n}": rows for n in range(len(formula.learned(frame.scores)))}
  arrays = dict(inputs=inputs, outputs=outputs, scratch=scratch | memory)
  return launch.run("stream_dvalues", _thread_block, **arrays)


def _thread_block(launch: Launch, refs: Refs) -> None:
  launch = launch.of(refs)
  wg = lax.axis_index("wg")
  load = lambda: produce_keys(launch, TILES, VECTORS)
  launch.split(wg, load, lambda: launch.each_item(Dvalues, wg))


class Dvalues(Dq):
  """64 queries of an item, whose gradients of values a consumer accumulates."""

  def run(self) -> Scalar:
    """Accumulates and writes them; the steps taken so far."""
    refs = self.refs
    self.tiles.prepare(refs, self.base)
    self.own.wait_full()
    self.dout_s = self.own["dout"]
    self.lse, self.minus_delta = self.vector("lse"), -self.vector("delta")
    zeros = [gpu.full((TILE,), 0.0) for _ in formula.learned(self.frame.scores)]
    totals = self.run_steps(self._step, tuple(zeros), first=0)

    @self.when_inside()
    def _() -> None:
      for n, total in enumerate(totals):
        refs[f"of_value{n}"].at[self.rows][...] = total

    gpu.commit_reads()  # of lse and delta
    self.own.release()
    return self.done + self.tiles.num

  def _step(self, i: Scalar, totals: tuple, part: Scalar | str | None) -> tuple:
    k, v = self.k_and_v(i)

    def body(logits: Any, dp: Any) -> tuple:
      logits.add(self.q_s, k["k"].transpose((1, 0)))
      dp.add(self.dout_s, v["v"].transpose((1, 0)))
      mask = self.tiles.mask(i, k, part)
      x, *derivatives = self.tiles.value_derivatives(i, logits.get(under_way=1), part)
      p = weights(x * self.scale_base_2 - self.columns(self.lse), mask)
      ds = p * dp.get()
      return tuple(
        total + (ds * where_attending(derivative, mask)).sum(axis=1)
        for total, derivative in zip(totals, derivatives, strict=True)
      )

    k.wait_full()
    v.wait_full()
    # dP starts as -delta: no subtraction afterwards.
    start_of_dp = self.columns(self.minus_delta)
    totals = gpu.sums(body, (TILE, self.blocks.step), start_of_dp, scratch=self.p_s)
    for slot in (k, v):
      slot.release()
    return totals
