"""The order of the backward kernel where a thread block keeps dS^T of more than two tiles.

Such a thread block has a multiprocessor for itself: nothing else computes while it loads. So it
begins before all is there, with the last tile, whose keys meet the fewest queries. With four tiles
and two warpgroups:

    loads           3        2        1        0          each with its q, dout, out, k and v
    warpgroup 1         keys 3                  keys 0    over queries 3; 0, 1, 2, 3
    warpgroup 0             keys 2         keys 1         over queries 2, 3; 1, 2, 3

Back and forth, so that both meet five tiles of queries. A warpgroup makes delta of the queries of
its own tile, and waits for that of the tiles between it and its tile before. dq comes when all dS^T
are there.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.resident import tiles


class LastFirst(tiles.Tiles):
  """Run and load of `backward.Gradients`, with the last tiles first."""

  def own_tile(self, turn: Traced) -> Traced:
    """From the last one on."""
    W, wg = self.sizes.warpgroups, self.wg
    place = jnp.where(lax.rem(turn, jnp.int32(2)) == 0, W - 1 - wg, wg)
    return self.sizes.num_tiles - 1 - turn * W - place

  def maker(self, t: Traced) -> Traced:
    turn, place = self._turn_of(t)
    last = self.sizes.warpgroups - 1
    return jnp.where(lax.rem(turn, jnp.int32(2)) == 0, last - place, place)

  def next_made(self, t: Traced) -> Traced:
    turn, place = self._turn_of(t)
    # In the turn after, the last place of this one is the first.
    W = self.sizes.warpgroups
    return self.sizes.num_tiles - 1 - (turn + 1) * W - (W - 1 - place)

  def _turn_of(self, t: Traced) -> tuple[Traced, Traced]:
    """In which turn a tile is somebody's own, and its place among those of that turn."""
    from_last, W = self.sizes.num_tiles - 1 - t, jnp.int32(self.sizes.warpgroups)
    return lax.div(from_last, W), lax.rem(from_last, W)

  def run(self) -> None:
    refs, sizes, W = self.refs, self.sizes, self.sizes.warpgroups
    gpu.when(self.wg == 0)(self.load)
    gpu.loop(0, sizes.num_tiles // W)(self.store_keys_of)
    gpu.commit_smem()  # dS^T, before matrix units read it
    gpu.barrier_arrive(refs["ds_full"])
    gpu.barrier_wait(refs["ds_full"])

    @gpu.loop(0, sizes.num_tiles)
    def _(t: Traced) -> None:
      others = self.maker(t) != self.wg
      gpu.when(others)(lambda: gpu.barrier_wait(refs["k_full"].at[self.k_slot(t)]))

    self.stage_k = refs["out_s"].at[self.wg]
    self.each_own_tile(self.store_query_gradient)
    gpu.end_copies()

  def store_keys_of(self, turn: Traced) -> None:
    """dk and dv of the own tile of a turn, as soon as what they need is there."""
    refs, own = self.refs, self.own_tile(turn)
    delta_full = refs["delta_full" if self.makes_delta else "out_full"]
    gpu.barrier_wait(refs["q_full"].at[own])
    if self.makes_delta:
      self.make_delta(own)
      gpu.barrier_arrive(delta_full.at[own])
    gpu.barrier_wait(delta_full.at[own])
    # The tiles of others that this warpgroup has not met yet.
    before = jnp.where(turn == 0, self.sizes.num_tiles, self.own_tile(turn - 1))

    @gpu.loop(own + 1, before)
    def _(t: Traced) -> None:
      gpu.barrier_wait(refs["q_full"].at[t])
      gpu.barrier_wait(delta_full.at[t])

    gpu.barrier_wait(refs["k_full"].at[self.k_slot(own)])
    # From where v was, which no other tile needs: out of the next turn comes into `out_s`.
    self.stage_v = self.stage_k = refs["dout_v_s"].at[self.k_slot(own)]
    self.store_key_gradients(own)

  def load(self) -> None:
    num = self.sizes.num_tiles

    @gpu.loop(0, num)
    def _(n: Traced) -> None:
      self.load_queries(num - 1 - n, n < self.sizes.warpgroups)
      self.load_keys(num - 1 - n)
