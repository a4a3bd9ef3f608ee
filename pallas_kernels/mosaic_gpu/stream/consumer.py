"""What the consumers of forward, dq and dvalues have in common: 64 queries, a sweep of keys."""

import dataclasses

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.stream.integers import rem
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.producer import query_slot


class Queries:
  """64 queries of an item: item number n of the thread block, which took `done` steps before."""

  def __init__(self, launch: Launch, item: dict, n, done, wg):
    self.launch, self.item, self.done, self.wg = launch, item, done, wg
    self.frame, self.blocks, self.refs = launch.frame, launch.blocks, launch.refs
    self.scale, self.scale_base_2 = launch.scale, launch.scale * gpu.LOG2E
    self.tiles = self.frame.sweep_keys(item, self.blocks)
    self.base = self.tiles.q0 + wg * TILE
    self.own = query_slot(launch.rings["q"], n, rem(n, self.blocks.held), wg)
    self.q_s = self.own["q"]
    self.p_s = self.refs["p_s"].at[wg] if "p_s" in self.refs else None
    self.first_part = self.tiles.first_part()

  def k(self, i) -> Slot:
    """Where the keys of step i lie."""
    return self.launch.rings["k"].slot(self.done + i)

  def v(self, i) -> Slot:
    return self.launch.rings["v"].slot(self.done + i)

  def k_and_v(self, i) -> tuple[Slot, Slot]:
    """Both, their slot computed once."""
    k = self.k(i)
    return k, dataclasses.replace(k, ring=self.launch.rings["v"])

  def run_steps(self, step, carry, first: int):
    """carry = step(i, carry, part) for the steps of the sweep from `first` on."""
    # With a product under way, a step cannot be passed over.
    skip = None if self.blocks.ahead else self.skip
    return self.tiles.run(step, carry, first=first, skip=skip)

  def skip(self, i, carry):
    """Lets the tile of step i pass."""
    for slot in (self.k, self.v):
      slot(i).wait_full()
      slot(i).release()
    return carry

  @property
  def rows(self) -> tuple:
    """Where single values of these queries are, in arrays [B, Hg, R, Mp]."""
    item = self.item
    return item["b"], item["h"], item["r"], gpu.ds(self.base, TILE)

  def when_inside(self):
    """Decorates what reaches rows of single values: unlike tiles, they are not clipped."""
    return gpu.when(self.base < self.frame.padded)
