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
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View

NO_MAXIMUM = -1e30  # finite: the maximum of a row before its first key


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
  Dv, group = v.shape[3], H // k.shape[2]
  nt, W = view.num_tiles, warpgroups
  own_stage = prev is not None or Dk != Dv  # the result is staged where q was, if it fits there
  inputs = [view(x) for x in (q, k, v)]
  inputs += [ids] if ids is not None else []
  inputs += [view(prev[0]), prev[1]] if prev is not None else []
  scratch = dict(
    q_s=gpu.smem(nt, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(nt, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(nt, TILE, Dv, dtype=q.dtype),
    lse_s=gpu.vector(nt, TILE),
    q_full=gpu.Barrier(num_barriers=nt),
    k_full=gpu.Barrier(num_barriers=nt),
    v_full=gpu.Barrier(num_barriers=nt),
  )
  if own_stage:
    scratch |= dict(o_s=gpu.smem(nt, TILE, Dv, dtype=q.dtype))
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=nt, num_arrivals=2))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=q.dtype))

  def body(*refs, q_s, k_s, v_s, lse_s, q_full, k_full, v_full, o_s=None, prev_full=None, p_s=None):
    q_ref, k_ref, v_ref, *more, o_ref, lse_ref = refs
    ids_ref = more.pop(0) if ids is not None else None
    b, r, h, wg = (lax.axis_index(name) for name in ("b", "r", "h", "wg"))
    head = head_of(heads, h)
    kv_head = head // group
    p_s = None if p_s is None else p_s.at[wg]
    stage = o_s if own_stage else q_s

    @gpu.when(wg == 0)
    def _():
      @gpu.loop(0, nt)
      def _(t):
        gpu.to_smem(view.box(q_ref, b, r, head, t * TILE), q_s.at[t], q_full.at[t])
        gpu.to_smem(view.box(k_ref, b, r, kv_head, t * TILE), k_s.at[t], k_full.at[t])
        gpu.to_smem(view.box(v_ref, b, r, kv_head, t * TILE), v_s.at[t], v_full.at[t])
        if prev is not None:
          gpu.to_smem(view.box(more[0], b, r, h, t * TILE), o_s.at[t], prev_full.at[t])
          lse = more[1].at[b, h, r, gpu.ds(t * TILE, TILE)]
          gpu.to_smem(lse, lse_s.at[t], prev_full.at[t])

    @gpu.loop(wg, nt, step=W)
    def _(own):
      # Tiles that an earlier turn of this warpgroup has waited for.
      new_tiles = jnp.where(own == wg, 0, own - W + 1 - band.first())
      gpu.barrier_wait(q_full.at[own])
      q_tile = q_s.at[own]
      ids_q = None if ids is None else _ids(ids_ref, b, r, own, ROW)
      if prev is None:
        state = start(Dv)
      else:
        gpu.barrier_wait(prev_full.at[own])
        state = resume(stage.at[own], lse_s.at[own])

      def step(t, state, masked):
        @gpu.when(t >= new_tiles)  # each barrier completes, and is waited for, once
        def _():
          gpu.barrier_wait(k_full.at[t])
          gpu.barrier_wait(v_full.at[t])

        mask = None
        if masked:
          difference = gpu.iota((TILE, TILE), 0) - gpu.iota((TILE, TILE), 1)
          mask = band.mask(difference + (own - t) * TILE)
        if ids is not None:
          same = _same(ids_q, _ids(ids_ref, b, r, t, COLUMN))
          mask = same if mask is None else mask & same
        return attend(state, q_tile, k_s.at[t], v_s.at[t], mask, scale, p_s)

      state = sweep(own, band, step, state)
      finish(state, stage.at[own], lse_s.at[own])
      gpu.commit_smem()
      gpu.to_gmem(stage.at[own], view.box(o_ref, b, r, h, own * TILE))
      gpu.to_gmem(lse_s.at[own], lse_ref.at[b, h, r, gpu.ds(own * TILE, TILE)])

    gpu.wait_to_gmem(0)

  out_type = (
    jax.ShapeDtypeStruct((*inputs[0].shape[:-2], len(heads), Dv), q.dtype),
    jax.ShapeDtypeStruct((B, len(heads), view.R, nt * TILE), jnp.float32),
  )
  out, lse = gpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=(B, view.R, len(heads)),
    grid_names=("b", "r", "h"),
    num_threads=W,
    thread_name="wg",
  )(*inputs)
  return out.reshape(B, T, len(heads), Dv), lse


def window(view: View, band: Band, q, k, v, ids, prev, *, scale, heads, run: int, stages: int):
  """Attention to a window of the keys before each query, in one walk along the sequence.

  A block of threads walks over `run` tiles of queries behind a ring of `stages` tiles of keys and
  values; all else as in `resident`. The logits of a whole window are in registers at once, which
  bounds the window (see `MAX_REACH`). A tile of the ring is free once its last query tile has read
  it, and is then filled with the next.
  """
  B, T, H, Dk = q.shape
  Dv, group = v.shape[3], H // k.shape[2]
  nt = view.num_tiles
  reach = band.last(nt)
  S = max(stages, reach + 1)
  inputs = [view(x) for x in (q, k, v)]
  inputs += [ids] if ids is not None else []
  inputs += [view(prev[0]), prev[1]] if prev is not None else []
  scratch = dict(
    q_s=gpu.smem(2, TILE, Dk, dtype=q.dtype),
    k_s=gpu.smem(S, TILE, Dk, dtype=q.dtype),
    v_s=gpu.smem(S, TILE, Dv, dtype=q.dtype),
    o_s=gpu.smem(1, TILE, Dv, dtype=q.dtype),
    lse_s=gpu.vector(1, TILE),
    q_full=gpu.Barrier(num_barriers=2),
    kv_full=gpu.Barrier(num_barriers=S, num_arrivals=2),
  )
  if prev is not None:
    scratch |= dict(prev_full=gpu.Barrier(num_arrivals=2))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(TILE, TILE, dtype=q.dtype))

  def body(*refs, q_s, k_s, v_s, o_s, lse_s, q_full, kv_full, prev_full=None, p_s=None):
    q_ref, k_ref, v_ref, *more, o_ref, lse_ref = refs
    ids_ref = more.pop(0) if ids is not None else None
    b, c, r, h = (lax.axis_index(name) for name in ("b", "c", "r", "h"))
    head = head_of(heads, h)
    kv_head = head // group
    begin = c * run
    end = jnp.minimum(begin + run, nt)
    stage, lse_row = o_s.at[0], lse_s.at[0]
    slot_of = lambda tile: lax.rem(tile - begin + reach, jnp.int32(S))

    def load_keys(tile):
      # Tiles before the sequence are never attended, but must hold numbers: tile 0 will do.
      row, slot = jnp.maximum(tile, 0) * TILE, slot_of(tile)
      gpu.to_smem(view.box(k_ref, b, r, kv_head, row), k_s.at[slot], kv_full.at[slot])
      gpu.to_smem(view.box(v_ref, b, r, kv_head, row), v_s.at[slot], kv_full.at[slot])

    def load_queries(tile):
      slot = lax.rem(tile - begin, jnp.int32(2))
      gpu.to_smem(view.box(q_ref, b, r, head, tile * TILE), q_s.at[slot], q_full.at[slot])

    load_queries(begin)
    gpu.loop(begin - reach, jnp.minimum(begin - reach + S, end))(load_keys)

    @gpu.loop(0, reach)
    def _(n):
      gpu.barrier_wait(kv_full.at[n])

    @gpu.loop(begin, end)
    def _(own):
      gpu.when(own + 1 < end)(lambda: load_queries(own + 1))
      state = None
      if prev is not None:
        gpu.wait_to_gmem(0, wait_read_only=True)
        gpu.to_smem(view.box(more[0], b, r, h, own * TILE), stage, prev_full)
        lse = more[1].at[b, h, r, gpu.ds(own * TILE, TILE)]
        gpu.to_smem(lse, lse_row, prev_full)
        gpu.barrier_wait(prev_full)
        state = resume(stage, lse_row)
      q_slot = lax.rem(own - begin, jnp.int32(2))
      gpu.barrier_wait(q_full.at[q_slot])
      gpu.barrier_wait(kv_full.at[slot_of(own)])
      same = [None] * (reach + 1)
      if ids is not None:
        ids_q = _ids(ids_ref, b, r, own, ROW)
        tiles = [jnp.maximum(own - distance, 0) for distance in range(reach + 1)]
        same = [_same(ids_q, _ids(ids_ref, b, r, tile, COLUMN)) for tile in tiles]
      slots = [slot_of(own - distance) for distance in range(reach + 1)]
      tiles = q_s.at[q_slot], [k_s.at[slot] for slot in slots], [v_s.at[slot] for slot in slots]

      def attend(own):
        return attend_window(state, band, own, *tiles, same, scale, p_s)

      # Only the first tiles of a sequence have to ask which keys exist.
      if reach == 0:
        state = attend(None)
      else:
        state = lax.cond(own >= reach, lambda: attend(None), lambda: attend(own))
      gpu.when(own + S - reach < end)(lambda: load_keys(own + S - reach))
      gpu.wait_to_gmem(0, wait_read_only=True)
      finish(state, stage, lse_row)
      gpu.commit_smem()
      gpu.to_gmem(stage, view.box(o_ref, b, r, h, own * TILE))
      gpu.to_gmem(lse_row, lse_ref.at[b, h, r, gpu.ds(own * TILE, TILE)])

    gpu.wait_to_gmem(0)

  out_type = (
    jax.ShapeDtypeStruct((*inputs[0].shape[:-2], len(heads), Dv), q.dtype),
    jax.ShapeDtypeStruct((B, len(heads), view.R, nt * TILE), jnp.float32),
  )
  out, lse = gpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=(B, -(-nt // run), view.R, len(heads)),
    grid_names=("b", "c", "r", "h"),
    num_threads=1,
    thread_name="wg",
  )(*inputs)
  return out.reshape(B, T, len(heads), Dv), lse


# ----------------------------------------------------------------------- one tile of queries


def start(Dv: int):
  """The state of an online softmax before any key."""
  return gpu.zeros((TILE, Dv)), gpu.full((TILE,), NO_MAXIMUM), gpu.full((TILE,), 0.0)


def resume(out, lse):
  """The state that ended in `out` and `lse`, of base 2, both in shared memory."""
  total = gpu.load(out, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
  lse = gpu.load(lse, layout=ROW, optimized=False)
  # An empty row goes on from nothing.
  return total, jnp.maximum(lse, NO_MAXIMUM), jnp.where(lse > NO_MAXIMUM, 1.0, 0.0)


def sweep(own, band: Band, step, state):
  """All key tiles of query tile `own` of a causal band; masks only where they are needed."""
  first, first_full = band.first(), band.first_full()
  full = jnp.maximum(own - first_full + 1, 0)
  state = lax.fori_loop(0, full, lambda t, state: step(t, state, False), state)
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
  """The state after a window: the tiles 0, 1, ... before the query's own, all at once.

  Args:
    own: the number of the query's own tile where earlier ones may not exist, else None.
    same: per tile, which pairs share a segment, or None.
  """
  xs = list(gpu.matmul(*((q, k.transpose((1, 0))) for k in keys)))
  difference = gpu.iota((TILE, TILE), 0) - gpu.iota((TILE, TILE), 1)
  if own is not None:
    exists = [jnp.where(own >= n, jnp.float32(0), -jnp.inf) for n in range(1, len(xs))]
    xs = [xs[0], *(x + here for x, here in zip(xs[1:], exists, strict=True))]
  # The two edges of such a window complement each other: row i sees j <= i of the near tile and
  # j > i of the far one. Together they are one full tile, with half the exponentials of two.
  folds = band.folds(len(xs)) and same[0] is None
  if folds:
    xs = [jnp.where(difference >= 0, xs[0], xs[-1]), *xs[1:-1]]
  else:
    for n, x in enumerate(xs):
      mask = same[n]
      if not band.covers(n):
        inside = band.mask(difference + n * TILE)
        mask = inside if mask is None else mask & inside
      xs[n] = x if mask is None else jnp.where(mask, x, -jnp.inf)
  ps, (total, top, weight) = _softmax(state, xs, scale, values[0].shape[1])
  if folds:
    edge = ps[0]
    near, far = jnp.where(difference >= 0, edge, 0.0), jnp.where(difference >= 0, 0.0, edge)
    ps = [near, *ps[1:], far]
  pairs = [(p.astype(q.dtype), v) for p, v in zip(ps, values, strict=True)]
  (total,) = gpu.add_matmul((total, *pairs), scratch=scratch)
  return total, top, weight


def _softmax(state, xs, scale, Dv: int | None = None):
  """Weights of the logits in xs, and the state with its sum of values rescaled, none added."""
  c = scale * gpu.LOG2E
  top = functools.reduce(jnp.maximum, xs).max(axis=1) * c
  top = jnp.maximum(top, NO_MAXIMUM if state is None else state[1])
  ps = [jnp.exp2(x * c - gpu.over_columns(top, TILE)) for x in xs]
  weight = functools.reduce(jnp.add, ps).sum(axis=1)
  if state is None:
    return ps, (gpu.zeros((TILE, Dv)), top, weight)
  total, old_top, old_weight = state
  keep = jnp.exp2(old_top - top)
  total = total * gpu.over_columns(keep, total.shape[1])
  return ps, (total, top, old_weight * keep + weight)


def finish(state, out, lse):
  """Writes the result of a state to shared memory."""
  total, top, weight = state
  share = jnp.where(weight == 0, 0.0, 1 / weight)
  out[...] = (total * gpu.over_columns(share, total.shape[1])).astype(out.dtype)
  lse[...] = jnp.where(weight == 0, -jnp.inf, top + jnp.log2(weight))


def _ids(ref, b, r, tile, layout):
  return gpu.load(ref.at[b, r, gpu.ds(tile * TILE, TILE)], layout=layout, optimized=False)


def _same(ids_q, ids_k):
  """Which pairs share a segment."""
  return gpu.over_columns(ids_q, TILE) == gpu.over_rows(ids_k, TILE)
