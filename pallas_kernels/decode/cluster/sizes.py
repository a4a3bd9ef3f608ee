"""The sizes of a decoding step: of the model, of its caches, and of the clusters that compute it.

Letters: R sequences of a cluster, C thread blocks of a cluster, and a thread block's share n of N
features.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import hardware
from pallas_kernels.decode.cluster.machine import WARP
from pallas_kernels.decode.cluster.machine import WARPGROUP

WARPS = 8  # of a thread block that compute: two for each of a multiprocessor's four schedulers
THREADS = WARPS * WARP
K_BLOCK = 256  # widths of rows are multiples of it: eight warps' shares
K_STEP = 32  # rows of a matrix for two mma
TILE_COLUMNS = 16  # features of a tile: the rows of an mma
TILE_BYTES = WARPS * K_STEP * TILE_COLUMNS * 2  # of bfloat16: [32, 16] of each warp
CHUNK_BYTES = 2 * TILE_BYTES  # that a slot of the ring has for weights or for cached rows
WORD_BITS = 32
SMEM = 220 * 1024  # bytes of shared memory for the kernel, of a multiprocessor's 227 KiB

# Sequences of a cluster are the columns of an mma, 8: more take a second one for every tile, and a
# product twice as long.
MOST_SEQUENCES = 8
# Thread blocks of a cluster, best first: of 16, each has half the weights and cached rows to fetch;
# 8 is the most that CUDA calls portable.
CLUSTERS = (16, 8)
# A cluster lies within one GPC, of which Hopper has up to 18 multiprocessors each.
_GPC_CORES = 18
# Where programs are built for no GPU, in the simulator, clusters are those of an H100.
_SIMULATED_CORES = 132


def clusters_at_once(blocks: int) -> int:
  """Clusters of so many thread blocks that the device runs at the same time.

  The driver is asked, if the device is in this machine. If it is not, or the driver does not tell,
  this is ceil(multiprocessors / 18) GPCs, times the clusters that fit in one, less one: disabled
  multiprocessors leave some GPC short of a cluster. With the 132 of an H100 it is 7 clusters of 16
  and 15 of 8, as were measured.
  """
  clusters = hardware.max_active_clusters(blocks=blocks, threads=THREADS + WARPGROUP, smem=SMEM)
  if clusters is not None:
    return clusters
  cores = hardware.num_cores() if hardware.platform() == "gpu" else _SIMULATED_CORES
  return max(0, -(-cores // _GPC_CORES) * (_GPC_CORES // blocks) - 1)


def cluster_shape(B: int) -> tuple[int, int]:
  """Thread blocks and sequences of a cluster, so that all clusters run at once if they can.

  With one cluster too many, a step takes twice as long.
  """
  # Fewer sequences of a cluster are faster; clusters beyond those at once wait for a whole step.
  for blocks in CLUSTERS:
    clusters = clusters_at_once(blocks)
    if clusters and (rows := -(-B // clusters)) <= MOST_SEQUENCES:
      return blocks, rows
  return CLUSTERS[-1], MOST_SEQUENCES


@dataclasses.dataclass(frozen=True)
class Matrix:
  """A thread block's share of a product: [K, n], of N = C n features."""

  K: int
  n: int
  norm: bool  # whether the rows are normed before

  @property
  def feature_shares(self) -> int:
    """Parts of the features, of which a warp has one: more would need more of the rows each."""
    return 2 if self.n % (2 * TILE_COLUMNS) == 0 else 1

  @property
  def k_shares(self) -> int:
    """Parts of K, of which a warp has one."""
    return WARPS // self.feature_shares

  @property
  def k_steps(self) -> int:
    """Of a warp."""
    return self.K // self.k_shares // K_STEP

  @property
  def columns(self) -> int:
    """Tiles of features of a warp."""
    return self.n // self.feature_shares // TILE_COLUMNS

  @property
  def tiles(self) -> list[tuple[int, int]]:
    """(features, step of K) of each warp's, in the order in which they lie and are used."""
    return [(m, u) for m in range(self.columns) for u in range(self.k_steps)]

  @property
  def header(self) -> int:
    """Bytes before the tiles, float32: bias and, for a norm, sums of the columns."""
    return 4 * self.n * (1 + self.norm)

  @property
  def num_bytes(self) -> int:
    return self.header + TILE_BYTES * len(self.tiles)

  @property
  def chunks(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """(first byte, bytes, tiles) of each slot of the ring; the header is in the first."""
    # Whole tiles, so that a warp has all that it needs of one in the same slot.
    per, out = CHUNK_BYTES // TILE_BYTES, []
    for first in range(0, len(self.tiles), per):
      tiles = self.tiles[first : first + per]
      start = self.header + first * TILE_BYTES if first else 0
      out.append((start, self.header + (first + len(tiles)) * TILE_BYTES - start, tiles))
    return out


@dataclasses.dataclass(frozen=True)
class Piece:
  """What a step reads of one cache: `size` of its `length` rows."""

  size: int
  length: int

  @property
  def seen_words(self) -> int:
    """Words with a bit for each row."""
    return -(-self.size // WORD_BITS)

  def chunks(self, row_bytes: int) -> list[tuple[int, int]]:
    """(first row, rows) of each slot of the ring."""
    # Octets of rows, as many for each of up to four warps that share them.
    most = CHUNK_BYTES // row_bytes
    most = most // 32 * 32 or most // 8 * 8
    return [(at, min(most, self.size - at)) for at in range(0, self.size, most)]


@dataclasses.dataclass(frozen=True)
class Layer:
  """What a layer's attention reads.

  Attributes:
    pieces: of each head.
    sets: for each head the number of its set. Heads of a set have their rows at the same places, in
      tables of their own; all sets have as many heads.
  """

  pieces: tuple[Piece, ...]
  sets: tuple[int, ...]

  @property
  def num_sets(self) -> int:
    return max(self.sets) + 1

  @property
  def places_in_set(self) -> list[int]:
    """The place of each head among those of its set."""
    return [self.sets[:h].count(number) for h, number in enumerate(self.sets)]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a model, and of the clusters that share its sequences.

  Attributes:
    B: sequences.
    E: width of the residual stream.
    H: heads.
    Dk: width of a head's queries and keys.
    Dv: width of its values.
    F: width between up and down.
    groups: how often the layers of a group follow each other.
    layers: of a group, one after the other.
    C: thread blocks of a cluster.
    R: sequences of a cluster.
    epsilon: of the norms.
    slope: of the activation u sigmoid(slope u).
  """

  B: int
  E: int
  H: int
  Dk: int
  Dv: int
  F: int
  groups: int
  layers: tuple[Layer, ...]
  C: int
  R: int
  epsilon: float
  slope: float

  @property
  def head_width(self) -> int:
    """Features of one head's query, key and value."""
    return 2 * self.Dk + self.Dv

  @property
  def row_bytes(self) -> int:
    """Of a cached key and its value."""
    return 2 * (self.Dk + self.Dv)

  @property
  def matrices(self) -> dict[str, Matrix]:
    # Columns are shared, not rows: then nothing has to be summed over thread blocks.
    share = lambda K, N, norm: Matrix(K, N // self.C, norm)
    return dict(
      qkv=share(self.E, self.H * self.head_width, True),
      out=share(self.H * self.Dv, self.E, False),
      up=share(self.E, self.F, True),
      down=share(self.F, self.E, False),
    )

  @property
  def num_layers(self) -> int:
    return len(self.layers) * self.groups

  @property
  def num_sets(self) -> int:
    """The most that a layer has."""
    return max(layer.num_sets for layer in self.layers)

  @property
  def seen_words(self) -> int:
    """Words that a set of heads has in the table of which cached rows are seen."""
    # Layers of a group have rows of one table: as wide as the one with most.
    return max(sum(piece.seen_words for piece in layer.pieces) for layer in self.layers)

  @property
  def jobs(self) -> int:
    """Heads of sequences that each thread block attends for."""
    # In order, so that the last thread blocks may have fewer, or none.
    return -(-self.R * self.H // self.C)

  @property
  def even(self) -> bool:
    """Whether all thread blocks have as many jobs."""
    return self.R * self.H % self.C == 0


def unsupported(
  *, E: int, H: int, Dk: int, Dv: int, F: int, C: int, dtype: jax.typing.DTypeLike
) -> str | None:
  """What of a model the kernel does not take, in clusters of C thread blocks; None: it does."""
  heads = H * (2 * Dk + Dv)
  step = TILE_COLUMNS * C  # features: each thread block has whole tiles
  needs = [
    (dtype == jnp.bfloat16, f"{dtype=}: the kernel takes bfloat16"),
    (E % K_BLOCK == 0 and E % step == 0, f"{E=}: must be a multiple of {K_BLOCK} and of {step}"),
    (F % K_BLOCK == 0 and F % step == 0, f"{F=}: must be a multiple of {K_BLOCK} and of {step}"),
    (H * Dv % K_BLOCK == 0, f"{H * Dv=}: must be a multiple of {K_BLOCK}"),
    (heads % step == 0, f"H * (2 * Dk + Dv) = {heads}: must be a multiple of {step}"),
    # Lanes share a key and a value evenly, 8 numbers of a key and at least 2 of a value each.
    (Dk in (8, 16, 32, 64, 128, 256), f"{Dk=}: must be a power of two from 8 to 256"),
    (Dv in (16, 32, 64, 128, 256), f"{Dv=}: must be a power of two from 16 to 256"),
  ]
  return next((message for good, message in needs if not good), None)
