"""Functions of users inside kernels: element by element, of positions and logits.

A kernel cannot look up an array by position, and its arrays have one shape, or none.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from pallas_kernels import lists
from pallas_kernels import patterns
from pallas_kernels.scores import Scores

_SHAPE = (8, 16)  # stands for a tile's
# What the kernels have instructions for.
_KNOWN = frozenset(
  """
  add sub mul div rem neg abs sign max min clamp and or xor not eq ne lt le gt ge select_n
  shift_left shift_right_logical shift_right_arithmetic convert_element_type broadcast_in_dim
  integer_pow square one_minus_square sqrt rsqrt exp exp2 log tanh logistic sin cos
  add_any stop_gradient copy
  """.split()  # noqa: SIM905
)


@functools.lru_cache(maxsize=256)
def of_pattern(pattern: patterns.Pattern) -> Callable | None:
  """(i, j) -> which pairs attend, for blocks that `lists` visits and that are not full.

  None where that is no formula.
  """
  if isinstance(pattern, patterns.BlockLayout) and pattern.block_size % lists.BLOCK == 0:
    # The layout holds all pairs of a block that is visited, or none.
    return of_pattern(patterns.Dense(causal=pattern.causal))
  if isinstance(pattern, patterns.Intersection):
    parts = [of_pattern(one) for one in pattern.patterns]
    if None in parts:
      return None
    return lambda i, j: functools.reduce(jnp.logical_and, (part(i, j) for part in parts))
  position = jax.ShapeDtypeStruct(_SHAPE, jnp.int32)
  closed = _jaxpr(pattern.allowed, position, position)
  if closed is None:
    return None
  return lambda i, j: _wide(evaluate(closed, i, j)[0], jnp.bool_, i.shape)


def computes(scores: Scores) -> bool:
  """Whether the kernels can compute these logits and their derivatives."""
  return scores.only_scale or _with_derivative(scores) is not None


def logits(scores: Scores, products, i, j, h):
  """The logits of products, and their derivatives by them."""
  return evaluate(_with_derivative(scores), products, i, j, h)


def evaluate(closed, *args):
  """The results of a function, traced for arrays of another shape, for these arrays."""
  shape = args[0].shape
  return _evaluate(closed.jaxpr, closed.consts, args, shape)


@functools.lru_cache(maxsize=64)
def _with_derivative(scores: Scores):
  def both(products, i, j, h):
    return jax.jvp(lambda x: scores(x, i, j, h), (products,), (jnp.ones_like(products),))

  position = jax.ShapeDtypeStruct(_SHAPE, jnp.int32)
  return _jaxpr(both, jax.ShapeDtypeStruct(_SHAPE, jnp.float32), *(position,) * 3)


def _jaxpr(function: Callable, *args):
  """The traced function; None where a kernel has not what it needs."""
  try:
    closed = jax.make_jaxpr(function)(*args)
  except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # it wants arrays of numpy
    return None
  return closed if _is_known(closed.jaxpr, closed.consts) else None


def _is_known(jaxpr, consts) -> bool:
  if any(jnp.ndim(const) for const in consts):
    return False
  for eqn in jaxpr.eqns:
    if (inner := _inner(eqn)) is not None:
      if not _is_known(inner.jaxpr, inner.consts):
        return False
    elif eqn.primitive.name not in _KNOWN:
      return False
    if any(var.aval.shape not in ((), _SHAPE) for var in eqn.outvars):
      return False
  return True


def _inner(eqn):
  """The function that an equation calls."""
  for name in ("jaxpr", "call_jaxpr"):
    if isinstance(eqn.params.get(name), core.ClosedJaxpr):
      return eqn.params[name]
  return None


def _evaluate(jaxpr, consts, args, shape):
  consts = [np.asarray(const)[()] for const in consts]  # of programs, not of memory
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    name = eqn.primitive.name
    if (inner := _inner(eqn)) is not None:
      results = _evaluate(inner.jaxpr, inner.consts, operands, shape)
    elif name == "broadcast_in_dim":
      results = [_wide(operands[0], eqn.outvars[0].aval.dtype, shape)]
    elif name == "add_any":
      results = [lax.add(*operands)]
    elif name == "logistic":
      results = [1 / (1 + jnp.exp(-operands[0]))]
    elif name in ("stop_gradient", "copy"):
      results = operands
    else:
      if name == "select_n":  # all of one shape
        operands = [
          x if jnp.shape(x) == shape else _wide(x, atom.aval.dtype, shape)
          for x, atom in zip(operands, eqn.invars, strict=True)
        ]
      results = eqn.primitive.bind(*operands, **eqn.params)
      results = results if eqn.primitive.multiple_results else [results]
    values |= zip(eqn.outvars, results, strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def _wide(x, dtype, shape):
  return x if jnp.shape(x) == shape else lax.broadcast(jnp.asarray(x, dtype), shape)
