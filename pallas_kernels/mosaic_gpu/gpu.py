"""All that the kernels use of Pallas Mosaic GPU, in one place: its names move between releases."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # rows of a warpgroup's matrix instruction
LOG2E = math.log2(math.e)
# A tile of float32 in registers as the matrix units hold it; one value per row, per column of it.
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
COLUMN = WGMMA.reduce(0)

ACC = plgpu.ACC
Barrier = plgpu.Barrier
barrier_arrive = plgpu.barrier_arrive
barrier_wait = plgpu.barrier_wait
commit_smem = plgpu.commit_smem
load = plgpu.load
set_max_registers = plgpu.set_max_registers
to_gmem = plgpu.copy_smem_to_gmem
finish = plgpu.wgmma_accumulator_load
to_smem = plgpu.copy_gmem_to_smem
wait_to_gmem = plgpu.wait_smem_to_gmem
wgmma = plgpu.wgmma
wgmma_wait = plgpu.wgmma_wait


def simulated() -> bool:
  """Whether kernels run in Pallas's simulator: where programs are not built for an NVIDIA GPU."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return platform not in ("gpu", "cuda")


def num_cores() -> int:
  """Streaming multiprocessors of the GPU that programs are built for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if simulated():
    return 2  # few enough that thread blocks have several items of work
  return jax.devices()[0].core_count if device is None else device.num_cores


def kernel(body, *, inputs: dict, outputs: dict, scratch: dict, **how) -> list:
  """Runs `plgpu.kernel` with fast exp2, or its simulation; body(refs by name), the outputs."""
  interpret = plgpu.InterpretGPUParams(detect_races=True) if simulated() else None
  names = (*inputs, *outputs, *scratch)
  return plgpu.kernel(
    lambda *refs: body(dict(zip(names, refs, strict=True))),
    out_type=list(outputs.values()),
    scratch_types=list(scratch.values()),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    **how,
  )(*inputs.values())


def smem(*shape: int, dtype: jax.typing.DTypeLike):
  """Shared memory for tiles [..., rows, columns], laid out for the matrix units."""
  size = jnp.dtype(dtype).itemsize
  # The widest swizzle whose span divides a row: 32 and 96 columns of 2 bytes take 64 bytes.
  span = next(s for s in (128, 64, 32) if shape[-1] * size % s == 0)
  transforms = (plgpu.TilingTransform((8, span // size)), plgpu.SwizzleTransform(span))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def vector(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32):
  """Shared memory for rows of single values."""
  return plgpu.SMEM(shape, dtype)


def iota(shape: tuple[int, ...], axis: int = 0, layout=WGMMA):
  """int32 positions along an axis; 1-D shapes take ROW or COLUMN."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def zeros(shape: tuple[int, ...], layout=WGMMA):
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def full(shape: tuple[int, ...], value: float, layout=ROW):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over_columns(rows, num_columns: int):
  """One value per row -> the same in every column."""
  return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def over_rows(columns, num_rows: int):
  """One value per column -> the same in every row."""
  return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


def matmul(a, b, meanwhile=lambda: None):
  """a b in a fresh float32 accumulator; a in registers (not simulated) or shared memory.

  `meanwhile` is called once the product is under way.
  """

  def body(acc):
    wgmma(acc, a, b)
    meanwhile()
    return acc[...]

  return pl.run_scoped(body, ACC((a.shape[0], b.shape[1]), jnp.float32))


def add_matmul(acc, a, b, scratch=None):
  """acc + a b, a in registers.

  The simulator has neither matrix instructions with a in registers nor accumulators with a start
  value; there a goes through `scratch`, shared memory of a's shape.
  """
  if scratch is None:
    return pl.run_state(lambda ref: wgmma(ref, a, b))(ACC.init(acc))
  scratch[...] = a
  commit_smem()
  return acc + matmul(scratch, b)


def overlapped(a, b, use, acc, p, v, ready, scratch=None):
  """use(a b) while acc + p v is under way, v after `ready()`: (what `use` returns, the sum)."""
  if scratch is not None:
    ready()
    return use(matmul(a, b)), add_matmul(acc, p, v, scratch)

  def body(product, total):
    total[...] = acc
    wgmma(product, a, b)
    ready()
    wgmma(total, p, v)
    return use(finish(product, wait_n=1)), total[...]

  shapes = (a.shape[0], b.shape[1]), acc.shape
  return pl.run_scoped(body, *(ACC(shape, jnp.float32) for shape in shapes))


def two_matmuls(first, use, second):
  """use(a b) of the pair `first`, while the product of the pair `second` is under way; both."""
  if simulated():
    return use(matmul(*first)), matmul(*second)

  def body(one, other):
    wgmma(one, *first)
    wgmma(other, *second)
    return use(finish(one, wait_n=1)), other[...]

  return pl.run_scoped(
    body, *(ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in (first, second))
  )


def add_matmuls(accs, left, right, scratch=None):
  """acc + a b for each of the accumulators, all products under way at once."""
  if scratch is not None:
    return tuple(add_matmul(acc, a, b, scratch) for acc, a, b in zip(accs, left, right, strict=True))

  def body(refs):
    for ref, a, b in zip(refs, left, right, strict=True):
      wgmma(ref, a, b)

  return tuple(pl.run_state(body)(tuple(ACC.init(acc) for acc in accs)))
