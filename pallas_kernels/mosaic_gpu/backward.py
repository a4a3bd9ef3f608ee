"""Backward kernels of the heads that the memory system bounds: each tensor is read once.

`resident`: a block of threads owns tiles of a short sequence (a column, a block) and holds what
their gradients need: q and dout of these and later tiles, k and v of these and earlier ones.
`window`: every multiprocessor walks along the sequences behind rings of tiles.

Both compute dq of a query tile and dk, dv of a key tile as sums of their own: no atomics, no sums
in another order. Where dS^T of all pairs fits shared memory that takes 5 matrix products a pair;
longer sequences in `resident` compute their weights twice, with 7.

With P = exp2(S - lse), dS = P (dP - delta), delta = rowsum(dout out) - dlse. The passes of a union
share lse and delta.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
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
        return add_key_gradients(state, k_own, query, c, mask_of(t, own, 1, inside), p_s, kept)

      return _sweep(
        own, nt - own, 1, nt, band, step, (gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv)))
      )

    pair = lambda q_tile, k_tile: lax.div(q_tile * (q_tile + 1), jnp.int32(2)) + k_tile

    def query_gradient(own):
      if keeps:

        def from_kept(t, dq):
          return dq + gpu.matmul((_turned(s["ds_s"].at[pair(own, t)]), tile(k_slot(t))[0]))[0]

        return lax.fori_loop(0, own + 1 - band.first(), from_kept, gpu.zeros((TILE, Dk)))
      query = (*tile(q_slot(own)), *rows_of(own, ROW))

      def step(t, dq, inside):
        return add_query_gradient(dq, query, tile(k_slot(t)), c, mask_of(own, t, 0, inside), p_s)

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
    # Groups of a sequence run at the same time: what several of them read comes from the cache.
    grid=(B, view.R, num_groups, Hg),
    grid_names=("b", "r", "g", "h"),
    num_threads=W,
    thread_name="wg",
  )(*inputs.values())
  dq, dk, dv = (x.reshape(B, T, Hg, -1) for x in (dq, dk, dv))
  return dq, dk, dv, new_delta if delta is None else delta


def window(
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
  *,
  scale,
  heads,
  warpgroups: int,
  query_stages: int,
  key_stages: int,
  out_stages: int,
  result_stages: int,
):
  """Gradients of attention to a window of the keys before each query; arguments as in `resident`.

  Every multiprocessor walks along its share of a sequence for one head, as in the forward kernel.
  A producer fills rings of tiles of queries, keys and out. `warpgroups` take key tiles in turn:
  each sums dk and dv of its tile, over the queries after it, and leaves dS^T in shared memory. One
  more makes delta of out, ahead of them, and sums dq of dS: it holds a sum for each query tile that
  the window still reaches, so that a key tile is used for all of them at once and forgotten.

  The queries of a share need keys before it, which are another's to sum: of these only dS is made,
  of the pairs inside. Rows that weigh nothing get an infinite lse: rows without keys, tiles past
  the end, and all rows where a key tile would lie before the sequence.

  Args:
    warpgroups: for dk and dv.
    query_stages, key_stages, out_stages: tiles of the rings.
    result_stages: tiles that dk and dv of a warpgroup leave from: 2, or 1 for both.

  Returns:
    dq, dk, dv [B, T, Hg, D], k's and v's for each query head; and delta.
  """
  B, _, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt, W = view.num_tiles, warpgroups
  reach = band.last(nt)
  # Else a warpgroup would wait for tiles that are loaded only once it has gone on.
  assert reach + 1 >= W and query_stages >= reach + W and key_stages > W
  share = share_of(nt, B * Hg)
  inputs = dict(q=q, k=k, v=v, dout=dout, out=out, lse=lse)
  optional = dict(row_ids=ids, column_ids=ids, dlse=dlse)  # as in `resident`
  inputs |= {name: x for name, x in optional.items() if x is not None}
  rings = dict(q=query_stages, k=key_stages, out=out_stages, ds=W)
  scratch = dict(
    q_s=gpu.smem(query_stages, TILE, Dk, dtype=q.dtype),
    dout_s=gpu.smem(query_stages, TILE, Dv, dtype=q.dtype),
    k_s=gpu.smem(key_stages, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(key_stages, TILE, Dv, dtype=q.dtype),
    out_s=gpu.smem(out_stages, TILE, Dv, dtype=q.dtype),  # then dq
    ds_s=gpu.smem(W * (reach + 1), TILE, TILE, dtype=q.dtype, beside=Dk),
    dv_s=gpu.smem(W, result_stages, TILE, Dv, dtype=q.dtype),  # and dk
    lse_s=gpu.vector(query_stages, TILE),
    delta_s=gpu.vector(query_stages, TILE),
    q_full=gpu.Barrier(num_barriers=query_stages, num_arrivals=3),
    q_free=gpu.Barrier(num_barriers=query_stages, num_arrivals=W + 1),
    delta_full=gpu.Barrier(num_barriers=query_stages),
    k_full=gpu.Barrier(num_barriers=key_stages, num_arrivals=2),
    k_free=gpu.Barrier(num_barriers=key_stages, num_arrivals=W + 1),
    out_full=gpu.Barrier(num_barriers=out_stages),
    out_free=gpu.Barrier(num_barriers=out_stages),
    ds_full=gpu.Barrier(num_barriers=W),
    ds_free=gpu.Barrier(num_barriers=W),
  )
  if Dk != Dv:
    scratch |= dict(dk_s=gpu.smem(W + 1, TILE, Dk, dtype=q.dtype))  # and dq, the last
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def window_backward(*refs, **s):
    ref = dict(zip(inputs, refs, strict=False))
    dq_ref, dk_ref, dv_ref, delta_ref = refs[len(inputs) :]
    wg = lax.axis_index("wg")
    first = lax.axis_index("share") * share
    count = jnp.minimum(nt - first, share)
    # Tile n of the queries is first + n of the sequence, tile n of the keys first - reach + n: it
    # meets the queries n - reach ... n. The last `reach` queries and the first keys are others'.
    total = count + reach
    b, h = lax.axis_index("b"), lax.axis_index("h")
    head = head_of(heads, h)
    box = lambda name, h, t: view.box(ref[name], b, 0, h, t * TILE)
    rows = lambda x, t: x.at[b, h, 0, gpu.ds(t * TILE, TILE)]
    inside = lambda t: jnp.clip(t, 0, nt - 1)  # what is not must hold numbers all the same
    c = scale * gpu.LOG2E

    def slot(ring, n):
      return n % rings[ring] if isinstance(n, int) else lax.rem(n, jnp.int32(rings[ring]))

    def of(name, n):
      """A barrier or a tile of a ring."""
      ring = {"dout": "q", "lse": "q", "delta": "q", "v": "k"}.get(name.partition("_")[0])
      return s[name].at[slot(ring or name.partition("_")[0], n)]

    def kept(n, distance):
      """dS^T of key tile n and the queries at a distance from it."""
      return s["ds_s"].at[slot("ds", n) * (reach + 1) + distance]

    # ------------------------------------------------------------------------------- producer

    @gpu.when(wg == W + 1)
    def _():
      gpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

      def wait_until_free(name, n):
        gpu.when(n >= rings[name])(lambda: gpu.barrier_wait(of(f"{name}_free", n)))

      @gpu.loop(0, total)
      def _(n):
        wait_until_free("k", n)
        t, full = inside(first - reach + n), of("k_full", n)
        gpu.to_smem(box("k", head // group, t), of("k_s", n), full)
        gpu.to_smem(box("v", head // group, t), of("v_s", n), full)
        wait_until_free("q", n)
        t, full = inside(first + n), of("q_full", n)
        gpu.to_smem(box("dout", h, t), of("dout_s", n), full)
        gpu.to_smem(box("q", head, t), of("q_s", n), full)
        gpu.to_smem(rows(ref["lse"], t), of("lse_s", n), full)
        wait_until_free("out", n)
        gpu.to_smem(box("out", h, t), of("out_s", n), of("out_full", n))

      # Every completion of a barrier has to be seen by those who wait for it.
      for name, end in dict(q=count, k=total, out=total).items():

        @gpu.loop(jnp.maximum(total - rings[name], 0), end)
        def _(n, name=name):
          gpu.barrier_wait(of(f"{name}_free", n))

    # ------------------------------------------------------------------------------- delta, dq

    @gpu.when(wg == W)
    def _():
      for_dq, at_launch = window_registers(reach, Dk, W)[0], 65_536 // (128 * (W + 2))
      gpu.set_max_registers(for_dq, action="increase" if for_dq >= at_launch else "decrease")

      def make_delta(n):
        t = inside(first + n)
        gpu.barrier_wait(of("q_full", n))
        gpu.barrier_wait(of("out_full", n))
        row = (_load(of("dout_s", n)) * _load(of("out_s", n))).sum(axis=1)
        if dlse is not None:
          row = row - gpu.load(rows(ref["dlse"], t), layout=ROW, optimized=False)
        lse = gpu.load(of("lse_s", n), layout=ROW, optimized=False)
        row = jnp.where(lse > -jnp.inf, row, 0.0)
        of("delta_s", n)[...] = row
        exists = jnp.where(first + n < nt, jnp.float32(0), jnp.inf)
        of("lse_s", n)[...] = safe_lse(lse) + exists
        gpu.barrier_arrive(of("delta_full", n))
        gpu.commit_smem()  # before the copy engine may write again where lse was changed

        @gpu.when(n < count)
        def _():
          gpu.barrier_arrive(of("q_free", n))
          rows(delta_ref, t)[...] = row

      def release_out(n):
        """Gives back the memory that delta n was made of, and that dq has left from since."""
        gpu.wait_to_gmem(0, wait_read_only=True)
        gpu.barrier_arrive(of("out_free", n))

      def add(n, dqs, distances, add_matmul=gpu.add_matmul):
        """dqs, of the queries n - reach ..., with what key tile n adds at these distances."""
        gpu.barrier_wait(of("k_full", n))
        gpu.barrier_wait(of("ds_full", n))
        pair = lambda distance: (_turned(kept(n, distance)), of("k_s", n))
        terms = [(dqs[distance], pair(distance)) for distance in distances]
        sums = dict(zip(distances, add_matmul(*terms), strict=True))
        gpu.barrier_arrive(of("ds_free", n))
        gpu.barrier_arrive(of("k_free", n))
        return [sums.get(distance, dq) for distance, dq in enumerate(dqs)]

      for n in range(W):
        make_delta(n)
        release_out(n)

      def added(*terms):  # accumulators cannot start in tiles whose place is a constant
        products = gpu.matmul(*(pair for _, pair in terms))
        return [acc + x for (acc, _), x in zip(terms, products, strict=True)]

      dqs = [gpu.zeros((TILE, Dk))] * (reach + 1)
      for n in range(reach):
        ahead = n + W
        gpu.when(ahead < total)(functools.partial(make_delta, ahead))
        gpu.when(ahead < total)(functools.partial(release_out, ahead))
        dqs = add(n, dqs, window_distances(reach, n), added)
        dqs = [*dqs[1:], gpu.zeros((TILE, Dk))]

      def step(n, dqs):
        ahead = n + W
        gpu.when((n > reach) & (ahead <= total))(lambda: release_out(ahead - 1))
        gpu.when(ahead < total)(lambda: make_delta(ahead))
        dq, *dqs = add(n, [*dqs, gpu.zeros((TILE, Dk))], range(reach + 1))
        stage = of("out_s", ahead) if Dk == Dv else s["dk_s"].at[W]
        gpu.wait_to_gmem(0, wait_read_only=True)
        stage[...] = (dq * scale).astype(q.dtype)
        gpu.commit_smem()
        gpu.to_gmem(stage, view.box(dq_ref, b, 0, h, (first + n - reach) * TILE))
        return tuple(dqs)

      lax.fori_loop(reach, total, step, tuple(dqs[:reach]))
      gpu.wait_to_gmem(0)

    # ------------------------------------------------------------------------------- dk, dv, dS

    @gpu.when(wg < W)
    def _():
      gpu.set_max_registers(window_registers(reach, Dk, W)[1], action="increase")
      p_s = s["p_s"].at[wg] if gpu.simulated() else None

      def see(n):
        gpu.barrier_wait(of("q_full", n))
        gpu.barrier_wait(of("delta_full", n))
        gpu.barrier_wait(of("k_full", n))

      def begin(n):
        """Waits for what key tile n meets; the tiles since this warpgroup's last are others'."""
        for before in range(W - 1, 0, -1):

          @gpu.when(n - before >= 0)
          def _(before=before):
            see(n - before)
            gpu.barrier_arrive(of("k_free", n - before))

        see(n)
        gpu.when(n >= W)(lambda: gpu.barrier_wait(of("ds_free", n)))

      def release_queries(begin, end):
        @gpu.loop(begin, jnp.minimum(end, count))
        def _(m):
          gpu.barrier_arrive(of("q_free", m))

      def column(name, m):
        return gpu.load(of(name, m), layout=COLUMN, optimized=False)

      def mask_of(n, distance):
        """Which pairs of key tile n and the queries at a distance attend, or None for all."""
        mask = None
        if not band.covers(distance):
          # Opaque: what a loop does not change is computed before it, and packed bit by bit.
          keys = lax.optimization_barrier(gpu.iota((TILE,), layout=ROW))
          queries = gpu.iota((TILE,), layout=COLUMN)
          difference = gpu.over_rows(queries, TILE) - gpu.over_columns(keys, TILE)
          mask = band.mask(difference + distance * TILE)
        if ids is not None:
          k_tile = first - reach + n
          same = _same_segment(ref, b, 0, inside(k_tile + distance), inside(k_tile), 1)
          mask = same if mask is None else mask & same
        return mask

      def factors(n, distance):
        """Of S^T and dP^T."""
        m = n + distance - reach
        return (of("k_s", n), _turned(of("q_s", m))), (of("v_s", n), _turned(of("dout_s", m)))

      def weights(n, distance, exists=None):
        """P^T and dS^T of key tile n and the queries at a distance; the latter is kept."""
        m = n + distance - reach
        of_s, of_dp = factors(n, distance)
        lse = lambda: column("lse_s", m) if exists is None else column("lse_s", m) + exists
        if Dk + Dv <= 128:
          x, dp = gpu.matmul(of_s, of_dp)
          p = weights_of(x, lse(), c, mask_of(n, distance))
          operand = p.astype(q.dtype)
        else:  # registers are short: dP^T only when P^T is as small as it gets
          (x,) = gpu.matmul(of_s)
          p = weights_of(x, lse(), c, mask_of(n, distance)).astype(q.dtype)
          operand = lax.optimization_barrier(p)
          (dp,) = gpu.matmul(of_dp)
          p = operand.astype(jnp.float32)
        ds = slopes_of(p, dp, column("delta_s", m), q.dtype)
        kept(n, distance)[...] = ds
        return operand, ds

      def key_gradients(n):
        """dk and dv of key tile n."""
        dk, dv = gpu.zeros((TILE, Dk)), gpu.zeros((TILE, Dv))
        for distance in range(reach + 1):
          p, ds = weights(n, distance)
          m = n + distance - reach
          dk, dv = gpu.add_matmul((dk, (ds, of("q_s", m))), (dv, (p, of("dout_s", m))), scratch=p_s)
          if distance < W:  # the next tile of this warpgroup does not see it
            gpu.commit_reads()
            release_queries(m if distance else jnp.where(n == start, 0, m), m + 1)
        return dk, dv

      def leave_ds(n):
        gpu.commit_smem()
        gpu.barrier_arrive(of("ds_full", n))
        gpu.barrier_arrive(of("k_free", n))

      for n in range(reach):

        @gpu.when(wg == n % W)
        def _(n=n):
          begin(n)
          exists = jnp.where(first - reach + n >= 0, jnp.float32(0), jnp.inf)
          for distance in window_distances(reach, n):
            weights(n, distance, exists)
          leave_ds(n)

      # The first tile of its own, then every W-th.
      start = reach + lax.rem(wg - reach % W + W, jnp.int32(W))

      @gpu.loop(start, total, step=W)
      def _(n):
        begin(n)
        dk, dv = key_gradients(n)
        leave_ds(n)
        t = first + n - reach
        results = s["dv_s"].at[wg]
        stage_k = results.at[result_stages - 1] if Dk == Dv else s["dk_s"].at[wg]
        gpu.wait_to_gmem(0, wait_read_only=True)  # of the tile before
        for value, to, stage in ((dv, dv_ref, results.at[0]), (dk * scale, dk_ref, stage_k)):
          if to is dk_ref and Dk == Dv and result_stages == 1:
            gpu.wait_to_gmem(0, wait_read_only=True)
          stage[...] = value.astype(q.dtype)
          gpu.commit_smem()
          gpu.to_gmem(stage, view.box(to, b, 0, h, t * TILE))

      # What is left to be seen, and freed where there was no tile for this warpgroup.
      turns = lax.div(jnp.maximum(total - start + W - 1, 0), jnp.int32(W))
      last = start + (turns - 1) * W  # where it has none, a key tile before the first query

      @gpu.loop(last + 1, total)
      def _(n):
        see(n)
        gpu.barrier_arrive(of("k_free", n))

      gpu.barrier_wait(of("ds_free", last))
      gpu.when(turns == 0)(lambda: release_queries(0, count))
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
    num_threads=W + 2,
    thread_name="wg",
  )(*inputs.values())


def window_registers(reach: int, Dk: int, warpgroups: int) -> tuple[int, int]:
  """Registers of a thread that sums dq, and of one that sums dk and dv, of the 504 or 512."""
  if warpgroups == 1:
    return 232, 248
  for_dq = -(-((reach + 1) * Dk // 2 + 40) // 8) * 8
  return for_dq, (512 - PRODUCER_REGISTERS - for_dq) // (8 * warpgroups) * 8


def window_distances(reach: int, n: int) -> range:
  """Of the queries that key tile n of a walk meets: none before the first of the walk."""
  return range(max(reach - n, 0), reach + 1)


# ---------------------------------------------------------------------------- pairs of tiles


def add_key_gradients(state, own, query, c, mask, scratch, kept=None):
  """(dk / scale, dv) of a key tile, with what a query tile adds: S^T has keys as rows.

  Args:
    own: k and v.
    query: q, dout, and a function that loads lse and delta by column.
    c: of the logits, base 2.
    mask: which pairs attend, or None.
    kept: where to keep dS^T, or None.
  """
  dk, dv = state
  (k, v), (q, dout, rows) = own, query
  x, dp = _products((k, _turned(q)), (v, _turned(dout)))
  lse, delta = rows()  # only now, for 32 registers that the products can use
  p = weights_of(x, lse, c, mask)
  ds = slopes_of(p, dp, delta, k.dtype)
  if kept is not None:
    kept[...] = ds
  return gpu.add_matmul((dk, (ds, q)), (dv, (p.astype(k.dtype), dout)), scratch=scratch)


def weights_of(x, lse, c, mask):
  """P^T from S^T / scale and lse by column; the others as above."""
  p = jnp.exp2(x * c - gpu.over_rows(lse, TILE))
  return p if mask is None else jnp.where(mask, p, 0.0)


def slopes_of(p, dp, delta, dtype):
  """dS^T, as an operand, from P^T, dP^T and delta by column."""
  return (p * (dp - gpu.over_rows(delta, TILE))).astype(dtype)


def add_query_gradient(dq, own, key, c, mask, scratch):
  """dq / scale of a query tile, with what a key tile adds.

  Args:
    own: q, dout, lse and delta, by row.
    key: k and v.
  """
  (q, dout, lse, delta), (k, v) = own, key
  x, dp = _products((q, _turned(k)), (dout, _turned(v)))
  p = jnp.exp2(x * c - gpu.over_columns(lse, TILE))
  p = p if mask is None else jnp.where(mask, p, 0.0)
  ds = p * (dp - gpu.over_columns(delta, TILE))
  return gpu.add_matmul((dq, (ds.astype(q.dtype), k)), scratch=scratch)[0]


def _products(*pairs):
  """S and dP: both in flight together where that leaves enough registers."""
  if pairs[0][0].shape[1] <= 64:
    return gpu.matmul(*pairs)
  return tuple(gpu.matmul(pair)[0] for pair in pairs)


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
