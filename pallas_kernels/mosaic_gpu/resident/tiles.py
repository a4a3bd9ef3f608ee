"""The own tiles of a thread block of the backward kernel: where what they need lies, loads, delta.

A sequence of `num_tiles` tiles is cut into groups of `own_tiles`, one a thread block, which loads
every tensor once: q, dout and lse from its first own tile on, k and v up to its last. Query tile t
lies in slot t - begin; the keys come after the queries.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is known before the kernel runs; `group` query heads share a key head."""

  view: View
  band: Band
  heads: tuple[int, ...]
  group: int
  own_tiles: int
  warpgroups: int
  allows_ds: bool
  Dk: int
  Dv: int
  scale: float

  @property
  def num_tiles(self) -> int:
    return self.view.num_tiles

  @property
  def num_groups(self) -> int:
    """Thread blocks of a sequence."""
    return -(-self.num_tiles // self.own_tiles)

  @property
  def num_slots(self) -> int:
    """Tiles of queries from the own ones on, and of keys up to them, in one pool of memory."""
    return self.num_tiles + self.own_tiles

  @property
  def keeps_ds(self) -> bool:
    """Whether dS^T stays in shared memory, so that dq needs no weights of its own."""
    return self.num_groups == 1 and self.allows_ds

  @property
  def last_first(self) -> bool:
    """Whether the last tiles come first (`last_first`); results leave from where v was."""
    return self.keeps_ds and self.num_tiles > 2 and self.Dk == self.Dv

  @property
  def num_pairs(self) -> int:
    """Causal pairs of tiles."""
    return self.num_tiles * (self.num_tiles + 1) // 2


class Tiles:
  """The own tiles of a thread block: some of one sequence of one head."""

  step_of_out = 1  # delta is made of the first tiles first

  def __init__(self, sizes: Sizes, refs: dict):
    self.sizes, self.refs = sizes, refs
    self.b, g, self.r, self.h, self.wg = (lax.axis_index(x) for x in ("b", "g", "r", "h", "wg"))
    self.head = head_of(sizes.heads, self.h)
    self.kv_head = self.head // sizes.group
    self.begin = g * sizes.own_tiles
    self.end = self.begin + sizes.own_tiles
    self.num_q = sizes.num_tiles - self.begin
    self.makes_delta = "out" in refs
    self.p_s = refs["p_s"].at[self.wg] if gpu.simulated() else None
    # Gradients leave from where out was: delta is made by then.
    self.stage_v = refs["out_s"].at[self.wg]
    self.stage_k = self.stage_v if sizes.Dk == sizes.Dv else refs["stage_s"].at[self.wg]
    self.c = sizes.scale * gpu.LOG2E

  # ----------------------------------------------------------------------- where tiles lie

  def box(self, name: str, head: Traced, t: Traced) -> Ref:
    return self.sizes.view.box(self.refs[name], self.b, self.r, head, t * TILE)

  def rows(self, name: str, t: Traced) -> Ref:
    return self.refs[name].at[self.b, self.h, self.r, gpu.ds(t * TILE, TILE)]

  def q_slot(self, t: Traced) -> Traced:
    return t - self.begin

  def k_slot(self, t: Traced) -> Traced:
    # Keys lie behind the queries in the pool.
    return t + self.num_q

  def slot(self, n: Traced) -> tuple[Ref, Ref]:
    """q and dout of a slot of queries, k and v of one of keys."""
    return self.refs["qk_s"].at[n], self.refs["dout_v_s"].at[n]

  def ds(self, q_tile: Traced, k_tile: Traced) -> Ref:
    """The room of dS^T, where it is kept."""
    causal_pairs = lax.div(q_tile * (q_tile + 1), jnp.int32(2))  # of the query tiles before
    return self.refs["ds_s"].at[causal_pairs + k_tile]

  # ----------------------------------------------------------------------- loads and delta

  def load(self) -> None:
    """Starts the copies of all tiles; out through a room a warpgroup, as `make_delta` goes on."""
    # Queries before keys: delta, which is made first, needs no key.
    W = self.sizes.warpgroups
    queries = gpu.loop(self.begin, self.sizes.num_tiles)
    queries(lambda t: self.load_queries(t, self.q_slot(t) < W))
    # From the last on: dk and dv need the own ones alone.
    gpu.loop(0, self.end)(lambda distance: self.load_keys(self.end - 1 - distance))

  def load_queries(self, t: Traced, with_out: Traced) -> None:
    """`with_out`: there is room for W tiles of out, from which delta is made in turn."""
    refs, n = self.refs, self.q_slot(t)
    full = refs["q_full"].at[n]
    gpu.to_smem(self.box("dout", self.h, t), refs["dout_v_s"].at[n], full)
    gpu.to_smem(self.box("q", self.head, t), refs["qk_s"].at[n], full)
    gpu.to_smem(self.rows("lse", t), refs["lse_s"].at[n], full)
    if self.makes_delta:
      gpu.when(with_out)(lambda: self.load_out(t))
    else:
      gpu.to_smem(self.rows("delta", t), refs["delta_s"].at[n], refs["out_full"].at[n])

  def load_keys(self, t: Traced) -> None:
    refs, n = self.refs, self.k_slot(t)
    full = refs["k_full"].at[n]
    gpu.to_smem(self.box("k", self.kv_head, t), refs["qk_s"].at[n], full)
    gpu.to_smem(self.box("v", self.kv_head, t), refs["dout_v_s"].at[n], full)

  def load_out(self, t: Traced) -> None:
    n, refs = self.q_slot(t), self.refs
    box = self.box("out", self.h, t)
    room = refs["out_s"].at[lax.rem(n, jnp.int32(self.sizes.warpgroups))]
    gpu.to_smem(box, room, refs["out_full"].at[n])

  def make_delta(self, t: Traced) -> None:
    """delta of a query tile, and its lse as weights need it, both in shared memory."""
    n, refs, W = self.q_slot(t), self.refs, self.sizes.warpgroups
    gpu.barrier_wait(refs["out_full"].at[n])
    dout, out = pairs.load(refs["dout_v_s"].at[n]), pairs.load(refs["out_s"].at[self.wg])
    delta = (dout * out).sum(axis=1)
    gpu.commit_reads()  # before the copy engine writes where we have read
    # Into the room just read.
    if self.step_of_out > 0:
      gpu.when(n + W < self.num_q)(lambda: self.load_out(t + W))
    else:
      gpu.when(n >= W)(lambda: self.load_out(t - W))
    if "dlse" in refs:
      delta = delta - gpu.load(self.rows("dlse", t), layout=ROW, optimized=False)
    # Both are changed in place: marked here once, rows without keys weigh nothing in every product.
    lse = gpu.load(refs["lse_s"].at[n], layout=ROW, optimized=False)
    refs["delta_s"].at[n][...] = jnp.where(lse > -jnp.inf, delta, 0.0)
    refs["lse_s"].at[n][...] = safe_lse(lse)

  def lse_and_delta(self, t: Traced, layout: Any) -> tuple[Traced, Traced]:
    lse, delta = (
      gpu.load(self.refs[name].at[self.q_slot(t)], layout=layout, optimized=False)
      for name in ("lse_s", "delta_s")
    )
    # A delta that came from another kernel came without the lse that was marked with it.
    return lse if self.makes_delta else safe_lse(lse), delta
