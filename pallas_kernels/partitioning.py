"""Where batch and heads are sharded, each device computes its own: nothing moves between devices.

The compiler cannot split a kernel, and gathers what it cannot split; explicit types refuse most
reshapes. But attention needs no other row of the batch and no other head. So what computes whole
arrays is called on each device with what lies there:

    explicit axes   the types of arrays say how they are sharded: `jax.shard_map`
    automatic axes  only the compiler knows, and asks: `custom_partitioning`

Forward and backward pass are wrapped one by one. A backward pass that JAX derives from `shard_map`
would sum gradients over all axes of the mesh, also over those that shard nothing here.
"""

import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import sharding_impls  # reads shardings of the compiler; nothing public does
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.custom_partitioning import SdyShardingRule
from jax.sharding import AxisType
from jaxtyping import Array

from pallas_kernels import protocol
from pallas_kernels import reference as dense
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.patterns import Pattern

# B, H and Hkv may be sharded, and what vmap adds in front; a device has all else whole.
_NAMES = {
  "q": ("B", "T", "H", "Dk"),
  "k": ("B", "S", "Hkv", "Dk"),
  "v": ("B", "S", "Hkv", "Dv"),
  "segment_ids": ("B", "T"),
  "kv_segment_ids": ("B", "S"),
  "block_mask": ("B", "H", "nq", "nk"),
  "block_indices": ("B", "H", "nq", "top"),
  "out": ("B", "T", "H", "Dv"),
  "lse": ("B", "T", "H"),
  "dout": ("B", "T", "H", "Dv"),
  "dlse": ("B", "T", "H"),
  "mass": ("B", "T", "H", "top"),
  "dmass": ("B", "T", "H", "top"),
  "head_numbers": ("H",),
}
# Operands that a backward pass has from the forward pass and from its caller's use of the results.
_OF_RESULTS = ("out", "lse", "mass", "dout", "dlse", "dmass")

logger = logging.getLogger(__name__)


class ShardedHeadsError(ValueError):
  """Heads are sharded over devices that cannot compute their share alone."""


def mesh_of(*arrays: Array) -> jax.sharding.AbstractMesh | None:
  """The mesh over which arrays may be sharded.

  None for one device, where no mesh is named, and inside `jax.shard_map`, where arrays are those of
  one device already.

  Raises:
    NotImplementedError: axes of several types shard the arrays, or may: explicit and automatic
      ones, or explicit ones inside a `jax.shard_map` over other axes.
  """
  meshes = (jax.typeof(x).sharding.mesh for x in arrays)
  mesh = next((mesh for mesh in meshes if not mesh.empty), None)
  if mesh is None:
    return None
  # A mesh of one device matters to types that name its axes.
  named = any(axes for x in arrays for axes in jax.typeof(x).sharding.spec)
  manual, auto = _axes_with(mesh, AxisType.Manual), _axes_with(mesh, AxisType.Auto)
  if AxisType.Manual in mesh.axis_types:
    explicit = _axes_with(mesh, AxisType.Explicit)
    if explicit and named:
      raise NotImplementedError(
        f"sparse_attention inside a shard_map over mesh axes {manual}: explicit axes {explicit} "
        "shard q, k or v there too; the shard_map must be over those as well"
      )
    if auto and manual:
      _say_once(
        f"sparse_attention inside a shard_map over mesh axes {manual}: what {auto} shard is left "
        "to the compiler, which may gather it; a shard_map over those as well does not"
      )
    return None
  if auto and AxisType.Explicit in mesh.axis_types and named:
    raise NotImplementedError(
      f"sparse_attention: explicit mesh axes shard q, k or v, and automatic axes {auto} may too; "
      "the axes of a mesh must have one type (axis_types), or be those of a jax.shard_map"
    )
  return mesh if mesh.size > 1 or named else None


def _axes_with(mesh: jax.sharding.AbstractMesh, kind: AxisType) -> tuple[str, ...]:
  """The axes of this type that are more than one device."""
  axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
  return tuple(name for name, n, of_type in axes if n > 1 and of_type == kind)


def placed(plan: Plan, arrays: Arrays) -> Plan:
  """The plan, with what the types of the arrays say of a mesh."""
  mesh = mesh_of(*arrays[:3])
  sizes = () if mesh is None else mesh.axis_sizes
  uses_heads = plan.scores.score_fn is not None and plan.scores.score_fn.uses(3)
  split = any(n > 1 and _heads_fit(n, plan.H, plan.Hkv, plan.pattern) for n in sizes)
  return dataclasses.replace(
    plan, sharded=mesh is not None, heads_are_numbered=uses_heads and split
  )


def reference(plan: Plan, arrays: Arrays) -> tuple[Array, ...]:
  """`reference.forward`; where types say how arrays are sharded, on each device.

  Of automatic axes the compiler itself leaves batch and heads of its products where they are, and a
  plain call has derivatives of either mode.
  """
  if not plan.sharded or _axes_with(mesh_of(*arrays[:3]), AxisType.Auto):
    return dense.forward(plan, arrays)
  scores = dataclasses.replace(plan.scores, learned=())  # its derivatives are JAX's own
  return _reference(dataclasses.replace(plan, scores=scores), arrays)


@functools.partial(jax.jit, static_argnums=0)
def _reference(plan: Plan, arrays: Arrays):
  def local(first_head, arrays):
    return dense.forward(*_share(plan, arrays, first_head))

  call, operands = _call(local, plan, arrays, {}, _results(plan))
  return call.differentiable(*operands)


def _results(plan: Plan) -> tuple[str, ...]:
  return ("out", "lse", "mass") if plan.return_mass else ("out", "lse")


class PerDevice:
  """A backend (`protocol.Backend`) that calls another one on each device.

  The residual is the natural log-sum-exp, `[B, T, H]`, with the mass where that is wanted.
  """

  def __init__(self, backend: protocol.Backend):
    self.backend = backend

  def unsupported(self, plan: Plan) -> str | None:
    return self.backend.unsupported(plan)

  def takes_lists(self, plan: Plan) -> bool:
    return self.backend.takes_lists(plan)

  def planned(self, plan: Plan) -> Plan:
    """As it is: each device plans its own share."""
    return plan

  def forward(self, plan: Plan, arrays: Arrays) -> tuple[Array, Any]:
    def local(first_head, arrays):
      share, arrays = self._planned_share(plan, arrays, first_head)
      out, residual = self.backend.forward(share, arrays)
      if plan.return_mass:
        return out, *residual
      return out, self.backend.natural_lse(share, residual)

    call, operands = _call(local, plan, arrays, {}, _results(plan))
    out, *residual = call(*operands)
    return out, tuple(residual) if plan.return_mass else residual[0]

  def natural_lse(self, plan: Plan, residual: Any) -> Any:
    del plan
    return residual

  def lse_of_natural(self, plan: Plan, lse: Array) -> Array:
    del plan
    return lse

  def backward(self, plan: Plan, arrays: Arrays, out, residual, dout, dlse, dmass=None) -> Arrays:
    def local(first_head, arrays, out, lse, mass, dout, dlse, dmass):
      share, arrays = self._planned_share(plan, arrays, first_head)
      residual = (lse, mass) if plan.return_mass else self.backend.lse_of_natural(share, lse)
      of_mass = (dmass,) if plan.return_mass else ()
      grads = self.backend.backward(share, arrays, out, residual, dout, dlse, *of_mass)
      return *grads[:3], *(grads.held[n] for n in share.scores.learned)

    learned = plan.scores.learned
    results = ("q", "k", "v", *(f"held {n}" for n in learned))
    lse, mass = residual if plan.return_mass else (residual, None)
    of_results = dict(out=out, lse=lse, mass=mass, dout=dout, dlse=dlse, dmass=dmass)
    call, operands = _call(local, plan, arrays, of_results, results)
    like = *arrays[:3], *(arrays.held[n] for n in learned)
    return plan.gradients(arrays, *_typed_like(call(*operands), like))

  def _planned_share(self, plan: Plan, arrays: Arrays, first_head) -> tuple[Plan, Arrays]:
    share, arrays = _share(plan, arrays, first_head)
    return self.backend.planned(share), arrays


def _call(
  function: Callable, plan: Plan, arrays: Arrays, of_results: dict, results: tuple[str, ...]
) -> tuple["_Call", tuple[Array, ...]]:
  """A `_Call`, and the arrays that it takes.

  Args:
    function: of `first_head`, the `Arrays` of a device, and `of_results` in their order.
    plan: of the whole arrays.
    arrays: of which every device has `held` whole.
    of_results: by name, None for those that are not there.
    results: the names of the results of `function`.
  """
  operands = arrays._asdict()
  held = operands.pop("held")
  given = {name: x for name, x in (operands | of_results).items() if x is not None}
  given |= {f"held {n}": x for n, x in enumerate(held)}
  if plan.heads_are_numbered:
    given["head_numbers"] = jnp.arange(plan.H, dtype=jnp.int32)

  def local(*xs):
    named = dict(zip(given, xs, strict=True))
    numbers = named.get("head_numbers")
    own = Arrays(*map(named.get, operands), tuple(named[f"held {n}"] for n in range(len(held))))
    first_head = None if numbers is None else numbers[0]
    return tuple(function(first_head, own, *map(named.get, of_results)))

  def names_of(label: str) -> tuple[str, ...]:
    if label.startswith("held"):
      return tuple(f"{label}, axis {n}" for n in range(given[label].ndim))
    names = _NAMES[label]
    if label == "block_indices" and given[label].shape[1] not in (1, plan.H):
      names = tuple("Hkv" if n == "H" else n for n in names)
    if label in ("block_mask", "block_indices"):  # one row may serve the whole batch, or all heads
      shape, sizes = given[label].shape, dict(B=plan.B, H=plan.H, Hkv=plan.Hkv)
      names = (x if n == sizes.get(x, n) else "one" for x, n in zip(names, shape, strict=True))
    return tuple(names)

  call = _Call(
    local=local,
    labels=tuple(given),
    operands=tuple(map(names_of, given)),
    results=tuple(map(names_of, results)),
    heads=(plan.H, plan.Hkv, plan.pattern),
  )
  return call, tuple(jnp.asarray(x) for x in given.values())


def _share(plan: Plan, arrays: Arrays, first_head) -> tuple[Plan, Arrays]:
  """The plan of a device's arrays, whose heads are counted from `first_head` (None: from 0)."""
  if first_head is None:
    return plan.of_share(arrays, plan.scores), arrays
  scores, held = plan.scores, list(arrays.held)  # of which the pattern has its places

  def score_fn(logit, i, j, h):
    return scores.score_fn(logit, i, j, h + first_head, held=arrays.held)

  of_here = dataclasses.replace(scores, score_fn=score_fn, learned=()).traced(held)
  place = lambda x: next(n for n in of_here.score_fn.places if held[n] is x)
  learned = tuple(place(arrays.held[n]) for n in scores.learned)
  of_here = dataclasses.replace(of_here, learned=learned)
  return plan.of_share(arrays, of_here), arrays._replace(held=tuple(held))


@dataclasses.dataclass(frozen=True)
class _Call:
  """A function of arrays that each device can call with its own rows of the batch and heads.

  Attributes:
    local: (*arrays) -> tuple of arrays.
    labels: of the operands, for messages.
    operands, results: the names of the axes of each array. A result that lacks an axis which is
      sharded is a sum over it.
    heads: H, Hkv and the pattern, whose period the heads of a device must keep.
  """

  local: Callable[..., tuple[Array, ...]]
  labels: tuple[str, ...]
  operands: tuple[tuple[str, ...], ...]
  results: tuple[tuple[str, ...], ...]
  heads: tuple[int, int, Pattern]

  def __call__(self, *arrays: Array) -> tuple[Array, ...]:
    mesh = mesh_of(*arrays)
    automatic = _axes_with(mesh, AxisType.Auto)
    call = custom_vmap(functools.partial(self._compiled if automatic else self._typed, mesh))

    @call.def_vmap
    def mapped(size, is_mapped, *arrays):
      del size
      return self._mapped(is_mapped)(*arrays), (True,) * len(self.results)

    return call(*arrays)

  def differentiable(self, *arrays: Array) -> tuple[Array, ...]:
    """The same with derivatives of any order: the backward pass is such a call too."""
    call = jax.custom_vjp(self.__call__)

    def backward(arrays, cotangents):
      floats = [n for n, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]
      of_floats = self._pullback(floats).differentiable(*arrays, *cotangents)
      of_floats = _typed_like(of_floats, [arrays[n] for n in floats])
      grads = dict(zip(floats, of_floats, strict=True))
      return tuple(grads.get(n) for n in range(len(arrays)))

    call.defvjp(lambda *arrays: (self.differentiable(*arrays), arrays), backward)
    return call(*arrays)

  def _pullback(self, floats: list[int]) -> "_Call":
    """(*operands, *cotangents) -> the gradients of those operands that are floats."""
    at = len(self.operands)

    def local(*arrays):
      arrays, cotangents = list(arrays[:at]), arrays[at:]

      def function(*some):
        for n, x in zip(floats, some, strict=True):
          arrays[n] = x
        return self.local(*arrays)

      return jax.vjp(function, *(arrays[n] for n in floats))[1](cotangents)

    return dataclasses.replace(
      self,
      local=local,
      labels=(*self.labels, *(f"cotangent {n}" for n in range(len(self.results)))),
      operands=self.operands + self.results,
      results=tuple(self.operands[n] for n in floats),
    )

  def _mapped(self, is_mapped: list[bool]) -> "_Call":
    """The same under vmap."""
    name = f"vmap{sum(map(_is_mapped, self.results[0]))}"
    widen = lambda names, mapped=True: (name, *names) if mapped else names
    return dataclasses.replace(
      self,
      local=jax.vmap(self.local, in_axes=tuple(0 if x else None for x in is_mapped)),
      operands=tuple(map(widen, self.operands, is_mapped)),
      results=tuple(map(widen, self.results)),
    )

  # ---------------------------------------------------------------------------- explicit axes

  def _typed(self, mesh: jax.sharding.AbstractMesh, *arrays: Array) -> tuple[Array, ...]:
    specs = [jax.typeof(x).sharding.spec for x in arrays]
    where = self._where(mesh.shape, arrays, specs, typed=True)
    for text in self._moved(where, arrays, specs).values():
      raise ValueError(f"{text}; jax.sharding.reshard gathers what is to be gathered")
    in_specs = tuple(_spec(names, where) for names in self.operands)
    laid = (jax.NamedSharding(mesh, spec) for spec in in_specs)
    arrays = tuple(map(jax.sharding.reshard, arrays, laid))
    out_specs = tuple(_spec(names, where) for names in self.results)
    options = dict(mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.shard_map(functools.partial(self._summed, where), **options)(*arrays)

  # --------------------------------------------------------------------------- automatic axes

  def _compiled(self, mesh: jax.sharding.AbstractMesh, *arrays: Array) -> tuple[Array, ...]:
    local = jax.jit(self.local)  # keeps its constants to itself: custom_partitioning takes none
    shared = custom_partitioning(lambda *arrays: local(*arrays))
    partition = functools.partial(self._partition, mesh)
    shared.def_partition(partition, sharding_rule=self._rule())
    return shared(*arrays)

  def _rule(self) -> SdyShardingRule:
    """Shardings of batch and heads pass from array to array, those of other axes do not.

    Where query heads share key heads, theirs do not pass to each other: a compiler would split an
    axis of the mesh that has more devices than there are key heads, and has no name for its parts.
    """
    same = self.heads[0] == self.heads[1]

    def factor(n: int, axis: int, name: str) -> str:
      name = _key(name) if same else name
      return name if _may_be_sharded(name) else f"whole_{n}_{axis}"

    arrays = tuple(
      ArrayMapping(*(factor(n, axis, name) for axis, name in enumerate(names)))
      for n, names in enumerate(self.operands + self.results)
    )
    at = len(self.operands)
    return SdyShardingRule(arrays[:at], arrays[at:])

  def _partition(
    self, traced: jax.sharding.AbstractMesh, mesh: jax.sharding.Mesh, operands, results
  ):
    """What the compiler asks for: the function of a device, and how its arrays are sharded."""
    if mesh.empty:  # no argument of the program is placed, and custom_partitioning looks at those
      devices = np.asarray(operands[0].sharding._device_assignment)
      mesh = jax.sharding.Mesh(devices.reshape(traced.axis_sizes), traced.axis_names)
      specs = [_decoded(x, mesh) for x in (*operands, *results)]
    else:
      specs = [x.sharding.spec for x in (*operands, *results)]
    where = self._where(mesh.shape, (*operands, *results), specs, typed=False)
    for text in self._moved(where, operands, specs).values():
      _say_once(f"{text}; every device gathers them")
    laid = lambda names: jax.NamedSharding(mesh, _spec(names, where))
    local = functools.partial(self._summed, where)
    return mesh, local, tuple(map(laid, self.results)), tuple(map(laid, self.operands))

  # ------------------------------------------------------------------------------------- both

  def _where(
    self, sizes: Mapping[str, int], arrays, specs, *, typed: bool
  ) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh for each name of an axis: those of the first array that is sharded.

    Heads are left out where a device could not compute its own: the caller's choice of the results
    alone, or of query heads that share key heads with those of other devices, is no reason to fail.

    Raises:
      ShardedHeadsError: the heads of operands are sharded so that those of a device are not whole
        periods of the pattern, or with `typed` not whole groups that share a key head.
    """
    where, size = {}, lambda axes: math.prod(sizes[x] for x in axes)
    H, Hkv, pattern = self.heads
    for at, names, x, spec in zip(
      itertools.count(), self.operands + self.results, arrays, specs, strict=False
    ):
      for name, length, axes in zip(names, x.shape, _axes_of(spec, x.ndim), strict=True):
        n, key = size(axes), _key(name)
        fits = length % n == 0 and (n == 1 or _may_be_sharded(name))
        taken = key in where or any(set(axes) & set(others) for others in where.values())
        if not axes or not fits or taken:
          continue
        if key == "H" and not _heads_fit(n, H, Hkv, pattern):
          given = at < len(self.operands) and self.labels[at] not in _OF_RESULTS
          if given and (typed or Hkv % n == 0):
            raise ShardedHeadsError(_why_not(n, axes, *self.heads))
          continue
        where[key] = axes
    return where

  def _moved(self, where, arrays, specs) -> dict[tuple[str, ...], str]:
    """By axes of the mesh, which operands cannot stay sharded over them, in words."""
    moved = {}
    for label, names, x, spec in zip(self.labels, self.operands, arrays, specs, strict=False):
      for name, axes in zip(names, _axes_of(spec, x.ndim), strict=True):
        follows = axes in moved and label in _OF_RESULTS  # q, which is named
        if axes and where.get(_key(name)) != axes and not follows:
          moved.setdefault(axes, []).append(f"{label} {list(x.shape)} along {name}")
    return {
      axes: f"mesh axes {axes} shard {', '.join(parts)}: attention needs whole sequences, and the "
      "same rows of the batch and the same heads of all its arrays"
      for axes, parts in moved.items()
    }

  def _summed(self, where, *arrays: Array) -> tuple[Array, ...]:
    """`local` on one device, and the sums over devices of results that are sums."""
    results = []
    for names, x in zip(self.results, self.local(*arrays), strict=True):
      own = {_key(name) for name in names}
      over = [axes for key, axes in where.items() if _may_be_sharded(key) and key not in own]
      results.append(jax.lax.psum(x, sum(over, ())) if over else x)
    return tuple(results)


def _heads_fit(n: int, H: int, Hkv: int, pattern: Pattern) -> bool:
  """Whether each of n devices can have whole groups that share a key head, and whole periods."""
  return Hkv % n == 0 and (n == 1 or H // n % pattern.period == 0)


def _why_not(n: int, axes: tuple[str, ...], H: int, Hkv: int, pattern: Pattern) -> str:
  """What does not fit, of heads that `_heads_fit` refuses."""
  if Hkv % n:
    return (
      f"H={H} query heads are sharded over {n} devices (mesh axes {axes}), which must divide the "
      f"Hkv={Hkv} heads of k and v"
    )
  return (
    f"H={H} heads over {n} devices (mesh axes {axes}) are {H // n} heads each, which must be a "
    f"multiple of {pattern.period}, the heads after which pattern={pattern} repeats"
  )


def _key(name: str) -> str:
  """Query heads lie where the key heads are that they read."""
  return "H" if name == "Hkv" else name


def _is_mapped(name: str) -> bool:
  return name.startswith("vmap")


def _may_be_sharded(name: str) -> bool:
  return name in ("B", "H", "Hkv") or _is_mapped(name)


def _axes_of(spec: jax.P, ndim: int) -> list[tuple[str, ...]]:
  """The axes of the mesh over which each axis of an array is sharded."""
  as_tuple = lambda axes: () if axes is None else axes if isinstance(axes, tuple) else (axes,)
  return [as_tuple(axes) for axes in (*spec, *(None,) * (ndim - len(spec)))]


def _spec(names: tuple[str, ...], where: Mapping[str, tuple[str, ...]]) -> jax.P:
  return jax.P(*(where.get(_key(name)) for name in names))


def _decoded(x: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> jax.P:
  """How an array is sharded over the axes of a mesh, from the compiler's word for it."""
  whole = x.sharding._to_xla_hlo_sharding(x.ndim)
  return sharding_impls.parse_flatten_op_sharding(whole, mesh)[0]


def _typed_like(grads, arrays) -> tuple[Array, ...]:
  """Gradients as the types of their arrays say, which name what is sharded where it is explicit."""
  shardings = [jax.typeof(x).sharding for x in arrays]
  return tuple(
    jax.sharding.reshard(grad, like) if AxisType.Explicit in like.mesh.axis_types else grad
    for grad, like in zip(grads, shardings, strict=True)
  )


@functools.cache
def _say_once(text: str) -> None:
  logger.warning("%s", text)


def _error_of_ours(error: Exception) -> ShardedHeadsError | None:
  """What `_where` raised while the compiler asked: of that the compiler keeps the text alone."""
  text = re.search(rf"{ShardedHeadsError.__qualname__}: (.*)", str(error))
  return None if text is None else ShardedHeadsError(text.group(1))


try:  # nothing public raises errors of the compiler as our own
  from jax._src.compiler import register_xla_runtime_error_handler
except ImportError:
  pass  # then they are raised as the compiler's, with our text inside
else:
  register_xla_runtime_error_handler(_error_of_ours)
