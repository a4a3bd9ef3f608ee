"""Forward kernels of the heads that the memory system bounds: short sequences and windows.

`resident`: a block of threads holds all keys and values of a sequence (a column, a block).
`window`: it walks along a sequence behind a ring of the tiles that a window still needs.

Both take up where `prev`, the result over other keys, ended: a softmax state is (sum, maximum, sum
of weights), and (out, lse, 1) is one. That merges the passes of a union into one softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, {2: 232, 3: 160}  # of the 512 per four threads
AT_ONCE = 2  # tiles of logits in registers, 32 each


def resident(view: View, band: Band, q, k, v, ids, prev, *, scale, heads, warpgroups: int):
  """Attention inside each sequence of a view, all its keys and values in shared memory.

  Args:
    q: [B, T, H, Dk]; k [B, T, Hkv, Dk]; v [B, T, Hkv, Dv].
    ids: segment ids in rows, int32 [B, R, Mp], or None.
    prev: out [B, T, Hg, Dv] and lse [B, Hg, R, Mp] over other keys, or None.
    heads: the query heads to work on.
    warpgroups: of a block of threads, which share keys and values.

  Returns:
    out [B, T, Hg, Dv] and lse, base 2, float32 [B, Hg, R, Mp].
  """
  B, T, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt = view.num_tiles
  # As many turns for each: a bound that ptxas knows saves registers.
  W = next(n for n in range(warpgroups, 0, -1) if nt % n == 0)
  size = view.even_rows  # of a tile; matrix instructions have 64, the rest of which is not stored
  rest = nt * (TILE - size)
  inputs = [view(x) for x in (q, k, v)]
  inputs += [ids] if ids is not None else []
  inputs += [view(prev[0]), prev[1]] if prev is not None else []
  names = ["q", "k", "v"] + ["prev"] * (prev is not None)
  scratch = dict(
    q_s=gpu.smem(nt, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(nt, size, Dk, dtype=q.dtype),
    v_s=gpu.smem(nt, size, Dv, dtype=q.dtype, beside=size & -size),
    lse_s=gpu.vector(W, TILE),
  )
  scratch |= {f"{name}_full": gpu.Barrier(num_barriers=nt) for name in names}
  # The result is staged where the one before or q was, if it fits there.
  stage = "prev_s" if prev is not None else "q_s" if Dk == Dv else "o_s"
  if stage != "q_s":
    scratch[stage] = gpu.smem(nt, TILE, Dv, dtype=q.dtype)
  if rest:
    scratch |= dict(rest_s=gpu.vector(TILE))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, size, dtype=q.dtype))

  def resident_forward(*refs, **s):
    q_ref, k_ref, v_ref, *more, o_ref, lse_ref = refs
    ids_ref = more.pop(0) if ids is not None else None
    b, r, h, wg = (lax.axis_index(name) for name in ("b", "r", "h", "wg"))
    head = head_of(heads, h)
    kv_head = head // group
    p_s = s["p_s"].at[wg] if gpu.simulated() else None
    box = lambda ref, head, t: view.box(ref, b, r, head, t * size, size)
    valid = gpu.ds(0, size)

    @gpu.when(wg == 0)
    def _():
      @gpu.loop(0, nt)
      def _(t):
        gpu.to_smem(box(q_ref, head, t), s["q_s"].at[t, valid], s["q_full"].at[t])
        gpu.to_smem(box(k_ref, kv_head, t), s["k_s"].at[t], s["k_full"].at[t])
        gpu.to_smem(box(v_ref, kv_head, t), s["v_s"].at[t], s["v_full"].at[t])
        if prev is not None:
          gpu.to_smem(box(more[0], h, t), s["prev_s"].at[t, valid], s["prev_full"].at[t])

    if rest:

      @gpu.when(wg == W - 1)  # whose is the last tile
      def _():
        s["rest_s"][...] = gpu.full((TILE,), 0.0)

    @gpu.loop(0, nt // W)
    def _(turn):
      own = turn * W + wg
      # Tiles that an earlier turn of this warpgroup has waited for.
      new_tiles = jnp.where(turn == 0, 0, own - W + 1 - band.first(size))
      rows = gpu.ds(own * size, TILE)
      gpu.barrier_wait(s["q_full"].at[own])
      q_tile = s["q_s"].at[own]
      ids_q = None if ids is None else _ids(ids_ref, b, r, own * size, TILE, ROW)
      if prev is None:
        state = start(Dv)
      else:
        lse = gpu.load(more[1].at[b, h, r, rows], layout=ROW, optimized=False)
        gpu.barrier_wait(s["prev_full"].at[own])
        state = resume(s["prev_s"].at[own], lse, scale)

      def step(t, state, masked):
        @gpu.when(t >= new_tiles)  # each barrier completes, and is waited for, once
        def _():
          gpu.barrier_wait(s["k_full"].at[t])
          gpu.barrier_wait(s["v_full"].at[t])

        mask = None
        if masked:
          # Two axes of positions at once would be divided by `size`, element by element.
          columns = gpu.over_rows(gpu.iota((size,), layout=COLUMN), TILE)
          difference = gpu.over_columns(gpu.iota((TILE,), layout=ROW), size) - columns
          mask = band.mask(difference + (own - t) * size)
        if ids is not None:
          same = _same(ids_q, _ids(ids_ref, b, r, t * size, size, COLUMN))
          mask = same if mask is None else mask & same
        return attend(state, q_tile, s["k_s"].at[t], s["v_s"].at[t], mask, scale, p_s)

      state = sweep(own, nt, band, size, step, state)
      gpu.wait_to_gmem(0, wait_read_only=True)  # of the lse before
      s["lse_s"].at[wg][...] = finish(state, s[stage].at[own], scale)
      gpu.commit_smem()
      gpu.to_gmem(s[stage].at[own, valid], box(o_ref, h, own))
      gpu.to_gmem(s["lse_s"].at[wg, valid], lse_ref.at[b, h, r, gpu.ds(own * size, size)])
      if rest:  # what `View.rows` has there
        last = lse_ref.at[b, h, r, gpu.ds(nt * size, rest)]
        gpu.when(own == nt - 1)(lambda: gpu.to_gmem(s["rest_s"].at[gpu.ds(0, rest)], last))

    gpu.wait_to_gmem(0)

  out_type = (
    jax.ShapeDtypeStruct((*inputs[0].shape[:-2], Hg, Dv), q.dtype),
    jax.ShapeDtypeStruct((B, Hg, view.R, nt * TILE), jnp.float32),
  )
  out, lse = gpu.kernel(
    resident_forward,
    out_type=out_type,
    scratch_types=scratch,
    grid=(B, view.R, Hg),
    grid_names=("b", "r", "h"),
    num_threads=W,
    thread_name="wg",
  )(*inputs)
  return out.reshape(B, T, Hg, Dv), lse


def window(view: View, band: Band, q, k, v, ids, prev, *, scale, heads, warpgroups, stages):
  """Attention to a window of the keys before each query, in walks along the sequences.

  Every multiprocessor walks along its share of a sequence for one head; all heads of a share walk
  side by side, for they are neighbours in memory. A producer fills a ring of `stages` tiles of keys
  and values ahead of `warpgroups` consumers, which take the query tiles in turn. All else as in
  `resident`.
  """
  B, _, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt = view.num_tiles
  reach = band.last(nt)
  W = min(warpgroups, reach + 1)  # so that whoever frees a tile of the ring has waited for it
  S, Q = max(stages, reach + W), 2 * W  # tiles of keys, of queries
  share = share_of(nt, B * Hg)
  inputs = [view(x) for x in (q, k, v)]
  inputs += [ids] if ids is not None else []
  inputs += [view(prev[0]), prev[1]] if prev is not None else []
  scratch = dict(
    q_s=gpu.smem(Q, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(S, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(S, TILE, Dv, dtype=q.dtype),
    o_s=gpu.smem(W, TILE, Dv, dtype=q.dtype),
    q_full=gpu.Barrier(num_barriers=Q),
    q_free=gpu.Barrier(num_barriers=Q),
    k_full=gpu.Barrier(num_barriers=S, num_arrivals=2),
    k_free=gpu.Barrier(num_barriers=S, num_arrivals=W),
  )
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def window_forward(
    *refs, q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, prev_full=None, p_s=None
  ):
    q_ref, k_ref, v_ref, *more, o_ref, lse_ref = refs
    ids_ref = more.pop(0) if ids is not None else None
    wg = lax.axis_index("wg")
    b, h = lax.axis_index("b"), lax.axis_index("h")
    head = head_of(heads, h)
    first = lax.axis_index("share") * share
    count = jnp.minimum(nt - first, share)
    rem = lambda n, size: lax.rem(n, jnp.int32(size))
    # Every second share is walked backward: neighbours begin or end side by side, and what both
    # read is in the cache. Keys are counted as they come; query n of a walk meets n ... n + reach.
    backward = rem(lax.axis_index("share"), 2) == 1
    query_tile = lambda n: first + jnp.where(backward, count - 1 - n, n)
    key_tile = lambda n: jnp.where(backward, query_tile(n), first - reach + n)
    key_at = lambda n, distance: n + jnp.where(backward, distance, reach - distance)

    @gpu.when(wg == W)
    def _():
      if W > 1:
        gpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

      # Keys of tiles before the sequence are never attended, but must hold numbers: tile 0 will do.
      @gpu.loop(0, count + reach)
      def _(n):
        slot = rem(n, S)
        t = jnp.maximum(key_tile(n), 0)
        gpu.when(n >= S)(lambda: gpu.barrier_wait(k_free.at[slot]))
        gpu.to_smem(view.box(k_ref, b, 0, head // group, t * TILE), k_s.at[slot], k_full.at[slot])
        gpu.to_smem(view.box(v_ref, b, 0, head // group, t * TILE), v_s.at[slot], k_full.at[slot])

        @gpu.when(n >= reach)
        def _():
          m = n - reach
          slot, t = rem(m, Q), query_tile(m)
          gpu.when(m >= Q)(lambda: gpu.barrier_wait(q_free.at[slot]))
          gpu.to_smem(view.box(q_ref, b, 0, head, t * TILE), q_s.at[slot], q_full.at[slot])

      # Every completion of a barrier has to be seen by those who wait for it.
      @gpu.loop(jnp.maximum(count + reach - S, 0), count)
      def _(n):
        gpu.barrier_wait(k_free.at[rem(n, S)])

      @gpu.loop(jnp.maximum(count - Q, 0), count)
      def _(n):
        gpu.barrier_wait(q_free.at[rem(n, Q)])

    @gpu.when(wg < W)
    def _():
      if W > 1:
        gpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
      stage = o_s.at[wg]
      scratch = None if p_s is None else p_s.at[wg]

      # Tiles of the ring that only the warpgroups before this one read.
      @gpu.loop(0, jnp.minimum(wg, count))
      def _(n):
        gpu.barrier_wait(k_full.at[n])
        gpu.barrier_arrive(k_free.at[n])

      @gpu.loop(wg, count, step=W)
      def _(n):
        t = query_tile(n)
        rows = gpu.ds(t * TILE, TILE)
        state = None
        if prev is not None:
          gpu.wait_to_gmem(0, wait_read_only=True)
          gpu.to_smem(view.box(more[0], b, 0, h, t * TILE), stage, prev_full.at[wg])
          lse = gpu.load(more[1].at[b, h, 0, rows], layout=ROW, optimized=False)
          gpu.barrier_wait(prev_full.at[wg])
          state = resume(stage, lse, scale)

        @gpu.loop(jnp.where(n == wg, wg, n + reach + 1 - W), n + reach + 1)
        def _(m):
          gpu.barrier_wait(k_full.at[rem(m, S)])

        q_slot = rem(n, Q)
        gpu.barrier_wait(q_full.at[q_slot])
        same = [None] * (reach + 1)
        if ids is not None:
          ids_q = _ids(ids_ref, b, 0, t * TILE, TILE, ROW)
          tiles = [jnp.maximum(t - distance, 0) for distance in range(reach + 1)]
          same = [_same(ids_q, _ids(ids_ref, b, 0, tile * TILE, TILE, COLUMN)) for tile in tiles]
        slots = [rem(key_at(n, distance), S) for distance in range(reach + 1)]
        tiles = q_s.at[q_slot], [k_s.at[slot] for slot in slots], [v_s.at[slot] for slot in slots]

        state = attend_window(state, band, t, *tiles, same, scale, scratch)
        gpu.barrier_arrive(q_free.at[q_slot])

        @gpu.loop(n, jnp.minimum(n + W, count))
        def _(m):
          gpu.barrier_arrive(k_free.at[rem(m, S)])

        gpu.wait_to_gmem(0, wait_read_only=True)
        lse = finish(state, stage, scale)
        gpu.commit_smem()
        gpu.to_gmem(stage, view.box(o_ref, b, 0, h, t * TILE))
        lse_ref.at[b, h, 0, rows][...] = lse  # last: the fence above would wait for it

      # What the other warpgroups waited for after this one's last tile.
      turns = lax.div(count - wg + W - 1, jnp.int32(W))
      seen = jnp.where(count > wg, (turns - 1) * W + wg + reach + 1, jnp.minimum(wg, count))

      @gpu.loop(seen, count + reach)
      def _(n):
        gpu.barrier_wait(k_full.at[rem(n, S)])

      gpu.wait_to_gmem(0)

  out_type = (
    jax.ShapeDtypeStruct((*inputs[0].shape[:-2], Hg, Dv), q.dtype),
    jax.ShapeDtypeStruct((B, Hg, 1, nt * TILE), jnp.float32),
  )
  return gpu.kernel(
    window_forward,
    out_type=out_type,
    scratch_types=scratch,
    grid=(B, -(-nt // share), Hg),
    grid_names=("b", "share", "h"),
    num_threads=W + 1,
    thread_name="wg",
  )(*inputs)


def share_of(num_tiles: int, num_sequences: int) -> int:
  """Tiles of a sequence that a multiprocessor walks along, so that all of them have work."""
  return -(-num_tiles // max(1, gpu.num_multiprocessors() // num_sequences))


# ----------------------------------------------------------------------- one tile of queries


def start(Dv: int):
  """The state of an online softmax before any key."""
  return gpu.zeros((TILE, Dv)), gpu.full((TILE,), softmax.NO_MAXIMUM), gpu.full((TILE,), 0.0)


def resume(out, lse, scale):
  """The state that ended in `out`, in shared memory, and `lse`, of base 2."""
  total = gpu.load(out, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
  top = jnp.maximum(lse * (1 / (scale * gpu.LOG2E)), softmax.NO_MAXIMUM)
  # An empty row goes on from nothing.
  return total, top, jnp.where(lse > softmax.NO_MAXIMUM, 1.0, 0.0)


def sweep(own, num_tiles: int, band: Band, size: int, step, state):
  """All key tiles of query tile `own` of a causal band; masks only where they are needed."""
  first, first_full = band.first(size), band.first_full(size)
  full = jnp.maximum(own - first_full + 1, 0)
  if num_tiles > first_full:
    state = lax.fori_loop(0, full, lambda t, state: step(t, state, False), state)
  if (first, first_full) == (0, 1):
    return step(own, state, True)
  masked = lambda t, state: step(t, state, True)
  return lax.fori_loop(full, jnp.maximum(own - first + 1, 0), masked, state)


def attend(state, q, k, v, mask, scale, scratch):
  """The state after the keys and values of one tile."""
  (x,) = gpu.matmul((q, k.transpose((1, 0))))
  if mask is not None:
    x = jnp.where(mask, x, -jnp.inf)
  (p,), (total, top, weight) = _softmax(state, [x], scale)
  (total,) = gpu.add_matmul((total, (p.astype(q.dtype), v)), scratch=scratch)
  return total, top, weight


def attend_window(state, band: Band, own, q, keys, values, same, scale, scratch):
  """The state after a window: the tiles 0, 1, ... before the query's own.

  Args:
    own: the number of the query's own tile in its sequence.
    same: per tile, which pairs share a segment, or None.
  """
  difference = gpu.iota((TILE, TILE), 0) - gpu.iota((TILE, TILE), 1)
  last = len(keys) - 1
  # The two edges of such a window complement each other: row i sees j <= i of the near tile and
  # j > i of the far one. Together they are one full tile, with half the exponentials of two.
  folds = band.folds(len(keys)) and same[0] is None
  tiles = [(0, last), *((n,) for n in range(1, last))] if folds else [(n,) for n in range(last + 1)]

  def logits(distances):
    xs = gpu.matmul(*((q, keys[n].transpose((1, 0))) for n in distances))
    # Tiles before the sequence do not exist. A condition would make ptxas wait after every product.
    exists = lambda n: jnp.where(own >= n, jnp.float32(0), -jnp.inf)
    xs = [x if n == 0 else x + exists(n) for x, n in zip(xs, distances, strict=True)]
    if len(distances) > 1:
      return jnp.where(difference >= 0, *xs)
    (x,), (n,) = xs, distances
    mask = same[n]
    if not band.covers(n):
      inside = band.mask(difference + n * TILE)
      mask = inside if mask is None else mask & inside
    return x if mask is None else jnp.where(mask, x, -jnp.inf)

  for n in range(0, len(tiles), AT_ONCE):
    chosen = tiles[n : n + AT_ONCE]
    xs = [logits(distances) for distances in chosen]
    ps, (total, top, weight) = _softmax(state, xs, scale, values[0].shape[1])
    pairs = []
    for p, distances in zip(ps, chosen, strict=True):
      parts = [p]
      if len(distances) > 1:
        near = jnp.where(difference >= 0, p, 0.0)
        parts = [near, p - near]
      pairs += [(x.astype(q.dtype), values[m]) for x, m in zip(parts, distances, strict=True)]
    (total,) = gpu.add_matmul((total, *pairs), scratch=scratch)
    state = total, top, weight
  return state


def _softmax(state, xs, scale, Dv: int | None = None):
  """Weights of the logits in xs, and the state with its sum of values rescaled, none added."""
  ps, top, keep = softmax.weights(xs, None if state is None else state[1], scale)
  weight = functools.reduce(jnp.add, ps).sum(axis=1)
  if state is None:
    return ps, (gpu.zeros((TILE, Dv)), top, weight)
  total, _, old_weight = state
  total = total * gpu.over_columns(keep, total.shape[1])
  return ps, (total, top, old_weight * keep + weight)


def finish(state, out, scale):
  """Writes the result of a state to shared memory and returns its lse."""
  mean, lse = softmax.finish(*state, scale)
  out[...] = mean.astype(out.dtype)
  return lse


def _ids(ref, b, r, start, size, layout):
  return gpu.load(ref.at[b, r, gpu.ds(start, size)], layout=layout, optimized=False)


def _same(ids_q, ids_k):
  """Which pairs share a segment."""
  return gpu.over_columns(ids_q, ids_k.shape[0]) == gpu.over_rows(ids_k, TILE)
