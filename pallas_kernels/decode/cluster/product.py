"""A product of a layer: rows [R, K] by the thread block's share [K, n] of a matrix.

Each warp has a part of the share's features, the rows of an mma, and of K, and all sequences, its
columns; then all threads sum over the parts of K. A product with normed rows is the
product with the rows themselves, less mean times column sums, over the deviation: the rows'
moments come from one more mma, so that nobody waits for them before.
"""

import operator
from collections.abc import Callable
from typing import Any

from pallas_kernels.decode.cluster import frame as frames
from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.frame import Frame
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number

_ONES = 0x3F803F80  # two of bfloat16
_TILE_ROWS = 8  # sequences of a tile: the columns of an mma
_WARP_BYTES = sizes.TILE_BYTES // sizes.WARPS  # of a tile
_HALF_BYTES = _WARP_BYTES // 2  # of them for one mma: 16 bytes of each lane
# Chunks of weights that wait in registers for the rows, 16 of each thread for a chunk; and as many
# are on their way from shared memory while others are multiplied.
_CHUNKS_AHEAD = 3
# Steps of K of which the words of the rows are kept; of more they are loaded for every chunk.
_STEPS_KEPT = 4

# (row, feature of the share, two numbers next to each other) -> these two, as they are to be
Finish = Callable[[Number, Number, list[Number]], list[Number]]
# (row, feature of the share, which of four threads, 8 numbers from this one on): to others
Push = Callable[[Number, Number, Number, list[Number]], None]


class Product:
  """One product, on one machine."""

  def __init__(self, frame: Frame, on: Machine, name: str, start: Number):
    """A product.

    Args:
      frame: of the kernel.
      on: what it runs on.
      name: of the matrix.
      start: address of the rows.
    """
    s = frame.sizes
    self.frame, self.on, self.start = frame, on, start
    self.matrix = frame.matrices[name]
    # Of a lane, as `multiply` spreads an mma's tiles: rows g and g + 8, which are features 2 g and
    # 2 g + 1, and sequences 2 t, 2 t + 1.
    self.g, self.t = on.lane // 4, on.lane % 4
    self.partial_pitch = (self.matrix.n + shared.WORD_PADDING) * 4
    share = s.R * self.partial_pitch  # of a warp
    matrix = self.matrix
    # A warp's part of the features, and of K.
    self.part, self.k_part = on.warp // matrix.k_shares, on.warp % matrix.k_shares
    features = matrix.columns * sizes.TILE_COLUMNS
    self.partial = on.base + frame.memory.partial + self.k_part * share + self.part * (features * 4)
    # The row of each tile that is this lane's column; the last, where there are no more.
    self.rows = []
    for tile in range(-(-s.R // _TILE_ROWS)):
      row = self.g + _TILE_ROWS * tile
      self.rows.append(on.select(row < s.R, row, on.lane * 0 + (s.R - 1)))

  def run(
    self, source: str, number: Number, *, parity: Number, finish: Finish, push: Push
  ) -> Number:
    """Pushes finish(rows @ the share + bias) in bfloat16.

    Args:
      source: what the rows arrive as.
      number: of the first slot of the ring.
      parity: of the layer.
      finish: what is done to each number.
      push: where the numbers go.

    Returns:
      The number of the slot after the last.
    """
    on, frame, matrix = self.on, self.frame, self.matrix
    # Everything that does not need the rows comes before they arrive: the way that they are on is
    # the longest part of a piece.
    chunks = [tiles for _, _, tiles in matrix.chunks]
    waiting = []  # the weights of chunks, in registers
    for chunk in range(min(_CHUNKS_AHEAD, len(chunks))):
      slot = frame.ring.read(on, number + chunk)
      # The first slot has the header as well. Its numbers are kept in registers to the end, for
      # the slot goes back before.
      if chunk == 0:
        headers = self._headers(slot)
      waiting.append(self._weights(slot, chunk))
    frame.ring.release(on, number, len(waiting))
    moments = [self._zeros() for _ in self.rows]
    on.wait(on.base + frame.memory.arrived[source], parity)
    words = {}
    for chunk, tiles in enumerate(chunks):
      if matrix.k_steps > _STEPS_KEPT:
        words = {}
      words |= {u: self._words(u) for _, u in tiles if u not in words}
      weights, ahead = waiting.pop(0), chunk + _CHUNKS_AHEAD
      # Loaded while those before are multiplied.
      if ahead < len(chunks):
        waiting.append(self._weights(frame.ring.read(on, number + ahead), ahead))
      for (m, u), halves in zip(tiles, weights, strict=True):
        # A tile of features is summed over all steps of K before the next one begins: then few
        # accumulators are alive at a time.
        if u == 0:
          sums = [[self._zeros(), self._zeros()] for _ in self.rows]
        self._multiply(sums, halves, words[u])
        # All features meet the same rows, whose moments are taken once: of so many steps in a row
        # by warps with one part of the features each.
        last = (u + 1) % matrix.feature_shares == 0
        if matrix.norm and m == 0 and last:
          of_parts = [
            words[u + 1 - matrix.feature_shares + n] for n in range(matrix.feature_shares)
          ]
          self._add_moments(moments, of_parts)
        if u == matrix.k_steps - 1:
          self._store_partial(sums, m)
      if ahead < len(chunks):
        frame.ring.release(on, number + ahead)
    if matrix.norm:
      for tile, of_tile in enumerate(moments):
        self._store_moments(of_tile, tile)
    on.sync()  # all warps' shares are there
    frame.renew(on, source)
    # The next to write shares comes after what all threads of all thread blocks push here.
    self._sum_over_warps(headers, finish, push)
    return number + len(chunks)

  def _zeros(self) -> list[Number]:
    return [self.on.zero() for _ in range(4)]

  def _weights(self, slot: Number, chunk: int) -> list[list[list[Number]]]:
    """For each tile of a chunk the words of both halves."""
    on, matrix = self.on, self.matrix
    tile_at = slot + on.lane * 16 + on.warp * _WARP_BYTES
    if chunk == 0:
      tile_at = tile_at + matrix.header
    return [
      [on.load(tile_at + i * sizes.TILE_BYTES + half * _HALF_BYTES, 4) for half in range(2)]
      for i in range(len(matrix.chunks[chunk][2]))
    ]

  def _words(self, u: int) -> list[list[Number]]:
    """The lane's words of a step of K, of the row of each tile."""
    on, matrix, step = self.on, self.matrix, 2 * sizes.K_STEP
    at = self.start + self.k_part * (matrix.k_steps * step) + self.t * 16
    return [on.load(at + row * shared.pitch(matrix.K) + u * step, 4) for row in self.rows]

  def _headers(self, slot: Number) -> list[list[list[Number]]]:
    """For each pair of features that the thread will finish: its bias and column sums, two each."""
    # Pair i of the R n / 2 has the features i % (n / 2), as in `_sum_over_warps`.
    on, n = self.on, self.matrix.n
    headers = []
    for part in range(-(-self.frame.sizes.R * n // 2 // sizes.THREADS)):
      pair_at = (on.thread + part * sizes.THREADS) % (n // 2) * 8
      words = [on.load(slot + pair_at + n * 4 * k, 2) for k in range(1 + self.matrix.norm)]
      headers.append([[on.as_float(x) for x in two] for two in words])
    return headers

  def _multiply(
    self,
    sums: list[Any],
    halves: list[list[Number]],
    words: list[list[Number]],
  ) -> None:
    """Adds a tile's products."""
    for k, of_row in enumerate(words):
      # Two halves with sums of their own: an mma would wait for the one before it.
      for half, weights in enumerate(halves):
        b = of_row[2 * half : 2 * half + 2]
        sums[k][half] = self.on.multiply(sums[k][half], weights, b)

  def _add_moments(self, moments: list[Any], steps: list[list[list[Number]]]) -> None:
    """Adds the moments of the rows, of that of some steps of K whose turn is the warp's part."""
    on = self.on
    for k, (mine, *others) in enumerate(zip(*steps, strict=True)):
      for n, other in enumerate(others, start=1):
        mine = [on.select(self.part == n, b, a) for a, b in zip(mine, other, strict=True)]
      for half in range(2):
        moments[k] = self._moments(moments[k], mine[2 * half : 2 * half + 2])

  def _moments(self, sums: list[Number], b: list[Number]) -> list[Number]:
    """sums + sums and sums of squares of rows: a product with the rows themselves and with ones."""
    # As the first operand, which has 16 rows where the second has 8 columns, the words of the rows
    # themselves are rows 0 to 7, ones the others.
    ones = self.on.lane * 0 + _ONES
    return self.on.multiply(sums, [b[0], ones, b[1], ones], b)

  def _store_partial(self, sums: list[list[list[Number]]], m: int) -> None:
    """The warp's share of a tile of features."""
    on, s = self.on, self.frame.sizes
    for k, halves in enumerate(sums):
      total = [x + y for x, y in zip(*halves, strict=True)]
      f = self.g * 2 + sizes.TILE_COLUMNS * m
      for i in range(2):
        r = self.t * 2 + (i + _TILE_ROWS * k)
        with on.when(r < s.R):
          at = self.partial + (r * (self.matrix.n + shared.WORD_PADDING) + f) * 4
          on.store(at, [total[i], total[i + 2]])

  def _store_moments(self, sums: list[Number], tile: int) -> None:
    """The warp's share of the moments of a tile of rows; the squares are on the diagonal."""
    on, s = self.on, self.frame.sizes
    # Sums are the same in all of their rows: the lane that has a row's square has its sum too.
    for i in range(2):
      r = self.t * 2 + i
      with on.when(r == self.g):
        row = r + _TILE_ROWS * tile
        with on.when(row < s.R):
          on.store(self._moments_at(row) + on.warp * 8, [sums[2 + i], sums[i]])

  def _moments_at(self, r: Number) -> Number:
    """Where a row's moments are: of each warp the sum and the sum of squares."""
    return self.on.base + self.frame.memory.stats + r * (sizes.WARPS * 8)

  def _sum_over_warps(self, headers: list[list[list[Number]]], finish: Finish, push: Push) -> None:
    on, frame, matrix = self.on, self.frame, self.matrix
    s, memory, n = frame.sizes, frame.memory, matrix.n
    next_header = iter(headers)

    def finish_pair(pair) -> Number:
      header = next(next_header)
      r, f = pair // (n // 2), pair % (n // 2) * 2
      # Always in the same order: a row's result does not depend on what is beside it.
      shares = []
      for part in range(matrix.k_shares):
        share = on.base + (memory.partial + part * s.R * self.partial_pitch)
        words = on.load(share + (r * (n + shared.WORD_PADDING) + f) * 4, 2)
        shares.append([on.as_float(x) for x in words])
      total = [frames.in_pairs(operator.add, x) for x in zip(*shares, strict=True)]
      if matrix.norm:
        scale, mean = self._statistics(r)
        total = [a * scale - mean * b for a, b in zip(total, header[1], strict=True)]
      total = [a + b for a, b in zip(total, header[0], strict=True)]
      return on.pack(*finish(r, f, total))

    def push_vector(vector, which, words) -> None:
      push(vector // (n // 8), vector % (n // 8) * 8, which, words)

    frame.push_each(on, s.R * n // 2, finish_pair, push_vector)

  def _statistics(self, r: Number) -> tuple[Number, Number]:
    """1 / deviation and mean / deviation of a row."""
    on, s = self.on, self.frame.sizes
    at = self._moments_at(r)
    words = [x for start in range(0, sizes.WARPS, 2) for x in on.load(at + start * 8, 4)]
    numbers = [on.as_float(x) for x in words]
    moments = [frames.in_pairs(operator.add, numbers[n::2]) for n in range(2)]
    mean, squares = (x * (1.0 / s.E) for x in moments)
    # Rounding may take the variance of equal numbers below zero.
    scale = on.rsqrt(on.maximum(squares - mean * mean, 0.0) + s.epsilon)
    return scale, mean * scale


def as_is(r: Number, f: Number, pair: list[Number]) -> list[Number]:
  del r, f
  return pair


def push_to_all(
  frame: Frame, on: Machine, name: str, to: int, *, arriving: str, width: int
) -> Push:
  """To the columns of a product in [R, width], at offset `to`, in all thread blocks."""
  n = frame.matrices[name].n

  def push(r: Number, f: Number, which: Number, words: list[Number]) -> None:
    address = on.base + to + r * shared.pitch(width) + (on.rank * n + f) * 2
    frame.push_to_all(on, which, words, address, on.base + frame.memory.arrived[arriving])

  return push


def push_to_jobs(frame: Frame, on: Machine) -> Push:
  """Queries, keys and values to the thread blocks that attend with them."""
  s = frame.sizes
  n = frame.matrices["qkv"].n

  def push(r: Number, f: Number, which: Number, words: list[Number]) -> None:
    f = f + on.rank * n
    job = f // s.head_width * s.R + r
    address = on.base + frame.memory.qkv + (job % s.jobs * s.head_width + f % s.head_width) * 2
    with on.when(which == 0):
      on.push(address, words, on.base + frame.memory.arrived["qkv"], job // s.jobs)

  return push
