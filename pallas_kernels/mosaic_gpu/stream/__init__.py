"""Streaming attention kernels: a producer fills rings of tiles, consumers sweep them.

Pass --frame_of--> Frame                         which pairs, and their addresses
Lists --frame_of_lists--> Frame
Frame --sweep_keys, sweep_queries--> tiles       of an item, step by step, with masks
Frame --work--> Work                             items, dealt to thread blocks
forward_kernel, dq_kernel, dkv_kernel, dvalues_kernel(frame, q, k, v, ...)
masses_kernel(frame, q, k, ...)
"""

from collections.abc import Sequence

from jaxtyping import Array

from pallas_kernels.lowering import lists
from pallas_kernels.lowering.indexed import Parts
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu.stream.block_sizes import BlockSizes
from pallas_kernels.mosaic_gpu.stream.block_sizes import dkv_blocks
from pallas_kernels.mosaic_gpu.stream.block_sizes import dq_blocks
from pallas_kernels.mosaic_gpu.stream.block_sizes import forward_blocks
from pallas_kernels.mosaic_gpu.stream.dkv import dkv_kernel
from pallas_kernels.mosaic_gpu.stream.dq import dq_kernel
from pallas_kernels.mosaic_gpu.stream.forward import forward_kernel
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.frame import ROWS
from pallas_kernels.mosaic_gpu.stream.listed import formulas
from pallas_kernels.mosaic_gpu.stream.listed import Listed
from pallas_kernels.mosaic_gpu.stream.masses import masses_kernel
from pallas_kernels.mosaic_gpu.stream.summaries import Summaries
from pallas_kernels.mosaic_gpu.stream.values import dvalues_kernel
from pallas_kernels.mosaic_gpu.stream.views import Blocks
from pallas_kernels.mosaic_gpu.stream.views import Columns
from pallas_kernels.mosaic_gpu.stream.views import Natural
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

FRAMES = dict(natural=Natural, columns=Columns, blocks=Blocks, summaries=Summaries)

__all__ = [
  "ROWS",
  "BlockSizes",
  "Frame",
  "dkv_blocks",
  "dkv_kernel",
  "dq_blocks",
  "dq_kernel",
  "dvalues_kernel",
  "formulas",
  "forward_blocks",
  "forward_kernel",
  "frame_of",
  "frame_of_lists",
  "masses_kernel",
]


def frame_of(
  pass_: Pass,
  T: int,
  num_heads: int,
  num_kv_heads: int,
  heads: range | tuple[int, ...],
  segments: bool = False,
  own: bool = False,
) -> Frame:
  """A pass at one size; see `Frame`."""
  return FRAMES[pass_.view](pass_, T, num_heads, num_kv_heads, heads, segments, own)


def frame_of_lists(
  pattern: Pattern,
  problem: lists.Problem,
  by_queries: lists.Lists,
  by_keys: lists.Lists | None,
  *,
  segments: bool,
  scores: Scores | None,
  values: tuple[Array, ...],
  parts: Sequence[Parts | None] = (None, None),
) -> Frame:
  """Lists of the blocks of a pattern; see `Listed`."""
  of_pairs = formulas(pattern, problem.heads)
  given = segments, scores, values, parts
  return Listed(problem, pattern.causal, by_queries, by_keys, *of_pairs, *given)
