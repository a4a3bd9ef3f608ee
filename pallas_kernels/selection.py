"""Which blocks of keys a query reads, chosen while a model runs: pooled keys, scores, lists.

`pool_blocks` makes one key of every complete block, `select_blocks` scores those keys and lists the
best blocks for every group of neighbouring queries, and `sparse_attention(block_indices=...)` reads
what is listed. A list is made from its first query, the anchor, and from blocks that are complete
before the anchor's own block: no output depends on what comes after it, as exact likelihoods want.
MoBA (arXiv:2502.13189), NSA (arXiv:2502.11089) and DSA (arXiv:2512.02556) choose blocks or tokens
in this way for every query; here any number of neighbouring queries may share a list.
"""

import dataclasses
import functools
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Integer

from pallas_kernels import partitioning
from pallas_kernels import segments

Activation = Literal["none", "relu", "exp"]
Implementation = Literal["reference", "xla"]

ACTIVATIONS: tuple[Activation, ...] = ("none", "relu", "exp")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla")

_CHUNK = 128  # pooled keys that are scored at once
_ROWS = 1 << 14  # anchors that are scored at once, counted once per head
_NONE = np.int32(np.iinfo(np.int32).max)  # no block: where lists are sorted, after all of them


def pool_blocks(
  x: Float[Array, "B T Hx D"],
  block_size: int,
  *,
  weights: Float[Array, "Hx b"] | None = None,
  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
) -> Float[Array, "B nb Hx D"]:
  """The mean of every complete block of tokens, in float32, then in the dtype of x.

  Differentiable. The last block, where it is not complete, has none: it is never a candidate.

  Args:
    x: keys, values, or what else is to be pooled.
    block_size: b, tokens of a block.
    weights: the mean becomes a weighted one, with the softmax of these over the places of a block:
      zeros are the mean.
    segment_ids: packed sequences, equal ids side by side. The mean is over the tokens of a block
      whose id is that of its last token.

  Returns:
    nb = T // b pooled tokens.

  Raises:
    ValueError: shapes or numbers do not fit; the message says which.
  """
  _check_whole("block_size", block_size, 1)
  if getattr(x, "ndim", None) != 4:
    raise ValueError(f"x {_kind(x)}: must be an array of shape [B, T, Hx, D]")
  (B, T, Hx, D), b = x.shape, block_size
  if weights is not None and weights.shape != (Hx, b):
    raise ValueError(f"weights {_kind(weights)}: must have shape [Hx, block_size] = {[Hx, b]}")
  ids, _ = segments.checked(segment_ids, None, (B, T), (B, T))
  x32 = x[:, : T // b * b].reshape(B, T // b, b, Hx, D).astype(jnp.float32)
  if weights is None and ids is None:
    return x32.mean(axis=2).astype(x.dtype)
  counts = jnp.ones((1, 1, b, 1), bool)
  if ids is not None:
    of_blocks = jnp.asarray(ids)[:, : T // b * b].reshape(B, T // b, b, 1)
    counts = of_blocks == of_blocks[:, :, -1:]
  if weights is None:
    total = jnp.where(counts[..., None], x32, 0.0).sum(axis=2)
    return (total / counts.sum(axis=2, dtype=jnp.float32)[..., None]).astype(x.dtype)
  logits = weights.astype(jnp.float32).T[None, None]
  counts = jnp.broadcast_to(counts, (*counts.shape[:3], Hx))
  shares = jax.nn.softmax(jnp.broadcast_to(logits, counts.shape), axis=2, where=counts)
  return (shares[..., None] * x32).sum(axis=2).astype(x.dtype)


def select_blocks(
  q: Float[Array, "B T Hq D"],
  pooled: Float[Array, "B nb Hp D"],
  *,
  block_size: int,
  top: int,
  query_block: int | None = None,
  first: int = 1,
  local: int = 1,
  lists: int | None = None,
  scale: float | Float[Array, ""] | None = None,
  activation: Activation = "none",
  weights: Float[Array, "B T Hq"] | Float[Array, "B T Hq Hl"] | None = None,
  lse: Float[Array, "B T Hq"] | None = None,
  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> Int[Array, "B Hl nq top"]:
  """For every `query_block` queries the blocks that they read, for `sparse_attention`.

  List n is for the queries n Q ... n Q + Q - 1, where Q is `query_block`; its anchor is query n Q.
  It holds the blocks of these queries themselves, the forced ones, and the best of the candidates:
  the blocks j < n Q // b, b = `block_size`, by their importance

      I[n, j, list] = sum over heads h of w[n Q, h, list] f(scale q[n Q, h] . pooled[j] - c[n Q, h])

  in float32. Of equal importance the lower block comes first; NaN and -inf are never chosen. So a
  list depends on its anchor, and on complete blocks before it, and on nothing else.

  Indices carry no gradient. They have the name "attention_blocks" for policies of `jax.checkpoint`:
  a policy that does not save them computes them again for the backward pass, where near ties may
  fall otherwise than in the forward pass.

  Args:
    q: queries, or what else is scored against the pooled keys; only anchors are read.
    pooled: of `pool_blocks`, nb = T // block_size, in the dtype of q. Head h of q is scored with
      head h // (Hq // Hp).
    block_size: b, keys of a block.
    top: entries of a list: those of its own blocks and the forced ones included.
    query_block: Q, queries that share a list; None: `block_size`. One must divide the other. Of Q
      greater than b a list has Q / b own blocks.
    first: so many blocks from the beginning of the sequence are forced.
    local: the own block and the `local` - 1 blocks before it are forced.
    lists: Hl, lists per query: 1, Hp or Hq, each for as many neighbouring heads, whose importance
      is added up. None: Hp, or what `weights` say.
    scale: None: D ** -0.5.
    activation: f: "none", "relu", or "exp" (for the softmax over blocks, with `lse`).
    weights: w; None: 1 for the heads of a list. With [B, T, Hq, Hl] all heads count for each list.
    lse: c of "exp", the log-sum-exp of attention to the pooled keys; with "exp" alone.
    segment_ids: packed sequences, equal ids side by side: a block is a candidate if its last token
      has the id of the anchor. Pool with the same ids. Forced blocks are those of the row of the
      batch; `sparse_attention` with these ids masks what is in them of other sequences.
    implementation: "reference", which holds all scores, or "xla", which never does: chunks of
      pooled keys, of which it carries the best ones along. None: "xla".

  Returns:
    int32, nq = ceil(T / query_block); ascending, no block twice, -1 for no block, at the end.

  Raises:
    ValueError: shapes or numbers do not fit, or `top` is smaller than what is forced.
    NotImplementedError: another implementation is named.
  """
  query_block = block_size if query_block is None else query_block
  _check_implementation(implementation)
  q, pooled = (x if hasattr(x, "ndim") else jnp.asarray(x) for x in (q, pooled))
  _check_arrays(q, pooled, weights, lse, activation)
  _check_sizes(q, pooled, block_size, query_block, top, first, local)
  num_lists = _number_of_lists(q, pooled, weights, lists)
  T = q.shape[1]
  sharded = partitioning.mesh_of(q, pooled) is not None
  choice = _Choice(T, block_size, query_block, top, first, local, num_lists, activation, sharded)
  if choice.most_forced > top:
    own = max(1, query_block // block_size)
    raise ValueError(
      f"{top=}: must be at least {choice.most_forced}, the blocks that are always in a list: {own} "
      f"of its own, {first=} and {local=}, of query_block={query_block} and {block_size=}"
    )
  ids, _ = segments.checked(segment_ids, None, q.shape[:2], q.shape[:2])
  ids = None if ids is None else jnp.asarray(ids)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  of_blocks = None if ids is None else ids[:, block_size - 1 :: block_size]
  if lse is not None:  # no pooled key was visible, and none is a candidate
    lse = jnp.where(lse == -jnp.inf, 0.0, lse).astype(jnp.float32)
  anchors = jax.tree.map(lambda x: x[:, ::query_block], _Rows(q, weights, lse, ids))
  given = jax.lax.stop_gradient((anchors, pooled, of_blocks, jnp.asarray(scale, jnp.float32)))
  select = _all_at_once if implementation == "reference" else _in_chunks
  return checkpoint_name(select(choice, *given), "attention_blocks")


def select_at(
  q: Float[Array, "B Hq D"],
  pooled: Float[Array, "B nb Hp D"],
  step: Int[Array, ""] | int,
  *,
  length: int,
  block_size: int,
  top: int,
  query_block: int,
  first: int = 1,
  local: int = 1,
  lists: int,
  activation: Activation = "none",
  weights: Float[Array, "B Hq"] | Float[Array, "B Hq Hl"] | None = None,
  lse: Float[Array, "B Hq"] | None = None,
) -> Int[Array, "B Hl top"]:
  """The list of `select_blocks` whose anchor is the query at `step`, as a decoder wants it.

  Args:
    q: the anchor alone; `step` is a multiple of `query_block`, and may be traced.
    pooled: of at least length // block_size blocks; those that are not complete yet are not read.
    length: T of the whole sequence.
    block_size, top, query_block, first, local, lists, activation, weights, lse: as there; those
      that belong to queries without an axis of time.
  """
  choice = _Choice(length, block_size, query_block, top, first, local, lists, activation, False)
  lse = None if lse is None else jnp.where(lse == -jnp.inf, 0.0, lse).astype(jnp.float32)
  anchor = jax.tree.map(lambda x: x[:, None], _Rows(q, weights, lse, None))
  rows = jnp.asarray(step, jnp.int32)[None] // query_block
  blocks = jnp.arange(pooled.shape[1], dtype=jnp.int32)
  scale = jnp.asarray(q.shape[-1] ** -0.5, jnp.float32)
  is_one = choice.candidates(rows, blocks, None, None)
  scores = jnp.where(is_one, choice.importance(anchor, pooled, scale), -jnp.inf)
  best = choice.best(scores, jnp.broadcast_to(blocks, scores.shape))
  return choice.lists(rows, *best)[:, :, 0]


class _Rows(NamedTuple):
  """What is known of queries, or of anchors: arrays [B, rows, ...], None where there is nothing."""

  q: Any
  weights: Any
  lse: Any
  ids: Any


@dataclasses.dataclass(frozen=True)
class _Choice:
  """The arguments of a call of `select_blocks`, and whether a mesh may shard its arrays."""

  T: int
  block_size: int
  query_block: int
  top: int
  first: int
  local: int
  num_lists: int
  activation: Activation
  sharded: bool

  @property
  def nq(self) -> int:
    return -(-self.T // self.query_block)

  @property
  def before(self) -> int:
    """Forced blocks before the own ones, where there are so many."""
    return self.first + self.local - 1

  @property
  def most_own(self) -> int:
    """Own blocks of a list at most."""
    return -(-min(self.query_block, self.T) // self.block_size)

  @property
  def most_forced(self) -> int:
    rows = np.arange(self.nq)
    start, stop = self._own(rows)
    return int((stop - start + np.minimum(start, self.before)).max())

  @property
  def most_scored(self) -> int:
    """Entries of a list at most that are chosen by their scores."""
    candidates = (self.nq - 1) * self.query_block // self.block_size - self.before
    return max(0, min(candidates, self.top - self.before - 1))

  def _own(self, rows: Any) -> tuple[Any, Any]:
    """The first own block of lists, and the one after the last."""
    xp: Any = np if isinstance(rows, np.ndarray) else jnp
    last = xp.minimum((rows + 1) * self.query_block, self.T) - 1
    return rows * self.query_block // self.block_size, last // self.block_size + 1

  def stop(self, rows: Int[Any, "N"]) -> Int[Any, "N"]:
    """The block after the last candidate of lists; the first one is `first`."""
    return self._own(rows)[0] - (self.local - 1)

  def importance(
    self, anchors: _Rows, pooled: Float[Array, "B M Hp D"], scale: Float[Array, ""]
  ) -> Float[Array, "B Hl N M"]:
    """Of blocks for lists, in float32; NaN is -inf, and -0.0 is 0.0, for the order of ties."""
    (B, R, Hq, D), (C, Hp) = anchors.q.shape, pooled.shape[1:3]
    q = anchors.q.reshape(B, R, Hp, Hq // Hp, D)
    # "highest": a TPU would multiply float32 in bfloat16, a GPU in TF32.
    how = dict(precision="highest", preferred_element_type=jnp.float32)
    scores = scale * jnp.einsum("brpgd,bcpd->bpgrc", q, pooled, **how).reshape(B, Hq, R, C)
    if self.activation == "exp":
      scores = jnp.exp(scores - anchors.lse.transpose(0, 2, 1)[..., None])
    elif self.activation == "relu":
      scores = jnp.maximum(scores, 0.0)
    if anchors.weights is not None and anchors.weights.ndim == 4:
      w = anchors.weights.astype(jnp.float32)
      scores = jnp.einsum("bhrc,brhl->blrc", scores, w, precision="highest")
    else:
      if anchors.weights is not None:
        scores = scores * anchors.weights.astype(jnp.float32).transpose(0, 2, 1)[..., None]
      scores = scores.reshape(B, self.num_lists, -1, R, C).sum(axis=2)
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return jnp.where(scores == 0, 0.0, scores)  # a compiler removes `+ 0.0`

  def candidates(
    self, rows: Int[Array, "N"], blocks: Int[Array, "M"], ids: Any, of_blocks: Any
  ) -> Any:
    """Which blocks are candidates of which lists, [B or 1, 1, N, M]."""
    j = blocks[None, :]
    is_one = ((j >= self.first) & (j < self.stop(rows)[:, None]))[None, None]
    if ids is None:
      return is_one
    return is_one & (ids[:, None, :, None] == of_blocks[:, None, None, :])

  def best(
    self, scores: Float[Array, "B Hl N M"], blocks: Int[Array, "B Hl N M"]
  ) -> tuple[Float[Array, "B Hl N k"], Int[Array, "B Hl N k"]]:
    """The best blocks, of blocks that ascend where scores are equal, and their scores."""
    most = self.most_scored
    if self.sharded:  # the compiler gathers what top_k is of, and leaves a sort where it is
      lost, blocks = jax.lax.sort((-scores, blocks), num_keys=2)
      return -lost[..., :most], blocks[..., :most]
    scores, places = jax.lax.top_k(scores, most)  # of equal ones the first
    return scores, jnp.take_along_axis(blocks, places, axis=-1)

  def lists(
    self,
    rows: Int[Array, "N"],
    scores: Float[Array, "B Hl N k"],
    blocks: Int[Array, "B Hl N k"],
  ) -> Int[Array, "B Hl N top"]:
    """The own, the forced, and as many of the best blocks, best first, as there is room for."""
    start, stop = (x[:, None] for x in self._own(rows))
    own = start + jnp.arange(self.most_own, dtype=jnp.int32)[None]
    sinks = jnp.arange(self.first, dtype=jnp.int32)[None] + jnp.zeros_like(start)
    near = start - jnp.arange(1, self.local, dtype=jnp.int32)[None]
    forced = [
      jnp.where(own < stop, own, _NONE),
      jnp.where(sinks < start, sinks, _NONE),
      jnp.where(near >= self.first, near, _NONE),  # those before are among the first ones
    ]
    # Lists that have candidates have all forced blocks before their own ones too.
    room = self.top - self.before - (stop - start)
    rank = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    chosen = (scores > -jnp.inf) & (rank < room)[None, None]
    of_rows = jnp.concatenate(forced, axis=1)
    of_rows = jnp.broadcast_to(of_rows, (*scores.shape[:3], of_rows.shape[1]))
    found = jnp.concatenate([of_rows, jnp.where(chosen, blocks, _NONE)], axis=-1)
    found = jnp.sort(found, axis=-1)[..., : self.top]
    missing = self.top - found.shape[-1]
    found = jnp.pad(found, [(0, 0)] * 3 + [(0, missing)], constant_values=_NONE)
    return jnp.where(found == _NONE, -1, found)


@functools.partial(jax.jit, static_argnums=0)
def _all_at_once(choice: _Choice, anchors: _Rows, pooled: Array, of_blocks: Any, scale: Any):
  """Sorts all scores: the definition of the order."""
  B, nb = pooled.shape[:2]
  rows, blocks = (jnp.arange(n, dtype=jnp.int32) for n in (choice.nq, nb))
  scores = jnp.zeros((B, choice.num_lists, choice.nq, 0), jnp.float32)
  order = scores.astype(jnp.int32)
  if choice.most_scored:
    is_one = choice.candidates(rows, blocks, anchors.ids, of_blocks)
    scores = jnp.where(is_one, choice.importance(anchors, pooled, scale), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)
    order = order[..., : choice.most_scored]
    scores = jnp.take_along_axis(scores, order, axis=-1)
  return choice.lists(rows, scores, order)


@functools.partial(jax.jit, static_argnums=0)
def _in_chunks(choice: _Choice, anchors: _Rows, pooled: Array, of_blocks: Any, scale: Any):
  """Rows in pieces, and for each piece chunks of pooled keys, as far as its last anchor sees."""
  (B, nb), Hq, most = pooled.shape[:2], anchors.q.shape[2], choice.most_scored
  size = min(_CHUNK, max(nb, 1))
  chunks = _cut((pooled, of_blocks), size)
  several = B * Hq if isinstance(B, int) else Hq  # a symbolic batch
  at_once = min(choice.nq, max(1, _ROWS // several))
  rows = jnp.arange(-(-choice.nq // at_once) * at_once, dtype=jnp.int32).reshape(-1, at_once)

  def piece(xs: Any) -> Array:
    rows, anchors = xs

    def step(n: Any, best: Any) -> tuple:
      keys, ids = jax.tree.map(lambda x: x[n], chunks)
      blocks = n * size + jnp.arange(size, dtype=jnp.int32)
      is_one = choice.candidates(rows, blocks, anchors.ids, ids)
      scores = jnp.where(is_one, choice.importance(anchors, keys, scale), -jnp.inf)
      blocks = jnp.broadcast_to(blocks, scores.shape)
      # What is carried first: its blocks are the lower ones.
      both = zip(best, (scores, blocks), strict=True)
      return choice.best(*(jnp.concatenate(x, axis=-1) for x in both))

    shape = B, choice.num_lists, at_once, most
    best = jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    if most:
      if at_once == choice.nq:  # the end is known: a GPU need not ask the host after each chunk
        stop = min(max(int(choice.stop(np.array([choice.nq - 1]))[0]), 0), nb)
      else:
        stop = jnp.clip(choice.stop(rows[-1:])[0], 0, nb)
      best = jax.lax.fori_loop(0, -(-stop // size), step, best)
    return choice.lists(rows, *best)

  found = jnp.moveaxis(jax.lax.map(piece, (rows, _cut(anchors, at_once))), 0, 2)
  return found.reshape(B, choice.num_lists, -1, choice.top)[:, :, : choice.nq]


def _cut(tree: Any, size: int) -> Any:
  """[B, n, ...] -> [pieces, B, size, ...], padded."""

  def cut(x: Array) -> Array:
    num = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, num * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num, size, *x.shape[2:]), 1, 0)

  return jax.tree.map(cut, tree)


# ---------------------------------------------------------------------------------------- checks


def _check_whole(name: str, x: Any, least: int) -> None:
  whole = isinstance(x, int | np.integer) and not isinstance(x, bool)
  if not whole or x < least:
    raise ValueError(f"{name}={x!r}: must be a whole number >= {least}")


def _check_implementation(implementation: Any) -> None:
  if implementation is None or implementation in IMPLEMENTATIONS:
    return
  names = " and ".join(IMPLEMENTATIONS)
  if implementation in ("mosaic_gpu", "mosaic_tpu"):
    raise NotImplementedError(
      f"select_blocks: {implementation} is not supported, {names} are, and None is xla"
    )
  raise ValueError(f"{implementation=}: must be None or one of {', '.join(IMPLEMENTATIONS)}")


def _check_arrays(q: Any, pooled: Any, weights: Any, lse: Any, activation: Any) -> None:
  shapes = f"q {_kind(q)}, pooled {_kind(pooled)}"
  if not q.ndim == pooled.ndim == 4:
    raise ValueError(f"{shapes}: must have 4 axes, [B, T, Hq, D] and [B, nb, Hp, D]")
  (B, T, Hq, D), Hp = q.shape, pooled.shape[2]
  if pooled.shape[0] != B or pooled.shape[3] != D or q.dtype != pooled.dtype:
    raise ValueError(f"{shapes}: must agree in B, D and dtype")
  if 0 in q.shape or Hp == 0 or Hq % Hp:
    raise ValueError(f"{shapes}: Hp={Hp} must divide Hq={Hq}, and no axis of q may be empty")
  if activation not in ACTIVATIONS:
    raise ValueError(f"{activation=}: must be one of {', '.join(ACTIVATIONS)}")
  if (lse is None) == (activation == "exp"):
    given = "without lse" if lse is None else "with lse"
    raise ValueError(
      f"{activation=} {given}: 'exp' must come with lse, the log-sum-exp of attention to the "
      "pooled keys, and nothing else may"
    )
  if lse is not None and lse.shape != (B, T, Hq):
    raise ValueError(f"lse {_kind(lse)}: must have shape [B, T, Hq] = {[B, T, Hq]}")
  if weights is not None and (weights.ndim not in (3, 4) or weights.shape[:3] != (B, T, Hq)):
    raise ValueError(
      f"weights {_kind(weights)}: must have shape [B, T, Hq] = {[B, T, Hq]}, or [B, T, Hq, Hl]"
    )


def _check_sizes(q: Any, pooled: Any, block_size, query_block, top, first, local) -> None:
  least = dict(block_size=1, query_block=1, top=1, first=0, local=1)
  given = dict(block_size=block_size, query_block=query_block, top=top, first=first, local=local)
  for name, x in given.items():
    _check_whole(name, x, least[name])
  if block_size % query_block and query_block % block_size:
    raise ValueError(
      f"{query_block=} and {block_size=}: one must divide the other, so that a list has whole "
      "blocks of its own, or a part of one"
    )
  T, nb = q.shape[1], pooled.shape[1]
  if nb != T // block_size:
    raise ValueError(
      f"pooled {_kind(pooled)}: must have T // block_size = {T // block_size} blocks, of T={T} and "
      f"{block_size=}, as pool_blocks gives them"
    )


def _number_of_lists(q: Any, pooled: Any, weights: Any, lists: Any) -> int:
  Hq, Hp = q.shape[2], pooled.shape[2]
  if weights is not None and weights.ndim == 4:
    if lists not in (None, weights.shape[3]):
      raise ValueError(f"{lists=}: must be None or {weights.shape[3]}, as weights {_kind(weights)}")
    return weights.shape[3]
  if lists is None:
    return Hp
  if lists not in (1, Hp, Hq):
    raise ValueError(f"{lists=}: must be 1, Hp={Hp} or Hq={Hq} lists per query")
  return int(lists)


def _kind(x: Any) -> str:
  """Dtype and shape, for messages."""
  if not (hasattr(x, "shape") and hasattr(x, "dtype")):
    return type(x).__name__
  return f"{x.dtype}{list(x.shape)}"
