"""A decoding step's residual blocks in one kernel, for NVIDIA GPUs with clusters.

`kernel` is the kernel and has a drawing of it, `product` and `attention` are its parts, `frame` is
what they share; `shared` is what lies in shared memory, `packing` how weights lie. They are written
for a `machine`, which `ptx` is on a GPU and `simulator` in numpy.
"""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import simulator
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.kernel import Step as Step
from pallas_kernels.decode.cluster.packing import join_heads as join_heads
from pallas_kernels.decode.cluster.packing import pack as pack
from pallas_kernels.decode.cluster.packing import unpack as unpack
from pallas_kernels.decode.cluster.ptx import launch as launch
from pallas_kernels.decode.cluster.sizes import cluster_shape as cluster_shape
from pallas_kernels.decode.cluster.sizes import Layer as Layer
from pallas_kernels.decode.cluster.sizes import Piece as Piece
from pallas_kernels.decode.cluster.sizes import Sizes as Sizes
from pallas_kernels.decode.cluster.sizes import WORD_BITS as WORD_BITS


def check(*, E: int, H: int, Dk: int, Dv: int, F: int, C: int, dtype: jax.typing.DTypeLike) -> None:
  """Sizes of a model, and C thread blocks of a cluster.

  Raises:
    NotImplementedError: naming what the kernel does not take.
  """
  if reason := sizes.unsupported(E=E, H=H, Dk=Dk, Dv=Dv, F=F, C=C, dtype=dtype):
    raise NotImplementedError(reason)


def supported(s: Sizes, dtype: jax.typing.DTypeLike) -> str | None:
  """Why the kernel cannot take a step of such sizes on this device; None where it can."""
  if not sizes.clusters_at_once(s.C):
    return f"clusters of {s.C} thread blocks do not run on this device"
  model = {name: getattr(s, name) for name in ("E", "H", "Dk", "Dv", "F", "C")}
  return sizes.unsupported(**model, dtype=dtype) or shared.unsupported(s)


def run_layers(
  s: Sizes,
  x: Float[Array, "B E"],
  places: Int[Array, "N_sets P"],
  seen: Bool[Array, "N_sets S"],
  matrices: Sequence[Array],
  tables: Sequence[Array],
  *,
  run: Callable = launch,
) -> list[Array]:
  """All layers, which come in groups of N.

  Args:
    s: sizes of the step.
    x: what they begin with.
    places: for each set of heads of each layer of a group, whether the step's own row is seen, then
      the first row and the row to write of each piece.
    seen: likewise, which of the cached rows of all pieces are seen; each piece begins at a multiple
      of `WORD_BITS`.
    matrices: of `pack`: queries, keys and values of all heads, of `join_heads`; out; up; down.
    tables: keys [L / N, B, heads of a set, length, Dk] and values of each piece of each of them,
      which are updated in place.
    run: `launch` or `simulated`.

  Returns:
    x after the layers, and the tables.

  Raises:
    NotImplementedError: the sizes do not go into shared memory.
  """
  # A bit for each row: they stay in shared memory.
  of_bytes = jnp.packbits(seen, axis=1, bitorder="little").reshape(len(seen), -1, 4)
  words = jax.lax.bitcast_convert_type(of_bytes, jnp.int32)
  # The last cluster may have fewer sequences than the others.
  out = jax.ShapeDtypeStruct(x.shape, x.dtype)
  grid = dict(cluster=s.C, clusters=-(-s.B // s.R))
  return run(Step(s), [x, places, words, *matrices], tables, [out], **grid)


def simulated(
  kernel: Step,
  inputs: Sequence[Array],
  inouts: Sequence[Array],
  outputs: Sequence[jax.ShapeDtypeStruct],
  *,
  cluster: int,
  clusters: int,
) -> list[Array]:
  """What `launch` does, in numpy: not for tracing."""
  # Copies, of which the simulator changes some.
  tables = [np.array(x) for x in (*inputs, *inouts)]
  tables += [np.zeros(x.shape, x.dtype) for x in outputs]
  simulator.simulate(kernel, tables, cluster=cluster, clusters=clusters)
  updated, new = tables[len(inputs) : -len(outputs)], tables[-len(outputs) :]
  return [jnp.asarray(x) for x in (*new, *updated)]
