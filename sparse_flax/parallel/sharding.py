"""The device mesh, and where state, batches and attention lie on it: rules, not annotations."""

import functools
import math
import re
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Shaped

from pallas_kernels import sparse_attention
from pallas_kernels.patterns import Pattern
from sparse_flax.parallel import sequence

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")  # the axes that sequences are sharded over

# The last axes of a leaf, by the end of its path; moments and averages are named like weights. A
# layer's weights are cut twice: by heads or hidden features over "tensor", by the model's width
# over "fsdp". What no rule names every device has whole: embeddings and logits, less than a layer,
# norms, biases of the width, counters.
RULES = (
  (r"(query|key|value|up|pool)/kernel", ("fsdp", "tensor")),
  (r"(query|key|value|up)/bias", ("tensor",)),
  (r"(out|down|spread)/kernel", ("tensor", "fsdp")),
)


def mesh_shape(*, data: int, fsdp: int, tensor: int, sequence: int) -> tuple[int, ...]:
  """The sizes of AXES on the devices there are; data=-1 takes all that the others leave.

  Raises:
    ValueError: fewer devices than that, or with data=-1 a share that does not come out even.
  """
  inner, there = fsdp * tensor * sequence, jax.device_count()
  shape = (there // inner if data == -1 else data, fsdp, tensor, sequence)
  if not 1 <= math.prod(shape) <= there:
    given = dict(zip(AXES, (data, *shape[1:]), strict=True))
    raise ValueError(f"config.mesh={given}: must fit the {there} devices here")
  if data == -1 and there % inner:
    raise ValueError(
      f"config.mesh.data=-1: fsdp * tensor * sequence = {inner} must divide {there} devices"
    )
  return shape


def make_mesh(*, data: int, fsdp: int, tensor: int, sequence: int) -> jax.sharding.Mesh:
  """A mesh over the first data x fsdp x tensor x sequence devices; data=-1 takes all there are.

  Raises:
    ValueError: as `mesh_shape`, or several TPU slices that no axis can be sharded over.
  """
  shape = mesh_shape(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
  return jax.sharding.Mesh(_arranged(shape), AXES, axis_types=(AxisType.Auto,) * 4)


def uneven_layers(
  patterns: Sequence[Pattern],
  *,
  num_heads: int,
  hidden: int,
  seq_len: int,
  tensor: int,
  devices: int,
) -> list[str]:
  """What the axes tensor and sequence of `config.mesh` cannot shard of a model's layers.

  Args:
    patterns: of the layers.
    num_heads: of each.
    hidden: features between up and down, ff_mult * width.
    seq_len: tokens.
    tensor: devices of that axis.
    devices: those of the axis sequence.
  """
  problems = []
  period = math.lcm(*(pattern.period for pattern in patterns))
  if num_heads % (tensor * period):
    heads = f"{num_heads=}" + (f" / {period} patterns" if period > 1 else "")
    problems.append(f"config.mesh.tensor={tensor}: must divide {heads}")
  if hidden % tensor:
    problems.append(f"config.mesh.tensor={tensor}: must divide ff_mult * width = {hidden}")
  for pattern in dict.fromkeys(patterns):
    if text := sequence.problem(pattern, seq_len, devices):
      problems.append(f"config.mesh.sequence={devices}: must {text}")
  return problems


def _arranged(shape: tuple[int, ...]) -> np.ndarray:
  """The devices of a mesh; the inner axes on those that are near to each other.

  Several TPU slices share the outermost axis that they divide. Hosts of GPUs, each of which
  is a slice to JAX, need no such care: the order of their processes is that of `jax.devices()`.
  """
  devices = jax.devices()[: math.prod(shape)]
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(shape)
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  outer = next((n for n, size in enumerate(shape) if size % slices == 0), None)
  if outer is None:
    raise ValueError(f"config.mesh={shape}: one axis must be a multiple of the {slices} TPU slices")
  between = tuple(slices if n == outer else 1 for n in range(4))
  inside = tuple(size // n for size, n in zip(shape, between, strict=True))
  return mesh_utils.create_hybrid_device_mesh(
    inside, between, devices, allow_split_physical_axes=True
  )


def replicated(mesh: AnyMesh) -> jax.NamedSharding:
  """A copy on every device."""
  return jax.NamedSharding(mesh, jax.P())


def by_batch(mesh: AnyMesh) -> jax.NamedSharding:
  """A batch [B, T]: sequences over data and fsdp, their tokens over sequence."""
  return jax.NamedSharding(mesh, jax.P(BATCH, "sequence"))


def by_rules(shapes: dict, mesh: AnyMesh) -> dict:
  """The sharding of every leaf of a state (arrays or shapes) by RULES.

  An axis that does not come out even is not cut.
  """

  def of(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = next((axes for rule, axes in RULES if re.search(f"{rule}$", name)), ())
    axes = (None,) * (leaf.ndim - len(axes)) + axes[max(0, len(axes) - leaf.ndim) :]
    even = zip(leaf.shape, axes, strict=True)
    return jax.NamedSharding(
      mesh, jax.P(*(x if x and size % mesh.shape[x] == 0 else None for size, x in even))
    )

  return jax.tree.map_with_path(of, shapes)


def place(
  read: Callable[[np.ndarray], np.ndarray], where: jax.NamedSharding, shape: tuple[int, ...]
) -> Shaped[Array, "B *rest"]:
  """An array of `shape` [B, ...] on the devices of `where`, of which every process reads its rows.

  Args:
    read: row numbers -> those rows, [len(rows), ...].
    where: how rows, and what they hold, are sharded.
    shape: of the whole array.
  """
  indices = where.addressable_devices_indices_map(shape).values()
  rows = np.unique([row for index in indices for row in range(*index[0].indices(shape[0]))])
  local = read(rows)

  def piece(index):
    first, last = np.searchsorted(rows, index[0].indices(shape[0])[:2])
    return local[(slice(first, last), *index[1:])]

  return jax.make_array_from_callback(shape, where, piece)


def over_devices(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  *,
  pattern: Pattern,
  implementation: str | None = None,
  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
  kv_segment_ids: Integer[Array | np.ndarray, "B S"] | None = None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
  block_size: int = 128,
  score_fn: Callable | None = None,
) -> Float[Array, "B T H Dv"]:
  """`sparse_attention`, where every device has its share of the sequences, heads and tokens.

  In a mesh like those of `make_mesh` our rules say how batch and heads are sharded; elsewhere they
  stay as they are. Where the mesh of `jax.set_mesh` has an axis "sequence", it shards the tokens of
  a sequence; each query head then has a copy of its keys. Batch or heads that do not come out even,
  or would give a head another number in the pattern, are not sharded in either case.

  Raises:
    ValueError: the mesh has a sequence axis over which the pattern cannot be sharded.
    NotImplementedError: the mesh has a sequence axis, and there are masks, a `score_fn`, or keys of
      another length than queries.
  """
  mesh = jax.sharding.get_abstract_mesh()
  options = dict(pattern=pattern, implementation=implementation)
  n, explicit = mesh.shape.get("sequence", 1), AxisType.Explicit in mesh.axis_types
  optional = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
  optional |= dict(block_mask=block_mask, score_fn=score_fn)
  optional = {name: x for name, x in optional.items() if x is not None}
  attend = functools.partial(sparse_attention, **options, **optional, block_size=block_size)
  ours = mesh.size > 1 and mesh.axis_names == AXES and not explicit
  if mesh.manual_axes or (n == 1 and not ours):
    return attend(q, k, v)
  if n > 1:
    _check_sequence(q, k, pattern, n, optional)
    # The exchanges between devices move q, k and v of a head together.
    k, v = (x if x.shape[2] == q.shape[2] else _for_each_query(x, q.shape[2]) for x in (k, v))
    attend = functools.partial(sequence.attend, axis="sequence", **options)
  # Axes of one device stand in it too: gradients are summed over those that do not.
  named = lambda *names: tuple(name for name in names if name in mesh.axis_names) or None
  size = lambda *names: math.prod(mesh.shape.get(name, 1) for name in names)
  even = q.shape[2] % (size("tensor") * pattern.period) == k.shape[2] % size("tensor") == 0
  spec = jax.P(
    named(*BATCH) if q.shape[0] % size(*BATCH) == 0 else None,
    "sequence",
    named("tensor") if even else None,
  )
  if explicit:
    q, k, v = (jax.sharding.reshard(x, spec) for x in (q, k, v))
  if optional:  # `sparse_attention` itself shards those like q, k and v
    return attend(*(jax.lax.with_sharding_constraint(x, spec) for x in (q, k, v)))
  return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _check_sequence(q: Array, k: Array, pattern: Pattern, n: int, optional: dict) -> None:
  """Raises for what cannot be sharded over a sequence axis of n devices."""
  if optional:
    raise NotImplementedError(
      f"mesh axis sequence={n}: {' and '.join(sorted(optional))} cannot be used where "
      "sequences are sharded; give the mesh sequence=1, or leave them out"
    )
  if q.shape[1] != k.shape[1]:
    raise NotImplementedError(
      f"mesh axis sequence={n}: {k.shape[1]} keys for {q.shape[1]} queries; attention to another "
      "sequence needs a mesh with sequence=1"
    )
  if text := sequence.problem(pattern, q.shape[1], n):
    raise ValueError(f"mesh axis sequence={n}: must {text}")


def _for_each_query(x: Float[Array, "B S Hkv D"], num_heads: int) -> Float[Array, "B S H D"]:
  return jnp.repeat(x, num_heads // x.shape[2], axis=2)


def of_product(x: Float[Array, "*B E"], kernel: Float[Array, "E F"]) -> jax.NamedSharding | None:
  """Where x @ kernel lies under explicit axes: rows like those of x, features like the kernel's.

  None where axes are not explicit: the compiler chooses.
  """
  rows, features = jax.typeof(x).sharding, jax.typeof(kernel).sharding
  if AxisType.Explicit not in rows.mesh.axis_types or rows.mesh.manual_axes:
    return None
  taken = {axis for axes in rows.spec[:-1] for axis in _tuple_of(axes)}
  free = tuple(axis for axis in _tuple_of(features.spec[-1]) if axis not in taken)
  return jax.NamedSharding(rows.mesh, jax.P(*rows.spec[:-1], free or None))


def of_rows(x: Float[Array, "*B E"]) -> jax.NamedSharding | None:
  """Where an array of the rows of a residual stream x lies, whose last axis is on every device.

  None where the compiler chooses: no mesh, another one than those of `make_mesh`, or within a
  function that each device runs for itself.
  """
  rows = jax.typeof(x).sharding
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes:
    return None
  if AxisType.Explicit in rows.mesh.axis_types:
    return jax.NamedSharding(rows.mesh, jax.P(*rows.spec[:-1], None))
  if mesh.size == 1 or mesh.axis_names != AXES or x.ndim != 3:
    return None
  size = lambda *names: math.prod(mesh.shape[name] for name in names)
  even = x.shape[0] % size(*BATCH) == 0, x.shape[1] % size("sequence") == 0
  axes = (name if whole else None for name, whole in zip((BATCH, "sequence"), even, strict=True))
  return jax.NamedSharding(mesh, jax.P(*axes, None))


def rows_apart(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
  """x with its first axis over data and fsdp, in a mesh of `make_mesh`; elsewhere as it is."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or mesh.manual_axes or mesh.axis_names != AXES:
    return x
  if AxisType.Explicit in mesh.axis_types or x.shape[0] % math.prod(mesh.shape[a] for a in BATCH):
    return x
  return jax.lax.with_sharding_constraint(x, jax.P(BATCH))


def row_axes() -> tuple[tuple[str, ...], ...]:
  """The axes over which B and T of a residual stream are sharded, where devices share no row.

  () elsewhere: on one device, in another mesh than those of `make_mesh`, in one whose axis tensor
  cuts the weights of a row, under explicit axes, or within a function that each device runs.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or mesh.manual_axes or mesh.axis_names != AXES or mesh.shape["tensor"] > 1:
    return ()
  return () if AxisType.Explicit in mesh.axis_types else (BATCH, ("sequence",))


def rows_on_a_device(B: int, T: int) -> int:
  """Rows of a residual stream [B, T, E] that each device has, as far as `row_axes` knows.

  An axis of the mesh that does not divide a length is not used for it.
  """
  mesh, rows = jax.sharding.get_abstract_mesh(), B * T
  for length, axes in zip((B, T), row_axes(), strict=False):
    devices = math.prod(mesh.shape[axis] for axis in axes)
    rows //= devices if length % devices == 0 else 1
  return rows


def _tuple_of(axes) -> tuple[str, ...]:
  """Of one entry of a PartitionSpec."""
  return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
