"""delta and dq of a share: the role of one warpgroup of the backward kernel.

It has an accumulator of dq for every query tile that the window still reaches, so that a key tile
is used for all of them at once and forgotten. At key tile n with reach = 2:

    dqs    [n - 2] [n - 1] [n]     += dS^T[n, distance]^T k[n]   at distances 0, 1, 2
           done: leaves            then all move up by one, and a zero comes in at the end

Ahead of that, by as many tiles as there are warpgroups for dk and dv, it makes delta: those wait
for it ("delta_full") before they make dS of a query tile.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.window import share


class QueryGradients:
  """The warpgroup that makes delta and dq."""

  def __init__(self, part: share.Share):
    self.share, self.sizes, self.refs = part, part.sizes, part.refs

  def run(self) -> None:
    part, reach, ahead = self.share, self.sizes.reach, self.sizes.warpgroups
    for_dq, _ = self.sizes.registers
    # "increase" to less than a warpgroup has is an illegal instruction, as only the card notices.
    grows = for_dq >= self.sizes.launched_registers
    gpu.set_max_registers(for_dq, action="increase" if grows else "decrease")
    # The others can begin with the first key tiles when these are there.
    for n in range(ahead):
      self.make_delta(n)
      self.release_out(n)
    dqs = [self.zeros()] * (reach + 1)
    for n in range(reach):  # keys before the share: no dq is done yet
      gpu.when(n + ahead < part.total)(functools.partial(self.make_delta, n + ahead))
      gpu.when(n + ahead < part.total)(functools.partial(self.release_out, n + ahead))
      dqs = self.add(n, dqs, share.distances(reach, n), add_products)
      dqs = [*dqs[1:], self.zeros()]
    lax.fori_loop(reach, part.total, self.step, tuple(dqs[:reach]))
    gpu.wait_to_gmem(0)

  def step(self, n: Traced, dqs: Sequence[Traced]) -> tuple[Traced, ...]:
    """Key tile n, after which dq of query tile n - reach is done."""
    part, sizes = self.share, self.sizes
    ahead = n + sizes.warpgroups
    # The room of the out before is free once the dq of the step before, staged there, has left.
    gpu.when((n > sizes.reach) & (ahead <= part.total))(lambda: self.release_out(ahead - 1))
    # delta first, for the others wait for it: dq before it took 17 % more time on enwik8.
    gpu.when(ahead < part.total)(lambda: self.make_delta(ahead))
    dq, *dqs = self.add(n, [*dqs, self.zeros()], range(sizes.reach + 1))
    # Staged where the out of the delta just made was, if it fits there.
    stage = part.outs.slot(ahead)["out"] if sizes.Dk == sizes.Dv else self.own_stage
    gpu.wait_to_gmem(0, wait_read_only=True)  # the dq before may leave from here as well
    stage[...] = (dq * sizes.scale).astype(stage.dtype)
    gpu.commit_smem()
    gpu.to_gmem(stage, part.box("dq", part.h, part.first + n - sizes.reach))
    return tuple(dqs)

  @property
  def own_stage(self) -> Ref:
    return self.refs["dk_s"].at[self.sizes.warpgroups]  # the last: the others stage dk

  def zeros(self) -> Traced:
    return gpu.zeros((TILE, self.sizes.Dk))

  def make_delta(self, n: Traced) -> None:
    """delta of query tile n, and its lse as weights need it, for the warpgroups of dk and dv.

    Rows that weigh nothing get an infinite lse: rows without keys, and tiles past the end.
    """
    part, refs = self.share, self.refs
    t = part.inside(part.first + n)
    query = part.queries.slot(n)
    query.wait_full()
    out = part.outs.slot(n)
    out.wait_full()
    delta = (pairs.load(query["dout"]) * pairs.load(out["out"])).sum(axis=1)
    if "dlse" in refs:
      delta = delta - gpu.load(part.rows("dlse", t), layout=ROW, optimized=False)
    # lse is changed in place, by this warpgroup alone, before it says that delta is there.
    lse = gpu.load(query["lse"], layout=ROW, optimized=False)
    delta = jnp.where(lse > -jnp.inf, delta, 0.0)
    query["delta"][...] = delta
    past_end = jnp.where(part.first + n < self.sizes.num_tiles, jnp.float32(0), jnp.inf)
    query["lse"][...] = safe_lse(lse) + past_end
    query.arrive_full("delta")
    gpu.commit_smem()  # before the copy engine may write again where lse was changed

    @gpu.when(n < part.count)  # those after the share are never released
    def _() -> None:
      query.release()
      part.rows("delta", t)[...] = delta

  def release_out(self, n: Traced) -> None:
    """Gives back the memory that delta n was made of, and that dq has left from since."""
    gpu.wait_to_gmem(0, wait_read_only=True)
    self.share.outs.slot(n).release()

  def add(
    self,
    n: Traced,
    dqs: Sequence[Traced],
    distances: Sequence[int],
    add_matmul: Callable = gpu.add_matmul,
  ) -> list[Traced]:
    """`dqs`, of the queries n - reach ..., with what key tile n adds at these distances."""
    part = self.share
    key = part.keys.slot(n)
    key.wait_full()
    ds = part.ds.slot(n)
    ds.wait_full()
    factors = lambda distance: (pairs.transposed(part.ds_tile(ds, distance)), key["k"])
    # All products in flight at once: each has an accumulator of its own.
    terms = [(dqs[distance], factors(distance)) for distance in distances]
    added = dict(zip(distances, add_matmul(*terms), strict=True))
    ds.release()
    key.release()
    return [added.get(distance, dq) for distance, dq in enumerate(dqs)]


def add_products(*terms: tuple) -> list[Traced]:
  """`gpu.add_matmul` where the place of a tile is a constant: accumulators cannot start there."""
  products = gpu.matmul(*(factors for _, factors in terms))
  return [acc + x for (acc, _), x in zip(terms, products, strict=True)]
