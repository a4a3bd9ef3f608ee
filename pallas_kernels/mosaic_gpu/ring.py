"""Rings: slots of shared memory that a producer fills and consumers read, round after round.

Step n of a ring lies in slot n % num_slots, so the producer is at most `num_slots` steps ahead:

    producer                         slot                            consumers
    wait until free  <------------  "free" (one arrival a reader)  <-- release
    copy             ------------>  "full" (one arrival a copy)    --> wait until full, read

In the first round every slot is free, which no reader says: the producer waits from step
`num_slots` on, for the readers of step n - num_slots. A wait means the next completion of its
barrier (Pallas keeps the phase, by warpgroup): whoever waits for a barrier has to see each of its
completions, none twice. So a consumer waits for every step, even one it makes nothing of, and at
its end the producer waits for the releases after which it has loaded nothing (`drain`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import Traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
  """The slots and barriers of a ring; in a kernel with its refs, else what memory they take.

  Attributes:
    name: of its "free" barriers; their ref is "NAME_free".
    num_slots: steps that are in memory together.
    full: arrivals that fill a slot, by name: copies, or warpgroups that write into it. More than
      one name where parts of a slot are waited for on their own. Refs are "NAME_full".
    readers: arrivals that free a slot: warpgroups that read it.
    lanes: parts of a slot that are filled and freed each on their own, for example by warpgroup;
      None for whole slots, whose buffers have no such axis.
    refs: of the kernel, by name; buffers are "NAME_s", [num_slots, ...] or [num_slots, lanes, ...].
  """

  name: str
  num_slots: int
  full: Mapping[str, int]
  readers: int
  lanes: int | None = None
  refs: Mapping[str, Any] | None = None

  def scratch(self, **buffers: Any) -> dict[str, Any]:
    """Memory of the ring, by ref: these buffers, then its barriers."""
    # A barrier for each slot: the producer may be several steps ahead of the slowest reader.
    num = self.num_slots * (self.lanes or 1)
    arrivals = {f"{name}_full": count for name, count in self.full.items()}
    arrivals[f"{self.name}_free"] = self.readers
    barriers = {x: gpu.Barrier(num_barriers=num, num_arrivals=n) for x, n in arrivals.items()}
    return {f"{name}_s": buffer for name, buffer in buffers.items()} | barriers

  def of(self, refs: Mapping[str, Any]) -> "Ring":
    """The ring in a kernel."""
    return dataclasses.replace(self, refs=refs)

  def slot(self, n: Traced, lane: Traced | None = None) -> "Slot":
    """Where step n (an int, or traced) lies; `lane`, where the ring has lanes."""
    # In an unrolled loop n is a Python number: the slot is known, and no instruction computes it.
    if isinstance(n, int):
      return Slot(self, n, n % self.num_slots, lane)
    return Slot(self, n, lax.rem(n, jnp.int32(self.num_slots)), lane)

  def wait_until_free(self, n: Traced, lane: Traced | None = None) -> None:
    """`Slot.wait_until_free` for a slot that is computed only where there is a wait."""
    gpu.when(n >= self.num_slots)(lambda: self.slot(n, lane).wait_free())


@dataclasses.dataclass(frozen=True)
class Slot:
  """Step n of a ring: its buffers and barriers."""

  ring: Ring
  n: Any
  index: Any  # of the slot
  lane: Any

  def __getitem__(self, name: str) -> Ref:
    """The buffer "NAME_s" of this step."""
    place = self.index if self.lane is None else (self.index, self.lane)
    return self.ring.refs[f"{name}_s"].at[place]

  def full(self, name: str | None = None) -> Ref:
    """The barrier for copies into this slot; `name`, where a slot fills in several parts."""
    return self._barrier(f"{name or self.ring.name}_full")

  # ------------------------------------------------------------------------ the producer's side

  def wait_until_free(self) -> None:
    """Before step n is loaded: until every reader has released what was in its slot."""
    # The first round finds all slots free: barriers have no completion to wait for yet.
    gpu.when(self.n >= self.ring.num_slots)(self.wait_free)

  def wait_free(self) -> None:
    """Until the readers of the step last loaded here, which there must be, have released it."""
    gpu.barrier_wait(self._barrier(f"{self.ring.name}_free"))

  def arrive_full(self, name: str | None = None) -> None:
    """Says that this warpgroup has written its part: copies do so by themselves."""
    gpu.barrier_arrive(self.full(name))

  # ----------------------------------------------------------------------- the consumers' side

  def wait_full(self, name: str | None = None) -> None:
    """Until step n is there."""
    gpu.barrier_wait(self.full(name))

  def release(self) -> None:
    """Says that this warpgroup will not read step n again."""
    gpu.barrier_arrive(self._barrier(f"{self.ring.name}_free"))

  def _barrier(self, name: str) -> Ref:
    lanes = self.ring.lanes
    index = self.index if lanes is None else self.index * lanes + self.lane
    return self.ring.refs[name].at[index]


def drain(loaded: Traced, *rings: Ring, freed: Traced | None = None) -> None:
  """The producer's last waits, for releases after which it has loaded nothing.

  Args:
    loaded: number of steps that were loaded into each of the rings, all of as many slots.
    freed: number of steps, the first ones, that are released; None for all.
  """
  num_slots = rings[0].num_slots
  # One loop serves all of them.
  assert all(ring.num_slots == num_slots for ring in rings)

  @gpu.loop(jnp.maximum(loaded - num_slots, 0), loaded if freed is None else freed)
  def _(n: Traced) -> None:
    for ring in rings:
      for lane in [None] if ring.lanes is None else range(ring.lanes):
        ring.slot(n, lane).wait_free()
