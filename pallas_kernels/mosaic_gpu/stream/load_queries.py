"""Kernels of keys (dkv): their rings, and the producer that fills them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.ring import drain
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.ring import Slot
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.launch import Launch
from pallas_kernels.mosaic_gpu.stream.load_keys import copy_rows
from pallas_kernels.mosaic_gpu.stream.scalars import Item
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar

# An item is 64 keys for each consumer, and sweeps tiles of queries. Shared memory:
#
#   ring k    a slot per consumer    [k, v of wg 0] [k, v of wg 1] ..
#   ring q    `stages` slots         [q, lse, -delta | dout] [..] ..        every consumer reads all
#
#   producer    k free -> load k, v        q free -> load q, lse, -delta; then dout; next step ..
#   consumer    k full                     q full -> x^T; dout full -> dP^T, sums; release q ..
#               .. stage dk, dv there, store them, release k
#
# A slot of k has one item at a time: dk and dv are staged in it, so that no other could be loaded
# early. A slot of q fills in two parts, so that logits are made while dout is on its way, and is
# free when all consumers have released it, also those whose keys see none of its queries.


def rings_of(
  frame: Frame, blocks: BlockSizes, Dk: int, Dv: int, dtype: jax.typing.DTypeLike
) -> tuple[dict[str, Ring], dict[str, Any]]:
  """The two rings, and their memory."""
  wgs, stages, step = blocks.warpgroups, blocks.stages, blocks.step
  keys = Ring(name="k", num_slots=wgs, full=dict(k=2 * frame.copies(TILE)), readers=1)
  num_copies = 4 if frame.segments else 3  # q, lse, -delta, and ids
  queries = Ring(name="q", num_slots=stages, full=dict(q=num_copies, dout=1), readers=wgs)
  scratch = keys.scratch(
    k=gpu.smem(wgs, TILE, Dk, dtype=dtype), v=gpu.smem(wgs, TILE, Dv, dtype=dtype)
  )
  scratch |= queries.scratch(
    q=gpu.smem(stages, step, Dk, dtype=dtype),
    dout=gpu.smem(stages, step, Dv, dtype=dtype),
    lse=gpu.vector(stages, step),
    minus_delta=gpu.vector(stages, step),
  )
  if frame.segments:
    scratch |= dict(ids_s=gpu.vector(stages, step, dtype=jnp.int32))
  return dict(k=keys, q=queries), scratch


def key_slot(launch: Launch, n: Scalar | None, wg: Scalar) -> Slot:
  """Where the keys of a consumer lie: of each item n in the slot of its number."""
  return Slot(launch.rings["k"], n, wg, None)


def produce_queries(launch: Launch, shares: int) -> None:
  """Loads the keys of every item, and the tiles of queries that see them into the ring."""
  num_steps = launch.work.each(functools.partial(_load_item, launch, shares), jnp.int32(0))
  drain(num_steps, launch.rings["q"])
  for wg in range(launch.blocks.warpgroups):
    key_slot(launch, None, wg).wait_free()


def _load_item(launch: Launch, shares: int, item: Item, n: Scalar, done: Scalar) -> Scalar:
  frame, blocks, refs = launch.frame, launch.blocks, launch.refs
  k0 = item["tile"] * blocks.rows
  tiles = frame.sweep_queries(item, k0, blocks, shares, refs["q"].shape[0])
  # A share of an item has a batch row of its own in dk and dv, but not in the inputs.
  item = item | dict(b=tiles.b)
  for wg in range(blocks.warpgroups):
    slot = key_slot(launch, n, wg)
    gpu.when(n > 0)(slot.wait_free)
    for x in "kv":
      tile = item["tile"] * blocks.warpgroups + wg
      frame.load_keys(functools.partial(copy_rows, slot, x), refs[x], item, tile, TILE)
  step = functools.partial(_load_step, launch, item, tiles)
  return lax.fori_loop(tiles.first_step, tiles.end_step, step, done)


def _load_step(launch: Launch, item: Item, tiles: Any, i: Scalar, done: Scalar) -> Scalar:
  frame, refs, step, b, r = launch.frame, launch.refs, launch.blocks.step, item["b"], item["r"]
  slot = launch.rings["q"].slot(done)
  q0, h = tiles.tile(i) * step, tiles.head(i)
  rows = gpu.ds(q0, step)
  slot.wait_until_free()
  # q has all heads, the others those of the launch.
  gpu.to_smem(frame.tile(refs["q"], b, r, q0, step, frame.head(h)), slot["q"], slot.full())
  for x in ("lse", "minus_delta"):
    gpu.to_smem(refs[x].at[b, h, r, rows], slot[x], slot.full())
  if frame.segments:
    gpu.to_smem(refs["ids"].at[b, r, rows], slot["ids"], slot.full())
  gpu.to_smem(frame.tile(refs["dout"], b, r, q0, step, h), slot["dout"], slot.full("dout"))
  return done + 1
