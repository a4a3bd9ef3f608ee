"""Functions of users inside kernels: element by element, of positions and logits.

A kernel cannot look up an array by position, and its arrays have one shape, or none. What a score
function makes of its head and of arrays that it holds is computed outside, once a head, and the
kernel reads these values.
"""

import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval
from jaxtyping import Array

from pallas_kernels import functions
from pallas_kernels import patterns
from pallas_kernels.lowering import lists
from pallas_kernels.scores import Scores

# What the kernels have instructions for.
_KNOWN = frozenset(
  """
  add sub mul div neg abs sign max min clamp and or xor not eq ne lt le gt ge select_n
  shift_left shift_right_logical shift_right_arithmetic convert_element_type broadcast_in_dim
  integer_pow square one_minus_square sqrt rsqrt exp exp2 log tanh logistic sin cos
  add_any stop_gradient copy
  """.split()  # noqa: SIM905
)


_DTYPES = frozenset(map(jnp.dtype, ("float32", "bfloat16", "float16", "int32", "uint32", "bool")))
_POSITION = jax.ShapeDtypeStruct((), jnp.int32)
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr"}


class Traced(NamedTuple):
  """A function of scalars, for arrays of one shape.

  Attributes:
    jaxpr, consts: of what the results need.
    used: which of the arguments they need. A kernel must not make the others: what nothing needs
      has no layout.
  """

  jaxpr: Any
  consts: tuple
  used: tuple[bool, ...]

  def __call__(self, shape: tuple[int, ...], *make: Callable) -> list:
    """The results for arguments of a shape, each of which a function makes."""
    args = [one() for one, used in zip(make, self.used, strict=True) if used]
    results = _evaluate(self.jaxpr, self.consts, args, shape)
    kinds = (_kept(var.aval.dtype) for var in self.jaxpr.outvars)
    return [_wide(x, dtype, shape) for x, dtype in zip(results, kinds, strict=True)]


@functools.lru_cache(maxsize=256)
def of_pattern(pattern: patterns.Pattern) -> Callable | None:
  """(shape, i, j) -> which pairs attend, for blocks that `lists` visits and that are not full.

  i and j are functions that make the positions. None where that is no formula.
  """
  if isinstance(pattern, patterns.BlockLayout) and pattern.block_size % lists.BLOCK == 0:
    # The layout holds all pairs of a block that is visited, or none.
    return of_pattern(patterns.Dense(causal=pattern.causal))
  if isinstance(pattern, patterns.Intersection):
    parts = [of_pattern(one) for one in pattern.patterns]
    if None in parts:
      return None
    return lambda *how: functools.reduce(jnp.logical_and, (part(*how) for part in parts))
  traced = _trace(pattern.allowed, _POSITION, _POSITION)
  return None if traced is None else lambda *how: traced(*how)[0]


def computes(scores: Scores) -> bool:
  """Whether the kernels can compute these logits and their derivatives."""
  if scores.only_scale:
    return True
  if _with_derivative(scores) is None:
    return False
  return not (scores.learned and learned(scores)) or _with_slopes(scores) is not None


def logits(scores: Scores, products, i, j, values: tuple[Callable, ...]):
  """The logits of products, and their derivatives by them; functions make all else."""
  return _with_derivative(scores)(products.shape, lambda: products, i, j, *values)


def slopes(scores: Scores, products, i, j, values: tuple[Callable, ...]):
  """The logits of products, and their derivatives by those `values` that are `learned`."""
  return _with_slopes(scores)(products.shape, lambda: products, i, j, *values)


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


def _logit(scores: Scores, product, i, j, values) -> Any:
  logit = scores.capped(product)
  if scores.score_fn is None:
    return logit
  typed = lambda x, dtype: x != 0 if jnp.issubdtype(dtype, jnp.bool_) else x.astype(dtype)
  pairs = zip(values, _values_for_one(scores), strict=True)
  values = [typed(x, one.dtype) for x, one in pairs]
  return functions.unknown_part(scores.score_fn, values, {0: logit, 1: i, 2: j})


def _args(scores: Scores) -> tuple:
  kind = lambda dtype: jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32
  each = (jax.ShapeDtypeStruct((), kind(x.dtype)) for x in _values_for_one(scores))
  return jax.ShapeDtypeStruct((), jnp.float32), _POSITION, _POSITION, *each


@functools.lru_cache(maxsize=64)
def _with_derivative(scores: Scores) -> Traced | None:
  if any(x.shape for x in _values_for_one(scores)):
    return None  # an array that is looked up by position

  def both(product, i, j, *values):
    logit = lambda x: _logit(scores, x, i, j, values).astype(jnp.float32)
    return jax.jvp(logit, (product,), (jnp.ones_like(product),))

  return _trace(both, *_args(scores))


@functools.lru_cache(maxsize=64)
def _with_slopes(scores: Scores) -> Traced | None:
  """As `_with_derivative`, by values."""

  def all_of(product, i, j, *values):
    def logit(*some):
      every = list(values)
      for n, x in zip(learned(scores), some, strict=True):
        every[n] = x
      return _logit(scores, product, i, j, every).astype(jnp.float32)

    some = tuple(values[n] for n in learned(scores))
    slopes = []
    for n in range(len(some)):
      tangents = tuple(jnp.full_like(x, float(m == n)) for m, x in enumerate(some))
      value, slope = jax.jvp(logit, some, tangents)
      slopes.append(slope)
    return value, *slopes

  return _trace(all_of, *_args(scores))


def _trace(function: Callable, *args) -> Traced | None:
  """None where a kernel has not what the function needs."""
  try:
    closed = jax.make_jaxpr(function)(*args)
  except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # it wants arrays of numpy
    return None
  if not _is_known(closed.jaxpr, closed.consts):
    return None
  jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return Traced(jaxpr, tuple(closed.consts), tuple(used))


def _is_known(jaxpr, consts) -> bool:
  # A value that another function is traced with is not known when the kernel is.
  if any(jnp.ndim(const) or isinstance(const, jax.core.Tracer) for const in consts):
    return False
  for eqn in jaxpr.eqns:
    inner = _inner(eqn)
    known = _is_known(inner.jaxpr, inner.consts) if inner is not None else _has_instruction(eqn)
    avals = [var.aval for var in eqn.outvars]
    if not known or any(x.shape or x.dtype not in _DTYPES for x in avals):
      return False
  return True


def _has_instruction(eqn) -> bool:
  name, first = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
  if name == "rem":
    return bool(jnp.issubdtype(first.aval.dtype, jnp.integer))
  if name == "pow":
    return isinstance(first, core.Literal) and bool(first.val > 0)
  return name in _KNOWN


def _inner(eqn):
  """The function that an equation calls once."""
  return eqn.params.get(_CALLS.get(eqn.primitive.name))


def _evaluate(jaxpr, consts, args, shape):
  """The results; floats of 16 bits are in float32, rounded after each operation.

  Not every instruction has a form for 16 bits.
  """
  consts = [_number(np.asarray(const)[()]) for const in consts]  # of programs, not of memory
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  number = lambda literal: _number(functions.value_of(literal))
  read = lambda atom: number(atom) if isinstance(atom, core.Literal) else values[atom]
  for eqn in jaxpr.eqns:
    operands, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
    inner = _inner(eqn)
    if inner is not None:
      results = _evaluate(inner.jaxpr, inner.consts, operands, shape)
    elif name == "broadcast_in_dim":
      results = [_wide(operands[0], _kept(eqn.outvars[0].aval.dtype), shape)]
    elif name == "add_any":
      results = [lax.add(*operands)]
    elif name == "logistic":
      results = [1 / (1 + jnp.exp(-operands[0]))]
    elif name == "not" and eqn.invars[0].aval.dtype == bool:
      results = [operands[0] ^ True]
    elif name == "pow":
      results = [jnp.exp2(operands[1] * float(np.log2(operands[0])))]
    elif name in ("stop_gradient", "copy"):
      results = operands
    else:
      if name == "select_n":  # all of one shape
        operands = [
          x if jnp.shape(x) == shape else _wide(x, _kept(atom.aval.dtype), shape)
          for x, atom in zip(operands, eqn.invars, strict=True)
        ]
      scalar = lambda x: isinstance(x, jax.core.Tracer) and jnp.shape(x) != shape
      operands = [_wide(x, x.dtype, shape) if scalar(x) else x for x in operands]
      params = dict(eqn.params)
      if name == "convert_element_type":
        params["new_dtype"] = _kept(params["new_dtype"])
      results = eqn.primitive.bind(*operands, **params)
      results = results if eqn.primitive.multiple_results else [results]
    if inner is None:
      kinds = [var.aval.dtype for var in eqn.outvars]
      results = [_rounded(x, dtype) for x, dtype in zip(results, kinds, strict=True)]
    values |= zip(eqn.outvars, results, strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def _wide(x, dtype, shape):
  return x if jnp.shape(x) == shape else lax.broadcast(jnp.asarray(x, dtype), shape)


def _kept(dtype):
  """The dtype in which a kernel has values of a dtype."""
  return jnp.dtype(jnp.float32) if _is_half(dtype) else dtype


def _is_half(dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def _number(x):
  return x.astype(_kept(x.dtype))


def _rounded(x, dtype):
  return x.astype(dtype).astype(jnp.float32) if _is_half(dtype) else x
