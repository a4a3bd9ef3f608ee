"""Kernels of queries (forward, dq, dvalues, masses): their rings, and the producer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import drain
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Refs
from pallas_kernels.mosaic_gpu.stream.scalars import rem
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar

# An item is 64 queries for each consumer, and sweeps tiles of keys. Shared memory:
#
#   ring q       `held` slots      [queries of wg 0 | wg 1 | ..]      a lane per consumer
#   rings k, v   `stages` slots    [keys] [keys] [keys] ..            every consumer reads all
#
#   producer     q free -> load q        k free -> load k, v free -> load v, next step ..
#   consumer     q full                  k full -> logits, v full -> products, release both ..
#                .. release q, when it needs nothing of it any more
#
# A consumer frees its lane of q alone, and may be at the next item while another is not; a slot of
# k or v is free when all consumers have released it. k and v have barriers of their own, so that
# the logits of a step are made while its values are on their way.


@dataclasses.dataclass(frozen=True)
class QuerySlot(Slot):
  """A slot of a ring with lanes, whose place among the barriers is computed once."""

  barrier: Any

  def _barrier(self, name: str) -> Any:
    return self.ring.refs[name].at[self.barrier]


def query_slot(ring: Ring, n: Scalar, index: Scalar, wg: Scalar) -> QuerySlot:
  """Where the queries of a consumer lie: item n is in slot `index`."""
  return QuerySlot(ring, n, index, wg, index * ring.lanes + wg)


def query_ring(blocks: BlockSizes, num_copies: int) -> Ring:
  """Of so many arrays of queries."""
  lanes, full = blocks.warpgroups, dict(q=num_copies)
  return Ring(name="q", num_slots=blocks.held, full=full, readers=1, lanes=lanes)


def key_rings(
  frame: Frame, blocks: BlockSizes, Dk: int, Dv: int | None, dtype: jax.typing.DTypeLike
) -> tuple[dict[str, Ring], dict[str, Any]]:
  """The rings of k and v, and their memory; without `Dv` of k alone."""
  stages, step = blocks.stages, blocks.step
  rings, scratch = {}, {}
  for name, D in dict(k=Dk, v=Dv).items():
    if D is None:
      continue
    if frame.in_boxes(step, D, dtype):
      tiles, num_copies = gpu.smem_in_boxes(stages, step, frame.slot, D, dtype), 1
    else:
      tiles, num_copies = gpu.smem(stages, step, D, dtype=dtype), frame.copies(step)
    if name == "k" and frame.segments:  # the ids of keys come with k, whose mask needs them
      num_copies += 1
    full = {name: num_copies}
    rings[name] = Ring(name=name, num_slots=stages, full=full, readers=blocks.warpgroups)
    scratch |= rings[name].scratch(**{name: tiles})
  if frame.segments:
    scratch |= dict(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  return rings, scratch


def open_boxes(refs: Refs, frame: Frame, blocks: BlockSizes) -> Refs:
  """`refs` with key tiles, and the same memory as boxes ("k_box_s") where it is that too."""
  refs = dict(refs)
  for x in "kv":
    if frame.in_boxes(blocks.step, refs[x].shape[-1], refs[x].dtype):
      refs[f"{x}_s"], refs[f"{x}_box_s"] = refs[f"{x}_s"]
  return refs


# ------------------------------------------------------------------------------------- producer


def produce_keys(
  launch: Launch, tile_names: tuple[str, ...] = ("q",), vector_names: tuple[str, ...] = ()
) -> None:
  """Loads the queries of every item, and its key tiles as far ahead as the rings go.

  Args:
    tile_names: the arrays of queries [B, ..., H, D] to load.
    vector_names: those of rows [B, Hg, R, Mp].
  """
  load = functools.partial(_load_item, launch, tile_names, vector_names)
  num_steps = launch.work.each(load, jnp.int32(0))
  drain(num_steps, *launch.key_rings)
  drain(launch.work.count(), launch.rings["q"])


def _load_item(
  launch: Launch, tile_names: tuple, vector_names: tuple, item: Item, n: Scalar, done: Scalar
) -> Scalar:
  tiles = launch.frame.sweep_keys(item, launch.blocks)
  index = rem(n, launch.blocks.held)
  for wg in range(launch.blocks.warpgroups):
    slot = query_slot(launch.rings["q"], n, index, wg)
    slot.wait_until_free()
    _load_queries(launch, tile_names, vector_names, item, tiles.q0 + wg * TILE, slot)
  step = functools.partial(_load_step, launch, item, tiles)
  return lax.fori_loop(0, tiles.num, step, done)


def _load_queries(
  launch: Launch, tile_names: tuple, vector_names: tuple, item: Item, base: Scalar, slot: Slot
) -> None:
  frame, refs = launch.frame, launch.refs
  b, r, h = item["b"], item["r"], item["h"]
  sources = {x: frame.tile(refs[x], b, r, base, TILE, h) for x in tile_names}
  # q has all heads, the others those of the launch.
  sources["q"] = frame.tile(refs["q"], b, r, base, TILE, frame.head(h))
  # Unlike tiles, rows of single values are not clipped: those past the end are not used.
  rows = gpu.ds(jnp.minimum(base, frame.padded - TILE), TILE)
  sources.update({x: refs[x].at[b, h, r, rows] for x in vector_names})
  for name, source in sources.items():
    gpu.to_smem(source, slot[name], slot.full())


def _load_step(launch: Launch, item: Item, tiles: Any, i: Scalar, done: Scalar) -> Scalar:
  k = launch.rings["k"].slot(done)
  for ring in launch.key_rings:
    slot = dataclasses.replace(k, ring=ring)
    slot.wait_until_free()
    load = functools.partial(_load_view, launch, item, tiles, i, slot)
    if not launch.frame.own:
      load()
      continue
    gpu.when(i < tiles.num_view)(load)
    gpu.when(i >= tiles.num_view)(functools.partial(_load_own, launch, item, tiles, i, slot))
  return done + 1


def _load_view(launch: Launch, item: Item, tiles: Any, i: Scalar, slot: Slot) -> None:
  """Loads a tile of the view's keys or values."""
  frame, refs, name = launch.frame, launch.refs, slot.ring.name
  tile, step = tiles.tile(i), launch.blocks.step
  if f"{name}_box_s" in refs:
    boxes = frame.boxes(refs[name], item["b"], item["h"], tile, step)
    gpu.to_smem(boxes, slot[f"{name}_box"], slot.full())
  else:
    frame.load_keys(functools.partial(copy_rows, slot, name), refs[name], item, tile, step)
  if frame.segments and name == "k":
    ids = pairs.key_ids(refs).at[item["b"], item["r"], gpu.ds(tile * step, step)]
    gpu.to_smem(ids, slot["ids"], slot.full())


def _load_own(launch: Launch, item: Item, tiles: Any, i: Scalar, slot: Slot) -> None:
  """Loads keys or values of the queries' own rows."""
  frame, refs, name = launch.frame, launch.refs, slot.ring.name
  # They lie together, but a barrier counts the copies of a step, whichever it is: as many here.
  num_copies = 1 if f"{name}_box_s" in refs else frame.copies(launch.blocks.step)
  size = launch.blocks.step // num_copies
  for n in range(num_copies):
    keys = gpu.ds(tiles.own_key(i) + n * size, size)
    source = refs[f"own_{name}"].at[item["b"], keys, frame.kv_head(item["h"])]
    copy_rows(slot, name, source, n * size, size)


def copy_rows(slot: Slot, name: str, source: Any, first: int, size: int) -> None:
  """Starts the copy of `size` rows into a slot, from its row `first` on."""
  # Slot and rows in one index: a slice of a slice would be two views of memory.
  rows = slot.ring.refs[f"{name}_s"].at[slot.index, gpu.ds(first, size)]
  gpu.to_smem(source, rows, slot.full())
