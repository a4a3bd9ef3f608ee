"""The kernel's instructions on NVIDIA GPUs with clusters, and how it is launched.

Pallas has no names for some of them: products of one warp, 16 bytes that arrive in another thread
block's memory together with a count of them. So they are emitted as PTX and MLIR.
"""

import contextlib
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
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

from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.machine import Table
from pallas_kernels.decode.cluster.machine import WARP
from pallas_kernels.decode.cluster.machine import WARPGROUP

# The hardware barrier of the threads that compute: 0 is that of all threads of a thread block.
_COMPUTE_BARRIER = 1
_HIGH_HALF = -65536  # 0xFFFF0000 as int32: the upper bfloat16 of a word
_VECTORS = {1: "", 2: ".v2", 4: ".v4"}  # suffix of a load or a store of so many words
_NAME = "decode_cluster"  # what profilers show


class Value:
  """A number of a thread: i32, f32 or i1, with Python's operators. Quotients are of naturals."""

  def __init__(self, x: ir.Value):
    self.x = x

  @property
  def is_float(self) -> bool:
    return isinstance(self.x.type, ir.FloatType)

  def like(self, other: Any) -> ir.Value:
    """`other`, which may be a Python number, in this number's type."""
    if isinstance(other, Value):
      return other.x
    return utils.c(float(other) if self.is_float else int(other), self.x.type)

  def _with(
    self, of_ints: Callable, of_floats: Callable | None, other: Any, *, swap: bool = False
  ) -> "Value":
    # There is one sort of integers and one of floats: no other type has to be told apart.
    operands = (self.x, self.like(other))
    operation = of_floats if self.is_float else of_ints
    return Value(operation(*(operands[::-1] if swap else operands)))

  def __add__(self, other: Any) -> "Value":
    return self._with(arith.addi, arith.addf, other)

  def __sub__(self, other: Any) -> "Value":
    return self._with(arith.subi, arith.subf, other)

  def __rsub__(self, other: Any) -> "Value":
    return self._with(arith.subi, arith.subf, other, swap=True)

  def __mul__(self, other: Any) -> "Value":
    return self._with(arith.muli, arith.mulf, other)

  # Unsigned: of a power of two it is a shift, without the correction that signs need.
  def __floordiv__(self, other: Any) -> "Value":
    return self._with(arith.divui, None, other)

  def __mod__(self, other: Any) -> "Value":
    return self._with(arith.remui, None, other)

  __radd__ = __add__
  __rmul__ = __mul__

  def _compare(self, of_ints: str, of_floats: str, other: Any) -> "Value":
    # Signed and ordered: a sum may be below zero, and NaN compares as false.
    kind = arith.CmpFPredicate if self.is_float else arith.CmpIPredicate
    predicate = getattr(kind, of_floats if self.is_float else of_ints)
    compare = arith.cmpf if self.is_float else arith.cmpi
    return Value(compare(predicate, self.x, self.like(other)))

  def __lt__(self, other: Any) -> "Value":
    return self._compare("slt", "OLT", other)

  def __eq__(self, other: Any) -> "Value":
    return self._compare("eq", "OEQ", other)

  __hash__ = None  # == makes an instruction: two values cannot be told apart while tracing


class Gpu(machine.Machine):
  """Emits instructions for one thread of an NVIDIA GPU with clusters (compute capability 9)."""

  def __init__(self, smem: ir.Value, tables: Sequence[ir.Value], *, cluster: int, threads: int):
    """A thread, in the midst of an MLIR function.

    Args:
      smem: the thread block's shared memory.
      tables: what is in global memory.
      cluster: thread blocks of one.
      threads: how many of a thread block compute; `sync` is for these.
    """
    self._i32, self._f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    self._threads = threads
    # Addresses in shared memory have 32 bits, those in global memory 64.
    pointer = utils.memref_ptr(smem)
    self.base = Value(llvm.ptrtoint(self._i32, pointer))
    self._i64 = ir.IntegerType.get_signless(64)
    self._tables = [llvm.ptrtoint(self._i64, utils.memref_ptr(table)) for table in tables]
    self.thread = Value(utils.thread_idx())
    self.warp, self.lane = self.thread // WARP, self.thread % WARP
    # Thread blocks of a cluster have neighbouring numbers in the grid.
    block = Value(arith.index_cast(self._i32, gpu_dialect.block_id(gpu_dialect.Dimension.x)))
    self.rank, self.cluster = block % cluster, block // cluster

  # Numbers.

  def select(self, condition: Number, a: Number, b: Number) -> Number:
    # Python numbers take the type of the other, or else are float32.
    typed = a if isinstance(a, Value) else b
    if not isinstance(typed, Value):
      typed = Value(utils.c(float(a), self._f32))
    return Value(arith.select(condition.x, typed.like(a), typed.like(b)))

  def choose(self, numbers: list[int], which: Number) -> Number:
    # A chain of selects: a table would be a load from memory, which takes longer.
    chosen = which * 0 + numbers[0]
    for n, number in enumerate(numbers[1:], start=1):
      if number != numbers[n - 1]:
        chosen = self.select(which < n, chosen, which * 0 + number)
    return chosen

  def zero(self) -> Number:
    return Value(utils.c(0.0, self._f32))

  def maximum(self, a: Number, b: Number) -> Number:
    return Value(arith.maximumf(a.x, a.like(b)))

  def fma(self, a: Number, b: Number, c: Number) -> Number:
    return Value(math_dialect.fma(a.x, a.like(b), a.like(c)))

  # One instruction each, right to about 22 bits: what follows is rounded to bfloat16 anyway. The
  # smallest numbers, which would take more instructions, are zeros.

  def _float_function(self, name: str, x: Value) -> Value:
    return Value(utils.inline_ptx(f"{name} $0, $1;", x.x, result_types=self._f32))

  def exp2(self, x: Number) -> Number:
    return self._float_function("ex2.approx.ftz.f32", x)

  def rsqrt(self, x: Number) -> Number:
    return self._float_function("rsqrt.approx.ftz.f32", x)

  def reciprocal(self, x: Number) -> Number:
    return self._float_function("rcp.approx.ftz.f32", x)

  def as_float(self, word: Number) -> Number:
    return Value(arith.bitcast(self._f32, word.x))

  def as_word(self, x: Number) -> Number:
    return Value(arith.bitcast(self._i32, x.x))

  def unpack(self, word: Number) -> list[Number]:
    # A bfloat16 is the upper half of a float32.
    low = arith.shli(word.x, utils.c(16, self._i32))
    high = arith.andi(word.x, utils.c(_HIGH_HALF, self._i32))
    return [Value(arith.bitcast(self._f32, half)) for half in (low, high)]

  def pack(self, low: Number, high: Number) -> Number:
    ptx = "cvt.rn.bf16x2.f32 $0, $1, $2;"  # the instruction names the upper half first
    return Value(utils.inline_ptx(ptx, high.x, low.x, result_types=self._i32))

  def halves(self, a: Number, b: Number) -> list[Number]:
    # Bytes of both words by their numbers, the last first: a has 0 to 3, b 4 to 7.
    return [
      Value(utils.inline_ptx(f"prmt.b32 $0, $1, $2, {which};", a.x, b.x, result_types=self._i32))
      for which in ("0x5410", "0x7632")
    ]

  def has_bit(self, word: Number, n: Number) -> Number:
    return Value(arith.trunci(ir.IntegerType.get_signless(1), arith.shrui(word.x, n.x)))

  # Threads of a warp, all of which take part.

  def _shuffle(self, kind: str, x: Value, lane: Value | int) -> Value:
    # The instruction knows words only. Convergent: all lanes have to come to it together.
    word = self.as_word(x) if x.is_float else x
    lane = lane.x if isinstance(lane, Value) else utils.c(lane, self._i32)
    ptx = f"shfl.sync.{kind}.b32 $0, $1, $2, {WARP - 1}, -1;"
    options = dict(result_types=self._i32, has_side_effects=True, convergent=True)
    word = Value(utils.inline_ptx(ptx, word.x, lane, **options))
    return self.as_float(word) if x.is_float else word

  def shuffle_xor(self, x: Number, distance: int) -> Number:
    return self._shuffle("bfly", x, distance)

  def shuffle_from(self, x: Number, lane: Number) -> Number:
    return self._shuffle("idx", x, lane)

  def multiply(self, sums: list[Number], a: list[Number], b: list[Number]) -> list[Number]:
    # The results, then the operands.
    numbers, registers = itertools.count(), []
    for num in (4, len(a), len(b), 4):
      registers.append("{" + ",".join(f"${n}" for n in itertools.islice(numbers, num)) + "}")
    shape = f"m16n8k{8 * len(b)}"  # the summed axis is 16 or 8 long
    ptx = f"mma.sync.aligned.{shape}.row.col.f32.bf16.bf16.f32 {', '.join(registers)};"
    # No side effects: the compiler may put loads between them.
    operands = [value.x for value in (*a, *b, *sums)]
    options = dict(result_types=[self._f32] * 4, convergent=True)
    return [Value(x) for x in utils.inline_ptx(ptx, *operands, **options)]

  def sync_warp(self) -> None:
    utils.inline_ptx("bar.warp.sync -1;", convergent=True)

  # Memory. Loads have side effects, as MLIR sees it: else it would join those before and after a
  # barrier.

  def _load(self, space: str, num: int, register: ir.Value) -> list[Value]:
    outputs = ",".join(f"${n}" for n in range(num))
    outputs = f"{{{outputs}}}" if num > 1 else outputs
    ptx = f"ld.{space}{_VECTORS[num]}.b32 {outputs}, [${num}];"
    options = dict(result_types=[self._i32] * num, has_side_effects=True)
    return [Value(x) for x in utils.inline_ptx(ptx, register, **options)]

  def _store(self, space: str, register: ir.Value, words: list[Value]) -> None:
    names = ",".join(f"${n + 1}" for n in range(len(words)))
    names = f"{{{names}}}" if len(words) > 1 else names
    ptx = f"st.{space}{_VECTORS[len(words)]}.b32 [$0], {names};"
    words = [self.as_word(x).x if x.is_float else x.x for x in words]
    utils.inline_ptx(ptx, register, *words)

  def load(self, address: Number, num: int) -> list[Number]:
    return self._load("shared", num, address.x)

  def store(self, address: Number, words: list[Number]) -> None:
    self._store("shared", address.x, words)

  def choose_table(self, tables: list[int], which: Number) -> Table:
    # Equal neighbours need no select.
    chosen = self._tables[tables[0]]
    for n, table in enumerate(tables[1:], start=1):
      if table != tables[n - 1]:
        chosen = arith.select((which < n).x, chosen, self._tables[table])
    return chosen

  def _place(self, table: Table, index: Number, pitch: int, offset: Number) -> ir.Value:
    # A chosen table is an address already.
    table = table if isinstance(table, ir.Value) else self._tables[table]
    # Caches and the weights of all layers may have more than 4 GiB.
    wide = lambda x: arith.extui(self._i64, x.x) if isinstance(x, Value) else utils.c(x, self._i64)
    at = arith.muli(wide(index), utils.c(pitch, self._i64))
    return arith.addi(arith.addi(table, at), wide(offset))

  def load_global(
    self, table: Table, index: Number, pitch: int, offset: Number, num: int
  ) -> list[Number]:
    return self._load("global", num, self._place(table, index, pitch, offset))

  def store_global(
    self, table: Table, index: Number, pitch: int, offset: Number, words: list[Number]
  ) -> None:
    self._store("global", self._place(table, index, pitch, offset), words)

  # Barriers.

  def init(self, barrier: Number, arrivals: int) -> None:
    ptx = f"mbarrier.init.shared::cta.b64 [$0], {arrivals};"
    utils.inline_ptx(ptx, barrier.x)

  def sync_cluster(self) -> None:
    # The fence: other thread blocks count their bytes at these barriers.
    ptx = (
      "fence.mbarrier_init.release.cluster; barrier.cluster.arrive.aligned; "
      "barrier.cluster.wait.aligned;"
    )
    utils.inline_ptx(ptx, convergent=True)

  def expect(self, barrier: Number, num_bytes: Number) -> None:
    # One instruction for both: no byte can complete the barrier in between.
    ptx = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
    num_bytes = num_bytes.x if isinstance(num_bytes, Value) else utils.c(num_bytes, self._i32)
    utils.inline_ptx(ptx, barrier.x, num_bytes)

  def arrive(self, barrier: Number) -> None:
    utils.inline_ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", barrier.x)

  def wait(self, barrier: Number, parity: Number) -> None:
    # What is waited for lies in this thread block's shared memory, whoever wrote it. To acquire it
    # for the cluster would empty the L1 cache of global memory at every barrier.
    ptx = (
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 "
      "done, [$0], $1; @!done bra again; }"
    )
    utils.inline_ptx(ptx, barrier.x, parity.x)

  def sync(self) -> None:
    utils.inline_ptx(f"bar.sync {_COMPUTE_BARRIER}, {self._threads};", convergent=True)

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
    # The copy engine writes: no thread waits for it, and the barrier counts its bytes.
    ptx = (
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      f"[$0], [$1], {num_bytes}, [$2];"
    )
    utils.inline_ptx(ptx, address.x, self._place(table, index, pitch, offset), barrier.x)

  def push(self, address: Number, words: list[Number], barrier: Number, rank: Number) -> None:
    # All thread blocks have the same layout: `mapa` gives another's address for an own one.
    ptx = (
      "{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $6; "
      "mapa.shared::cluster.u32 bar, $5, $6; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[to], {$1,$2,$3,$4}, [bar]; }"
    )
    utils.inline_ptx(ptx, address.x, *(w.x for w in words), barrier.x, rank.x)

  # Control.

  @contextlib.contextmanager
  def when(self, condition: Number) -> Iterator[None]:
    with utils.when(condition.x):
      yield

  # On a GPU there is no difference between the two.
  def branch(self, condition: Number, body: Callable[[], Any]) -> None:
    with self.when(condition):
      body()

  def loop(self, num: int, body: Callable[[Number, Any], Any], carry: Any) -> Any:
    values = lambda xs: jax.tree.map(Value, xs)
    registers = lambda xs: jax.tree.map(lambda value: value.x, xs)
    step = lambda n, xs: (registers(body(Value(n), values(xs[0]))),)
    return values(utils.fori(utils.c(num, self._i32), (registers(carry),))(step).result)


def launch(
  kernel: machine.Kernel,
  inputs: Sequence[Any],
  inouts: Sequence[Any],
  outputs: Sequence[jax.ShapeDtypeStruct],
  *,
  cluster: int,
  clusters: int,
) -> list[Any]:
  """Runs a kernel on an NVIDIA GPU.

  Args:
    kernel: its tables are the inputs, then the inouts, then the outputs.
    inputs: arrays.
    inouts: arrays that are updated in place.
    outputs: shapes.
    cluster: thread blocks of a cluster.
    clusters: how many of them.

  Returns:
    The outputs, then the inouts.
  """

  def body(ctx, *args) -> None:
    del ctx
    # Inputs, inouts, outputs, then scratch memory.
    *tables, shared = args
    on = Gpu(shared, tables, cluster=cluster, threads=kernel.threads)
    kernel.setup(on)
    on.sync_cluster()
    with on.when(on.thread < kernel.threads):
      kernel.compute(on)
    with on.when(on.thread == kernel.threads):
      kernel.fetch(on)

  # Without locations the program does not change with the lines of this file, and is found in
  # compilation caches.
  with mlir.make_ir_context(), ir.Location.unknown():
    call = _built(body, kernel, inputs, inouts, outputs, cluster=cluster, clusters=clusters)
  return call(*inputs, *inouts)


def _built(
  body: Callable,
  kernel: machine.Kernel,
  inputs: Sequence[Any],
  inouts: Sequence[Any],
  outputs: Sequence[jax.ShapeDtypeStruct],
  *,
  cluster: int,
  clusters: int,
) -> Callable:
  shapes = lambda arrays: tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
  return mgpu.as_gpu_kernel(
    body,
    grid=(cluster * clusters, 1, 1),
    cluster=(cluster, 1, 1),
    block=(kernel.threads + WARPGROUP, 1, 1),
    in_shape=shapes(inputs),
    inout_shape=shapes(inouts),
    out_shape=tuple(outputs),
    smem_scratch_shape=jax.ShapeDtypeStruct((kernel.smem,), np.int8),
    module_name=_NAME,
    kernel_name=_NAME,
  )
