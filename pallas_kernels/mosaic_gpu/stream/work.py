"""Items of a launch, and which thread block works on which."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar


class Work:
  """The items of a launch, a tile of rows of one sequence and head each, dealt to thread blocks.

  The kernels are persistent, one thread block per core, so that the loads of an item run while the
  one before ends. Items are assigned longest first, forwards and then backwards over the thread
  blocks, so that every block gets about the same work.

  Args:
    sizes: batch rows b, sequences r, heads h.
    num_tiles: tiles of rows of a sequence.
    spread: whether all heads work on their longest rows first, or one head after the other.
  """

  def __init__(self, sizes: dict[str, int], num_tiles: int, spread: bool):
    tiles = dict(tile=num_tiles)
    # The last name varies fastest. Heads of one row are neighbours in memory: DRAM pages are read
    # whole where thread blocks work on them side by side.
    self.sizes = tiles | sizes if spread else sizes | tiles
    self.num = math.prod(self.sizes.values())
    self.num_blocks = min(self.num, gpu.num_multiprocessors())

  def of(self, refs: Refs, core: Scalar | None = None) -> "Work":
    """What a thread block has to do, inside the kernel."""
    del refs, core
    return self

  def count(self) -> Scalar:
    """Items dealt to this thread block."""
    rounds, last_round = divmod(self.num, self.num_blocks)
    return rounds + (self._place(jnp.int32(rounds)) < last_round).astype(jnp.int32)

  def each(self, body: Callable, carry: Any) -> Any:
    """carry = body(item, its number in this thread block, carry) for the items dealt to it.

    An item is a dict of b, r, h and tile.
    """

    def step(n: Any, carry: Any) -> Any:
      # From the last name, which varies fastest, to the first.
      number, item = n * self.num_blocks + self._place(n), {}
      for name, size in reversed(self.sizes.items()):
        item[name] = rem(number, size)
        number = div(number, size)
      return body(item, n, carry)

    return lax.fori_loop(0, self.count(), step, carry)

  def _place(self, n: Scalar) -> Scalar:
    """This thread block's item of round n."""
    # Forwards, then backwards, of four blocks:   0 1 2 3 | 3 2 1 0 | 0 1 ..
    # The block that has the longest item of a round has the shortest of the next.
    core = lax.axis_index("core")
    return jnp.where(rem(n, 2) == 0, core, self.num_blocks - 1 - core)
