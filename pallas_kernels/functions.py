"""Functions of users, traced for one pair at every call, apart from the arrays that they hold.

What is traced can be compared: calls whose functions compute the same share a compiled program,
whatever objects these are, and what changed in an object since the last call is seen. Arrays that a
function holds are arguments of that program, in one flat tuple, `held`.
"""

import types
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend import linear_util

from pallas_kernels import patterns

_MOST_BITS = 1 << 33  # of a table of pairs: 1 GB

# Primitives that take arrays for scalars as they are.
ELEMENTWISE = frozenset(
  """
  add sub mul div rem pow neg abs sign max min clamp and or xor not eq ne lt le gt ge select_n
  shift_left shift_right_logical shift_right_arithmetic convert_element_type floor ceil round
  integer_pow square one_minus_square sqrt rsqrt cbrt exp exp2 expm1 log log1p tanh logistic sin cos
  tan atan2 erf is_finite add_any stop_gradient copy nextafter population_count
  """.split()  # noqa: SIM905
)


class Place(NamedTuple):
  """Of an array in the flat tuple of what functions hold."""

  number: int


class Program(NamedTuple):
  """A jaxpr without the values that JAX attaches to it: traced ones must not outlive the call."""

  constvars: tuple
  invars: tuple
  eqns: tuple
  outvars: tuple


class Function:
  """A function of one pair, equal to others that compute the same.

  Attributes:
    name: for messages.
    program: of scalars; its constvars are what the function holds.
    consts: for each of them a numpy array, or its place in `held`.
  """

  def __init__(self, name: str, program: Program, consts: tuple[np.ndarray | Place, ...]):
    self.name, self.program, self.consts = name, program, consts
    key = _Content()
    values = tuple(x if isinstance(x, Place) else key.of_param(x) for x in consts)
    self._key = key.of_jaxpr(program), values
    self._key += (object(),) if key.is_opaque else ()  # equal to itself alone
    self._hash = hash(self._key)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Function) and self._key == other._key

  def __hash__(self) -> int:
    return self._hash

  def __repr__(self) -> str:
    return self.name

  @property
  def places(self) -> tuple[int, ...]:
    """Of what it holds, in `held`."""
    return tuple(x.number for x in self.consts if isinstance(x, Place))

  def result(self, what: str) -> Any:
    """What it gives for a pair, shape and dtype.

    Raises:
      ValueError: that is no single value; `what` says whose.
    """
    results = [var.aval for var in self.program.outvars]
    if len(results) != 1 or results[0].shape:
      given = ", ".join(map(str, results)) or "nothing"
      raise ValueError(f"{what}: gives {given} for one pair, must give one value")
    return results[0]

  def uses(self, n: int) -> bool:
    """Whether the result depends on argument n."""
    var, eqns = self.program.invars[n], self.program.eqns
    read = (*self.program.outvars, *(x for eqn in eqns for x in eqn.invars))
    return any(x is var for x in read)

  def __call__(self, *args: Any, held: tuple = ()) -> Any:
    """The results for arguments that broadcast, given all that the call's functions hold."""
    consts = [held[x.number] if isinstance(x, Place) else x[()] for x in self.consts]
    return evaluate(self.program, consts, args)[0]


def trace(name: str, function: Callable, args, held: list, *, constant: bool) -> Function:
  """Of a function of scalars; what it holds is added to `held`.

  Args:
    constant: whether arrays of known values become part of the function.
  """
  # A new lambda, for JAX keeps what it traced by the function.
  closed = jax.make_jaxpr(lambda *args: function(*args))(*args)
  if _has_rules(closed.jaxpr):
    closed = _with_own_rules(closed, _ORDERS)
  consts = []
  for const in closed.consts:
    if constant and not isinstance(const, jax.core.Tracer):
      consts.append(np.asarray(const))
    else:
      consts.append(Place(len(held)))
      held.append(const)
  return Function(name, _program(closed.jaxpr), tuple(consts))


def _program(jaxpr: Any) -> Program:
  return Program(*(tuple(getattr(jaxpr, field)) for field in Program._fields))


def name_of(function: Callable) -> str:
  """As a message names it."""
  return getattr(function, "__qualname__", None) or repr(function)


# ---------------------------------------------------------------------------------------- patterns


def of_pattern(pattern: patterns.Pattern, T: int, S: int, held: list) -> patterns.Pattern:
  """The pattern with its predicates traced.

  Arrays of known values become part of a predicate, so that lists of blocks can be made of them;
  traced ones are added to `held`.

  Raises:
    ValueError: for a predicate that gives neither booleans nor integers, or that fails.
  """

  def traced(where: patterns.Where) -> patterns.Where:
    if isinstance(where.predicate, Function):
      return where
    name, position = name_of(where.predicate), jax.ShapeDtypeStruct((), jnp.int32)
    try:
      predicate = trace(name, where.predicate, (position, position), held, constant=True)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):  # it wants arrays of numpy
      predicate = _table(where, name, T, S)
    except Exception as error:
      raise ValueError(f"Where(predicate={name}): {type(error).__name__}: {error}") from error
    patterns.check_pairs(name, predicate.result(f"Where(predicate={name})").dtype)
    return patterns.Where(predicate, where.causal)

  return patterns.replaced(patterns.by_content(pattern), traced)


def bound(pattern: patterns.Pattern, held: tuple) -> patterns.Pattern:
  """The pattern for given values of what its predicates hold: not to be compared."""
  if not holds(pattern):
    return pattern

  def given(where: patterns.Where) -> patterns.Where:
    predicate = lambda i, j: where.predicate(i, j, held=held)
    return patterns.Where(predicate, where.causal)

  return patterns.replaced(pattern, given)


def holds(pattern: patterns.Pattern) -> bool:
  """Whether the pairs of a traced pattern depend on traced arrays."""
  with_places = []

  def look(where: patterns.Where) -> patterns.Where:
    with_places.append(isinstance(where.predicate, Function) and bool(where.predicate.places))
    return where

  patterns.replaced(pattern, look)
  return any(with_places)


def _table(where: patterns.Where, name: str, T: int, S: int) -> Function:
  """A predicate that only numpy can run, as one that looks its results up."""
  if T * S > _MOST_BITS:
    raise ValueError(
      f"Where(predicate={name}): runs on numpy arrays alone, so that it needs a table of "
      f"T x S = {T} x {S} bits, more than {_MOST_BITS}: look up jax.numpy arrays instead"
    )
  every = patterns.Where(where.predicate, causal=False)
  rows, step = [], max(1, (1 << 24) // S)
  j = np.arange(S, dtype=np.int32)[None]
  for start in range(0, T, step):
    i = np.arange(start, min(start + step, T), dtype=np.int32)[:, None]
    try:
      pairs = np.broadcast_to(every.allowed(i, j), (len(i), S))
    except Exception as error:
      raise ValueError(
        f"Where(predicate={name}): runs neither on jax.numpy nor, for {T=} and {S=}, on numpy: "
        f"{type(error).__name__}: {error}"
      ) from error
    rows.append(np.packbits(pairs, axis=1, bitorder="little"))
  table = np.concatenate(rows)
  look_up = lambda i, j: (jnp.asarray(table)[i, j >> 3].astype(jnp.int32) >> (j & 7)) & 1
  position = jax.ShapeDtypeStruct((), jnp.int32)
  return trace(name, look_up, (position, position), [], constant=True)


# -------------------------------------------------------------------------------------- evaluation


def evaluate(jaxpr: Any, consts, args, apply: Callable | None = None) -> list:
  """A jaxpr of scalars for arrays that broadcast.

  Args:
    apply: (equation, operands) -> results, for other equations than calls by `jax.jit`.
  """
  apply = apply or apply_elementwise
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  read = lambda atom: value_of(atom) if isinstance(atom, core.Literal) else values[atom]
  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in ("jit", "pjit"):
      inner = eqn.params["jaxpr"]
      results = evaluate(inner.jaxpr, inner.consts, operands, apply)
    else:
      results = apply(eqn, operands)
    values |= zip(eqn.outvars, results, strict=True)
  return [read(atom) for atom in jaxpr.outvars]


def value_of(literal: core.Literal) -> Any:
  """Without the mesh under which it was traced: the program may be used under another."""
  return np.asarray(literal.val)[()]


def apply_elementwise(eqn: Any, operands: Any) -> list:
  """The results of one equation for every element of its operands."""

  def bind(*operands: Any) -> list:
    if eqn.primitive is _ruled:
      return _call_ruled(*operands, **eqn.params)
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]

  ranks = [len(atom.aval.shape) for atom in eqn.invars]
  shapes = [jnp.shape(x) for x in operands]
  # The axes in front of the equation's own are those of pairs.
  fronts = [shape[: len(shape) - rank] for shape, rank in zip(shapes, ranks, strict=True)]
  if not any(fronts):
    return bind(*operands)
  shape = np.broadcast_shapes(*fronts)
  if eqn.primitive.name in ELEMENTWISE and not any(ranks):
    if eqn.primitive.name == "select_n" or any(x not in ((), shape) for x in shapes):
      dtypes = (atom.aval.dtype for atom in eqn.invars)
      wide = zip(operands, dtypes, strict=True)
      operands = [jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x, dtype in wide]
    return bind(*operands)
  # Axes of one element are not mapped, so that what depends on heads alone is computed once a head.
  fronts = [(1,) * (len(shape) - len(front)) + front for front in fronts]
  mapped = [
    jnp.reshape(x, (*(n for n in front if n != 1), *full[len(full) - rank :]))
    for x, full, front, rank in zip(operands, shapes, fronts, ranks, strict=True)
  ]
  function = bind
  for axis in reversed(range(len(shape))):
    axes = [None if front[axis] == 1 else 0 for front in fronts]
    if any(x is not None for x in axes):
      function = jax.vmap(function, in_axes=axes)
  results = function(*mapped)
  # [..] of the mapped axes -> of all of them
  return [
    jnp.reshape(x, (*shape, *var.aval.shape)) for x, var in zip(results, eqn.outvars, strict=True)
  ]


# --------------------------------------------------------------------------- rules of derivatives

# A call of a function with a rule of its derivatives (jax.custom_jvp, jax.custom_vjp) as programs,
# which can be compared and hold nothing. JAX has the rule as a function, with its closure.
_ruled = core.Primitive("ruled")
_ruled.multiple_results = True
_ruled.def_abstract_eval(lambda *_, value, **params: [var.aval for var in value.outvars])

_RULES = "custom_jvp_call", "custom_vjp_call"
_ORDERS = 2  # of derivatives that have rules; those of higher order are of what rules compute


def _has_rules(jaxpr: Any) -> bool:
  def has(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name in _RULES or (name in ("jit", "pjit") and _has_rules(eqn.params["jaxpr"].jaxpr))

  return any(map(has, jaxpr.eqns))


def _with_own_rules(closed: Any, orders: int) -> Any:
  """A closed jaxpr whose calls with rules are `_ruled`, or for no orders are what they compute."""

  def apply(eqn, operands):
    if eqn.primitive.name not in _RULES:
      return apply_elementwise(eqn, operands)
    call = eqn.params["call_jaxpr"]
    if not orders:
      return evaluate(call.jaxpr, call.consts, operands, apply)
    ruled = _ruled_of(eqn, orders)
    if ruled is None:
      return apply_elementwise(eqn, operands)
    value, rule, floats = ruled
    programs = dict(value=_program(value.jaxpr), rule=_program(rule.jaxpr), floats=floats)
    return _ruled.bind(*value.consts, *rule.consts, *operands, **programs)

  run = lambda *args: evaluate(closed.jaxpr, closed.consts, args, apply)
  return jax.make_jaxpr(run)(*_shapes(closed.jaxpr.invars))


def _ruled_of(eqn: Any, orders: int) -> tuple[Any, Any, tuple[int, ...]] | None:
  """Jaxprs of what an equation with a rule computes, and of its tangents; None if they fail.

  The third: by which operands, whose tangents follow the operands in the second.
  """
  call = eqn.params["call_jaxpr"]
  is_float = lambda var: jnp.issubdtype(var.aval.dtype, jnp.floating)
  forward = eqn.primitive.name == "custom_jvp_call"
  # The rule of a custom_vjp gives gradients of one number, and none by what its function holds.
  simple = all(not var.aval.shape for var in eqn.outvars) and not eqn.params["num_consts"]
  if not all(map(is_float, eqn.outvars)) or not (forward or simple):
    return None
  shapes = _shapes(eqn.invars)
  floats = tuple(n for n, var in enumerate(eqn.invars) if is_float(var))

  def tangents(*args):
    operands, given = args[: len(shapes)], args[len(shapes) :]

    def function(*some):
      changed = dict(zip(floats, some, strict=True))
      return apply_elementwise(eqn, [changed.get(n, x) for n, x in enumerate(operands)])

    some = tuple(operands[n] for n in floats)
    if forward:
      return jax.jvp(function, some, given)[1]
    results, pull = jax.vjp(function, *some)
    sums = []
    for n, result in enumerate(results):
      grads = pull([jnp.full_like(x, float(m == n)) for m, x in enumerate(results)])
      parts = (jnp.sum(grad * x).astype(result.dtype) for grad, x in zip(grads, given, strict=True))
      sums.append(sum(parts, jnp.zeros_like(result)))
    return sums

  rule = jax.make_jaxpr(tangents)(*shapes, *(shapes[n] for n in floats))
  value = _with_own_rules(call, 0) if _has_rules(call.jaxpr) else call
  return value, _with_own_rules(rule, orders - 1) if _has_rules(rule.jaxpr) else rule, floats


def _call_ruled(*operands, value: Program, rule: Program, floats: tuple[int, ...]) -> list:
  first, second = len(value.constvars), len(value.constvars) + len(rule.constvars)

  @jax.custom_jvp
  def call(of_value, of_rule, operands):
    return evaluate(value, of_value, operands)

  @call.defjvp
  def call_jvp(primals, tangents):
    _, of_rule, operands = primals
    given = (tangents[2][n] for n in floats)
    return call(*primals), evaluate(rule, of_rule, (*operands, *given))

  return call(operands[:first], operands[first:second], operands[second:])


def _shapes(variables: Any) -> list[jax.ShapeDtypeStruct]:
  return [
    jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, weak_type=x.aval.weak_type) for x in variables
  ]


# ----------------------------------------------------------------------------------- in two parts


class _Literal(NamedTuple):
  value: Any


class _Known(NamedTuple):
  """Made of known arguments alone."""

  number: int
  value: Any


def known_part(function: Function, held: Any, known: dict[int, Any]) -> list:
  """What a function needs of what it holds and of some arguments, which `known` has by place."""
  consts = [held[x.number] if isinstance(x, Place) else x[()] for x in function.consts]
  used = {}
  nothing = lambda eqn, operands: [None] * len(eqn.outvars)
  use = lambda x: used.setdefault(x.number, x.value)
  _Walk(apply_elementwise, nothing, use).all_of(function, consts, known)
  return list(used.values())


def unknown_part(function: Function, values: list, unknown: dict[int, Any]) -> Any:
  """The function, given `known_part` and the other arguments."""
  places = {}
  nothing = lambda eqn, operands: [None] * len(eqn.outvars)
  use = lambda x: values[places.setdefault(x.number, len(places))]
  known = {n: None for n in range(len(function.program.invars)) if n not in unknown}
  walk = _Walk(nothing, apply_elementwise, use)
  return walk.all_of(function, [None] * len(function.consts), known, unknown)


class _Walk:
  """Goes through a program in which values are known, or not; always in the same order.

  Attributes:
    of_known, of_unknown: (equation, operands) -> results.
    use: what an equation that is not known takes for a known operand.
  """

  def __init__(self, of_known: Callable, of_unknown: Callable, use: Callable):
    self.of_known, self.of_unknown, self.use, self.count = of_known, of_unknown, use, 0

  def all_of(self, function: Function, consts: list, known: dict, unknown: dict | None = None):
    """The result of a function, for arguments by place."""
    places = range(len(function.program.invars))
    unknown = unknown or {}
    args = [self._known(known[n]) if n in known else unknown.get(n) for n in places]
    (result,) = self._run(function.program, [self._known(x) for x in consts], args)
    return self._open(result)

  def _known(self, value: Any) -> _Known:
    self.count += 1
    return _Known(self.count, value)

  def _open(self, x: Any) -> Any:
    return self.use(x) if isinstance(x, _Known) else x.value if isinstance(x, _Literal) else x

  def _run(self, program, consts, args) -> list:
    values = dict(zip((*program.constvars, *program.invars), (*consts, *args), strict=True))
    read = lambda x: _Literal(value_of(x)) if isinstance(x, core.Literal) else values[x]
    for eqn in program.eqns:
      operands = [read(atom) for atom in eqn.invars]
      if eqn.primitive.name in ("jit", "pjit"):
        inner = eqn.params["jaxpr"]
        results = self._run(inner.jaxpr, [self._known(x) for x in inner.consts], operands)
      elif all(isinstance(x, _Known | _Literal) for x in operands):
        known_values = self.of_known(eqn, [x.value for x in operands])
        results = [self._known(x) for x in known_values]
      else:
        results = self.of_unknown(eqn, [self._open(x) for x in operands])
      values |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in program.outvars]


# ----------------------------------------------------------------------------------------- content


class _Content:
  """Makes of jaxprs what can be compared.

  Attributes:
    is_opaque: whether that leaves out a part which cannot.
  """

  def __init__(self):
    self.is_opaque = False

  def of_jaxpr(self, jaxpr: Any) -> tuple:
    numbers = {}
    atom = lambda x: (
      self.of_param(np.asarray(x.val))
      if isinstance(x, core.Literal)
      else numbers.setdefault(x, len(numbers))
    )
    inputs = tuple((atom(x), str(x.aval)) for x in (*jaxpr.constvars, *jaxpr.invars))
    eqns = []
    for eqn in jaxpr.eqns:
      params = tuple((name, self.of_param(x)) for name, x in sorted(eqn.params.items()))
      operands = tuple(atom(x) for x in eqn.invars)
      results = tuple((atom(x), str(x.aval)) for x in eqn.outvars)
      eqns.append((eqn.primitive.name, params, operands, results))
    return inputs, tuple(eqns), tuple(atom(x) for x in jaxpr.outvars)

  def of_param(self, x: Any) -> Any:
    if isinstance(x, core.ClosedJaxpr | core.Jaxpr):
      consts = (self.of_param(np.asarray(const)) for const in getattr(x, "consts", ()))
      return self.of_jaxpr(getattr(x, "jaxpr", x)), tuple(consts)
    if isinstance(x, Program):
      return self.of_jaxpr(x)
    if isinstance(x, np.ndarray):
      return x.shape, str(x.dtype), x.tobytes()
    if isinstance(x, tuple | list):
      return tuple(self.of_param(item) for item in x)
    if isinstance(x, dict):
      return tuple((name, self.of_param(item)) for name, item in sorted(x.items()))
    if isinstance(x, types.FunctionType | linear_util.WrappedFun):
      self.is_opaque = True
      return None
    try:
      hash(x)
    except TypeError:
      self.is_opaque = True
      return None
    return x
