"""The launch of a streaming kernel, and who does what in a thread block."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.scalars import div
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar
from pallas_kernels.mosaic_gpu.stream.work import Work

# A thread block is a team of warpgroups, or two teams with rings and items of their own:
#
#   wg 0 .. n - 1    consumers: compute, 64 rows each
#   wg n             the producer: loads
#
# All consumers of a team are at the same step, for a loaded tile is for all of them. Schedulers are
# fair, so that they are in their maxima together, then all in their exponentials, and wait for one
# unit. Another team is at another place: dense forward at D = 64 took 4.65 instead of 5.15 ms.


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
  refs: Refs | None = None

  @property
  def key_rings(self) -> tuple[Ring, ...]:
    """Of keys, and of values where they are read."""
    return tuple(self.rings[x] for x in "kv" if x in self.rings)

  def run(
    self, name: str, body: Callable, *, inputs: dict, outputs: dict, scratch: dict
  ) -> list[jax.Array]:
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

  def of(self, refs: Refs, core: Scalar | None = None) -> "Launch":
    """In the kernel."""
    rings = {name: ring.of(refs) for name, ring in self.rings.items()}
    return dataclasses.replace(self, refs=refs, rings=rings, work=self.work.of(refs, core))

  def of_team(
    self, refs: Refs, scratch: dict, wg: Scalar, core: Scalar
  ) -> tuple[Refs, Scalar, Scalar]:
    """Refs of this warpgroup's team, its number within it, and the core that lists know it as."""
    if self.blocks.teams == 1:
      return refs, wg, core
    size = self.blocks.warpgroups + 1
    team, wg = div(wg, size), rem(wg, size)
    return _of_team(refs, scratch, team), wg, core * self.blocks.teams + team

  def split(self, wg: Scalar, produce: Callable, consume: Callable) -> None:
    """The last warpgroup of a team runs produce(), the others consume()."""
    producer = self.blocks.warpgroups
    # Threads start with equal shares; one that only issues copies leaves most of its registers to
    # those that hold accumulators.
    to_load, to_compute = self.blocks.registers

    @gpu.when(wg == producer)
    def _() -> None:
      gpu.set_max_registers(to_load, action="decrease")
      produce()

    @gpu.when(wg < producer)
    def _() -> None:
      gpu.set_max_registers(to_compute, action="increase")
      consume()

  def each_item(self, make_consumer: Callable, wg: Scalar) -> None:
    """Runs make_consumer(launch, item, n, done, wg) for the items of this thread block."""
    # Producer and consumers count the steps of all their items alike, so that they agree on slots
    # across items, and the first tiles of an item load while the one before ends.
    run = lambda item, n, done: make_consumer(self, item, n, done, wg).run()
    self.work.each(run, jnp.int32(0))


def _of_teams(scratch: dict[str, Any], teams: int) -> dict[str, Any]:
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


def _of_team(refs: Refs, scratch: dict[str, Any], team: Scalar) -> Refs:
  """The refs of one team, of those that `_of_teams` made of `scratch`."""
  part = lambda ref, kind: _Row(ref, team) if isinstance(kind, gpu.Barrier) else ref.at[team]
  return {**refs, **{name: part(refs[name], kind) for name, kind in scratch.items()}}


class _Row:
  """A row of barriers. The simulator takes all indices at once alone."""

  def __init__(self, ref: Any, n: Scalar):
    self.ref, self.n = ref, n

  @property
  def at(self) -> "_Row":
    return self

  def __getitem__(self, place: Any) -> Any:
    return self.ref.at[self.n, place]
