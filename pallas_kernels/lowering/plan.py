"""One call of attention, planned once: what is computed, by which passes, with which kernels.

`sparse_attention` makes a `Plan` of every call, the backend adds its choices, and forward and
backward pass both read it. Plans are compared by content: calls that compute the same share a
compiled program. A user's function is in a plan as what was traced of it at this call
(`functions.Function`), so that what it holds is never taken from an earlier one.
"""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import functions
from pallas_kernels.lowering import passes
from pallas_kernels.lowering.heads import Heads
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

ArrayOrShape = Array | jax.ShapeDtypeStruct


class Arrays(NamedTuple):
  """What a call computes from; their gradients have the same form, with None for what has none.

  Attributes:
    q, k, v: queries, keys and values.
    segment_ids: int32, queries attend to keys of equal ones.
    kv_segment_ids: those of keys; None: keys have those of the queries.
    block_mask: which blocks of queries and keys attend.
    block_indices: or which blocks of keys a group of queries reads.
    held: what the plan's traced functions hold, by their `functions.Place`.
  """

  q: Float[Array, "B T H Dk"]
  k: Float[Array, "B S Hkv Dk"]
  v: Float[Array, "B S Hkv Dv"]
  segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  block_mask: Bool[Array, "Bm Hm nq nk"] | None = None
  block_indices: Int[Array, "Bi Hi nq top"] | None = None
  held: tuple[Array | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Group:
  """Query heads that are swept alike.

  Attributes:
    heads: their numbers, ascending.
    passes: disjoint sets of keys, under one softmax; none where a backend does without.
    kernels: what the backend chose for them; by itself hashable.
  """

  heads: Heads
  passes: tuple[Pass, ...]
  kernels: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """A call, but for its arrays.

  Attributes:
    pattern: which pairs attend, its predicates traced.
    scores: how logits are made, traced.
    B, T, S, H, Hkv, Dk, Dv: sizes; B may be symbolic.
    dtype: of q, k and v.
    segment_ids: whether there are any.
    kv_segment_ids: whether keys have others than queries.
    block_mask: batch rows and heads of the block mask; None without one.
    block_size: tokens of a block of the mask, keys of one that is listed; 0 without either.
    block_indices: batch rows and heads of the lists of blocks; None without them.
    query_block: queries that share a list; 0 without lists.
    return_lse: whether the caller wants the log-sum-exp.
    return_mass: whether the caller wants the share of each listed block.
    sharded: whether a mesh may shard the arrays, so that each device plans its own share.
    heads_are_numbered: whether a device may have other heads than the first, and logits depend
      on that.
    implementation: the name of the backend; "" before one is chosen.
    groups: all heads, in groups, with the choices of the backend; () before it made them.
  """

  pattern: Pattern
  scores: Scores
  B: Any
  T: int
  S: int
  H: int
  Hkv: int
  Dk: int
  Dv: int
  dtype: np.dtype
  segment_ids: bool = False
  kv_segment_ids: bool = False
  block_mask: tuple[Any, int] | None = None
  block_size: int = 0
  block_indices: tuple[Any, int] | None = None
  query_block: int = 0
  return_lse: bool = False
  return_mass: bool = False
  sharded: bool = False
  heads_are_numbered: bool = False
  implementation: str = ""
  groups: tuple[Group, ...] = ()

  @functools.cached_property
  def extras(self) -> frozenset[str]:
    """What the call has beyond the plain case, causal attention of T queries to T keys.

    "not_causal"; "lengths": T and S differ; "segment_ids"; "kv_segment_ids"; "block_mask";
    "block_indices"; "logits": they are more than products times a positive factor; "positions":
    they depend on where a pair is.
    """
    scores = self.scores
    has = dict(
      not_causal=not self.pattern.causal,
      lengths=self.T != self.S,
      segment_ids=self.segment_ids,
      kv_segment_ids=self.kv_segment_ids,
      block_mask=self.block_mask is not None,
      block_indices=self.block_indices is not None,
      logits=not scores.only_scale or scores.scale <= 0,
      positions=scores.of_positions,
    )
    return frozenset(name for name, is_there in has.items() if is_there)

  def lowered(self, *, natural: bool) -> tuple[Group, ...]:
    """The groups of heads that share passes.

    Args:
      natural: whether every pass must see sequences as they are; also where a view of whole rows
        would be longer than the sequence.
    """
    groups = passes.lower(self.pattern, self.H, natural)
    every = [pass_ for _, each in groups for pass_ in each]
    if any(pass_.view == "summaries" and pass_.stride > self.T for pass_ in every):
      groups = passes.lower(self.pattern, self.H, natural=True)
    return tuple(Group(heads, each) for heads, each in groups)

  def of_share(self, arrays: Arrays, scores: Scores) -> "Plan":
    """The plan of what one device has of sharded arrays, without groups yet."""
    sizes = _sizes(*arrays[:3], arrays.block_mask, arrays.block_indices)
    own = dict(scores=scores, sharded=False, heads_are_numbered=False, groups=())
    return dataclasses.replace(self, **sizes, **own)

  def gradients(self, arrays: Arrays, dq: Array, dk: Array, dv: Array, *of_learned) -> Arrays:
    """Those of all arrays; the last ones are of what `scores.learned` says."""
    held = [None] * len(arrays.held)
    for n, grad in zip(self.scores.learned, of_learned, strict=True):
      held[n] = grad
    return Arrays(dq, dk, dv, held=tuple(held))


def of_call(
  q: Float[ArrayOrShape, "B T H Dk"],
  k: Float[ArrayOrShape, "B S Hkv Dk"],
  v: Float[ArrayOrShape, "B S Hkv Dv"],
  *,
  pattern: Pattern,
  scores: Scores,
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
  kv_segment_ids: Int[Array | np.ndarray, "B S"] | None = None,
  block_mask: Bool[Array | np.ndarray, "Bm Hm nq nk"] | None = None,
  block_indices: Int[Array | np.ndarray, "Bi Hi nq top"] | None = None,
  block_size: int = 128,
  query_block: int | None = None,
  return_lse: bool = False,
  return_mass: bool = False,
) -> tuple[Plan, Arrays]:
  """Traces the functions of a call; its plan, and its arrays, of which shapes alone will do too.

  Raises:
    ValueError: a function fails, or does not give what it must.
  """
  held = []
  has_lists = block_indices is not None
  plan = Plan(
    pattern=functions.of_pattern(pattern, q.shape[1], k.shape[1], held),
    scores=scores.traced(held),
    **_sizes(q, k, v, block_mask, block_indices),
    dtype=np.dtype(q.dtype),
    segment_ids=segment_ids is not None,
    kv_segment_ids=kv_segment_ids is not None,
    block_size=0 if block_mask is None and not has_lists else block_size,
    query_block=(query_block or block_size) if has_lists else 0,
    return_lse=return_lse,
    return_mass=return_mass,
  )
  arrays = q, k, v, segment_ids, kv_segment_ids, block_mask, block_indices
  return plan, Arrays(*arrays, tuple(held))


def _sizes(q, k, v, block_mask, block_indices) -> dict[str, Any]:
  (B, T, H, Dk), (S, Hkv), Dv = q.shape, k.shape[1:3], v.shape[3]
  rows = lambda x: None if x is None else tuple(x.shape[:2])
  masks = dict(block_mask=rows(block_mask), block_indices=rows(block_indices))
  return dict(B=B, T=T, S=S, H=H, Hkv=Hkv, Dk=Dk, Dv=Dv, **masks)
