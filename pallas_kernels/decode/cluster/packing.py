"""How the kernel reads its weights: `pack` puts them so, `unpack` takes them out again.

Each thread block of a cluster has n = N / C of a matrix's N features, in one piece for each layer:

    [L, C, 16-bit words]
                    header                          tiles: each warp's features m, steps u of K
    +--------------------+--------------------+----------+----------+-----+----------+-----
    | bias [n], float32  | sums [n], float32  | m=0 u=0  | m=0 u=1  | ... | m=1 u=0  | ...
    +--------------------+--------------------+----------+----------+-----+----------+-----
                          only after a norm    8 KiB each

Sums are those of the columns, of a matrix with a norm before it, whose gain is in the weights and
whose shift is in the bias. Warps share the n features in up to two parts and K in the others: of
two, warps 0 to 3 have the first half of the features and a quarter of K each, warps 4 to 7 the
second. A tile has 16 features and 32 numbers of K of each warp, one after the other:

    +-----------------------------------+-----------------------------------+----
    | warp 0                            | warp 1                            | ...
    | half 0, 512 B   | half 1, 512 B   | half 0          | half 1          |
    +-----------------------------------+-----------------------------------+----

A half is one mma, for which lane 4 g + t loads 16 bytes, four words of two numbers:

    word        0             1             2             3
    feature     2 g           2 g + 1       2 g           2 g + 1
    K           +0, +1        +0, +1        +2, +3        +2, +3         from 8 t + 4 half on

So a lane's K of both halves are 8 neighbours, 8 t to 8 t + 7, which it loads of a row of x at once,
and the mma's rows g and g + 8, of which it has the sums, are features that it stores at once:
which place of an mma is whose is all the same, as long as both sides have it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import BFloat16
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import UInt16

from pallas_kernels.decode.cluster import sizes

# [L, part of K, u, t, half, pair, number, C, part, m, g, row // 8] of [L, K, N] as they lie, and
# back.
_AS_READ = (0, 7, 9, 2, 8, 1, 4, 10, 3, 5, 11, 6)
_AS_WRITTEN = tuple(_AS_READ.index(axis) for axis in range(len(_AS_READ)))


def join_heads(
  query: Float[Array, "*L H_Dk"],
  key: Float[Array, "*L H_Dk"],
  value: Float[Array, "*L H_Dv"],
  *,
  num_heads: int,
) -> Float[Array, "*L N"]:
  """The features of the first matrix: of each head its query, key and value, [H, 2 Dk + Dv]."""
  # Then a job needs neighbouring features only, from few thread blocks.
  by_head = [x.reshape(*x.shape[:-1], num_heads, -1) for x in (query, key, value)]
  joined = jnp.concatenate(by_head, axis=-1)
  return joined.reshape(*joined.shape[:-2], -1)


def pack(
  weight: BFloat16[Array, "L K N"],
  bias: Float[Array, "L N"],
  norm: tuple[Float[Array, "L K"], Float[Array, "L K"]] | None,
  *,
  C: int,
) -> UInt16[Array, "L C words"]:
  """Matrices as the kernel reads them.

  Args:
    weight: of the product.
    bias: that is added to it.
    norm: gain and shift of the norm before; None: there is none.
    C: thread blocks that share them.
  """
  L, K, N = weight.shape
  bias = bias.astype(jnp.float32)
  header = [bias]
  if norm is not None:
    # (x gain + shift) W + b = x (gain W) + (shift W + b), for x less its mean over its deviation.
    gain, shift = (x.astype(jnp.float32) for x in norm)
    wide = weight.astype(jnp.float32)
    bias = bias + jnp.einsum("LK,LKN->LN", shift, wide, precision="highest")
    weight = (wide * gain[:, :, None]).astype(weight.dtype)
    # Of the rounded weights, since the mean has been multiplied with these.
    header = [bias, weight.astype(jnp.float32).sum(axis=1)]
  # Tile by tile in the order of use, so that a slot of the ring is one copy of bytes in a row.
  w = weight.reshape(L, *_axes(K, N, C)).transpose(_AS_READ)
  header = _words(jnp.stack([x.reshape(L, C, -1) for x in header], axis=2)).reshape(L, C, -1)
  # One array of words for both, so that a thread block's share is one piece of memory.
  return jnp.concatenate([header, _words(w).reshape(L, C, -1)], axis=2)


def unpack(
  words: UInt16[Array, "L C words"], *, K: int, N: int
) -> tuple[BFloat16[Array, "L K N"], Float32[Array, "L N"], Float32[Array, "L N"] | None]:
  """What `pack` made: weights with the gain, the bias with the shift, and the columns' sums.

  Sums are None where there was no norm.
  """
  L, C, num_words = words.shape
  parts, odd = divmod(num_words - K * N // C, 2 * (N // C))  # of the header: two words a number
  if parts not in (1, 2) or odd:
    raise ValueError(f"{words.shape=} are not those of {K=}, {N=}: the header would be {parts=}")
  # Bytes change places only, so that everything comes back bit by bit.
  header, w = jnp.split(words, (parts * 2 * (N // C),), axis=2)
  header = jax.lax.bitcast_convert_type(header.reshape(L, C, parts, N // C, 2), jnp.float32)
  header = header.swapaxes(1, 2).reshape(L, parts, N)
  axes = _axes(K, N, C)
  w = w.reshape([(L, *axes)[axis] for axis in _AS_READ]).transpose(_AS_WRITTEN).reshape(L, K, N)
  w = jax.lax.bitcast_convert_type(w, jnp.bfloat16)
  return w, header[:, 0], header[:, 1] if parts == 2 else None


def _axes(K: int, N: int, C: int) -> tuple[int, ...]:
  """[K, N] as `_AS_READ` has them, without L."""
  # K falls into warps, steps, lanes' t, halves, and the two words and two numbers of each.
  matrix = sizes.Matrix(K, N // C, norm=False)
  of_k = (matrix.k_shares, matrix.k_steps, 4, 2, 2, 2)
  return *of_k, C, matrix.feature_shares, matrix.columns, 8, 2


def _words(x: Array) -> UInt16[Array, "..."]:
  return jax.lax.bitcast_convert_type(x, jnp.uint16)
