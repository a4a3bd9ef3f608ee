"""Sums over the first axis of several arrays by one kernel for Hopper, from the first to the last.

What other kernels leave in parts: XLA has a kernel for each array, most of which take longer to
start than to run.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence

import jax
from jax import lax
from jaxtyping import Array
from jaxtyping import Float32

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref

THREADS = 128  # of a thread block, a warpgroup
MOST_PARTS = 48  # whose loads of 16 bytes a thread has registers for
SIMULATED = 128  # values of a thread: thread blocks are what takes time in the simulator


def totals(parts: Sequence[Float32[Array, "_ ..."]]) -> list[Float32[Array, "..."]]:
  """x.sum(axis=0) of each, whose sizes are multiples of 128."""
  flat = [x.reshape(x.shape[0], -1) for x in parts]
  sizes = [_size_of(*x.shape) for x in flat]
  blocks = [x.shape[1] // size for x, size in zip(flat, sizes, strict=True)]
  firsts = [0, *itertools.accumulate(blocks)]

  def body(refs: dict[str, Ref]) -> None:
    core = lax.axis_index("core")

    def add(n: int) -> None:
      own = gpu.ds((core - firsts[n]) * sizes[n], sizes[n])
      layout = gpu.in_turn(sizes[n], sizes[n] // THREADS)
      load = lambda i: gpu.load(refs[f"part{n}"].at[i, own], layout=layout, optimized=False)
      total = functools.reduce(operator.add, map(load, range(flat[n].shape[0])))
      refs[f"total{n}"].at[own][...] = total

    for n in range(len(flat)):
      gpu.when((core >= firsts[n]) & (core < firsts[n + 1]))(functools.partial(add, n))

  results = gpu.launch(
    "totals",
    body,
    inputs={f"part{n}": x for n, x in enumerate(flat)},
    outputs={f"total{n}": jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in enumerate(flat)},
    scratch={},
    grid=(firsts[-1],),
    grid_names=("core",),
  )
  return [total.reshape(x.shape[1:]) for total, x in zip(results, parts, strict=True)]


def _size_of(num_parts: int, size: int) -> int:
  """Values of a part that a thread block adds.

  All loads of a thread shall be under way at once: 16 bytes of each part where it has registers
  for so many, less where there are more parts.
  """
  if size % THREADS:
    raise ValueError(f"{size} values are no multiple of {THREADS}")
  values = 4 if num_parts <= MOST_PARTS else 2 if num_parts <= 2 * MOST_PARTS else 1
  return math.gcd(size, THREADS * (SIMULATED if gpu.simulated() else values))
