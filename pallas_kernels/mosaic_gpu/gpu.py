"""All that the kernels use of Pallas Mosaic GPU, in one place: its names move between releases."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import fuser  # noqa: F401  the simulator's, which imports it late
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import vector as vectors

from pallas_kernels import hardware

TILE = 64  # rows of a warpgroup's matrix instruction
LOG2E = math.log2(math.e)
# A tile of float32 in registers as the matrix units hold it; one value per row, per column of it.
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)

# What a kernel's body is made of has no type that could be checked: a ref is another class on the
# card than in the simulator, and a value may be a number where a loop is unrolled.
Ref = Any
Traced = Any

ACC = plgpu.ACC
Barrier = plgpu.Barrier
ClusterBarrier = plgpu.ClusterBarrier
ds = pl.ds
loop = pl.loop
when = pl.when
async_store_smem = plgpu.async_store_smem
barrier_arrive = plgpu.barrier_arrive
barrier_wait = plgpu.barrier_wait
commit_smem = plgpu.commit_smem
load = plgpu.load
prefetch = plgpu.async_prefetch
set_max_registers = plgpu.set_max_registers
to_gmem = plgpu.copy_smem_to_gmem
to_smem = plgpu.copy_gmem_to_smem
wait_to_gmem = plgpu.wait_smem_to_gmem
wgmma = plgpu.wgmma
wgmma_wait = plgpu.wgmma_wait


def simulated() -> bool:
  """Whether kernels run in Pallas's simulator: where programs are not built for an NVIDIA GPU."""
  return hardware.simulated("gpu")


def widened(tile: Traced) -> Traced:
  """A tile of bfloat16 in float32: what a conversion compiles to has two instructions for half."""
  if simulated():
    return tile.astype(jnp.float32)

  @plgpu.inline_mgpu(
    arg_types=(WGMMA,),
    return_type=plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, layout=WGMMA),
  )
  def widen(ctx: Any, tile: Any) -> Any:
    del ctx
    word, two = ir.IntegerType.get_signless(32), lambda kind: ir.VectorType.get((2,), kind)
    constant = lambda value: arith.constant(word, ir.IntegerAttr.get(word, value))
    registers = np.empty_like(tile.registers)
    for place, register in np.ndenumerate(tile.registers):  # of two numbers each
      both = mgpu.utils.bitcast(register, word)
      halves = [arith.shli(both, constant(16)), arith.andi(both, constant(-(2**16)))]
      pair = vectors.from_elements(two(word), halves)
      registers[place] = vectors.bitcast(two(ir.F32Type.get()), pair)
    return mgpu.FragmentedArray(_registers=registers, _layout=tile.layout, _is_signed=None)

  return widen(tile)


def num_multiprocessors() -> int:
  """Of the device that programs are built for; the simulator does with two."""
  return 2 if simulated() else hardware.num_cores()


def commit_reads() -> None:
  """Before shared memory that was read goes back to the copy engine.

  The barrier that gives it back is enough on the card; the simulator wants what a write needs.
  """
  if simulated():
    commit_smem()


def meet_warps() -> None:
  """What the threads of this warpgroup have read and written, they have done before any goes on.

  For bodies without `barriers`, before one thread asks the copy engine to write where all have
  read.
  """
  if simulated():
    commit_smem()
    return

  @plgpu.inline_mgpu()
  def meet(ctx: Any) -> None:
    del ctx
    mgpu.warpgroup_barrier()

  meet()


def kernel(body: Callable, *, barriers: bool = True, **options: Any) -> Callable:
  """`plgpu.kernel` with fast exp2, or its simulation.

  Args:
    body: of the kernel.
    barriers: whether Pallas lets the warps of a warpgroup meet before each copy, and before and
      after each store into shared memory. A body without them has its own (`meet_warps`,
      `commit_smem`, `wait_to_gmem`) between what one thread of a warpgroup does and what another
      one did before.
    **options: of `plgpu.kernel`.
  """
  # Races that a GPU hides by luck are errors in the simulator.
  interpret = plgpu.InterpretGPUParams(detect_races=True) if simulated() else None
  # No sum of ours crosses warps.
  params = plgpu.CompilerParams(
    approx_math=True, reduction_scratch_bytes=0, unsafe_no_auto_barriers=not barriers
  )
  return plgpu.kernel(body, compiler_params=params, interpret=interpret, **options)


def launch(
  name: str, body: Callable, *, inputs: dict, outputs: dict, scratch: dict, **options: Any
) -> list:
  """`kernel` with refs by name, body(refs); the outputs."""
  # Pallas gives refs by position; kernels whose arrays come and go with options want names.
  names = (*inputs, *outputs, *scratch)

  def call(*refs: Ref) -> None:
    body(dict(zip(names, refs, strict=True)))

  call.__name__ = name  # what profilers show
  return kernel(
    call,
    out_type=list(outputs.values()),
    scratch_types=list(scratch.values()),
    **options,
  )(*inputs.values())


def smem(*shape: int, dtype: jax.typing.DTypeLike, beside: int | None = None) -> Any:
  """Shared memory for tiles [..., rows, columns], laid out for the matrix units.

  A tile that is multiplied with one of `beside` columns, both in shared memory, is laid out alike;
  so is one that is multiplied over `beside` rows, of which matrix instructions take whole spans.
  """
  size = jnp.dtype(dtype).itemsize
  # The widest swizzle whose span divides a row: 32 and 96 columns of 2 bytes take 64 bytes.
  span = next(s for s in (128, 64, 32) if math.gcd(beside or 0, shape[-1]) * size % s == 0)
  transforms = (plgpu.TilingTransform((8, span // size)), plgpu.SwizzleTransform(span))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def one_span(D: int, dtype: jax.typing.DTypeLike) -> bool:
  """Whether rows of D columns are no wider than a swizzle's span."""
  return D * jnp.dtype(dtype).itemsize in (128, 64, 32)


def smem_in_boxes(stages: int, rows: int, box: int, D: int, dtype: jax.typing.DTypeLike) -> Any:
  """The same memory as tiles [stages, rows, D] and as [stages, rows / box, box, D].

  Rows lie in memory in the same order either way (D of `one_span`), but one copy fills several
  boxes from rows that are apart. On a GPU only: the simulator keeps the two apart.
  """
  boxes = smem(stages, rows // box, box, D, dtype=dtype)
  return plgpu.RefUnion(smem(stages, rows, D, dtype=dtype), boxes)


def vector(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
  """Shared memory for rows of single values."""
  return plgpu.SMEM(shape, dtype)


def iota(shape: tuple[int, ...], axis: int = 0, layout: Any = WGMMA) -> Traced:
  """int32 positions along an axis; 1-D shapes take ROW or COLUMN."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def zeros(shape: tuple[int, ...], layout: Any = WGMMA) -> Traced:
  # A constant has no layout of its own, and what it is combined with has one.
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def full(shape: tuple[int, ...], value: float, layout: Any = ROW) -> Traced:
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def in_turn(size: int, num_values: int) -> Any:
  """A layout of `size` values: each thread has so many neighbours, the next ones follow."""
  return plgpu.Layout.WG_STRIDED((size,), vec_size=num_values)


def over_columns(rows: Traced, num_columns: int) -> Traced:
  """One value per row -> the same in every column."""
  return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def over_rows(columns: Traced, num_rows: int) -> Traced:
  """One value per column -> the same in every row."""
  return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


def matmul(*pairs: tuple[Any, Any]) -> Any:
  """a b for each pair (a, b), in fresh float32 accumulators: all products are in flight together.

  a is in registers (not simulated) or in shared memory, b in shared memory.
  """

  def run(*accs: Ref) -> Any:
    for acc, (a, b) in zip(accs, pairs, strict=True):
      wgmma(acc, a, b)
    return tuple(acc[...] for acc in accs)

  # Reading an accumulator waits for its products: all are started before the first is read.
  return pl.run_scoped(run, *(ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs))


def add_matmul(*terms: tuple, scratch: Ref | None = None) -> Any:
  """acc + the sum of a b over pairs, for each of the terms (acc, (a, b), ...).

  All products are in flight together. The simulator has neither matrix instructions with a in
  registers nor accumulators with a start value; there such an a goes through `scratch`, shared
  memory of its shape.
  """
  if not simulated():

    def run(refs: Ref) -> None:
      for ref, (_, *pairs) in zip(refs, terms, strict=True):
        for a, b in pairs:
          wgmma(ref, a, b)

    # Accumulators start with the sum so far: nothing is added afterwards.
    return pl.run_state(run)(tuple(ACC.init(acc) for acc, *_ in terms))
  sums = []
  for acc, *pairs in terms:
    for a, b in pairs:
      if isinstance(a, jax.Array):
        scratch[...] = a
        commit_smem()
        a = scratch
      acc = acc + matmul((a, b))[0]
    sums.append(acc)
  return tuple(sums)


class Sum:
  """A float32 accumulator of products, several of which may be under way at once.

  In the simulator, which has neither matrix instructions with an operand in registers nor
  accumulators with a start value, a plain value; such operands go through `scratch` there.
  """

  def __init__(
    self, ref: Ref | None = None, value: Traced | None = None, scratch: Ref | None = None
  ):
    self.ref, self.value, self.scratch = ref, value, scratch

  def add(self, a: Ref, b: Ref) -> None:
    """Starts += a b of two tiles in shared memory."""
    if self.ref is not None:
      wgmma(self.ref, a, b)
    else:
      (product,) = matmul((a, b))
      self.value = product if self.value is None else self.value + product

  def add_from_registers(self, a: Traced, b: Ref) -> None:
    """Starts += a b, a in registers."""
    if self.ref is None:
      self.scratch[...] = a
      commit_smem()
      a = self.scratch
    self.add(a, b)

  def get(self, under_way: int = 0) -> Traced:
    """The value, once no more than so many products are under way."""
    return (
      self.value if self.ref is None else plgpu.wgmma_accumulator_load(self.ref, wait_n=under_way)
    )


def sums(body: Callable, *starts: Any, scratch: Ref | None = None) -> Any:
  """body(Sum, ...): one per start, a value or the shape of a fresh accumulator.

  `scratch` is shared memory for an operand in registers, for the simulator.
  """
  if simulated():
    # A fresh accumulator has no value before its first product.
    values = (None if isinstance(start, tuple) else start for start in starts)
    return body(*(Sum(value=value, scratch=scratch) for value in values))

  def run(*refs: Ref) -> Any:
    for ref, start in zip(refs, starts, strict=True):
      if not isinstance(start, tuple):
        ref[...] = start
    return body(*(Sum(ref) for ref in refs))

  shapes = (start if isinstance(start, tuple) else start.shape for start in starts)
  return pl.run_scoped(run, *(ACC(shape, jnp.float32) for shape in shapes))
