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
  reach = band.last(nt)
  num_groups = -(-nt // own_tiles)
  # Tiles of queries from the own ones on, of keys up to them: the two share one pool of memory. In
  # a window tiles beyond the ends of the sequence are loaded too, so that its code is branchless.
  whole = band.far is None
  q_tiles = lambda begin: nt - begin if whole else own_tiles + reach
  k_tiles = lambda begin: begin + own_tiles if whole else own_tiles + reach
  num_slots = max(q_tiles(g * own_tiles) + k_tiles(g * own_tiles) for g in range(num_groups))
  nq = q_tiles(0)
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse)
  optional = dict(ids=ids, dlse=dlse, delta=delta, out=None if out is None else view(out))
  inputs |= {name: x for name, x in optional.items() if x is not None}
  if prev is not None:
    inputs |= {name: view(x) for name, x in zip(("dq", "dk", "dv"), prev, strict=True)}
  scratch = dict(
    qk_s=gpu.smem(num_slots, TILE, Dk, dtype=q.dtype),
    dout_v_s=gpu.smem(num_slots, TILE, Dv, dtype=q.dtype),
    out_s=gpu.smem(W, TILE, Dv, dtype=q.dtype),  # then dv
    lse_s=gpu.vector(nq, TILE),
    delta_s=gpu.vector(nq, TILE),
    q_full=gpu.Barrier(num_barriers=nq, num_arrivals=3),
    k_full=gpu.Barrier(num_barriers=num_slots, num_arrivals=2),
    out_full=gpu.Barrier(num_barriers=nq),
    delta_full=gpu.Barrier(num_arrivals=W),
  )
  if Dk != Dv:
    scratch |= dict(stage_s=gpu.smem(W, TILE, Dk, dtype=q.dtype))
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=3 * W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def body(*refs, **s):
    ref = dict(zip(inputs, refs, strict=False))
    dq_ref, dk_ref, dv_ref, delta_ref = refs[len(inputs) :]
    b, g, r, h, wg = (lax.axis_index(name) for name in ("b", "g", "r", "h", "wg"))
    head = head_of(heads, h)
    kv_head = head // group
    begin = g * own_tiles
    end = begin + own_tiles
    num_q = q_tiles(begin)
    k_begin = 0 if whole else begin - reach
    q_slot, k_slot = lambda t: t - begin, lambda t: t - k_begin + num_q
    box = lambda name, head, t: view.box(ref[name], b, r, head, t * TILE)
    rows = lambda x, t: x.at[b, h, r, gpu.ds(t * TILE, TILE)]
    p_s = s["p_s"].at[wg] if gpu.simulated() else None
    c = scale * gpu.LOG2E

    def load_out(t):
      n = q_slot(t)
      gpu.to_smem(box("out", h, t), s["out_s"].at[lax.rem(n, jnp.int32(W))], s["out_full"].at[n])

    @gpu.when(wg == 0)
    def _():
      @gpu.loop(begin, begin + num_q)
      def _(t):
        n = q_slot(t)
        full = s["q_full"].at[n]
        gpu.to_smem(box("dout", h, t), s["dout_v_s"].at[n], full)
        gpu.to_smem(box("q", head, t), s["qk_s"].at[n], full)
        gpu.to_smem(rows(ref["lse"], t), s["lse_s"].at[n], full)
        if out is None:
          gpu.to_smem(rows(ref["delta"], t), s["delta_s"].at[n], s["out_full"].at[n])
        else:
          gpu.when(n < W)(lambda: load_out(t))

      @gpu.loop(k_begin, end)
      def _(t):
        n, full = k_slot(t), s["k_full"].at[k_slot(t)]
        # Keys before the sequence weigh nothing, but must be numbers: tile 0 will do.
        inside = jnp.maximum(t, 0)
        gpu.to_smem(box("k", kv_head, inside), s["qk_s"].at[n], full)
        gpu.to_smem(box("v", kv_head, inside), s["dout_v_s"].at[n], full)

    @gpu.loop(begin, begin + num_q)
    def _(t):
      gpu.barrier_wait(s["q_full"].at[q_slot(t)])

    if out is None:

      @gpu.loop(0, num_q)
      def _(n):
        gpu.barrier_wait(s["out_full"].at[n])

    else:

      @gpu.loop(begin + wg, begin + num_q, step=W)
      def _(t):
        n = q_slot(t)
        gpu.barrier_wait(s["out_full"].at[n])
        row = (_load(s["dout_v_s"].at[n]) * _load(s["out_s"].at[wg])).sum(axis=1)
        gpu.commit_smem()  # what was read here may be overwritten
        gpu.when(n + W < num_q)(lambda: load_out(t + W))
        if dlse is not None:
          inside = jnp.minimum(t, nt - 1)
          row = row - gpu.load(rows(ref["dlse"], inside), layout=ROW, optimized=False)
        has_keys = gpu.load(s["lse_s"].at[n], layout=ROW, optimized=False) > NO_MAXIMUM
        s["delta_s"].at[n][...] = jnp.where(has_keys, row, 0.0)

      gpu.barrier_arrive(s["delta_full"])
      gpu.barrier_wait(s["delta_full"])

    @gpu.loop(k_begin, end)
    def _(t):
      gpu.barrier_wait(s["k_full"].at[k_slot(t)])

    def weights(t, layout):
      """lse, as +inf where a row has no keys and must weigh nothing, and delta of a query tile."""
      lse = gpu.load(s["lse_s"].at[q_slot(t)], layout=layout, optimized=False)
      delta = gpu.load(s["delta_s"].at[q_slot(t)], layout=layout, optimized=False)
      return jnp.where(lse > NO_MAXIMUM, lse, jnp.inf), delta

    def mask_of(q_tile, k_tile, query_axis, inside):
      """Which pairs of two tiles attend, or None for all; the queries along an axis."""
      mask = None
      if not inside:
        mask = band.mask(_difference(query_axis) + (q_tile - k_tile) * TILE)
      if ids is not None:
        of_rows, of_columns = (q_tile, k_tile) if query_axis == 0 else (k_tile, q_tile)
        ids_rows, ids_columns = (
          gpu.load(rows_of_ids(t), layout=layout, optimized=False)
          for t, layout in ((of_rows, ROW), (of_columns, COLUMN))
        )
        same = gpu.over_columns(ids_rows, TILE) == gpu.over_rows(ids_columns, TILE)
        mask = same if mask is None else mask & same
      return mask

    def rows_of_ids(t):
      return ref["ids"].at[b, r, gpu.ds(jnp.clip(t, 0, nt - 1) * TILE, TILE)]

    tile = lambda n: (s["qk_s"].at[n], s["dout_v_s"].at[n])
    turned = lambda x: x.transpose((1, 0))
    half = lambda x: x.astype(q.dtype)

    def key_gradients(own):
      """dk / scale and dv of a tile: S^T has keys as rows, and so P^T and dS^T are operands."""
      k_own, v_own = tile(k_slot(own))

      def step(t, state, inside):
        dk, dv = state
        q_tile, dout_tile = tile(q_slot(t))
        x, dp = gpu.matmul((k_own, turned(q_tile)), (v_own, turned(dout_tile)))
        lse, delta = weights(t, COLUMN)
        p = jnp.exp2(x * c - gpu.over_rows(lse, TILE))
        mask = mask_of(t, own, 1, inside)
        p = p if mask is None else jnp.where(mask, p, 0.0)
        ds = p * (dp - gpu.over_rows(delta, TILE))
        terms = (dk, (half(ds), q_tile)), (dv, (half(p), dout_tile))
        return gpu.add_matmul(*terms, scratch=p_s)

      def edges(near, far, state):
        dk, dv = state
        (q_0, dout_0), (q_1, dout_1) = (tile(q_slot(t)) for t in (near, far))
        (lse_0, delta_0), (lse_1, delta_1) = (weights(t, COLUMN) for t in (near, far))
        lower = _difference(1) >= 0
        either = lambda a, b: jnp.where(lower, a, b)
        across = lambda a, b: either(gpu.over_rows(a, TILE), gpu.over_rows(b, TILE))
        p = either(*gpu.matmul((k_own, turned(q_0)), (k_own, turned(q_1))))
        p = jnp.exp2(p * c - across(lse_0, lse_1))
        dp = either(*gpu.matmul((v_own, turned(dout_0)), (v_own, turned(dout_1))))
        ds = p * (dp - across(delta_0, delta_1))
        (ds_0, ds_1), (p_0, p_1) = (
          (half(jnp.where(lower, x, 0.0)), half(jnp.where(lower, 0.0, x))) for x in (ds, p)
        )
        terms = (dk, (ds_0, q_0), (ds_1, q_1)), (dv, (p_0, dout_0), (p_1, dout_1))
        return gpu.add_matmul(*terms, scratch=p_s)

      state = gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv))
      return _sweep(own, 1, band, nt, step, edges if ids is None else None, state)

    def query_gradients(own):
      """dq / scale of a tile."""
      q_own, dout_own = tile(q_slot(own))
      lse, delta = weights(own, ROW)
      delta = gpu.over_columns(delta, TILE)
      # Keys of tiles before the sequence weigh nothing: their lse is infinite.
      lse_for = lambda t: lse if whole else lse + jnp.where(t >= 0, jnp.float32(0), jnp.inf)

      def step(t, state, inside):
        k_tile, v_tile = tile(k_slot(t))
        x, dp = gpu.matmul((q_own, turned(k_tile)), (dout_own, turned(v_tile)))
        p = jnp.exp2(x * c - gpu.over_columns(lse_for(t), TILE))
        mask = mask_of(own, t, 0, inside)
        p = p if mask is None else jnp.where(mask, p, 0.0)
        ds = p * (dp - delta)
        return gpu.add_matmul((*state, (half(ds), k_tile)), scratch=p_s)

      def edges(near, far, state):
        (k_0, v_0), (k_1, v_1) = (tile(k_slot(t)) for t in (near, far))
        lower = _difference(0) >= 0
        either = lambda a, b: jnp.where(lower, a, b)
        lse = either(*(gpu.over_columns(lse_for(t), TILE) for t in (near, far)))
        p = either(*gpu.matmul((q_own, turned(k_0)), (q_own, turned(k_1))))
        p = jnp.exp2(p * c - lse)
        dp = either(*gpu.matmul((dout_own, turned(v_0)), (dout_own, turned(v_1))))
        ds = p * (dp - delta)
        ds_0, ds_1 = half(jnp.where(lower, ds, 0.0)), half(jnp.where(lower, 0.0, ds))
        return gpu.add_matmul((*state, (ds_0, k_0), (ds_1, k_1)), scratch=p_s)

      state = (gpu.zeros((TILE, Dk)),)
      return _sweep(own, -1, band, nt, step, edges if ids is None else None, state)[0]

    def store(value, stage, name, result, t):
      """Stores a tile of a gradient, with what `prev` has of it added."""
      gpu.wait_to_gmem(0, wait_read_only=True)  # of what was staged here before
      if prev is not None:
        full = s["prev_full"].at[wg * 3 + ("dq", "dk", "dv").index(name)]
        gpu.to_smem(box(name, h, t), stage, full)
        gpu.barrier_wait(full)
        value = value + _load(stage)
      stage[...] = value.astype(q.dtype)
      gpu.commit_smem()
      gpu.to_gmem(stage, view.box(result, b, r, h, t * TILE))

    @gpu.loop(begin + wg, jnp.minimum(end, nt), step=W)
    def _(own):
      stage_v = s["out_s"].at[wg]
      stage_k = stage_v if Dk == Dv else s["stage_s"].at[wg]
      dk, dv = key_gradients(own)
      store(dv, stage_v, "dv", dv_ref, own)
      store(dk * scale, stage_k, "dk", dk_ref, own)
      if out is not None:
        gpu.to_gmem(s["delta_s"].at[q_slot(own)], rows(delta_ref, own))
      dq = query_gradients(own)
      store(dq * scale, stage_k, "dq", dq_ref, own)

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


def _sweep(own, direction: int, band: Band, num_tiles: int, step, edges, state):
  """Steps over the tiles that share pairs with `own`: later ones (1) or earlier ones (-1).

  Args:
    step: (tile, state, whether all its pairs are inside the band) -> state.
    edges: (nearest tile, farthest tile, state) -> state for a window whose two edges complement
      each other to one full tile; or None.
  """
  at = lambda distance: own + direction * distance
  reach = band.last(num_tiles)
  if band.far is not None:  # a window: no loop, no condition
    distances = range(band.first(), reach + 1)
    if edges is not None and band.folds(num_tiles):
      state = edges(at(0), at(reach), state)
      distances = range(1, reach)
    for distance in distances:
      state = step(at(distance), state, band.covers(distance))
    return state
  # The tiles without a mask first. What is masked is one tile without a loop where possible:
  # after a second loop ptxas would wait for each matrix instruction by itself.
  room = (num_tiles - own) if direction == 1 else own + 1
  first, first_full = band.first(), band.first_full()
  state = lax.fori_loop(first_full, room, lambda n, state: step(at(n), state, True), state)
  if (first, first_full) == (0, 1):
    return step(at(0), state, False)
  upper = jnp.minimum(first_full, room)
  return lax.fori_loop(first, upper, lambda n, state: step(at(n), state, False), state)


def _difference(query_axis: int):
  """Query minus key, in a tile whose queries lie along an axis."""
  return gpu.iota((TILE, TILE), query_axis) - gpu.iota((TILE, TILE), 1 - query_axis)


def _load(tile):
  return gpu.load(tile, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
