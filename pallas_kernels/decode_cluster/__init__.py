"""A decoding step's residual blocks in one kernel, for NVIDIA GPUs with clusters."""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.decode_cluster import threads
from pallas_kernels.decode_cluster.kernel import packed as packed
from pallas_kernels.decode_cluster.kernel import Piece as Piece
from pallas_kernels.decode_cluster.kernel import Sizes as Sizes
from pallas_kernels.decode_cluster.kernel import Step as Step
from pallas_kernels.decode_cluster.threads import launch as launch

# Clusters of so many blocks that run at once on an H100 (docs/notes/sampling.md).
_AT_ONCE = {16: 7, 8: 15}
_MOST = 8  # sequences of a cluster: more make a product twice as long


def dealt_out(B: int) -> tuple[int, int]:
  """Blocks and sequences of a cluster, so that all clusters run at once if they can."""
  for blocks, clusters in _AT_ONCE.items():
    rows = -(-B // clusters)
    if rows <= _MOST:
      return blocks, rows
  return 8, _MOST


def check(*, E: int, H: int, Dk: int, Dv: int, F: int, C: int, dtype: jax.typing.DTypeLike) -> None:
  """Sizes of a model, and C blocks of a cluster.

  Raises:
    NotImplementedError: naming what the kernel does not take.
  """
  heads = H * (2 * Dk + Dv)
  needs = [
    (dtype == jnp.bfloat16, f"{dtype=}: the kernel takes bfloat16"),
    (E % 256 == 0 and E % (16 * C) == 0, f"{E=}: must be a multiple of 256 and of {16 * C}"),
    (F % 256 == 0 and F % (16 * C) == 0, f"{F=}: must be a multiple of 256 and of {16 * C}"),
    (H * Dv % 256 == 0, f"{H * Dv=}: must be a multiple of 256"),
    (heads % (16 * C) == 0, f"H * (2 * Dk + Dv) = {heads}: must be a multiple of {16 * C}"),
    (Dk in (8, 16, 32, 64, 128, 256), f"{Dk=}: must be a power of two from 8 to 256"),
    (Dv in (16, 32, 64, 128, 256), f"{Dv=}: must be a power of two from 16 to 256"),
  ]
  for good, message in needs:
    if not good:
      raise NotImplementedError(message)


def run_layers(
  x: Float[Array, "B E"],
  places: Int[Array, "N P"],
  biases: Float[Array, "N S"],
  matrices: Sequence[Array],
  tables: Sequence[Array],
  *,
  pieces: tuple[tuple[Piece, ...], ...],
  run: Callable = launch,
  **sizes: int,
) -> list[Array]:
  """All layers, which come in groups of N.

  Args:
    x: what they begin with.
    places: whether the step's own row is seen, then the first row and the row to write of each
      piece.
    biases: what is added to the scores of all pieces.
    matrices: of `packed`: queries, keys and values of all heads, [H, 2 Dk + Dv]; out; up; down.
    tables: keys [L / N, B, H, length, Dk] and values of each piece, which are updated in place.
    pieces: of each layer of a group.
    run: `launch` or `simulated`.
    sizes: the others of `Sizes`.

  Returns:
    x after the layers, and the tables.
  """
  sizes = Sizes(
    B=x.shape[0], E=x.shape[1], groups=len(matrices[0]) // len(pieces), pieces=pieces, **sizes
  )
  out = jax.ShapeDtypeStruct(x.shape, x.dtype)
  how = dict(cluster=sizes.C, clusters=-(-sizes.B // sizes.R))
  return run(Step(sizes), [x, places, biases, *matrices], tables, [out], **how)


def simulated(kernel: Step, inputs, inouts, outputs, **how: int) -> list[Array]:
  """What `launch` does, in numpy: not for tracing."""
  tables = [np.array(x) for x in (*inputs, *inouts)]
  tables += [np.zeros(x.shape, x.dtype) for x in outputs]
  threads.simulate(kernel, tables, **how)
  kept, new = tables[len(inputs) : -len(outputs)], tables[-len(outputs) :]
  return [jnp.asarray(x) for x in (*new, *kept)]
