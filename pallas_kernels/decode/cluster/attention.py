"""The attention of a layer: each thread block has some jobs, a head of a sequence each.

The warps share a round of jobs, so many of them each job; a warp takes every so many-th octet of
the rows of a chunk. Scores are products of tensor cores, with queries as the rows of an mma and
keys as its columns, a part of 32 numbers of a key each:

    part      0    1    0    1    0    1    0    1      Dk = 64: of four keys; of Dk = 32, of eight
    column    0    1    2    3    4    5    6    7
    lanes t   0 . . . . 1 . . . . 2 . . . . 3 . . .     have the sums of columns 2 t and 2 t + 1

The query's parts are so in the mma's rows that a lane's own sums are those of a part with itself.
Of an octet of keys, lane 4 g + t then has the scores of two own rows, equal for all g.

Weighted values are products too: features of values as the rows of an mma, rows of the cache as the
axis that is summed, the own rows of lanes t where they have it. Columns 2 t and 2 t + 1 have the
weights of these rows and zeros for those of other lanes, so that a lane's sums are of what it has
loaded itself, and lanes may load as shared memory likes it. The two columns are the two bfloat16
that a weight is split into.

A warp's maximum, total and weighted sum of values go on from chunk to chunk, as in an online
softmax; in the end those of a job's warps are joined, with the step's own row. Scores are in base
2.
"""

import functools
import math
import operator
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.frame import Frame
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.machine import Table
from pallas_kernels.decode.cluster.sizes import Piece

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # below all scores, and finite: what is lower still, -inf, then weighs nothing
_LEAST = 1e-30  # a total, so that a row without keys gives zeros
# Chunks of each job that are read at once: their scores and rows stay in registers.
_MOST_AT_ONCE = 4
_OCTET = 8  # rows of which a lane has two
_PART = 32  # numbers of a key for two mma: 16 bytes of each of four lanes

# Chunks of cached rows that are read at once: (its first row among those of all pieces, rows).
Bite = list[tuple[int, int]]
# Its maximum, the lane's total, the sums of each mma of values; of no rows these are None.
Softmax = tuple[Number, Number, list[list[Number]] | None]


def attend(
  frame: Frame, on: Machine, kind: int, n: Number, g: Number, number: Number, *, parity: Number
) -> Number:
  """Attends with what arrives as "qkv", and stores its keys and values in the caches.

  Args:
    frame: of the kernel.
    on: what it runs on.
    kind: of the layer.
    n: layer of a group.
    g: group.
    number: of the first slot of the ring.
    parity: of the layer.

  Returns:
    The number of the slot after the last.
  """
  # Layers of a kind have equal pieces, so that all sizes are known while tracing.
  memory, pieces = frame.memory, frame.kinds[kind]
  bites = [_bites(frame, pieces, len(jobs)) for jobs in frame.rounds]
  # Read before queries arrive: whether the own row is seen, where it goes, and the first biases.
  shown = frame.place(on, n, 0)
  slots = [frame.place(on, n, 2 + 2 * m) for m in range(len(pieces))]
  ahead = _biases(frame, on, n, bites[0][0])
  barrier = on.base + memory.arrived["qkv"]
  on.wait(barrier, parity)
  for jobs, of_round in zip(frame.rounds, bites, strict=True):
    number = _Round(frame, on, n, jobs).run(of_round, ahead, shown, number)
    ahead = None  # of the first round only: more would take registers
  # Not before all threads have met: where nothing is to come, this completes the barrier at once,
  # and a thread that still waits would miss that.
  with on.when(on.thread == 0):
    on.expect(barrier, frame.job_bytes(on))
  # Last, while the others wait for nothing of it.
  for m, (piece, slot) in enumerate(zip(pieces, slots, strict=True)):
    _store_row(frame, on, g, piece, frame.cache(on, kind, m, n), slot)
  return number


def _bites(frame: Frame, pieces: tuple[Piece, ...], jobs: int) -> list[Bite]:
  """All chunks of some pieces, so many at once that each job's have slots at the same time."""
  chunks, before = [], 0
  for piece in pieces:
    row_bytes = frame.sizes.row_bytes
    chunks += [(before + first, rows) for first, rows in piece.chunks(row_bytes)]
    before += piece.size
  at_once = (frame.memory.slots - shared.SPARE_SLOTS) // jobs
  at_once = max(1, min(_MOST_AT_ONCE, at_once))
  return [chunks[at : at + at_once] for at in range(0, len(chunks), at_once)]


def _warps_of_job(frame: Frame) -> int:
  return sizes.WARPS // frame.memory.jobs_at_once


def _octets(frame: Frame, on: Machine, rows: int) -> Iterator[tuple[Number, bool]]:
  """(the first row of each of the warp's octets, whether all of it is there) of a chunk."""
  step = _OCTET * _warps_of_job(frame)
  for start in range(0, rows, step):
    yield (on.warp % _warps_of_job(frame)) * _OCTET + start, start + step <= rows


def _own_rows(frame: Frame, t: Number) -> list[Number]:
  """Of an octet, the two rows whose scores the lanes t have."""
  keys = _Keys(frame)
  if keys.parts == 1:
    return [_shifted(2 * t + j) for j in range(2)]
  return [t % keys.pairs * (4 // keys.pairs) + (t // keys.pairs + 4 * j) for j in range(2)]


def _shifted(n: Number) -> Number:
  """n, but of every other pair in the other order."""
  # Lanes t then load rows at even and at odd distances, from all banks, for each of the own rows.
  return n // 2 * 2 + (n + n // 2) % 2


class _Keys:
  """How keys lie in the columns of an mma."""

  def __init__(self, frame: Frame):
    Dk = frame.sizes.Dk
    self.parts = max(1, Dk // _PART)
    self.rows = _OCTET // self.parts  # of a tile of columns
    # A lane has the sums of two columns, and so of two parts: lanes have the others.
    self.pairs = max(1, self.parts // 2)


def _biases(frame: Frame, on: Machine, n: Number, bite: Bite) -> list[Number]:
  """What is added to the lane's scores of a bite."""
  start = on.base + frame.memory.biases + n * (frame.sizes.bias_width * 4)
  own, none = _own_rows(frame, on.lane % 4), on.zero() + float("-inf")
  biases = []
  for first, rows in bite:
    for begin, whole in _octets(frame, on, rows):
      for row in own:
        row = begin + row
        at = row if whole else _clamped(on, row, rows)
        (word,) = on.load(start + at * 4 + first * 4, 1)
        bias = on.as_float(word)
        biases.append(bias if whole else on.select(row < rows, bias, none))
  return biases


def _clamped(on: Machine, row: Number, rows: int) -> Number:
  """The row, or the last where there are no more."""
  return on.select(row < rows, row, on.lane * 0 + (rows - 1))


class _Round:
  """A round of jobs, of which this warp has one."""

  def __init__(self, frame: Frame, on: Machine, n: Number, jobs: range):
    s = frame.sizes
    self.frame, self.on, self.n, self.jobs = frame, on, n, jobs
    self.sharing = _warps_of_job(frame)
    # Warps beyond the last job do its work again, and nobody reads what they give.
    which = on.warp // self.sharing
    self.which = on.select(which < len(jobs), which, on.lane * 0 + (len(jobs) - 1))
    self.own = on.base + frame.memory.qkv + (self.which + jobs.start) * (s.head_width * 2)
    self.g, self.t = on.lane // 4, on.lane % 4
    self.keys = _Keys(frame)
    # Keys of less than a part: other lanes load again what those before do, times zeros.
    self.key_at = self.t * 16 if s.Dk >= _PART else self.t % (s.Dk // 8) * 16
    # A lane has an eighth of a value, in units of 16 bytes if there are so many.
    self.unit = min(16, s.Dv // 4)
    self.units = s.Dv // 4 // self.unit
    self.unit_at = self._unit(self.g, self.t) * self.unit
    self.pitch = (s.Dv + shared.WORD_PADDING) * 4  # of a warp's part
    self.part = on.base + frame.memory.parts + on.warp * self.pitch
    self.q = self._query()
    self.scale = s.Dk**-0.5 * _LOG2E  # of scores, so that they are in base 2

  def run(
    self, bites: list[Bite], ahead: list[Number] | None, shown: Number, number: Number
  ) -> Number:
    """Attends and pushes what the jobs give to all thread blocks.

    Args:
      bites: of the cached rows.
      ahead: the biases of the first bite, if they have been read.
      shown: 1 if the step's own row is seen, else 0.
      number: of the first slot of the ring.

    Returns:
      The number of the slot after the last.
    """
    self._store_own(shown)
    carry = self.on.zero() + _LOWEST, self.on.zero(), None
    for bite in bites:
      biases = _biases(self.frame, self.on, self.n, bite) if ahead is None else ahead
      ahead = None
      carry = self._bite(bite, biases, len(bites) > 1, carry, number)
      for k in range(len(bite) * len(self.jobs)):
        self.frame.ring.release(self.on, number + k)
      number = number + len(bite) * len(self.jobs)
    self._store_parts(carry)
    self.on.sync()
    self._join_warps()
    self.on.sync()
    self._push()
    if len(self.frame.rounds) > 1:
      self.on.sync()  # before the next round's parts take the place of these
    return number

  # A lane's numbers.

  def _unit(self, g: Number, t: Number) -> Number:
    """Which unit of the first eight of a value a lane has."""
    # Lanes that load at the same time are those of neighbouring g and all t. Rows of values mostly
    # begin in the same bank, so that lanes t have other units; narrow ones in two.
    turn = {16: 2 * t, 8: t // 2 * 4}.get(self.unit, 0)
    return (g + turn) % 8

  def _query(self) -> list[list[Number]]:
    """The words of two mma: parts of the query, for rows g and g + 8."""
    on, keys = self.on, self.keys
    part = self.g % keys.pairs * 2
    at = self.own + self.key_at
    words = [on.load(at + part * (2 * _PART), 4)]
    words.append(words[0] if keys.parts == 1 else on.load(at + (part + 1) * (2 * _PART), 4))
    if self.frame.sizes.Dk < _PART:
      there = self.t < self.frame.sizes.Dk // 8
      words = [[on.select(there, x, 0) for x in of_row] for of_row in words]
    return [[words[row][2 * half + k] for k in range(2) for row in range(2)] for half in range(2)]

  def _products(self, words: list[Number]) -> list[Number]:
    """The query times what a lane has of a tile of keys: the scores of its rows."""
    on, keys = self.on, self.keys
    sums = [on.zero() for _ in range(4)]
    for half, q in enumerate(self.q):
      sums = on.multiply(sums, q, words[2 * half : 2 * half + 2])
    if keys.parts == 1:
      return sums[:2]
    # Columns 2 t and 2 t + 1 with rows g and g + 8, which have the same parts.
    x = sums[0] + sums[3]
    if keys.pairs > 1:
      x = on.select(self.g % keys.pairs == self.t % keys.pairs, x, on.zero())
      x = _joined(on, _joined(on, x, 1, keys.pairs), 4, 4 * keys.pairs)
    return [x]

  def _scores(self, slot: Number, begin: Number, rows: int, whole: bool) -> list[Number]:
    """The scores of the lane's two rows of an octet, without their scale."""
    on, keys, Dk = self.on, self.keys, self.frame.sizes.Dk
    row, part = self.g // keys.parts, self.g % keys.parts
    if keys.parts == 1:
      row = _shifted(row)
    found = []
    for tile in range(keys.parts):
      nth = begin + row + tile * keys.rows
      nth = nth if whole else _clamped(on, nth, rows)
      words = on.load(slot + nth * (Dk * 2) + part * (2 * _PART) + self.key_at, 4)
      found += self._products(words)
    # Of more tiles than two, lanes take those that are theirs.
    return [self._chosen(found[j * keys.pairs : (j + 1) * keys.pairs]) for j in range(2)]

  def _chosen(self, numbers: list[Number]) -> Number:
    """numbers[t], if there are so many."""
    chosen = numbers[0]
    for n, x in enumerate(numbers[1:], start=1):
      chosen = self.on.select(self.t % self.keys.pairs == n, x, chosen)
    return chosen

  # The softmax: its maximum, its total, and the weighted sum of values.

  def _store_own(self, shown: Number) -> None:
    """The score of the step's own row, which is not taken from the cache, and if it is seen."""
    on, s = self.on, self.frame.sizes
    part = self.g % self.keys.parts
    key = on.load(self.own + s.Dk * 2 + part * (2 * _PART) + self.key_at, 4)
    score = self._products(key)[0] * self.scale
    score = on.select(shown == 1, score, _LOWEST)
    seen = on.select(shown == 1, on.zero() + 1.0, 0.0)
    with on.when(on.lane == 0):
      on.store(self.part + s.Dv * 4 + 8, [score, seen])

  def _bite(
    self, bite: Bite, biases: Iterable[Number], several: bool, carry: Softmax, number: Number
  ) -> Softmax:
    """The softmax with the rows of a bite."""
    on, (top, total, out) = self.on, carry
    next_bias, scores, values = iter(biases), [], []
    for slot, (_, rows) in zip(self._slots(bite, several, number), bite, strict=True):
      start = slot + rows * self.frame.sizes.Dk * 2
      for begin, whole in _octets(self.frame, on, rows):
        for score in self._scores(slot, begin, rows, whole):
          scores.append(on.fma(score, on.zero() + self.scale, next(next_bias)))
        values.append((start, begin, None if whole else rows))
    # Lanes t have scores of other rows, lanes g the same.
    highest = top
    for x in scores:
      highest = on.maximum(highest, x)
    highest = _joined(on, highest, 1, 4, on.maximum)
    before = on.exp2(top - highest)
    weights = [on.exp2(x - highest) for x in scores]
    total = total * before
    for x in weights:
      total = total + x
    if out is not None:
      out = [[x * before for x in sums] for sums in out]
    for n in range(0, len(values), 2):
      out = self._add_values(out, weights[2 * n : 2 * n + 4], values[n : n + 2])
    return highest, total, out

  def _slots(self, bite: Bite, several: bool, number: Number) -> list[Number]:
    """The addresses of the job's chunks."""
    on, ring, jobs = self.on, self.frame.ring, len(self.jobs)
    # All warps give all slots back. None may do so twice before another does once: since the
    # turn before of a slot all have met, unless there are more bites than one.
    if several:
      for k in range(len(bite) * jobs):
        ring.read(on, number + k)
    return [ring.read(on, number + self.which + k * jobs) for k in range(len(bite))]

  def _add_values(
    self,
    out: list[list[Number]] | None,
    weights: list[Number],
    values: list[tuple[Number, Number, int | None]],
  ) -> list[list[Number]]:
    """out + weights times values of one or two octets: (address, first row, rows of the chunk)."""
    on = self.on
    rows = [row for octet in values for row in self._own_values(*octet)]
    b = [self._column(*weights[n : n + 2]) for n in range(0, len(weights), 2)]
    none = on.lane * 0
    if len(values) == 1:
      b.append(none)
    sums = []
    for n, words in enumerate(zip(*rows, strict=True)):
      a = on.halves(*words[:2])
      a += on.halves(*words[2:]) if len(values) > 1 else [none, none]
      before = [on.zero() for _ in range(4)] if out is None else out[n]
      sums.append(on.multiply(before, a, b))
    return sums

  def _own_values(self, start: Number, begin: Number, rows: int | None) -> list[list[Number]]:
    """What a lane has of the values of its two rows of an octet."""
    found = []
    for row in _own_rows(self.frame, self.t):
      row = begin + row if rows is None else _clamped(self.on, begin + row, rows)
      at = start + row * (self.frame.sizes.Dv * 2) + self.unit_at
      units = [self.on.load(at + n * 8 * self.unit, self.unit // 4) for n in range(self.units)]
      found.append([word for unit in units for word in unit])
    return found

  def _column(self, low: Number, high: Number) -> Number:
    """The word of two weights in the lane's column: their upper parts, their lower, or zeros."""
    on = self.on
    upper = on.pack(low, high)
    rest = [x - y for x, y in zip((low, high), on.unpack(upper), strict=True)]
    word = on.select(self.g % 2 == 0, upper, on.pack(*rest))
    return on.select(self.g // 2 == self.t, word, on.lane * 0)

  # What the warps have becomes one.

  def _store_parts(self, carry: Softmax) -> None:
    """The warp's values, maximum and total."""
    on, (top, total, out) = self.on, carry
    total = _joined(on, total, 1, 4)
    with on.when(on.lane == 0):
      on.store(self.part + self.frame.sizes.Dv * 4, [top, total])
    at, sums = self._over_rows([x for c in out for x in (c[0] + c[1], c[2] + c[3])])
    for start in range(0, len(sums), 4):
      on.store(self.part + at * 4 + start * 4, sums[start : start + 4])

  def _over_rows(self, sums: list[Number]) -> tuple[Number, list[Number]]:
    """Sums over the lanes t, each of which gets some of them: the first one's feature, and they."""
    on, per_unit = self.on, self.unit // 2
    first = on.lane * 0
    for distance in (1, 2):
      upper = self.t // distance % 2 == 1
      other = (self.t + 2) % 4 if distance == 2 else self.t + 1 - self.t % 2 * 2
      # The lane g of these that has the same unit.
      g = (self._unit(self.g, self.t) + 8 - self._unit(on.lane * 0, other)) % 8
      half = len(sums) // 2
      if half == 0:
        sums = [x + on.shuffle_from(x, g * 4 + other) for x in sums]
        continue
      kept = [on.select(upper, b, a) for a, b in zip(sums[:half], sums[half:], strict=True)]
      given = [on.select(upper, a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
      sums = [x + on.shuffle_from(y, g * 4 + other) for x, y in zip(kept, given, strict=True)]
      first = first + on.select(upper, on.lane * 0 + half, 0)
    unit = self._unit(self.g, self.t) + first // per_unit * 8
    return unit * per_unit + first % per_unit, sums

  def _join_warps(self) -> None:
    """One softmax of what the warps of each job have, staged."""
    on, frame, pitch = self.on, self.frame, self.pitch
    s = frame.sizes
    Dv, warps = s.Dv, range(self.sharing)

    def join_pair(number) -> None:
      job, pair = number // (Dv // 2), number % (Dv // 2)
      start = on.base + frame.memory.parts + job * (self.sharing * pitch)
      two = lambda address: [on.as_float(x) for x in on.load(address, 2)]
      ends = [two(start + (warp * pitch + Dv * 4)) for warp in warps]
      values = [two(start + pair * 8 + warp * pitch) for warp in warps]
      # The step's own row: a part of one value.
      ends.append(two(start + (Dv * 4 + 8)))
      own = on.base + frame.memory.qkv + (job + self.jobs.start) * (s.head_width * 2)
      (word,) = on.load(own + 4 * s.Dk + pair * 4, 1)
      ((_, seen), value) = ends[-1], on.unpack(word)
      values.append([x * seen for x in value])
      # A warp without rows has the lowest top and a total of 0.
      highest = ends[0][0]
      for top, _ in ends[1:]:
        highest = on.maximum(highest, top)
      whole, sums = on.zero(), [on.zero(), on.zero()]
      for (top, total), value in zip(ends, values, strict=True):
        scale = on.exp2(top - highest)
        whole = on.fma(scale, total, whole)
        sums = [on.fma(scale, x, y) for x, y in zip(value, sums, strict=True)]
      divisor = on.reciprocal(on.maximum(whole, _LEAST))
      staged = on.base + frame.memory.staged + number * 4
      on.store(staged, [on.pack(*(x * divisor for x in sums))])

    frame.each(on, len(self.jobs) * Dv // 2, join_pair)

  def _push(self) -> None:
    on, frame = self.on, self.frame
    s, memory = frame.sizes, frame.memory
    vectors = s.Dv // 8
    total = len(self.jobs) * vectors

    def push(number) -> None:
      # Each begins with itself, as in `product.push_to_all`.
      rank, vector = (number // total + on.rank) % s.C, number % total
      job = vector // vectors + self.jobs.start
      words = on.load(on.base + memory.staged + vector * machine.PUSH_BYTES, 4)
      _, h, r = frame.job(on, job)
      address = on.base + memory.attended + r * shared.pitch(s.H * s.Dv)
      address = address + (h * s.Dv + vector % vectors * 8) * 2
      arrived = on.base + memory.arrived["attended"]
      frame.if_job(on, job, lambda: on.push(address, words, arrived, rank))

    frame.each(on, total * s.C, push)


def _store_row(
  frame: Frame, on: Machine, g: Number, piece: Piece, tables: Iterable[Table], slot: Number
) -> None:
  """Writes the step's keys and values to a piece's slot."""
  s = frame.sizes
  of_key, of_value = (s.Dk, s.Dk * 2), (s.Dv, s.Dk * 4)  # width, and where it lies in a job's qkv
  for (width, offset), table in zip((of_key, of_value), tables, strict=True):

    def store(number, width=width, offset=offset, table=table) -> None:
      job, vector = number // (width // 8), number % (width // 8)
      b, h, _ = frame.job(on, job)
      words = on.load(
        on.base + frame.memory.qkv + job * (s.head_width * 2) + offset + vector * 16, 4
      )
      row = frame.cached_row(g, b, h, piece) + slot
      write = functools.partial(on.store_global, table, row, width * 2, vector * 16, words)
      frame.if_job(on, job, write)

    frame.each(on, s.jobs * width // 8, store)


def _joined(
  on: Machine,
  x: Number,
  start: int,
  end: int,
  join: Callable[[Number, Number], Number] = operator.add,
) -> Number:
  """x of lanes that differ in the bits from `start` to below `end`, joined."""
  while start < end:
    x = join(x, on.shuffle_xor(x, start))
    start *= 2
  return x
