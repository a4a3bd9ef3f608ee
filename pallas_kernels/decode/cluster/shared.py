"""What a thread block keeps in shared memory, and the ring through which its weights and rows come.

    x[0] | x[1] | seen | stats | attended | hidden | qkv | partial | parts | barriers | ring

Rows of R sequences: `x[0]`, the residual stream before a layer's attention and after it, `x[1]`;
what the heads gave, `attended`; the activated features, `hidden`. Others push into these. `qkv` are
queries, keys and values of the thread block's own jobs. Its own are `seen`, a bit for each
cached row that is read in a layer of a group; `stats`, the warps' shares of a row's moments;
`partial`, their shares of a product; and `parts`, their shares of the attention. `ring`: weights
and cached rows on their way.
"""

from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster import sizes
from pallas_kernels.decode.cluster.machine import Machine
from pallas_kernels.decode.cluster.machine import Number
from pallas_kernels.decode.cluster.sizes import Sizes

# Whole cache lines, so that all vectors and the copies' 16 bytes are aligned.
_LINE = 128
# Pads rows of bfloat16, whose widths are multiples of a line: 8 lanes at a time load 64 bytes each
# of two rows, which half a line puts into different banks.
_ROW_PADDING = 64
# Pads rows of float32: 4 lanes with rows 2 apart store 8 columns each, in 32 different banks.
WORD_PADDING = 4
SPARE_SLOTS = 2  # that the rows which are being read leave for what comes next

# Barriers: those of what arrives from the cluster, then those of the ring, full and free.
ARRIVALS = ("x", "qkv", "attended", "middle", "hidden")
_BARRIERS_BYTES = 1024
_FULL_AT, _FREE_AT = 64, 512
_MOST_SLOTS = (_FREE_AT - _FULL_AT) // machine.BARRIER_BYTES


class SharedMemory:
  """Where what lies: offsets in bytes. Equal in all thread blocks, as `Machine.push` needs it.

  Attributes:
    num_bytes: of all.
    seen: which cached rows are seen, a bit each, of all layers of a group.
    jobs_at_once: heads of sequences that the warps share among them in a round.
    arrived: the barrier of each of ARRIVALS.
    arriving: bytes that each thread block gets of each of ARRIVALS, but for "qkv".
    slots: of the ring.
    slot_bytes: of each.
  """

  def __init__(self, s: Sizes):
    matrices = s.matrices.values()
    widest = max(matrix.k_shares * (matrix.n + WORD_PADDING) for matrix in matrices)
    self.num_bytes = 0
    # A power of two, so that as many warps share each.
    self.jobs_at_once = min(sizes.WARPS, 1 << (s.jobs - 1).bit_length())
    self.x = [self._take(s.R * pitch(s.E)) for _ in range(2)]
    self.seen = self._take(len(s.layers) * s.num_sets * s.seen_words * 4)
    self.stats = self._take(sizes.WARPS * s.R * 8)  # the sum and the sum of squares, float32
    self.attended = self._take(s.R * pitch(s.H * s.Dv))
    self.hidden = self._take(s.R * pitch(s.F))
    self.qkv = self._take(s.jobs * s.head_width * 2)
    self.partial = self._take(s.R * widest * 4)
    self.parts = self._take(sizes.WARPS * part_bytes(s))
    barriers = self._take(_BARRIERS_BYTES)
    self.arrived = {name: barriers + machine.BARRIER_BYTES * n for n, name in enumerate(ARRIVALS)}
    self.full, self.free = barriers + _FULL_AT, barriers + _FREE_AT
    self.slot_bytes = _whole_lines(sizes.CHUNK_BYTES + max(matrix.header for matrix in matrices))
    self.slots = max(0, min(_MOST_SLOTS, (sizes.SMEM - self.num_bytes) // self.slot_bytes))
    self.ring = self._take(self.slots * self.slot_bytes)
    self.arriving = dict(
      x=s.R * s.E * 2,
      attended=s.R * s.H * s.Dv * 2,
      middle=s.R * s.E * 2,
      hidden=s.R * s.F * 2,
    )

  def _take(self, num_bytes: int) -> int:
    start = self.num_bytes
    self.num_bytes += _whole_lines(num_bytes)
    return start


def pitch(width: int) -> int:
  """Bytes from one row of so many bfloat16 to the next."""
  return 2 * width + _ROW_PADDING


def part_bytes(s: Sizes) -> int:
  """Of a warp's share of the attention: a sum of values, then the softmax's numbers."""
  # Totals of four lanes; the maximum, the score of the step's own row, and whether it is seen.
  return 4 * (s.Dv + 8)


def unsupported(s: Sizes) -> str | None:
  """Why a step of such sizes does not go into shared memory; None: it does."""
  memory = SharedMemory(s)
  if memory.slots < memory.jobs_at_once + SPARE_SLOTS:
    return f"{memory.slots} slots in shared memory are too few for {s}"
  return None


class Ring:
  """Slots that the thread which fetches fills in the order of their use, as far ahead as they go.

  Slot `number % slots` has turns, `number // slots`. Each turn completes `full` once, by the bytes
  that arrive, and `free` once, when all warps have given it back; parities are those of the turns.
  """

  def __init__(self, memory: SharedMemory):
    self._memory = memory

  def setup(self, on: Machine) -> None:
    memory = self._memory
    for n in range(memory.slots):
      on.init(on.base + (memory.full + machine.BARRIER_BYTES * n), 1)
      on.init(on.base + (memory.free + machine.BARRIER_BYTES * n), sizes.WARPS)

  def acquire(self, on: Machine, number: Number, num_bytes: int) -> tuple[Number, Number]:
    """For the thread that fetches: a free slot's address, and the barrier that counts its bytes."""
    memory = self._memory
    slot, turn = number % memory.slots, number // memory.slots
    # The turn before; nobody is waited for in the first turn, since barriers begin with parity 0.
    on.wait(on.base + memory.free + slot * machine.BARRIER_BYTES, (turn + 1) % 2)
    full = on.base + memory.full + slot * machine.BARRIER_BYTES
    # Before the copies start, so that the barrier cannot complete with the first of them.
    on.expect(full, num_bytes)
    return on.base + memory.ring + slot * memory.slot_bytes, full

  def read(self, on: Machine, number: Number) -> Number:
    """For the warps: the address of a slot, once it is full."""
    memory = self._memory
    slot = number % memory.slots
    on.wait(on.base + memory.full + slot * machine.BARRIER_BYTES, number // memory.slots % 2)
    return on.base + memory.ring + slot * memory.slot_bytes

  def release(self, on: Machine, number: Number, count: int = 1) -> None:
    """For the warps, each as a whole: so many slots from this one on have been read."""
    # One arrival for a warp and slot, once all its lanes have read; a lane for each slot.
    on.sync_warp()
    with on.when(on.lane < count):
      slot = (number + on.lane) % self._memory.slots
      on.arrive(on.base + self._memory.free + slot * machine.BARRIER_BYTES)


def _whole_lines(num_bytes: int) -> int:
  return -(-num_bytes // _LINE) * _LINE
