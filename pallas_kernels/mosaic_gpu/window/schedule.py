"""Which tiles a step of the forward kernel meets, and which slots of shared memory hold them.

A step takes W query tiles that lie side by side, one for each consumer, and meets the key tiles
m = 0 ... W + reach - 1 around them. Here W = 2, reach = 3:

    m           0  1  2  3  4
    keys     .  k  k  k  k  k  .
    queries              q  q           consumer w sees m = w ... w + reach

Either a thread block walks along a share of a sequence (`Walk`), or the steps of all sequences are
dealt to the multiprocessors one by one (`Dealt`).
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.mosaic_gpu.window import share

# Steps whose queries are in memory, the one at work and the next: deeper rings gained nothing, and
# results staged where q was made the queries of the step after next come late.
QUERY_STEPS = 2


def tiles_of_keys(reach: int, warpgroups: int, stages: int, walks: bool) -> tuple[int, int]:
  """Key tiles that a step brings, and those that there is memory for."""
  new = warpgroups if walks else warpgroups + reach
  overlap = warpgroups + reach - new
  return new, stages * new + overlap


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is known before the kernel runs.

  Attributes:
    view, band: one natural sequence and its window.
    batch: rows of the batch.
    heads: the query heads to work on.
    group: query heads that share a key head.
    warpgroups: consumers.
    stages: steps whose new keys fit in memory together.
    walks: whether keys that the next step needs stay.
    Dv: size of values.
    scale: of the logits.
    at_once: tiles of logits that a consumer has in registers.
  """

  view: View
  band: Band
  batch: int
  heads: Sequence[int]
  group: int
  warpgroups: int
  stages: int
  walks: bool
  Dv: int
  scale: float
  at_once: int

  @property
  def num_tiles(self) -> int:
    return self.view.num_tiles

  @property
  def reach(self) -> int:
    """Key tiles that a query tile sees before its own."""
    return self.band.last(self.num_tiles)

  @property
  def num_groups(self) -> int:
    """Steps of a sequence."""
    return -(-self.num_tiles // self.warpgroups)

  @property
  def num_new(self) -> int:
    """Key tiles that a step brings."""
    return tiles_of_keys(self.reach, self.warpgroups, self.stages, self.walks)[0]

  @property
  def num_key_tiles(self) -> int:
    """That there is memory for."""
    return tiles_of_keys(self.reach, self.warpgroups, self.stages, self.walks)[1]

  @property
  def num_overlap(self) -> int:
    """Key tiles of a step that the one before has brought."""
    return self.warpgroups + self.reach - self.num_new

  @property
  def share(self) -> int:
    """Steps of a walk."""
    return share.size(self.num_groups, self.batch * len(self.heads))

  @property
  def num_steps(self) -> int:
    return self.batch * self.num_groups * len(self.heads)

  @property
  def grid(self) -> dict[str, int]:
    """Thread blocks, by axis."""
    # Either way heads of the same rows run side by side: a row of a head is 64 to 256 bytes, its
    # neighbours in memory are those of other heads, and pages of memory are read whole.
    if self.walks:
      num_shares = -(-self.num_groups // self.share)
      return dict(b=self.batch, share=num_shares, h=len(self.heads))
    return dict(cta=min(gpu.num_multiprocessors(), self.num_steps))


class Walk:
  """A walk along a share of a sequence, for one head: keys that the next step needs stay.

  Every second share is walked backward: neighbours begin or end side by side, and what both read
  is in the cache. The key tiles of a step are numbered in the order in which they come, the
  farthest before the queries first, or walking backward the nearest.
  """

  def __init__(self, sizes: Sizes):
    self.sizes, W = sizes, sizes.warpgroups
    index = lax.axis_index("share")
    begin = index * sizes.share
    self.count = jnp.minimum(sizes.num_groups - begin, sizes.share)  # steps
    self.backward = _rem(index, 2) == 1  # traced: neighbours run the same program
    # The first and the last query tile. The last group may lie past the end of the sequence.
    self.start, self.end = begin * W, (begin + self.count) * W - 1

  def sequence(self, n: Traced) -> tuple[Traced, Traced]:
    """Batch row and head of step n."""
    del n
    return lax.axis_index("b"), lax.axis_index("h")

  def query_tile(self, n: Traced, w: Traced) -> Traced:
    """The query tile of consumer w."""
    first = n * self.sizes.warpgroups
    return jnp.where(self.backward, self.end - first - w, self.start + first + w)

  def key_tile(self, n: Traced, m: Traced) -> Traced:
    """The m-th key tile that step n meets."""
    first, reach = n * self.sizes.warpgroups, self.sizes.reach
    return jnp.where(self.backward, self.end - first - m, self.start - reach + first + m)

  def number(self, w: Traced, distance: Traced) -> Traced:
    """m of the key tile at a distance before the query tile of consumer w."""
    return w + jnp.where(self.backward, distance, self.sizes.reach - distance)

  def place(self, n: Traced, m: Traced) -> Traced:
    """Where the m-th key tile of step n lies: step by step W places further."""
    # The m-th tile of step n is the (m - W)-th of step n + 1: the same place by the same sum.
    return _rem(n * self.sizes.warpgroups + m, self.sizes.num_key_tiles)


class Dealt:
  """The steps of all sequences, dealt to the multiprocessors: each brings all of its keys.

  The cache has most of these: all multiprocessors are at neighbouring steps, the heads of the same
  rows first.
  """

  def __init__(self, sizes: Sizes):
    self.sizes, self.num_blocks = sizes, sizes.grid["cta"]
    self.cta = lax.axis_index("cta")
    # Steps cta, cta + num_blocks, ...: at any time all multiprocessors are close together.
    self.count = _div(sizes.num_steps - 1 - self.cta, self.num_blocks) + 1

  def group(self, n: Traced) -> Traced:
    """The group of query tiles of step n, among those of all batch rows."""
    return _div(n * self.num_blocks + self.cta, len(self.sizes.heads))

  def sequence(self, n: Traced) -> tuple[Traced, Traced]:
    """Batch row and head of step n."""
    # Heads are the fastest axis, then groups of query tiles, then batch rows.
    row = _div(self.group(n), self.sizes.num_groups)
    return row, _rem(n * self.num_blocks + self.cta, len(self.sizes.heads))

  def query_tile(self, n: Traced, w: Traced) -> Traced:
    """The query tile of consumer w."""
    return _rem(self.group(n), self.sizes.num_groups) * self.sizes.warpgroups + w

  def key_tile(self, n: Traced, m: Traced) -> Traced:
    """The m-th key tile that step n meets."""
    # Before the first tile too, where there is none: `first_row` puts that inside.
    return self.query_tile(n, m - self.sizes.reach)

  def number(self, w: Traced, distance: Traced) -> Traced:
    """m of the key tile at a distance before the query tile of consumer w."""
    return w + self.sizes.reach - distance

  def place(self, n: Traced, m: Traced) -> Traced:
    """Where the m-th key tile of step n lies: in the places of its stage."""
    return _rem(n, self.sizes.stages) * self.sizes.num_new + m


def first_row(sizes: Sizes, t: Traced) -> Traced:
  """Of tile t. Tiles that do not exist are masked, but must hold numbers: others' will do."""
  # A copy that is not made would have to be left out of what a barrier counts, which is fixed; and
  # what memory holds by chance may be NaN, which no weight of 0 undoes.
  return jnp.clip(t, 0, sizes.num_tiles - 1) * TILE


def _rem(n: Traced, size: int) -> Traced:
  return lax.rem(n, jnp.int32(size))


def _div(n: Traced, size: int) -> Traced:
  return lax.div(n, jnp.int32(size))
