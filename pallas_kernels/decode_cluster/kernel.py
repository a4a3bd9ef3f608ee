"""All residual blocks of a decoding step in one kernel, for NVIDIA GPUs with clusters.

A step is a chain of small dependent pieces: a layer has five, and what one of them costs is the way
from one multiprocessor to another. So a cluster of blocks takes some of the sequences through all
layers: what a piece gives is pushed into the other blocks' shared memory, where a barrier counts
its bytes. Clusters know nothing of each other. Weights and cached rows do not depend on the chain:
one thread fetches them in the order of their use, as far ahead as a ring of slots holds.

Letters: R sequences of a cluster, C blocks of a cluster, and a block's share n of N features.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.decode_cluster import threads

WARPS = 8
_TILE = 8_192  # bytes of [256, 16] weights: a piece of [32, 16] for each warp
_LANES = threads.WARP
_CHUNK = 2 * _TILE  # bytes that a slot of the ring has for weights or for rows
_LOG2E = math.log2(math.e)
_SMEM = 220 * 1024  # of a multiprocessor's 227 KiB
_MOST_CHUNKS = 16  # of the cached rows of a head: their instructions stand one after the other
_ONES = 0x3F803F80  # two of bfloat16
_NONE = -1e30  # a score below all scores
_X, _PLACES, _BIASES = range(3)  # tables
_WEIGHTS = dict(qkv=3, out=4, up=5, down=6)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """A block's share of a product: [K, n], of N = C n features."""

  K: int
  n: int
  norm: bool  # whether the rows are normed before

  @property
  def blocks(self) -> int:
    return self.K // 256

  @property
  def tiles(self) -> list[tuple[int, int]]:
    """(features, block of K) in the order in which they lie and are used."""
    return [(m, u) for m in range(self.n // 16) for u in range(self.blocks)]

  @property
  def header(self) -> int:
    """Bytes before the tiles, float32: bias and, for a norm, sums of the columns."""
    return 4 * self.n * (1 + self.norm)

  @property
  def num_bytes(self) -> int:
    return self.header + _TILE * len(self.tiles)

  @property
  def chunks(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(first byte, bytes, tiles) of each slot of the ring; the header is in the first."""
    per, out = _CHUNK // _TILE, []
    for first in range(0, len(self.tiles), per):
      tiles = self.tiles[first : first + per]
      start = self.header + first * _TILE if first else 0
      out.append((start, self.header + (first + len(tiles)) * _TILE - start, tiles))
    return out


@dataclasses.dataclass(frozen=True)
class Piece:
  """What a step reads of one cache: `size` of its `length` rows."""

  size: int
  length: int

  def chunks(self, row_bytes: int) -> list[tuple[int, int]]:
    """(first row, rows) of each slot of the ring."""
    most = _CHUNK // row_bytes // 8 * 8
    return [(at, min(most, self.size - at)) for at in range(0, self.size, most)]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a model and of how it is dealt out."""

  B: int
  E: int
  H: int
  Dk: int
  Dv: int
  F: int
  groups: int
  pieces: tuple[tuple[Piece, ...], ...]  # of each layer of a group, one after the other
  C: int
  R: int
  epsilon: float = 1e-5

  @property
  def Fh(self) -> int:
    """Features of one head's query, key and value."""
    return 2 * self.Dk + self.Dv

  @property
  def matrices(self) -> dict[str, Matrix]:
    share = lambda K, N, norm: Matrix(K, N // self.C, norm)
    return dict(
      qkv=share(self.E, self.H * self.Fh, True),
      out=share(self.H * self.Dv, self.E, False),
      up=share(self.E, self.F, True),
      down=share(self.F, self.E, False),
    )

  @property
  def jobs(self) -> int:
    """Heads of sequences that each block attends for."""
    return -(-self.R * self.H // self.C)


def packed(weight, bias, norm, *, C: int):
  """Matrices [L, K, N] as the kernel reads them: [L, C, 16-bit words], tile by tile.

  Args:
    weight: bfloat16.
    bias: [L, N].
    norm: gain and shift, [L, K] each, of the norm before; or None. A product with normed rows is
      that with the rows, less the mean times the sum of a column, over the deviation.
    C: blocks that share them.
  """
  L, K, N = weight.shape
  bias = bias.astype(jnp.float32)
  header = [bias]
  if norm is not None:
    gain, shift = (x.astype(jnp.float32) for x in norm)
    wide = weight.astype(jnp.float32)
    bias = bias + jnp.einsum("LK,LKN->LN", shift, wide, precision="highest")
    weight = (wide * gain[:, :, None]).astype(weight.dtype)
    header = [bias, weight.astype(jnp.float32).sum(axis=1)]
  words = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)
  # K: block, warp, then the 8 numbers of a lane for two products; N: block of the cluster, tile.
  w = weight.reshape(L, K // 256, 8, 4, 2, 2, 2, C, N // C // 16, 2, 8)
  w = w.transpose(0, 7, 8, 1, 2, 4, 10, 3, 5, 9, 6)
  header = words(jnp.stack([x.reshape(L, C, -1) for x in header], axis=2)).reshape(L, C, -1)
  return jnp.concatenate([header, words(w).reshape(L, C, -1)], axis=2)


class Step(threads.Kernel):
  """The kernel.

  Its tables: x; for each layer of a group whether the step's own row is seen, then the first row
  and the row to write of each piece; for each layer of a group what is added to the scores of its
  pieces; packed qkv, out, up, down of all layers; keys and values of each piece of each layer of a
  group; x after the layers.
  """

  threads = WARPS * _LANES

  def __init__(self, sizes: Sizes):
    self.sizes = s = sizes
    self.matrices = s.matrices
    self.row_bytes = 2 * (s.Dk + s.Dv)
    # One after the other in shared memory; rows are padded so that reads meet all banks.
    taken = 0

    def room(num_bytes):
      nonlocal taken
      start, taken = taken, taken + -(-num_bytes // 128) * 128
      return start

    self.pitch = lambda width: 2 * width + 64
    self.x = [room(s.R * self.pitch(s.E)) for _ in range(2)]
    self.stats = room(WARPS * s.R * 8)
    self.attended = room(s.R * self.pitch(s.H * s.Dv))
    self.hidden = room(s.R * self.pitch(s.F))
    self.qkv = room(s.jobs * s.Fh * 2)
    widest = max(m.n for m in self.matrices.values())
    self.partial = room(WARPS * s.R * (widest + 4) * 4)
    self.jobs_at_once = min(WARPS, 1 << (s.jobs - 1).bit_length())
    self.staged = room(max(s.R * widest, self.jobs_at_once * s.Dv) * 2)
    self.parts = room(WARPS * (s.Dv + 4) * 4)
    self.barriers = room(1024)
    self.slot_bytes = _CHUNK + max(m.header for m in self.matrices.values())
    self.slot_bytes = -(-self.slot_bytes // 128) * 128
    self.slots = min(48, (_SMEM - taken) // self.slot_bytes)
    longest = max(sum(len(p.chunks(self.row_bytes)) for p in pieces) for pieces in s.pieces)
    if longest > _MOST_CHUNKS:
      raise NotImplementedError(f"{longest * _CHUNK} bytes of cached rows: too many for one head")
    if self.slots < self.jobs_at_once + 2:
      raise NotImplementedError(f"{self.slots} slots in shared memory are too few for {sizes}")
    self.ring = room(self.slots * self.slot_bytes)
    self.smem = taken
    names = ("x", "qkv", "attended", "middle", "hidden")
    self.arrived = {name: self.barriers + 8 * n for n, name in enumerate(names)}
    self.full, self.free = self.barriers + 64, self.barriers + 512
    self.num_bytes = dict(
      x=s.R * s.E * 2,
      attended=s.R * s.H * s.Dv * 2,
      middle=s.R * s.E * 2,
      hidden=s.R * s.F * 2,
    )
    tables = itertools.count(7)
    self.caches = [[(next(tables), next(tables)) for _ in pieces] for pieces in s.pieces]
    self.after = next(tables)
    # Layers whose pieces have equal sizes share their instructions.
    self.kinds = list(dict.fromkeys(s.pieces))
    self.kind_of = [self.kinds.index(pieces) for pieces in s.pieces]

  def _job_bytes(self, on):
    """What arrives of queries, keys and values in a step."""
    s = self.sizes
    even = s.R * s.H % s.C == 0
    if even:
      return s.jobs * s.Fh * 2
    left = on.rank * (-s.jobs) + s.R * s.H
    left = on.select(left < 0, on.rank * 0, left)
    left = on.select(left < s.jobs, left, on.rank * 0 + s.jobs)
    return left * (s.Fh * 2)

  def _at(self, on, offset):
    return on.base + offset

  def setup(self, on):
    with on.when(on.thread == 0):
      for barrier in self.arrived.values():
        on.init(self._at(on, barrier), 1)
      for n in range(self.slots):
        on.init(self._at(on, self.full + 8 * n), 1)
        on.init(self._at(on, self.free + 8 * n), WARPS)
      on.arrive(self._at(on, self.arrived["x"]))  # the first is read from global memory
      on.expect(self._at(on, self.arrived["qkv"]), self._job_bytes(on))
      for name in ("attended", "middle", "hidden"):
        on.expect(self._at(on, self.arrived[name]), self.num_bytes[name])

  # What is fetched.

  def fetch(self, on):
    s = self.sizes

    def layer(n, number):
      for name, table in _WEIGHTS.items():
        matrix = self.matrices[name]
        for start, num_bytes, _ in matrix.chunks:
          slot, full = self._free_slot(on, number, num_bytes)
          index = n * s.C + on.rank
          on.fetch(slot, table, index, matrix.num_bytes, start, num_bytes, full)
          number = number + 1
        if name == "qkv":
          number = self._by_kind(on, n, number, self._fetch_rows)
      return number

    on.loop(len(s.pieces) * s.groups, layer, on.rank * 0)

  def _by_kind(self, on, layer, number, body):
    """body(on, kind, layer of a group, group, number) -> number of the layer's kind."""
    cycle = len(self.sizes.pieces)
    n, g = layer % cycle, layer // cycle
    if len(self.kinds) == 1:
      return body(on, 0, n, g, number)
    mine = on.choose(self.kind_of, n)
    ends = []
    for kind in range(len(self.kinds)):
      on.only(mine == kind, lambda kind=kind: body(on, kind, n, g, number))
      ends.append(self._slots_of(kind))
    return number + on.choose([ends[kind] for kind in self.kind_of], n)

  def _slots_of(self, kind: int) -> int:
    """Slots that the rows of a layer take."""
    return self.sizes.jobs * sum(len(piece.chunks(self.row_bytes)) for piece in self.kinds[kind])

  def _cache(self, on, kind: int, m: int, n):
    """The tables of keys and values of piece m."""
    for room in range(2):
      tables = [
        caches[m][room] if mine == kind else 0
        for caches, mine in zip(self.caches, self.kind_of, strict=True)
      ]
      yield on.choose_table(tables, n)

  def _place(self, on, n, index: int):
    """An entry of the second table."""
    width = 1 + 2 * max(len(pieces) for pieces in self.sizes.pieces)
    return on.load_global(_PLACES, n, width * 4, index * 4, 1)[0]

  def _fetch_rows(self, on, kind: int, n, g, number):
    s = self.sizes
    for jobs in self._rounds:
      for m, piece in enumerate(self.kinds[kind]):
        key, value = self._cache(on, kind, m, n)
        first = self._place(on, n, 1 + 2 * m)
        for start, rows in piece.chunks(self.row_bytes):
          for job in jobs:
            b, h, _ = self._job(on, job)
            row = ((g * s.B + b) * s.H + h) * piece.length + first + start
            slot, full = self._free_slot(on, number, rows * self.row_bytes)
            on.fetch(slot, key, row, s.Dk * 2, 0, rows * s.Dk * 2, full)
            to = slot + rows * s.Dk * 2
            on.fetch(to, value, row, s.Dv * 2, 0, rows * s.Dv * 2, full)
            number = number + 1
    return number

  @property
  def _rounds(self) -> list[range]:
    """A block's jobs: those that its warps share among them, round after round."""
    jobs, most = self.sizes.jobs, self.jobs_at_once
    return [range(at, min(at + most, jobs)) for at in range(0, jobs, most)]

  def _free_slot(self, on, number, num_bytes: int):
    slot, turn = number % self.slots, number // self.slots
    on.wait(self._at(on, self.free) + slot * 8, (turn + 1) % 2)
    full = self._at(on, self.full) + slot * 8
    on.expect(full, num_bytes)
    return self._at(on, self.ring) + slot * self.slot_bytes, full

  def _job(self, on, job):
    """(sequence, head, whose row of the cluster) of one of the block's jobs."""
    s = self.sizes
    number = on.rank * s.jobs + job
    number = on.select(number < s.R * s.H, number, on.rank * 0 + (s.R * s.H - 1))
    r, h = number % s.R, number // s.R
    return self._sequence(on, r), h, r

  def _sequence(self, on, r):
    b = on.cluster * self.sizes.R + r
    return on.select(b < self.sizes.B, b, on.cluster * 0 + (self.sizes.B - 1))

  # What is computed.

  def compute(self, on):
    s = self.sizes
    self._read_x(on)
    on.sync()
    num_layers = len(s.pieces) * s.groups
    on.loop(num_layers, functools.partial(self._layer, on), on.rank * 0)
    self._arrival(on, "x", on.rank * 0 + num_layers % 2, self.num_bytes["x"])
    self._write_x(on)

  def _each(self, on, count: int, body):
    """body(number) for 0 to count - 1, dealt out to the threads."""
    for start in range(0, count, self.threads):
      number = on.thread + start
      if start + self.threads <= count:
        body(number)
      else:
        with on.when(number < count):
          body(number)

  def _read_x(self, on):
    s = self.sizes
    vectors = s.E // 8

    def one(number):
      r, vector = number // vectors, number % vectors
      words = on.load_global(_X, self._sequence(on, r), s.E * 2, vector * 16, 4)
      on.store(self._at(on, self.x[0]) + r * self.pitch(s.E) + vector * 16, words)

    self._each(on, s.R * vectors, one)

  def _write_x(self, on):
    """Each block its columns."""
    s = self.sizes
    n = s.E // s.C
    vectors = n // 8

    def one(number):
      r, vector = number // vectors, number % vectors
      offset = on.rank * (n * 2) + vector * 16
      words = on.load(self._at(on, self.x[0]) + r * self.pitch(s.E) + offset, 4)
      b = on.cluster * s.R + r
      with on.when(b < s.B):
        on.store_global(self.after, b, s.E * 2, offset, words)

    self._each(on, s.R * vectors, one)

  def _arrival(self, on, name: str, parity, num_bytes):
    """Waits for what the others push, and makes ready for the next time."""
    barrier = self._at(on, self.arrived[name])
    on.wait(barrier, parity)
    with on.when(on.thread == 0):
      on.expect(barrier, num_bytes)

  def _layer(self, on, layer, number):
    s, parity = self.sizes, layer % 2
    x, middle = (self._at(on, start) for start in self.x)
    at = functools.partial(self._at, on)
    add = lambda to: functools.partial(self._with_residual, on, to)

    product = functools.partial(self._product, on, parity=parity)
    number = product("qkv", "x", x, number)
    self._push_jobs(on)
    number = self._by_kind(on, layer, number, functools.partial(self._attend, parity=parity))
    number = product("out", "attended", at(self.attended), number, finish=add(x))
    self._push_all(on, "out", self.x[1], "middle", s.E)
    activated = functools.partial(self._activated, on)
    number = product("up", "middle", middle, number, finish=activated)
    self._push_all(on, "up", self.hidden, "hidden", s.F)
    number = product("down", "hidden", at(self.hidden), number, finish=add(middle))
    self._push_all(on, "down", self.x[0], "x", s.E)
    return number

  def _activated(self, on, r, f, pair):
    """f(u) = u sigmoid(1.702 u)."""
    del r, f
    return [u * on.reciprocal(on.exp2(u * (-1.702 * _LOG2E)) + 1.0) for u in pair]

  def _with_residual(self, on, start, r, f, pair):
    n = self.sizes.E // self.sizes.C
    (word,) = on.load(start + r * self.pitch(self.sizes.E) + (on.rank * n + f) * 2, 1)
    return [a + b for a, b in zip(pair, on.unpack(word), strict=True)]

  def _slot(self, on, number):
    """The address of a slot of the ring, once it is full."""
    slot = number % self.slots
    on.wait(self._at(on, self.full) + slot * 8, number // self.slots % 2)
    return self._at(on, self.ring) + slot * self.slot_bytes

  def _give_back(self, on, number):
    on.sync_warp()
    with on.when(on.lane == 0):
      on.arrive(self._at(on, self.free) + number % self.slots * 8)

  def _moments(self, on, sums, b):
    """sums + sums and sums of squares of rows: products with ones, and with the rows themselves."""
    zero, one = on.lane * 0, on.lane * 0 + _ONES
    return [
      on.multiply(sums[0], [one, zero, one, zero], b),
      on.multiply(sums[1], [b[0], zero, b[1], zero], b),
    ]

  def _keep_moments(self, on, sums, tile: int):
    """Of a tile of 8 rows; the squares are on the diagonal."""
    g, t = on.lane // 4, on.lane % 4
    for i in range(2):
      r = t * 2 + i
      with on.when(r == g):
        row = r + 8 * tile
        with on.when(row < self.sizes.R):
          at = self._at(on, self.stats) + (on.warp * self.sizes.R + row) * 8
          on.store(at, [sums[0][i], sums[1][i]])

  def _statistics(self, on, r):
    """1 / deviation and mean / deviation of a row."""
    s = self.sizes
    both = [on.zero(), on.zero()]
    for warp in range(WARPS):
      at = self._at(on, self.stats + warp * s.R * 8) + r * 8
      both = [a + on.as_float(b) for a, b in zip(both, on.load(at, 2), strict=True)]
    mean, squares = (x * (1.0 / s.E) for x in both)
    scale = on.rsqrt(on.maximum(squares - mean * mean, 0.0) + s.epsilon)
    return scale, mean * scale

  def _product(self, on, name: str, source, start, number, *, parity, finish=lambda r, f, two: two):
    """finish(rows @ a block's columns + bias), staged in bfloat16 as [R, n].

    What does not need the rows is read before they arrive from `source`, which begins at `start`.
    """
    s = self.sizes
    matrix = self.matrices[name]
    n, pitch = matrix.n, self.pitch(matrix.K)
    g, t = on.lane // 4, on.lane % 4
    pairs = -(-s.R * n // 2 // self.threads)
    partial = self._at(on, self.partial) + on.warp * (s.R * (n + 4) * 4)
    columns = -(-s.R // 8)  # tiles of 8 rows, which are the columns of a product
    rows = []
    for k in range(columns):
      row = g + 8 * k
      rows.append(on.select(row < s.R, row, on.lane * 0 + (s.R - 1)))
    headers = []
    zeros = lambda: [on.zero() for _ in range(4)]
    moments = [[zeros(), zeros()] for _ in rows]
    for chunk, (_, _, tiles) in enumerate(matrix.chunks):
      slot = self._slot(on, number)
      tile_at = slot + on.lane * 16 + on.warp * 1024
      if chunk == 0:
        for part in range(pairs):
          f = (on.thread + part * self.threads) % (n // 2) * 8
          words = [on.load(slot + f + n * 4 * k, 2) for k in range(1 + matrix.norm)]
          headers.append([[on.as_float(x) for x in two] for two in words])
        tile_at = tile_at + matrix.header
      weights = [
        [on.load(tile_at + i * _TILE + half * 512, 4) for half in range(2)]
        for i in range(len(tiles))
      ]
      if chunk == 0:
        self._arrival(on, source, parity, self.num_bytes[source])
      for (m, u), halves in zip(tiles, weights, strict=True):
        if u == 0:
          sums = [[zeros(), zeros()] for _ in rows]
        for k, row in enumerate(rows):
          # Every tile of features meets the same rows.
          b = on.load(start + row * pitch + on.warp * 64 + t * 16 + u * 512, 4)
          for half, a in enumerate(halves):
            sums[k][half] = on.multiply(sums[k][half], a, b[2 * half : 2 * half + 2])
            if matrix.norm and m == 0:
              moments[k] = self._moments(on, moments[k], b[2 * half : 2 * half + 2])
        if u == matrix.blocks - 1:
          for k in range(columns):
            both = [x + y for x, y in zip(*sums[k], strict=True)]
            for i, x in enumerate(both):
              r, f = t * 2 + (i % 2 + 8 * k), g + (16 * m + i // 2 * 8)
              with on.when(r < s.R):
                on.store(partial + (r * (n + 4) + f) * 4, [x])
      self._give_back(on, number)
      number = number + 1
    if matrix.norm:
      for tile, both in enumerate(moments):
        self._keep_moments(on, both, tile)
    on.sync()

    def one(i, header):
      r, f = i // (n // 2), i % (n // 2) * 2
      total = [on.zero(), on.zero()]
      for warp in range(WARPS):
        at = self._at(on, self.partial + warp * s.R * (n + 4) * 4) + (r * (n + 4) + f) * 4
        total = [a + on.as_float(b) for a, b in zip(total, on.load(at, 2), strict=True)]
      if matrix.norm:
        scale, mean = self._statistics(on, r)
        total = [a * scale - mean * b for a, b in zip(total, header[1], strict=True)]
      total = [a + b for a, b in zip(total, header[0], strict=True)]
      on.store(self._at(on, self.staged) + (r * n + f) * 2, [on.pack(*finish(r, f, total))])

    left = iter(headers)
    self._each(on, s.R * n // 2, lambda i: one(i, next(left)))
    on.sync()
    return number

  def _push_all(self, on, name: str, to: int, barrier: str, width: int):
    """What is staged to its columns of [R, width] in all blocks."""
    s = self.sizes
    n = self.matrices[name].n
    vectors = s.R * n // 8

    def one(number):
      rank, vector = (number // vectors + on.rank) % s.C, number % vectors
      r, f = vector // (n // 8), vector % (n // 8) * 8
      words = on.load(self._at(on, self.staged) + vector * 16, 4)
      address = self._at(on, to) + r * self.pitch(width) + (on.rank * n + f) * 2
      on.push(address, words, self._at(on, self.arrived[barrier]), rank)

    self._each(on, vectors * s.C, one)

  def _push_jobs(self, on):
    """Queries, keys and values to the blocks that attend with them."""
    s = self.sizes
    n = self.matrices["qkv"].n

    def one(vector):
      r, f = vector // (n // 8), vector % (n // 8) * 8 + on.rank * n
      job = f // s.Fh * s.R + r
      words = on.load(self._at(on, self.staged) + vector * 16, 4)
      address = self._at(on, self.qkv) + (job % s.jobs * s.Fh + f % s.Fh) * 2
      on.push(address, words, self._at(on, self.arrived["qkv"]), job // s.jobs)

    self._each(on, s.R * n // 8, one)

  def _attend(self, on, kind: int, n, g, number, *, parity):
    """The block's jobs, each a head of a sequence: some warps share a job's rows."""
    pieces = self.kinds[kind]
    bites = [self._bites(pieces, len(jobs)) for jobs in self._rounds]
    shown = self._place(on, n, 0)
    slots = [self._place(on, n, 2 + 2 * m) for m in range(len(pieces))]
    ahead = self._biases(on, n, bites[0][0])
    barrier = self._at(on, self.arrived["qkv"])
    on.wait(barrier, parity)
    for jobs, some in zip(self._rounds, bites, strict=True):
      number = self._attend_round(on, n, jobs, some, ahead, shown, number)
      ahead = None
    # Not before all threads have met: where nothing is to come, this completes the barrier at once,
    # and a thread that still waits would miss that.
    with on.when(on.thread == 0):
      on.expect(barrier, self._job_bytes(on))
    for m, (piece, slot) in enumerate(zip(pieces, slots, strict=True)):
      self._keep(on, g, piece, self._cache(on, kind, m, n), slot)
    return number

  def _bites(self, pieces, jobs: int) -> list[list[tuple[int, int]]]:
    """(its scores' first bias, rows) of the chunks that are read at once: so many of each job."""
    chunks, before = [], 0
    for piece in pieces:
      chunks += [(before + first, rows) for first, rows in piece.chunks(self.row_bytes)]
      before += piece.size
    most = max(1, min(4, (self.slots - 2) // jobs))
    return [chunks[at : at + most] for at in range(0, len(chunks), most)]

  @property
  def _sharing(self) -> int:
    """Warps that share a job."""
    return WARPS // self.jobs_at_once

  def _passes(self, on, rows: int):
    """(the warp's first row, the lane's own, whether it is there) for all rows of a chunk.

    None: it is there for sure.
    """
    at_once = _LANES * 8 // self.sizes.Dk
    for start in range(0, rows, self._sharing * at_once):
      begin = (on.warp % self._sharing) * at_once + start
      row, there = begin + on.lane * 8 // self.sizes.Dk, None
      if start + self._sharing * at_once > rows:
        there = row < rows
        row = on.select(there, row, on.lane * 0 + (rows - 1))
      yield begin, row, there

  def _biases(self, on, n, bite):
    """What is added to the scores of a bite."""
    width = max(sum(piece.size for piece in pieces) for pieces in self.sizes.pieces)
    out = []
    for first, rows in bite:
      for _, row, there in self._passes(on, rows):
        (word,) = on.load_global(_BIASES, n, width * 4, (row + first) * 4, 1)
        bias = on.as_float(word)
        none = on.zero() + float("-inf")
        out.append(bias if there is None else on.select(there, bias, none))
    return out

  def _attend_round(self, on, n, jobs: range, bites, ahead, shown, number):
    s = self.sizes
    which = on.warp // self._sharing
    which = on.select(which < len(jobs), which, on.lane * 0 + (len(jobs) - 1))
    own = self._at(on, self.qkv) + (which + jobs.start) * (s.Fh * 2)
    across = s.Dk // 8  # lanes that share a key
    wide = max(2, s.Dv // _LANES)  # numbers of a value that a lane has
    over = s.Dv // wide  # lanes that share a value
    widely = lambda address: [
      x
      for start in range(0, wide // 2, 4)
      for word in on.load(address + start * 4, min(wide // 2, 4))
      for x in on.unpack(word)
    ]
    eight = lambda address: [x for word in on.load(address, 4) for x in on.unpack(word)]
    lane_key, lane_value = on.lane % across * 16, on.lane % over * (wide * 2)
    q = [x * (s.Dk**-0.5 * _LOG2E) for x in eight(own + lane_key)]

    def score(key):
      products = [on.zero(), on.zero()]
      for i, (a, b) in enumerate(zip(q, key, strict=True)):
        products[i % 2] = on.fma(a, b, products[i % 2])
      return _joined(on, products[0] + products[1], 1, across)

    # The first of a job's warps begins with the step's own row, if it is seen.
    itself = score(eight(own + s.Dk * 2 + lane_key))
    begins = on.warp % self._sharing + (1 - shown) == 0
    top = on.select(begins, itself, on.zero() + _NONE)
    total = on.select(begins, on.zero() + 1.0, on.zero())
    out = [on.select(begins, x, on.zero()) for x in widely(own + 4 * s.Dk + lane_value)]
    if over < _LANES:
      out = [on.select(on.lane < over, x, on.zero()) for x in out]

    for bite in bites:
      biases = iter(self._biases(on, n, bite) if ahead is None else ahead)
      ahead, scores, values = None, [], []
      # All warps give all slots back. None may do so twice before another does once: since the
      # turn before of a slot all have met, unless there are more bites than one.
      if len(bites) > 1:
        for k in range(len(bite) * len(jobs)):
          self._slot(on, number + k)
      slots = [self._slot(on, number + which + k * len(jobs)) for k in range(len(bite))]
      for slot, (_, rows) in zip(slots, bite, strict=True):
        for begin, row, there in self._passes(on, rows):
          scores.append(score(eight(slot + row * (s.Dk * 2) + lane_key)) + next(biases))
          values.append((slot + rows * s.Dk * 2, begin, None if there is None else rows))
      highest = top
      for x in scores:
        highest = on.maximum(highest, x)
      highest = _joined(on, highest, across, _LANES, on.maximum)
      before = on.exp2(top - highest)
      weights = [on.exp2(x - highest) for x in scores]
      added = on.zero()
      for x in weights:
        added = added + x
      added = _joined(on, added, across, _LANES)
      top, total = highest, on.fma(total, before, added)
      out = [x * before for x in out]
      for weight, (start, begin, rows) in zip(weights, values, strict=True):
        for j in range(0, _LANES // across, _LANES // over):
          nth = on.lane // over + j
          share = on.shuffle_from(weight, nth * across)
          row = begin + nth
          if rows is not None:
            row = on.select(row < rows, row, on.lane * 0 + (rows - 1))
          value = widely(start + row * (s.Dv * 2) + lane_value)
          out = [on.fma(share, x, y) for x, y in zip(value, out, strict=True)]
      for k in range(len(bite) * len(jobs)):
        self._give_back(on, number + k)
      number = number + len(bite) * len(jobs)
    out = [_joined(on, x, over, _LANES) for x in out]
    self._join(on, jobs, top, total, out, wide, over)
    return number

  def _join(self, on, jobs: range, top, total, out, wide: int, over: int):
    """One softmax of what the warps of each job have, staged and pushed to all blocks."""
    s = self.sizes
    pitch = (s.Dv + 4) * 4
    share = self._at(on, self.parts) + on.warp * pitch
    with on.when(on.lane < over):
      for start in range(0, wide, 4):
        some = out[start : start + 4]
        on.store(share + on.lane * (wide * 4) + start * 4, some)
    with on.when(on.lane == 0):
      on.store(share + s.Dv * 4, [top, total])
    on.sync()

    def one(number):
      job, pair = number // (s.Dv // 2), number % (s.Dv // 2)
      start = self._at(on, self.parts) + job * (self._sharing * pitch)
      warps = range(self._sharing)
      ends = [[on.as_float(x) for x in on.load(start + (w * pitch + s.Dv * 4), 2)] for w in warps]
      values = [[on.as_float(x) for x in on.load(start + pair * 8 + w * pitch, 2)] for w in warps]
      highest = ends[0][0]
      for a, _ in ends[1:]:
        highest = on.maximum(highest, a)
      whole, sums = on.zero(), [on.zero(), on.zero()]
      for (a, t), two in zip(ends, values, strict=True):
        scale = on.exp2(a - highest)
        whole = on.fma(scale, t, whole)
        sums = [on.fma(scale, x, y) for x, y in zip(two, sums, strict=True)]
      # A row without keys gives zeros.
      divisor = on.reciprocal(on.maximum(whole, 1e-30))
      on.store(self._at(on, self.staged) + number * 4, [on.pack(*(x * divisor for x in sums))])

    self._each(on, len(jobs) * s.Dv // 2, one)
    on.sync()
    vectors = s.Dv // 8
    total = len(jobs) * vectors

    def push(number):
      rank, vector = (number // total + on.rank) % s.C, number % total
      job = vector // vectors + jobs.start
      words = on.load(self._at(on, self.staged) + vector * 16, 4)
      _, h, r = self._job(on, job)
      address = self._at(on, self.attended) + r * self.pitch(s.H * s.Dv)
      address = address + (h * s.Dv + vector % vectors * 8) * 2
      arrived = self._at(on, self.arrived["attended"])
      self._if_mine(on, job, lambda: on.push(address, words, arrived, rank))

    self._each(on, total * s.C, push)
    if len(self._rounds) > 1:
      on.sync()  # before the next round's sums take the place of these

  def _if_mine(self, on, job, body):
    """body(), if there is such a job: some blocks may have fewer than others."""
    s = self.sizes
    if s.R * s.H % s.C == 0:
      body()
    else:
      with on.when(on.rank * s.jobs + job < s.R * s.H):
        body()

  def _keep(self, on, g, piece, tables, slot):
    """Writes the step's keys and values to a cache."""
    s = self.sizes
    for width, offset, table in zip((s.Dk, s.Dv), (s.Dk * 2, s.Dk * 4), tables, strict=True):

      def one(number, width=width, offset=offset, table=table):
        job, vector = number // (width // 8), number % (width // 8)
        b, h, _ = self._job(on, job)
        words = on.load(self._at(on, self.qkv) + job * (s.Fh * 2) + offset + vector * 16, 4)
        row = ((g * s.B + b) * s.H + h) * piece.length + slot
        write = functools.partial(on.store_global, table, row, width * 2, vector * 16, words)
        self._if_mine(on, job, write)

      self._each(on, s.jobs * width // 8, one)


def _joined(on, x, start: int, end: int, how=lambda a, b: a + b):
  """x of lanes that differ in the bits from `start` to below `end`, joined."""
  while start < end:
    x = how(x, on.shuffle_xor(x, start))
    start *= 2
  return x
