"""What the halves of a residual block are told besides arrays."""

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import UInt32

Bits = tuple[UInt32[Array, "*B W"], UInt32[Array, "*B W"]]  # of attention's end, of the other's


@dataclasses.dataclass(frozen=True)
class Options:
  """What the functions of a block need to know beside its arrays.

  Attributes:
    epsilon: of both norms.
    activation: a name of `activations.ACTIVATIONS`.
    rate: of dropout where there are bits.
    implementation: "xla" or "mosaic_gpu"; None: neither, the modules of the layers serve.
    row_axes: of the mesh, over which the leading axes of rows are sharded, B and T by (("data",
      "fsdp"), ("sequence",)), and over no other of more than one device; (): none shards them, or
      the compiler knows.
  """

  epsilon: float
  activation: str
  rate: float
  implementation: str | None
  row_axes: tuple[tuple[str, ...], ...] = ()


def named(name: str, x: jax.Array) -> jax.Array:
  """x under the name by which `api.KEPT` keeps it; what follows has to read this result."""
  return checkpoint_name(x, f"residual_{name}")
