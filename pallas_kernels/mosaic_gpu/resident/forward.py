"""Forward kernel of short sequences: a thread block holds all keys and values of one.

    shared memory                      warpgroups take query tiles in turn, here two of four
      q  [0] [1] [2] [3]               0: [0] --> keys [0]          then [2] --> keys [0] [1] [2]
      k  [0] [1] [2] [3]               1: [1] --> keys [0] [1]      then [3] --> keys [0] ... [3]
      v  [0] [1] [2] [3]

A sequence is read once, so there is no ring: warpgroup 0 starts all copies before its own work, and
each tile has a barrier, which whoever needs the tile waits for. All warpgroups wait for k and v of
the tiles they meet, for q only of their own. Nothing is freed but the room of a query tile, where
its result is staged on its way out.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View


def forward(
  view: View,
  band: Band,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  ids: Int[Array, "B R Mp"] | None,
  kv_ids: Int[Array, "B R Mp"] | None,
  prev: tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]] | None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  warpgroups: int,
) -> tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]]:
  """Attention inside each sequence of a view.

  Args:
    view: the sequences.
    band: which pairs of a sequence attend.
    q, k, v: all heads.
    ids: segment ids, in rows of the view; queries see keys of equal ids.
    kv_ids: those of keys; None: keys have those of the queries.
    prev: out and lse over other keys, which share the softmax.
    scale: of the logits, positive.
    heads: the query heads to work on, Hg of them.
    warpgroups: of a thread block, which share keys and values.

  Returns:
    out, and lse of base 2 in rows of the view, float32.
  """
  (B, T, H, Dk), Dv, Hg = q.shape, v.shape[3], len(heads)
  nt = view.num_tiles
  # As many turns for each warpgroup: a bound that ptxas knows saves registers.
  W = next(n for n in range(warpgroups, 0, -1) if nt % n == 0)
  # The result is staged where `prev` or q was, if it fits there: nobody else reads a query tile,
  # and with less memory more thread blocks run at a time.
  stage = "prev" if prev is not None else "q" if Dk == Dv else "o"
  inputs = dict(q=view(q), k=view(k), v=view(v), ids=ids, kv_ids=kv_ids)
  if prev is not None:
    inputs |= dict(prev=view(prev[0]), prev_lse=prev[1])
  inputs = {name: x for name, x in inputs.items() if x is not None}
  out = jax.ShapeDtypeStruct((*inputs["q"].shape[:-2], Hg, Dv), q.dtype)
  lse = jax.ShapeDtypeStruct((B, Hg, view.R, nt * TILE), jnp.float32)
  sizes = Sizes(view, band, tuple(heads), H // k.shape[2], W, stage, Dv, scale)
  out, lse = gpu.launch(
    "resident_forward",
    lambda refs: Sequence(sizes, refs).run(),
    inputs=inputs,
    outputs=dict(out=out, lse=lse),
    scratch=_scratch(sizes, Dk, q.dtype),
    # Heads are the fastest axis: they are neighbours in memory, so that thread blocks that run at
    # the same time read whole pages.
    grid=(B, view.R, Hg),
    grid_names=("b", "r", "h"),
    num_threads=W,
    thread_name="wg",
  )
  return out.reshape(B, T, Hg, Dv), lse


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is known before the kernel runs; attributes as in `forward`, but for these.

  Attributes:
    group: query heads that share a key head.
    stage: whose room the result is staged in, "o" for its own.
  """

  view: View
  band: Band
  heads: tuple[int, ...]
  group: int
  warpgroups: int
  stage: str
  Dv: int
  scale: float

  @property
  def num_tiles(self) -> int:
    return self.view.num_tiles

  @property
  def rows(self) -> int:
    """Of a tile. Matrix instructions have 64; where these are less, the last are not stored."""
    return self.view.even_rows

  @property
  def padding(self) -> int:
    """Rows of lse that no tile covers where tiles have less than 64 rows."""
    return self.num_tiles * (TILE - self.rows)


def _scratch(sizes: Sizes, Dk: int, dtype: jax.typing.DTypeLike) -> dict:
  nt, rows, Dv, W = sizes.num_tiles, sizes.rows, sizes.Dv, sizes.warpgroups
  loads = ["q", "k", "v"] + ["prev"] * (sizes.stage == "prev")
  scratch = {f"{name}_full": gpu.Barrier(num_barriers=nt) for name in loads}
  scratch |= dict(
    q_s=gpu.smem(nt, TILE, Dk, dtype=dtype),
    k_s=gpu.smem(nt, rows, Dk, dtype=dtype),
    # Multiplied over its rows, of which matrix instructions take spans of a power of two.
    v_s=gpu.smem(nt, rows, Dv, dtype=dtype, beside=rows & -rows),
    lse_s=gpu.vector(W, TILE),
  )
  # The result leaves from where q was, unless sizes differ or `prev` has a place in any case.
  if sizes.stage != "q":
    scratch[f"{sizes.stage}_s"] = gpu.smem(nt, TILE, Dv, dtype=dtype)
  if sizes.padding:
    # Zeros, for rows of lse that no tile covers.
    scratch |= dict(tail_s=gpu.vector(TILE))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, rows, dtype=dtype))
  return dict(sorted(scratch.items()))  # a place in memory does not depend on the order above


class Sequence:
  """One sequence of one head: what a thread block works on."""

  def __init__(self, sizes: Sizes, refs: dict):
    self.sizes, self.refs = sizes, refs
    self.b, self.r, self.h, self.wg = (lax.axis_index(name) for name in ("b", "r", "h", "wg"))
    self.head = head_of(sizes.heads, self.h)
    self.kv_head = self.head // sizes.group
    self.p_s = refs["p_s"].at[self.wg] if gpu.simulated() else None
    self.valid = gpu.ds(0, sizes.rows)  # the rows of a tile of 64 that exist

  def run(self) -> None:
    sizes, W = self.sizes, self.sizes.warpgroups
    # No warpgroup of its own for loads: all copies are started at once, after which it would idle.
    gpu.when(self.wg == 0)(self.load)
    if sizes.padding:
      gpu.when(self.wg == W - 1)(self.fill_tail)  # this warpgroup has the last tile, and sends it
    # In turn, not in halves: early tiles have few keys, which come first, and late ones many.
    gpu.loop(0, sizes.num_tiles // W)(self.attend)
    gpu.wait_to_gmem(0)  # shared memory is another's when the thread block ends

  def box(self, name: str, head: Traced, t: Traced) -> Ref:
    rows = self.sizes.rows
    return self.sizes.view.box(self.refs[name], self.b, self.r, head, t * rows, rows)

  def load(self) -> None:
    """Starts the copies of all tiles, those of early queries and keys first."""
    refs = self.refs

    @gpu.loop(0, self.sizes.num_tiles)
    def _(t: Traced) -> None:
      # k and v of a tile are waited for by all warpgroups, its q and `prev` by one alone.
      full = lambda name: refs[f"{name}_full"].at[t]
      gpu.to_smem(self.box("q", self.head, t), refs["q_s"].at[t, self.valid], full("q"))
      gpu.to_smem(self.box("k", self.kv_head, t), refs["k_s"].at[t], full("k"))
      gpu.to_smem(self.box("v", self.kv_head, t), refs["v_s"].at[t], full("v"))
      if "prev" in refs:
        gpu.to_smem(self.box("prev", self.h, t), refs["prev_s"].at[t, self.valid], full("prev"))

  def fill_tail(self) -> None:
    self.refs["tail_s"][...] = gpu.full((TILE,), 0.0)

  def attend(self, turn: Traced) -> None:
    """Attends with this warpgroup's query tile of a turn, and stores the result."""
    sizes, refs = self.sizes, self.refs
    own = turn * sizes.warpgroups + self.wg
    # The first key tile that no earlier turn of this warpgroup has waited for. A barrier completes
    # once here, and a second wait for it would be for a completion that never comes.
    waited = jnp.where(turn == 0, 0, own - sizes.warpgroups + 1 - sizes.band.first(sizes.rows))
    rows = gpu.ds(own * sizes.rows, TILE)
    gpu.barrier_wait(refs["q_full"].at[own])
    q = refs["q_s"].at[own]
    query_ids = self.ids(refs["ids"], own, TILE, ROW) if "ids" in refs else None
    if "prev" not in refs:
      state = softmax.start(sizes.Dv)
    else:
      lse = refs["prev_lse"].at[self.b, self.h, self.r, rows]
      # Straight from device memory, while the copy of `prev` is under way: nobody else reads it.
      lse = gpu.load(lse, layout=ROW, optimized=False)
      gpu.barrier_wait(refs["prev_full"].at[own])
      state = softmax.resume(refs["prev_s"].at[own], lse, sizes.scale)

    def step(t: Traced, state: softmax.State, masked: bool) -> softmax.State:
      @gpu.when(t >= waited)
      def _() -> None:
        gpu.barrier_wait(refs["k_full"].at[t])
        gpu.barrier_wait(refs["v_full"].at[t])

      mask = self.mask(own, t, masked, query_ids)
      k, v = refs["k_s"].at[t], refs["v_s"].at[t]
      return add_keys(state, q, k, v, mask, sizes.scale, self.p_s)

    self.store(own, sweep(own, sizes.num_tiles, sizes.band, sizes.rows, step, state))

  def ids(self, ref: Ref, t: Traced, size: int, layout: Any) -> Traced:
    return pairs.segments(ref, self.b, self.r, t * self.sizes.rows, size, layout)

  def mask(self, own: Traced, t: Traced, masked: bool, query_ids: Traced | None) -> Traced | None:
    """Which pairs of query tile `own` and key tile t attend, or None for all."""
    size, mask = self.sizes.rows, None
    if masked:
      # Positions as two iotas: one of both axes would be divided by `size`, element by element.
      columns = gpu.over_rows(gpu.iota((size,), layout=COLUMN), TILE)
      difference = gpu.over_columns(gpu.iota((TILE,), layout=ROW), size) - columns
      mask = self.sizes.band.mask(difference + (own - t) * size)
    # On the diagonal and off it: a document may end anywhere.
    if query_ids is not None:
      key_ids = self.ids(pairs.key_ids(self.refs), t, size, COLUMN)
      mask = pairs.both(mask, pairs.share_segment(query_ids, key_ids))
    return mask

  def store(self, own: Traced, state: softmax.State) -> None:
    """Sends out and lse of a query tile on their way."""
    refs, size, nt = self.refs, self.sizes.rows, self.sizes.num_tiles
    stage, lse_s = refs[f"{self.sizes.stage}_s"].at[own], refs["lse_s"].at[self.wg]
    # lse has one room a warpgroup, from which that of the turn before may still leave.
    gpu.wait_to_gmem(0, wait_read_only=True)
    lse_s[...] = softmax.store(state, stage, self.sizes.scale)
    gpu.commit_smem()  # what threads wrote, before the copy engine reads it
    gpu.to_gmem(refs[f"{self.sizes.stage}_s"].at[own, self.valid], self.box("out", self.h, own))
    lse_rows = lambda start, rows: refs["lse"].at[self.b, self.h, self.r, gpu.ds(start, rows)]
    gpu.to_gmem(refs["lse_s"].at[self.wg, self.valid], lse_rows(own * size, size))
    if padding := self.sizes.padding:  # `View.rows` has zeros there
      tail = refs["tail_s"].at[gpu.ds(0, padding)]
      gpu.when(own == nt - 1)(lambda: gpu.to_gmem(tail, lse_rows(nt * size, padding)))


def sweep(
  own: Traced, num_tiles: int, band: Band, size: int, step: Callable, state: softmax.State
) -> softmax.State:
  """All key tiles of query tile `own` of a causal band; masks only where they are needed.

  step(t, state, masked) gives the state after key tile t.
  """
  first, first_full = band.first(size), band.first_full(size)
  full = jnp.maximum(own - first_full + 1, 0)
  if num_tiles > first_full:
    state = lax.fori_loop(0, full, functools.partial(step, masked=False), state)
  # One masked tile, the query tile's own, needs no loop: with two loops that carry one accumulator
  # ptxas would wait after every matrix instruction (C7511).
  if (first, first_full) == (0, 1):
    return step(own, state, masked=True)
  end = jnp.maximum(own - first + 1, 0)
  return lax.fori_loop(full, end, functools.partial(step, masked=True), state)


def add_keys(
  state: softmax.State,
  q: Ref,
  k: Ref,
  v: Ref,
  mask: Traced | None,
  scale: float,
  scratch: Ref | None,
) -> softmax.State:
  """The state after the keys and values of a tile."""
  (x,) = gpu.matmul((q, pairs.transposed(k)))
  # After the products: what a mask compares would else be kept in registers meanwhile.
  if mask is not None:
    x = jnp.where(mask, x, -jnp.inf)
  (p,), state = softmax.rescale(state, [x], scale)
  (total,) = gpu.add_matmul((state.total, (p.astype(q.dtype), v)), scratch=scratch)
  return state._replace(total=total)
