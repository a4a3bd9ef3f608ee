"""Backward kernel of narrow windows: thread blocks walk along shares of sequences behind rings.

One warpgroup loads, W take key tiles in turn, and one more makes delta and dq (share.py numbers the
tiles, dkv.py and dq.py draw their turns):

    producer --- q, dout, lse ---> ring "q" ----------------.
        |------- k, v -----------> ring "k" --------------. |
        |                                                 v v
        |                          ring "q": delta ---> W warpgroups: dk, dv ---> device memory
        |                                    ^            |
        |                                    |            '--> ring "ds": dS^T of a key tile
        |                                    |                         |
        |                                    |    ring "k" ---------.  |
        |                                    |                      v  v
        '------- out ------------> ring "out" -----------> one warpgroup: delta, dq ---> device

Everybody releases what it has read: the W + 1 that compute release queries and keys, the one that
makes dq releases out, from whose room dq leaves, and dS^T. Each pair of tiles has its weights
computed once: 5 matrix products. Gradients are accumulators of one warpgroup: no atomics, and no
sum in another order from run to run.

The first queries of a share see keys before it, of which only dS^T is made here, for dq. Their dk
and dv are made by the share in which they lie, which loads the queries after it for that.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.mosaic_gpu.window import dkv
from pallas_kernels.mosaic_gpu.window import dq as dq_role
from pallas_kernels.mosaic_gpu.window import share


def backward(
  view: View,
  band: Band,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  ids: Int[Array, "B R Mp"] | None,
  kv_ids: Int[Array, "B R Mp"] | None,
  out: Float[Array, "B T Hg Dv"],
  lse: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  dlse: Float[Array, "B Hg R Mp"] | None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  warpgroups: int,
  query_stages: int,
  key_stages: int,
  out_stages: int,
  result_stages: int,
) -> tuple[Array, Array, Array, Float[Array, "B Hg R Mp"]]:
  """Gradients of attention to a window of the keys before each query.

  Args:
    view, band, ids, kv_ids, scale, heads: as for `forward`.
    q, k, v: all heads.
    out, dout: the result of the heads' whole softmax, and its cotangent.
    lse, dlse: base 2, and the cotangent of the natural one, in rows of the view.
    warpgroups: for dk and dv.
    query_stages, key_stages, out_stages: tiles of the rings.
    result_stages: tiles that dk and dv of a warpgroup leave from: 2, or 1 for both.

  Returns:
    dq, dk, dv [B, T, Hg, D], k's and v's for each query head; and delta = rowsum(dout out) - dlse.
  """
  (B, _, H, Dk), Dv, Hg = q.shape, v.shape[3], len(heads)
  sizes = share.Sizes(
    view=view,
    band=band,
    batch=B,
    heads=heads,
    group=H // k.shape[2],
    warpgroups=warpgroups,
    query_stages=query_stages,
    key_stages=key_stages,
    out_stages=out_stages,
    result_stages=result_stages,
    Dk=Dk,
    Dv=Dv,
    scale=scale,
  )
  inputs = dict(q=q, k=k, v=v, dout=dout, out=out, lse=lse)
  # Rows are keys wherever pairs are masked: dq is made of dS^T.
  inputs |= dict(row_ids=ids if kv_ids is None else kv_ids, column_ids=ids, dlse=dlse)
  like = lambda x, D: jax.ShapeDtypeStruct((*x.shape[:2], Hg, D), q.dtype)
  delta = jax.ShapeDtypeStruct((B, Hg, 1, view.num_tiles * TILE), jnp.float32)
  return tuple(
    gpu.launch(
      "window_backward",
      lambda refs: _kernel(sizes, refs),
      inputs={name: x for name, x in inputs.items() if x is not None},
      outputs=dict(dq=like(q, Dk), dk=like(k, Dk), dv=like(v, Dv), delta=delta),
      scratch=_scratch(sizes, q.dtype),
      # Heads, which are neighbours in memory, are the fastest axis.
      grid=(B, -(-view.num_tiles // sizes.tiles), Hg),
      grid_names=("b", "share", "h"),
      num_threads=warpgroups + 2,
      thread_name="wg",
    )
  )


def _scratch(sizes: share.Sizes, dtype: jax.typing.DTypeLike) -> dict:
  W, Dk, Dv, rings = sizes.warpgroups, sizes.Dk, sizes.Dv, sizes.rings()
  tiles = lambda *shape, **options: gpu.smem(*shape, dtype=dtype, **options)
  scratch = rings["q"].scratch(
    q=tiles(sizes.query_stages, TILE, Dk),
    dout=tiles(sizes.query_stages, TILE, Dv),
    lse=gpu.vector(sizes.query_stages, TILE),
    delta=gpu.vector(sizes.query_stages, TILE),
  )
  scratch |= rings["k"].scratch(
    k=tiles(sizes.key_stages, TILE, Dk),
    v=tiles(sizes.key_stages, TILE, Dv),
  )
  scratch |= rings["out"].scratch(out=tiles(sizes.out_stages, TILE, Dv))
  # Multiplied with k, transposed: laid out as k is.
  scratch |= rings["ds"].scratch(ds=tiles(W * (sizes.reach + 1), TILE, TILE, beside=Dk))
  scratch |= dict(dv_s=tiles(W, sizes.result_stages, TILE, Dv))  # dk too, if it fits there
  if Dk != Dv:
    scratch |= dict(dk_s=tiles(W + 1, TILE, Dk))  # of dq, the last
  if gpu.simulated():
    scratch |= dict(p_s=tiles(W, TILE, TILE))
  return dict(sorted(scratch.items()))  # a place in memory does not depend on the order above


def _kernel(sizes: share.Sizes, refs: dict) -> None:
  """A thread block: W warpgroups for dk and dv, then one for dq, then the producer."""
  wg, W = lax.axis_index("wg"), sizes.warpgroups
  part = share.Share(sizes, refs)
  gpu.when(wg == W + 1)(lambda: _produce(part))
  gpu.when(wg == W)(lambda: dq_role.QueryGradients(part).run())
  gpu.when(wg < W)(lambda: dkv.KeyGradients(part, wg).run())


def _produce(part: share.Share) -> None:
  """Loads key and query tiles side by side, as far ahead as the rings go."""
  # It only starts copies: the registers that it gives back are for the others to compute with.
  gpu.set_max_registers(share.PRODUCER_REGISTERS, action="decrease")
  kv_head = lambda: part.head // part.sizes.group

  @gpu.loop(0, part.total)
  def _(n: Traced) -> None:
    part.keys.wait_until_free(n)
    # Key and query tiles of the same number are needed at the same turn.
    t = part.inside(part.first - part.sizes.reach + n)
    slot = part.keys.slot(n)
    gpu.to_smem(part.box("k", kv_head(), t), slot["k"], slot.full())
    gpu.to_smem(part.box("v", kv_head(), t), slot["v"], slot.full())
    part.queries.wait_until_free(n)
    t = part.inside(part.first + n)
    slot = part.queries.slot(n)
    gpu.to_smem(part.box("dout", part.h, t), slot["dout"], slot.full())
    gpu.to_smem(part.box("q", part.head, t), slot["q"], slot.full())
    gpu.to_smem(part.rows("lse", t), slot["lse"], slot.full())
    # out last: its ring may have one slot, which is free only when delta of the tile before is made
    # and, where dq is staged in it, that has left. Nothing else should wait for that.
    part.outs.wait_until_free(n)
    slot = part.outs.slot(n)
    gpu.to_smem(part.box("out", part.h, t), slot["out"], slot.full())

  # The queries after the share are never released: nothing is loaded after them.
  ring.drain(part.total, part.queries, freed=part.count)
  ring.drain(part.total, part.keys)
  ring.drain(part.total, part.outs)
