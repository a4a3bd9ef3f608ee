"""The kernel's instructions carried out in numpy, and how a whole kernel is.

All threads of a role of a thread block go in step, a Python thread for each role. What a kernel
gets wrong for other timings of its threads, this cannot show; that an address is not aligned, that
a barrier is never complete or is passed too early, and all numbers, it can.
"""

import contextlib
import threading
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.machine import Table
from pallas_kernels.decode.cluster.machine import WARP

_HIGH_HALF = np.uint32(0xFFFF0000)  # the upper bfloat16 of a word
_PATIENCE = 60  # seconds without a barrier's completion after which it is taken to never come


class Memory:
  """Of a cluster: each thread block's shared memory and barriers, and global memory."""

  def __init__(self, tables: list[np.ndarray], *, blocks: int, num_bytes: int):
    self.tables = [t.reshape(-1).view(np.uint8) for t in tables]
    # What nobody wrote is no number.
    self.shared = [np.full(num_bytes, 0xFF, np.uint8) for _ in range(blocks)]
    self.barriers = [{} for _ in range(blocks)]
    self.change = threading.Condition()
    self.start = threading.Barrier(2 * blocks)  # two roles each
    self.failed = None


class _Barrier:
  def __init__(self, arrivals: int):
    self.arrivals = self.pending = arrivals
    self.bytes = self.parity = 0

  def add(self, *, arrivals: int = 0, num_bytes: int = 0) -> None:
    self.pending -= arrivals
    # Expected bytes are added, those that arrive are taken away.
    self.bytes += num_bytes
    assert self.pending >= 0, "too many arrivals at a barrier"
    if self.pending == 0 and self.bytes == 0:
      self.pending, self.parity = self.arrivals, 1 - self.parity


class Simulated(machine.Machine):
  """Carries out what `ptx.Gpu` emits: all threads of one thread block and role at once."""

  base = np.int32(0)

  def __init__(self, memory: Memory, *, rank: int, cluster: int, threads: range):
    self._memory = memory
    self.thread = np.arange(threads.start, threads.stop, dtype=np.int32)
    self.warp, self.lane = self.thread // WARP, self.thread % WARP
    self.rank, self.cluster = np.int32(rank), np.int32(cluster)
    # For which threads loads, stores and barriers are: `when` narrows it. Numbers are computed for
    # all, as nobody sees those of the others.
    self._active = np.ones(len(threads), bool)

  # Addresses in 64 bits, as those in global memory are on a GPU.
  def _all(self, x: Number, dtype: Any = np.int64) -> np.ndarray:
    return np.broadcast_to(np.asarray(x, dtype), self.thread.shape)

  # Numbers.

  def select(self, condition: Number, a: Number, b: Number) -> Number:
    return np.where(condition, a, b).astype(np.asarray(a if hasattr(a, "dtype") else b).dtype)

  def choose(self, numbers: list[int], which: Number) -> Number:
    return np.asarray(numbers, np.int32)[which]

  def zero(self) -> Number:
    return np.zeros(len(self.thread), np.float32)

  def maximum(self, a: Number, b: Number) -> Number:
    return np.maximum(a, np.float32(b))

  def fma(self, a: Number, b: Number, c: Number) -> Number:
    return a * b + c

  def exp2(self, x: Number) -> Number:
    return np.exp2(x)

  def rsqrt(self, x: Number) -> Number:
    return (1 / np.sqrt(x)).astype(np.float32)

  def reciprocal(self, x: Number) -> Number:
    return (1 / x).astype(np.float32)

  def as_float(self, word: Number) -> Number:
    return np.asarray(word, np.uint32).view(np.float32)

  def as_word(self, x: Number) -> Number:
    return np.asarray(x, np.float32).view(np.uint32)

  def unpack(self, word: Number) -> list[Number]:
    word = np.asarray(word, np.uint32)
    return [(word << 16).view(np.float32), (word & _HIGH_HALF).view(np.float32)]

  def pack(self, low: Number, high: Number) -> Number:
    # Rounds to the nearest, and to even between two, as the instruction does.
    short = lambda x: np.asarray(x, np.float32).astype(jax.numpy.bfloat16).view(np.uint16)
    return short(low).astype(np.uint32) | short(high).astype(np.uint32) << 16

  def halves(self, a: Number, b: Number) -> list[Number]:
    a, b = (np.asarray(x, np.uint32) for x in (a, b))
    return [a & 0xFFFF | b << 16, a >> 16 | b & _HIGH_HALF]

  def has_bit(self, word: Number, n: Number) -> Number:
    return np.asarray(word, np.uint32) >> np.asarray(n, np.uint32) & 1 == 1

  # Threads of a warp.

  def shuffle_xor(self, x: Number, distance: int) -> Number:
    return x[np.arange(len(self.thread)) ^ distance]

  def shuffle_from(self, x: Number, lane: Number) -> Number:
    return x[np.arange(len(self.thread)) // WARP * WARP + lane]

  def multiply(self, sums: list[Number], a: list[Number], b: list[Number]) -> list[Number]:
    # From the lanes' words to the matrices of each warp, and back.
    lanes = np.arange(WARP)
    g, t = lanes // 4, lanes % 4
    A = np.zeros((len(self.thread) // WARP, 16, 16), np.float32)
    B, C = np.zeros((len(A), 16, 8), np.float32), np.zeros((len(A), 16, 8), np.float32)
    by_warp = lambda x: x.reshape(-1, WARP)
    for n, word in enumerate(a):
      for half, x in enumerate(self.unpack(word)):
        A[:, g + n % 2 * 8, 2 * t + n // 2 * 8 + half] = by_warp(x)
    for n, word in enumerate(b):
      for half, x in enumerate(self.unpack(word)):
        B[:, 2 * t + n * 8 + half, g] = by_warp(x)
    places = [(g + n // 2 * 8, 2 * t + n % 2) for n in range(4)]
    for (row, column), x in zip(places, sums, strict=True):
      C[:, row, column] = by_warp(x)
    C += A @ B
    return [C[:, row, column].reshape(-1) for row, column in places]

  def sync_warp(self) -> None:
    """Nothing: a thread block's threads go in step."""

  # Memory.

  def _words(self, memory: np.ndarray, address: Number, num: int) -> list[np.ndarray]:
    address = self._all(address)
    assert (address[self._active] % (4 * num) == 0).all(), "an address is not aligned"
    # Others may have addresses beyond the memory.
    words = np.zeros((num, len(self.thread)), np.uint32)
    for n in range(num):
      at = address[self._active] + 4 * n
      words[n, self._active] = memory.view(np.uint32)[at // 4]
    return list(words)

  def _put(self, memory: np.ndarray, address: Number, words: list[Number]) -> None:
    address = self._all(address)[self._active]
    assert (address % (4 * len(words)) == 0).all(), "an address is not aligned"
    for n, word in enumerate(words):
      word = np.broadcast_to(word, self.thread.shape)
      bits = word.view(np.uint32) if word.dtype == np.float32 else word.astype(np.uint32)
      memory.view(np.uint32)[address // 4 + n] = bits[self._active]

  def load(self, address: Number, num: int) -> list[Number]:
    return self._words(self._memory.shared[self.rank], address, num)

  def store(self, address: Number, words: list[Number]) -> None:
    self._put(self._memory.shared[self.rank], address, words)

  def choose_table(self, tables: list[int], which: Number) -> Table:
    return np.asarray(tables)[which]

  def _by_table(self, table: Table) -> Iterator[np.ndarray]:
    """The bytes of one table after the other, while only threads that chose it are active."""
    before, table = self._active, self._all(table)
    for number in np.unique(table[before]):
      self._active = before & (table == number)
      yield self._memory.tables[number]
    self._active = before

  def _place(self, index: Number, pitch: int, offset: Number) -> np.ndarray:
    return self._all(index) * pitch + offset

  def load_global(
    self, table: Table, index: Number, pitch: int, offset: Number, num: int
  ) -> list[Number]:
    words, place = np.zeros((num, len(self.thread)), np.uint32), self._place(index, pitch, offset)
    for memory in self._by_table(table):
      words |= self._words(memory, place, num)  # zeros for threads that are not active
    return list(words)

  def store_global(
    self, table: Table, index: Number, pitch: int, offset: Number, words: list[Number]
  ) -> None:
    for memory in self._by_table(table):
      self._put(memory, self._place(index, pitch, offset), words)

  # Barriers.

  def _at(self, barrier: Number, rank: Any = None) -> list[_Barrier]:
    barriers = self._memory.barriers[self.rank if rank is None else rank]
    return [barriers[int(at)] for at in self._all(barrier)[self._active]]

  def _add(self, barriers: list[_Barrier], num_arrivals: int, num_bytes: Any) -> None:
    # All roles of all thread blocks wait for the one condition: barriers change often enough.
    with self._memory.change:
      for barrier, size in zip(barriers, num_bytes, strict=True):
        barrier.add(arrivals=num_arrivals, num_bytes=int(size))
      self._memory.change.notify_all()

  def init(self, barrier: Number, arrivals: int) -> None:
    for at in self._all(barrier)[self._active]:
      self._memory.barriers[self.rank][int(at)] = _Barrier(arrivals)

  def sync_cluster(self) -> None:
    self._memory.start.wait()

  def expect(self, barrier: Number, num_bytes: Number) -> None:
    self._add(self._at(barrier), 1, self._all(num_bytes)[self._active])

  def arrive(self, barrier: Number) -> None:
    barriers = self._at(barrier)
    self._add(barriers, 1, [0] * len(barriers))

  def wait(self, barrier: Number, parity: Number) -> None:
    parity = self._all(parity)[self._active].tolist()
    # Most threads wait for the same.
    awaited = set(zip(self._at(barrier), parity, strict=True))
    with self._memory.change:
      done = lambda: self._memory.failed or all(x.parity != before for x, before in awaited)
      assert self._memory.change.wait_for(done, timeout=_PATIENCE), "a barrier is never complete"
    if self._memory.failed is not None:
      raise RuntimeError("another thread block failed")

  def sync(self) -> None:
    """Nothing, as `sync_warp`."""

  # Copies that count their bytes at a barrier.

  def fetch(
    self,
    address: Number,
    table: Table,
    index: Number,
    pitch: int,
    offset: Number,
    num_bytes: int,
    barrier: Number,
  ) -> None:
    # One thread fetches. On a GPU the bytes arrive later; here they are there at once.
    (start,) = self._place(index, pitch, offset)[self._active]
    (to,) = self._all(address)[self._active]
    assert start % 16 == to % 16 == num_bytes % 16 == 0, "a copy is not aligned"
    (memory,) = self._by_table(table)
    assert start + num_bytes <= len(memory), "a copy beyond the end of an array"
    self._memory.shared[self.rank][to : to + num_bytes] = memory[start : start + num_bytes]
    self._add(self._at(barrier), 0, [-num_bytes])

  def push(self, address: Number, words: list[Number], barrier: Number, rank: Number) -> None:
    address, rank = self._all(address), self._all(rank)
    # Threads may push to different thread blocks.
    before = self._active
    for to in np.unique(rank[before]):
      self._active = before & (rank == to)
      self._put(self._memory.shared[to], address, words)
      barriers = self._at(barrier, to)
      self._add(barriers, 0, [-machine.PUSH_BYTES] * len(barriers))
    self._active = before

  # Control.

  @contextlib.contextmanager
  def when(self, condition: Number) -> Iterator[None]:
    before = self._active
    self._active = before & np.asarray(condition, bool)
    yield
    self._active = before

  def branch(self, condition: Number, body: Callable[[], Any]) -> None:
    # A number, not an array: it is the same for all threads.
    if condition:
      body()

  def loop(self, num: int, body: Callable[[Number, Any], Any], carry: Any) -> Any:
    for n in range(num):
      carry = body(np.int32(n), carry)
    return carry


def simulate(
  kernel: machine.Kernel, tables: list[np.ndarray], *, cluster: int, clusters: int
) -> None:
  """What `ptx.launch` does, to numpy arrays in place: one cluster after the other."""
  for number in range(clusters):
    memory = Memory(tables, blocks=cluster, num_bytes=kernel.smem)

    def run(rank, computes, memory=memory, number=number) -> None:
      try:
        fetching = range(kernel.threads, kernel.threads + 1)
        threads = range(kernel.threads) if computes else fetching
        on = Simulated(memory, rank=rank, cluster=number, threads=threads)
        if computes:
          kernel.setup(on)
        on.sync_cluster()
        (kernel.compute if computes else kernel.fetch)(on)
      # Whatever it is: the others would wait for this thread forever.
      except BaseException as e:
        with memory.change:
          memory.failed = memory.failed or e  # the first: the others follow from it
          memory.change.notify_all()
        memory.start.abort()

    roles = [(rank, computes) for rank in range(cluster) for computes in (True, False)]
    running = [threading.Thread(target=run, args=role) for role in roles]
    for thread in running:
      thread.start()
    for thread in running:
      thread.join()
    if memory.failed is not None:
      raise memory.failed
