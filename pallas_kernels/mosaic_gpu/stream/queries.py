"""What consumers of forward, dq, dvalues and masses have in common: 64 queries, a sweep of keys."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.load_keys import query_slot
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar


class Queries:
  """64 queries of an item: item number n of the thread block, which took `done` steps before."""

  def __init__(self, launch: Launch, item: Item, n: Scalar, done: Scalar, wg: Scalar):
    self.launch, self.item, self.done, self.wg = launch, item, done, wg
    self.frame, self.blocks, self.refs = launch.frame, launch.blocks, launch.refs
    self.scale, self.scale_base_2 = launch.scale, launch.scale * gpu.LOG2E
    self.tiles = self.frame.sweep_keys(item, self.blocks)
    self.base = self.tiles.q0 + wg * TILE
    self.own = query_slot(launch.rings["q"], n, rem(n, self.blocks.held), wg)
    self.q_s = self.own["q"]
    # For the simulator, whose matrix instructions take no operand from registers.
    self.p_s = self.refs["p_s"].at[wg] if "p_s" in self.refs else None
    self.first_part = self.tiles.first_part()

  def k(self, i: Scalar) -> Slot:
    """Where the keys of step i lie."""
    return self.launch.rings["k"].slot(self.done + i)

  def v(self, i: Scalar) -> Slot:
    """Where its values lie."""
    return self.launch.rings["v"].slot(self.done + i)

  def k_and_v(self, i: Scalar) -> tuple[Slot, Slot]:
    """Both, their slot computed once."""
    k = self.k(i)
    return k, dataclasses.replace(k, ring=self.launch.rings["v"])

  def vector(self, name: str) -> jax.Array:
    """A value per query."""
    return gpu.load(self.own[name], layout=gpu.ROW, optimized=False)

  def columns(self, row: jax.Array) -> jax.Array:
    """A value per query, over all keys of a step."""
    return gpu.over_columns(row, self.blocks.step)

  def run_steps(self, step: Callable, carry: Any, first: int) -> Any:
    """carry = step(i, carry, part) for the steps of the sweep from `first` on."""
    # A tile of which these queries see nothing still has to pass: its barriers are for all. Not
    # `ahead`: there a step ends the product of the one before, and cannot be left out.
    skip = None if self.blocks.ahead else self.skip
    return self.tiles.run(step, carry, first=first, skip=skip)

  def skip(self, i: Scalar, carry: Any) -> Any:
    """Lets the tile of step i pass."""
    for ring in self.launch.key_rings:
      slot = ring.slot(self.done + i)
      slot.wait_full()
      slot.release()
    return carry

  @property
  def rows(self) -> tuple:
    """Where single values of these queries are, in arrays [B, Hg, R, Mp]."""
    item = self.item
    return item["b"], item["h"], item["r"], gpu.ds(self.base, TILE)

  def when_inside(self) -> Callable:
    """Decorates what reaches rows of single values."""
    # Unlike tiles, they are not clipped where an axis ends: a third warpgroup past the last query
    # would write into the next head.
    return gpu.when(self.base < self.frame.padded)
