"""The device mesh, and where state and batches lie on it."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.patterns import Pattern

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(*, data: int, fsdp: int, tensor: int, sequence: int) -> jax.sharding.Mesh:
  """A mesh over the first data x fsdp x tensor x sequence devices; data=-1 takes all there are.

  Raises:
    ValueError: fewer devices than that, or a share that does not come out even.
  """
  inner, there = fsdp * tensor * sequence, jax.device_count()
  if data == -1:
    data = there // inner
  if data < 1 or data * inner > there:
    raise ValueError(
      f"config.mesh={dict(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)}: "
      f"must fit the {there} devices here"
    )
  devices = jax.devices()[: data * inner]
  shape = (data, fsdp, tensor, sequence)
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def replicated(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
  """A copy on every device: what parameters and optimizer state have."""
  return jax.NamedSharding(mesh, jax.P())


def by_batch(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
  """The rows of a batch shared out over the data axis."""
  return jax.NamedSharding(mesh, jax.P("data"))


def over_devices(
  attend: Callable[..., Array],
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T H Dk"],
  v: Float[Array, "B T H Dv"],
  *,
  pattern: Pattern,
) -> Float[Array, "B T H Dv"]:
  """attend(q, k, v), where every device has its share of the sequences and heads.

  The compiler cannot split kernels by itself: it would gather q, k and v on every device. The mesh
  is that of `jax.set_mesh`; without one, or inside another shard_map, this is a plain call. What
  does not come out even, or would give a head another number in the pattern, is not shared out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  there = {name: size for name, size in mesh.shape.items() if size > 1}
  if not there or mesh.manual_axes:
    return attend(q, k, v)
  batch = tuple(name for name in ("data", "fsdp") if name in there)
  rows, heads = 1, there.get("tensor", 1)
  for name in batch:
    rows *= there[name]
  spec = jax.P(
    batch if q.shape[0] % rows == 0 else None,
    None,
    "tensor" if heads > 1 and q.shape[2] % (heads * pattern.period) == 0 else None,
  )
  return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)
