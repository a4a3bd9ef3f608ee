"""How a product is cut, and what it needs: all that is known before its kernel runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.residual import epilogues

SLICE = 64  # columns of an epilogue's step: a span of the widest swizzle
PAD_ROWS = 128  # what numbers of rows are padded to
SHARED_BYTES = 227 * 1024
BARRIER_BYTES = 8
CLUSTER = "together"  # the axis of thread blocks in a cluster
COPY_ROWS = 8  # the copy engine's tiles have 8 rows: an array has whole ones of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How a product is cut.

  Attributes:
    columns: of a tile.
    depth: columns of A, rows of B, of a step of the ring.
    stages: steps that the ring holds.
    stays: whether the weights of a thread block stay in shared memory.
    across: whether the consumers share 64 rows and halve the columns, rather than halve 128 rows:
      a tile may then span rows of 512 columns.
    prefetch: whether the next tile's rows of A and of second inputs are brought into the L2 cache
      meanwhile: a ring that is short for the memory's latency may do for the cache's.
    ahead: slices of each second input that are in shared memory.
    behind: slices of each result that may be on their way.
    in_turn: whether the results of a slice share `behind` places in shared memory, one after the
      other, rather than have as many each.
    twice: whether an input that is read twice is loaded twice, by slices, rather than whole.
    consumers: warpgroups that compute.
    together: thread blocks of a cluster, which work on neighbouring rows at the same pace: weights
      that stream are copied once for all of them. Not simulated.
    beside: thread blocks of a cluster that have neighbouring columns of the same rows: A is copied
      once for them. Where an epilogue meets, they have all columns. Not simulated.
  """

  columns: int = 256
  depth: int = 64
  stages: int = 3
  stays: bool = False
  across: bool = False
  prefetch: bool = False
  ahead: int = 1
  behind: int = 1
  in_turn: bool = False
  twice: bool = False
  consumers: int = 2
  together: int = 1
  beside: int = 1

  @property
  def rows(self) -> int:
    """Of a tile."""
    return TILE if self.across else TILE * self.consumers

  @property
  def width(self) -> int:
    """Columns of a consumer's part of a tile."""
    return self.columns // self.consumers if self.across else self.columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
  """What is made of a product.

  Attributes:
    run: (Strip, result of `before`, sums so far) -> sums; sums are those over rows, one for each
      slice.
    outputs: widths of the results [R, N], by name; several where N is cut into arrays.
    row_sums: how many sums over columns are stored as well.
    column_sums: whether sums over rows are.
    by_tiles: whether these may be sums of whole tiles until the kernel ends, 32 registers a slice.
    whole: second inputs that are read twice: a strip of them is in shared memory at once, unless
      `Sizes.twice`; others have `Sizes.ahead`.
    meets: whether it wants sums over whole rows before it ends.
    before: Strip -> what can be made without the product, while its last step is under way. ptxas
      waits for that as early as it can: behind the last branch here.
  """

  run: Callable
  outputs: dict[str, tuple[int, ...]]
  row_sums: int = 0
  column_sums: bool = False
  by_tiles: bool = False
  whole: tuple[str, ...] = ()
  meets: bool = False
  before: Callable = lambda strip: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """All that is known before the kernel runs."""

  sizes: Sizes
  epilogue: Epilogue
  R: int
  N: int
  depths: tuple[int, ...]  # columns of each array of A
  transposed: bool  # whether B is [N, K] in memory
  ahead: dict[str, int]  # of second inputs
  rows: dict[str, int]  # arrays of one number per row: how many
  columns: tuple[str, ...]  # arrays of one number per column
  has_words: bool
  blocks: int

  @property
  def slices(self) -> int:
    return self.sizes.width // SLICE

  @property
  def column_tiles(self) -> int:
    return self.N // self.sizes.columns

  @property
  def chunks(self) -> int:
    return sum(self.depths) // self.sizes.depth

  @property
  def row_tiles(self) -> int:
    return num_row_tiles(self.R, self.sizes)

  @property
  def walkers(self) -> int:
    """Thread blocks that share the rows of a range of columns."""
    return self.blocks // self.column_tiles

  @property
  def parts(self) -> int:
    """Sums over rows of one column that are stored apart."""
    return self.walkers * (1 if self.sizes.across else self.sizes.consumers)

  @property
  def sums_of_tiles(self) -> bool:
    """Whether there are registers for what `Epilogue.by_tiles` asks for."""
    return self.epilogue.by_tiles and self.sizes.consumers == 2 and self.slices <= 2

  @property
  def steps(self) -> ring.Ring:
    """The ring of A, or of A and B."""
    readers, full = (1, {}) if self.sizes.stays else (self.sizes.consumers, dict(a=2))
    return ring.Ring(name="a", num_slots=self.sizes.stages, full=full, readers=readers)

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers, by ref."""
    sizes, bf16, consumers = self.sizes, jnp.bfloat16, self.sizes.consumers
    step = (sizes.columns, sizes.depth) if self.transposed else (sizes.depth, sizes.columns)
    b = functools.partial(gpu.smem, dtype=bf16, beside=sizes.depth)
    if sizes.stays:
      scratch = self.steps.scratch(a=gpu.smem(sizes.stages, TILE, sizes.depth, dtype=bf16))
      # Of each consumer: who waits for a barrier has to see all of its completions.
      scratch["a_full"] = gpu.Barrier(num_barriers=sizes.stages * consumers)
      scratch |= dict(b_s=b(self.chunks, *step), b_full=gpu.Barrier(num_arrivals=self.chunks))
    else:
      shape = (sizes.stages, sizes.rows, sizes.depth)
      scratch = self.steps.scratch(a=gpu.smem(*shape, dtype=bf16), b=b(sizes.stages, *step))
    if sizes.together > 1 or sizes.beside > 1:
      # A copy fills the slot of every thread block: it waits for the readers in all of them.
      free = scratch["a_free"]
      scratch["a_free"] = gpu.ClusterBarrier(
        collective_axes=(CLUSTER,), num_barriers=free.num_barriers, num_arrivals=free.num_arrivals
      )
    tile = lambda num: gpu.smem(num, consumers, TILE, SLICE, dtype=bf16)
    for name, num in self.ahead.items():
      scratch[f"{name}_s"] = tile(num)
      scratch[f"{name}_full"] = gpu.Barrier(num_barriers=num * consumers)
    staged = ("staged",) if sizes.in_turn else self.epilogue.outputs
    scratch |= {f"{name}_s": tile(sizes.behind) for name in staged}
    scratch |= {f"{name}_s": gpu.vector(consumers, n, TILE) for name, n in self.rows.items()}
    scratch |= {f"{name}_s": gpu.vector(sizes.columns) for name in self.columns}
    if self.has_words:
      num = sizes.width // epilogues.WORD
      scratch["words_s"] = gpu.vector(consumers, num, TILE, dtype=jnp.uint32)
    if num := len(self.rows) + self.has_words:
      scratch["rows_full"] = gpu.Barrier(num_barriers=consumers, num_arrivals=num)
    if self.columns:
      scratch["columns_full"] = gpu.Barrier(num_arrivals=len(self.columns))
    if self.epilogue.column_sums:
      scratch["column_sums_s"] = gpu.vector(consumers, 1, sizes.width)
      if not self.sums_of_tiles:
        scratch["weight_s"] = gpu.vector(consumers, TILE)
    if sizes.across and self.epilogue.meets:
      # Two places: who is a tile ahead must not write over what the other one still reads.
      scratch["met_s"] = gpu.vector(2, consumers, TILE)
      scratch["met_full"] = gpu.Barrier(num_arrivals=consumers)
    elif sizes.beside > 1 and self.epilogue.meets:
      # As tiles of 8 columns, which stores into another thread block want.
      scratch["met_s"] = gpu.smem(2, consumers, TILE, 8, dtype=jnp.float32)
      scratch["met_full"] = gpu.Barrier(num_barriers=2 * consumers)
    return scratch

  def shared_bytes(self) -> int:
    """Of a thread block, at most."""
    total = 0
    for kind in self.scratch().values():
      if isinstance(kind, gpu.Barrier | gpu.ClusterBarrier):
        total += BARRIER_BYTES * int(np.prod(kind.num_barriers))
      else:
        aval = kind.inner_aval
        size = int(np.prod(aval.shape)) * jnp.dtype(aval.dtype).itemsize
        total += -(-size // 1024) * 1024  # swizzled tiles begin at whole ones of these
    return total

  def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The results, by ref."""
    types, padded = {}, -(-self.R // PAD_ROWS) * PAD_ROWS
    for name, widths in self.epilogue.outputs.items():
      for n, width in enumerate(widths):
        types[f"{name}{n}"] = jax.ShapeDtypeStruct((self.R, width), jnp.bfloat16)
    if num := self.epilogue.row_sums:
      shape = self.N // self.sizes.width, num, padded
      types["row_sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if self.epilogue.column_sums:
      types["column_sums"] = jax.ShapeDtypeStruct((self.parts, 1, self.N), jnp.float32)
    return types


def num_row_tiles(R: int, sizes: Sizes) -> int:
  """Tiles that R rows are cut into: numbers of the rows that pad these are made as well."""
  padded = -(-R // PAD_ROWS) * PAD_ROWS
  return -(-padded // sizes.rows)


def check(plan: Plan) -> None:
  """Raises what is wrong with the sizes of a product."""
  sizes = plan.sizes
  if sizes.stages < 2:
    raise ValueError(f"{sizes}: a step is freed when the next one is multiplied, in another slot")
  if plan.epilogue.meets and sizes.columns * sizes.beside != plan.N:
    raise ValueError(f"{sizes}: sums over parts of rows, of {plan.N} columns")
  if sizes.across and sizes.consumers != 2:
    raise ValueError(f"{sizes}: two consumers share rows")
  if sizes.beside > 1 and (sizes.together > 1 or sizes.across):
    raise ValueError(f"{sizes}: a cluster has blocks beside each other, or together, not both")
  if plan.column_tiles % sizes.beside:
    raise ValueError(
      f"{sizes}: {plan.column_tiles} tiles of columns, no multiple of {sizes.beside=}"
    )
  if plan.epilogue.meets and sizes.beside > 2:
    raise ValueError(f"{sizes}: sums over rows are exchanged by two thread blocks")
  if sizes.stays and sizes.together > 1:
    raise ValueError(f"{sizes}: weights are copied for several blocks where they stream")
  for K in plan.depths:
    if K % sizes.depth:
      raise ValueError(f"{K=} must be a multiple of {sizes.depth=}")
  if plan.N % sizes.columns or sizes.width % SLICE:
    raise ValueError(f"N={plan.N} must be a multiple of {sizes.columns=}, these of {SLICE}")
  results = plan.slices * (len(plan.epilogue.outputs) if sizes.in_turn else 1)
  places = {name: (plan.slices, num) for name, num in plan.ahead.items()}
  for name, (slices, num) in (places | dict(results=(results, sizes.behind))).items():
    if slices % num:
      raise ValueError(f"{slices} slices are no multiple of the {num} places of {name}")
  if (used := plan.shared_bytes()) > SHARED_BYTES:
    raise ValueError(f"{used} bytes of shared memory, of {SHARED_BYTES}: {sizes}")
