"""A share of a sequence, along which a thread block of the backward kernel walks.

Its tiles are numbered from its own first query tile on: queries n = 0 ... count - 1, of which the
ring holds `reach` more for the last keys, and keys n = 0 ... count + reach - 1, the first `reach`
of which lie before the share. Key tile n meets the queries n - reach ... n: a query and a key of
the same number are `reach` tiles apart. Here count = 4, reach = 2:

    sequence      .  .  .  .  .  .  .  .  .  .
    queries             0  1  2  3 (4)(5)
    keys         (0)(1) 2  3  4  5               key 3 meets queries 1, 2, 3 at distances 0, 1, 2

What is in brackets is another thread block's to make gradients of.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View

# Registers of a thread come in eights, and warpgroups give and take what a thread block is launched
# with: as many for every thread as a multiprocessor's 65,536 allow. Summed over one thread of each
# warpgroup that is 512 for four (128 each), 504 for three (168 each). Who asks for more than the
# others have left waits forever.
REGISTERS, THREADS = 65_536, 128  # of a multiprocessor; of a warpgroup
PRODUCER_REGISTERS = 24  # the fewest that can be asked for: enough for addresses
# For dq, and for dk and dv of one warpgroup: the 504, less 24. With 248 instead of 240 for dk and
# dv the loop of wide heads had half as many spills, and took 5 to 8 % less time on an H100.
SINGLE_REGISTERS = 232, 248
SPARE_REGISTERS = 40  # for dq, besides its accumulators: addresses, numbers of tiles
MAX_DQ_REGISTERS = SINGLE_REGISTERS[0] - SPARE_REGISTERS


def size(num_tiles: int, num_sequences: int) -> int:
  """Tiles of a sequence that a multiprocessor walks along, so that all of them have work."""
  return -(-num_tiles // max(1, gpu.num_multiprocessors() // num_sequences))


def dq_registers(reach: int, Dk: int) -> int:
  """Registers of a thread for accumulators of dq, one for each tile that the window reaches."""
  return (reach + 1) * TILE * Dk // THREADS


def distances(reach: int, n: int) -> range:
  """Of the queries that key tile n of a walk meets: none before the first of the walk."""
  return range(max(reach - n, 0), reach + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What is known before the kernel runs.

  Attributes:
    view, band: one natural sequence and its window.
    batch: rows of the batch.
    heads: the query heads to work on.
    group: query heads that share a key head.
    warpgroups: for dk and dv.
    query_stages, key_stages, out_stages: slots of the rings.
    result_stages: tiles that dk and dv of a warpgroup leave from: 2, or 1 for both.
    Dk, Dv: head sizes.
    scale: of the logits.
  """

  view: View
  band: Band
  batch: int
  heads: Sequence[int]
  group: int
  warpgroups: int
  query_stages: int
  key_stages: int
  out_stages: int
  result_stages: int
  Dk: int
  Dv: int
  scale: float

  def __post_init__(self) -> None:
    # Else a warpgroup would wait for tiles that are loaded only once it has gone on.
    assert self.reach + 1 >= self.warpgroups and self.key_stages > self.warpgroups
    assert self.query_stages >= self.reach + self.warpgroups

  @property
  def num_tiles(self) -> int:
    return self.view.num_tiles

  @property
  def reach(self) -> int:
    """Key tiles that a query tile sees before its own."""
    return self.band.last(self.num_tiles)

  @property
  def tiles(self) -> int:
    """Query tiles of a share."""
    return size(self.num_tiles, self.batch * len(self.heads))

  @property
  def launched_registers(self) -> int:
    """Of a thread before warpgroups give and take: two more load, and make dq."""
    return REGISTERS // (THREADS * (self.warpgroups + 2))

  @property
  def registers(self) -> tuple[int, int]:
    """Of a thread that accumulates dq, and of one that accumulates dk and dv."""
    if self.warpgroups == 1:
      return SINGLE_REGISTERS
    # dq takes what its accumulators need, rounded up; what is left is for dk and dv, rounded down.
    in_eights = lambda n: n // 8 * 8
    for_dq = in_eights(dq_registers(self.reach, self.Dk) + SPARE_REGISTERS + 7)
    left = REGISTERS // THREADS - PRODUCER_REGISTERS - for_dq
    return for_dq, in_eights(left // self.warpgroups)

  def rings(self) -> dict[str, ring.Ring]:
    """By name; who reads what is in window/backward.py."""
    every = self.warpgroups + 1  # those that make dk and dv, and the one that makes dq
    return dict(
      # q, dout and lse of a query tile; then its delta, which is written in the kernel.
      q=ring.Ring(name="q", num_slots=self.query_stages, full=dict(q=3, delta=1), readers=every),
      # k and v of a key tile.
      k=ring.Ring(name="k", num_slots=self.key_stages, full=dict(k=2), readers=every),
      # out of a query tile, and in its place dq on its way out.
      out=ring.Ring(name="out", num_slots=self.out_stages, full=dict(out=1), readers=1),
      # dS^T of a key tile and the query tiles it meets.
      ds=ring.Ring(name="ds", num_slots=self.warpgroups, full=dict(ds=1), readers=1),
    )


class Share:
  """The share of a thread block, of one sequence and head, with its rings."""

  def __init__(self, sizes: Sizes, refs: dict):
    self.sizes, self.refs, nt = sizes, refs, sizes.num_tiles
    self.first = lax.axis_index("share") * sizes.tiles
    self.count = jnp.minimum(nt - self.first, sizes.tiles)  # query tiles to make gradients of
    # Key tiles that these meet. As many query tiles are loaded: the last keys need them.
    self.total = self.count + sizes.reach
    self.b, self.h = lax.axis_index("b"), lax.axis_index("h")
    self.head = head_of(sizes.heads, self.h)
    rings = {name: x.of(refs) for name, x in sizes.rings().items()}
    self.queries, self.keys, self.outs, self.ds = (rings[name] for name in ("q", "k", "out", "ds"))

  def inside(self, t: Traced) -> Traced:
    """A tile that exists: what does not is masked, but must hold numbers all the same."""
    return jnp.clip(t, 0, self.sizes.num_tiles - 1)

  def box(self, name: str, head: Traced, t: Traced) -> Ref:
    return self.sizes.view.box(self.refs[name], self.b, 0, head, t * TILE)

  def rows(self, name: str, t: Traced) -> Ref:
    return self.refs[name].at[self.b, self.h, 0, gpu.ds(t * TILE, TILE)]

  def ds_tile(self, slot: ring.Slot, distance: int) -> Ref:
    """dS^T of a key tile and the queries at a distance from it."""
    return self.refs["ds_s"].at[slot.index * (self.sizes.reach + 1) + distance]
