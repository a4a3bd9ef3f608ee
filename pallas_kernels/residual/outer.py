"""A^T B of several pairs of arrays [R, _] by one kernel for Hopper, in parts: of ranges of R.

    D = A^T B, A [R, M], B [R, N]: cut into tiles [height, width], R into `ranges`

        thread block            producer     A B | A B | A B | A B |     a ring of `stages`, each
        (range, tile)                         v     v     v              `step` rows
                                consumers    += A^T B, half of the tile's height each

        D of each range         parts [ranges, M, N], straight from registers

At its end a launch writes as much as all registers hold, whatever it sums: it had better sum all
that there is to be summed. Neighbouring thread blocks have the tiles of one range, so that a row
comes from memory once, and from the cache for all others. Tiles and ranges have fixed places and
there are no atomics: equal bits in each run.

Rows past the end read as zeros and add nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array
from jaxtyping import BFloat16
from jaxtyping import Float32

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.residual.plan import COPY_ROWS
from pallas_kernels.residual.plan import SHARED_BYTES

CONSUMERS = 2
REGISTERS = 40, 232  # of a thread that loads, and of one that computes


class Product(NamedTuple):
  """A^T B for each of several B: the gradients of weights that have their input in common."""

  a: BFloat16[Array, "R M"]
  b: tuple[BFloat16[Array, "R _"], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
  """How products are cut.

  Attributes:
    height: of a tile, columns of A: the consumers have half of it each.
    width: of a tile, columns of B.
    step: rows of a step of the ring.
    stages: steps that the ring holds.
    ranges: of the rows; None: as many as the device has multiprocessors for.
  """

  height: int = 256
  width: int = 128
  step: int = 64
  stages: int = 4
  ranges: int | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
  """A^T B of one A and one B.

  Attributes:
    a: number of A.
    first: number of the tile with which its product begins.
    tiles: of its product, along the height and along the width.
    columns: of its product that come before those of B.
    shape: of the result.
  """

  a: int
  first: int
  tiles: tuple[int, int]
  columns: int
  shape: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """All that is known before the kernel runs."""

  cut: Cut
  R: int
  pieces: tuple[Piece, ...]
  tiles: int  # of a range
  ranges: int
  sums: bool

  @property
  def steps(self) -> int:
    return -(-self.R // self.cut.step)

  @property
  def rows(self) -> int:
    """Of a consumer's part of a tile."""
    return self.cut.height // CONSUMERS

  @property
  def columns(self) -> int:
    """Of B that a consumer sums."""
    return self.cut.width // CONSUMERS

  @property
  def ring(self) -> ring.Ring:
    return ring.Ring(name="a", num_slots=self.cut.stages, full=dict(a=2), readers=CONSUMERS)

  def scratch(self) -> dict[str, Any]:
    cut = self.cut
    tile = functools.partial(gpu.smem, cut.stages, cut.step, dtype=jnp.bfloat16, beside=cut.step)
    scratch = self.ring.scratch(a=tile(cut.height), b=tile(cut.width))
    if self.sums:
      scratch["sums_s"] = gpu.vector(CONSUMERS, self.columns)
    return scratch

  def out_types(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The results, by ref."""
    part = lambda *shape: jax.ShapeDtypeStruct((self.ranges, *shape), jnp.float32)
    types = {f"out{n}": part(*piece.shape) for n, piece in enumerate(self.pieces)}
    if self.sums:
      types["sums"] = part(sum(piece.shape[1] for piece in self.pieces))
    return types


class Place(NamedTuple):
  """What a thread block's tile is of.

  Attributes:
    number: of the piece.
    a: ref of A.
    b: ref of B.
    m0: first column of A.
    n0: first column of B.
  """

  number: int
  a: Ref
  b: Ref
  m0: Traced
  n0: Traced


class Block:
  """A thread block: its tile, and its range of the rows."""

  def __init__(self, plan: Plan, refs: dict[str, Ref]):
    self.plan, self.refs, self.cut = plan, refs, plan.cut
    self.ring = plan.ring.of(refs)
    self.wg = lax.axis_index("wg")
    core, tiles = lax.axis_index("core"), jnp.int32(plan.tiles)
    # Neighbours work on the same rows at the same time.
    self.tile, self.range = lax.rem(core, tiles), lax.div(core, tiles)
    first = lambda n: lax.div(n * plan.steps, jnp.int32(plan.ranges))
    self.first = first(self.range)
    self.num = first(self.range + 1) - self.first

  def run(self) -> None:
    to_load, to_compute = REGISTERS

    @gpu.when(self.wg == CONSUMERS)
    def _() -> None:
      gpu.set_max_registers(to_load, action="decrease")
      self.where(self.produce)
      ring.drain(self.num, self.ring)

    @gpu.when(self.wg < CONSUMERS)
    def _() -> None:
      gpu.set_max_registers(to_compute, action="increase")
      self.consume()

  def where(self, body: Callable[[Place], None]) -> None:
    """body(place) of this block's tile, traced for each piece that it may be of."""
    cut = self.cut
    for number, piece in enumerate(self.plan.pieces):
      high, wide = piece.tiles
      local = self.tile - piece.first
      m, n = lax.div(local, jnp.int32(wide)), lax.rem(local, jnp.int32(wide))
      n0 = n * cut.width - piece.columns
      own = (local >= 0) & (local < high * wide)
      own &= (n0 >= 0) & (n0 < piece.shape[1])
      a, b = self.refs[f"a{piece.a}"], self.refs[f"b{number}"]
      gpu.when(own)(functools.partial(body, Place(number, a, b, m * cut.height, n0)))

  def produce(self, place: Place) -> None:
    cut = self.cut

    @gpu.loop(0, self.num)
    def _(c: Traced) -> None:
      self.ring.wait_until_free(c)
      slot, rows = self.ring.slot(c), gpu.ds((self.first + c) * cut.step, cut.step)
      a = place.a.at[rows, gpu.ds(place.m0, cut.height)]
      gpu.to_smem(a, slot["a"], slot.full())
      b = place.b.at[rows, gpu.ds(place.n0, cut.width)]
      gpu.to_smem(b, slot["b"], slot.full())

  def consume(self) -> None:
    plan = self.plan
    own = gpu.ds(self.wg * plan.rows, plan.rows)

    def run(acc: Ref) -> tuple[Traced, tuple]:
      def step(c: Traced, sums: tuple) -> tuple:
        slot = self.ring.slot(c)
        slot.wait_full()
        gpu.wgmma(acc, slot["a"].at[:, own].transpose((1, 0)), slot["b"])
        sums = self.add_columns(sums, slot["b"])
        # One product stays under way while the next step is waited for.
        gpu.wgmma_wait(1)
        gpu.when(c > 0)(lambda: self.release(c - 1))
        return sums

      count = plan.columns // TILE if plan.sums else 0
      sums = tuple(gpu.zeros((TILE, self.cut.step)) for _ in range(count))
      sums = lax.fori_loop(jnp.int32(0), self.num, step, sums)
      value = acc[...]
      self.release(self.num - 1)
      return value, sums

    value, sums = pl.run_scoped(run, gpu.ACC((plan.rows, self.cut.width), jnp.float32))
    self.where(functools.partial(self.store, value))
    if plan.sums:
      self.store_sums(sums)

  def release(self, c: Traced) -> None:
    gpu.commit_reads()
    self.ring.slot(c).release()

  def add_columns(self, sums: tuple, b: Ref) -> tuple:
    """sums with this consumer's columns of a step of B, whose rows are not added up yet.

    With rows and columns exchanged: the last sum then stays within a warp.
    """
    first = self.wg * self.plan.columns
    part = lambda j: b.at[:, gpu.ds(first + j * TILE, TILE)].transpose((1, 0))
    load = lambda j: gpu.load(part(j), layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
    return tuple(value + load(j) for j, value in enumerate(sums))

  def store(self, value: Traced, place: Place) -> None:
    """This consumer's part of the tile: of each row four threads fill a sector of the cache."""
    rows = gpu.ds(place.m0 + self.wg * self.plan.rows, self.plan.rows)
    columns = gpu.ds(place.n0, self.cut.width)
    self.refs[f"out{place.number}"].at[self.range, rows, columns][...] = value

  def store_sums(self, sums: Sequence[Traced]) -> None:
    stage = self.refs["sums_s"].at[self.wg]
    for j, value in enumerate(sums):
      stage.at[gpu.ds(j * TILE, TILE)][...] = value.sum(axis=1)
    gpu.commit_smem()

    def send(place: Place) -> None:
      before = sum(piece.shape[1] for piece in self.plan.pieces[: place.number])
      first = before + place.n0 + self.wg * self.plan.columns
      columns = gpu.ds(first, self.plan.columns)
      copy = lambda: gpu.to_gmem(stage, self.refs["sums"].at[self.range, columns])
      gpu.when(place.m0 == 0)(copy)  # tiles below each other have the same columns of B

    self.where(send)
    gpu.wait_to_gmem(0)  # shared memory must not go before it is copied


def misfit(products: Sequence[Product], cut: Cut) -> str | None:
  """Why these products cannot be cut so."""
  for a, bs in products:
    M, widths = a.shape[1], [b.shape[1] for b in bs]
    if M % cut.height or any(N % cut.width for N in widths):
      return f"[{M}, {widths}] is no multiple of the tiles of {cut}"
  return None


def plan_of(products: Sequence[Product], cut: Cut, sums: bool) -> Plan:
  """Raises what is wrong with a cut."""
  if reason := misfit(products, cut):
    raise ValueError(reason)
  if cut.stages < 2:
    raise ValueError(f"{cut}: a step is freed when the next one is multiplied, in another slot")
  if sums and cut.width % (CONSUMERS * TILE):
    raise ValueError(f"{cut}: columns are summed by {TILE}")
  used = cut.stages * cut.step * (cut.height + cut.width) * 2 + 2 * 1024
  if used > SHARED_BYTES:
    raise ValueError(f"{used} bytes of shared memory, of {SHARED_BYTES}: {cut}")
  pieces, first = [], 0
  for n, (a, bs) in enumerate(products):
    M, N = a.shape[1], sum(b.shape[1] for b in bs)
    tiles, columns = (M // cut.height, N // cut.width), 0
    for b in bs:
      pieces.append(Piece(n, first, tiles, columns, (M, b.shape[1])))
      columns += b.shape[1]
    first += tiles[0] * tiles[1]
  R = products[0].a.shape[0]
  ranges = cut.ranges or max(1, gpu.num_multiprocessors() // first)
  return Plan(
    cut=cut,
    R=-(-R // COPY_ROWS) * COPY_ROWS,
    pieces=tuple(pieces),
    tiles=first,
    ranges=min(ranges, -(-R // cut.step)),  # none is empty
    sums=sums,
  )


def parts(
  products: Sequence[Product], cut: Cut, *, sums: bool = False
) -> tuple[list[Float32[Array, "ranges _ _"]], list[Float32[Array, "ranges _"]]]:
  """A^T B for each B of each product, and with `sums` those of all columns of B, of ranges of R."""
  plan = plan_of(products, cut, sums)
  extra = plan.R - products[0].a.shape[0]
  whole = lambda x: jnp.pad(x, [(0, extra), (0, 0)]) if extra else x
  inputs = {f"a{n}": whole(a) for n, (a, _) in enumerate(products)}
  inputs |= {f"b{n}": whole(b) for n, b in enumerate(b for _, bs in products for b in bs)}
  results = gpu.launch(
    "outer",
    lambda refs: Block(plan, refs).run(),
    inputs=inputs,
    outputs=plan.out_types(),
    scratch=plan.scratch(),
    grid=(plan.tiles * plan.ranges,),
    grid_names=("core",),
    num_threads=CONSUMERS + 1,
    thread_name="wg",
  )
  return results[: len(plan.pieces)], results[len(plan.pieces) :]
