"""WHICH rows of a sequence a decode cache keeps for a pattern, where, and what a step reads.

One kind of memory per kind of head; a step always reads one contiguous piece of it.
(`arXiv:1904.10509`, section 4.3, has the patterns; how to decode them is ours.)
"""

import abc
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Integer

from pallas_kernels import patterns

Step = int | Integer[Array, ""]


class Rows(abc.ABC):
  """Slots for rows of keys and values: step t writes one of them, then reads `size` from `first`.

  Attributes:
    length: slots.
    size: how many of them a step reads.
  """

  length: int

  @property
  def size(self) -> int:
    return self.length

  def first(self, t: Step) -> Step:
    """The first slot that step t reads."""
    del t
    return 0

  @abc.abstractmethod
  def slot(self, t: Step) -> Step:
    """Where row t is written; beyond the end means the last slot."""

  @abc.abstractmethod
  def row(self, slot: Any, t: Step) -> Any:
    """The row that a slot holds after step t; nothing is there yet if it is negative or > t."""


@dataclasses.dataclass(frozen=True)
class All(Rows):
  """Every row, in order."""

  length: int

  def slot(self, t):
    return t

  def row(self, slot, t):
    return slot


@dataclasses.dataclass(frozen=True)
class Ring(Rows):
  """The last `length` rows, for windows and blocks."""

  length: int

  def slot(self, t):
    return t % self.length

  def row(self, slot, t):
    return t - (t - slot) % self.length


@dataclasses.dataclass(frozen=True)
class Columns(Rows):
  """Every row, those of a column side by side: [stride, blocks]. A step reads its column."""

  stride: int
  blocks: int

  @property
  def length(self):
    return self.stride * self.blocks

  @property
  def size(self):
    return self.blocks

  def first(self, t):
    return t % self.stride * self.blocks

  def slot(self, t):
    return self.first(t) + t // self.stride

  def row(self, slot, t):
    return slot % self.blocks * self.stride + slot // self.blocks


@dataclasses.dataclass(frozen=True)
class Summaries(Rows):
  """Of each of `blocks` blocks of `stride` rows the `width` from `start` on: [blocks, width].

  Rows between two summaries are written where the next one will be; those after the last go to a
  slot of their own, which is not read.
  """

  stride: int
  start: int
  width: int
  blocks: int

  @property
  def length(self):
    return self.width * self.blocks + 1

  @property
  def size(self):
    return self.width * self.blocks

  def slot(self, t):
    into = jnp.clip(t % self.stride - self.start, 0, self.width)
    return t // self.stride * self.width + into

  def row(self, slot, t):
    return slot // self.width * self.stride + self.start + slot % self.width


def of_pattern(
  pattern: patterns.Pattern, S: int, *, sparse: bool = True
) -> list[tuple[Rows, patterns.Pattern]]:
  """What to keep for one head's causal pattern over S rows, and which pattern reads it.

  A key that several of the patterns allow belongs to the first of them.

  Args:
    pattern: of one head.
    S: rows of the sequence.
    sparse: False keeps and reads every row, whatever the pattern.
  """
  everything = [(All(S), pattern)]
  chosen = _of_pattern(pattern, S) if sparse else everything
  return chosen if sum(rows.size for rows, _ in chosen) < S else everything


def _of_pattern(pattern, S):
  blocks = lambda stride: -(-S // stride)
  match pattern:
    case patterns.Local(window):
      return [(Ring(min(window, S)), pattern)]
    case patterns.Block(stride):
      return [(Ring(min(stride, S)), pattern)]
    case patterns.Column(stride):
      return [(Columns(min(stride, S), blocks(stride)), pattern)]
    case patterns.Summary(stride, width):
      return [(Summaries(stride, pattern.start, width, blocks(stride)), pattern)]
    case patterns.Strided():
      return _of_pattern(pattern.union, S)
    case patterns.Union() if summary := patterns.summary_of(pattern):
      stride = summary.stride  # the block that t lies in is in the ring
      earlier = Summaries(stride, summary.start, summary.width, blocks(stride) - 1)
      return [*_of_pattern(patterns.Block(stride), S), *([(earlier, summary)] * (earlier.size > 0))]
    case patterns.Union(members):
      return [part for member in members for part in _of_pattern(member, S)]
    case patterns.Intersection(members):
      single = [part[0][0] for part in (_of_pattern(x, S) for x in members) if len(part) == 1]
      return [(min([*single, All(S)], key=lambda rows: rows.size), pattern)]
    case _:
      return [(All(S), pattern)]
