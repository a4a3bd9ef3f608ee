"""A synthetic text that asks for what stood far before: records, and later questions about them.

    filler ... 254 key value ... filler ... 255 key 253 ... 253 value ...

Records lie in the first half of a sequence, at random places, and questions in its last quarter,
one for each record. Nothing but the record tells a question's value, so that only attention that
reaches it can. Values of questions alone are scored.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Int
from jaxtyping import Integer
from jaxtyping import UInt8

NAME = "far_recall"
VERSION = "1.0.0"
RECORD, QUESTION, WAIT = 254, 255, 253
SIZES = {"train": 200_000, "validation": 200, "test": 1_000}  # sequences
_BEGINS = {"train": 0, "validation": 1, "test": 2}
_DENSITY = 512  # tokens for each record, where nobody says how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of the text.

  Attributes:
    records: of a sequence, each asked for once; 0: one per 512 tokens.
    key: bytes of a key. 1 is the easy form, in which keys (64 to 191), values (192 to 253) and
      filler (0 to 63) are different bytes; with more all are 0 to 127.
    delay: bytes between a question's key and its value, so that queries which share a list can have
      its anchor between the two: at least as many as share it, or 0 where none do.
  """

  records: int = 0
  key: int = 1
  delay: int = 0

  def count(self, seq_len: int) -> int:
    """Records of a sequence."""
    return self.records or max(1, seq_len // _DENSITY)

  @property
  def values(self) -> int:
    """Different values."""
    return 62 if self.key == 1 else 128

  def problem(self, seq_len: int) -> str | None:
    """Why there are no such sequences, as "data.recall.field=...: must be ..."; None: there are."""
    count = self.count(seq_len)
    need = max(2 * count * (self.key + 2), 4 * count * (self.key + 2 + self.delay))
    if need > seq_len:
      return (
        f"data.recall.records={self.records}: {count} records with questions need {need} tokens, "
        f"must fit model.{seq_len=}"
      )
    if self.key == 1 and count > 128:
      return f"data.recall.key=1: must be more for {count} records, which have different keys"
    return None


class Recall:
  """`dataset.Streams` of sequences that are made when they are read."""

  def __init__(self, seq_len: int, split: str, sizes: Sizes):
    self.seq_len, self.split, self.sizes = seq_len, split, sizes
    self.lengths = np.full(SIZES[split], seq_len)
    self._sequence = functools.lru_cache(maxsize=8)(self._made)

  def read(self, index: int, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
    return self._sequence(int(index))[start:stop]

  def _made(self, index: int) -> UInt8[np.ndarray, "T"]:
    # RandomState is frozen for good: a run goes on with the same sequences under another numpy.
    random = np.random.RandomState([_BEGINS[self.split], index])
    T, key, delay = self.seq_len, self.sizes.key, self.sizes.delay
    count = self.sizes.count(T)
    sequence = random.randint(0, 64 if key == 1 else 128, T).astype(np.uint8)
    if key == 1:
      keys = 64 + random.permutation(128)[:count, None]
      values = 192 + random.randint(0, self.sizes.values, count)
    else:
      keys = _distinct(random, count, key)
      values = random.randint(0, self.sizes.values, count)
    records = _places(random, count, key + 2, 0, T // 2)
    questions = _places(random, count, key + 2 + delay, 3 * T // 4, T)
    for n, (at, later) in enumerate(zip(records, random.permutation(questions), strict=True)):
      sequence[at : at + key + 2] = (RECORD, *keys[n], values[n])
      sequence[later : later + key + 2 + delay] = (QUESTION, *keys[n], *[WAIT] * delay, values[n])
    return sequence


def answers(tokens: Integer[Array, "B T"], sizes: Sizes) -> Bool[Array, "B T"]:
  """Which tokens of whole sequences are values of questions."""
  # No question is so near to the end that its value would come in from the left.
  return jnp.roll(tokens == QUESTION, sizes.key + 1 + sizes.delay, axis=1)


def _distinct(random: np.random.RandomState, count: int, key: int) -> Int[np.ndarray, "N key"]:
  keys = {}
  while len(keys) < count:
    keys[tuple(random.randint(0, 128, key).tolist())] = None
  return np.array(list(keys))


def _places(random, count: int, size: int, start: int, stop: int) -> Int[np.ndarray, "N"]:
  """The first tokens of `count` pieces in [start, stop) that do not touch each other's tokens."""
  free = stop - start - count * (size - 1)
  chosen = np.sort(random.permutation(free)[:count])
  return start + chosen + np.arange(count) * (size - 1)
