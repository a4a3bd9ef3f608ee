"""out_1, ... = epilogue(A B) on Hopper: one kernel for all products around attention.

A thread block owns a range of columns and walks down the rows, tile by tile, always the same ones:
sums over rows thus have a fixed order, and no atomics. A producer warpgroup loads A [rows, depth]
in steps, two consumers multiply, 64 rows of a tile each, and pass the result on as it leaves the
accumulator, in slices of 64 columns:

    weights stream (`Sizes.stays` False): a slot holds a step of A and of B, for both consumers

        producer    A B | A B | A B | A B | A B |          ring of `stages`, frees: two readers
                     v     v     v
        consumers   (A B)(A B)(A B) | epilogue | (A B) ..  both at the same step

    weights stay: B is loaded once; a slot holds a step of A for one of the consumers, in turns

        producer    A0 A0 A0 | A1 A1 A1 | A0 A0 A0 |       in order; frees: whose step it is
                     v          v
        consumer 0  A0 B ..  | epilogue | A0 B ..          one multiplies while the other one is
        consumer 1             A1 B ..  | epilogue | ..    in its epilogue

In a cluster, what its thread blocks have in common is copied once for all of them: weights that
stream (`Sizes.together`), or A of blocks with neighbouring columns (`beside`). A slot is then free
when the readers in all blocks have released it, and a producer ends after all these releases: no
block leaves while another one still copies or arrives in it.

What else an epilogue reads, its warpgroup loads itself, ahead: the slices of second inputs
[rows, columns] (`ahead` of them), and per tile what belongs to rows. It sends its results on their
way from shared memory; the next slice, or the next product, runs meanwhile.

Rows past the end read as zeros and are not stored. No mask is needed: sums over rows meet zeros
there, because what belongs to rows is padded with finite numbers.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
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
from pallas_kernels.residual.plan import check
from pallas_kernels.residual.plan import CLUSTER
from pallas_kernels.residual.plan import COPY_ROWS
from pallas_kernels.residual.plan import Epilogue
from pallas_kernels.residual.plan import num_row_tiles
from pallas_kernels.residual.plan import Plan
from pallas_kernels.residual.plan import Sizes
from pallas_kernels.residual.plan import SLICE
from pallas_kernels.residual.strip import Strip

# Registers of a thread that loads and of one that computes, by consumers: in sum no more than all
# warpgroups have at launch, 168 each of three, 128 of four.
REGISTERS = {2: (40, 232), 3: (24, 160)}
GROUP = 16  # multiprocessors among which a cluster must find its place, or two more
PREFETCHED = 256  # columns, at most, that are asked for at once


class Block:
  """A thread block: its columns, and which of the rows are its own."""

  def __init__(self, plan: Plan, refs: dict[str, Ref]):
    self.plan, self.refs, self.sizes = plan, refs, plan.sizes
    self.ring = plan.steps.of(refs)
    core, self.wg = lax.axis_index("core"), lax.axis_index("wg")
    if self.sizes.beside > 1:
      core = core * self.sizes.beside + lax.axis_index(CLUSTER)
    tiles = jnp.int32(plan.column_tiles)
    # Neighbours work on the same rows at the same time: A comes from memory once.
    self.column_tile, self.walker = lax.rem(core, tiles), lax.div(core, tiles)
    self.n0 = self.column_tile * self.sizes.columns
    # All of a cluster have as many tiles as its first: some past the end.
    together = self.sizes.together
    left = plan.row_tiles - self.walker * together
    if together > 1:
      self.walker = self.walker * together + lax.axis_index(CLUSTER)
    self.num = lax.div(left + (plan.walkers - 1), jnp.int32(plan.walkers))

  def row_of(self, i: Traced) -> Traced:
    """The first row of tile i of this block."""
    return (self.walker + i * self.plan.walkers) * self.sizes.rows

  def run(self) -> None:
    consumers = self.sizes.consumers
    to_load, to_compute = REGISTERS[consumers]

    @gpu.when(self.wg == consumers)
    def _() -> None:
      gpu.set_max_registers(to_load, action="decrease")
      self.produce()

    @gpu.when(self.wg < consumers)
    def _() -> None:
      gpu.set_max_registers(to_compute, action="increase")
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
      if self.sizes.prefetch:
        gpu.when(i + 1 < self.num)(lambda: self.prefetch(i + 1))
      for lane in range(self.sizes.consumers) if self.sizes.stays else [None]:
        first = self.row_of(i) + (0 if lane is None else lane * TILE)
        rows = gpu.ds(first, self.sizes.rows if lane is None else TILE)
        before = 0
        for n, K in enumerate(plan.depths):
          a, offset = refs[f"a{n}"], before

          # A bound that the compiler does not know: unrolled, this loop has no registers for its
          # addresses.
          @gpu.loop(0, lax.optimization_barrier(jnp.int32(K // depth)))
          def _(c: Traced, a: Ref = a, offset: int = offset, lane: int | None = lane) -> None:
            n = self.step(i, offset + c, lane)
            self.ring.wait_until_free(n)
            slot = self.ring.slot(n)
            full = self.full(slot, lane)
            copied = lambda blocks: dict(collective_axes=CLUSTER) if blocks > 1 else {}
            part = a.at[rows, gpu.ds(c * depth, depth)]
            gpu.to_smem(part, slot["a"], full, **copied(self.sizes.beside))
            if not self.sizes.stays:
              b = self.weights(offset + c)
              gpu.to_smem(b, slot["b"], full, **copied(self.sizes.together))

          before += K // depth

    ring.drain(self.step(self.num, 0, 0), self.ring)

  def prefetch(self, i: Traced) -> None:
    """Brings the rows of tile i into the cache: of A a share, what neighbours read as well."""
    plan, tiles = self.plan, self.plan.column_tiles
    rows = gpu.ds(self.row_of(i), self.sizes.rows)
    for n, K in enumerate(plan.depths):
      width = math.gcd(K, PREFETCHED)
      left = K // width - self.column_tile

      @gpu.loop(0, lax.div(left + (tiles - 1), jnp.int32(tiles)))
      def _(c: Traced, a: Ref = self.refs[f"a{n}"], width: int = width) -> None:
        gpu.prefetch(a.at[rows, gpu.ds((self.column_tile + c * tiles) * width, width)])

    for name in plan.ahead:
      width = min(self.sizes.columns, PREFETCHED)
      for first in range(0, self.sizes.columns, width):
        gpu.prefetch(self.refs[name].at[rows, gpu.ds(self.n0 + first, width)])

  def step(self, i: Traced, c: Traced, lane: Traced | None) -> Traced:
    """Number of a step of the ring: chunk c of tile i, of one consumer where weights stay."""
    if self.sizes.stays:
      i = i * self.sizes.consumers + lane
    return i * self.plan.chunks + c

  def full(self, slot: ring.Slot, lane: Traced | None) -> Ref:
    """The barrier for copies into a slot."""
    if self.sizes.stays:
      return self.refs["a_full"].at[slot.index * self.sizes.consumers + lane]
    return slot.full()

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
    zeros = lambda: gpu.zeros((TILE, SLICE)) if plan.sums_of_tiles else gpu.full((SLICE,), 0.0)
    sums = tuple(zeros() for _ in range(plan.slices if plan.epilogue.column_sums else 0))

    def tile(i: Traced, sums: tuple) -> tuple:
      strip = Strip(self, i)
      strip.acc, before = self.multiply(i, lambda: plan.epilogue.before(strip))
      return tuple(plan.epilogue.run(strip, before, sums))

    sums = lax.fori_loop(jnp.int32(0), self.num, tile, sums)
    if plan.sums_of_tiles:
      sums = tuple(first.over_rows(tile) for tile in sums)
    if plan.epilogue.column_sums:
      self.store_column_sums(sums)
    gpu.wait_to_gmem(0)  # shared memory must not go before it is copied

  def multiply(self, i: Traced, meanwhile: Callable) -> tuple[Traced, Any]:
    """This warpgroup's part of tile i, [64, width] in float32; and meanwhile().

    That is called when the last product is under way.
    """
    sizes, chunks, stays = self.sizes, self.plan.chunks, self.sizes.stays
    # What slicing and transposing do to a tile of B.
    columns = gpu.ds(self.wg * sizes.width, sizes.width) if sizes.across else slice(None)
    rows = slice(None) if sizes.across or stays else gpu.ds(self.wg * TILE, TILE)
    lane = self.wg if stays else None

    def run(acc: Ref) -> tuple[Traced, Any]:
      @gpu.loop(0, chunks)
      def _(c: Traced) -> None:
        slot = self.ring.slot(self.step(i, c, lane))
        b = self.refs["b_s"].at[c] if stays else slot["b"]
        b = b.at[columns].transpose((1, 0)) if self.plan.transposed else b.at[:, columns]
        gpu.barrier_wait(self.full(slot, lane))
        gpu.wgmma(acc, slot["a"].at[rows], b)
        # One product stays under way while the next step is waited for.
        gpu.wgmma_wait(1)
        gpu.when(c > 0)(lambda: self.release(self.step(i, c - 1, lane)))

      other = meanwhile()
      value = acc[...]
      self.release(self.step(i, chunks - 1, lane))
      return value, other

    return pl.run_scoped(run, gpu.ACC((TILE, sizes.width), jnp.float32))

  def release(self, n: Traced) -> None:
    gpu.commit_reads()
    self.ring.slot(n).release()

  def store_column_sums(self, sums: Sequence[Traced]) -> None:
    """The sums of this warpgroup's rows; what is left to do is a sum over `Plan.parts`."""
    stage = self.refs["column_sums_s"].at[self.wg]
    for j, value in enumerate(sums):
      stage.at[0, gpu.ds(j * SLICE, SLICE)][...] = value
    gpu.commit_smem()
    part, n0 = self.walker, self.n0
    if self.sizes.across:
      n0 = n0 + self.wg * self.sizes.width
    else:
      part = part * self.sizes.consumers + self.wg
    columns = gpu.ds(n0, self.sizes.width)
    gpu.to_gmem(stage, self.refs["column_sums"].at[part, :, columns])


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
  most = num_row_tiles(padded, sizes)
  together = sizes.together
  blocks = together * sizes.beside
  # Groups of multiprocessors of 16 to 18 hold the clusters: what does not fit would run at the end.
  most_blocks = gpu.num_multiprocessors()
  most_blocks -= most_blocks % GROUP if blocks > 2 else 0
  walkers = min(most_blocks // column_tiles, most + most % together)
  walkers = max(together, walkers - walkers % together)
  slices = sizes.width // SLICE
  whole_strips = () if sizes.twice else epilogue.whole
  plan = Plan(
    sizes=sizes,
    epilogue=epilogue,
    R=padded,
    N=N,
    depths=tuple(x.shape[1] for x in a),
    transposed=transposed,
    ahead={x: slices if x in whole_strips else min(sizes.ahead, slices) for x in inputs},
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
  cluster = dict(cluster=(blocks,), cluster_names=(CLUSTER,)) if blocks > 1 else {}
  results = gpu.launch(
    name,
    lambda refs: Block(plan, refs).run(),
    inputs=arrays,
    outputs=outputs,
    scratch=plan.scratch(),
    grid=(plan.blocks // blocks,),
    grid_names=("core",),
    **cluster,
    num_threads=sizes.consumers + 1,
    thread_name="wg",
    barriers=False,
  )
  results = dict(zip(outputs, results, strict=True))
  if padded > R:
    bf16 = lambda x: x.dtype == jnp.bfloat16
    results = {x: value[:R] if bf16(value) else value for x, value in results.items()}
  return results
