"""The machine that a kernel is written for: `ptx.Gpu` and `simulator.Simulated` are such.

A kernel says instruction by instruction what the threads of a cluster do. `Gpu` emits these
instructions, of which Pallas has no names for some; `Simulated` carries them out in numpy. What a
kernel computes with is a `Number`: of one thread on a GPU, of all threads of a role at once in
numpy. Only what stands here may be used of either; a test compares their signatures with these.
"""

import abc
import contextlib
from collections.abc import Callable
from typing import Any

WARP = 32  # threads of a warp
# Threads that a launch adds for the one that fetches: Mosaic GPU takes whole warpgroups.
WARPGROUP = 128
BARRIER_BYTES = 8  # of a barrier in shared memory
PUSH_BYTES = 16  # of one `push`, the most that an instruction writes to another block's memory

# int32, float32 or a truth value: with + - * between numbers and with Python's; // and % of natural
# numbers; < and ==. A Python number alone is no Number: `zero() + x` and `lane * 0 + n` make one.
Number = Any
Table = Any  # the number of a kernel's table, or what `choose_table` returns


class Machine(abc.ABC):
  """A thread of a cluster, seen by itself. All addresses are bytes.

  Attributes:
    base: address of the thread block's shared memory.
    thread: number in the thread block.
    warp: number in the thread block.
    lane: number in the warp.
    rank: of the thread block in its cluster.
    cluster: number of the cluster.
  """

  base: Number
  thread: Number
  warp: Number
  lane: Number
  rank: Number
  cluster: Number

  # Numbers.

  @abc.abstractmethod
  def select(self, condition: Number, a: Number, b: Number) -> Number:
    """a where the condition holds, else b; one of them may be a Python number."""

  @abc.abstractmethod
  def choose(self, numbers: list[int], which: Number) -> Number:
    """numbers[which]"""

  @abc.abstractmethod
  def zero(self) -> Number:
    """0.0"""

  @abc.abstractmethod
  def maximum(self, a: Number, b: Number) -> Number:
    """Of floats; b may be a Python number."""

  @abc.abstractmethod
  def fma(self, a: Number, b: Number, c: Number) -> Number:
    """a * b + c"""

  @abc.abstractmethod
  def exp2(self, x: Number) -> Number:
    """2 ** x, about."""

  @abc.abstractmethod
  def rsqrt(self, x: Number) -> Number:
    """x ** -0.5, about."""

  @abc.abstractmethod
  def reciprocal(self, x: Number) -> Number:
    """1 / x, about."""

  @abc.abstractmethod
  def as_float(self, word: Number) -> Number:
    """The same bits as float32."""

  @abc.abstractmethod
  def as_word(self, x: Number) -> Number:
    """The same bits as int32."""

  @abc.abstractmethod
  def unpack(self, word: Number) -> list[Number]:
    """The two bfloat16 of a word as float32, the lower half first."""

  @abc.abstractmethod
  def pack(self, low: Number, high: Number) -> Number:
    """Two float32 rounded to the two bfloat16 of a word."""

  @abc.abstractmethod
  def halves(self, a: Number, b: Number) -> list[Number]:
    """A word of the lower halves of two words, a's first, and one of their upper halves."""

  @abc.abstractmethod
  def has_bit(self, word: Number, n: Number) -> Number:
    """Whether bit n of a word, from 0 to 31, is 1."""

  # Threads of a warp, all of which take part: not within a `when` that divides a warp.

  @abc.abstractmethod
  def shuffle_xor(self, x: Number, distance: int) -> Number:
    """x of the lane whose number differs in the bits of `distance`."""

  @abc.abstractmethod
  def shuffle_from(self, x: Number, lane: Number) -> Number:
    """x of a lane."""

  @abc.abstractmethod
  def multiply(self, sums: list[Number], a: list[Number], b: list[Number]) -> list[Number]:
    """sums + a @ b of tiles [16, 16] and [16, 8] of bfloat16, as mma.m16n8k16 spreads them.

    Lane 4 g + t has rows g and g + 8 of a and of the sums, column g of b, and the sums' columns
    2 t and 2 t + 1; along the summed axis 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.

    Args:
      sums: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1), float32.
      a: words of (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8) and the number after each;
        the first two alone are a tile [16, 8].
      b: words of (2 t, g) and (2 t + 8, g), each with the number below it; or the first alone.
    """

  @abc.abstractmethod
  def sync_warp(self) -> None:
    """Waits for the threads of the warp."""

  # Shared memory of the thread block, in 1, 2 or 4 words of 32 bits that are aligned as a whole.

  @abc.abstractmethod
  def load(self, address: Number, num: int) -> list[Number]:
    """`num` words."""

  @abc.abstractmethod
  def store(self, address: Number, words: list[Number]) -> None:
    """Words, or float32 as their bits."""

  # Global memory: byte `offset` of row `index` of a table whose rows have `pitch` bytes.

  @abc.abstractmethod
  def choose_table(self, tables: list[int], which: Number) -> Table:
    """tables[which]"""

  @abc.abstractmethod
  def load_global(
    self, table: Table, index: Number, pitch: int, offset: Number, num: int
  ) -> list[Number]:
    """`num` words."""

  @abc.abstractmethod
  def store_global(
    self, table: Table, index: Number, pitch: int, offset: Number, words: list[Number]
  ) -> None:
    """Words, or float32 as their bits."""

  # Barriers in shared memory: one flips its parity when all arrivals and all bytes are there, and
  # then waits for as many arrivals again.

  @abc.abstractmethod
  def init(self, barrier: Number, arrivals: int) -> None:
    """Makes a barrier, of parity 0."""

  @abc.abstractmethod
  def sync_cluster(self) -> None:
    """After the barriers are made: no thread of the cluster goes on before all are here."""

  @abc.abstractmethod
  def expect(self, barrier: Number, num_bytes: Number) -> None:
    """Arrives, and has the barrier wait for so many bytes."""

  @abc.abstractmethod
  def arrive(self, barrier: Number) -> None:
    """One arrival, without bytes."""

  @abc.abstractmethod
  def wait(self, barrier: Number, parity: Number) -> None:
    """Until the barrier's parity is not this one any more."""

  @abc.abstractmethod
  def sync(self) -> None:
    """Waits for the threads of the thread block that compute."""

  # Copies that count their bytes at a barrier: whoever has waited for it may read them.

  @abc.abstractmethod
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
    """A piece of global memory into shared memory, both aligned to 16 bytes."""

  @abc.abstractmethod
  def push(self, address: Number, words: list[Number], barrier: Number, rank: Number) -> None:
    """Four words into the memory of a thread block of the cluster, their bytes to its barrier."""

  # Control.

  @abc.abstractmethod
  def when(self, condition: Number) -> contextlib.AbstractContextManager:
    """What stands in the block is for the threads for which the condition holds."""

  @abc.abstractmethod
  def branch(self, condition: Number, body: Callable[[], Any]) -> None:
    """body(), if the condition holds, which is the same for all threads that come here."""

  @abc.abstractmethod
  def loop(self, num: int, body: Callable[[Number, Any], Any], carry: Any) -> Any:
    """body(number, carry) -> carry, num times; a carry is a number, or lists and tuples of such."""


class Kernel(abc.ABC):
  """The parts of a kernel: `setup` makes barriers, then two roles of threads run side by side.

  Attributes:
    threads: of a thread block that compute; one more fetches.
    smem: bytes of shared memory.
  """

  threads: int
  smem: int

  @abc.abstractmethod
  def setup(self, on: Machine) -> None:
    """Makes barriers, by one of the threads that compute."""

  @abc.abstractmethod
  def compute(self, on: Machine) -> None:
    """What the threads that compute do."""

  @abc.abstractmethod
  def fetch(self, on: Machine) -> None:
    """What the thread that fetches does."""
