"""How much of the softmax lies on each block of a list: a sweep of the keys, without values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.lowering import lists
from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.listed import Listed
from pallas_kernels.mosaic_gpu.stream.load_keys import key_rings
from pallas_kernels.mosaic_gpu.stream.load_keys import produce_keys
from pallas_kernels.mosaic_gpu.stream.load_keys import query_ring
from pallas_kernels.mosaic_gpu.stream.queries import Queries
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.weights import weights

# Rings of q and k, and the producer: load_keys.py. A consumer, for 64 queries:
#
#   mass = rowsum of P, of each step        P = exp2(x - lse), x = q k^T
#
#   in turn    k full | x | k free | P, its sums, to memory


def masses_kernel(
  frame: Listed,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  lse: Float[Array, "B Hg R Mp"],
  *,
  width: int,
  scale: float,
  blocks: BlockSizes,
) -> Float[Array, "B Hg nq width size"]:
  """The sums of P over each block of the lists of a tile, of its `lists.BLOCK` queries.

  Args:
    frame: of lists of which each has room for `width` blocks.
    q, k: as for `forward_kernel`, as are the ids.
    segment_ids, kv_segment_ids: likewise.
    lse: the log-sum-exp in base 2 of the whole softmax.
    width: blocks that a list has room for.
    scale: the factor of the products.
    blocks: as for `dq_kernel`.

  Returns:
    Sums in float32; those of blocks past the end of a list, and of queries past the last one, may
    be anything.
  """
  B, Dk = q.shape[0], q.shape[-1]
  inputs = dict(q=frame.folded(q), k=frame.keys(k), lse=safe_lse(lse))
  inputs |= frame.further_inputs(k, k, segment_ids, kv_segment_ids)
  lanes, ring = (blocks.held, blocks.warpgroups), query_ring(blocks, num_copies=2)
  scratch = ring.scratch(q=gpu.smem(*lanes, TILE, Dk, dtype=q.dtype), lse=gpu.vector(*lanes, TILE))
  rings, memory = key_rings(frame, blocks, Dk, None, q.dtype)
  work = frame.work(blocks, B, transposed=False)
  launch = Launch(frame=frame, blocks=blocks, work=work, rings=rings | dict(q=ring), scale=scale)
  per_block = frame.problem.keys // blocks.step
  shape = B, len(frame.heads), frame.problem.nq, width, per_block, lists.BLOCK
  outputs = dict(mass=jax.ShapeDtypeStruct((*shape[:3], width * per_block, shape[-1]), jnp.float32))
  (mass,) = launch.run(
    "stream_masses", _thread_block, inputs=inputs, outputs=outputs, scratch=scratch | memory
  )
  return mass.reshape(shape).sum(axis=4)


def _thread_block(launch: Launch, refs: Refs) -> None:
  launch = launch.of(refs)
  wg = lax.axis_index("wg")
  load = lambda: produce_keys(launch, ("q",), ("lse",))
  launch.split(wg, load, lambda: launch.each_item(Masses, wg))


class Masses(Queries):
  """64 queries of an item, whose share of each step's keys a consumer writes."""

  def run(self) -> Scalar:
    """Writes them; the steps taken so far."""
    self.tiles.prepare(self.refs, self.base)
    self.own.wait_full()
    self.lse = self.vector("lse")
    self.run_steps(self._step, jnp.int32(0), first=0)
    gpu.commit_reads()  # of lse
    self.own.release()
    return self.done + self.tiles.num

  def skip(self, i: Scalar, carry: Any) -> Any:
    """Lets the tile of step i pass."""
    self._write(i, gpu.full((TILE,), 0.0))
    return super().skip(i, carry)

  def _step(self, i: Scalar, carry: Any, part: Scalar | str | None) -> Any:
    k = self.k(i)

    def body(logits: Any) -> jax.Array:
      logits.add(self.q_s, k["k"].transpose((1, 0)))
      mask = self.tiles.mask(i, k, part)
      x, _ = self.tiles.logits(i, logits.get(), part)
      return weights(x * self.scale_base_2 - self.columns(self.lse), mask).sum(axis=1)

    k.wait_full()
    total = gpu.sums(body, (TILE, self.blocks.step))
    k.release()
    self._write(i, total)
    return carry

  def _write(self, i: Scalar, total: jax.Array) -> None:
    item, rows = self.item, gpu.ds(rem(self.base, lists.BLOCK), TILE)
    tile = div(self.base, lists.BLOCK)
    self.refs["mass"].at[item["b"], item["h"], tile, i, rows][...] = total
