"""Backward kernels of the heads that the memory system bounds: each tensor is read once.

`resident`: a block of threads owns tiles of a short sequence (a column, a block) and holds what
their gradients need: q and dout of these and later tiles, k and v of these and earlier ones.
`window`: every multiprocessor walks along the sequences behind rings of tiles.

Both compute dq of a query tile and dk, dv of a key tile as sums of their own: 7 matrix products
instead of 5, but no atomics, no sums in another order, and the memory system remains the limit.

With P = exp2(S - lse), dS = P (dP - delta), delta = rowsum(dout out) - dlse. The passes of a union
share lse and delta.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.forward import CONSUMER_REGISTERS
from pallas_kernels.mosaic_gpu.forward import PRODUCER_REGISTERS
from pallas_kernels.mosaic_gpu.forward import share_of
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View

KEPT_TILES = 2
NARROW = 64  # head size up to which dk and dv of a window leave from memory of their own


def resident(
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
  """Gradients of attention to a causal band of keys inside each sequence of a view.

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
  nt = view.num_tiles
  # Equal parts for each: bounds that ptxas knows save registers.
  own_tiles = next(n for n in range(min(own_tiles, nt), 0, -1) if nt % n == 0)
  W = next(n for n in range(warpgroups, 0, -1) if own_tiles % n == 0)
  num_groups = -(-nt // own_tiles)
  # Tiles of queries from the own ones on, of keys up to them: the two share one pool of memory.
  num_slots = nt + own_tiles
  # One block of threads for a whole short sequence keeps dS^T: dq then needs no weights of its own.
  keeps = num_groups == 1 and nt <= KEPT_TILES
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse)
  # Twice: one load of a tile would have to serve rows and columns, in layouts that differ.
  optional = dict(row_ids=ids, column_ids=ids, dlse=dlse, delta=delta)
  optional |= dict(out=None if out is None else view(out))
  inputs |= {name: x for name, x in optional.items() if x is not None}
  if prev is not None:
    inputs |= {name: view(x) for name, x in zip(("dq", "dk", "dv"), prev, strict=True)}
  scratch = dict(
    qk_s=gpu.smem(num_slots, TILE, Dk, dtype=q.dtype),
    dout_v_s=gpu.smem(num_slots, TILE, Dv, dtype=q.dtype),
    out_s=gpu.smem(W, TILE, Dv, dtype=q.dtype),  # then dv
    lse_s=gpu.vector(nt, TILE),
    delta_s=gpu.vector(nt, TILE),
    q_full=gpu.Barrier(num_barriers=nt, num_arrivals=3),
    k_full=gpu.Barrier(num_barriers=num_slots, num_arrivals=2),
    out_full=gpu.Barrier(num_barriers=nt),
    delta_full=gpu.Barrier(num_arrivals=W),
  )
  if Dk != Dv:
    scratch |= dict(stage_s=gpu.smem(W, TILE, Dk, dtype=q.dtype))
  if keeps:
    num_pairs = nt * (nt + 1) // 2
    scratch |= dict(ds_s=gpu.smem(num_pairs, TILE, TILE, dtype=q.dtype, beside=Dk))
    scratch |= dict(ds_full=gpu.Barrier(num_arrivals=W))
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=3 * W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def resident_backward(*refs, **s):
    ref = dict(zip(inputs, refs, strict=False))
    dq_ref, dk_ref, dv_ref, delta_ref = refs[len(inputs) :]
    b, g, r, h, wg = (lax.axis_index(name) for name in ("b", "g", "r", "h", "wg"))
    head = head_of(heads, h)
    kv_head = head // group
    begin = g * own_tiles
    end = begin + own_tiles
    num_q = nt - begin
    q_slot, k_slot = lambda t: t - begin, lambda t: t + num_q
    box = lambda name, head, t: view.box(ref[name], b, r, head, t * TILE)
    rows = lambda x, t: x.at[b, h, r, gpu.ds(t * TILE, TILE)]
    p_s = s["p_s"].at[wg] if gpu.simulated() else None
    c = scale * gpu.LOG2E

    def load_out(t):
      n = q_slot(t)
      gpu.to_smem(box("out", h, t), s["out_s"].at[lax.rem(n, jnp.int32(W))], s["out_full"].at[n])

    @gpu.when(wg == 0)
    def _():
      @gpu.loop(begin, nt)
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

      @gpu.loop(0, end)
      def _(t):
        n, full = k_slot(t), s["k_full"].at[k_slot(t)]
        gpu.to_smem(box("k", kv_head, t), s["qk_s"].at[n], full)
        gpu.to_smem(box("v", kv_head, t), s["dout_v_s"].at[n], full)

    @gpu.loop(begin, nt)
    def _(t):
      gpu.barrier_wait(s["q_full"].at[q_slot(t)])

    if out is None:

      @gpu.loop(0, num_q)
      def _(n):
        gpu.barrier_wait(s["out_full"].at[n])

    else:

      @gpu.loop(begin + wg, nt, step=W)
      def _(t):
        n = q_slot(t)
        gpu.barrier_wait(s["out_full"].at[n])
        row = (_load(s["dout_v_s"].at[n]) * _load(s["out_s"].at[wg])).sum(axis=1)
        gpu.commit_reads()
        gpu.when(n + W < num_q)(lambda: load_out(t + W))
        if dlse is not None:
          row = row - gpu.load(rows(ref["dlse"], t), layout=ROW, optimized=False)
        lse = gpu.load(s["lse_s"].at[n], layout=ROW, optimized=False)
        s["delta_s"].at[n][...] = jnp.where(lse > -jnp.inf, row, 0.0)
        s["lse_s"].at[n][...] = safe_lse(lse)

      gpu.barrier_arrive(s["delta_full"])
      gpu.barrier_wait(s["delta_full"])

    @gpu.loop(0, end)
    def _(t):
      gpu.barrier_wait(s["k_full"].at[k_slot(t)])

    def rows_of(t, layout):
      lse, delta = (
        gpu.load(s[name].at[q_slot(t)], layout=layout, optimized=False)
        for name in ("lse_s", "delta_s")
      )
      return lse if out is not None else safe_lse(lse), delta

    def mask_of(q_tile, k_tile, query_axis, inside):
      """Which pairs of two tiles attend, or None for all; the queries along an axis."""
      mask = None
      if not inside:
        mask = band.mask(_difference(query_axis) + (q_tile - k_tile) * TILE)
      if ids is not None:
        same = _same_segment(ref, b, r, q_tile, k_tile, query_axis)
        mask = same if mask is None else mask & same
      return mask

    tile = lambda n: (s["qk_s"].at[n], s["dout_v_s"].at[n])

    def key_gradients(own):
      k_own = tile(k_slot(own))

      def step(t, state, inside):
        query = (*tile(q_slot(t)), lambda: rows_of(t, COLUMN))
        kept = s["ds_s"].at[pair(t, own)] if keeps else None
        return add_key_gradients(state, k_own, [query], c, mask_of(t, own, 1, inside), p_s, kept)

      return _sweep(
        own, nt - own, 1, nt, band, step, (gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv)))
      )

    pair = lambda q_tile, k_tile: lax.div(q_tile * (q_tile + 1), jnp.int32(2)) + k_tile

    def query_gradient(own):
      if keeps:

        def from_kept(t, dq):
          return dq + gpu.matmul((_turned(s["ds_s"].at[pair(own, t)]), tile(k_slot(t))[0]))[0]

        return lax.fori_loop(0, own + 1 - band.first(), from_kept, gpu.zeros((TILE, Dk)))
      query = (*tile(q_slot(own)), rows_of(own, ROW)[1])
      lse = rows_of(own, ROW)[0]

      def step(t, dq, inside):
        key = (*tile(k_slot(t)), lse)
        return add_query_gradient(dq, query, [key], c, mask_of(own, t, 0, inside), p_s)

      return _sweep(own, own + 1, -1, nt, band, step, gpu.zeros((TILE, Dk)))

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

    stage_v = s["out_s"].at[wg]
    stage_k = stage_v if Dk == Dv else s["stage_s"].at[wg]

    def store_key_gradients(own):
      dk, dv = key_gradients(own)
      store(dv, stage_v, "dv", dv_ref, own)
      store(dk * scale, stage_k, "dk", dk_ref, own)
      if out is not None:
        gpu.to_gmem(s["delta_s"].at[q_slot(own)], rows(delta_ref, own))

    def store_query_gradient(own):
      store(query_gradient(own) * scale, stage_k, "dq", dq_ref, own)

    def own_ones(body):
      if keeps:  # a bound that ptxas knows
        gpu.loop(0, own_tiles // W)(lambda turn: body(begin + turn * W + wg))
      else:
        gpu.loop(begin + wg, end, step=W)(body)

    if keeps:
      own_ones(store_key_gradients)
      gpu.commit_smem()
      gpu.barrier_arrive(s["ds_full"])
      gpu.barrier_wait(s["ds_full"])
      own_ones(store_query_gradient)
    else:

      @own_ones
      def _(own):
        store_key_gradients(own)
        store_query_gradient(own)

    gpu.wait_to_gmem(0)

  like = lambda D: jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], Hg, D), q.dtype)
  row_type = jax.ShapeDtypeStruct((B, Hg, view.R, nt * TILE), jnp.float32)
  dq, dk, dv, new_delta = gpu.kernel(
    resident_backward,
    out_type=(like(Dk), like(Dk), like(Dv), row_type),
    scratch_types=scratch,
    grid=(B, num_groups, view.R, Hg),
    grid_names=("b", "g", "r", "h"),
    num_threads=W,
    thread_name="wg",
  )(*inputs.values())
  dq, dk, dv = (x.reshape(B, T, Hg, -1) for x in (dq, dk, dv))
  return dq, dk, dv, new_delta if delta is None else delta


def window(
  view: View, band: Band, q, k, v, ids, out, lse, dout, dlse, *, scale, heads, stages: int
):
  """Gradients of attention to a window of the keys before each query; arguments as in `resident`.

  Every multiprocessor walks along its share of a sequence for one head, as in the forward kernel.
  A producer fills a ring of `stages` query tiles ahead of the walk and one of key tiles; one
  warpgroup sums dq of a tile, with the keys before it, another dk and dv, with the queries after
  it. The first also turns out into delta, and lse of rows that weigh nothing into infinity: rows
  without keys, tiles past the end. Tiles before the sequence weigh nothing either.

  Returns:
    dq, dk, dv [B, T, Hg, D], k's and v's for each query head; and delta.
  """
  B, _, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt = view.num_tiles
  reach = band.last(nt)
  S = max(stages, reach + 1)
  share = share_of(nt, B * Hg)
  inputs = dict(q=q, k=k, v=v, dout=dout, out=out, lse=lse)
  optional = dict(row_ids=ids, column_ids=ids, dlse=dlse)  # as in `resident`
  inputs |= {name: x for name, x in optional.items() if x is not None}
  scratch = dict(
    q_s=gpu.smem(S, TILE, Dk, dtype=q.dtype),
    dout_s=gpu.smem(S, TILE, Dv, dtype=q.dtype),
    k_s=gpu.smem(S, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(S, TILE, Dv, dtype=q.dtype),
    out_s=gpu.smem(1, TILE, Dv, dtype=q.dtype),
    stage_s=gpu.smem(window_stages(reach, Dk), TILE, Dk, dtype=q.dtype),  # dv, dk; dq if no reach
    lse_s=gpu.vector(S, TILE),
    delta_s=gpu.vector(S, TILE),
    q_full=gpu.Barrier(num_barriers=S, num_arrivals=3),
    q_free=gpu.Barrier(num_barriers=S, num_arrivals=2),
    k_full=gpu.Barrier(num_barriers=S, num_arrivals=2),
    k_done=gpu.Barrier(num_barriers=S),  # by dk and dv
    k_free=gpu.Barrier(num_barriers=S),
    out_full=gpu.Barrier(),
    out_free=gpu.Barrier(),
    delta_full=gpu.Barrier(num_barriers=S),
  )
  if Dk != Dv:
    scratch |= dict(stage_dv_s=gpu.smem(1, TILE, Dv, dtype=q.dtype))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(2, TILE, TILE, dtype=q.dtype))
  folds = band.folds(nt) and ids is None
  middle = range(1, reach) if folds else range(band.first(), reach + 1)

  def window_backward(*refs, **s):
    ref = dict(zip(inputs, refs, strict=False))
    dq_ref, dk_ref, dv_ref, delta_ref = refs[len(inputs) :]
    wg = lax.axis_index("wg")
    first = lax.axis_index("share") * share
    count = jnp.minimum(nt - first, share)
    total = count + reach  # tiles of queries from `first` on, of keys from `first - reach` on
    slot = lambda n: lax.rem(n, jnp.int32(S))
    b, h = lax.axis_index("b"), lax.axis_index("h")
    head = head_of(heads, h)
    box = lambda name, h, t: view.box(ref[name], b, 0, h, t * TILE)
    rows = lambda x, t: x.at[b, h, 0, gpu.ds(t * TILE, TILE)]
    inside = lambda t: jnp.clip(t, 0, nt - 1)  # what is not must hold numbers all the same
    c = scale * gpu.LOG2E

    def load_queries(n):
      t = inside(first + n)
      full = s["q_full"].at[slot(n)]
      gpu.to_smem(box("dout", h, t), s["dout_s"].at[slot(n)], full)
      gpu.to_smem(box("q", head, t), s["q_s"].at[slot(n)], full)
      gpu.to_smem(rows(ref["lse"], t), s["lse_s"].at[slot(n)], full)
      gpu.when(n >= 1)(lambda: gpu.barrier_wait(s["out_free"]))
      gpu.to_smem(box("out", h, t), s["out_s"].at[0], s["out_full"])

    def load_keys(n):
      t = inside(first - reach + n)
      full = s["k_full"].at[slot(n)]
      gpu.to_smem(box("k", head // group, t), s["k_s"].at[slot(n)], full)
      gpu.to_smem(box("v", head // group, t), s["v_s"].at[slot(n)], full)

    @gpu.when(wg == 2)
    def _():
      gpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

      @gpu.loop(0, total)
      def _(n):
        gpu.when(n >= S)(lambda: gpu.barrier_wait(s["k_free"].at[slot(n)]))
        load_keys(n)
        gpu.when(n >= S)(lambda: gpu.barrier_wait(s["q_free"].at[slot(n)]))
        load_queries(n)

      # Every completion of a barrier has to be seen by those who wait for it.
      @gpu.loop(jnp.maximum(total - S, 0), count)
      def _(n):
        gpu.barrier_wait(s["k_free"].at[slot(n)])
        gpu.barrier_wait(s["q_free"].at[slot(n)])

      gpu.when(count > 0)(lambda: gpu.barrier_wait(s["out_free"]))

    def mask_of(q_tile, k_tile, distance, query_axis):
      mask = None
      if not band.covers(distance):
        mask = band.mask(_difference(query_axis) + distance * TILE)
      if ids is not None:
        same = _same_segment(ref, b, 0, inside(q_tile), inside(k_tile), query_axis)
        mask = same if mask is None else mask & same
      return mask

    @gpu.when(wg == 0)  # dq
    def _():
      gpu.set_max_registers(CONSUMER_REGISTERS[2], action="increase")
      p_s = s["p_s"].at[0] if gpu.simulated() else None

      def make_delta(n):
        t = inside(first + n)
        gpu.barrier_wait(s["q_full"].at[slot(n)])
        gpu.barrier_wait(s["out_full"])
        row = (_load(s["dout_s"].at[slot(n)]) * _load(s["out_s"].at[0])).sum(axis=1)
        gpu.commit_reads()
        gpu.barrier_arrive(s["out_free"])
        if dlse is not None:
          row = row - gpu.load(rows(ref["dlse"], t), layout=ROW, optimized=False)
        lse = gpu.load(s["lse_s"].at[slot(n)], layout=ROW, optimized=False)
        row = jnp.where(lse > -jnp.inf, row, 0.0)
        s["delta_s"].at[slot(n)][...] = row
        exists = jnp.where(first + n < nt, jnp.float32(0), jnp.inf)
        s["lse_s"].at[slot(n)][...] = safe_lse(lse) + exists
        gpu.barrier_arrive(s["delta_full"].at[slot(n)])

        @gpu.when(n < count)
        def _():
          rows(delta_ref, t)[...] = row

      @gpu.loop(0, jnp.where(count > 0, reach, 0))
      def _(n):
        make_delta(n)
        gpu.barrier_wait(s["k_full"].at[slot(n)])

      # Before the copy engine may write again where lse was changed; later, storing dq does it.
      gpu.commit_smem()

      def release_keys(n):
        """Gives the memory that dq of tile n leaves from back."""
        gpu.wait_to_gmem(0, wait_read_only=True)
        gpu.barrier_arrive(s["k_free"].at[slot(n)])

      # With room in the ring not before the next tile: by then dq has left.
      late = reach + 1 < S

      @gpu.loop(0, count)
      def _(n):
        make_delta(n + reach)
        if not reach:
          gpu.commit_smem()
        if late:
          gpu.when(n > 0)(lambda: release_keys(n - 1))
        gpu.barrier_wait(s["k_full"].at[slot(n + reach)])
        t = first + n
        lse, delta = (
          gpu.load(s[name].at[slot(n)], layout=ROW, optimized=False)
          for name in ("lse_s", "delta_s")
        )
        query = (s["q_s"].at[slot(n)], s["dout_s"].at[slot(n)], delta)

        def key(distance):
          m = slot(n + reach - distance)
          exists = jnp.where(t >= distance, jnp.float32(0), jnp.inf)
          return s["k_s"].at[m], s["v_s"].at[m], lse + exists

        dq = gpu.zeros((TILE, Dk))
        if folds:
          dq = add_query_gradient(dq, query, [key(0), key(reach)], c, None, p_s)
        for distance in middle:
          mask = mask_of(t, t - distance, distance, 0)
          dq = add_query_gradient(dq, query, [key(distance)], c, mask, p_s)
        gpu.barrier_arrive(s["q_free"].at[slot(n)])
        # The farthest keys are read by no one after this: dq leaves from their memory.
        gpu.barrier_wait(s["k_done"].at[slot(n)])
        stage = s["k_s"].at[slot(n)] if reach else s["stage_s"].at[window_stages(reach, Dk) - 1]
        stage[...] = (dq * scale).astype(q.dtype)
        gpu.commit_smem()
        gpu.to_gmem(stage, view.box(dq_ref, b, 0, h, t * TILE))
        if not late:
          release_keys(n)

      if late:
        release_keys(count - 1)
      gpu.wait_to_gmem(0)

    @gpu.when(wg == 1)  # dk, dv
    def _():
      gpu.set_max_registers(CONSUMER_REGISTERS[2], action="increase")
      p_s = s["p_s"].at[1] if gpu.simulated() else None

      def wait_for_queries(n):
        gpu.barrier_wait(s["q_full"].at[slot(n)])
        gpu.barrier_wait(s["delta_full"].at[slot(n)])

      @gpu.loop(0, jnp.where(count > 0, reach, 0))
      def _(n):
        wait_for_queries(n)
        gpu.barrier_wait(s["k_full"].at[slot(n)])
        # Keys before the first tile are the other warpgroup's.
        gpu.when(n < count)(lambda: gpu.barrier_arrive(s["k_done"].at[slot(n)]))

      @gpu.loop(0, count)
      def _(n):
        wait_for_queries(n + reach)
        own = slot(n + reach)
        gpu.barrier_wait(s["k_full"].at[own])
        t = first + n
        key = s["k_s"].at[own], s["v_s"].at[own]

        def query(distance):
          m = slot(n + distance)
          rows = lambda: tuple(
            gpu.load(s[name].at[m], layout=COLUMN, optimized=False) for name in ("lse_s", "delta_s")
          )
          return s["q_s"].at[m], s["dout_s"].at[m], rows

        state = gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv))
        if folds:
          state = add_key_gradients(state, key, [query(0), query(reach)], c, None, p_s)
        for distance in middle:
          mask = mask_of(t + distance, t, distance, 1)
          state = add_key_gradients(state, key, [query(distance)], c, mask, p_s)
        dk, dv = state
        gpu.barrier_arrive(s["q_free"].at[slot(n)])
        gpu.when(n + reach < count)(lambda: gpu.barrier_arrive(s["k_done"].at[own]))
        gpu.wait_to_gmem(0, wait_read_only=True)  # of the tile before
        stage_k = s["stage_s"].at[1 if Dk <= NARROW else 0]
        stage_v = s["stage_s"].at[0] if Dk == Dv else s["stage_dv_s"].at[0]
        for value, to, at in ((dv, dv_ref, stage_v), (dk * scale, dk_ref, stage_k)):
          if to is dk_ref and Dk == Dv > NARROW:  # both from one place
            gpu.wait_to_gmem(0, wait_read_only=True)
          at[...] = value.astype(q.dtype)
          gpu.commit_smem()
          gpu.to_gmem(at, view.box(to, b, 0, h, t * TILE))

      gpu.wait_to_gmem(0)

  like = lambda x, D: jax.ShapeDtypeStruct((*x.shape[:2], Hg, D), q.dtype)
  return gpu.kernel(
    window_backward,
    out_type=(
      like(q, Dk),
      like(k, Dk),
      like(v, Dv),
      jax.ShapeDtypeStruct((B, Hg, 1, nt * TILE), jnp.float32),
    ),
    scratch_types=scratch,
    grid=(B, -(-nt // share), Hg),
    grid_names=("b", "share", "h"),
    num_threads=3,
    thread_name="wg",
  )(*inputs.values())


def window_stages(reach: int, Dk: int) -> int:
  """Tiles of Dk columns that the results of `window` leave from."""
  return (2 if Dk <= NARROW else 1) + (0 if reach else 1)


# ---------------------------------------------------------------------------- pairs of tiles


def add_key_gradients(state, own, queries, c, mask, scratch, kept=None):
  """(dk / scale, dv) of a key tile, with what a query tile adds: S^T has keys as rows.

  Args:
    own: k and v.
    queries: (q, dout, function that loads lse and delta by column); or two of them, the nearest
      tile and the farthest of a window whose edges complement each other: one full tile.
    c: of the logits, base 2.
    mask: which pairs attend, or None.
    kept: where to keep dS^T, or None.
  """
  dk, dv = state
  lower = _difference(1) >= 0
  either = lambda xs: xs[0] if len(xs) == 1 else jnp.where(lower, *xs)
  to_x, to_dp = ([(own[n], _turned(query[n])) for query in queries] for n in (0, 1))
  x, dp = _products(to_x, to_dp, either)
  # Only now, for 32 registers that the products can use.
  lse, delta = zip(*(query[2]() for query in queries), strict=True)
  rows = lambda columns: either([gpu.over_rows(x, TILE) for x in columns])
  p = jnp.exp2(x * c - rows(lse))
  p = p if mask is None else jnp.where(mask, p, 0.0)
  ds = p * (dp - rows(delta))
  if kept is not None:
    kept[...] = ds.astype(own[0].dtype)
  halves = lambda x: _halves(x, lower, len(queries), own[0].dtype)
  to_dk = [(x, query[0]) for x, query in zip(halves(ds), queries, strict=True)]
  to_dv = [(x, query[1]) for x, query in zip(halves(p), queries, strict=True)]
  return gpu.add_matmul((dk, *to_dk), (dv, *to_dv), scratch=scratch)


def add_query_gradient(dq, own, keys, c, mask, scratch):
  """dq / scale of a query tile, with what a key tile adds.

  Args:
    own: q, dout and delta, by row.
    keys: (k, v, lse of the queries by row, infinite where the tile weighs nothing); or two of them,
      as in `add_key_gradients`.
  """
  q, dout, delta = own
  lower = _difference(0) >= 0
  either = lambda xs: xs[0] if len(xs) == 1 else jnp.where(lower, *xs)
  lse = either([gpu.over_columns(key[2], TILE) for key in keys])
  to_x, to_dp = ([(x, _turned(key[n])) for key in keys] for n, x in ((0, q), (1, dout)))
  x, dp = _products(to_x, to_dp, either)
  p = jnp.exp2(x * c - lse)
  p = p if mask is None else jnp.where(mask, p, 0.0)
  ds = p * (dp - gpu.over_columns(delta, TILE))
  parts = _halves(ds, lower, len(keys), q.dtype)
  return gpu.add_matmul(
    (dq, *((x, key[0]) for x, key in zip(parts, keys, strict=True))), scratch=scratch
  )[0]


def _products(to_x, to_dp, either):
  """S and dP: both in flight together where that leaves enough registers."""
  if len(to_x) == 1 and to_x[0][0].shape[1] <= 64:
    return gpu.matmul(*to_x, *to_dp)
  return either(gpu.matmul(*to_x)), either(gpu.matmul(*to_dp))


def _halves(x, lower, num: int, dtype):
  """x as an operand; or its lower triangle and the rest."""
  if num == 1:
    return [x.astype(dtype)]
  # By a subtraction: selected twice, ptxas would convert first and select packed values.
  below = jnp.where(lower, x, 0.0)
  return [below.astype(dtype), (x - below).astype(dtype)]


def _sweep(own, room, direction: int, num_tiles: int, band: Band, step, state):
  """Steps over the `room` tiles from `own` on, in a direction; (tile, state, no mask) -> state.

  The masked tiles last. That is one tile without a loop where possible: after a second loop ptxas
  would wait for each matrix instruction by itself.
  """
  at = lambda distance: own + direction * distance
  first, first_full = band.first(), band.first_full()
  if num_tiles > first_full:
    state = lax.fori_loop(first_full, room, lambda n, state: step(at(n), state, True), state)
  if (first, first_full) == (0, 1):
    return step(own, state, False)
  upper = jnp.minimum(first_full, room)
  return lax.fori_loop(first, upper, lambda n, state: step(at(n), state, False), state)


def _same_segment(ref, b, r, q_tile, k_tile, query_axis: int):
  """Which pairs of two tiles share a segment."""
  tiles = (q_tile, k_tile) if query_axis == 0 else (k_tile, q_tile)
  of_rows, of_columns = (
    gpu.load(ref[name].at[b, r, gpu.ds(tile * TILE, TILE)], layout=layout, optimized=False)
    for name, tile, layout in zip(("row_ids", "column_ids"), tiles, (ROW, COLUMN), strict=True)
  )
  return gpu.over_columns(of_rows, TILE) == gpu.over_rows(of_columns, TILE)


def _turned(tile):
  return tile.transpose((1, 0))


def _difference(query_axis: int):
  """Query minus key, in a tile whose queries lie along an axis."""
  return gpu.iota((TILE, TILE), query_axis) - gpu.iota((TILE, TILE), 1 - query_axis)


def _load(tile):
  return gpu.load(tile, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
