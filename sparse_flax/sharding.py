"""The device mesh, and where state and batches lie on it."""

import jax
from jax.sharding import AxisType

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
