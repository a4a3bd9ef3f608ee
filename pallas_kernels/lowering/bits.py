"""Masks of blocks whose pairs no formula gives, bit by bit, each different one once.

A layout of small blocks, its union with a window, a predicate that looks something up.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from pallas_kernels import patterns
from pallas_kernels.lowering import blocks

MOST = 1 << 15  # different masks: 2 KB each
_AT_ONCE = 256  # blocks that are looked at together


Words = Int[np.ndarray, "N words size"]
Which = dict[patterns.Pattern, Int[Any, "nq nk"]]


@functools.lru_cache(maxsize=16)
def bits_of(
  each: tuple[patterns.Pattern, ...], T: int, S: int, size: int
) -> tuple[Words, Words, Which] | None:
  """The masks of blocks that a pattern of `each` has some pairs of, not all; None: too many.

  Pairs past the ends are in no mask's promise. The first mask has all pairs.

  Returns:
    by_queries: bit k of [n, m, i] is pair (i, 32 m + k) of mask n: query, key.
    by_keys: the same of pair (key, query).
    which: for every pattern the mask of each block.
  """
  names = {(np.ones((size, size // 8), np.uint8) * 255).tobytes(): 0}
  which = {}
  for pattern in each:
    some, every = blocks.blocks_of(pattern, T, S, size, size)
    rows, columns = np.nonzero(some & ~every)
    table, place = np.zeros(some.shape, np.int32), 0
    with blocks.here():
      for masks in _masks(pattern, rows, columns, size):
        for mask in masks:
          name = names.setdefault(mask.tobytes(), len(names))
          table[rows[place], columns[place]], place = name, place + 1
        if len(names) > MOST:
          return None
    which[pattern] = table
  packed = np.frombuffer(b"".join(names), np.uint8).reshape(-1, size, size // 8)
  masks = np.unpackbits(packed, axis=2, bitorder="little")
  return _words(masks), _words(masks.swapaxes(1, 2)), which


def _words(masks):
  """[n, rows, columns] -> words [n, columns / 32, rows]."""
  packed = np.ascontiguousarray(np.packbits(masks, axis=2, bitorder="little")).view(np.int32)
  return np.ascontiguousarray(packed.swapaxes(1, 2))


def _masks(pattern: patterns.Pattern, rows, columns, size: int):
  """The packed masks [n, size, size / 8] of some blocks, a few at a time."""

  def pairs(n: Any, m: Any, xp: ModuleType) -> Any:
    i = n[:, None, None] * size + xp.arange(size, dtype=np.int32)[None, :, None]
    j = m[:, None, None] * size + xp.arange(size, dtype=np.int32)[None, None, :]
    return xp.broadcast_to(pattern.allowed(i, j), (len(n), size, size))

  rows, columns = (x.astype(np.int32) for x in (rows, columns))
  several = range(0, len(rows), _AT_ONCE)
  if len(several) < 4:
    look = functools.partial(pairs, xp=np)
  else:
    compiled = jax.jit(functools.partial(pairs, xp=jnp))
    whole = lambda x: np.pad(x, (0, _AT_ONCE - len(x)))  # compiled once
    look = lambda n, m: np.asarray(compiled(whole(n), whole(m)))[: len(n)]
  for start in several:
    span = slice(start, start + _AT_ONCE)
    yield np.packbits(look(rows[span], columns[span]), axis=2, bitorder="little")
