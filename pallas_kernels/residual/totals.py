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
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float32

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref

THREADS = 128  # of a thread block, a warpgroup
# Loads of a thread that are under way at once, by the values of each. More take long to lower: the
# time grows with the square of all loads that are written out.
AT_ONCE = {4: 16, 2: 24, 1: 48}
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
      ref, layout = refs[f"part{n}"], gpu.in_turn(sizes[n], sizes[n] // THREADS)
      load = lambda i: gpu.load(ref.at[i, own], layout=layout, optimized=False)
      num_parts = flat[n].shape[0]
      num_batches, size = _batches(num_parts, sizes[n] // THREADS)
      plus = lambda total, places: functools.reduce(operator.add, map(load, places), total)
      batch = lambda i, total: plus(total, [i * size + j for j in range(size)])
      total = gpu.zeros((sizes[n],), layout)
      total = lax.fori_loop(jnp.int32(0), jnp.int32(num_batches), batch, total)
      refs[f"total{n}"].at[own][...] = plus(total, range(num_batches * size, num_parts))

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

  A thread takes 16 bytes of each part, or less where there are many parts, of which more can then
  be under way at once.
  """
  if size % THREADS:
    raise ValueError(f"{size} values are no multiple of {THREADS}")
  values = next(n for n, most in AT_ONCE.items() if num_parts <= 3 * most or n == 1)
  return math.gcd(size, THREADS * (SIMULATED if gpu.simulated() else values))


def _batches(num_parts: int, values: int) -> tuple[int, int]:
  """Of how many parts a loop adds how many at once; fewer than these are left."""
  most = AT_ONCE.get(values, num_parts)
  num = -(-num_parts // most)
  count = num_parts // num
  return num_parts // count, count
