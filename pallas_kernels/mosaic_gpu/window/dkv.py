"""dk, dv and dS^T of a share: the role of W warpgroups of the backward kernel, key tiles in turn.

Each accumulates dk and dv of its key tile over the queries that see it, and leaves dS^T of all
these pairs in shared memory for dq. With W = 2, reach = 2:

    warpgroup 0      key 2: queries 0 1 2             key 4: queries 2 3 4
    warpgroup 1               key 3: queries 1 2 3             key 5: queries 3 4 5

Of the first `reach` key tiles, which lie before the share, only dS^T is made: their dk and dv are
another thread block's.

Query tile m is released after the last key tile of this warpgroup that meets it. All barriers count
every warpgroup of this role, so each also waits for the tiles of the others' turns, and releases
their keys, unused.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.window import share


class KeyGradients:
  """A warpgroup that makes dk and dv of every W-th key tile."""

  def __init__(self, part: share.Share, wg: Traced):
    self.share, self.sizes, self.refs, self.wg = part, part.sizes, part.refs, wg
    self.c = part.sizes.scale * gpu.LOG2E

  def run(self) -> None:
    part, (reach, W) = self.share, (self.sizes.reach, self.sizes.warpgroups)
    _, registers = self.sizes.registers
    gpu.set_max_registers(registers, action="increase")
    self.p_s = self.refs["p_s"].at[self.wg] if gpu.simulated() else None
    # Unrolled, for each of these key tiles meets another number of queries.
    for n in range(reach):
      gpu.when(self.wg == n % W)(lambda n=n: self.make_ds(n))
    # The first tile of its own, then every W-th.
    self.start = reach + lax.rem(self.wg - reach % W + W, jnp.int32(W))
    gpu.loop(self.start, part.total, step=W)(self.make_gradients)
    self.finish()

  # ------------------------------------------------------------- waiting, and giving tiles back

  def see(self, n: Traced) -> None:
    """Waits until key tile n, and query tile n with its delta, are there: what turn n adds."""
    # All at once: to wait for the newest queries only when they are needed had 20 more spills in
    # the loop of wide heads, and took 30 % more time.
    query = self.share.queries.slot(n)
    query.wait_full()
    query.wait_full("delta")
    self.share.keys.slot(n).wait_full()

  def see_turn(self, n: Traced) -> None:
    """Waits for all that key tile n meets; the tiles since this warpgroup's last are others'."""
    for turn in range(self.sizes.warpgroups - 1, 0, -1):

      @gpu.when(n - turn >= 0)
      def _(turn: Traced = turn) -> None:
        self.see(n - turn)
        self.share.keys.slot(n - turn).release()

    self.see(n)
    # Each warpgroup has one slot of dS^T: the warpgroup of dq has done with its tile before this.
    self.share.ds.wait_until_free(n)

  def release_queries(self, begin: Traced, end: Traced) -> None:
    @gpu.loop(begin, jnp.minimum(end, self.share.count))
    def _(m: Traced) -> None:
      self.share.queries.slot(m).release()

  def leave_ds(self, n: Traced) -> None:
    """Hands dS^T of key tile n to the warpgroup of dq."""
    gpu.commit_smem()  # what threads wrote, before matrix units read it
    self.share.ds.slot(n).arrive_full()
    self.share.keys.slot(n).release()

  def finish(self) -> None:
    """Sees, and releases, what comes after this warpgroup's last tile."""
    part, W = self.share, self.sizes.warpgroups
    turns = lax.div(jnp.maximum(part.total - self.start + W - 1, 0), jnp.int32(W))
    last = self.start + (turns - 1) * W  # where it has none, a key tile before the first query

    @gpu.loop(last + 1, part.total)
    def _(n: Traced) -> None:
      self.see(n)
      part.keys.slot(n).release()

    # Each slot of dS^T was filled at least once, with a tile before the share if with no other.
    part.ds.slot(last).wait_free()
    gpu.when(turns == 0)(lambda: self.release_queries(0, part.count))
    gpu.wait_to_gmem(0)

  # -------------------------------------------------------------------------------- key tiles

  def make_ds(self, n: int) -> None:
    """dS^T of key tile n, one before the share."""
    part = self.share
    self.see_turn(n)
    # All rows weigh nothing where the key tile would lie before the sequence.
    before = jnp.where(part.first - self.sizes.reach + n >= 0, jnp.float32(0), jnp.inf)
    for distance in share.distances(self.sizes.reach, n):
      self.weights(n, distance, before)
    self.leave_ds(n)

  def make_gradients(self, n: Traced) -> None:
    """dk, dv and dS^T of key tile n."""
    self.see_turn(n)
    dk, dv = self.accumulate(n)
    # Before dk and dv are stored: the warpgroup of dq waits for it, and the producer for the keys.
    self.leave_ds(n)
    self.store(n, dk, dv)

  def accumulate(self, n: Traced) -> tuple[Traced, Traced]:
    """dk / scale and dv of key tile n."""
    part, sizes = self.share, self.sizes
    dk, dv = gpu.zeros((TILE, sizes.Dk)), gpu.zeros((TILE, sizes.Dv))
    for distance in range(sizes.reach + 1):
      p, ds = self.weights(n, distance)
      m = n + distance - sizes.reach
      query = part.queries.slot(m)
      terms = (dk, (ds, query["q"])), (dv, (p, query["dout"]))
      dk, dv = gpu.add_matmul(*terms, scratch=self.p_s)
      if distance < sizes.warpgroups:  # the next tile of this warpgroup does not see it
        gpu.commit_reads()
        # The first tile also releases the queries before it, which none of this warpgroup's sees.
        begin = m if distance else jnp.where(n == self.start, 0, m)
        self.release_queries(begin, m + 1)
    return dk, dv

  def weights(self, n: Traced, distance: int, before: Any = None) -> tuple[Any, Any]:
    """P^T and dS^T of key tile n and the queries at a distance, as operands; dS^T also in its room.

    Args:
      before: what to add to lse, or None.
    """
    part, dtype = self.share, self.refs["q_s"].dtype
    m = n + distance - self.sizes.reach
    key, query = part.keys.slot(n), part.queries.slot(m)
    for_s = key["k"], pairs.transposed(query["q"])
    for_dp = key["v"], pairs.transposed(query["dout"])
    column = lambda name: gpu.load(query[name], layout=COLUMN, optimized=False)
    lse = lambda: column("lse") if before is None else column("lse") + before
    # lse and delta by column only after the products that do not need them: 32 registers.
    if self.sizes.Dk + self.sizes.Dv <= 128:
      x, dp = gpu.matmul(for_s, for_dp)
      p = pairs.weights_by_key(x, lse(), self.c, self.mask(n, distance))
      operand = p.astype(dtype)
    else:  # registers are short: dP^T only when P^T is as small as it gets
      (x,) = gpu.matmul(for_s)
      p = pairs.weights_by_key(x, lse(), self.c, self.mask(n, distance)).astype(dtype)
      operand = lax.optimization_barrier(p)
      (dp,) = gpu.matmul(for_dp)
      p = operand.astype(jnp.float32)
    ds = pairs.derivatives_by_key(p, dp, column("delta"), dtype)
    part.ds_tile(part.ds.slot(n), distance)[...] = ds
    return operand, ds

  def mask(self, n: Traced, distance: int) -> Traced | None:
    """Which pairs of key tile n and the queries at a distance attend, or None for all."""
    part, band, mask = self.share, self.sizes.band, None
    if not band.covers(distance):
      # Opaque: what a loop does not change is computed before it, and packed bit by bit, at a cost
      # in registers and in unpacking.
      keys = lax.optimization_barrier(gpu.iota((TILE,), layout=ROW))
      queries = gpu.iota((TILE,), layout=COLUMN)
      difference = gpu.over_rows(queries, TILE) - gpu.over_columns(keys, TILE)
      mask = band.mask(difference + distance * TILE)
    if "row_ids" in self.refs:
      key = part.first - self.sizes.reach + n
      q_tile, k_tile = part.inside(key + distance), part.inside(key)
      ids = self.refs["row_ids"], self.refs["column_ids"]
      same = pairs.tiles_share_segment(*ids, part.b, 0, k_tile, q_tile)
      mask = pairs.both(mask, same)
    return mask

  def store(self, n: Traced, dk: Traced, dv: Traced) -> None:
    """Sends dk, given without the scale, and dv of key tile n on their way."""
    part, sizes = self.share, self.sizes
    t = part.first + n - sizes.reach
    rooms = self.refs["dv_s"].at[self.wg]
    shared = sizes.Dk == sizes.Dv
    dk_stage = rooms.at[sizes.result_stages - 1] if shared else self.refs["dk_s"].at[self.wg]
    gpu.wait_to_gmem(0, wait_read_only=True)  # the tile before has left
    results = ("dv", dv, rooms.at[0]), ("dk", dk * sizes.scale, dk_stage)
    for name, value, stage in results:
      if name == "dk" and shared and sizes.result_stages == 1:
        gpu.wait_to_gmem(0, wait_read_only=True)  # dv has left the room of both
      stage[...] = value.astype(stage.dtype)
      gpu.commit_smem()
      gpu.to_gmem(stage, part.box(name, part.h, t))
