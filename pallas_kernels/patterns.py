"""WHICH pairs attend: frozen, hashable index sets over (query i, key j), in numpy.

Every pattern is intersected with j <= i, unless it was built with `causal=False`. `a | b` is the
union under one softmax (a key in both counts once), `a & b` the intersection. The index sets are
those of "Generating Long Sequences with Sparse Transformers" (arXiv:1904.10509, section 4.3).
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool
from jaxtyping import Int

Positions = Any  # an integer, or an integer array of numpy, jax.numpy or a kernel

_MOST = (1 << 31) - 1  # of int32, in which positions are counted
_ROWS_AT_ONCE = 1 << 24  # entries of a row block when keys are counted without a formula


class Pattern(abc.ABC):
  """Base of all patterns: the pairs (i, j) that attend, per query head h."""

  @abc.abstractmethod
  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    """Whether query i of head h attends to key j; the arguments broadcast against each other."""

  @property
  def causal(self) -> bool:
    """Whether no query attends to a later key."""
    return True

  @property
  def period(self) -> int:
    """The smallest P such that head h has the pattern of head h % P."""
    cycle = [self.of_head(h) for h in range(self._cycle)]
    divisors = (p for p in range(1, len(cycle) + 1) if len(cycle) % p == 0)
    return next(p for p in divisors if cycle == cycle[:p] * (len(cycle) // p))

  @property
  def _cycle(self) -> int:
    return 1

  def of_head(self, h: int) -> "Pattern":
    """The pattern of one query head, the same for whoever asks."""
    del h
    return self

  def _allowed_by_head(self, i: Positions, j: Positions, h: Positions) -> Any:
    """`allowed` of a pattern whose heads take turns, as `of_head` says; h may be an array."""
    turn = h % self._cycle
    if isinstance(turn, int):
      return self.of_head(turn).allowed(i, j)
    pairs = [(turn == n) & self.of_head(n).allowed(i, j) for n in range(self._cycle)]
    return functools.reduce(lambda a, b: a | b, pairs)

  def mask(
    self, T: int, S: int | None = None
  ) -> Bool[np.ndarray, "T S"] | Bool[np.ndarray, "P T S"]:
    """The exact mask, by which every backend is judged.

    Args:
      T: number of queries.
      S: number of keys, T by default. Queries and keys both count from 0.

    Returns:
      `[T, S]` where all heads agree, else `[P, T, S]`: head h uses row h % P.
    """
    i, j = _range(0, T)[:, None], _range(0, T if S is None else S)[None, :]
    heads = [np.broadcast_to(self.allowed(i, j, h), (T, j.size)) for h in range(self.period)]
    return heads[0].copy() if len(heads) == 1 else np.stack(heads)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    """How many of T keys each of T queries of head h attends to, without a T x T array."""
    pattern = self.of_head(h)
    if type(pattern) is not type(self):
      return pattern.keys_per_query(T)
    counts, rows, j = np.empty(T, np.int64), max(1, _ROWS_AT_ONCE // max(T, 1)), _range(0, T)
    for start in range(0, T, rows):
      i = _range(start, min(start + rows, T))[:, None]
      block = np.broadcast_to(self.allowed(i, j, h), (i.size, T))
      counts[start : start + rows] = block.sum(axis=1)
    return counts

  def num_pairs(self, T: int) -> float:
    """Allowed pairs of T queries and T keys per head, averaged over the heads."""
    return sum(int(self.keys_per_query(T, h).sum()) for h in range(self.period)) / self.period

  def __or__(self, other: "Pattern") -> "Union":
    return Union(_flat(Union, self) + _flat(Union, other))

  def __and__(self, other: "Pattern") -> "Intersection":
    return Intersection(_flat(Intersection, self) + _flat(Intersection, other))


def draw(pattern: Pattern, T: int, h: int = 0) -> None:
  """Prints the mask of one head: a row per query, a column per key."""
  mask = pattern.of_head(h).mask(T)
  print("\n".join(" ".join("#" if pair else "." for pair in row) for row in mask))


# --------------------------------------------------------------------------- the paper's patterns


@dataclasses.dataclass(frozen=True)
class Dense(Pattern):
  """All keys so far: full attention.

  >>> draw(Dense(), T=4)
  # . . .
  # # . .
  # # # .
  # # # #
  """

  causal: bool = True

  def __post_init__(self) -> None:
    _check_causal(self)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return j <= i if self.causal else (i >= 0) & (j >= 0)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    return np.arange(1, T + 1) if self.causal else np.full(T, T)


@dataclasses.dataclass(frozen=True)
class Local(Pattern):
  """A sliding window: the last `window` keys, the query's own included; first strided head.

  The release's `local` with `local_attn_ctx=window`; with `causal=False`, |i - j| < window.

  >>> draw(Local(window=3), T=6)
  # . . . . .
  # # . . . .
  # # # . . .
  . # # # . .
  . . # # # .
  . . . # # #
  """

  window: int  # keys, the paper's l
  causal: bool = True

  def __post_init__(self) -> None:
    # Positions are int32: a window that is wider than all of them is no limit.
    if _is_whole(self.window):
      object.__setattr__(self, "window", min(int(self.window), _MOST))
    _check_whole(self, 1, "window")
    _check_causal(self)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    # No sum of a position and a window, which could leave int32.
    near = i - j < self.window
    return near & ((j <= i) if self.causal else (j - i < self.window))

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    before = np.minimum(np.arange(1, T + 1), self.window)
    return before if self.causal else before + before[::-1] - 1


@dataclasses.dataclass(frozen=True)
class Column(Pattern):
  """Every `stride`-th key back from the query, a dilated pattern; second strided head.

  The release's `strided`.

  >>> draw(Column(stride=2), T=6)
  # . . . . .
  . # . . . .
  # . # . . .
  . # . # . .
  # . # . # .
  . # . # . #
  """

  stride: int  # tokens, the paper's l; best near the square root of T

  def __post_init__(self) -> None:
    _check_whole(self, 1, "stride")

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return (j <= i) & ((i - j) % self.stride == 0)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    return np.arange(T) // self.stride + 1


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
  """`Local(stride) | Column(stride)`: both heads of strided attention merged (Eq. 7).

  >>> draw(Strided(stride=2), T=6)
  # . . . . .
  # # . . . .
  # # # . . .
  . # # # . .
  # . # # # .
  . # . # # #
  """

  stride: int  # tokens, the paper's l; best near the square root of T

  def __post_init__(self) -> None:
    _check_whole(self, 1, "stride")

  @property
  def union(self) -> "Union":
    """Its two heads, as a union."""
    return Local(self.stride) | Column(self.stride)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return self.union.allowed(i, j)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    return Local(self.stride).keys_per_query(T) + np.arange(T) // self.stride


@dataclasses.dataclass(frozen=True)
class Block(Pattern):
  """The keys of the query's own block of `stride`: the first head of fixed attention.

  >>> draw(Block(stride=3), T=6)
  # . . . . .
  # # . . . .
  # # # . . .
  . . . # . .
  . . . # # .
  . . . # # #
  """

  stride: int  # tokens, the paper's l

  def __post_init__(self) -> None:
    _check_whole(self, 1, "stride")

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return (j <= i) & (j // self.stride == i // self.stride)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    return np.arange(T) % self.stride + 1


@dataclasses.dataclass(frozen=True)
class Summary(Pattern):
  """Global tokens: `width` keys near the end of every block so far, the own one included.

  The second fixed head: keys with stride - offset - width <= j % stride < stride - offset. The
  first queries have none; attention gives them zeros.

  >>> draw(Summary(stride=3, width=1), T=6)
  . . . . . .
  . . . . . .
  . . # . . .
  . . # . . .
  . . # . . .
  . . # . . #
  """

  stride: int  # tokens, the paper's l
  width: int  # keys per block, the paper's c (8, 16 or 32 for a stride of 128 or 256)
  offset: int = 0  # keys between the summary and the end of its block

  def __post_init__(self) -> None:
    _check_whole(self, 1, "stride", "width")
    _check_whole(self, 0, "offset")
    if self.offset + self.width > self.stride:
      raise ValueError(
        f"{self}: width + offset = {self.offset + self.width} must lie within stride={self.stride}"
      )

  @property
  def start(self) -> int:
    """The first summary key of a block, counted from the block's first key."""
    return self.stride - self.offset - self.width

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    place = j % self.stride
    return (j <= i) & (place >= self.start) & (place < self.start + self.width)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    row, place = np.divmod(np.arange(T), self.stride)
    return self.width * row + np.clip(place - self.start + 1, 0, self.width)


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
  """`Block | Summary`: both heads of fixed attention merged, under one softmax.

  Head h reads the sub-block h % num_subblocks, counted from the end of a block, so that heads
  summarise different places (section 4.3). The release's `fixed`, where `num_verts=num_subblocks`
  and `vertsize` counts the summary in blocks of its kernel.

  >>> draw(Fixed(stride=4, summary=1), T=8)
  # . . . . . . .
  # # . . . . . .
  # # # . . . . .
  # # # # . . . .
  . . . # # . . .
  . . . # # # . .
  . . . # # # # .
  . . . # # # # #
  """

  stride: int  # tokens, the paper's l
  summary: int  # keys per block and head, the paper's c
  num_subblocks: int = 1

  def __post_init__(self) -> None:
    _check_whole(self, 1, "stride", "summary", "num_subblocks")
    if self.summary * self.num_subblocks > self.stride:
      raise ValueError(
        f"{self}: summary * num_subblocks = {self.summary * self.num_subblocks} "
        f"must not exceed stride={self.stride}"
      )

  @property
  def _cycle(self) -> int:
    return self.num_subblocks

  @property
  def summaries(self) -> tuple[Summary, ...]:
    """The second head of each sub-block: head h has `summaries[h % num_subblocks]`."""
    offsets = (n * self.summary for n in range(self.num_subblocks))
    return tuple(Summary(self.stride, self.summary, offset) for offset in offsets)

  def of_head(self, h: int) -> "Pattern":
    return Block(self.stride) | self.summaries[h % self.num_subblocks]

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return self._allowed_by_head(i, j, h)

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    row, place = np.divmod(np.arange(T), self.stride)
    return place + 1 + self.summary * row


# ---------------------------------------------------------------------------- any other pattern


@dataclasses.dataclass(frozen=True)
class PerHead(Pattern):
  """Head h uses `patterns[h % len(patterns)]`: multi-head attention with mixed patterns (Eq. 8).

  >>> draw(PerHead((Local(2), Column(2))), T=4, h=1)
  # . . .
  . # . .
  # . # .
  . # . #
  """

  patterns: tuple[Pattern, ...]

  def __post_init__(self) -> None:
    object.__setattr__(self, "patterns", tuple(self.patterns))
    if not self.patterns:
      raise ValueError("PerHead(patterns=()): give at least one pattern")
    for pattern in self.patterns:
      check(pattern, "PerHead(patterns)")

  @property
  def causal(self) -> bool:
    return all(p.causal for p in self.patterns)

  @property
  def _cycle(self) -> int:
    return math.lcm(len(self.patterns), *(p._cycle for p in self.patterns))

  def of_head(self, h: int) -> "Pattern":
    return self.patterns[h % len(self.patterns)].of_head(h)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return self._allowed_by_head(i, j, h)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout(Pattern):
  """Block (n, m) of queries and keys attends where `layout[n, m]`; beyond the layout nothing does.

  >>> draw(BlockLayout(np.eye(2, dtype=bool), block_size=2), T=5)
  # . . . .
  # # . . .
  . . # . .
  . . # # .
  . . . . .
  """

  layout: Bool[np.ndarray, "nq nk"] | Bool[np.ndarray, "P nq nk"]
  block_size: int  # tokens
  causal: bool = True

  def __post_init__(self) -> None:
    layout = np.array(self.layout)
    if layout.dtype != bool or layout.ndim not in (2, 3) or not layout.size:
      raise ValueError(
        f"BlockLayout(layout={layout.dtype}{list(layout.shape)}): must be a boolean table "
        "[nq, nk] or [P, nq, nk]"
      )
    _check_whole(self, 1, "block_size")
    _check_causal(self)
    layout.setflags(write=False)
    object.__setattr__(self, "layout", layout)

  def _key(self) -> tuple:
    return (self.layout.shape, self.layout.tobytes(), self.block_size, self.causal)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, BlockLayout) and self._key() == other._key()

  def __hash__(self) -> int:
    return hash(self._key())

  def __repr__(self) -> str:
    shape, density = list(self.layout.shape), self.layout.mean()
    return f"BlockLayout({shape}, block_size={self.block_size}, density={density:.3g})"

  @property
  def _cycle(self) -> int:
    return 1 if self.layout.ndim == 2 else len(self.layout)

  def of_head(self, h: int) -> "BlockLayout":
    if self.layout.ndim == 2:
      return self
    return BlockLayout(self.layout[h % len(self.layout)], self.block_size, self.causal)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    layout = self.layout[None] if self.layout.ndim == 2 else self.layout
    P, nq, nk = layout.shape
    xp = _namespace(i, j, h)
    n, m = xp.asarray(i // self.block_size), xp.asarray(j // self.block_size)
    pairs = xp.asarray(layout)[h % P, xp.minimum(n, nq - 1), xp.minimum(m, nk - 1)]
    pairs &= (n < nq) & (m < nk)
    return pairs & (j <= i) if self.causal else pairs

  def keys_per_query(self, T: int, h: int = 0) -> Int[np.ndarray, "T"]:
    layout = self.of_head(h).layout
    size, (nq, nk) = self.block_size, layout.shape
    i = np.arange(T)
    starts = np.arange(nk) * size
    row = np.minimum(i // size, nq - 1)
    counts = np.zeros(T, np.int64)
    for m in range(min(nk, -(-T // size))):  # a column of blocks at a time
      seen = np.clip((i + 1 if self.causal else T) - starts[m], 0, min(size, T - starts[m]))
      counts += layout[row, m] * seen
    return np.where(i // size < nq, counts, 0)


@dataclasses.dataclass(frozen=True)
class Where(Pattern):
  """The pairs for which `predicate(i, j)` holds.

  The predicate gives a boolean for every pair, or an integer that is not 0 where it attends. With
  operators only it runs on numpy, on jax.numpy and inside kernels; it may also look up arrays, and
  then those of jax.numpy by choice: one that only numpy can run is asked for all pairs, and kept as
  a table of T x S bits. What it holds is read at every call of attention; masks that depend on
  traced arrays are `reference`'s and `xla`'s, which then visits all blocks that may attend.
  Positions are int32 everywhere: i * j overflows beyond 46,341.

  >>> draw(Where(lambda i, j: (i - j) ** 2 != 1), T=4)
  # . . .
  . # . .
  # . # .
  # # . #
  """

  predicate: Callable[[Positions, Positions], Any]
  causal: bool = True

  def __post_init__(self) -> None:
    if not callable(self.predicate):
      raise ValueError(f"Where(predicate={self.predicate!r}): must be a function of (i, j)")
    _check_causal(self)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    pairs = self.predicate(i, j)
    pairs = pairs if hasattr(pairs, "dtype") else np.asarray(pairs)
    check_pairs(getattr(self.predicate, "__qualname__", repr(self.predicate)), pairs.dtype)
    if pairs.dtype != bool:
      pairs = pairs != 0
    if self.causal:
      return pairs & (j <= i)
    return pairs if pairs.ndim else pairs & (i >= 0) & (j >= 0)  # of one value for all


@dataclasses.dataclass(frozen=True)
class _Combined(Pattern):
  """Several patterns joined pair by pair."""

  patterns: tuple[Pattern, ...]

  def __post_init__(self) -> None:
    for pattern in self.patterns:
      check(pattern, f"{type(self).__name__}(patterns)")

  @property
  def _cycle(self) -> int:
    return math.lcm(*(p._cycle for p in self.patterns))

  def of_head(self, h: int) -> "Pattern":
    return type(self)(tuple(p.of_head(h) for p in self.patterns))


@dataclasses.dataclass(frozen=True)
class Union(_Combined):
  """`a | b`: the pairs of either, under one softmax; a key in both counts once.

  >>> draw(Block(2) | Column(3), T=4)
  # . . .
  # # . .
  . . # .
  # . # #
  """

  @property
  def causal(self) -> bool:
    return all(p.causal for p in self.patterns)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return functools.reduce(lambda a, b: a | b, (p.allowed(i, j, h) for p in self.patterns))


@dataclasses.dataclass(frozen=True)
class Intersection(_Combined):
  """`a & b`: the pairs of both.

  >>> draw(Local(3) & Column(2), T=4)
  # . . .
  . # . .
  # . # .
  . # . #
  """

  @property
  def causal(self) -> bool:
    return any(p.causal for p in self.patterns)

  def allowed(self, i: Positions, j: Positions, h: Positions = 0) -> Any:
    return functools.reduce(lambda a, b: a & b, (p.allowed(i, j, h) for p in self.patterns))


# ------------------------------------------------------------------------------------- helpers


def summary_of(pattern: Pattern) -> Summary | None:
  """The summaries of `Block | Summary` in either order, a head of `Fixed`; else None."""
  if not isinstance(pattern, Union) or len(pattern.patterns) != 2:
    return None
  match sorted(pattern.patterns, key=lambda part: isinstance(part, Summary)):
    case [Block(stride=stride), Summary() as summary] if summary.stride == stride:
      return summary
  return None


def window_and_stride(pattern: Pattern) -> tuple[int, int] | None:
  """Those of `Local | Column` in either order, or of `Strided`; None for other patterns."""
  pattern = pattern.union if isinstance(pattern, Strided) else pattern
  if not isinstance(pattern, Union) or len(pattern.patterns) != 2:
    return None
  match sorted(pattern.patterns, key=lambda part: isinstance(part, Column)):
    case [Local(window=window), Column(stride=stride)]:
      return window, stride
  return None


def check(pattern: Any, name: str) -> None:
  """Raises ValueError for what is no pattern, and says what would be one."""
  if isinstance(pattern, Pattern):
    return
  if isinstance(pattern, type) and issubclass(pattern, Pattern):
    hint = f"the class: make one, as {pattern.__name__}() or with its numbers"
  elif hasattr(pattern, "shape"):
    hint = (
      f"an array {pattern.dtype}{list(pattern.shape)}: a table of blocks is "
      "patterns.BlockLayout(table, block_size), or block_mask where it is traced"
    )
  else:
    hint = f"{pattern!r}"
  raise ValueError(f"{name}={hint}; must be a pattern, such as patterns.Strided(128)")


def check_pairs(predicate: str, dtype: Any) -> None:
  """Raises ValueError where a predicate gives what is neither boolean nor integer."""
  if np.dtype(dtype).kind not in "biu":
    raise ValueError(
      f"Where(predicate={predicate}): gives {dtype}, must give booleans, or integers that are not "
      "0 where a pair attends"
    )


def by_content(pattern: Pattern) -> Pattern:
  """The pattern, with those of other classes than ours that are not equal by content as predicates.

  What is made of a pattern is kept, and found again by equality: what is equal only to itself, or
  cannot be hashed, may have changed meanwhile.
  """
  if isinstance(pattern, PerHead | _Combined):
    parts = tuple(by_content(part) for part in pattern.patterns)
    same = all(new is old for new, old in zip(parts, pattern.patterns, strict=True))
    return pattern if same else type(pattern)(parts)
  kind = type(pattern)
  if kind.__module__ == __name__:
    return pattern
  try:
    hash(pattern)
    if kind.__hash__ is not object.__hash__:
      return pattern
  except TypeError:
    pass

  def of_head(h: int) -> Where:
    predicate = lambda i, j: pattern.allowed(i, j, h)
    predicate.__qualname__ = kind.__name__  # its name in messages
    return Where(predicate, causal=pattern.causal)

  heads = tuple(of_head(h) for h in range(pattern.period))
  return heads[0] if len(heads) == 1 else PerHead(heads)


def replaced(pattern: Pattern, change: Callable[["Where"], Pattern]) -> Pattern:
  """The pattern with every `Where` in it changed."""
  if isinstance(pattern, Where):
    return change(pattern)
  if isinstance(pattern, PerHead | _Combined):
    parts = tuple(replaced(part, change) for part in pattern.patterns)
    return pattern if parts == pattern.patterns else type(pattern)(parts)
  return pattern


def _is_whole(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_whole(pattern: Pattern, least: int, *names: str) -> None:
  """Fields are whole numbers that positions, int32, can be compared with; kept as Python's."""
  for name in names:
    value = getattr(pattern, name)
    if not _is_whole(value) or not least <= value <= _MOST:
      raise ValueError(
        f"{type(pattern).__name__}({name}={value!r}): must be a whole number >= {least} and, as "
        f"positions are int32, <= {_MOST}"
      )
    object.__setattr__(pattern, name, int(value))


def _check_causal(pattern: Pattern) -> None:
  if not isinstance(pattern.causal, bool | np.bool_):
    raise ValueError(f"{type(pattern).__name__}(causal={pattern.causal!r}): must be True or False")


def _range(start: int, stop: int) -> Int[np.ndarray, "n"]:
  """Positions in the dtype that kernels count in, so that a predicate sees the same everywhere."""
  return np.arange(start, stop, dtype=np.int32)


def _flat(kind: type, pattern: Pattern) -> tuple[Pattern, ...]:
  return pattern.patterns if type(pattern) is kind else (pattern,)


def _namespace(*positions: Positions) -> Any:
  """jax.numpy if any position is a JAX array, else numpy: a table is indexed by its own kind."""
  arrays = (x for x in positions if not isinstance(x, int | np.generic | np.ndarray))
  return next((x.__array_namespace__() for x in arrays), np)
