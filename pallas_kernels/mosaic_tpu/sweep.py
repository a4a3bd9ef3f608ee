"""What a launch sweeps: the positions, the logits and the masks of the blocks of a pass."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import patterns
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.scores import Scores

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a launch sweeps.

  Attributes:
    pass_: which pairs.
    block: queries and keys of a block.
    num_queries, num_keys: real ones of a sequence.
    scores: how logits are made.
    leaves: the layouts of the pattern, each of which has a table.
  """

  pass_: Pass
  block: int
  num_queries: int
  num_keys: int
  scores: Scores
  leaves: tuple[patterns.BlockLayout, ...] = ()

  @property
  def queries_end(self) -> bool:
    """Whether the last block has more queries than there are."""
    return self.num_queries % self.block > 0

  @property
  def keys_end(self) -> bool:
    """The same of keys."""
    return self.num_keys % self.block > 0

  @property
  def factor(self) -> float:
    """Of the gradients of products, where derivatives do not have it."""
    # A constant is multiplied once a row of results, not once a pair.
    return self.scores.scale if self.scores.only_scale else 1.0

  def positions(self, shape: tuple[int, ...], row: Any, column: Any, transposed: bool) -> tuple:
    """Queries and keys of a part of a block that begins at `row` and `column`."""
    queries = row + lax.broadcasted_iota(jnp.int32, shape, 1 if transposed else 0)
    return queries, column + lax.broadcasted_iota(jnp.int32, shape, 0 if transposed else 1)

  def logits(
    self, products: Any, queries: Any, keys: Any, h: Any, derivatives: bool = False
  ) -> tuple:
    """In base 2; where asked for and not constant, the derivatives of the natural ones."""
    # One factor for the scale and the base: one operation a pair.
    if self.scores.only_scale:
      return products * (self.scores.scale * LOG2E), None
    # Broadcast first: a function of the user's may combine the four in any way.
    heads = jnp.full(products.shape, h, jnp.int32)
    make = lambda x: self.scores(x, queries, keys, heads)
    if not derivatives:
      return make(products) * LOG2E, None
    # Elementwise, so one tangent of ones gives every derivative.
    logits, derivative = jax.jvp(make, (products,), (jnp.ones_like(products),))
    return logits * LOG2E, derivative

  def mask(self, queries: Any, keys: Any, refs: Any) -> Any:
    """The pairs that attend."""
    i, j = self.pass_.query_position(queries), self.pass_.key_position(keys)
    # In the order of `leaves_of`, in which `_pairs` takes them.
    tables = [_spread(refs[f"table{n}"], self.block) for n in range(len(self.leaves))]
    if self.pass_.pattern is None:
      mask = self.pass_.allowed(i, j)
    else:
      mask = _pairs(self.pass_.pattern, i, j, iter(tables))
    mask = jnp.broadcast_to(mask, queries.shape)
    if "block_mask" in refs:
      mask = mask & _spread(refs["block_mask"], self.block)
    # Known before: sequences of whole blocks do without the comparison.
    if self.keys_end:
      mask = mask & (keys < self.num_keys)
    if self.queries_end:
      mask = mask & (queries < self.num_queries)
    return mask


def leaves_of(pattern: patterns.Pattern) -> tuple[patterns.BlockLayout, ...]:
  """The layouts in a pattern, in the order in which masks need them."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    return sum((leaves_of(part) for part in pattern.patterns), ())
  return (pattern,) if isinstance(pattern, patterns.BlockLayout) else ()


def _pairs(pattern: patterns.Pattern, i: Any, j: Any, tables: Any) -> Any:
  """`pattern.allowed`, with tables for layouts: a kernel cannot look up by position."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    join = jnp.logical_or if isinstance(pattern, patterns.Union) else jnp.logical_and
    return functools.reduce(join, [_pairs(part, i, j, tables) for part in pattern.patterns])
  if isinstance(pattern, patterns.BlockLayout):
    pairs = next(tables)
    return pairs & (j <= i) if pattern.causal else pairs
  return pattern.allowed(i, j)


def _spread(table: Any, block: int) -> Array:
  """A table [groups of lines, others] as which of [block, others] attend."""
  attend = table[...].astype(jnp.int32)
  size = block // attend.shape[0]
  # Only lines are repeated here: the other axis comes repeated (`launches._table`).
  attend = jnp.broadcast_to(attend[:, None, :], (attend.shape[0], size, attend.shape[1]))
  return attend.reshape(block, -1) != 0
