"""Functions of scalars, traced by JAX and evaluated inside kernels, element by element.

A kernel's arrays have one shape, or none, and not every operation of JAX has an instruction there.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval

from pallas_kernels import functions

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
# Equations that call a function, and which of their parameters it is.
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
    args = [make_arg() for make_arg, used in zip(make, self.used, strict=True) if used]
    results = _evaluate(self.jaxpr, self.consts, args, shape)
    kinds = (_kernel_dtype(var.aval.dtype) for var in self.jaxpr.outvars)
    return [_wide(x, dtype, shape) for x, dtype in zip(results, kinds, strict=True)]


def trace(function: Callable, *args: jax.ShapeDtypeStruct) -> Traced | None:
  """None where a kernel has not what the function needs."""
  try:
    closed = jax.make_jaxpr(function)(*args)
  except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # it wants arrays of numpy
    return None
  if not _is_known(closed.jaxpr, closed.consts):
    return None
  # What is not used is cut away with all that it was made of.
  jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return Traced(jaxpr, tuple(closed.consts), tuple(used))


def _is_known(jaxpr: Any, consts: Sequence) -> bool:
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


def _has_instruction(eqn: Any) -> bool:
  name, first = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
  if name == "rem":
    return bool(jnp.issubdtype(first.aval.dtype, jnp.integer))
  if name == "pow":
    # Of a constant base it is exp2 of a multiple; the sign of others is not known.
    return isinstance(first, core.Literal) and bool(first.val > 0)
  return name in _KNOWN


def _inner(eqn: Any) -> Any:
  """The function that an equation calls once."""
  return eqn.params.get(_CALLS.get(eqn.primitive.name))


def _evaluate(jaxpr: Any, consts: Sequence, args: Sequence, shape: tuple[int, ...]) -> list:
  """The results; floats of 16 bits are in float32, rounded after each operation.

  Not every instruction has a form for 16 bits.
  """
  consts = [_number(np.asarray(const)[()]) for const in consts]  # of programs, not of memory
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  number = lambda literal: _number(functions.value_of(literal))
  read = lambda atom: number(atom) if isinstance(atom, core.Literal) else values[atom]
  # Operations with no instruction of their own are made of those that have one.
  for eqn in jaxpr.eqns:
    operands, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
    inner = _inner(eqn)
    if inner is not None:
      results = _evaluate(inner.jaxpr, inner.consts, operands, shape)
    elif name == "broadcast_in_dim":
      results = [_wide(operands[0], _kernel_dtype(eqn.outvars[0].aval.dtype), shape)]
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
          x if jnp.shape(x) == shape else _wide(x, _kernel_dtype(atom.aval.dtype), shape)
          for x, atom in zip(operands, eqn.invars, strict=True)
        ]
      # A traced scalar has no layout, which an operation with a tile has to have.
      scalar = lambda x: isinstance(x, jax.core.Tracer) and jnp.shape(x) != shape
      operands = [_wide(x, x.dtype, shape) if scalar(x) else x for x in operands]
      params = dict(eqn.params)
      if name == "convert_element_type":
        params["new_dtype"] = _kernel_dtype(params["new_dtype"])
      results = eqn.primitive.bind(*operands, **params)
      results = results if eqn.primitive.multiple_results else [results]
    if inner is None:
      kinds = [var.aval.dtype for var in eqn.outvars]
      results = [_rounded(x, dtype) for x, dtype in zip(results, kinds, strict=True)]
    values |= zip(eqn.outvars, results, strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def _wide(x: Any, dtype: jax.typing.DTypeLike, shape: tuple[int, ...]) -> Any:
  return x if jnp.shape(x) == shape else lax.broadcast(jnp.asarray(x, dtype), shape)


def _kernel_dtype(dtype: Any) -> Any:
  """The dtype in which a kernel has values of a dtype."""
  return jnp.dtype(jnp.float32) if _is_half(dtype) else dtype


def _is_half(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 2


def _number(x: Any) -> Any:
  return x.astype(_kernel_dtype(x.dtype))


def _rounded(x: Any, dtype: Any) -> Any:
  return x.astype(dtype).astype(jnp.float32) if _is_half(dtype) else x
