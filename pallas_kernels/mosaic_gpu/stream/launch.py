"""The launch of a streaming kernel, and who does what in a thread block.

A thread block has one team of warpgroups, or two: a producer that loads, and consumers that
compute. Registers go where they are needed (`BlockSizes.registers`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.integers import div
from pallas_kernels.mosaic_gpu.stream.integers import rem
from pallas_kernels.mosaic_gpu.stream.work import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
  """What all warpgroups of a kernel know.

  Attributes:
    frame: what is swept.
    blocks: how the kernel is cut.
    work: its items.
    rings: by the name of their first buffer.
    scale: factor of the logits.
    refs: of a team, inside the kernel.
  """

  frame: Frame
  blocks: BlockSizes
  work: Work
  rings: dict[str, Ring]
  scale: float
  refs: dict[str, Any] | None = None

  def run(self, name: str, body: Callable, *, inputs, outputs, scratch) -> list:
    """The outputs of the kernel body(launch, refs); `scratch` is for one team."""
    blocks = self.blocks
    return gpu.launch(
      name,
      lambda refs: body(self, refs),
      inputs=inputs,
      outputs=outputs,
      scratch=_of_teams(scratch, blocks.teams),
      grid=(-(-self.work.num_blocks // blocks.teams),),
      grid_names=("core",),
      num_threads=blocks.teams * (blocks.warpgroups + 1),
      thread_name="wg",
    )

  def of(self, refs: dict[str, Any], core=None) -> "Launch":
    """In the kernel."""
    rings = {name: ring.of(refs) for name, ring in self.rings.items()}
    return dataclasses.replace(self, refs=refs, rings=rings, work=self.work.of(refs, core))

  def of_team(self, refs: dict[str, Any], scratch, wg, core):
    """Refs of this warpgroup's team, its number within it, and the core that lists know it as."""
    if self.blocks.teams == 1:
      return refs, wg, core
    size = self.blocks.warpgroups + 1
    team, wg = div(wg, size), rem(wg, size)
    return _of_team(refs, scratch, team), wg, core * self.blocks.teams + team

  def split(self, wg, produce: Callable, consume: Callable):
    """The last warpgroup of a team runs produce(), the others consume()."""
    producer = self.blocks.warpgroups
    to_load, to_compute = self.blocks.registers

    @gpu.when(wg == producer)
    def _():
      gpu.set_max_registers(to_load, action="decrease")
      produce()

    @gpu.when(wg < producer)
    def _():
      gpu.set_max_registers(to_compute, action="increase")
      consume()

  def each_item(self, make_consumer: Callable, wg):
    """Runs make_consumer(launch, item, n, done, wg) for the items of this thread block."""
    run = lambda item, n, done: make_consumer(self, item, n, done, wg).run()
    self.work.each(run, jnp.int32(0))


def _of_teams(scratch: dict, teams: int) -> dict:
  """Shared memory and barriers for several teams."""
  if teams == 1:
    return scratch
  wider = {}
  for name, kind in scratch.items():
    if isinstance(kind, gpu.Barrier):
      wider[name] = dataclasses.replace(kind, num_barriers=(teams, *kind.num_barriers))
    else:
      aval = kind.inner_aval.update(shape=(teams, *kind.inner_aval.shape))
      wider[name] = dataclasses.replace(kind, inner_aval=aval)
  return wider


def _of_team(refs: dict, scratch: dict, team) -> dict:
  """The refs of one team, of those that `_of_teams` made of `scratch`."""
  part = lambda ref, kind: _Row(ref, team) if isinstance(kind, gpu.Barrier) else ref.at[team]
  return refs | {name: part(refs[name], kind) for name, kind in scratch.items()}


class _Row:
  """A row of barriers. The simulator takes all indices at once alone."""

  def __init__(self, ref, n):
    self.ref, self.n = ref, n

  @property
  def at(self):
    return self

  def __getitem__(self, place):
    return self.ref.at[self.n, place]
