"""Which blocks of queries and keys hold pairs, and which hold nothing else: never a T x T array.

By the corners of a block where a pattern has a formula; for any other, by one compiled sweep over
all pairs. The tables are cached by the pattern.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool

from pallas_kernels import functions
from pallas_kernels import patterns

_BY_NUMPY = 1 << 22  # pairs up to which a sweep is not worth compiling


class Blocks(NamedTuple):
  """Tables of blocks of queries and keys; of several heads [B or 1, heads or 1, nq, nk].

  Attributes:
    some: where a block may hold pairs; outside there are none.
    every: where all pairs of a block attend.
  """

  some: Bool[np.ndarray | Array, "*heads nq nk"]
  every: Bool[np.ndarray | Array, "*heads nq nk"]


@functools.lru_cache(maxsize=256)
def blocks_of(pattern: patterns.Pattern, T: int, S: int, block_q: int, block_k: int) -> Blocks:
  """The blocks of a pattern that all heads share, for T queries and S keys.

  Both tables are exact for a single pattern. Of unions and intersections `some` may hold a block
  too many and `every` one too few, whose pairs have then to be looked at.

  Raises:
    ValueError: heads differ.
  """
  if pattern.period != 1:
    raise ValueError(f"{pattern}: all heads must share the pattern; give pattern.of_head(h)")
  shape = -(-T // block_q), -(-S // block_k)
  first = lambda n, size, axis: np.expand_dims(np.arange(n) * size, axis)
  i0, j0 = first(shape[0], block_q, 1), first(shape[1], block_k, 0)
  i1, j1 = np.minimum(i0 + block_q, T) - 1, np.minimum(j0 + block_k, S) - 1
  low, high = i0 - j1, i1 - j0  # the least and the largest i - j
  match pattern:
    case patterns.Dense(causal=causal):
      some, every = (high >= 0, low >= 0) if causal else (True, True)
    case patterns.Local(window=window, causal=causal):
      least = 0 if causal else 1 - window
      some, every = (high >= least) & (low < window), (low >= least) & (high < window)
    case patterns.Column(stride=stride):
      some = high // stride * stride >= np.maximum(low, 0)
      every = (low >= 0) & ((stride == 1) | ((low == high) & (low % stride == 0)))
    case patterns.Block(stride=stride):
      row, last = np.maximum(i0, j0) // stride, np.minimum(i1, j1) // stride
      begin = row * stride
      inside = np.maximum(j0, begin) <= np.minimum(i1, begin + stride - 1)
      some = (row < last) | ((row == last) & inside)
      every = (np.minimum(i0, j0) // stride == np.maximum(i1, j1) // stride) & (low >= 0)
    case patterns.Summary(stride=stride, width=width, start=start):
      before = lambda n: n // stride * width + np.clip(n % stride - start, 0, width)
      some = (high >= 0) & (before(np.minimum(i1, j1) + 1) > before(j0))
      every = (before(j1 + 1) - before(j0) == j1 - j0 + 1) & (low >= 0)
    case patterns.Where() if functions.holds(pattern):  # known when the program runs
      some, every = blocks_of(patterns.Dense(pattern.causal), T, S, block_q, block_k).some, False
    case patterns.BlockLayout():
      some, every = _of_layout(pattern, i0, i1, j0, j1)
    case patterns.Union(patterns=several) | patterns.Intersection(patterns=several):
      join = np.logical_or if isinstance(pattern, patterns.Union) else np.logical_and
      tables = [blocks_of(part, T, S, block_q, block_k) for part in several]
      some, every = (functools.reduce(join, table) for table in zip(*tables, strict=True))
    case patterns.Strided():
      some, every = blocks_of(pattern.union, T, S, block_q, block_k)
    case patterns.Fixed() | patterns.PerHead():
      some, every = blocks_of(pattern.of_head(0), T, S, block_q, block_k)
    case _:
      some, every = _swept(pattern, T, S, block_q, block_k)
  return Blocks(np.broadcast_to(some, shape), np.broadcast_to(every, shape))


@contextlib.contextmanager
def here() -> Iterator[None]:
  """JAX computes at once, on a device that is here, also where a program is traced for another."""
  no_mesh = jax.sharding.AbstractMesh((), ())
  with jax.sharding.use_abstract_mesh(no_mesh), jax.ensure_compile_time_eval():
    yield


def _of_layout(pattern: patterns.BlockLayout, i0, i1, j0, j1):
  """The blocks from the corner (0, 0) to any other, counted: a block may span several."""
  layout, size = pattern.of_head(0).layout, pattern.block_size
  count = layout.cumsum(0, dtype=np.int32).cumsum(1, dtype=np.int32)
  count = np.pad(count, [(1, 0), (1, 0)])
  end = lambda n, axis: np.minimum(n // size + 1, layout.shape[axis])
  begin = lambda n, axis: np.minimum(n // size, layout.shape[axis])
  top, bottom, left, right = begin(i0, 0), end(i1, 0), begin(j0, 1), end(j1, 1)
  inside = count[bottom, right] - count[top, right] - count[bottom, left] + count[top, left]
  spanned = (i1 // size - i0 // size + 1) * (j1 // size - j0 // size + 1)
  some, every = inside > 0, inside == spanned
  return (some & (j0 <= i1), every & (j1 <= i0)) if pattern.causal else (some, every)


def _swept(pattern: patterns.Pattern, T: int, S: int, block_q: int, block_k: int):
  """The tables of a pattern without a formula, a row of blocks at a time."""
  nq, nk = -(-T // block_q), -(-S // block_k)

  def row(n: Any, xp: ModuleType) -> tuple:
    i = n * block_q + xp.arange(block_q, dtype=np.int32)[:, None]
    j = xp.arange(nk * block_k, dtype=np.int32)[None, :]
    # A table of T entries has none for what comes after them.
    real, pairs = (i < T) & (j < S), pattern.allowed(xp.minimum(i, T - 1), xp.minimum(j, S - 1))
    cut = lambda x: xp.broadcast_to(x, real.shape).reshape(block_q, nk, block_k)
    return cut(pairs & real).any((0, 2)), cut(pairs | ~real).all((0, 2))

  with here():
    if T * S <= _BY_NUMPY:
      rows = [row(np.int32(n), np) for n in range(nq)]
      return tuple(np.stack(table) for table in zip(*rows, strict=True))
    rows = jnp.arange(nq, dtype=jnp.int32)
    some, every = jax.jit(lambda rows: jax.lax.map(lambda n: row(n, jnp), rows))(rows)
    return np.asarray(some), np.asarray(every)
