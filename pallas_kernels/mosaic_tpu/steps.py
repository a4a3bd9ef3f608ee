"""One flat list of blocks to visit, which sits in scalar memory and drives a kernel's grid.

A line is a row of blocks (queries), or a column (keys) where those have the results; blocks that
need no mask come first in a line. A line without blocks is one step that only writes zeros.
"""

import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array
from jaxtyping import Int

from pallas_kernels.lowering import blocks
from pallas_kernels.lowering.passes import Pass

# Of a line; without a mask, with one (neither: skipped); nothing but a store of what is complete.
FIRST, LAST, FULL, PARTIAL, STORE = 1, 2, 4, 8, 16
MOST = 200_000  # words: scalar memory has 1 MiB, 262,144 of them


class Steps(NamedTuple):
  """The steps of a launch.

  Attributes:
    place: block of queries << 16 | block of keys.
    flags: for each batch row (or all) and head (or all) what to do in a step.
  """

  # One word for both numbers: scalar memory bounds how long a list may be.
  place: Int[np.ndarray, "N"]
  flags: Int[Any, "Bm Hm N"]

  @property
  def rows(self) -> Any:
    return self.place >> 16

  @property
  def columns(self) -> Any:
    return self.place & 0xFFFF

  @property
  def words(self) -> int:
    return self.place.size + self.flags.size

  def masked(self, some: Array, every: Array) -> "Steps":
    """Those steps, as tables [Bm, Hm, nq, nk] allow; they may be traced."""
    some, every = (x[:, :, self.rows, self.columns] for x in (some, every))
    visit, full = self.flags & (FULL | PARTIAL) != 0, self.flags & FULL != 0
    # A step cannot be taken out of a traced mask's list: it stays, and does nothing.
    kind = jnp.where(full & every, FULL, PARTIAL)
    # A line begins and ends, and is written, even where the mask hides all of it.
    ends = self.flags & (FIRST | LAST | STORE)
    return self._replace(flags=ends | jnp.where(visit & some, kind, 0).astype(jnp.int32))

  def with_stores(self, num: int) -> "Steps":
    """Followed by a step for each of `num` blocks of queries."""
    # Of the last column all along: its keys are there, and none are loaded for these steps.
    place = np.arange(num) << 16 | self.place[-1] & 0xFFFF
    flags = np.full((*self.flags.shape[:2], num), STORE, np.int32)
    join = np if isinstance(self.flags, np.ndarray) else jnp
    return Steps(
      np.append(self.place, place).astype(np.int32), join.concatenate([self.flags, flags], axis=2)
    )


@functools.lru_cache(maxsize=64)
def steps_of(
  pass_: Pass, num_queries: int, num_keys: int, block: int, rows_end: bool, transposed: bool
) -> Steps:
  """The steps of a pass.

  Args:
    pass_: which pairs.
    num_queries, num_keys: real ones; what fills the last block has to be masked.
    block: queries and keys of a block.
    rows_end: whether queries past the last one have to be masked too.
    transposed: whether lines are columns.
  """
  nq, nk = -(-num_queries // block), -(-num_keys // block)
  if pass_.pattern is not None:
    some, every = blocks.blocks_of(pass_.pattern, num_queries, num_keys, block, block)
  else:  # what a query sees, later ones see, and the same query's view of earlier keys
    i0, i1 = _ends(pass_.query_position, nq, block, num_queries)
    j0, j1 = _ends(pass_.key_position, nk, block, num_keys)
    some = pass_.allowed(i1[:, None], j0[None, :])
    every = pass_.allowed(i0[:, None], j1[None, :])
  # What a block has past the end does not exist, and has to be masked.
  whole = lambda n, size: (np.arange(n) + 1) * block <= size
  every = every & some & whole(nk, num_keys)
  # By row, what is past the end makes results that nobody reads; by column, it would be added.
  if rows_end:
    every = every & whole(nq, num_queries)[:, None]
  if transposed:
    some, every = some.T, every.T
  listed = some.copy()
  # The one step of an empty line, which has its zeros to write.
  listed[~some.any(axis=1), 0] = True
  line, other = np.nonzero(listed)
  # By line, those without a mask first, then in order of position: neighbours in memory.
  order = np.lexsort((other, ~every[line, other], line))
  line, other = line[order], other[order]
  kind = np.where(some[line, other], np.where(every[line, other], FULL, PARTIAL), 0)
  changes = np.diff(line) != 0
  flags = kind | np.append(True, changes) * FIRST | np.append(changes, True) * LAST
  rows, columns = (other, line) if transposed else (line, other)
  return Steps((rows << 16 | columns).astype(np.int32), flags.astype(np.int32)[None, None])


def _ends(position: Callable, num: int, block: int, length: int) -> tuple:
  """The first and the last positions of blocks."""
  first = np.arange(num) * block
  return position(first), position(np.minimum(first + block, length) - 1)
