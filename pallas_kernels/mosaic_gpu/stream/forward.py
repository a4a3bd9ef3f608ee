"""Streaming attention forward: an online softmax in base 2 over the key tiles of a sweep."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.block_sizes import forward_blocks
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.load_keys import key_rings
from pallas_kernels.mosaic_gpu.stream.load_keys import open_boxes
from pallas_kernels.mosaic_gpu.stream.load_keys import produce_keys
from pallas_kernels.mosaic_gpu.stream.load_keys import query_ring
from pallas_kernels.mosaic_gpu.stream.queries import Queries
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar

# Rings of q, k and v, and the producer: load_keys.py. A consumer, for 64 queries:
#
#   x = q k^T  ->  p = exp2(x - top)  ->  acc = keep acc + p v          keep: exp2(old top - top)
#
#   in turn    k full | x, wait | k free | p | v full | acc, wait | v free
#   ahead      k full | start x | start acc with p, v of the step before | wait for x | k free
#                     | next p | v full | wait for acc | v of the step before free
#
# In turn, a consumer's exponentials run beside the products of another one. Ahead, they run beside
# its own last product: where two consumers are all there is room for, and products take longer.


def forward_kernel(
  frame: Frame,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  *,
  scale: float,
  blocks: BlockSizes | None = None,
) -> tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]]:
  """Attention of a frame's heads over its pairs.

  Args:
    frame: the pairs, and the heads of the launch.
    q, k, v: bfloat16 or float16, all heads; of lists, q has the heads of the launch.
    segment_ids: int32; queries see keys of equal ids ("natural" and "blocks" views).
    kv_segment_ids: those of keys; None: keys have those of the queries.
    scale: factor of the logits, positive.
    blocks: tile sizes; by default what suits the head dimensions.

  Returns:
    The output, and the log-sum-exp of the logits in base 2, float32 per sequence of the view
    (Mp rows: the sequence rounded up to 128). Rows without keys get 0 and -inf.
  """
  if scale <= 0:
    raise NotImplementedError(f"{scale=}: must be positive, the running maximum is that of q k")
  B, Dk, Dv, heads = q.shape[0], q.shape[-1], v.shape[-1], frame.heads
  blocks = blocks or forward_blocks(Dk, Dv)
  inputs = dict(q=frame.folded(q), k=frame.keys(k), v=frame.keys(v))
  inputs |= frame.further_inputs(k, v, segment_ids, kv_segment_ids)
  out = jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], len(heads), Dv), q.dtype)
  lse = jax.ShapeDtypeStruct((B, len(heads), frame.sequences, frame.padded), jnp.float32)
  wgs, ring = blocks.warpgroups, query_ring(blocks, num_copies=1)
  scratch = ring.scratch(q=gpu.smem(blocks.held, wgs, TILE, Dk, dtype=q.dtype))
  # The output is not staged where q was: there the queries of the next item are soon loaded.
  scratch |= dict(out_s=gpu.smem(wgs, TILE, Dv, dtype=q.dtype), lse_s=gpu.vector(wgs, TILE))
  rings, memory = key_rings(frame, blocks, Dk, Dv, q.dtype)
  scratch |= memory
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(wgs, TILE, blocks.step, dtype=q.dtype))
  work = frame.work(blocks, B, transposed=False)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings | dict(q=ring), scale=scale)
  body = lambda launch, refs: _thread_block(launch, refs, scratch)
  outputs = dict(out=out, lse=lse)
  out, lse = launch.run("stream_forward", body, inputs=inputs, outputs=outputs, scratch=scratch)
  return frame.unfolded(out), lse


def _thread_block(launch: Launch, refs: Refs, scratch: dict) -> None:
  refs = open_boxes(refs, launch.frame, launch.blocks)
  wg, core = lax.axis_index("wg"), lax.axis_index("core")
  refs, wg, core = launch.of_team(refs, scratch, wg, core)
  launch = launch.of(refs, core)

  def consume() -> None:
    launch.each_item(Forward, wg)
    gpu.wait_to_gmem(0)  # shared memory must not go before it is copied

  launch.split(wg, lambda: produce_keys(launch), consume)


class Forward(Queries):
  """64 queries of an item, whose output a consumer accumulates."""

  def run(self) -> Scalar:
    """Attends, writes out and lse; the steps taken so far."""
    refs, wg, item = self.refs, self.wg, self.item
    self.tiles.prepare(refs, self.base)
    self.own.wait_full()
    acc, top, total = self.ahead() if self.blocks.ahead else self.in_turn()
    self.own.release()  # the next queries load while this item ends
    mean, lse = softmax.finish(acc, top, total, self.scale)
    gpu.wait_to_gmem(0, wait_read_only=True)  # the item before leaves its buffers
    out_s, lse_s = refs["out_s"].at[wg], refs["lse_s"].at[wg]
    out_s[...] = mean.astype(out_s.dtype)
    lse_s[...] = lse
    gpu.commit_smem()
    # This copy runs while the next item is worked on.
    target = self.frame.tile(refs["out"], item["b"], item["r"], self.base, TILE, item["h"])
    gpu.to_gmem(out_s, target)
    self.when_inside()(lambda: gpu.to_gmem(lse_s, refs["lse"].at[self.rows]))
    return self.done + self.tiles.num

  # ------------------------------------------------------------------------------------ in turn

  def in_turn(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each step: logits, softmax, weighted sum."""
    return self.run_steps(self._step_in_turn, self._start(), first=0)

  def _step_in_turn(self, i: Scalar, carry: tuple, part: Scalar | str | None) -> tuple:
    acc, top, total = carry
    k, v = self.k_and_v(i)
    k.wait_full()
    (x,) = gpu.matmul((self.q_s, k["k"].transpose((1, 0))))
    x, _ = self.tiles.logits(i, x, part)
    # Masks come after the product: before it, what they compare would be kept in registers.
    mask = self.tiles.mask(i, k, part)
    k.release()  # with its ids; the next keys load during the exponentials
    p, top, total, keep = self._weights(x, top, total, mask)
    acc = acc * gpu.over_columns(keep, acc.shape[1])
    v.wait_full()
    (acc,) = gpu.add_matmul((acc, (p.astype(v["v"].dtype), v["v"])), scratch=self.p_s)
    v.release()
    return acc, top, total

  # -------------------------------------------------------------------------------------- ahead

  def ahead(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logits of a step are made while the weighted sum of the step before runs."""
    acc, top, total = self._start()
    k, first = self.k(0), jnp.int32(0)
    k.wait_full()
    (x,) = gpu.matmul((self.q_s, k["k"].transpose((1, 0))))
    # There is one copy of this code: its mask serves full tiles as well.
    p, top, total, _ = self._attend(first, x, top, total, self.first_part)
    carry = acc, p.astype(self.q_s.dtype), top, total
    acc, p, top, total = self.run_steps(self._step_ahead, carry, first=1)
    v = self.v(self.tiles.num - 1)
    (acc,) = gpu.add_matmul((acc, (p, v["v"])), scratch=self.p_s)
    v.release()
    return acc, top, total

  def _step_ahead(self, i: Scalar, carry: tuple, part: Scalar | str | None) -> tuple:
    acc, p, top, total = carry
    k, v_before = self.k(i), self.v(i - 1)
    k.wait_full()

    def body(logits: Any, acc: Any) -> tuple:
      # Products end in the order in which they start: logits are there with one under way.
      logits.add(self.q_s, k["k"].transpose((1, 0)))
      acc.add_from_registers(p, v_before["v"])
      return self._attend(i, logits.get(under_way=1), top, total, part), acc.get()

    weights, acc = gpu.sums(body, (TILE, self.blocks.step), acc, scratch=self.p_s)
    v_before.release()
    p, top, total, keep = weights
    # Behind the barrier, so that the registers of the old p are not overwritten in use.
    acc, p = lax.optimization_barrier((acc, p))
    return acc * gpu.over_columns(keep, acc.shape[1]), p.astype(self.q_s.dtype), top, total

  def _attend(
    self,
    i: Scalar,
    x: jax.Array,
    top: jax.Array,
    total: jax.Array,
    part: Scalar | str | None,
  ) -> tuple[jax.Array, ...]:
    """What `_weights` returns, of products; then the values of step i are there."""
    x, _ = self.tiles.logits(i, x, part)
    mask = self.tiles.mask(i, self.k(i), part)
    self.k(i).release()
    p, *state = self._weights(x, top, total, mask)
    # All of them are made before the wait, and the sum under way is waited for after it: else its
    # wait comes as early as it can.
    p = lax.optimization_barrier(p)
    self.v(i).wait_full()
    return p, *state

  # --------------------------------------------------------------------------------------- both

  def _start(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """acc, running maximum, and sum of weights, before the first key."""
    acc = gpu.zeros((TILE, self.refs["v_s"].shape[-1]))
    return acc, gpu.full((TILE,), softmax.NO_MAXIMUM), gpu.full((TILE,), 0.0)

  def _weights(
    self, x: jax.Array, top: jax.Array, total: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, ...]:
    """exp2 of logits x under the running maximum; new maximum, sum of weights, rescaling."""
    if mask is not None:
      x = jnp.where(mask, x, -jnp.inf)
    (p,), new_top, keep = softmax.weights([x], top, self.scale)
    return p, new_top, total * keep + p.sum(axis=1), keep
