"""The order of the backward kernel where a thread block keeps dS^T of more than two tiles.

Such a thread block has a multiprocessor for itself: nothing else computes while it loads. So it
begins before all is there, with the last tile, whose keys meet the fewest queries. With four tiles
and two warpgroups:

    loads           3        2        1        0          each with its q, dout, out, k and v
    warpgroup 1         keys 3             keys 1         over queries 3; 1, 2, 3
    warpgroup 0             keys 2              keys 0    over queries 2, 3; 0, 1, 2, 3

A warpgroup makes delta of the queries of its own tile, and waits for that of the tiles between
it and its tile before. dq comes when all dS^T are there.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.resident import tiles


class LastFirst(tiles.Tiles):
  """Run and load of `backward.Gradients`, with the last tiles first."""

  step_of_out = -1

  def run(self) -> None:
    refs, sizes, W = self.refs, self.sizes, self.sizes.warpgroups
    gpu.when(self.wg == 0)(self.load)
    last = sizes.num_tiles - W + self.wg
    gpu.loop(0, sizes.num_tiles // W)(lambda turn: self.store_keys_of(last - turn * W))
    gpu.commit_smem()  # dS^T, before matrix units read it
    gpu.barrier_arrive(refs["ds_full"])
    gpu.barrier_wait(refs["ds_full"])

    @gpu.loop(0, sizes.num_tiles)
    def _(t: Traced) -> None:
      others = lax.rem(t, jnp.int32(W)) != self.wg
      gpu.when(others)(lambda: gpu.barrier_wait(refs["k_full"].at[self.k_slot(t)]))

    self.stage_k = refs["out_s"].at[self.wg]
    self.each_own_tile(self.store_query_gradient)
    gpu.wait_to_gmem(0)

  def store_keys_of(self, own: Traced) -> None:
    """dk and dv of an own tile, as soon as what they need is there."""
    refs, sizes = self.refs, self.sizes
    delta_full = refs["delta_full" if self.makes_delta else "out_full"]
    gpu.barrier_wait(refs["q_full"].at[own])
    if self.makes_delta:
      self.make_delta(own)
      gpu.barrier_arrive(delta_full.at[own])
    gpu.barrier_wait(delta_full.at[own])
    # The tiles of others that this warpgroup has not met yet.
    for distance in range(1, sizes.warpgroups):

      @gpu.when(own + distance < sizes.num_tiles)
      def _(t: Traced = own + distance) -> None:
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
