"""Which kernel sweeps a pass, and how it is cut: what fits a multiprocessor, then what is fastest.

`pallas_kernels.tuning` has measured sizes; these are the defaults for what is not in its table.
"""

import dataclasses
from typing import Literal

import numpy as np

from pallas_kernels import tuning
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.mosaic_gpu.window import schedule
from pallas_kernels.mosaic_gpu.window import share

SHARED_BYTES = 226 * 1024  # of 227 that a thread block can have; the last one is for barriers
MAX_CONSUMERS = 4  # of windows forward; as many need steps of few registers
MAX_REACH = 4  # tiles before a query's own in a window whose steps are unrolled
# dk and dv of a key tile are accumulators of one warpgroup, (Dk + Dv) / 2 registers of a thread:
# 128, beside 64 for S and dP. Wider heads stream, dk and dv in a launch each.
MAX_HEADS_SIZE = 256
# Of a sequence whose dS^T is kept, nt (nt + 1) / 2 tiles of 8 KiB: three would take 48 KiB from the
# thread blocks that load while this one computes.
TILES_WITH_DS = 2
DS_BYTES = 2 * TILE * TILE  # a tile of dS^T
ROW_BYTES = 2 * 4 * TILE  # lse and delta of a tile


# A kernel that has its keys in shared memory, and its keyword arguments.
Kernel = tuple[Literal["resident", "window"], tuple[tuple[str, int], ...]]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """One pass over the heads of a group, and what sweeps it.

  Attributes:
    pass_: which pairs, of rows as long as they are padded. Of lists of blocks the view alone.
    T: padded positions.
    Dk, Dv: head sizes.
    dtype: of q, k and v.
    forward, backward: the kernels that have their keys in shared memory; None where it streams.
    forward_blocks, dq_blocks, dkv_blocks: how the streaming kernels are cut; all None before the
      choice.
  """

  pass_: Pass
  T: int
  Dk: int
  Dv: int
  dtype: np.dtype
  forward: Kernel | None = None
  backward: Kernel | None = None
  forward_blocks: stream.BlockSizes | None = None
  dq_blocks: stream.BlockSizes | None = None
  dkv_blocks: stream.BlockSizes | None = None

  @property
  def view(self) -> View:
    """Its sequences, in whose rows lse and delta are."""
    return View.of(self.pass_, self.T)

  @property
  def band(self) -> Band:
    """The pairs of a sequence; means nothing for summaries."""
    return Band.of(self.pass_)

  @property
  def kind(self) -> str:
    """Of the kernel, as in the tuning table."""
    of_view = dict(columns="column", blocks="block", summaries="summary")
    return of_view.get(self.pass_.view, "dense" if self.pass_.window is None else "local")

  @property
  def turn_backward(self) -> int:
    """Smaller for those that come earlier.

    A window is the first, and computes delta; what adds to gradients of others is the last.
    """
    turns = {None: 1, "window": 0, "resident": 2}
    return turns[self.backward and self.backward[0]]

  def tuned(self, direction: tuning.Direction) -> tuning.BlockSizes | None:
    return tuning.block_sizes(self.kind, direction, self.view.M, self.Dk, self.dtype)

  def tiles(self, of_k: int, of_v: int) -> int:
    """Bytes of so many tiles of the head size of k and of v."""
    return TILE * 2 * (of_k * self.Dk + of_v * self.Dv)


def resident(sweep: Sweep, merged: bool) -> dict[str, int] | None:
  """For `resident.forward`; None where its sequences do not fit."""
  view, nt, (Dk, Dv) = sweep.view, sweep.view.num_tiles, (sweep.Dk, sweep.Dv)
  of_v = nt * (2 if merged or Dk != Dv else 1)  # the result is staged where q was, if it can be
  if view.kind == "natural" or sweep.tiles(2 * nt, of_v) > SHARED_BYTES:
    return None
  if tuned := sweep.tuned("fwd"):
    return dict(warpgroups=min(tuned.warpgroups, nt))
  return dict(warpgroups=2 if nt >= 4 and Dk >= 64 else 1)


def window(sweep: Sweep) -> dict[str, int] | None:
  """For `window.forward`; None where the window is too wide for it."""
  reach, tuned = _reach(sweep), sweep.tuned("fwd")
  if reach is None:
    return None
  D = max(sweep.Dk, sweep.Dv)
  # Wider heads leave shared memory for fewer warpgroups.
  most = min(tuned.warpgroups, MAX_CONSUMERS) if tuned else 1 if D > 64 else 2 if D > 32 else 3
  at_once = tuned.at_once if tuned else 2
  for W in range(most, 0, -1):
    walks = tuned.block_k < (W + reach) * TILE if tuned else D > 64 or reach > 2
    for stages in range(tuned.stages if tuned else 3 if walks else 2, 0, -1):
      _, keys = schedule.tiles_of_keys(reach, W, stages, walks)
      if sweep.tiles(schedule.QUERY_STEPS * W + keys, W + keys) <= SHARED_BYTES:
        return dict(warpgroups=W, stages=stages, walks=walks, at_once=at_once)
  return None


def resident_backward(sweep: Sweep) -> dict[str, int] | None:
  """For `resident.backward`; None where its sequences do not fit shared memory or registers."""
  view, nt, (Dk, Dv) = sweep.view, sweep.view.num_tiles, (sweep.Dk, sweep.Dv)
  if view.kind == "natural" or Dk + Dv > MAX_HEADS_SIZE:
    return None
  tuned = sweep.tuned("bwd")
  if tuned:
    own_tiles, warpgroups = tuned.block_q // TILE, tuned.warpgroups
  else:
    own_tiles, warpgroups = 2, 2 if Dk >= 128 or nt >= 4 else 1
  tiles_with_ds = max(TILES_WITH_DS, tuned.block_k // TILE if tuned else 0)
  for own in range(min(own_tiles, nt), 0, -1):
    # A warpgroup without a tile of its own would wait for the others.
    W = min(warpgroups, own)
    # Of every pair of tiles, where one thread block owns a whole sequence.
    keeps_ds = own >= nt and nt <= tiles_with_ds
    num_ds = nt * (nt + 1) // 2 if keeps_ds else 0
    shared = sweep.tiles(nt + own + (W if Dk != Dv else 0), nt + own + W)
    if shared + DS_BYTES * num_ds + ROW_BYTES * nt <= SHARED_BYTES:
      return dict(own_tiles=own, warpgroups=W, keeps_ds=keeps_ds)
  return None


def window_backward(sweep: Sweep) -> dict[str, int] | None:
  """For `window.backward`; None where the window is too wide for it."""
  reach, tuned, (Dk, Dv) = _reach(sweep), sweep.tuned("bwd"), (sweep.Dk, sweep.Dv)
  if reach is None or Dk + Dv > MAX_HEADS_SIZE:
    return None
  # dq of all tiles that a window reaches is in registers until the last key has been met.
  if share.dq_registers(reach, Dk) > share.MAX_DQ_REGISTERS:
    return None
  # Two for wider tiles share less memory ahead; three would want more registers than there are.
  most = min(tuned.warpgroups, 2) if tuned else 2 if Dk + Dv <= 64 else 1
  for W in range(min(most, reach + 1), 0, -1):
    stages = dict(query_stages=reach + W, key_stages=W + 1, out_stages=1, result_stages=1)

    def fits(stages: dict[str, int], W: int = W) -> bool:
      query, key, out, result = stages.values()
      of_k, of_v = query + key, query + key + out + W * result
      if Dk != Dv:
        of_k += W + 1
      others = DS_BYTES * W * (reach + 1) + ROW_BYTES * query
      return sweep.tiles(of_k, of_v) + others <= SHARED_BYTES

    # What is left of the memory goes, in turn, to what is waited for.
    by_need = ["out_stages", "query_stages", "key_stages", "query_stages", "key_stages"]
    by_need += ["result_stages"] if Dk == Dv else []
    if fits(stages):
      for name in by_need:
        larger = stages | {name: stages[name] + 1}
        stages = larger if fits(larger) else stages
      return dict(warpgroups=W, **stages)
  return None


def _reach(sweep: Sweep) -> int | None:
  """Tiles before a query's own in a window that is swept at once; None for all else."""
  view, band = sweep.view, sweep.band
  if view.kind != "natural" or band.far is None or band.last(view.num_tiles) > MAX_REACH:
    return None
  return band.last(view.num_tiles)


def streamed(sweep: Sweep) -> dict[str, stream.BlockSizes]:
  """For the streaming kernels, which take everything: by the fields of a `Sweep`."""

  def of(direction: str, default: stream.BlockSizes) -> stream.BlockSizes:
    tuned = sweep.tuned(direction)
    if tuned is None or sweep.kind not in ("summary", "dense"):  # other kinds: other kernels
      return default
    sizes = dict(step=tuned.block_k, stages=tuned.stages, warpgroups=tuned.warpgroups)
    return dataclasses.replace(default, **sizes)

  D = sweep.Dk, sweep.Dv
  return dict(
    forward_blocks=of("fwd", stream.forward_blocks(*D)),
    dq_blocks=of("bwd", stream.dq_blocks(*D)),
    dkv_blocks=of("bwd", stream.dkv_blocks(*D)),
  )


def listed(Dk: int, Dv: int, segments: bool, split: bool = False) -> dict[str, stream.BlockSizes]:
  """As `streamed`, for lists of blocks: steps are a block or a part of one, rows likewise.

  Args:
    Dk, Dv: sizes of heads.
    segments: whether there are segment ids.
    split: whether lists of queries are of half blocks: then a step has no more keys.
  """
  sizes, D = stream.BlockSizes, max(Dk, Dv)
  if D <= 64:
    return dict(
      forward_blocks=sizes(step=64, stages=3, held=2, teams=2),
      dq_blocks=sizes(step=64 if split else 128, stages=6 if split else 3, held=2),
      dkv_blocks=sizes(step=64, stages=4),
    )
  if D <= 128:
    return dict(
      forward_blocks=sizes(step=64 if split else 128, stages=4 if split else 2, held=2, ahead=True),
      dq_blocks=sizes(step=64, stages=3),
      dkv_blocks=sizes(step=64, stages=4),
    )
  narrow = sizes(step=64, warpgroups=1)
  # Two stages of dq and their segment ids are 80 bytes more than there are.
  full = segments and Dk + Dv == 512
  return dict(
    forward_blocks=sizes(step=64, stages=2 if D <= 192 else 1),
    dq_blocks=dataclasses.replace(narrow, stages=1) if full else narrow,
    dkv_blocks=narrow,
  )
