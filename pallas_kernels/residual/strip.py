"""A warpgroup's part of a tile, from where it leaves the accumulator: inputs, sums, results."""

import functools
import operator
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.residual import epilogues
from pallas_kernels.residual.plan import CLUSTER
from pallas_kernels.residual.plan import SLICE

if TYPE_CHECKING:
  from pallas_kernels.residual.product import Block


class Strip:
  """A warpgroup's part of a tile, as its epilogue sees it: 64 rows, in slices of 64 columns."""

  def __init__(self, block: "Block", i: Traced):
    self.block, self.i = block, i
    self.plan, self.refs, self.wg = block.plan, block.refs, block.wg
    self.slices = range(block.plan.slices)
    across, self.consumers = block.sizes.across, block.sizes.consumers
    self.acc: Any = None
    self.has_read = False  # since the warps last met
    self.places: dict[str, int] = {}  # of results that share them
    self.n0 = block.n0 + (self.wg * block.sizes.width if across else 0)
    self.tile_of_sums = (
      block.column_tile * self.consumers + self.wg if across else block.column_tile
    )

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
    full = self.refs[f"{name}_full"].at[slot * self.consumers + self.wg]
    gpu.to_smem(source, self.refs[f"{name}_s"].at[slot, self.wg], full)

  def wait_rows(self) -> None:
    """Before `row_totals` and `keep` are asked."""
    gpu.barrier_wait(self.refs["rows_full"].at[self.wg])

  def rows_done(self) -> None:
    """After they were: the next tile's are loaded in their place."""
    self._after_reads()
    gpu.when(self.i + 1 < self.block.num)(lambda: self.load_rows(self.i + 1))

  def _after_reads(self) -> None:
    """Before one thread has overwritten what all have read; the warps need to meet once for it."""
    if self.has_read:
      gpu.meet_warps()
    self.has_read = False

  def _commit(self) -> None:
    """After all have written what one thread stores; the warps meet."""
    gpu.commit_smem()
    self.has_read = False

  def row_totals(self, name: str, kinds: int) -> list[Traced]:
    """Sums over the parts of numbers per row that come in turns: so many kinds of them."""
    self.has_read = True
    row = lambda n: gpu.load(self.refs[f"{name}_s"].at[self.wg, n], layout=gpu.ROW, optimized=False)
    num = self.plan.rows[name]
    return [functools.reduce(operator.add, map(row, range(n, num, kinds))) for n in range(kinds)]

  def keep(self, j: int) -> Traced | None:
    """The mask of slice j; None where nothing is dropped."""
    if not self.plan.has_words:
      return None
    self.has_read = True
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
    gpu.barrier_wait(self.refs[f"{name}_full"].at[slot * self.consumers + self.wg])

  def read(self, name: str, j: int) -> Traced:
    """Slice j of a second input, in float32."""
    self.has_read = True
    slot = j % self.plan.ahead[name]
    ref = self.refs[f"{name}_s"].at[slot, self.wg]
    return gpu.widened(gpu.load(ref, layout=gpu.WGMMA, optimized=False))

  def done(self, name: str, j: int, *, again: bool = False) -> None:
    """Slice j is not read again, or after all others: the next one that has its place is loaded."""
    self._after_reads()
    after = j + self.plan.ahead[name]
    if after in self.slices:
      self.load(name, after, self.i)
    elif again:
      self.load(name, after - len(self.slices), self.i)
    else:
      load = lambda: self.load(name, after - len(self.slices), self.i + 1)
      gpu.when(self.i + 1 < self.block.num)(load)

  def take(self, name: str, j: int, *, again: bool = False) -> Traced:
    """`wait`, `read` and `done` of a slice."""
    self.wait(name, j)
    value = self.read(name, j)
    self.done(name, j, again=again)
    return value

  def first(self, name: str, j: int) -> Traced:
    """`wait` and `read` of a slice that stays."""
    self.wait(name, j)
    return self.read(name, j)

  def last(self, name: str, j: int) -> Traced:
    """`read` and `done` of a slice that stayed."""
    value = self.read(name, j)
    self.done(name, j)
    return value

  def part(self, j: int) -> Traced:
    """Slice j of the product."""
    return self.acc[:, j * SLICE : (j + 1) * SLICE]

  # ------------------------------------------------------------------------------------ results

  def stage(self, name: str, j: int) -> Ref:
    """Where slice j of a result is."""
    if self.block.sizes.in_turn:
      return self.refs["staged_s"].at[self.places[name], self.wg]
    return self.refs[f"{name}_s"].at[j % self.block.sizes.behind, self.wg]

  def put(self, j: int, **values: Traced | Callable) -> None:
    """Stores slice j of results, all of which there are; functions are called one by one.

    What a function makes has its registers back before the next one is called.
    """
    if self.block.sizes.in_turn:
      for n, (name, value) in enumerate(values.items()):
        self._put_next(j, j * len(values) + n, name, value)
      return
    # Those that may be under way are of the slices since this place was last used.
    under_way = (self.block.sizes.behind - 1) * len(values)
    gpu.wait_to_gmem(under_way, wait_read_only=True)
    for name, value in values.items():
      value = value() if callable(value) else value
      self.stage(name, j)[...] = value.astype(jnp.bfloat16)
    self._commit()
    self._send(j, *values)

  def _put_next(self, j: int, number: int, name: str, value: Traced | Callable) -> None:
    """`put` of a slice of a result, in the place that comes next."""
    behind = self.block.sizes.behind
    value = value() if callable(value) else value
    self.places[name] = number % behind
    gpu.wait_to_gmem(behind - 1, wait_read_only=True)
    self.stage(name, j)[...] = value.astype(jnp.bfloat16)
    self._commit()
    self._send(j, name)

  def _send(self, j: int, *names: str) -> None:
    """Starts to store slice j of results, as it is staged."""
    rows = self.rows_of(self.i)
    for name in names:
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

  def put_rows(self, *values: Traced) -> None:
    """Stores sums over this strip's columns, from registers."""
    rows, target = self.rows_of(self.i), self.refs["row_sums"].at[self.tile_of_sums]

    @gpu.when(rows.start < target.shape[-1])  # of a cluster's tiles, the last may be past the end
    def _() -> None:
      for n, value in enumerate(values):
        target.at[n, rows][...] = value

  def weight(self, rows: Traced) -> Traced:
    """Numbers of the rows, as `add_columns` takes them."""
    if self.plan.sums_of_tiles:
      return rows
    stage = self.refs["weight_s"].at[self.wg]
    stage[...] = rows
    gpu.commit_smem()
    return gpu.load(stage, layout=gpu.COLUMN, optimized=False)

  def add_columns(
    self,
    sums: Sequence[Traced],
    name: str,
    j: int,
    value: Traced | None = None,
    weight: Traced | None = None,
  ) -> tuple:
    """sums with slice j of a result, just `put`, over its rows: plain, or times numbers of these.

    Read again, with rows and columns exchanged: a sum along columns of registers stays within a
    warp, one across rows would need the other warps of the warpgroup. Or, by `Plan.sums_of_tiles`,
    whole tiles are added, which is one instruction; `over_rows` sums them when all are there.
    """
    sums = list(sums)
    if self.plan.sums_of_tiles:
      sums[j] = sums[j] + value * epilogues.over_columns(weight, SLICE)
      return tuple(sums)
    tile = self._exchanged(self.stage(name, j))
    if weight is not None:
      tile = tile * epilogues.over_rows(weight, SLICE)
    sums[j] = sums[j] + tile.sum(axis=1)
    return tuple(sums)

  def over_rows(self, tile: Traced) -> Traced:
    """A sum of tiles, over its rows: once all results are stored, by two parts of 8 bits each."""
    name = "staged" if self.block.sizes.in_turn else next(iter(self.plan.epilogue.outputs))
    stage = self.refs[f"{name}_s"].at[0, self.wg]
    high = lax.optimization_barrier(tile.astype(jnp.bfloat16))
    total = None
    for part in (high, (tile - high.astype(jnp.float32)).astype(jnp.bfloat16)):
      gpu.wait_to_gmem(0, wait_read_only=True)  # the warps meet there: they have read the last part
      stage[...] = part
      gpu.commit_smem()
      term = self._exchanged(stage).sum(axis=1)
      total = term if total is None else total + term
    return total

  def _exchanged(self, stage: Ref) -> Traced:
    """What is staged, with rows and columns exchanged."""
    return gpu.widened(gpu.load(stage.transpose((1, 0)), layout=gpu.WGMMA, optimized=False))

  def meet(self, value: Traced) -> Traced:
    """A sum over this strip's columns -> over those of all who share its rows."""
    turn = lax.rem(self.i, jnp.int32(2))
    if self.block.sizes.beside > 1:
      return self._meet_beside(turn, value)
    if not self.block.sizes.across:
      return value
    place = self.refs["met_s"].at[turn]
    place.at[self.wg][...] = value
    gpu.barrier_arrive(self.refs["met_full"])
    gpu.barrier_wait(self.refs["met_full"])
    return value + gpu.load(place.at[1 - self.wg], layout=gpu.ROW, optimized=False)

  def _meet_beside(self, turn: Traced, value: Traced) -> Traced:
    """`meet` with the same consumer of the other thread block."""
    # A barrier for each of two turns: the other one may be a tile ahead, not two.
    full = self.refs["met_full"].at[turn * self.consumers + self.wg]
    place = self.refs["met_s"].at[turn, self.wg]
    num = place.shape[-1]
    wide = gpu.over_columns(value, num)
    other = 1 - lax.axis_index(CLUSTER)
    gpu.async_store_smem(wide, place, full, cluster_idx=other, cluster_dim=CLUSTER, optimized=False)
    gpu.barrier_wait(full)
    tile = gpu.load(place, layout=gpu.WGMMA, optimized=False)
    return value + tile.sum(axis=1) * (1 / num)
