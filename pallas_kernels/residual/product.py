"""out_1, ... = epilogue(A B) on Hopper: one kernel for all products around attention.

A thread block owns a range of columns and walks down the rows, tile by tile, always the same ones:
sums over rows thus have a fixed order, and no atomics. A producer warpgroup loads A [rows, depth]
in steps, two consumers multiply, 64 rows of a tile each, and pass the result on as it leaves the
accumulator, in slices of 64 columns:

    weights stream (`Sizes.stays` False): a slot holds a step of A and of B, for both consumers

        producer    A B | A B | A B | A B | A B |          ring of `stages`, frees: two readers
                     v     v     v
        consumers   (A B)(A B)(A B) | epilogue | (A B) ..  both at the same step

    weights stay: B is loaded once; each consumer has a lane of the ring, and its own pace

        producer    A0 A0 A0 | A1 A1 A1 | A0 A0 A0 |       tile by tile, lane after lane
                     v          v
        consumer 0  A0 B ..  | epilogue | A0 B ..          one multiplies while the other one is
        consumer 1             A1 B ..  | epilogue | ..    in its epilogue

What else an epilogue reads, its warpgroup loads itself, ahead: the slices of second inputs
[rows, columns] (`ahead` of them), and per tile what belongs to rows. It sends its results on their
way from shared memory; the next slice, or the next product, runs meanwhile.

Rows past the end read as zeros and are not stored. No mask is needed: sums over rows meet zeros
there, because what belongs to rows is padded with finite numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import BFloat16
from jaxtyping import Float32
from jaxtyping import UInt32

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.residual import epilogues

CONSUMERS = 2
REGISTERS = 40, 232  # of a thread that loads, of one that computes; 168 each at launch
SLICE = 64  # columns of an epilogue's step: a span of the widest swizzle
PAD_ROWS = 128  # what numbers of rows are padded to
COPY_ROWS = 8  # the copy engine's tiles have 8 rows: an array has whole ones of them
SHARED_BYTES = 227 * 1024
BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """How a product is cut.

  Attributes:
    columns: of a tile.
    depth: columns of A, rows of B, of a step of the ring.
    stages: steps that the ring holds; with `stays`, in each of its lanes.
    stays: whether the weights of a thread block stay in shared memory.
    across: whether the consumers share 64 rows and halve the columns, rather than halve 128 rows:
      a tile may then span rows of 512 columns.
    ahead: slices of each second input that are in shared memory.
    behind: slices of each result that may be on their way.
  """

  columns: int = 256
  depth: int = 64
  stages: int = 3
  stays: bool = False
  across: bool = False
  ahead: int = 1
  behind: int = 1

  @property
  def rows(self) -> int:
    """Of a tile."""
    return TILE if self.across else TILE * CONSUMERS

  @property
  def width(self) -> int:
    """Columns of a consumer's part of a tile."""
    return self.columns // CONSUMERS if self.across else self.columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
  """What is made of a product.

  Attributes:
    run: (Strip, sums so far) -> sums; sums are those over rows, a value [64] for each of
      `column_sums` and slice.
    outputs: widths of the results [R, N], by name; several where N is cut into arrays.
    row_sums: whether a pair of sums over columns is stored as well.
    column_sums: how many sums over rows.
    whole: second inputs of which a strip is in shared memory at once; others have `Sizes.ahead`.
  """

  run: Callable
  outputs: dict[str, tuple[int, ...]]
  row_sums: bool = False
  column_sums: int = 0
  whole: tuple[str, ...] = ()


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
    return -(-self.R // self.sizes.rows)

  @property
  def walkers(self) -> int:
    """Thread blocks that share the rows of a range of columns."""
    return self.blocks // self.column_tiles

  @property
  def parts(self) -> int:
    """Sums over rows of one column that are stored apart."""
    return self.walkers * (1 if self.sizes.across else CONSUMERS)

  @property
  def steps(self) -> ring.Ring:
    """The ring of A, or of A and B."""
    lanes = dict(lanes=CONSUMERS, readers=1) if self.sizes.stays else dict(readers=CONSUMERS)
    return ring.Ring(
      name="a", num_slots=self.sizes.stages, full=dict(a=1 if self.sizes.stays else 2), **lanes
    )

  def scratch(self) -> dict[str, Any]:
    """Shared memory and barriers, by ref."""
    sizes, bf16 = self.sizes, jnp.bfloat16
    step = (sizes.columns, sizes.depth) if self.transposed else (sizes.depth, sizes.columns)
    b = functools.partial(gpu.smem, dtype=bf16, beside=sizes.depth)
    if sizes.stays:
      shape = (sizes.stages, CONSUMERS, TILE, sizes.depth)
      scratch = self.steps.scratch(a=gpu.smem(*shape, dtype=bf16))
      scratch |= dict(b_s=b(self.chunks, *step), b_full=gpu.Barrier(num_arrivals=self.chunks))
    else:
      shape = (sizes.stages, sizes.rows, sizes.depth)
      scratch = self.steps.scratch(a=gpu.smem(*shape, dtype=bf16), b=b(sizes.stages, *step))
    tile = lambda num: gpu.smem(num, CONSUMERS, TILE, SLICE, dtype=bf16)
    for name, num in self.ahead.items():
      scratch[f"{name}_s"] = tile(num)
      scratch[f"{name}_full"] = gpu.Barrier(num_barriers=num * CONSUMERS)
    scratch |= {f"{name}_s": tile(sizes.behind) for name in self.epilogue.outputs}
    scratch |= {f"{name}_s": gpu.vector(CONSUMERS, n, TILE) for name, n in self.rows.items()}
    scratch |= {f"{name}_s": gpu.vector(sizes.columns) for name in self.columns}
    if self.has_words:
      num = sizes.width // epilogues.WORD
      scratch["words_s"] = gpu.vector(CONSUMERS, num, TILE, dtype=jnp.uint32)
    if num := len(self.rows) + self.has_words:
      scratch["rows_full"] = gpu.Barrier(num_barriers=CONSUMERS, num_arrivals=num)
    if self.columns:
      scratch["columns_full"] = gpu.Barrier(num_arrivals=len(self.columns))
    if self.epilogue.row_sums:
      scratch["row_sums_s"] = gpu.vector(CONSUMERS, 2, TILE)
    if num := self.epilogue.column_sums:
      scratch["column_sums_s"] = gpu.vector(CONSUMERS, num, sizes.width)
      scratch["weights_s"] = gpu.vector(CONSUMERS, num, TILE)
    if sizes.across:
      # Two places: who is a tile ahead must not write over what the other one still reads.
      scratch["met_s"] = gpu.vector(2, CONSUMERS, 2, TILE)
      scratch["met_full"] = gpu.Barrier(num_arrivals=CONSUMERS)
    return scratch

  def shared_bytes(self) -> int:
    """Of a thread block, at most."""
    total = 0
    for kind in self.scratch().values():
      if isinstance(kind, gpu.Barrier):
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
    if self.epilogue.row_sums:
      shape = self.N // self.sizes.width, 2, padded
      types["row_sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if num := self.epilogue.column_sums:
      types["column_sums"] = jax.ShapeDtypeStruct((self.parts, num, self.N), jnp.float32)
    return types


# ------------------------------------------------------------------------------------ the kernel


class Block:
  """A thread block: its columns, and which of the rows are its own."""

  def __init__(self, plan: Plan, refs: dict[str, Ref]):
    self.plan, self.refs, self.sizes = plan, refs, plan.sizes
    self.ring = plan.steps.of(refs)
    core, self.wg = lax.axis_index("core"), lax.axis_index("wg")
    tiles = jnp.int32(plan.column_tiles)
    # Neighbours work on the same rows at the same time: A comes from memory once.
    self.column_tile, self.walker = lax.rem(core, tiles), lax.div(core, tiles)
    self.n0 = self.column_tile * self.sizes.columns
    left = plan.row_tiles - self.walker
    self.num = lax.div(left + (plan.walkers - 1), jnp.int32(plan.walkers))

  def row_of(self, i: Traced) -> Traced:
    """The first row of tile i of this block."""
    return (self.walker + i * self.plan.walkers) * self.sizes.rows

  def run(self) -> None:
    @gpu.when(self.wg == CONSUMERS)
    def _() -> None:
      gpu.set_max_registers(REGISTERS[0], action="decrease")
      self.produce()

    @gpu.when(self.wg < CONSUMERS)
    def _() -> None:
      gpu.set_max_registers(REGISTERS[1], action="increase")
      self.consume()

  # ------------------------------------------------------------------------------- the producer

  def produce(self) -> None:
    plan, refs, depth = self.plan, self.refs, self.sizes.depth
    own = gpu.ds(self.n0, self.sizes.columns)
    for name in plan.columns:
      gpu.to_smem(refs[name].at[own], refs[f"{name}_s"], refs["columns_full"])
    if self.sizes.stays:

      @gpu.loop(0, plan.chunks)
      def _(c: Traced) -> None:
        gpu.to_smem(self.weights(c), refs["b_s"].at[c], refs["b_full"])

    @gpu.loop(0, self.num)
    def _(i: Traced) -> None:
      for lane in range(CONSUMERS) if self.sizes.stays else [None]:
        first = self.row_of(i) + (0 if lane is None else lane * TILE)
        rows = gpu.ds(first, self.sizes.rows if lane is None else TILE)
        before = 0
        for part, K in enumerate(plan.depths):
          a, offset = refs[f"a{part}"], before

          @gpu.loop(0, K // depth)
          def _(c: Traced, a: Ref = a, offset: int = offset, lane: int | None = lane) -> None:
            n = i * plan.chunks + offset + c
            self.ring.wait_until_free(n, lane)
            slot = self.ring.slot(n, lane)
            gpu.to_smem(a.at[rows, gpu.ds(c * depth, depth)], slot["a"], slot.full())
            if not self.sizes.stays:
              gpu.to_smem(self.weights(offset + c), slot["b"], slot.full())

          before += K // depth

    ring.drain(self.num * plan.chunks, self.ring)

  def weights(self, c: Traced) -> Ref:
    """Rows of B for chunk c of A, of this block's columns."""
    own = gpu.ds(self.n0, self.sizes.columns)
    chunk = gpu.ds(c * self.sizes.depth, self.sizes.depth)
    return self.refs["b"].at[own, chunk] if self.plan.transposed else self.refs["b"].at[chunk, own]

  # ------------------------------------------------------------------------------ the consumers

  def consume(self) -> None:
    plan, refs = self.plan, self.refs
    first = Strip(self, jnp.int32(0))
    gpu.when(self.num > 0)(first.start)
    if plan.columns:
      gpu.barrier_wait(refs["columns_full"])
    if self.sizes.stays:
      gpu.barrier_wait(refs["b_full"])
    count = plan.epilogue.column_sums * plan.slices
    sums = tuple(gpu.full((SLICE,), 0.0) for _ in range(count))

    def tile(i: Traced, sums: tuple) -> tuple:
      strip = Strip(self, i)
      strip.acc = self.multiply(i)
      return tuple(plan.epilogue.run(strip, sums))

    sums = lax.fori_loop(jnp.int32(0), self.num, tile, sums)
    if plan.epilogue.column_sums:
      self.store_column_sums(sums)
    gpu.wait_to_gmem(0)  # shared memory must not go before it is copied

  def multiply(self, i: Traced) -> Traced:
    """This warpgroup's part of tile i, [64, width] in float32."""
    sizes, chunks, stays = self.sizes, self.plan.chunks, self.sizes.stays
    # What slicing and transposing do to a tile of B.
    columns = gpu.ds(self.wg * sizes.width, sizes.width) if sizes.across else slice(None)
    rows = slice(None) if sizes.across or stays else gpu.ds(self.wg * TILE, TILE)
    lane = self.wg if stays else None

    def run(acc: Ref) -> Traced:
      @gpu.loop(0, chunks)
      def _(c: Traced) -> None:
        slot = self.ring.slot(i * chunks + c, lane)
        b = self.refs["b_s"].at[c] if stays else slot["b"]
        b = b.at[columns].transpose((1, 0)) if self.plan.transposed else b.at[:, columns]
        slot.wait_full()
        gpu.wgmma(acc, slot["a"].at[rows], b)
        # One product stays under way while the next step is waited for.
        gpu.wgmma_wait(1)
        gpu.when(c > 0)(lambda: self.release(i * chunks + c - 1, lane))

      value = acc[...]
      self.release((i + 1) * chunks - 1, lane)
      return value

    return pl.run_scoped(run, gpu.ACC((TILE, sizes.width), jnp.float32))

  def release(self, n: Traced, lane: Traced | None) -> None:
    gpu.commit_reads()
    self.ring.slot(n, lane).release()

  def store_column_sums(self, sums: Sequence[Traced]) -> None:
    """The sums of this warpgroup's rows; what is left to do is a sum over `Plan.parts`."""
    plan, stage = self.plan, self.refs["column_sums_s"].at[self.wg]
    for kind in range(plan.epilogue.column_sums):
      for j in range(plan.slices):
        stage.at[kind, gpu.ds(j * SLICE, SLICE)][...] = sums[kind * plan.slices + j]
    gpu.commit_smem()
    part, n0 = self.walker, self.n0
    if self.sizes.across:
      n0 = n0 + self.wg * self.sizes.width
    else:
      part = part * CONSUMERS + self.wg
    columns = gpu.ds(n0, self.sizes.width)
    gpu.to_gmem(stage, self.refs["column_sums"].at[part, :, columns])


class Strip:
  """A warpgroup's part of a tile, as its epilogue sees it: 64 rows, in slices of 64 columns."""

  def __init__(self, block: Block, i: Traced):
    self.block, self.i = block, i
    self.plan, self.refs, self.wg = block.plan, block.refs, block.wg
    self.slices = range(block.plan.slices)
    across = block.sizes.across
    self.acc: Any = None
    self.n0 = block.n0 + (self.wg * block.sizes.width if across else 0)
    self.tile_of_sums = block.column_tile * CONSUMERS + self.wg if across else block.column_tile

  def rows_of(self, i: Traced) -> Any:
    first = self.block.row_of(i)
    return gpu.ds(first if self.block.sizes.across else first + self.wg * TILE, TILE)

  def place(self, j: int) -> Any:
    """Columns of slice j in an array of all N."""
    return gpu.ds(self.n0 + j * SLICE, SLICE)

  # ------------------------------------------------------------------------------------- inputs

  def start(self) -> None:
    """Loads of the first tile."""
    self.load_rows(self.i)
    for name, num in self.plan.ahead.items():
      for j in range(num):
        self.load(name, j, self.i)

  def load_rows(self, i: Traced) -> None:
    """Starts to load what belongs to the rows of tile i."""
    rows, wg, refs = self.rows_of(i), self.wg, self.refs
    if "rows_full" not in refs:
      return
    full = refs["rows_full"].at[wg]
    for name in self.plan.rows:
      gpu.to_smem(refs[name].at[:, rows], refs[f"{name}_s"].at[wg], full)
    if self.plan.has_words:
      num = self.block.sizes.width // epilogues.WORD
      first = lax.div(self.n0, jnp.int32(epilogues.WORD))
      gpu.to_smem(refs["words"].at[gpu.ds(first, num), rows], refs["words_s"].at[wg], full)

  def load(self, name: str, j: int, i: Traced) -> None:
    """Starts to load slice j of a second input, of tile i."""
    slot = j % self.plan.ahead[name]
    source = self.refs[name].at[self.rows_of(i), self.place(j)]
    full = self.refs[f"{name}_full"].at[slot * CONSUMERS + self.wg]
    gpu.to_smem(source, self.refs[f"{name}_s"].at[slot, self.wg], full)

  def wait_rows(self) -> None:
    """Before `row_pairs` and `keep` are asked."""
    gpu.barrier_wait(self.refs["rows_full"].at[self.wg])

  def rows_done(self) -> None:
    """After they were: the next tile's are loaded in their place."""
    gpu.commit_reads()
    gpu.when(self.i + 1 < self.block.num)(lambda: self.load_rows(self.i + 1))

  def row_pairs(self, name: str) -> tuple[Traced, Traced]:
    """Sums over pairs of numbers per row: of the even ones, of the odd ones."""
    row = lambda n: gpu.load(self.refs[f"{name}_s"].at[self.wg, n], layout=gpu.ROW, optimized=False)
    pair = row(0), row(1)
    for n in range(2, self.plan.rows[name], 2):
      pair = pair[0] + row(n), pair[1] + row(n + 1)
    return pair

  def keep(self, j: int) -> Traced | None:
    """The mask of slice j; None where nothing is dropped."""
    if not self.plan.has_words:
      return None
    num = SLICE // epilogues.WORD
    words = self.refs["words_s"].at[self.wg]
    load = lambda n: gpu.load(words.at[n], layout=gpu.ROW, optimized=False)
    places = gpu.iota((epilogues.WORD,), layout=gpu.COLUMN)
    return epilogues.kept([load(j * num + n) for n in range(num)], places)

  def column(self, name: str, j: int) -> Traced:
    """Numbers of the columns of slice j."""
    first = j * SLICE
    if self.block.sizes.across:
      first = first + self.wg * self.block.sizes.width
    ref = self.refs[f"{name}_s"].at[gpu.ds(first, SLICE)]
    return gpu.load(ref, layout=gpu.COLUMN, optimized=False)

  def wait(self, name: str, j: int) -> None:
    """Before slice j of a second input is read; once."""
    slot = j % self.plan.ahead[name]
    gpu.barrier_wait(self.refs[f"{name}_full"].at[slot * CONSUMERS + self.wg])

  def read(self, name: str, j: int) -> Traced:
    """Slice j of a second input, in float32."""
    slot = j % self.plan.ahead[name]
    ref = self.refs[f"{name}_s"].at[slot, self.wg]
    return gpu.load(ref, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)

  def done(self, name: str, j: int) -> None:
    """Slice j is not read again: the next one that has its place is loaded."""
    gpu.commit_reads()
    after = j + self.plan.ahead[name]
    if after in self.slices:
      self.load(name, after, self.i)
    else:
      load = lambda: self.load(name, after - len(self.slices), self.i + 1)
      gpu.when(self.i + 1 < self.block.num)(load)

  def take(self, name: str, j: int) -> Traced:
    """`wait`, `read` and `done` of a slice that is read once."""
    self.wait(name, j)
    value = self.read(name, j)
    self.done(name, j)
    return value

  def part(self, j: int) -> Traced:
    """Slice j of the product."""
    return self.acc[:, j * SLICE : (j + 1) * SLICE]

  # ------------------------------------------------------------------------------------ results

  def stage(self, name: str, j: int) -> Ref:
    return self.refs[f"{name}_s"].at[j % self.block.sizes.behind, self.wg]

  def put(self, j: int, **values: Traced | Callable) -> None:
    """Stores slice j of results, all of which there are; functions are called one by one.

    What a function makes has its registers back before the next one is called.
    """
    # Those that may be under way are of the slices since this place was last used.
    under_way = (self.block.sizes.behind - 1) * len(values)
    gpu.wait_to_gmem(under_way, wait_read_only=True)
    for name, value in values.items():
      value = value() if callable(value) else value
      self.stage(name, j)[...] = value.astype(jnp.bfloat16)
    gpu.commit_smem()
    rows = self.rows_of(self.i)
    for name in values:
      first = 0
      for n, width in enumerate(self.plan.epilogue.outputs[name]):
        column = self.n0 + j * SLICE - first
        copy = functools.partial(self._copy, name, n, j, rows, column)
        if width == self.plan.N:
          copy()
        else:
          gpu.when((column >= 0) & (column < width))(copy)
        first += width

  def _copy(self, name: str, n: int, j: int, rows: Any, column: Traced) -> None:
    gpu.to_gmem(self.stage(name, j), self.refs[f"{name}{n}"].at[rows, gpu.ds(column, SLICE)])

  def put_rows(self, first: Traced, second: Traced) -> None:
    """Stores a pair of sums over this strip's columns."""
    stage = self.refs["row_sums_s"].at[self.wg]
    gpu.wait_to_gmem(0, wait_read_only=True)
    for n, value in enumerate((first, second)):
      stage.at[n][...] = value
    gpu.commit_smem()
    gpu.to_gmem(stage, self.refs["row_sums"].at[self.tile_of_sums, :, self.rows_of(self.i)])

  def weights(self, *values: Traced) -> list[Traced]:
    """Numbers of the rows, as `add_columns` takes them."""
    stage = self.refs["weights_s"].at[self.wg]
    for n, value in enumerate(values):
      stage.at[n][...] = value
    gpu.commit_smem()
    load = lambda n: gpu.load(stage.at[n], layout=gpu.COLUMN, optimized=False)
    return [load(n) for n in range(len(values))]

  def add_columns(
    self, sums: Sequence[Traced], name: str, j: int, weights: Sequence[Traced] | None = None
  ) -> tuple:
    """sums with slice j of a result, just `put`, over its rows: plain, or times each of `weights`.

    Read again, with rows and columns exchanged: a sum along columns of registers stays within a
    warp, one across rows would need the other warps of the warpgroup.
    """
    tile = gpu.load(
      self.stage(name, j).transpose((1, 0)), layout=gpu.WGMMA, optimized=False
    ).astype(jnp.float32)
    sums = list(sums)
    for kind, weight in enumerate(weights or [None]):
      place = kind * len(self.slices) + j
      term = tile if weight is None else tile * gpu.over_rows(weight, SLICE)
      sums[place] = sums[place] + term.sum(axis=1)
    return tuple(sums)

  def meet(self, first: Traced, second: Traced) -> tuple[Traced, Traced]:
    """Sums over this strip's columns -> over those of both consumers, where they share rows."""
    if not self.block.sizes.across:
      return first, second
    place = self.refs["met_s"].at[lax.rem(self.i, jnp.int32(2))]
    for n, value in enumerate((first, second)):
      place.at[self.wg, n][...] = value
    gpu.barrier_arrive(self.refs["met_full"])
    gpu.barrier_wait(self.refs["met_full"])
    other = place.at[1 - self.wg]
    load = lambda n: gpu.load(other.at[n], layout=gpu.ROW, optimized=False)
    return first + load(0), second + load(1)


# ------------------------------------------------------------------------------------- the launch


def launch(
  name: str,
  a: Sequence[BFloat16[Array, "R _"]],
  b: BFloat16[Array, "_ _"],
  epilogue: Epilogue,
  sizes: Sizes,
  *,
  transposed: bool = False,
  inputs: dict[str, Array] | None = None,
  rows: dict[str, Float32[Array, "_ Rp"]] | None = None,
  columns: dict[str, Float32[Array, " N"]] | None = None,
  words: UInt32[Array, "_ R"] | None = None,
) -> dict[str, Array]:
  """The results of epilogue(A B), by name.

  Args:
    name: of the kernel, for profilers.
    a: arrays whose columns, in order, are those of A.
    b: [K, N], or [N, K] with `transposed`.
    epilogue: what is made of the product.
    sizes: how it is cut.
    inputs: second inputs, [R, N].
    rows: numbers of the rows, in pairs; Rp is R in whole tiles of 128.
    columns: numbers of the columns.
    words: packed masks, [N / 32, R]: the words of one range of columns lie together.
  """
  R, N = a[0].shape[0], b.shape[0 if transposed else 1]
  inputs, rows, columns = inputs or {}, rows or {}, columns or {}
  padded = -(-R // COPY_ROWS) * COPY_ROWS
  whole = lambda x: jnp.pad(x, [(0, padded - R), (0, 0)]) if padded > R else x
  column_tiles = N // sizes.columns
  most = -(-padded // sizes.rows)
  walkers = max(1, min(gpu.num_multiprocessors() // column_tiles, most))
  slices = sizes.width // SLICE
  plan = Plan(
    sizes=sizes,
    epilogue=epilogue,
    R=padded,
    N=N,
    depths=tuple(x.shape[1] for x in a),
    transposed=transposed,
    ahead={x: slices if x in epilogue.whole else min(sizes.ahead, slices) for x in inputs},
    rows={x: values.shape[0] for x, values in rows.items()},
    columns=tuple(columns),
    has_words=words is not None,
    blocks=walkers * column_tiles,
  )
  check(plan)
  arrays = {f"a{n}": whole(x) for n, x in enumerate(a)} | dict(b=b)
  arrays |= {x: whole(value) for x, value in inputs.items()} | rows | columns
  if words is not None:
    arrays |= dict(words=jnp.pad(words, [(0, 0), (0, padded - R)]) if padded > R else words)
  outputs = plan.out_types()
  results = gpu.launch(
    name,
    lambda refs: Block(plan, refs).run(),
    inputs=arrays,
    outputs=outputs,
    scratch=plan.scratch(),
    grid=(plan.blocks,),
    grid_names=("core",),
    num_threads=CONSUMERS + 1,
    thread_name="wg",
  )
  results = dict(zip(outputs, results, strict=True))
  if padded > R:
    bf16 = lambda x: x.dtype == jnp.bfloat16
    results = {x: value[:R] if bf16(value) else value for x, value in results.items()}
  return results


def check(plan: Plan) -> None:
  """Raises what is wrong with the sizes of a product."""
  sizes = plan.sizes
  for K in plan.depths:
    if K % sizes.depth:
      raise ValueError(f"{K=} must be a multiple of {sizes.depth=}")
  if plan.N % sizes.columns or sizes.width % SLICE:
    raise ValueError(f"N={plan.N} must be a multiple of {sizes.columns=}, these of {SLICE}")
  for name, num in [*plan.ahead.items(), ("results", sizes.behind)]:
    if plan.slices % num:
      raise ValueError(f"{plan.slices} slices are no multiple of the {num} places of {name}")
  if (used := plan.shared_bytes()) > SHARED_BYTES:
    raise ValueError(f"{used} bytes of shared memory, of {SHARED_BYTES}: {sizes}")
