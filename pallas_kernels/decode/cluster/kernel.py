"""All residual blocks of a decoding step in one kernel, for NVIDIA GPUs with clusters.

A step is a chain of small dependent pieces: a layer has five, and what one of them costs is the way
from one multiprocessor to another. So a cluster of thread blocks takes some of the sequences
through all layers: what a piece gives is pushed into the other thread blocks' shared memory, where
a barrier counts its bytes. Clusters know nothing of each other. Weights and cached rows do not
depend on the chain: one thread fetches them in the order of their use, as far ahead as a ring of
slots holds.

    cluster: R sequences                                      global memory: weights, caches
    +------------------------- thread block 0 -------------------------+       |
    |  thread 256, fetch    waits `free`, expects bytes  <---- bulk copies ----+
    |       |  ring of slots: qkv | rows of the jobs | out | up | down | qkv (next layer) ...
    |       v  `full`: the bytes are there          ^ `free`: all 8 warps have read it
    |  warps 0-7, compute:                          |
    |    wait x         ->  qkv: norm, product, share n    --push-->  "qkv", of each one's jobs
    |    wait qkv       ->  attention of the jobs          --push-->  "attended", to all
    |    wait attended  ->  out: product, + x              --push-->  "middle", to all
    |    wait middle    ->  up: norm, product, activation  --push-->  "hidden", to all
    |    wait hidden    ->  down: product, + middle        --push-->  "x", to all: next layer
    +------------------------------------------------------------------+
         ^ |  st.async, 16 bytes each, counted by the receiver's barrier
         | v
    +-- thread block 1 --+  ...  +-- thread block C - 1 --+      the same, with their shares

A push to `x` needs no permission, though it overwrites rows that others read: whoever pushes has
had all of `hidden`, and no thread block pushes its share of `hidden` before it has read `x` for the
last time. So it is with each of the five.
"""

import functools
import math

from pallas_kernels.decode.cluster import attention
from pallas_kernels.decode.cluster import frame as frames
from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster import product
from pallas_kernels.decode.cluster import shared
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.machine import Table
from pallas_kernels.decode.cluster.sizes import Sizes

_LOG2E = math.log2(math.e)


class Step(machine.Kernel):
  """The kernel. Its tables are those of `frame`."""

  threads = sizes.THREADS

  def __init__(self, s: Sizes):
    """The kernel for such sizes.

    Raises:
      NotImplementedError: they do not go into shared memory.
    """
    # Asked again of whoever has not asked `supported`: else the launch would fail on the device.
    if reason := shared.unsupported(s):
      raise NotImplementedError(reason)
    self.sizes, self.frame = s, frames.Frame(s)
    self.smem = self.frame.memory.num_bytes

  def setup(self, on: Machine) -> None:
    memory = self.frame.memory
    # One arrival each: that of the thread which says how many bytes to expect.
    with on.when(on.thread == 0):
      for barrier in memory.arrived.values():
        on.init(on.base + barrier, 1)
      self.frame.ring.setup(on)
      # The first x is read from global memory: its barrier is complete without any bytes.
      on.arrive(on.base + memory.arrived["x"])
      # Some thread blocks may have fewer jobs than others, and so fewer bytes of "qkv" to wait for.
      on.expect(on.base + memory.arrived["qkv"], self.frame.job_bytes(on))
      for name in ("attended", "middle", "hidden"):
        on.expect(on.base + memory.arrived[name], memory.arriving[name])

  # What is fetched: slot by slot in the order in which `_layer` reads it. Neither role tells the
  # other what a slot holds; both count slots in the same way, so that numbers agree.

  def fetch(self, on: Machine) -> None:
    s, frame = self.sizes, self.frame

    def layer(n, number):
      for name, table in frames.WEIGHTS.items():
        matrix = frame.matrices[name]
        for start, num_bytes, _ in matrix.chunks:
          slot, full = frame.ring.acquire(on, number, num_bytes)
          # Packed weights have a row for each layer and thread block.
          index = n * s.C + on.rank
          on.fetch(slot, table, index, matrix.num_bytes, start, num_bytes, full)
          number = number + 1
        # Attention comes after the first product.
        if name == "qkv":
          number = frame.by_kind(on, n, number, self._fetch_rows)
      return number

    on.loop(s.num_layers, layer, on.rank * 0)

  def _fetch_rows(self, on: Machine, kind: int, n: Number, g: Number, number: Number) -> Number:
    """The cached rows of a layer: of each chunk keys, then values, for one job after another."""
    s, frame = self.sizes, self.frame
    for jobs in frame.rounds:
      for m, piece in enumerate(frame.kinds[kind].pieces):
        # Places come from global memory: the step is not known when the program is made.
        first = frame.places(on, kind, n, 1 + 2 * m)
        sources = []
        for job in jobs:
          b, h, _ = frame.job(on, job)
          tables = frame.cache(on, kind, m, n, h)
          sources.append((*tables, frame.cached_row(on, kind, m, g, b, h) + first(h)))
        chunks = [[chunk] for chunk in piece.chunks(s.row_bytes)]
        fetch = functools.partial(self._fetch_chunk, on, sources)
        number = frame.each_bite(on, chunks, fetch, number)
    return number

  def _fetch_chunk(
    self,
    on: Machine,
    sources: list[tuple[Table, Table, Number]],
    chunk: frames.Bite,
    number: Number,
  ) -> Number:
    """A chunk of each job, of whose keys and values `sources` has the tables and the first row."""
    s = self.sizes
    ((start, rows),) = chunk
    # Jobs innermost: the warps of a round need the same chunk of each at the same time.
    for key, value, first in sources:
      row = first + start
      # One barrier counts both copies.
      slot, full = self.frame.ring.acquire(on, number, rows * s.row_bytes)
      on.fetch(slot, key, row, s.Dk * 2, 0, rows * s.Dk * 2, full)
      to = slot + rows * s.Dk * 2
      on.fetch(to, value, row, s.Dv * 2, 0, rows * s.Dv * 2, full)
      number = number + 1
    return number

  # What is computed.

  def compute(self, on: Machine) -> None:
    s, frame = self.sizes, self.frame
    self._read_x(on)
    self._read_seen(on)
    on.sync()  # what a thread has read is used by all of its thread block
    on.loop(s.num_layers, functools.partial(self._layer, on), on.rank * 0)
    # Also so that no thread block ends while others still push into its memory.
    on.wait(on.base + frame.memory.arrived["x"], on.rank * 0 + s.num_layers % 2)
    self._write_x(on)

  def _layer(self, on: Machine, layer: Number, number: Number) -> Number:
    # Each of the five barriers completes once in a layer.
    s, memory, parity = self.sizes, self.frame.memory, layer % 2
    x, middle = (on.base + start for start in memory.x)

    def multiply(name, source, start, number, push, finish=product.as_is):
      with_matrix = product.Product(self.frame, on, name, start)
      return with_matrix.run(source, number, parity=parity, finish=finish, push=push)

    add = lambda to: functools.partial(self._with_residual, on, to)
    to_all = functools.partial(product.push_to_all, self.frame, on)
    attend = functools.partial(attention.attend, self.frame, parity=parity)

    # Residuals are added by whoever has the columns: two rows of x, since the sum after the
    # attention is needed again at the end.
    number = multiply("qkv", "x", x, number, product.push_to_jobs(self.frame, on))
    # The jobs' outputs are pushed by the attention itself, round by round.
    number = self.frame.by_kind(on, layer, number, attend)
    to_middle = to_all("out", memory.x[1], arriving="middle", width=s.E)
    number = multiply(
      "out", "attended", on.base + memory.attended, number, to_middle, finish=add(x)
    )
    to_hidden = to_all("up", memory.hidden, arriving="hidden", width=s.F)
    activate = functools.partial(self._activated, on)
    number = multiply("up", "middle", middle, number, to_hidden, finish=activate)
    to_x = to_all("down", memory.x[0], arriving="x", width=s.E)
    number = multiply("down", "hidden", on.base + memory.hidden, number, to_x, finish=add(middle))
    return number

  def _activated(self, on: Machine, r: Number, f: Number, pair: list[Number]) -> list[Number]:
    """u sigmoid(slope u)."""
    del r, f
    # The hardware has powers of 2 only.
    exponent = -self.sizes.slope * _LOG2E
    return [u * on.reciprocal(on.exp2(u * exponent) + 1.0) for u in pair]

  def _with_residual(
    self, on: Machine, start: Number, r: Number, f: Number, pair: list[Number]
  ) -> list[Number]:
    """A pair of the thread block's columns, and that of the rows which begin at `start`."""
    # Two bfloat16 are the word that the pair will be.
    n = self.sizes.E // self.sizes.C
    (word,) = on.load(start + r * shared.pitch(self.sizes.E) + (on.rank * n + f) * 2, 1)
    return [a + b for a, b in zip(pair, on.unpack(word), strict=True)]

  def _read_x(self, on: Machine) -> None:
    """Each thread block all columns: nobody has to push the first rows."""
    s = self.sizes
    vectors = s.E // 8

    def read(number) -> None:
      r, vector = number // vectors, number % vectors
      words = on.load_global(frames.X, self.frame.sequence(on, r), s.E * 2, vector * 16, 4)
      at = on.base + self.frame.memory.x[0] + r * shared.pitch(s.E) + vector * 16
      on.store(at, words)

    self.frame.each(on, s.R * vectors, read)

  def _read_seen(self, on: Machine) -> None:
    """Which rows are seen, of all layers of a group, once: it is of the step."""
    s = self.sizes
    count = len(s.layers) * s.num_sets * s.seen_words

    def read(number) -> None:
      words = on.load_global(frames.SEEN, on.lane * 0, count * 4, number * 4, 1)
      on.store(on.base + self.frame.memory.seen + number * 4, words)

    self.frame.each(on, count, read)

  def _write_x(self, on: Machine) -> None:
    """Each thread block its columns."""
    s = self.sizes
    n = s.E // s.C
    vectors = n // 8

    def write(number) -> None:
      r, vector = number // vectors, number % vectors
      offset = on.rank * (n * 2) + vector * 16
      words = on.load(on.base + self.frame.memory.x[0] + r * shared.pitch(s.E) + offset, 4)
      # The last cluster may have fewer sequences than R; its other rows are copies.
      b = on.cluster * s.R + r
      with on.when(b < s.B):
        on.store_global(self.frame.after, b, s.E * 2, offset, words)

    self.frame.each(on, s.R * vectors, write)
