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

import dataclasses
import functools
import math
import operator
from collections.abc import Callable

from pallas_kernels.decode.cluster import frame as frames
from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.frame import Bite
from pallas_kernels.decode.cluster.frame import Frame
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.sizes import Piece

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # below all scores, and finite: what is lower still, -inf, then weighs nothing
_LEAST = 1e-30  # a total, so that a row without keys gives zeros
# Chunks of each job that are read at once: their scores and rows stay in registers.
_MOST_AT_ONCE = 4
# Registers for cached rows that wait for the query.
_ROWS_AHEAD = 72
_OCTET = 8  # rows of which a lane has two
_PART = 32  # numbers of a key for two mma: 16 bytes of each of four lanes

# Its maximum, the lane's total, the sums of each mma of values; of no rows these are None.
Softmax = tuple[Number, Number, list[list[Number]] | None]
Carry = tuple[Softmax, Number]  # from bite to bite: the other is the ring's next slot


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
  memory, pieces = frame.memory, frame.kinds[kind].pieces
  bites = [_bites(frame, pieces, len(jobs)) for jobs in frame.rounds]
  # Before queries arrive: whether the own row is seen, where it goes, and the first rows.
  shown = frame.places(on, kind, n, 0)
  slots = [frame.places(on, kind, n, 2 + 2 * m) for m in range(len(pieces))]
  rounds = [_Round(frame, on, kind, n, jobs) for jobs in frame.rounds]
  ahead = rounds[0].ahead(bites[0], number)
  on.wait(on.base + memory.arrived["qkv"], parity)
  for of_round, its_bites in zip(rounds, bites, strict=True):
    number = of_round.run(its_bites, ahead, shown, number)
    ahead = None  # of the first round only: more would take registers
  # By threads that have nothing to join; the others wait for what is pushed then.
  frame.renew(on, "qkv")
  for m, slot in enumerate(slots):
    _store_row(frame, on, kind, m, n, g, slot)
  return number


def _bites(frame: Frame, pieces: tuple[Piece, ...], jobs: int) -> list[Bite]:
  """All chunks of some pieces, those of a bite so few that all jobs' have slots."""
  chunks, before = [], 0
  for piece in pieces:
    row_bytes = frame.sizes.row_bytes
    chunks += [(before + first, rows) for first, rows in piece.chunks(row_bytes)]
    before += piece.seen_words * sizes.WORD_BITS
  at_once = (frame.memory.slots - shared.SPARE_SLOTS) // jobs
  if len(chunks) > at_once:
    # While some are read, the slots of as many are filled: a bite gives its slots back at its end.
    at_once = frame.memory.slots // 2 // jobs
  at_once = max(1, min(_MOST_AT_ONCE, at_once))
  return [chunks[at : at + at_once] for at in range(0, len(chunks), at_once)]


def _warps_of_job(frame: Frame) -> int:
  return sizes.WARPS // frame.memory.jobs_at_once


def _own_rows(frame: Frame, t: Number) -> list[tuple[Number, int]]:
  """Of an octet, the two rows whose scores the lanes t have: a number, and what is added to it."""
  tiles = _KeyTiles(frame)
  if tiles.parts == 1:
    return [(_shifted(2 * t + j), 0) for j in range(2)]
  return [(t % tiles.pairs * (4 // tiles.pairs) + t // tiles.pairs, 4 * j) for j in range(2)]


def _shifted(n: Number) -> Number:
  """n, but of every other pair in the other order."""
  # Lanes t then load rows at even and at odd distances, from all banks, for each of the own rows.
  return n // 2 * 2 + (n + n // 2) % 2


class _KeyTiles:
  """How keys lie in the columns of an mma."""

  def __init__(self, frame: Frame):
    Dk = frame.sizes.Dk
    self.parts = max(1, Dk // _PART)
    self.rows = _OCTET // self.parts  # of a tile of columns
    # A lane has the sums of two columns, and so of two parts: lanes have the others.
    self.pairs = max(1, self.parts // 2)


@dataclasses.dataclass
class _Octet:
  """Rows of a chunk, as a lane reads them.

  Attributes:
    slot: address of the chunk.
    values: address of its values.
    bit: number of the chunk's first row among the bits that say which rows are seen.
    begin: the octet's first row, but for `start`.
    start: rows before, the same for all warps.
    rows: of the chunk; None: it has all of the octet.
    loaded_keys: of each tile; None: they are yet to be loaded.
    loaded_values: of each own row, likewise.
    known_biases: what is added to the scores of each own row, likewise.
  """

  slot: Number
  values: Number
  bit: Number
  begin: Number
  start: int
  rows: int | None
  loaded_keys: list[list[Number]] | None = None
  loaded_values: list[list[Number]] | None = None
  known_biases: list[Number] | None = None

  def address(self, on: Machine, first: Number, row: Number, plus: int, pitch: int) -> Number:
    """Of a row of the octet, where rows of so many bytes begin at `first`."""
    row, before = self.begin + row, self.start + plus
    if self.rows is None:
      # What is known is added last: it is part of the instruction then.
      return first + row * pitch + before * pitch
    # The last, where there are no more.
    row = row + before
    return first + on.select(row < self.rows, row, on.lane * 0 + (self.rows - 1)) * pitch


class _Round:
  """A round of jobs, of which this warp has one."""

  def __init__(self, frame: Frame, on: Machine, kind: int, n: Number, jobs: range):
    s = frame.sizes
    self.frame, self.on, self.jobs = frame, on, jobs
    self.sharing = _warps_of_job(frame)
    # Warps beyond the last job do its work again, and nobody reads what they give.
    which = on.warp // self.sharing
    self.which = on.select(which < len(jobs), which, on.lane * 0 + (len(jobs) - 1))
    self.own = on.base + frame.memory.qkv + (self.which + jobs.start) * (s.head_width * 2)
    _, self.head, _ = frame.job(on, self.which + jobs.start)
    row = frame.row_of(on, kind, n, self.head)
    self.seen = on.base + frame.memory.seen + row * (s.seen_words * 4)
    self.g, self.t = on.lane // 4, on.lane % 4
    self.key_tiles = _KeyTiles(frame)
    # Keys of less than a part: other lanes load again what those before do, times zeros.
    self.key_at = self.t * 16 if s.Dk >= _PART else self.t % (s.Dk // 8) * 16
    # A lane has an eighth of a value, in units of 16 bytes if there are so many.
    self.unit = min(16, s.Dv // 4)
    self.units = s.Dv // 4 // self.unit
    self.unit_at = self._unit(self.g, self.t) * self.unit
    self.pitch = shared.part_bytes(s)  # of a warp's part
    self.part = on.base + frame.memory.parts + on.warp * self.pitch
    self.scale = s.Dk**-0.5 * _LOG2E  # of scores, so that they are in base 2

  def ahead(self, bites: list[Bite], number: Number) -> list[_Octet] | None:
    """The cached rows, if registers have room for all; None: they are too many.

    Keys are loaded, and values of the first octet. The others would take longer than the query is
    on its way: they are loaded while scores become weights.
    """
    s = self.frame.sizes
    step = _OCTET * self.sharing
    of_each = 4 * self.key_tiles.parts + 2 * s.Dv // 16
    if len(bites) > 1 or of_each * sum(-(-rows // step) for _, rows in bites[0]) > _ROWS_AHEAD:
      return None
    octets = self._octets(bites[0], False, number)
    for octet in octets:
      octet.loaded_keys, octet.known_biases = self._keys(octet), self._biases(octet)
    octets[0].loaded_values = self._values(octets[0])
    return octets

  def run(
    self,
    bites: list[Bite],
    ahead: list[_Octet] | None,
    shown: Callable[[Number], Number],
    number: Number,
  ) -> Number:
    """Attends and pushes what the jobs give to all thread blocks.

    Args:
      bites: of the cached rows.
      ahead: of `ahead`.
      shown: of a head, 1 if the step's own row is seen, else 0.
      number: of the first slot of the ring.

    Returns:
      The number of the slot after the last.
    """
    self.q = self._query()
    own = self._own(shown(self.head))

    def take(ahead: list[_Octet] | None, bite: Bite, carry: Carry) -> Carry:
      softmax, number = carry
      softmax = self._bite(ahead or self._octets(bite, len(bites) > 1, number), softmax)
      if ahead is None:
        self._release(bite, number, several=len(bites) > 1)
      return softmax, number + len(bite) * len(self.jobs)

    first = number
    carry = take(ahead, bites[0], ((own[0], self.on.zero(), None), number))
    others = functools.partial(take, None)
    softmax, number = self.frame.each_bite(self.on, bites[1:], others, carry)
    self._store_parts(softmax, own)
    self.on.sync()
    self._join_warps()
    if ahead is not None:
      self._release(bites[0], first, several=False)  # nobody waits for what comes after a push
    if len(self.frame.rounds) > 1:
      self.on.sync()  # before the next round's parts take the place of these
    return number

  def _release(self, bite: Bite, number: Number, *, several: bool) -> None:
    ring, count = self.frame.ring, len(bite) * len(self.jobs)
    if not several:
      ring.release(self.on, number, count)
      return
    # One by one in a loop over bites: given back at once a step takes twice as long there.
    for k in range(count):
      ring.release(self.on, number + k)

  # A lane's numbers.

  def _octets(self, bite: Bite, several: bool, number: Number) -> list[_Octet]:
    """The warp's octets of a bite."""
    on, s = self.on, self.frame.sizes
    step, octets = _OCTET * self.sharing, []
    for slot, (first, rows) in zip(self._slots(bite, several, number), bite, strict=True):
      addresses = slot, slot + rows * (s.Dk * 2), first
      for start in range(0, rows, step):
        begin = on.warp % self.sharing * _OCTET
        octets.append(_Octet(*addresses, begin, start, None if start + step <= rows else rows))
    return octets

  def _keys(self, octet: _Octet) -> list[list[Number]]:
    """What a lane has of each tile of keys."""
    on, tiles = self.on, self.key_tiles
    row, part = self.g // tiles.parts, self.g % tiles.parts
    if tiles.parts == 1:
      row = _shifted(row)
    first, pitch = octet.slot + part * (2 * _PART) + self.key_at, self.frame.sizes.Dk * 2
    at = [octet.address(on, first, row, n * tiles.rows, pitch) for n in range(tiles.parts)]
    return [on.load(address, 4) for address in at]

  def _values(self, octet: _Octet) -> list[list[Number]]:
    """What a lane has of the values of its two rows."""
    on, found = self.on, []
    for row, plus in _own_rows(self.frame, self.t):
      at = octet.address(on, octet.values + self.unit_at, row, plus, self.frame.sizes.Dv * 2)
      units = [on.load(at + n * 8 * self.unit, self.unit // 4) for n in range(self.units)]
      found.append([word for unit in units for word in unit])
    return found

  def _biases(self, octet: _Octet) -> list[Number]:
    """What is added to the scores of the lane's two rows: 0.0 if they are seen, else -inf."""
    on, found = self.on, []
    # A chunk begins with an octet, so that an octet's bits are those of one word.
    first = octet.begin + (octet.bit + octet.start)
    (word,) = on.load(self.seen + first // sizes.WORD_BITS * 4, 1)
    for row, plus in _own_rows(self.frame, self.t):
      seen = on.has_bit(word, first % sizes.WORD_BITS + row + plus)
      bias = on.select(seen, on.zero(), -math.inf)
      if octet.rows is not None:
        there = octet.begin + row + (octet.start + plus) < octet.rows
        bias = on.select(there, bias, -math.inf)
      found.append(bias)
    return found

  def _unit(self, g: Number, t: Number) -> Number:
    """Which unit of the first eight of a value a lane has."""
    # Lanes that load at the same time are those of neighbouring g and all t. Rows of values mostly
    # begin in the same bank, so that lanes t have other units; narrow ones in two.
    turn = {16: 2 * t, 8: t // 2 * 4}.get(self.unit, 0)
    return (g + turn) % 8

  def _query(self) -> list[list[Number]]:
    """The words of two mma: parts of the query, for rows g and g + 8."""
    on, keys = self.on, self.key_tiles
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
    on, keys = self.on, self.key_tiles
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

  def _scores(self, octet: _Octet) -> list[Number]:
    """The scores of the lane's two rows of an octet."""
    on, pairs = self.on, self.key_tiles.pairs
    keys = octet.loaded_keys or self._keys(octet)
    found = [x for words in keys for x in self._products(words)]
    # Of more tiles than two, lanes take those that are theirs.
    own = [self._chosen(found[j * pairs : (j + 1) * pairs]) for j in range(2)]
    scale = on.zero() + self.scale
    biases = octet.known_biases or self._biases(octet)
    return [on.fma(x, scale, bias) for x, bias in zip(own, biases, strict=True)]

  def _chosen(self, numbers: list[Number]) -> Number:
    """numbers[t], if there are so many."""
    chosen = numbers[0]
    for n, x in enumerate(numbers[1:], start=1):
      chosen = self.on.select(self.t % self.key_tiles.pairs == n, x, chosen)
    return chosen

  # The softmax: its maximum, its total, and the weighted sum of values.

  def _own(self, shown: Number) -> list[Number]:
    """The score of the step's own row, which is not taken from the cache, and 1.0 if it is seen."""
    on = self.on
    part = self.g % self.key_tiles.parts
    at = self.own + self.frame.sizes.Dk * 2 + part * (2 * _PART) + self.key_at
    score = self._products(on.load(at, 4))[0] * self.scale
    seen = shown == 1
    return [on.select(seen, score, _LOWEST), on.select(seen, on.zero() + 1.0, 0.0)]

  def _bite(self, octets: list[_Octet], carry: Softmax) -> Softmax:
    """The softmax with the rows of a bite."""
    on, (top, total, out) = self.on, carry
    scores = [x for octet in octets for x in self._scores(octet)]
    # Lanes t have scores of other rows, lanes g the same.
    highest = frames.in_pairs(on.maximum, [top, *scores])
    highest = _joined(on, highest, 1, 4, on.maximum)
    weights = [on.exp2(x - highest) for x in scores]
    if out is not None:
      before = on.exp2(top - highest)
      total = total * before
      out = [[x * before for x in sums] for sums in out]
    total = total + frames.in_pairs(operator.add, weights)
    for n in range(0, len(octets), 2):
      out = self._add_values(out, weights[2 * n : 2 * n + 4], octets[n : n + 2])
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
    self, out: list[list[Number]] | None, weights: list[Number], octets: list[_Octet]
  ) -> list[list[Number]]:
    """out + weights times values of one or two octets."""
    on = self.on
    rows = [row for octet in octets for row in octet.loaded_values or self._values(octet)]
    b = [self._column(*weights[n : n + 2]) for n in range(0, len(weights), 2)]
    sums = []
    for n, words in enumerate(zip(*rows, strict=True)):
      a = [x for k in range(0, len(words), 2) for x in on.halves(*words[k : k + 2])]
      before = [on.zero() for _ in range(4)] if out is None else out[n]
      sums.append(on.multiply(before, a, b))
    return sums

  def _column(self, low: Number, high: Number) -> Number:
    """The word of two weights in the lane's column: their upper parts, their lower, or zeros."""
    on = self.on
    upper = on.pack(low, high)
    rest = [x - y for x, y in zip((low, high), on.unpack(upper), strict=True)]
    word = on.select(self.g % 2 == 0, upper, on.pack(*rest))
    return on.select(self.g // 2 == self.t, word, on.lane * 0)

  # What the warps have becomes one.

  def _store_parts(self, carry: Softmax, own: list[Number]) -> None:
    """The warp's values, each lane's total, the maximum; and what `_own` gave."""
    on, (top, total, out) = self.on, carry
    ends = self.part + self.frame.sizes.Dv * 4
    at, sums = self._over_rows([x for c in out for x in (c[0] + c[1], c[2] + c[3])])
    for start in range(0, len(sums), 4):
      on.store(self.part + at * 4 + start * 4, sums[start : start + 4])
    # Lanes g have the same.
    with on.when(on.lane < 4):
      on.store(ends + on.lane * 4, [total])
    with on.when(on.lane == 0):
      on.store(ends + 16, [top, *own, on.zero()])

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
    """One softmax of what the warps of each job have, pushed to all thread blocks."""
    on, frame, pitch = self.on, self.frame, self.pitch
    s = frame.sizes
    Dv, warps = s.Dv, range(self.sharing)

    def join_pair(number) -> Number:
      job, pair = number // (Dv // 2), number % (Dv // 2)
      start = on.base + frame.memory.parts + job * (self.sharing * pitch)
      floats = lambda address, num: [on.as_float(x) for x in on.load(address, num)]
      at = [start + warp * pitch for warp in warps]
      values = [floats(address + pair * 8, 2) for address in at]
      totals = [frames.in_pairs(operator.add, floats(x + Dv * 4, 4)) for x in at]
      tops = [floats(x + (Dv * 4 + 16), 4) for x in at]
      # The step's own row: a part of one value.
      _, own, seen, _ = tops[0]
      at = on.base + frame.memory.qkv + (job + self.jobs.start) * (s.head_width * 2)
      (word,) = on.load(at + 4 * s.Dk + pair * 4, 1)
      values.append([x * seen for x in on.unpack(word)])
      ends = [*zip((top for top, *_ in tops), totals, strict=True), (own, seen)]
      # All have the maximum with the own row, or the lowest where nothing is seen.
      highest = frames.in_pairs(on.maximum, [top for top, _ in ends[:-1]])
      whole, sums = on.zero(), [on.zero(), on.zero()]
      for (top, total), value in zip(ends, values, strict=True):
        scale = on.exp2(top - highest)
        whole = on.fma(scale, total, whole)
        sums = [on.fma(scale, x, y) for x, y in zip(value, sums, strict=True)]
      divisor = on.reciprocal(on.maximum(whole, _LEAST))
      return on.pack(*(x * divisor for x in sums))

    def push(vector, which, words) -> None:
      job = vector // (Dv // 8) + self.jobs.start
      _, h, r = frame.job(on, job)
      address = on.base + frame.memory.attended + r * shared.pitch(s.H * Dv)
      address = address + (h * Dv + vector % (Dv // 8) * 8) * 2
      arrived = on.base + frame.memory.arrived["attended"]
      give = functools.partial(frame.push_to_all, on, which, words, address, arrived)
      frame.if_job(on, job, give)

    frame.push_each(on, len(self.jobs) * Dv // 2, join_pair, push)


def _store_row(
  frame: Frame,
  on: Machine,
  kind: int,
  m: int,
  n: Number,
  g: Number,
  slot: Callable[[Number], Number],
) -> None:
  """Writes the step's keys and values to a head's slot of piece m."""
  s = frame.sizes
  of_key, of_value = (s.Dk, s.Dk * 2), (s.Dv, s.Dk * 4)  # width, and where it lies in a job's qkv
  for part, (width, offset) in enumerate((of_key, of_value)):

    def store(number, part=part, width=width, offset=offset) -> None:
      job, vector = number // (width // 8), number % (width // 8)
      b, h, _ = frame.job(on, job)
      table = list(frame.cache(on, kind, m, n, h))[part]
      words = on.load(
        on.base + frame.memory.qkv + job * (s.head_width * 2) + offset + vector * 16, 4
      )
      row = frame.cached_row(on, kind, m, g, b, h) + slot(h)
      write = functools.partial(on.store_global, table, row, width * 2, vector * 16, words)
      frame.if_job(on, job, write)

    frame.each(on, s.jobs * width // 8, store, last_first=True)


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
