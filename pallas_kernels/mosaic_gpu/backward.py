"""The backward kernel of the heads that the memory system bounds: each tensor is read once.

A block of threads owns some tiles of a sequence: it computes dq of their queries and dk, dv of
their keys, and holds in shared memory what these need, q and dout of its own and later tiles, k and
v of its own and earlier ones. Nothing is added up across blocks of threads: 7 matrix products
instead of 5, but no atomics, and the memory system remains the limit.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.forward import NO_MAXIMUM
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View


def banded(
  view: View,
  band: Band,
  q,
  k,
  v,
  ids,
  out,
  lse,
  dout,
  dlse,
  delta,
  prev,
  *,
  scale,
  heads,
  own_tiles: int,
  warpgroups: int,
):
  """Gradients of attention to a band of keys inside each sequence of a view.

  With P = exp2(S - lse), dS = P (dP - delta), delta = rowsum(dout out) - dlse. The passes of a
  union share lse and delta: the first computes delta, the next get it.

  Args:
    q, dout: [B, T, H, D], dout of the group's heads alone; k [B, T, Hkv, Dk]; v [B, T, Hkv, Dv].
    ids: segment ids in rows, int32 [B, R, Mp], or None.
    out: [B, T, Hg, Dv]; None with delta.
    lse: base 2, in rows [B, Hg, R, Mp], as dlse (or None) and delta (or None).
    prev: gradients [B, T, Hg, D] of other keys to add to, or None.
    own_tiles: of a block of threads.
    warpgroups: of a block of threads.

  Returns:
    dq, dk, dv [B, T, Hg, D], k's and v's for each query head; and delta.
  """
  B, T, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt, W = view.num_tiles, warpgroups
  own_tiles = min(own_tiles, nt)
  num_groups = -(-nt // own_tiles)
  reach = band.last(nt)
  before = min(reach, (num_groups - 1) * own_tiles)  # tiles of keys before the own ones
  nq, nk = min(own_tiles + reach, nt), own_tiles + before
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse)
  optional = dict(ids=ids, dlse=dlse, delta=delta, out=None if out is None else view(out))
  inputs |= {name: x for name, x in optional.items() if x is not None}
  if prev is not None:
    inputs |= {name: view(x) for name, x in zip(("dq", "dk", "dv"), prev, strict=True)}
  scratch = dict(
    q_s=gpu.smem(nq, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(nk, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(nk, TILE, Dv, dtype=q.dtype),
    dout_s=gpu.smem(nq, TILE, Dv, dtype=q.dtype),
    out_s=gpu.smem(W if out is None else max(nq, W), TILE, Dv, dtype=q.dtype),  # and dv
    stage_s=gpu.smem(W, TILE, Dk, dtype=q.dtype),  # dk, then dq
    lse_s=gpu.vector(nq, TILE),
    delta_s=gpu.vector(nq, TILE),
    q_full=gpu.Barrier(num_barriers=nq, num_arrivals=3),
    k_full=gpu.Barrier(num_barriers=nk, num_arrivals=2),
    out_full=gpu.Barrier(num_barriers=nq),
    delta_full=gpu.Barrier(num_arrivals=W),
  )
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=W, num_arrivals=2))
    scratch |= dict(prev_dq_full=gpu.Barrier(num_barriers=W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def body(*refs, **s):
    ref = dict(zip(inputs, refs, strict=False))
    dq_ref, dk_ref, dv_ref, delta_ref = refs[len(inputs) :]
    b, g, r, h, wg = (lax.axis_index(name) for name in ("b", "g", "r", "h", "wg"))
    head = head_of(heads, h)
    kv_head = head // group
    begin = g * own_tiles
    end = jnp.minimum(begin + own_tiles, nt)
    q_end, k_begin = jnp.minimum(end + reach, nt), jnp.maximum(begin - reach, 0)
    q_slot, k_slot = lambda t: t - begin, lambda t: t - begin + before
    box = lambda name, head, t: view.box(ref[name], b, r, head, t * TILE)
    rows = lambda x, t: x.at[b, h, r, gpu.ds(t * TILE, TILE)]
    p_s = s["p_s"].at[wg] if gpu.simulated() else None
    c = scale * gpu.LOG2E

    @gpu.when(wg == 0)
    def _():
      @gpu.loop(begin, q_end)
      def _(t):
        n = q_slot(t)
        full = s["q_full"].at[n]
        gpu.to_smem(box("dout", h, t), s["dout_s"].at[n], full)
        if out is not None:
          gpu.to_smem(box("out", h, t), s["out_s"].at[n], s["out_full"].at[n])
        else:
          gpu.to_smem(rows(ref["delta"], t), s["delta_s"].at[n], s["out_full"].at[n])
        gpu.to_smem(box("q", head, t), s["q_s"].at[n], full)
        gpu.to_smem(rows(ref["lse"], t), s["lse_s"].at[n], full)

      @gpu.loop(k_begin, end)
      def _(t):
        n = k_slot(t)
        gpu.to_smem(box("k", kv_head, t), s["k_s"].at[n], s["k_full"].at[n])
        gpu.to_smem(box("v", kv_head, t), s["v_s"].at[n], s["k_full"].at[n])

    @gpu.loop(begin, q_end)
    def _(t):
      n = q_slot(t)
      gpu.barrier_wait(s["q_full"].at[n])
      gpu.barrier_wait(s["out_full"].at[n])
      if out is not None:

        @gpu.when(lax.rem(n, jnp.int32(W)) == wg)
        def _():
          product = _load(s["dout_s"].at[n]) * _load(s["out_s"].at[n])
          row = product.sum(axis=1)
          if dlse is not None:
            row = row - gpu.load(rows(ref["dlse"], t), layout=ROW, optimized=False)
          has_keys = gpu.load(s["lse_s"].at[n], layout=ROW, optimized=False) > NO_MAXIMUM
          s["delta_s"].at[n][...] = jnp.where(has_keys, row, 0.0)

    @gpu.loop(k_begin, end)
    def _(t):
      gpu.barrier_wait(s["k_full"].at[k_slot(t)])

    if out is not None:
      gpu.barrier_arrive(s["delta_full"])
      gpu.barrier_wait(s["delta_full"])

    def weights(t, layout):
      """lse, as +inf where a row has no keys and must weigh nothing, and delta of a query tile."""
      lse = gpu.load(s["lse_s"].at[q_slot(t)], layout=layout, optimized=False)
      delta = gpu.load(s["delta_s"].at[q_slot(t)], layout=layout, optimized=False)
      return jnp.where(lse > NO_MAXIMUM, lse, jnp.inf), delta

    def mask_of(q_tile, k_tile, masked, query_axis):
      """Which pairs of two tiles attend, or None; the queries along an axis."""
      mask = None
      if masked:
        key_axis = 1 - query_axis
        difference = gpu.iota((TILE, TILE), query_axis) - gpu.iota((TILE, TILE), key_axis)
        mask = band.mask(difference + (q_tile - k_tile) * TILE)
      if ids is not None:
        of_rows, of_columns = (q_tile, k_tile) if query_axis == 0 else (k_tile, q_tile)
        load = lambda t, layout: gpu.load(
          ref["ids"].at[b, r, gpu.ds(t * TILE, TILE)], layout=layout, optimized=False
        )
        same = gpu.over_columns(load(of_rows, ROW), TILE) == gpu.over_rows(
          load(of_columns, COLUMN), TILE
        )
        mask = same if mask is None else mask & same
      return mask

    def key_gradients(own):
      k_own, v_own = (s[name].at[k_slot(own)] for name in ("k_s", "v_s"))

      def step(t, state, masked):
        n = q_slot(t)
        dk, dv = state
        q_tile, dout_tile = s["q_s"].at[n], s["dout_s"].at[n]
        x, dp = gpu.matmul((k_own, q_tile.transpose((1, 0))), (v_own, dout_tile.transpose((1, 0))))
        lse, delta = weights(t, COLUMN)
        p = jnp.exp2(x * c - gpu.over_rows(lse, TILE))
        mask = mask_of(t, own, masked, query_axis=1)
        p = p if mask is None else jnp.where(mask, p, 0.0)
        ds = p * (dp - gpu.over_rows(delta, TILE))
        return gpu.add_matmuls(
          ((dk, ds.astype(q.dtype), q_tile), (dv, p.astype(q.dtype), dout_tile)), scratch=p_s
        )

      return _sweep(own, 1, band, nt, step, (gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv))))

    def query_gradients(own):
      n = q_slot(own)
      q_own, dout_own = s["q_s"].at[n], s["dout_s"].at[n]
      lse, delta = weights(own, ROW)

      def step(t, dq, masked):
        k_tile, v_tile = (s[name].at[k_slot(t)] for name in ("k_s", "v_s"))
        x, dp = gpu.matmul((q_own, k_tile.transpose((1, 0))), (dout_own, v_tile.transpose((1, 0))))
        p = jnp.exp2(x * c - gpu.over_columns(lse, TILE))
        mask = mask_of(own, t, masked, query_axis=0)
        p = p if mask is None else jnp.where(mask, p, 0.0)
        ds = p * (dp - gpu.over_columns(delta, TILE))
        return gpu.add_matmul(dq, (ds.astype(q.dtype), k_tile), scratch=p_s)

      return _sweep(own, -1, band, nt, step, gpu.zeros((TILE, Dk)))

    def store(value, stage, result, t):
      if prev is not None:
        value = value + _load(stage)
      stage[...] = value.astype(q.dtype)
      gpu.commit_smem()
      gpu.to_gmem(stage, view.box(result, b, r, h, t * TILE))

    @gpu.loop(0, -(-own_tiles // W))
    def _(n):
      own = begin + n * W + wg
      stage_k, stage_v = s["stage_s"].at[wg], s["out_s"].at[wg]

      @gpu.when(own < end)
      def _():
        gpu.wait_to_gmem(0, wait_read_only=True)  # of the tile before
        if prev is not None:
          gpu.to_smem(box("dk", h, own), stage_k, s["prev_full"].at[wg])
          gpu.to_smem(box("dv", h, own), stage_v, s["prev_full"].at[wg])
        dk, dv = key_gradients(own)
        if prev is not None:
          gpu.barrier_wait(s["prev_full"].at[wg])
        store(dv, stage_v, dv_ref, own)
        store(dk * scale, stage_k, dk_ref, own)
        if out is not None:
          gpu.to_gmem(s["delta_s"].at[q_slot(own)], rows(delta_ref, own))
        gpu.wait_to_gmem(0, wait_read_only=True)
        if prev is not None:
          gpu.to_smem(box("dq", h, own), stage_k, s["prev_dq_full"].at[wg])
        dq = query_gradients(own)
        if prev is not None:
          gpu.barrier_wait(s["prev_dq_full"].at[wg])
        store(dq * scale, stage_k, dq_ref, own)

    gpu.wait_to_gmem(0)

  like = lambda D: jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], Hg, D), q.dtype)
  row_type = jax.ShapeDtypeStruct((B, Hg, view.R, nt * TILE), jnp.float32)
  dq, dk, dv, new_delta = gpu.kernel(
    body,
    out_type=(like(Dk), like(Dk), like(Dv), row_type),
    scratch_types=scratch,
    grid=(B, num_groups, view.R, Hg),
    grid_names=("b", "g", "r", "h"),
    num_threads=W,
    thread_name="wg",
  )(*inputs.values())
  dq, dk, dv = (x.reshape(B, T, Hg, -1) for x in (dq, dk, dv))
  return dq, dk, dv, new_delta if delta is None else delta


def _sweep(own, direction: int, band: Band, num_tiles: int, step, state):
  """Steps over the tiles that share pairs with `own`: later ones (1) or earlier ones (-1).

  Tiles at one distance are masked together: those at the edges of the band, the own one first.
  """
  reach = band.last(num_tiles)
  inner = next((n for n in range(reach + 1) if band.covers(n)), reach + 1)
  outer = next((n for n in range(inner, reach + 1) if not band.covers(n)), reach + 1)
  # Tiles on this side of own; distances beyond them hold nothing.
  room = (num_tiles - own) if direction == 1 else own + 1

  def run(low, high, masked, state):
    if low >= high:
      return state
    body = lambda n, state: step(own + direction * n, state, masked)
    return lax.fori_loop(low, jnp.minimum(high, room), body, state)

  state = run(band.first(), inner, True, state)
  state = run(inner, outer, False, state)
  return run(outer, reach + 1, True, state)


def _load(tile):
  return gpu.load(tile, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
