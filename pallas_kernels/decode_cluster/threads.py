"""What the threads of a cluster do, instruction by instruction: written once, for a GPU and numpy.

A kernel is a function of a `Gpu` or a `Simulated` object and of the numbers that it computes with:
values of one thread on a GPU, arrays over a block's threads here. `Gpu` emits the instructions,
which Pallas has no names for: products of one warp, 16 bytes that arrive in another block's memory
together with a count of them. `Simulated` carries them out, a Python thread per block and role.
"""

import abc
import contextlib
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import gpu as gpu_dialect
from jaxlib.mlir.dialects import llvm
from jaxlib.mlir.dialects import math as math_dialect

WARP = 32
_SYNC = 1  # number of the hardware barrier of the threads that compute


class Value:
  """A number of a thread: i32, f32 or i1, with Python's operators. Quotients are of naturals."""

  def __init__(self, x: ir.Value):
    self.x = x

  @property
  def is_float(self) -> bool:
    return isinstance(self.x.type, ir.FloatType)

  def like(self, other):
    if isinstance(other, Value):
      return other.x
    if isinstance(self.x.type, ir.FloatType):
      return utils.c(float(other), self.x.type)
    return utils.c(int(other), self.x.type)

  def _with(self, of_ints, of_floats, other, *, swap=False):
    operands = (self.x, self.like(other))
    operation = of_floats if self.is_float else of_ints
    return Value(operation(*(operands[::-1] if swap else operands)))

  def __add__(self, other):
    return self._with(arith.addi, arith.addf, other)

  def __sub__(self, other):
    return self._with(arith.subi, arith.subf, other)

  def __rsub__(self, other):
    return self._with(arith.subi, arith.subf, other, swap=True)

  def __mul__(self, other):
    return self._with(arith.muli, arith.mulf, other)

  def __floordiv__(self, other):
    return self._with(arith.divui, None, other)

  def __mod__(self, other):
    return self._with(arith.remui, None, other)

  __radd__ = __add__
  __rmul__ = __mul__

  def _compare(self, of_ints, of_floats, other):
    kind = arith.CmpFPredicate if self.is_float else arith.CmpIPredicate
    predicate = getattr(kind, of_floats if self.is_float else of_ints)
    compare = arith.cmpf if self.is_float else arith.cmpi
    return Value(compare(predicate, self.x, self.like(other)))

  def __lt__(self, other):
    return self._compare("slt", "OLT", other)

  def __eq__(self, other):
    return self._compare("eq", "OEQ", other)

  __hash__ = None


class Gpu:
  """Emits instructions for one thread of an NVIDIA GPU with clusters (compute capability 9)."""

  def __init__(self, smem: ir.Value, tables, *, cluster: int, threads: int):
    """Args:
    smem: the block's shared memory.
    tables: what is in global memory.
    cluster: blocks of one.
    threads: how many of a block compute; `sync` is for these.
    """
    self._i32, self._f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    self._threads = threads
    pointer = utils.memref_ptr(smem)
    self.base = Value(llvm.ptrtoint(self._i32, pointer))
    i64 = ir.IntegerType.get_signless(64)
    self._tables = [llvm.ptrtoint(i64, utils.memref_ptr(table)) for table in tables]
    self.thread = Value(utils.thread_idx())
    self.warp, self.lane = self.thread // WARP, self.thread % WARP
    block = Value(arith.index_cast(self._i32, gpu_dialect.block_id(gpu_dialect.Dimension.x)))
    self.rank, self.cluster = block % cluster, block // cluster

  # Numbers.

  def select(self, condition, a, b):
    typed = a if isinstance(a, Value) else b
    if not isinstance(typed, Value):
      typed = Value(utils.c(float(a), self._f32))
    return Value(arith.select(condition.x, typed.like(a), typed.like(b)))

  def choose(self, numbers: list[int], which):
    """numbers[which]"""
    chosen = which * 0 + numbers[0]
    for n, number in enumerate(numbers[1:], start=1):
      if number != numbers[n - 1]:
        chosen = self.select(which < n, chosen, which * 0 + number)
    return chosen

  def zero(self):
    return Value(utils.c(0.0, self._f32))

  def maximum(self, a, b):
    return Value(arith.maximumf(a.x, a.like(b)))

  def fma(self, a, b, c):
    return Value(math_dialect.fma(a.x, a.like(b), a.like(c)))

  def _float_function(self, name, x):
    return Value(utils.inline_ptx(f"{name} $0, $1;", x.x, result_types=self._f32))

  def exp2(self, x):
    return self._float_function("ex2.approx.ftz.f32", x)

  def rsqrt(self, x):
    return self._float_function("rsqrt.approx.f32", x)

  def reciprocal(self, x):
    return self._float_function("rcp.approx.f32", x)

  def as_float(self, word):
    return Value(arith.bitcast(self._f32, word.x))

  def as_word(self, x):
    return Value(arith.bitcast(self._i32, x.x))

  def unpack(self, word):
    """Two bfloat16 as float32, the lower half first."""
    low = arith.shli(word.x, utils.c(16, self._i32))
    high = arith.andi(word.x, utils.c(-65536, self._i32))
    return [Value(arith.bitcast(self._f32, half)) for half in (low, high)]

  def pack(self, low, high):
    ptx = "cvt.rn.bf16x2.f32 $0, $1, $2;"
    return Value(utils.inline_ptx(ptx, high.x, low.x, result_types=self._i32))

  # Threads of a warp, all of which take part.

  def _shuffle(self, kind, x, lane):
    word = self.as_word(x) if x.is_float else x
    lane = lane.x if isinstance(lane, Value) else utils.c(lane, self._i32)
    ptx = f"shfl.sync.{kind}.b32 $0, $1, $2, 31, -1;"
    how = dict(result_types=self._i32, has_side_effects=True, convergent=True)
    got = Value(utils.inline_ptx(ptx, word.x, lane, **how))
    return self.as_float(got) if x.is_float else got

  def shuffle_xor(self, x, distance: int):
    return self._shuffle("bfly", x, distance)

  def shuffle_from(self, x, lane):
    return self._shuffle("idx", x, lane)

  def multiply(self, sums, a, b):
    """sums + a @ b of tiles [16, 16] and [16, 8] of bfloat16, as mma.m16n8k16 spreads them."""
    ptx = (
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    operands = [value.x for value in (*a, *b, *sums)]
    how = dict(result_types=[self._f32] * 4, convergent=True)
    return [Value(x) for x in utils.inline_ptx(ptx, *operands, **how)]

  # Shared memory, in words of 32 bits.

  def _vector(self, num: int) -> str:
    return {1: "", 2: ".v2", 4: ".v4"}[num]

  def _load(self, space, address, num, register):
    outs = ",".join(f"${n}" for n in range(num))
    ptx = f"ld.{space}{self._vector(num)}.b32 {{{outs}}}, [${num}];"
    if num == 1:
      ptx = f"ld.{space}.b32 $0, [$1];"
    how = dict(result_types=[self._i32] * num, has_side_effects=True)
    return [Value(x) for x in utils.inline_ptx(ptx, register, **how)]

  def _store(self, space, register, words):
    names = ",".join(f"${n + 1}" for n in range(len(words)))
    names = f"{{{names}}}" if len(words) > 1 else names
    ptx = f"st.{space}{self._vector(len(words))}.b32 [$0], {names};"
    words = [self.as_word(x).x if x.is_float else x.x for x in words]
    utils.inline_ptx(ptx, register, *words)

  def load(self, address, num: int):
    return self._load("shared", address, num, address.x)

  def store(self, address, words):
    self._store("shared", address.x, words)

  # Global memory: byte `offset` of row `index` of a table whose rows have `pitch` bytes.

  def choose_table(self, tables: list[int], which):
    """tables[which]"""
    chosen = self._tables[tables[0]]
    for n, table in enumerate(tables[1:], start=1):
      if table != tables[n - 1]:
        chosen = arith.select((which < n).x, chosen, self._tables[table])
    return chosen

  def _place(self, table, index, pitch: int, offset):
    table = table if isinstance(table, ir.Value) else self._tables[table]
    i64 = ir.IntegerType.get_signless(64)
    wide = lambda x: arith.extui(i64, x.x) if isinstance(x, Value) else utils.c(x, i64)
    at = arith.muli(wide(index), utils.c(pitch, i64))
    return arith.addi(arith.addi(table, at), wide(offset))

  def load_global(self, table, index, pitch: int, offset, num: int):
    return self._load("global", None, num, self._place(table, index, pitch, offset))

  def store_global(self, table, index, pitch: int, offset, words):
    self._store("global", self._place(table, index, pitch, offset), words)

  # Barriers in shared memory: one flips its parity when all arrivals and all bytes are there.

  def init(self, barrier, arrivals: int):
    ptx = f"mbarrier.init.shared::cta.b64 [$0], {arrivals};"
    utils.inline_ptx(ptx, barrier.x)

  def begin(self):
    """After the barriers are made: no block of the cluster goes on before all are here."""
    ptx = (
      "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.aligned; "
      "barrier.cluster.wait.aligned;"
    )
    utils.inline_ptx(ptx, convergent=True)

  def expect(self, barrier, num_bytes):
    """Arrives, and has the barrier wait for so many bytes."""
    ptx = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
    num_bytes = num_bytes.x if isinstance(num_bytes, Value) else utils.c(num_bytes, self._i32)
    utils.inline_ptx(ptx, barrier.x, num_bytes)

  def arrive(self, barrier):
    utils.inline_ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier.x)

  def wait(self, barrier, parity):
    ptx = (
      "{ .reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 "
      "done, [$0], $1; @!done bra again; }"
    )
    utils.inline_ptx(ptx, barrier.x, parity.x)

  def sync(self):
    utils.inline_ptx(f"bar.sync {_SYNC}, {self._threads};", convergent=True)

  def sync_warp(self):
    utils.inline_ptx("bar.warp.sync -1;", convergent=True)

  # Copies that count their bytes at a barrier.

  def fetch(self, address, table, index, pitch: int, offset, num_bytes: int, barrier):
    """A piece of global memory into shared memory."""
    ptx = (
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      f"[$0], [$1], {num_bytes}, [$2];"
    )
    utils.inline_ptx(ptx, address.x, self._place(table, index, pitch, offset), barrier.x)

  def push(self, address, words, barrier, rank):
    """Four words into another block's memory, and their bytes to its barrier."""
    ptx = (
      "{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $6; "
      "mapa.shared::cluster.u32 bar, $5, $6; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[to], {$1,$2,$3,$4}, [bar]; }"
    )
    utils.inline_ptx(ptx, address.x, *(w.x for w in words), barrier.x, rank.x)

  # Control.

  @contextlib.contextmanager
  def when(self, condition):
    with utils.when(condition.x):
      yield

  def only(self, condition, body):
    """body(), if the condition holds, which is the same for all threads that come here."""
    with self.when(condition):
      body()

  def loop(self, num: int, body, carry):
    """body(number, carry) -> carry, num times."""
    one = lambda n, x: body(Value(n), Value(x)).x
    utils.fori(utils.c(num, self._i32), carry.x)(one)


class Memory:
  """Of a simulated cluster: each block's shared memory and barriers, and global memory."""

  def __init__(self, tables: list[np.ndarray], *, blocks: int, num_bytes: int):
    self.tables = [t.reshape(-1).view(np.uint8) for t in tables]
    # What nobody wrote is no number.
    self.shared = [np.full(num_bytes, 0xFF, np.uint8) for _ in range(blocks)]
    self.barriers = [{} for _ in range(blocks)]
    self.change = threading.Condition()
    self.start = threading.Barrier(2 * blocks)
    self.failed = None


class _Barrier:
  def __init__(self, arrivals):
    self.arrivals = self.pending = arrivals
    self.bytes = self.parity = 0

  def add(self, *, arrivals=0, num_bytes=0):
    self.pending -= arrivals
    self.bytes += num_bytes
    assert self.pending >= 0, "too many arrivals at a barrier"
    if self.pending == 0 and self.bytes == 0:
      self.pending, self.parity = self.arrivals, 1 - self.parity


class Simulated:
  """Carries out what `Gpu` emits: all threads of one block and role at once, in numpy."""

  base = np.int32(0)

  def __init__(self, memory: Memory, *, rank: int, cluster: int, threads: range):
    self._memory = memory
    self.thread = np.arange(threads.start, threads.stop, dtype=np.int32)
    self.warp, self.lane = self.thread // WARP, self.thread % WARP
    self.rank, self.cluster = np.int32(rank), np.int32(cluster)
    self._active = np.ones(len(threads), bool)

  def _all(self, x, dtype=np.int64):
    return np.broadcast_to(np.asarray(x, dtype), self.thread.shape)

  def select(self, condition, a, b):
    return np.where(condition, a, b).astype(np.asarray(a if hasattr(a, "dtype") else b).dtype)

  def zero(self):
    return np.zeros(len(self.thread), np.float32)

  def maximum(self, a, b):
    return np.maximum(a, np.float32(b))

  def fma(self, a, b, c):
    return a * b + c

  def exp2(self, x):
    return np.exp2(x)

  def rsqrt(self, x):
    return (1 / np.sqrt(x)).astype(np.float32)

  def reciprocal(self, x):
    return (1 / x).astype(np.float32)

  def as_float(self, word):
    return np.asarray(word, np.uint32).view(np.float32)

  def as_word(self, x):
    return np.asarray(x, np.float32).view(np.uint32)

  def unpack(self, word):
    word = np.asarray(word, np.uint32)
    return [(word << 16).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)]

  def pack(self, low, high):
    short = lambda x: np.asarray(x, np.float32).astype(jax.numpy.bfloat16).view(np.uint16)
    return short(low).astype(np.uint32) | short(high).astype(np.uint32) << 16

  def shuffle_xor(self, x, distance: int):
    return x[np.arange(len(self.thread)) ^ distance]

  def shuffle_from(self, x, lane):
    return x[np.arange(len(self.thread)) // WARP * WARP + lane]

  def multiply(self, sums, a, b):
    at = np.arange(WARP)
    g, t = at // 4, at % 4
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

  def _words(self, memory: np.ndarray, address, num: int) -> list[np.ndarray]:
    address = self._all(address)
    assert (address[self._active] % (4 * num) == 0).all(), "an address is not aligned"
    found = np.zeros((num, len(self.thread)), np.uint32)
    for n in range(num):
      at = address[self._active] + 4 * n
      found[n, self._active] = memory.view(np.uint32)[at // 4]
    return list(found)

  def _put(self, memory: np.ndarray, address, words):
    address = self._all(address)[self._active]
    assert (address % (4 * len(words)) == 0).all(), "an address is not aligned"
    for n, word in enumerate(words):
      word = np.broadcast_to(word, self.thread.shape)
      bits = word.view(np.uint32) if word.dtype == np.float32 else word.astype(np.uint32)
      memory.view(np.uint32)[address // 4 + n] = bits[self._active]

  def load(self, address, num: int):
    return self._words(self._memory.shared[self.rank], address, num)

  def store(self, address, words):
    self._put(self._memory.shared[self.rank], address, words)

  def choose(self, numbers: list[int], which):
    return np.int32(numbers[which])

  def choose_table(self, tables: list[int], which):
    return tables[which]

  def _place(self, index, pitch, offset):
    return self._all(index) * pitch + offset

  def load_global(self, table, index, pitch: int, offset, num: int):
    return self._words(self._memory.tables[table], self._place(index, pitch, offset), num)

  def store_global(self, table, index, pitch: int, offset, words):
    self._put(self._memory.tables[table], self._place(index, pitch, offset), words)

  def _at(self, barrier, rank=None):
    barriers = self._memory.barriers[self.rank if rank is None else rank]
    return [barriers[int(at)] for at in self._all(barrier)[self._active]]

  def init(self, barrier, arrivals: int):
    for at in self._all(barrier)[self._active]:
      self._memory.barriers[self.rank][int(at)] = _Barrier(arrivals)

  def begin(self):
    self._memory.start.wait()

  def _add(self, barriers, num_arrivals, num_bytes):
    with self._memory.change:
      for one, size in zip(barriers, num_bytes, strict=True):
        one.add(arrivals=num_arrivals, num_bytes=int(size))
      self._memory.change.notify_all()

  def expect(self, barrier, num_bytes):
    self._add(self._at(barrier), 1, self._all(num_bytes)[self._active])

  def arrive(self, barrier):
    barriers = self._at(barrier)
    self._add(barriers, 1, [0] * len(barriers))

  def wait(self, barrier, parity):
    parity = self._all(parity)[self._active].tolist()
    waiting = set(zip(self._at(barrier), parity, strict=True))
    with self._memory.change:
      done = lambda: self._memory.failed or all(one.parity != before for one, before in waiting)
      assert self._memory.change.wait_for(done, timeout=60), "a barrier is never complete"
    if self._memory.failed is not None:
      raise RuntimeError("another block failed")

  def sync(self):
    """Nothing: a block's threads go in step."""

  def sync_warp(self):
    """Nothing, as `sync`."""

  def fetch(self, address, table, index, pitch: int, offset, num_bytes: int, barrier):
    (start,) = self._place(index, pitch, offset)[self._active]
    (to,) = self._all(address)[self._active]
    assert start % 16 == to % 16 == num_bytes % 16 == 0, "a copy is not aligned"
    memory = self._memory.tables[table]
    assert start + num_bytes <= len(memory), "a copy beyond the end of an array"
    self._memory.shared[self.rank][to : to + num_bytes] = memory[start : start + num_bytes]
    self._add(self._at(barrier), 0, [-num_bytes])

  def push(self, address, words, barrier, rank):
    address, rank = self._all(address), self._all(rank)
    before = self._active
    for to in np.unique(rank[before]):
      self._active = before & (rank == to)
      self._put(self._memory.shared[to], address, words)
      barriers = self._at(barrier, to)
      self._add(barriers, 0, [-16] * len(barriers))
    self._active = before

  @contextlib.contextmanager
  def when(self, condition):
    before = self._active
    self._active = before & np.asarray(condition, bool)
    yield
    self._active = before

  def only(self, condition, body):
    if condition:
      body()

  def loop(self, num: int, body, carry):
    for n in range(num):
      carry = body(np.int32(n), carry)


class Kernel(abc.ABC):
  """The parts of a kernel: `setup` makes barriers, then two roles of threads run side by side.

  Attributes:
    threads: of a block that compute; one more fetches.
    smem: bytes of shared memory.
  """

  threads: int
  smem: int

  @abc.abstractmethod
  def setup(self, on: Any) -> None:
    """Makes barriers, by one of the threads that compute. `on` is a Gpu or a Simulated."""

  @abc.abstractmethod
  def compute(self, on: Any) -> None:
    """What the threads that compute do."""

  @abc.abstractmethod
  def fetch(self, on: Any) -> None:
    """What the thread that fetches does."""


def launch(kernel: Kernel, inputs, inouts, outputs, *, cluster: int, clusters: int) -> list:
  """Runs a kernel on an NVIDIA GPU.

  Args:
    kernel: its tables are the inputs, then the inouts, then the outputs.
    inputs: arrays.
    inouts: arrays that are updated in place.
    outputs: shapes.
    cluster: blocks of a cluster.
    clusters: how many of them.

  Returns:
    The outputs, then the inouts.
  """

  def body(ctx, *args):
    del ctx
    *tables, shared = args
    on = Gpu(shared, tables, cluster=cluster, threads=kernel.threads)
    kernel.setup(on)
    on.begin()
    with on.when(on.thread < kernel.threads):
      kernel.compute(on)
    with on.when(on.thread == kernel.threads):
      kernel.fetch(on)

  with mlir.make_ir_context(), ir.Location.unknown():
    call = _built(body, kernel, inputs, inouts, outputs, cluster * clusters, cluster)
  return call(*inputs, *inouts)


def _built(body, kernel: Kernel, inputs, inouts, outputs, blocks: int, cluster: int):
  shapes = lambda arrays: tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
  return mgpu.as_gpu_kernel(
    body,
    grid=(blocks, 1, 1),
    cluster=(cluster, 1, 1),
    block=(kernel.threads + 128, 1, 1),
    in_shape=shapes(inputs),
    inout_shape=shapes(inouts),
    out_shape=tuple(outputs),
    smem_scratch_shape=jax.ShapeDtypeStruct((kernel.smem,), np.int8),
    module_name="decode_cluster",
    kernel_name="decode_cluster",
  )


def simulate(kernel: Kernel, tables: list[np.ndarray], *, cluster: int, clusters: int) -> None:
  """What `launch` does, to numpy arrays in place."""
  for number in range(clusters):
    memory = Memory(tables, blocks=cluster, num_bytes=kernel.smem)

    def run(rank, computes, memory=memory, number=number):
      try:
        some = range(kernel.threads) if computes else range(kernel.threads, kernel.threads + 1)
        on = Simulated(memory, rank=rank, cluster=number, threads=some)
        if computes:
          kernel.setup(on)
        on.begin()
        (kernel.compute if computes else kernel.fetch)(on)
      except BaseException as e:
        with memory.change:
          memory.failed = memory.failed or e
          memory.change.notify_all()
        memory.start.abort()

    pairs = [(rank, computes) for rank in range(cluster) for computes in (True, False)]
    running = [threading.Thread(target=run, args=pair) for pair in pairs]
    for one in running:
      one.start()
    for one in running:
      one.join()
    if memory.failed is not None:
      raise memory.failed
