"""HOW a pattern is swept: free views of the sequence, schedules and predicates; never T x T.

A pattern is lowered to passes. A pass looks at q, k, v through a view in which its keys lie
together, and sweeps that view like plain causal attention. The key sets of a pattern's passes are
disjoint, so that their results merge into one softmax through their log-sum-exp.
"""

import dataclasses
import functools
from typing import Any
from typing import Literal

import numpy as np

from pallas_kernels import patterns
from pallas_kernels.lowering import blocks
from pallas_kernels.lowering import heads

ViewName = Literal["natural", "columns", "blocks", "summaries"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
  """One sweep of queries over keys.

  Attributes:
    view: which sequences the positions 0 ... T - 1, cut into rows of `stride`, are read as.
      "natural": one sequence, as it is. "columns": a column is a sequence. "blocks": a row is a
      sequence. "summaries": natural queries against `width` columns of every row as keys.
    stride: tokens per row of the view; unused by "natural".
    window: keys a query can see at most, itself included, where that bounds the sweep; as many
      after it, where not causal.
    distance: the pairs are all those of a sequence with `distance <= i - j` (and i - j < window);
      None where that does not describe them.
    pattern: whose blocks bound the sweep of a natural view; None where the causal ones do.
    block_size: of blocks that suit the pattern; 0 for any.
    starts: first summary column; head h of the pass uses starts[h % len(starts)].
    width: summary columns.
    finished: whether a query does not see the summaries of its own row.
  """

  view: ViewName
  stride: int = 1
  window: int | None = None
  distance: int | None = None
  pattern: patterns.Pattern | None = None
  block_size: int = 0
  starts: tuple[int, ...] = ()
  width: int = 0
  finished: bool = False

  def allowed(self, i: Any, j: Any) -> Any:
    """Whether pairs of one sequence attend, in original positions."""
    if self.pattern is not None:
      return self.pattern.allowed(i, j)
    if self.view == "summaries":
      return j // self.stride < i // self.stride if self.finished else j <= i
    return i - j >= self.distance

  @property
  def causal(self) -> bool:
    """Whether no query attends to a later key."""
    return self.pattern is None or self.pattern.causal

  def key_position(self, n: Any) -> Any:
    """The position of key n of a sequence (of the first sequence, where there are many)."""
    if self.view == "columns":
      return n * self.stride
    if self.view == "summaries":
      return n // self.width * self.stride + self.starts[0] + n % self.width
    return n

  def query_position(self, n: Any) -> Any:
    """The position of query n of a sequence (of the first sequence, where there are many)."""
    return n * self.stride if self.view == "columns" else n


@functools.lru_cache(maxsize=256)
def lower(
  pattern: patterns.Pattern, num_heads: int, natural: bool = False
) -> tuple[tuple[heads.Heads, tuple[Pass, ...]], ...]:
  """The heads that share passes, and their passes: ((heads, (Pass, ...)), ...).

  All heads in order where one lowering serves them all; `Fixed` sub-blocks are such a case.

  Args:
    natural: whether to sweep the natural view alone, in which positions are the original ones and
      queries and keys may differ in number.
  """
  passes = (lambda p: (natural_pass(p),)) if natural else passes_of
  groups = heads.by_pattern(pattern, num_heads, split_fixed=natural)
  return tuple((of_group, passes(shared)) for of_group, shared in groups)


def natural_pass(pattern: patterns.Pattern) -> Pass:
  """One pass over the natural view, for any pattern that all heads share."""
  window = pattern.window if isinstance(pattern, patterns.Local) else None
  block_size = pattern.block_size if isinstance(pattern, patterns.BlockLayout) else 0
  return Pass(view="natural", pattern=pattern, window=window, block_size=block_size)


def passes_of(pattern: patterns.Pattern) -> tuple[Pass, ...]:
  """The passes of a pattern that all its heads share (or of `Fixed`, whose heads shift)."""
  match pattern:
    case _ if not pattern.causal:
      return (natural_pass(pattern),)
    case patterns.Dense():
      return (_band("natural", 0),)
    case patterns.Local():
      return (dataclasses.replace(natural_pass(pattern), distance=0),)
    case patterns.Column(stride=stride):
      return (_band("columns", 0, stride),)
    case _ if both := patterns.window_and_stride(pattern):
      return _strided(*both)
    case patterns.Block(stride=stride):
      return (_band("blocks", 0, stride),)
    case patterns.Summary():
      return (_summaries((pattern,), finished=False),)
    case patterns.Fixed(summaries=summaries):
      return _fixed(summaries)
    case _ if summary := patterns.summary_of(pattern):
      return _fixed((summary,))
    case _:
      return (natural_pass(pattern),)


def tile_lists(
  pass_: Pass, num_queries: int, num_keys: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
  """For each tile of queries, the tiles of keys that may hold pairs.

  Returns:
    idx int32 [nq, K], K the longest list, padded with 0; and the list lengths, int32 [nq].
  """
  nq, nk = -(-num_queries // block_q), -(-num_keys // block_k)
  if pass_.pattern is not None:
    visit = blocks.blocks_of(pass_.pattern, num_queries, num_keys, block_q, block_k).some
  else:
    last_q = pass_.query_position(np.arange(1, nq + 1) * block_q - 1)[:, None]
    visit = pass_.key_position(np.arange(nk) * block_k)[None, :] <= last_q
  visit = np.asarray(visit)
  length = visit.sum(axis=1).astype(np.int32)
  # A stable sort of "not visited" moves the visited tiles to the front, in ascending order.
  idx = np.argsort(~visit, axis=1, kind="stable")[:, : max(1, length.max(initial=0))]
  return np.where(np.arange(idx.shape[1]) < length[:, None], idx, 0).astype(np.int32), length


def _band(view: ViewName, distance: int, stride: int = 1) -> Pass:
  return Pass(view=view, stride=stride, distance=distance)


def _strided(window: int, stride: int) -> tuple[Pass, ...]:
  """`Local(window) | Column(stride)`: the column leaves to the window what is in both."""
  local = passes_of(patterns.Local(window))
  return (*local, _band("columns", window, stride))


def _fixed(summaries: tuple[patterns.Summary, ...]) -> tuple[Pass, ...]:
  """`Block | Summary`: the summaries of the query's own block are left to the block."""
  block = patterns.Block(summaries[0].stride)
  return (*passes_of(block), _summaries(summaries, finished=True))


def _summaries(summaries: tuple[patterns.Summary, ...], *, finished: bool) -> Pass:
  stride, width = summaries[0].stride, summaries[0].width
  starts = tuple(summary.start for summary in summaries)
  return Pass(view="summaries", stride=stride, starts=starts, width=width, finished=finished)
