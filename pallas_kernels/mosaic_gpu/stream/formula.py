"""Functions of users inside kernels: of positions, and of logits.

A kernel cannot look up an array by position. What a score function makes of its head and of arrays
that it holds is computed outside, once a head, and the kernel reads these values.
"""

import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import functions
from pallas_kernels import patterns
from pallas_kernels.lowering import lists
from pallas_kernels.mosaic_gpu.stream.elementwise import trace
from pallas_kernels.mosaic_gpu.stream.elementwise import Traced
from pallas_kernels.scores import Scores

_POSITION = jax.ShapeDtypeStruct((), jnp.int32)


@functools.lru_cache(maxsize=256)
def of_pattern(pattern: patterns.Pattern) -> Callable | None:
  """(shape, i, j) -> which pairs attend, for blocks that `lists` visits and that are not full.

  i and j are functions that make the positions. None where that is no formula.
  """
  if isinstance(pattern, patterns.BlockLayout) and pattern.block_size % lists.BLOCK == 0:
    # The layout holds all pairs of a block that is visited, or none.
    return of_pattern(patterns.Dense(causal=pattern.causal))
  if isinstance(pattern, patterns.Intersection):
    parts = [of_pattern(part) for part in pattern.patterns]
    if None in parts:
      return None
    return lambda *args: functools.reduce(jnp.logical_and, (part(*args) for part in parts))
  # Once, of scalars; each kernel then makes it for tiles of its own shape.
  traced = trace(pattern.allowed, _POSITION, _POSITION)
  return None if traced is None else lambda *args: traced(*args)[0]


def computes(scores: Scores) -> bool:
  """Whether the kernels can compute these logits and their derivatives."""
  if scores.only_scale:
    return True
  if _with_derivative(scores) is None:
    return False
  return not (scores.learned and learned(scores)) or _with_value_derivatives(scores) is not None


def logits(
  scores: Scores, products: Array, i: Callable, j: Callable, values: tuple[Callable, ...]
) -> tuple[Array, Array]:
  """The logits of products, and their derivatives by them; functions make all else."""
  return tuple(_with_derivative(scores)(products.shape, lambda: products, i, j, *values))


def value_derivatives(
  scores: Scores, products: Array, i: Callable, j: Callable, values: tuple[Callable, ...]
) -> list[Array]:
  """The logits of products, and their derivatives by those `values` that are `learned`."""
  return _with_value_derivatives(scores)(products.shape, lambda: products, i, j, *values)


def values(scores: Scores, heads: int, held: tuple) -> tuple[Array, ...]:
  """What kernels read, [heads] each: float32, or int32 for booleans too."""
  function = scores.score_fn
  if function is None:
    return ()
  each = functions.known_part(function, held, {3: np.arange(heads, dtype=np.int32)})
  kind = lambda x: jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.int32
  return tuple(jnp.broadcast_to(jnp.asarray(x, kind(x)), (heads,)) for x in each)


@functools.lru_cache(maxsize=64)
def _values_for_one(scores: Scores) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes and dtypes of the values of one head."""
  function = scores.score_fn
  if function is None:
    return ()
  held = {  # by their places among what all functions hold
    const.number: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
    for var, const in zip(function.program.constvars, function.consts, strict=True)
  }
  known = lambda held, h: functions.known_part(function, held, {3: h})
  return tuple(jax.eval_shape(known, held, _POSITION))


def learned(scores: Scores) -> tuple[int, ...]:
  """Which values have derivatives."""
  each = enumerate(_values_for_one(scores))
  return tuple(n for n, x in each if jnp.issubdtype(x.dtype, jnp.floating))


def _logit(scores: Scores, product: Any, i: Any, j: Any, values: Sequence) -> Any:
  logit = scores.capped(product)
  if scores.score_fn is None:
    return logit
  # Memory has float32 and int32; the function meets the dtypes that it was traced with.
  typed = lambda x, dtype: x != 0 if jnp.issubdtype(dtype, jnp.bool_) else x.astype(dtype)
  pairs = zip(values, _values_for_one(scores), strict=True)
  values = [typed(x, known.dtype) for x, known in pairs]
  return functions.unknown_part(scores.score_fn, values, {0: logit, 1: i, 2: j})


def _args(scores: Scores) -> tuple:
  kind = lambda dtype: jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32
  each = (jax.ShapeDtypeStruct((), kind(x.dtype)) for x in _values_for_one(scores))
  return jax.ShapeDtypeStruct((), jnp.float32), _POSITION, _POSITION, *each


@functools.lru_cache(maxsize=64)
def _with_derivative(scores: Scores) -> Traced | None:
  if any(x.shape for x in _values_for_one(scores)):
    return None  # an array that is looked up by position

  def both(product: Any, i: Any, j: Any, *values: Any) -> tuple:
    # Elementwise, so that one tangent of 1 gives the derivative.
    logit = lambda x: _logit(scores, x, i, j, values).astype(jnp.float32)
    return jax.jvp(logit, (product,), (jnp.ones_like(product),))

  return trace(both, *_args(scores))


@functools.lru_cache(maxsize=64)
def _with_value_derivatives(scores: Scores) -> Traced | None:
  """As `_with_derivative`, by values."""

  def all_of(product: Any, i: Any, j: Any, *values: Any) -> tuple:
    def logit(*learned_values: Any) -> Any:
      every = list(values)
      for n, x in zip(learned(scores), learned_values, strict=True):
        every[n] = x
      return _logit(scores, product, i, j, every).astype(jnp.float32)

    primals = tuple(values[n] for n in learned(scores))
    derivatives = []
    # One forward derivative for each of the few values.
    for n in range(len(primals)):
      tangents = tuple(jnp.full_like(x, float(m == n)) for m, x in enumerate(primals))
      value, derivative = jax.jvp(logit, primals, tangents)
      derivatives.append(derivative)
    return value, *derivatives

  return trace(all_of, *_args(scores))
