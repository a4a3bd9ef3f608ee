"""What the parts of the kernel share: where things lie, and which thread block does what.

The thread blocks of a cluster share its R sequences twice: for a product each has n of its N
features of all sequences; for the attention each has some jobs, a job being a head of a sequence.
"""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.machine import Table
from pallas_kernels.decode.cluster.machine import WARP
from pallas_kernels.decode.cluster.sizes import Sizes

# The kernel's tables: x; places, for each set of heads of each layer of a group whether the step's
# own row is seen, then the first row and the row to write of each piece; for each of them which of
# the cached rows are seen, a bit each, in words of their own for each piece; packed weights of all
# layers; keys and values of each piece of each of them; x after the layers.
X, PLACES, SEEN = range(3)
WEIGHTS = dict(qkv=3, out=4, up=5, down=6)
_CACHES = 7
# Of so many bites that are alike, each has its instructions; more are a loop.
_MOST_UNROLLED = 4

# Chunks of cached rows that are read at once: (its first row among those of all pieces, rows).
Bite = list[tuple[Number, int]]
BiteBody = Callable[[Bite, Any], Any]

# By kind: body(on, kind, layer of a group, group, number) -> number
KindBody = Callable[[Machine, int, Number, Number, Number], Number]


class Frame:
  """The sizes of a step, and what follows from them.

  Attributes:
    sizes: of the step.
    memory: the layout of shared memory.
    ring: of its slots.
    matrices: by name, a thread block's share of each.
    caches: the tables of keys and values, by layer of a group, set of heads and piece.
    after: the table of x after the layers.
    kinds: of layers, each once: such layers share their instructions.
    kind_of: which it is, for each layer of a group.
  """

  def __init__(self, s: Sizes):
    self.sizes = s
    self.memory = shared.SharedMemory(s)
    self.ring = shared.Ring(self.memory)
    self.matrices = s.matrices
    tables = itertools.count(_CACHES)
    self.caches = [
      [[(next(tables), next(tables)) for _ in layer.pieces] for _ in range(layer.num_sets)]
      for layer in s.layers
    ]
    self.after = next(tables)
    # Without repetitions, and in an order that does not change from run to run.
    self.kinds = list(dict.fromkeys(s.layers))
    self.kind_of = [self.kinds.index(layer) for layer in s.layers]

  # What arrives.

  def renew(self, on: Machine, name: str) -> None:
    """Makes the barrier of what arrived ready for the next time."""
    # The last thread, which mostly has the least to do. The barrier cannot complete again before:
    # this is the one arrival that it waits for.
    with on.when(on.thread == sizes.THREADS - 1):
      num_bytes = self.job_bytes(on) if name == "qkv" else self.memory.arriving[name]
      on.expect(on.base + self.memory.arrived[name], num_bytes)

  def job_bytes(self, on: Machine) -> Number | int:
    """What arrives of queries, keys and values in a layer."""
    s = self.sizes
    if s.even:
      return s.jobs * s.head_width * 2
    # What thread blocks of lower rank leave, from 0 to `jobs`.
    jobs = on.rank * (-s.jobs) + s.R * s.H
    jobs = on.select(jobs < 0, on.rank * 0, jobs)
    jobs = on.select(jobs < s.jobs, jobs, on.rank * 0 + s.jobs)
    return jobs * (s.head_width * 2)

  # Who does what.

  def each(
    self, on: Machine, count: int, body: Callable[[Number], None], *, last_first: bool = False
  ) -> None:
    """body(number) for 0 to count - 1, shared by the threads."""
    thread = (sizes.THREADS - 1) - on.thread if last_first else on.thread
    # Unrolled: counts are known, and a few times the number of threads at most.
    for start in range(0, count, sizes.THREADS):
      number = thread + start
      if start + sizes.THREADS <= count:
        body(number)
      else:
        with on.when(number < count):
          body(number)

  def push_each(
    self,
    on: Machine,
    count: int,
    word: Callable[[Number], Number],
    push: Callable[[Number, Number, list[Number]], None],
  ) -> None:
    """Four words of neighbouring threads at a time go to other thread blocks, from registers.

    Args:
      on: what it runs on.
      count: of words, a multiple of four.
      word: number -> the word.
      push: (number of the four words, which of four threads that have them this is, the words).
    """

    def part(number) -> None:
      # Threads beyond the last, of a warp in which others are not, do its work again.
      given = word(on.select(number < count, number, on.lane * 0 + (count - 1)))
      # Eight neighbouring lanes have the words of the whole warp, one after the other, and push
      # them to the same thread block: mostly these are 128 bytes in a row.
      lane = on.lane % 8
      words = [on.shuffle_from(given, lane * 4 + k) for k in range(4)]
      vector = (number - on.lane) // 4 + lane
      with on.when(vector < count // 4):
        push(vector, on.lane // 8, words)

    for start in range(0, count, sizes.THREADS):
      # Whole warps: lanes give each other their words.
      with on.when(on.warp * WARP + start < count):
        part(on.thread + start)

  def push_to_all(
    self, on: Machine, which: Number, words: list[Number], address: Number, barrier: Number
  ) -> None:
    """Four words to all thread blocks, by four threads; `which` is this one's number."""
    C = self.sizes.C
    for first in range(0, C, 4):
      # Each thread block begins with itself: else all would push to the same at the same time.
      push = functools.partial(on.push, address, words, barrier, (which + first + on.rank) % C)
      if first + 4 <= C:
        push()
      else:
        with on.when(which + first < C):
          push()

  @property
  def rounds(self) -> list[range]:
    """A thread block's jobs: those that its warps share among them, round after round."""
    jobs, at_once = self.sizes.jobs, self.memory.jobs_at_once
    return [range(at, min(at + at_once, jobs)) for at in range(0, jobs, at_once)]

  def job(self, on: Machine, job: Number) -> tuple[Number, Number, Number]:
    """(sequence, head, whose row of the cluster) of one of the thread block's jobs.

    Where there is no such job it is the last: what is read for it is there, and not used.
    """
    s = self.sizes
    number = on.rank * s.jobs + job
    number = on.select(number < s.R * s.H, number, on.rank * 0 + (s.R * s.H - 1))
    # Heads outermost: then a thread block's jobs need features of few heads, from few others.
    r, h = number % s.R, number // s.R
    return self.sequence(on, r), h, r

  def sequence(self, on: Machine, r: Number) -> Number:
    """The number of a row of the cluster; the last, where there are no more sequences."""
    b = on.cluster * self.sizes.R + r
    return on.select(b < self.sizes.B, b, on.cluster * 0 + (self.sizes.B - 1))

  def if_job(self, on: Machine, job: Number, body: Callable[[], None]) -> None:
    """body(), if there is such a job: some thread blocks may have fewer than others."""
    s = self.sizes
    if s.even:
      body()
    else:
      with on.when(on.rank * s.jobs + job < s.R * s.H):
        body()

  # Caches.

  def by_kind(self, on: Machine, layer: Number, number: Number, body: KindBody) -> Number:
    """body(on, kind, layer of a group, group, number) -> number of the layer's kind.

    Of a thread block without a job nothing is fetched and nothing computed.
    """
    s = self.sizes
    cycle = len(s.layers)
    n, g = layer % cycle, layer // cycle
    all_attend = (s.C - 1) * s.jobs < s.R * s.H
    if len(self.kinds) == 1 and all_attend:
      return body(on, 0, n, g, number)

    # What `body` returns is a number within a branch only.
    slots = on.choose([self._slots_of(kind) for kind in self.kind_of], n)

    def branches() -> None:
      # Instructions that lie far apart cost most: so one loop runs over all layers, and branches.
      which = on.choose(self.kind_of, n)
      for kind in range(len(self.kinds)):
        on.branch(which == kind, lambda kind=kind: body(on, kind, n, g, number))

    if all_attend:
      branches()
      return number + slots
    attends = on.rank * s.jobs < s.R * s.H
    on.branch(attends, branches)
    return number + on.select(attends, slots, 0)

  def _slots_of(self, kind: int) -> int:
    """Slots that the rows of a layer take."""
    s = self.sizes
    return s.jobs * sum(len(piece.chunks(s.row_bytes)) for piece in self.kinds[kind].pieces)

  def set_of(self, on: Machine, kind: int, h: Number) -> Number:
    """The number of a head's set."""
    layer = self.kinds[kind]
    return on.choose(list(layer.sets), h) if layer.num_sets > 1 else h * 0

  def cache(self, on: Machine, kind: int, m: int, n: Number, h: Number) -> Iterator[Table]:
    """The tables of a head's keys and values of piece m."""
    sets = self.kinds[kind].num_sets
    for part in range(2):
      tables = [
        # Layers of other kinds do not come here; they may have fewer pieces or sets.
        caches[number][m][part] if other == kind else 0
        for caches, other in zip(self.caches, self.kind_of, strict=True)
        for number in range(sets)
      ]
      yield on.choose_table(tables, n * sets + self.set_of(on, kind, h))

  def cached_row(self, on: Machine, kind: int, m: int, g: Number, b: Number, h: Number) -> Number:
    """The first row of a head of a sequence in its tables of piece m."""
    s, layer = self.sizes, self.kinds[kind]
    if layer.num_sets > 1:
      h = on.choose(layer.places_in_set, h)
    return ((g * s.B + b) * (s.H // layer.num_sets) + h) * layer.pieces[m].length

  def places(self, on: Machine, kind: int, n: Number, index: int) -> Callable[[Number], Number]:
    """An entry of the places of a head; read at once, where all heads have the same."""
    # Padded, as layers of a group may have different numbers of pieces.
    width = 1 + 2 * max(len(layer.pieces) for layer in self.sizes.layers)

    def read(h: Number) -> Number:
      row = self.row_of(on, kind, n, h)
      return on.load_global(PLACES, row, width * 4, index * 4, 1)[0]

    if self.kinds[kind].num_sets > 1:
      return read
    place = read(n * 0)
    return lambda h: place

  def row_of(self, on: Machine, kind: int, n: Number, h: Number) -> Number:
    """Of the tables of places and of seen rows, that of a head."""
    return n * self.sizes.num_sets + self.set_of(on, kind, h)

  def each_bite(self, on: Machine, bites: list[Bite], body: BiteBody, carry: Any) -> Any:
    """body(bite, carry) -> carry, one after the other."""
    at = 0
    while at < len(bites):
      alike = _alike(bites[at:])
      if alike <= _MOST_UNROLLED:
        carry = body(bites[at], carry)
        at += 1
        continue
      start, step = bites[at], bites[at + 1][0][0] - bites[at][0][0]
      nth = lambda i, start=start, step=step: [(i * step + first, rows) for first, rows in start]
      carry = on.loop(alike, lambda i, carry, nth=nth: body(nth(i), carry), carry)
      at += alike
    return carry


def in_pairs(join: Callable[[Number, Number], Number], numbers: Sequence[Number]) -> Number:
  """All of them joined, neighbours first: one after the other they would wait for each other."""
  while len(numbers) > 1:
    rest = numbers[len(numbers) // 2 * 2 :]
    numbers = [*map(join, numbers[::2], numbers[1::2]), *rest]
  return numbers[0]


def _alike(bites: list[Bite]) -> int:
  """How many of the first bites have as many rows in their chunks, and are equally far apart."""
  step = bites[1][0][0] - bites[0][0][0] if len(bites) > 1 else 0
  num = 1
  while num < len(bites) and bites[num] == [(n + num * step, rows) for n, rows in bites[0]]:
    num += 1
  return num
