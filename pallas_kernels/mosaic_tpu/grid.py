"""The grid of a kernel: a step for every block of a list, of every sequence and group of heads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import hardware
from pallas_kernels.mosaic_tpu import kernels
from pallas_kernels.mosaic_tpu.operands import Operand
from pallas_kernels.mosaic_tpu.steps import FULL
from pallas_kernels.mosaic_tpu.steps import PARTIAL
from pallas_kernels.mosaic_tpu.steps import Steps
from pallas_kernels.mosaic_tpu.sweep import Sweep

VMEM = 64 << 20  # bytes that a kernel may use; TPU7x has that, the others twice


@dataclasses.dataclass(frozen=True)
class Groups:
  """For every step over heads (a group of them): where arrays have it.

  Attributes:
    queries, keys: the number of the block of heads in the arrays of all heads.
    heads: the number of the first query head.
  """

  queries: np.ndarray
  keys: np.ndarray
  heads: np.ndarray


def launch(
  name: str,
  kernel: Callable,
  sweep: Sweep,
  steps: Steps,
  groups: Groups,
  inputs: Any,
  outputs: Any,
  scratch: Any,
) -> Any:
  """Runs a kernel over the steps of every sequence and group of heads.

  Args:
    name: of the kernel.
    kernel: of a `kernels.Step`.
    sweep: what it sweeps.
    steps: of one sequence and group.
    groups: of heads.
    inputs: (array, kind) by name; kinds are those of `_spec`.
    outputs: (shape, kind) by name.
    scratch: shapes of memory, by name; (shape, dtype) where that is not float32.
  """
  transposed = kernel is kernels.backward
  num_rows, num_heads, num = steps.flags.shape
  batch, num_groups = inputs["q"][0].shape[0], len(groups.heads)
  arrays = inputs | outputs
  # What a traced list has is not known: bodies of both kinds are built.
  traced = not isinstance(steps.flags, np.ndarray)
  kinds = FULL | PARTIAL if traced else int(np.bitwise_or.reduce(steps.flags, axis=None))
  operands = {name: kind[1] for name, (_, kind) in arrays.items() if isinstance(kind[1], Operand)}
  # What stays for a line is taken apart once, into memory of its own (`Step.hold`).
  for name_held in ("k", "v") if transposed else ("q", "dout"):
    if name_held in inputs and (held := operands[name_held]).sublanes:
      shape = held.num_tiles, held.rows, held.tile
      scratch = scratch | {f"{name_held}_held": (shape, inputs[name_held][0].dtype)}

  def body(place: Any, flags: Any, q_group: Any, k_group: Any, head: Any, *refs: Any) -> None:
    # These are for the index maps of `_spec`, which get the same scalars.
    del q_group, k_group
    refs = dict(zip((*arrays, *scratch), refs, strict=True))
    b, h, i = (pl.program_id(n) for n in range(3))
    which = (b if num_rows > 1 else 0) * num_heads + (h if num_heads > 1 else 0)
    where = place[i], flags[which * num + i], head[h]
    kernel(kernels.Step(refs, operands, sweep, kinds, *where, transposed))

  memory = [x if isinstance(x[0], tuple) else (x, jnp.float32) for x in scratch.values()]
  specs = [_spec(kind, x.shape, sweep, steps, transposed) for x, kind in arrays.values()]
  call = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=5,
      grid=(batch, num_groups, num),
      in_specs=specs[: len(inputs)],
      out_specs=specs[len(inputs) :],
      scratch_shapes=[pltpu.VMEM(*x) for x in memory],
    ),
    out_shape=[x for x, _ in outputs.values()],
    compiler_params=pltpu.CompilerParams(
      # Steps of a list go on with what the one before has left in scratch memory.
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=VMEM,
    ),
    interpret=hardware.simulated("tpu"),
    name=name,
  )
  return call(
    jnp.asarray(steps.place),
    jnp.asarray(steps.flags).reshape(-1),
    *(jnp.asarray(x, jnp.int32) for x in (groups.queries, groups.keys, groups.heads)),
    *(x for x, _ in inputs.values()),
  )


def _spec(
  kind: tuple, shape: tuple[int, ...], sweep: Sweep, steps: Steps, transposed: bool
) -> pl.BlockSpec:
  """Blocks of an array.

  Kinds: ("queries" | "keys", Operand) of the arrays of all heads; ("q_results" | "k_results",
  Operand) of those of a launch, and "dq" of what is stored at the end; ("rows", n) of queries'
  numbers [B, groups, n, T]; ids of ("lines", 1) [B, T, 1] and of ("others", 1) [B, 1, T];
  ("table", lines of blocks to a group) [B or 1, H or 1, groups, entries of a group, others].
  """
  block, (name, what) = sweep.block, kind
  # Blocks are found by scalars: the next ones are on their way while a step computes.
  row = lambda place, i: place[i] >> 16
  column = lambda place, i: place[i] & 0xFFFF
  line, other = (column, row) if transposed else (row, column)
  match name:
    case "rows":
      index = lambda b, h, i, place, *_: (b, h, 0, row(place, i))
      return pl.BlockSpec((1, 1, what, block), index)
    case "lines":
      return pl.BlockSpec((None, block, 1), lambda b, h, i, place, *_: (b, line(place, i), 0))
    case "others":
      return pl.BlockSpec((None, 1, block), lambda b, h, i, place, *_: (b, 0, other(place, i)))
    case "table":

      def index(b: Any, h: Any, i: Any, place: Any, *_: Any) -> tuple:
        b, h = b if shape[0] > 1 else 0, h if shape[1] > 1 else 0
        return b, h, line(place, i) // what, 0, other(place, i)

      return pl.BlockSpec((None, None, None, shape[3], block), index)

  # dq leaves in the steps at the list's end alone; until then its first block stays, unwritten.
  first_store = steps.place.size - -(-sweep.num_queries // block)

  def index(
    b: Any, h: Any, i: Any, place: Any, flags: Any, q_group: Any, k_group: Any, head: Any
  ) -> tuple:
    del flags, head
    group = dict(queries=q_group, keys=k_group).get(name)
    group = h if group is None else group[h]
    if name == "dq":
      at = jnp.maximum(i - first_store, 0)
    else:
      at = (row if name in ("queries", "q_results") else column)(place, i)
    if not what.sublanes:
      return b, at, group
    per_row = shape[3] // what.width
    return b, at, lax.div(group, per_row), lax.rem(group, per_row)

  return pl.BlockSpec(what.block, index)
