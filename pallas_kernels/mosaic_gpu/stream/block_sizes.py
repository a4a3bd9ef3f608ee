"""How a streaming kernel is cut into warpgroups, steps and stages."""

import dataclasses

from pallas_kernels.mosaic_gpu.gpu import TILE

# Registers of a thread that loads and of one that computes, by compute warpgroups per thread block.
# At launch every thread has an equal share of 65,536, rounded down to 8. What the warpgroups then
# ask for must not exceed those shares in sum, or the last increase never returns: 168 each of three
# warpgroups (504 for 40 + 2 * 232), 128 of four, 80 of six (two teams of two, and their loaders).
REGISTERS = {1: (40, 240), 2: (40, 232), 3: (24, 160), 4: (24, 104)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """How a kernel is cut.

  Attributes:
    step: rows per step of the ring: keys in forward and dq, queries in dkv; a power of two.
    warpgroups: compute warpgroups of a thread block, which own 64 rows of the other side each.
    stages: steps that the ring holds.
    ahead: whether the first product of a step is issued before the last one of the step before.
    spread: whether all heads work on their longest rows first, or one head after the other.
    held: tiles of queries in shared memory (forward, dq); with 2, the next one loads early.
    teams: sets of warpgroups in a thread block, each with a ring and with items of its own (forward
      of lists): while some wait, others compute.
  """

  step: int = 128
  warpgroups: int = 2
  stages: int = 2
  ahead: bool = False
  spread: bool = True
  held: int = 1
  teams: int = 1

  @property
  def rows(self) -> int:
    """Rows that a team owns."""
    return TILE * self.warpgroups

  @property
  def registers(self) -> tuple[int, int]:
    """Registers of a thread that loads, of one that computes."""
    return REGISTERS[self.teams * self.warpgroups]


# Defaults: what fits shared memory and registers at the larger of the two head sizes.


def forward_blocks(Dk: int, Dv: int) -> BlockSizes:
  """Of `forward_kernel`."""
  if max(Dk, Dv) > 128:
    return BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return BlockSizes(ahead=True)
  if max(Dk, Dv) > 32:
    return BlockSizes(stages=3, warpgroups=3, held=2)
  return BlockSizes(step=64, stages=6, warpgroups=3, held=2)


def dq_blocks(Dk: int, Dv: int) -> BlockSizes:
  """Of `dq_kernel`."""
  if max(Dk, Dv) > 128:
    return BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return BlockSizes(step=64, stages=3, ahead=True)
  return BlockSizes(step=64, stages=4, warpgroups=3)


def dkv_blocks(Dk: int, Dv: int) -> BlockSizes:
  """Of `dkv_kernel`."""
  if max(Dk, Dv) > 128:
    return BlockSizes(step=64, warpgroups=1)
  if max(Dk, Dv) > 64:
    return BlockSizes(step=64, stages=3)
  return BlockSizes(step=64, stages=4, warpgroups=3)
