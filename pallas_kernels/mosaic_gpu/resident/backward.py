"""Backward kernel of short sequences: a thread block owns tiles of one, and reads each tensor once.

dq of a query tile and dk, dv of a key tile are accumulators of one warpgroup: no atomics, and no
sum in another order from run to run. Of its own tiles a thread block makes all three, so it holds
q and dout of these and of later tiles, k and v of these and of earlier ones. Here it owns 2, 3 of
six tiles:

    shared memory, one pool of slots     sweeps of own tile 2
      q, dout  [2] [3] [4] [5]             dk, dv: queries 3, 4, 5, then 2 (masked)
      k, v     [0] [1] [2] [3]             dq:     keys    1, 0, then 2 (masked)

    1  warpgroup 0 starts all copies; each tile has a barrier, which all warpgroups wait for
    2  the warpgroups make delta of dout and out, each for every W-th query tile
    3  they wait for each other ("delta_full"), since all of them need all of delta
    4  each makes dk, dv and dq of every W-th own tile

The weights are computed twice, for dk, dv and for dq: 7 matrix products a pair of tiles. A thread
block that owns all of a very short sequence keeps dS^T of every pair in shared memory instead, and
step 4 is in two halves with a barrier ("ds_full") between them: 5 products.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.resident import last_first
from pallas_kernels.mosaic_gpu.resident import short
from pallas_kernels.mosaic_gpu.resident import tiles
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import View

GRADIENTS = ("dq", "dk", "dv")


def backward(
  view: View,
  band: Band,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  ids: Int[Array, "B R Mp"] | None,
  kv_ids: Int[Array, "B R Mp"] | None,
  out: Float[Array, "B T Hg Dv"] | None,
  lse: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg Dv"],
  dlse: Float[Array, "B Hg R Mp"] | None,
  delta: Float[Array, "B Hg R Mp"] | None,
  prev: Sequence[Array] | None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  own_tiles: int,
  warpgroups: int,
  keeps_ds: bool,
) -> tuple[Array, Array, Array, Float[Array, "B Hg R Mp"]]:
  """Gradients of attention to a causal band of keys inside each sequence of a view.

  Args:
    view, band, ids, kv_ids, scale, heads: as for `forward`.
    q, k, v: all heads.
    out, dout: the result of the heads' whole softmax, None with `delta`; its cotangent.
    lse, dlse: base 2, and the cotangent of the natural one, in rows of the view.
    delta: rowsum(dout out) - dlse, 0 for rows without keys; None to make it.
    prev: dq, dk, dv [B, T, Hg, D] of other keys to add to, or None.
    own_tiles: of a thread block.
    warpgroups: of a thread block.
    keeps_ds: whether dS^T stays in shared memory, if the thread block has all tiles.

  Returns:
    dq, dk, dv [B, T, Hg, D], k's and v's for each query head; and delta.
  """
  if ids is None and short.takes(view, band, q.shape[-1], v.shape[-1]):
    rows = lse, dout, dlse, delta
    return short.backward(view, band, q, k, v, out, *rows, prev, scale=scale, heads=heads)
  (B, T, H, Dk), Dv, Hg = q.shape, v.shape[3], len(heads)
  nt = view.num_tiles
  # Equal parts for each thread block and warpgroup: bounds that ptxas knows save registers.
  own_tiles = next(n for n in range(min(own_tiles, nt), 0, -1) if nt % n == 0)
  W = next(n for n in range(warpgroups, 0, -1) if own_tiles % n == 0)
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse)
  inputs |= dict(row_ids=ids, column_ids=ids, dlse=dlse, delta=delta)
  inputs |= dict(kv_row_ids=kv_ids, kv_column_ids=kv_ids)
  inputs |= dict(out=None if out is None else view(out))
  if prev is not None:
    inputs |= {f"prev_{name}": view(x) for name, x in zip(GRADIENTS, prev, strict=True)}
  inputs = {name: x for name, x in inputs.items() if x is not None}
  like = lambda D: jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], Hg, D), q.dtype)
  rows = jax.ShapeDtypeStruct((B, Hg, view.R, nt * TILE), jnp.float32)
  sizes = tiles.Sizes(
    view, band, tuple(heads), H // k.shape[2], own_tiles, W, keeps_ds, Dk, Dv, scale
  )
  dq, dk, dv, new_delta = gpu.launch(
    "resident_backward",
    lambda refs: (LastFirst if sizes.last_first else Gradients)(sizes, refs).run(),
    inputs=inputs,
    outputs=dict(dq=like(Dk), dk=like(Dk), dv=like(Dv), new_delta=rows),
    scratch=_scratch(sizes, q.dtype, adds=prev is not None),
    # Thread blocks of a sequence run at the same time: what several read comes from the cache.
    # Heads, which are neighbours in memory, are the fastest axis.
    grid=(B, view.R, sizes.num_groups, Hg),
    grid_names=("b", "r", "g", "h"),
    num_threads=W,
    thread_name="wg",
  )
  dq, dk, dv = (x.reshape(B, T, Hg, -1) for x in (dq, dk, dv))
  return dq, dk, dv, new_delta if delta is None else delta


def _scratch(sizes: tiles.Sizes, dtype: jax.typing.DTypeLike, adds: bool) -> dict:
  nt, W, Dk, Dv = sizes.num_tiles, sizes.warpgroups, sizes.Dk, sizes.Dv
  scratch = dict(
    qk_s=gpu.smem(sizes.num_slots, TILE, Dk, dtype=dtype),
    dout_v_s=gpu.smem(sizes.num_slots, TILE, Dv, dtype=dtype),
    out_s=gpu.smem(W, TILE, Dv, dtype=dtype),  # then the stage of dv
    lse_s=gpu.vector(nt, TILE),
    delta_s=gpu.vector(nt, TILE),
    q_full=gpu.Barrier(num_barriers=nt, num_arrivals=3),  # q, dout, lse
    k_full=gpu.Barrier(num_barriers=sizes.num_slots, num_arrivals=2),  # k, v
    out_full=gpu.Barrier(num_barriers=nt),
  )
  if sizes.last_first:
    scratch |= dict(delta_full=gpu.Barrier(num_barriers=nt))
  else:
    scratch |= dict(delta_full=gpu.Barrier(num_arrivals=W))
  if Dk != Dv:
    scratch |= dict(stage_s=gpu.smem(W, TILE, Dk, dtype=dtype))
  if sizes.keeps_ds:
    scratch |= dict(ds_s=gpu.smem(sizes.num_pairs, TILE, TILE, dtype=dtype, beside=Dk))
    scratch |= dict(ds_full=gpu.Barrier(num_arrivals=W))
  if adds:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=len(GRADIENTS) * W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=dtype))
  return dict(sorted(scratch.items()))  # a place in memory does not depend on the order above


class Gradients(tiles.Tiles):
  """What the warpgroups make of the own tiles."""

  def run(self) -> None:
    refs, nt = self.refs, self.sizes.num_tiles
    gpu.when(self.wg == 0)(self.load)
    # All waits come here, a tile at a time: sweeps meet a tile several times, and barriers complete
    # once.
    gpu.loop(self.begin, nt)(lambda t: gpu.barrier_wait(refs["q_full"].at[self.q_slot(t)]))
    if self.makes_delta:
      gpu.loop(self.begin + self.wg, nt, step=self.sizes.warpgroups)(self.make_delta)
      # All wait for all: a key tile needs delta of queries that other warpgroups have made.
      gpu.barrier_arrive(refs["delta_full"])
      gpu.barrier_wait(refs["delta_full"])
    else:
      gpu.loop(0, self.num_q)(lambda n: gpu.barrier_wait(refs["out_full"].at[n]))
    # Keys only now: making delta takes part of the time that they need to come.
    self.wait_for_keys(self.begin, self.end)
    if self.sizes.keeps_ds:
      self.each_own_tile(self.store_key_gradients)
      # dS^T of a query tile and the keys before it comes from all warpgroups, and is read by the
      # matrix units: hence the fence.
      gpu.commit_smem()
      gpu.barrier_arrive(refs["ds_full"])
      gpu.barrier_wait(refs["ds_full"])
      self.each_own_tile(self.store_query_gradient)
    else:
      self.each_own_tile(self.store_gradients)
    gpu.wait_to_gmem(0)

  def wait_for_keys(self, first: Traced, end: Traced) -> None:
    full = self.refs["k_full"]
    gpu.loop(first, end)(lambda t: gpu.barrier_wait(full.at[self.k_slot(t)]))

  def each_own_tile(self, body: Callable) -> None:
    """Calls body(tile) for every W-th own tile: those of this warpgroup."""
    W = self.sizes.warpgroups
    if self.sizes.keeps_ds:
      # A bound that ptxas knows saves registers in this short kernel; in the longer one, below, it
      # would cost spills.
      turns = self.sizes.own_tiles // W
      gpu.loop(0, turns)(lambda turn: body(self.begin + turn * W + self.wg))
    else:
      gpu.loop(self.begin + self.wg, self.end, step=W)(body)

  # ------------------------------------------------------------------------------ gradients

  def mask(self, q_tile: Traced, k_tile: Traced, query_axis: int, masked: bool) -> Traced | None:
    """Which pairs of two tiles attend, or None for all; the queries along an axis."""
    mask = None
    if masked:
      positions = lambda axis: gpu.iota((TILE, TILE), axis)
      difference = positions(query_axis) - positions(1 - query_axis)
      mask = self.sizes.band.mask(difference + (q_tile - k_tile) * TILE)
    if "row_ids" in self.refs:
      tiles_of_axes = (q_tile, k_tile) if query_axis == 0 else (k_tile, q_tile)
      ids = self.ids(query_axis)
      mask = pairs.both(mask, pairs.tiles_share_segment(*ids, self.b, self.r, *tiles_of_axes))
    return mask

  def ids(self, query_axis: int) -> tuple[Ref, Ref]:
    """The segment ids of rows and of columns; the queries along an axis."""
    refs = self.refs
    if "kv_row_ids" not in refs:
      return refs["row_ids"], refs["column_ids"]
    if query_axis == 0:
      return refs["row_ids"], refs["kv_column_ids"]
    return refs["kv_row_ids"], refs["column_ids"]

  def key_gradients(self, own: Traced) -> tuple[Traced, Traced]:
    """dk / scale and dv of an own key tile, over the queries from its own tile on."""
    sizes = self.sizes
    k, v = self.slot(self.k_slot(own))

    def step(t: Traced, state: Any, masked: bool) -> Any:
      dk, dv = state
      q, dout = self.slot(self.q_slot(t))
      ds_s = self.ds(t, own) if sizes.keeps_ds else None
      mask = self.mask(t, own, 1, masked)
      x, dp = products((k, pairs.transposed(q)), (v, pairs.transposed(dout)))
      # Only now, for 32 registers that the products can use: 167 instead of 182 are three thread
      # blocks of a multiprocessor instead of two.
      lse, delta = self.lse_and_delta(t, COLUMN)
      p = pairs.weights_by_key(x, lse, self.c, mask)
      ds = pairs.derivatives_by_key(p, dp, delta, k.dtype)
      if sizes.keeps_ds:
        ds_s[...] = ds
      return gpu.add_matmul((dk, (ds, q)), (dv, (p.astype(k.dtype), dout)), scratch=self.p_s)

    start = gpu.zeros((TILE, sizes.Dk)), gpu.zeros((TILE, sizes.Dv))
    return sweep(own, sizes.num_tiles - own, 1, sizes.num_tiles, sizes.band, step, start)

  def query_gradient(self, own: Traced) -> Traced:
    """dq / scale of an own query tile, over the keys up to its own tile."""
    sizes = self.sizes
    start = lambda: gpu.zeros((TILE, sizes.Dk))
    if sizes.keeps_ds:

      def add(t: Traced, dq: Traced) -> Traced:
        ds, (k, _) = pairs.transposed(self.ds(own, t)), self.slot(self.k_slot(t))
        return dq + gpu.matmul((ds, k))[0]

      # Without masks: dS^T is 0 where a pair does not attend.
      return lax.fori_loop(0, own + 1 - sizes.band.first(), add, start())
    # By row, outside of the loop: they are this query tile's own, and cost 2 registers each.
    (q, dout), (lse, delta) = self.slot(self.q_slot(own)), self.lse_and_delta(own, ROW)

    def step(t: Traced, dq: Traced, masked: bool) -> Any:
      k, v = self.slot(self.k_slot(t))
      mask = self.mask(own, t, 0, masked)
      x, dp = products((q, pairs.transposed(k)), (dout, pairs.transposed(v)))
      p = jnp.exp2(x * self.c - gpu.over_columns(lse, TILE))
      p = p if mask is None else jnp.where(mask, p, 0.0)
      ds = p * (dp - gpu.over_columns(delta, TILE))
      return gpu.add_matmul((dq, (ds.astype(q.dtype), k)), scratch=self.p_s)[0]

    return sweep(own, own + 1, -1, sizes.num_tiles, sizes.band, step, start())

  # --------------------------------------------------------------------------------- results

  def store_gradients(self, own: Traced) -> None:
    self.store_key_gradients(own)
    # Keys before the own ones are for dq alone.
    gpu.when(own == self.begin + self.wg)(lambda: self.wait_for_keys(0, self.begin))
    self.store_query_gradient(own)

  def store_key_gradients(self, own: Traced) -> None:
    dk, dv = self.key_gradients(own)
    self.store(dv, self.stage_v, "dv", own)
    self.store(dk * self.sizes.scale, self.stage_k, "dk", own)
    if self.makes_delta:  # every query tile is the own one of one thread block, which says it
      gpu.to_gmem(self.refs["delta_s"].at[self.q_slot(own)], self.rows("new_delta", own))

  def store_query_gradient(self, own: Traced) -> None:
    self.store(self.query_gradient(own) * self.sizes.scale, self.stage_k, "dq", own)

  def store(self, value: Traced, stage: Ref, name: str, t: Traced) -> None:
    """Sends a tile of a gradient on its way, with what `prev` has of it added."""
    refs = self.refs
    gpu.wait_to_gmem(0, wait_read_only=True)  # what was staged here before has left
    if "prev_full" in refs:
      # Loaded late, into the stage itself: there is no room for it earlier.
      full = refs["prev_full"].at[self.wg * len(GRADIENTS) + GRADIENTS.index(name)]
      gpu.to_smem(self.box(f"prev_{name}", self.h, t), stage, full)
      gpu.barrier_wait(full)
      value = value + pairs.load(stage)
    stage[...] = value.astype(stage.dtype)
    gpu.commit_smem()
    gpu.to_gmem(stage, self.box(name, self.h, t))


class LastFirst(last_first.LastFirst, Gradients):
  """The same in another order."""


def products(*factors: tuple[Ref, Ref]) -> tuple[Traced, ...]:
  """S and dP of a pair of tiles: both in flight together where that leaves enough registers."""
  # S and dP are 32 registers each, beside accumulators of (Dk + Dv) / 2: at 64 + 64 features both
  # fit, at 128 one at a time.
  if factors[0][0].shape[1] <= 64:
    return gpu.matmul(*factors)
  return tuple(gpu.matmul(pair)[0] for pair in factors)


def sweep(
  own: Traced, room: Traced, direction: int, num_tiles: int, band: Band, step: Callable, state: Any
) -> Any:
  """Steps over the `room` tiles from `own` on, in a direction; step(tile, state, masked) -> state.

  The masked tiles last. That is one tile without a loop where possible: after a second loop ptxas
  would wait for each matrix instruction by itself.
  """
  at = lambda distance: own + direction * distance
  first, first_full = band.first(), band.first_full()
  if num_tiles > first_full:
    full = lambda n, state: step(at(n), state, masked=False)
    state = lax.fori_loop(first_full, room, full, state)
  if (first, first_full) == (0, 1):
    return step(own, state, masked=True)
  masked = lambda n, state: step(at(n), state, masked=True)
  return lax.fori_loop(first, jnp.minimum(first_full, room), masked, state)
