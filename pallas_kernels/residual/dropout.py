"""Dropout masks as packed bits: a hash or a few for 32 elements, the same on any mesh."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.extend import random as hashes
from jax.sharding import AxisType
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Key
from jaxtyping import UInt32

from pallas_kernels.residual import fold

# Of the masks that a key gives; checkpoints have it. 1: `jax.random.bernoulli`, 2: `keep_bits`, by
# digits, 3: rates up to RARE by places.
VERSION = 3
WORD = 32
MOST_DIGITS = 32
TOLERANCE = 1e-3
# Up to this rate, the dropped elements of a word are drawn, rather than a bit for each element.
RARE = 1 / 64
MOST_DRAWN, PLACE_BITS = 6, 5  # of a word: a hash has 32 bits for their number, and for 6 places


@functools.cache
def digits_of(rate: float) -> tuple[int, ...]:
  """The binary digits of the probability 1 - rate to keep an element, the first one is worth 1/2.

  As few as give it, and the rate, to 1 part in 1,000: 2 for 0.25 (exact), 9 for 0.4, 11 for 0.1;
  never more than 32.
  """
  for count in range(1, MOST_DIGITS + 1):
    dropped = min(max(round(rate * 2**count), 1), 2**count - 1)
    if abs(dropped / 2**count - rate) <= TOLERANCE * min(rate, 1.0 - rate):
      break
  kept = 2**count - dropped
  digits = [kept >> n & 1 for n in reversed(range(count))]
  while not digits[-1]:
    digits.pop()
  return tuple(digits)


@functools.cache
def limits_of(rate: float) -> tuple[int, ...]:
  """Of a word, n or more places are drawn where 32 random bits are less than the n-th limit.

  For rates up to `RARE`. n has Poisson's distribution with the mean -32 log(1 - rate). Then how
  often each of 32 elements is drawn does not depend on the others, and with the probability `rate`
  it is at least once. More than 6 are left out: in 1 word of 20 million for 0.01, of 1 million for
  1/64.
  """
  mean = -WORD * math.log1p(-rate)
  exactly = [math.exp(-mean) * mean**n / math.factorial(n) for n in range(3 * MOST_DRAWN)]
  limits = [round(2**32 * math.fsum(exactly[n:])) for n in range(1, MOST_DRAWN + 1)]
  return (max(limits[0], 1), *limits[1:])


def keep_probability(rate: float) -> float:
  """1 - rate as limits or digits have it. What is kept is scaled by its inverse: without bias."""
  if rate == 0.0:
    return 1.0
  if rate <= RARE:
    at_least = [limit / 2**32 for limit in limits_of(rate)]
    # By the n-th place first: it is drawn, it is this element, and those before it were others.
    once = lambda n: at_least[n] * (1.0 - 1.0 / WORD) ** n / WORD
    return 1.0 - math.fsum(map(once, range(MOST_DRAWN)))
  return sum(digit / 2**n for n, digit in enumerate(digits_of(rate), 1))


def seed_of(key: Key[Array, "*B"]) -> UInt32[Array, "*B 2"]:
  """What `keep_bits` takes of a key."""
  words = jax.random.key_data(key)
  if words.shape[-1] == 2:
    return words
  bits = lambda key: jax.random.bits(key, (2,), jnp.uint32)
  return jax.vmap(bits)(key.reshape(-1)).reshape(*key.shape, 2)


def keep_bits(
  seed: UInt32[Array, "2"],
  rate: float,
  shape: tuple[int, ...],
  *,
  sharding: jax.NamedSharding | None = None,
) -> UInt32[Array, "*B W"]:
  """A bit for each element of `shape` [*B, E], 1 with the probability `keep_probability(rate)`.

  Bit c % 32 of word c // 32 is that of column c; W is E / 32, rounded up. Words are made of hashes
  of the number of the word in the whole array, so that a device makes its own share, and any mesh
  has the same bits: one hash for rates up to `RARE`, one for two of `digits_of` for others.

  Args:
    seed: of `seed_of`; another one for every array.
    rate: of elements that are dropped, in (0, 1).
    shape: of the whole array.
    sharding: of the words; None leaves it to the compiler.
  """
  shape = words_of(shape)
  if math.prod(shape) >= 2**32:
    raise ValueError(f"{shape=}: must be less than 2**32 words")
  explicit = sharding is not None and AxisType.Explicit in sharding.mesh.axis_types
  where = dict(out_sharding=sharding if explicit else None)
  number = jnp.zeros(shape, jnp.uint32, **where)
  for axis, size in enumerate(shape):
    own = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, **where)
    number = number * jnp.uint32(size) + own
  if sharding is not None and not explicit:
    number = jax.lax.with_sharding_constraint(number, sharding)
  # Not n alone, which would be an array that is made before a loop over layers, and read in it.
  hash_of = lambda n: hashes.threefry2x32_p.bind(*seed, number ^ (seed[1] + jnp.uint32(n)), number)
  return _by_places(hash_of, rate) if rate <= RARE else _by_digits(hash_of, rate)


def _by_places(hash_of, rate):
  """Zeros at the places that are drawn, several times maybe."""
  random, places = hash_of(0)
  drawn = []
  for n, limit in enumerate(limits_of(rate)):
    place = places >> jnp.uint32(PLACE_BITS * n) & jnp.uint32(WORD - 1)
    drawn.append((random < jnp.uint32(limit)).astype(jnp.uint32) << place)
  return ~functools.reduce(operator.or_, drawn)


def _by_digits(hash_of, rate):
  """Let p = 0.d1 d2 ... dm in binary be the probability of a 1.

  From the last digit to the first, `word | bits` for a 1 and `word & bits` for a 0 turns bits that
  are 1 with probability 0.d(n+1) ... dm into some with 0.dn ... dm: m random words make 32
  elements.
  """
  digits, words = digits_of(rate), []
  for n in range((len(digits) + 1) // 2):  # each hash has two words
    words += hash_of(n)
  bits = words[len(digits) - 1]  # the last digit is a 1
  for n in reversed(range(len(digits) - 1)):
    bits = words[n] | bits if digits[n] else words[n] & bits
  return bits


def same_masks(version: int, rate: float) -> bool:
  """Whether keys gave the masks of this `rate` in `version` that they give today."""
  return version == VERSION or rate == 0.0 or (version == 2 and rate > RARE)


def words_of(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of the words for the elements of an array."""
  return (*shape[:-1], -(-shape[-1] // WORD))


def masked(
  x: Float[Array, "*B E"], bits: UInt32[Array, "*B W"], rate: float
) -> Float[Array, "*B E"]:
  """x where a bit is 1, scaled up, and zeros elsewhere."""
  # A product: an array of zeros to choose from would be made, and kept, for a whole loop. Infinity
  # that is dropped gives NaN, no zero; a step with either is skipped.
  wide = fold.wide(x)  # in which the factor is no more rounded than the rate
  factors = unpack(bits, x.shape[-1]).astype(wide.dtype) * (1.0 / keep_probability(rate))
  return (wide * factors).astype(x.dtype)


def unpack(bits: UInt32[Array, "*B W"], width: int) -> Bool[Array, "*B E"]:
  """Whether each of `width` elements is kept."""
  places = jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * bits.ndim + (WORD,))
  kept = (bits[..., None] >> places) & jnp.uint32(1)
  return kept.reshape(*bits.shape[:-1], -1)[..., :width] == 1
