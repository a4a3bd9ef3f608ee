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


def window(view: View, band: Band, q, k, v, ids, prev, *, scale, heads, warpgroups, stages, walks):
  """Attention to a window of the keys before each query.

  A multiprocessor takes one group of query tiles after the other, a tile for each of `warpgroups`
  consumers, while a producer fills memory for the next steps. With `walks` the groups are a walk
  along a share of a sequence: keys that the next group needs stay, and all heads of a share walk
  side by side, for they are neighbours in memory. Without, a step brings all keys of its group, of
  which the cache has most: all multiprocessors are at neighbouring groups, the heads of the same
  rows first. All else as in `resident`.

  Args:
    stages: steps whose new keys fit in memory together.
  """
  B, _, H, Dk = q.shape
  Dv, group, Hg = v.shape[3], H // k.shape[2], len(heads)
  nt = view.num_tiles
  reach = band.last(nt)
  W, S, Q = warpgroups, stages, 2  # Q: steps whose queries fit in memory
  new, ring = window_tiles(reach, W, S, walks)
  kept = W + reach - new  # tiles of keys that a step finds there
  num_groups = -(-nt // W)
  if walks:
    share = share_of(num_groups, B * Hg)
    grid, grid_names = (B, -(-num_groups // share), Hg), ("b", "share", "h")
  else:
    num_steps = B * num_groups * Hg
    grid, grid_names = (min(gpu.num_multiprocessors(), num_steps),), ("cta",)
  inputs = [view(x) for x in (q, k, v)]
  inputs += [ids] if ids is not None else []
  inputs += [view(prev[0]), prev[1]] if prev is not None else []
  scratch = dict(
    q_s=gpu.smem(Q * W, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(ring, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(ring, TILE, Dv, dtype=q.dtype),
    o_s=gpu.smem(W, TILE, Dv, dtype=q.dtype),
    q_full=gpu.Barrier(num_barriers=Q, num_arrivals=W),
    q_free=gpu.Barrier(num_barriers=Q, num_arrivals=W),
    k_full=gpu.Barrier(num_barriers=S, num_arrivals=2 * new),
    k_free=gpu.Barrier(num_barriers=S, num_arrivals=W),
  )
  if kept:
    scratch |= dict(kept_full=gpu.Barrier(num_arrivals=2 * kept))
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def window_forward(*refs, q_s, k_s, v_s, o_s, q_full, q_free, k_full, k_free, **s):
    q_ref, k_ref, v_ref, *more, o_ref, lse_ref = refs
    ids_ref = more.pop(0) if ids is not None else None
    wg = lax.axis_index("wg")
    rem = lambda n, size: lax.rem(n, jnp.int32(size))
    div = lambda n, size: lax.div(n, jnp.int32(size))
    # Tiles that do not exist are never attended, but must hold numbers: others will do.
    row = lambda t: jnp.clip(t, 0, nt - 1) * TILE

    # Of step n: batch element and head; query tile w; the m-th tile of keys that it meets, in the
    # order in which they come, and its place; the number of the key tile at a distance.
    if walks:
      share_index = lax.axis_index("share")
      begin = share_index * share
      count = jnp.minimum(num_groups - begin, share)
      # Every second share is walked backward: neighbours begin or end side by side, and what both
      # read is in the cache. The first keys of a step are the farthest, or then the nearest.
      backward = rem(share_index, 2) == 1
      start, end = begin * W, (begin + count) * W - 1
      sequence_of = lambda n: (lax.axis_index("b"), lax.axis_index("h"))
      query_tile = lambda n, w: jnp.where(backward, end - n * W - w, start + n * W + w)
      key_tile = lambda n, m: jnp.where(backward, end - n * W - m, start - reach + n * W + m)
      place = lambda n, m: rem(n * W + m, ring)
      number = lambda distance: wg + jnp.where(backward, distance, reach - distance)
    else:
      cta = lax.axis_index("cta")
      count = div(num_steps - 1 - cta, grid[0]) + 1
      group_of = lambda n: div(n * grid[0] + cta, Hg)  # among those of all batch elements
      sequence_of = lambda n: (div(group_of(n), num_groups), rem(n * grid[0] + cta, Hg))
      query_tile = lambda n, w: rem(group_of(n), num_groups) * W + w
      key_tile = lambda n, m: query_tile(n, m - reach)
      place = lambda n, m: rem(n, S) * new + m
      number = lambda distance: wg + reach - distance

    @gpu.when(wg == W)
    def _():
      if W > 1:
        gpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

      def bring(n, m, full):
        b, h = sequence_of(n)
        h, t, at = head_of(heads, h) // group, key_tile(n, m), place(n, m)
        gpu.to_smem(view.box(k_ref, b, 0, h, row(t)), k_s.at[at], full)
        gpu.to_smem(view.box(v_ref, b, 0, h, row(t)), v_s.at[at], full)

      for m in range(kept):
        bring(jnp.int32(0), m, s["kept_full"])

      @gpu.loop(0, count)
      def _(n):
        slot = rem(n, S)
        gpu.when(n >= S)(lambda: gpu.barrier_wait(k_free.at[slot]))
        for m in range(kept, W + reach):
          bring(n, m, k_full.at[slot])
        slot = rem(n, Q)
        gpu.when(n >= Q)(lambda: gpu.barrier_wait(q_free.at[slot]))
        b, h = sequence_of(n)
        for w in range(W):
          box = view.box(q_ref, b, 0, head_of(heads, h), row(query_tile(n, w)))
          gpu.to_smem(box, q_s.at[slot * W + w], q_full.at[slot])

      # Every completion of a barrier has to be seen by those who wait for it.
      for free, size in ((k_free, S), (q_free, Q)):

        @gpu.loop(jnp.maximum(count - size, 0), count)
        def _(n, free=free, size=size):
          gpu.barrier_wait(free.at[rem(n, size)])

    @gpu.when(wg < W)
    def _():
      if W > 1:
        gpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
      stage = o_s.at[wg]
      scratch = s["p_s"].at[wg] if gpu.simulated() else None
      near = None
      if band.folds(reach + 1) and ids is None:
        near = gpu.iota((TILE, TILE), 0) >= gpu.iota((TILE, TILE), 1)
        # Opaque, or it would be computed again in each step.
        near = lax.optimization_barrier(jnp.where(near, jnp.int16(-1), jnp.int16(0)))
      if kept:
        gpu.barrier_wait(s["kept_full"])

      @gpu.loop(0, count)
      def _(n):
        b, h = sequence_of(n)
        t = query_tile(n, wg)
        state = None
        if prev is not None:
          gpu.wait_to_gmem(0, wait_read_only=True)
          gpu.to_smem(view.box(more[0], b, 0, h, row(t)), stage, s["prev_full"].at[wg])
          rows = gpu.ds(row(t), TILE)
          lse = gpu.load(more[1].at[b, h, 0, rows], layout=ROW, optimized=False)
          gpu.barrier_wait(s["prev_full"].at[wg])
          state = resume(stage, lse, scale)

        slot, q_slot = rem(n, S), rem(n, Q)
        gpu.barrier_wait(k_full.at[slot])
        gpu.barrier_wait(q_full.at[q_slot])
        same = [None] * (reach + 1)
        if ids is not None:
          starts = [row(t - distance) for distance in range(reach + 1)]
          # From a place computed otherwise: one load would have to be in two layouts.
          ids_q = _ids(ids_ref, b, 0, jnp.minimum(t, nt - 1) * TILE, TILE, ROW)
          same = [_same(ids_q, _ids(ids_ref, b, 0, start, TILE, COLUMN)) for start in starts]
        places = [place(n, number(distance)) for distance in range(reach + 1)]
        tiles = q_s.at[q_slot * W + wg], [k_s.at[x] for x in places], [v_s.at[x] for x in places]
        state = attend_window(state, band, t, *tiles, same, near, scale, scratch)
        gpu.barrier_arrive(q_free.at[q_slot])
        gpu.barrier_arrive(k_free.at[slot])
        gpu.wait_to_gmem(0, wait_read_only=True)
        lse = finish(state, stage, scale)
        gpu.commit_smem()

        def store():
          gpu.to_gmem(stage, view.box(o_ref, b, 0, h, t * TILE))
          # Last: the fence above would wait for it.
          lse_ref.at[b, h, 0, gpu.ds(t * TILE, TILE)][...] = lse

        store() if nt % W == 0 else gpu.when(t < nt)(store)

      gpu.wait_to_gmem(0)

  out_type = (
    jax.ShapeDtypeStruct((*inputs[0].shape[:-2], Hg, Dv), q.dtype),
    jax.ShapeDtypeStruct((B, Hg, 1, nt * TILE), jnp.float32),
  )
  return gpu.kernel(
    window_forward,
    out_type=out_type,
    scratch_types=scratch,
    grid=grid,
    grid_names=grid_names,
    num_threads=W + 1,
    thread_name="wg",
  )(*inputs)


def window_tiles(reach: int, warpgroups: int, stages: int, walks: bool) -> tuple[int, int]:
  """Tiles of keys that a step of `window` brings, and for which there is memory."""
  new = warpgroups if walks else warpgroups + reach
  return new, stages * new + warpgroups + reach - new


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


def attend_window(state, band: Band, own, q, keys, values, same, near, scale, scratch):
  """The state after a window: the tiles 0, 1, ... before the query's own.

  Args:
    own: the number of the query's own tile in its sequence.
    same: per tile, which pairs share a segment, or None.
    near: to take the nearest and the farthest tile as one, int16, -1 for the pairs of a tile with
      a key no later than the query, else 0; or None.
  """
  Dv, last = values[0].shape[1], len(keys) - 1
  difference = gpu.iota((TILE, TILE), 0) - gpu.iota((TILE, TILE), 1)
  # The two edges of a window complement each other: row i sees j <= i of the near tile and some
  # j > i of the far one. Together they are one tile, with half the exponentials of two.
  middle = [(n,) for n in range(1, last)]
  tiles = [(n,) for n in range(last + 1)] if near is None else [(0, last), *middle]

  def logits(distances):
    xs = gpu.matmul(*((q, keys[n].transpose((1, 0))) for n in distances))

    def beyond(*xs):
      """Without the tiles before the sequence, which do not exist."""
      exists = lambda n: jnp.where(own >= n, jnp.float32(0), -jnp.inf)
      return tuple(x if n == 0 else x + exists(n) for x, n in zip(xs, distances, strict=True))

    if farthest := distances[-1]:
      xs = lax.cond(own >= farthest, lambda *xs: xs, beyond, *xs)
    mask = None
    if len(distances) > 1:
      x = jnp.where(difference >= 0, *xs)
      if band.far < last * TILE:  # the window ends inside a tile
        mask = band.mask(difference) | band.mask(difference + last * TILE)
    else:
      (x,), (n,) = xs, distances
      mask = same[n]
      if not band.covers(n):
        inside = band.mask(difference + n * TILE)
        mask = inside if mask is None else mask & inside
    return x if mask is None else jnp.where(mask, x, -jnp.inf)

  def parts(p, distances):
    """Of the weights of a tile, the operands for each of the tiles that it is made of."""
    p = p.astype(q.dtype)
    if len(distances) == 1:
      return [p]
    bits = lax.bitcast_convert_type(p, jnp.int16)
    return [lax.bitcast_convert_type(x, p.dtype) for x in (bits & near, bits & ~near)]

  for first in range(0, len(tiles), AT_ONCE):
    chosen = tiles[first : first + AT_ONCE]
    xs = [logits(distances) for distances in chosen]
    ps, (total, top, weight) = _softmax(state, xs, scale, Dv)
    pairs = [
      (part, values[n])
      for p, distances in zip(ps, chosen, strict=True)
      for part, n in zip(parts(p, distances), distances, strict=True)
    ]
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
