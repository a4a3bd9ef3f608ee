"""Queries that begin in the middle of a sequence: patterns and score functions count from there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Integer

from pallas_kernels import functions
from pallas_kernels import patterns

Offset = int | np.integer | Integer[Array | np.ndarray, ""]


def shifted(
  pattern: patterns.Pattern, score_fn: Callable | None, offset: Offset, T: int
) -> tuple[patterns.Pattern, Callable | None]:
  """A pattern and a score function for queries of which the first has position `offset`.

  Nothing else has to know of it: pairs become predicates of (i + offset, j), for which every
  implementation has its ways, and a traced offset is something that a predicate holds.

  Args:
    pattern: of positions in the whole sequence.
    score_fn: of positions in the whole sequence.
    offset: a number, or a traced one.
    T: queries.

  Raises:
    ValueError: the offset is no whole number >= 0 for which all positions are int32.
  """
  offset = _checked(offset, T)
  if isinstance(offset, int) and offset == 0:
    return pattern, score_fn
  # One object for equal patterns, so that heads with the same one are computed together.
  of_pattern = {}
  for h in range(pattern.period):
    head = pattern.of_head(h)
    of_pattern.setdefault(head, _shifted(head, offset))
  heads = tuple(of_pattern[pattern.of_head(h)] for h in range(pattern.period))
  pattern = patterns.PerHead(heads) if len(heads) > 1 else heads[0]
  return pattern, _from(offset, score_fn) if callable(score_fn) else score_fn


def explained(reason: str, offset: Offset) -> str:
  """Why a call is not supported, where the reason may be a predicate that holds the offset."""
  if not isinstance(offset, jax.core.Tracer):
    return reason
  return f"{reason} (query_offset is traced: reference and xla take that, others a number)"


def _shifted(head: patterns.Pattern, offset: Any) -> patterns.Where:
  def predicate(i: Any, j: Any) -> Any:
    return head.allowed(i + offset, j)

  predicate.__qualname__ = f"{head} from query {offset} on"  # its name in messages
  return patterns.Where(predicate, causal=False)


def _from(offset: Any, score_fn: Callable) -> Callable:
  def score(logit: Any, i: Any, j: Any, h: Any) -> Any:
    return score_fn(logit, i + offset, j, h)

  score.__qualname__ = functions.name_of(score_fn)
  return score


def _checked(offset: Any, T: int) -> Any:
  """A Python number, or a traced int32."""
  whole = isinstance(offset, int | np.integer) and not isinstance(offset, bool)
  is_array = hasattr(offset, "dtype") and np.shape(offset) == ()
  if not whole and not (is_array and jnp.issubdtype(offset.dtype, jnp.integer)):
    raise ValueError(
      f"query_offset={offset!r}: must be one whole number, the position of the first query, which "
      "may be traced"
    )
  if isinstance(offset, jax.core.Tracer):
    return offset.astype(jnp.int32)
  offset = int(offset)
  if not 0 <= offset <= np.iinfo(np.int32).max - T:
    raise ValueError(
      f"query_offset={offset}: must be >= 0, and {T} positions from there on must be int32"
    )
  return offset
