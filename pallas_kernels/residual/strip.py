"""A warpgroup's part of a tile, from where it leaves the accumulator: inputs, sums, results."""

import functools
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
    gpu.barrier_wait(self.refs[f"{name}_full"].at[slot * self.consumers + self.wg])

  def read(self, name: str, j: int) -> Traced:
    """Slice j of a second input, in float32."""
    slot = j % self.plan.ahead[name]
    ref = self.refs[f"{name}_s"].at[slot, self.wg]
    return gpu.load(ref, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)

  def done(self, name: str, j: int, *, again: bool = False) -> None:
    """Slice j is not read again, or after all others: the next one that has its place is loaded."""
    gpu.commit_reads()
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
    gpu.commit_smem()
    self._send(j, *values)

  def _put_next(self, j: int, number: int, name: str, value: Traced | Callable) -> None:
    """`put` of a slice of a result, in the place that comes next."""
    behind = self.block.sizes.behind
    value = value() if callable(value) else value
    self.places[name] = number % behind
    gpu.wait_to_gmem(behind - 1, wait_read_only=True)
    self.stage(name, j)[...] = value.astype(jnp.bfloat16)
    gpu.commit_smem()
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

  def put_rows(self, first: Traced, second: Traced) -> None:
    """Stores a pair of sums over this strip's columns."""
    stage = self.refs["row_sums_s"].at[self.wg]
    # The copies since these sums of the tile before are of all slices: one each of all results.
    results = len(self.plan.epilogue.outputs)
    gpu.wait_to_gmem(len(self.slices) * results, wait_read_only=True)
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
    """Sums over this strip's columns -> over those of all who share its rows."""
    turn = lax.rem(self.i, jnp.int32(2))
    if self.block.sizes.beside > 1:
      return self._meet_beside(turn, first, second)
    if not self.block.sizes.across:
      return first, second
    place = self.refs["met_s"].at[turn]
    for n, value in enumerate((first, second)):
      place.at[self.wg, n][...] = value
    gpu.barrier_arrive(self.refs["met_full"])
    gpu.barrier_wait(self.refs["met_full"])
    other = place.at[1 - self.wg]
    load = lambda n: gpu.load(other.at[n], layout=gpu.ROW, optimized=False)
    return first + load(0), second + load(1)

  def _meet_beside(self, turn: Traced, first: Traced, second: Traced) -> tuple[Traced, Traced]:
    """`meet` with the same consumer of the other thread block."""
    # A barrier for each of two turns: the other one may be a tile ahead, not two.
    full = self.refs["met_full"].at[turn * self.consumers + self.wg]
    place = self.refs["met_s"].at[turn, self.wg]
    num = place.shape[-1]
    column = gpu.iota((TILE, num), 1)
    wide = lambda value: gpu.over_columns(value, num)
    both = jnp.where(column < num // 2, wide(first), wide(second))
    other = 1 - lax.axis_index(CLUSTER)
    gpu.async_store_smem(both, place, full, cluster_idx=other, cluster_dim=CLUSTER, optimized=False)
    gpu.barrier_wait(full)
    tile = gpu.load(place, layout=gpu.WGMMA, optimized=False) * (2 / num)
    of = lambda keep: jnp.where(keep, tile, 0.0).sum(axis=1)
    return first + of(column < num // 2), second + of(column >= num // 2)
