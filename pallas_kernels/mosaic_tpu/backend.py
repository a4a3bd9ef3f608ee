"""The backend protocol on TPUs: every pass is a list of blocks of some view, one kernel for all.

The passes of a union merge through their log-sum-exp; their gradients add up, since each uses the
log-sum-exp and delta of the whole softmax.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import passes
from pallas_kernels import patterns
from pallas_kernels.mosaic_tpu import kernels
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu.kernels import LANES
from pallas_kernels.passes import Pass
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

DTYPES = ("bfloat16", "float32")
BLOCK = 512  # at most; blocks of layouts have to fit
_LOOKUPS = ("gather", "dynamic_slice", "argmax", "sort", "scan", "while", "cond")


def unsupported(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  block_mask: Array | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> str | None:
  """Why these kernels cannot compute this, and what they can; None where they can."""
  if q.dtype.name not in DTYPES:
    return f"mosaic_tpu: {q.dtype.name} is not supported, {' and '.join(DTYPES)} are"
  if max(q.shape[-1], v.shape[-1]) > 256:
    sizes = q.shape[-1], v.shape[-1]
    return f"mosaic_tpu: head sizes {sizes} are not supported, those up to 256 are"
  for heads, group in _lowered(pattern, q, k, segment_ids, block_mask, scores):
    for one in group:
      if one.pattern is not None and not _is_formula(one.pattern):
        return f"mosaic_tpu: {one.pattern} is not supported, its pairs are no formula"
      sweep = _Sweep(heads, one, q, k, v, segment_ids, block_mask, scores, block_size)
      if sweep.block is None:
        sizes = ", ".join(map(str, sweep.block_sizes))
        return (
          f"mosaic_tpu: blocks of {sizes} are not supported, multiples of 8 that divide 512 are"
        )
      words = sweep.words()
      if words > steps.MOST:
        return f"mosaic_tpu: lists of {words:,} words exceed {steps.MOST:,} of scalar memory"
  return None


def forward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
  """Result and natural log-sum-exp."""
  masks = segment_ids, block_mask, scores, block_size
  groups = _lowered(pattern, q, k, segment_ids, block_mask, scores)
  parts = []
  for heads, group in groups:
    sweeps = [_Sweep(heads, one, q, k, v, *masks) for one in group]
    parts.append(functools.reduce(_merge, [sweep.forward(q, k, v) for sweep in sweeps]))
  return tuple(_join(x, groups) for x in zip(*parts, strict=True))


def natural_lse(
  lse: Float[Array, "B T H"],
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> Float[Array, "B T H"]:
  """The natural log-sum-exp, from what `forward` returned."""
  del q, k, v, segment_ids, block_mask, pattern, scores, block_size
  return lse


def backward(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  segment_ids: Int[Array, "B T"] | None,
  block_mask: Bool[Array, "Bm Hm nq nk"] | None,
  out: Float[Array, "B T H Dv"],
  lse: Float[Array, "B T H"],
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B S Hkv Dk"], Float[Array, "B S Hkv Dv"]]:
  """Gradients of q, k and v, given those of the result and of its natural log-sum-exp or None."""
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
  delta = delta if dlse is None else delta - dlse
  empty = lse == -jnp.inf
  delta, lse = jnp.where(empty, 0.0, delta), jnp.where(empty, jnp.inf, lse)
  masks = segment_ids, block_mask, scores, block_size
  groups = _lowered(pattern, q, k, segment_ids, block_mask, scores)
  parts = []
  for heads, group in groups:
    mine = [x[:, :, np.asarray(heads)] for x in (dout, lse, delta)]
    grads = [_Sweep(heads, one, q, k, v, *masks).backward(q, k, v, *mine) for one in group]
    parts.append([sum(x[1:], x[0]) for x in zip(*grads, strict=True)])
  dq, dk, dv = (_join(x, groups) for x in zip(*parts, strict=True))
  add = lambda x: x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).sum(axis=3)
  return dq.astype(q.dtype), add(dk).astype(k.dtype), add(dv).astype(v.dtype)


def _lowered(pattern: Pattern, q, k, segment_ids, block_mask, scores: Scores):
  """Heads, and their passes. What speaks of positions, or differs in queries and keys: one view."""
  plain = scores.score_fn is None and segment_ids is None and block_mask is None
  natural = not plain or not pattern.causal or q.shape[1] != k.shape[1]
  groups = []
  for heads, group in passes.lower(pattern, q.shape[2], natural):
    several = max(len(one.starts) for one in group)
    for n in range(max(several, 1)):  # summaries of one start each
      mine = tuple(heads[n :: several or 1])
      starts = lambda one, n=n: one.starts[n : n + 1]
      if mine:
        groups.append((mine, tuple(_with_starts(one, starts(one)) for one in group)))
  return groups


def _with_starts(one: Pass, starts: tuple[int, ...]) -> Pass:

  return dataclasses.replace(one, starts=starts) if one.starts else one


@functools.lru_cache(maxsize=256)
def _is_formula(pattern: Pattern) -> bool:
  """Whether a kernel can compute the pairs, but for layouts, which have tables."""
  if isinstance(pattern, patterns.Union | patterns.Intersection):
    return all(map(_is_formula, pattern.patterns))
  if isinstance(pattern, patterns.BlockLayout):
    return True
  position = jax.ShapeDtypeStruct((8, LANES), jnp.int32)
  traced = jax.make_jaxpr(pattern.allowed)(position, position)
  text = str(traced)
  return not traced.consts and not any(f" {name}[" in text for name in _LOOKUPS)


class _Sweep:
  """One pass over some heads.

  Attributes:
    heads: the query heads.
    block: queries and keys of a block; None where the layouts fit no block.
    stride, R: tokens of a row of the view; sequences that lie beside each other in a row.
  """

  def __init__(self, heads, one: Pass, q, k, v, segment_ids, block_mask, scores, block_size):
    self.heads, self.one, self.masks = heads, one, (segment_ids, block_mask, block_size)
    self.T, self.S, self.H, self.Hkv = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    self.Dk, self.Dv = q.shape[-1], v.shape[-1]
    self.stride = 1 if one.view == "natural" else min(one.stride, max(self.T, 1))
    if one.view == "summaries":
      self.stride = one.stride
    rows = -(-self.T // self.stride)
    num_queries = {"columns": rows, "blocks": self.stride}.get(one.view, self.T)
    num_keys = {"columns": rows, "blocks": self.stride, "summaries": rows * one.width}
    num_keys = num_keys.get(one.view, self.S)
    self.R = self.stride if one.view == "columns" else 1
    leaves = kernels.leaves_of(one.pattern) if one.pattern is not None else ()
    self.block_sizes = sorted(
      {leaf.block_size for leaf in leaves} | ({block_size} if block_mask is not None else set())
    )
    self.block = _block(max(num_queries, num_keys), self.block_sizes)
    if self.block is not None:
      self.sweep = kernels.Sweep(one, self.block, num_queries, num_keys, scores, leaves)
    self.group = self.H // self.Hkv

  def words(self) -> int:
    """Of scalar memory."""
    found = max(self.static_steps(x).place.size for x in (False, True))
    ids, block_mask, _ = self.masks
    flags = 1
    if ids is not None or block_mask is not None:
      B = ids.shape[0] if ids is not None else block_mask.shape[0]
      flags = B * (len(self.heads) if block_mask is not None and block_mask.shape[1] > 1 else 1)
    return found * (1 + flags) + 3 * self.R * len(self.heads)

  def static_steps(self, transposed: bool) -> steps.Steps:
    s = self.sweep
    return steps.steps_of(s.one, s.num_queries, s.num_keys, self.block, s.rows_end, transposed)

  # ------------------------------------------------------------------------------------ launches

  def forward(self, q, k, v):
    """out [B, T, Hg, Dv] and the natural lse [B, T, Hg]."""
    queries, keys, values = self.queries(q), self.keys(k), self.keys(v)
    Dk, Dv, block = _up(self.Dk), _up(self.Dv), self.block
    inputs = dict(q=(queries, ("queries", Dk)), k=(keys, ("keys", Dk)), v=(values, ("keys", Dv)))
    found, more = self.steps(transposed=False)
    num, (B, T, _) = len(self.lanes()[0]), queries.shape
    outputs = dict(
      out=(jax.ShapeDtypeStruct((B, T, num * Dv), q.dtype), ("q_results", Dv)),
      lse=(jax.ShapeDtypeStruct((B, num, 1, T), jnp.float32), ("rows",)),
    )
    scratch = dict(top=(block, LANES), total=(block, LANES), acc=(block, Dv))
    rest = self.sweep, found, self.lanes(), inputs | more, outputs, scratch
    out, lse = kernels.launch("attention_forward", kernels.forward, *rest)
    return self.from_queries(out, self.Dv), self.from_rows(lse) * math.log(2)

  def backward(self, q, k, v, dout, lse, delta):
    """dq [B, T, Hg, Dk]; dk and dv [B, S, Hg, D] of query heads, float32."""
    Dk, Dv, block = _up(self.Dk), _up(self.Dv), self.block
    inputs = dict(
      q=(self.queries(q), ("queries", Dk)),
      k=(self.keys(k), ("keys", Dk)),
      v=(self.keys(v), ("keys", Dv)),
      dout=(self.queries(dout), ("q_results", Dv)),
      lse=(self.rows(lse * kernels.LOG2E, jnp.inf), ("rows",)),
      delta=(self.rows(delta, 0.0), ("rows",)),
    )
    num, (B, T, _), S = len(self.lanes()[0]), inputs["q"][0].shape, inputs["k"][0].shape[1]
    wide = lambda size, D: jax.ShapeDtypeStruct((B, size, num * D), q.dtype)
    found, more = self.steps(transposed=False)
    outputs = dict(dq=(wide(T, Dk), ("q_results", Dk)))
    scratch = dict(lse_s=(block, 8), delta_s=(block, 8), acc=(block, Dk))
    rest = self.sweep, found, self.lanes(), inputs | more, outputs, scratch
    (dq,) = kernels.launch("attention_dq", kernels.dq, *rest)
    found, more = self.steps(transposed=True)
    outputs = dict(dk=(wide(S, Dk), ("k_results", Dk)), dv=(wide(S, Dv), ("k_results", Dv)))
    scratch = dict(dk_s=(block, Dk), dv_s=(block, Dv))
    rest = self.sweep, found, self.lanes(), inputs | more, outputs, scratch
    dk, dv = kernels.launch("attention_dkv", kernels.dkv, *rest)
    dk, dv = self.from_keys(dk, self.Dk), self.from_keys(dv, self.Dv)
    return tuple(x.astype(jnp.float32) for x in (self.from_queries(dq, self.Dk), dk, dv))

  def lanes(self):
    """For every head of the view, where the arrays have its queries and its keys, and the head."""
    r = np.arange(self.R)[:, None]
    heads = np.asarray(self.heads)[None, :]
    q_lane, kv_lane = r * self.H + heads, r * self.Hkv + heads // self.group
    return tuple(x.reshape(-1) for x in (q_lane, kv_lane, np.broadcast_to(heads, q_lane.shape)))

  def steps(self, transposed: bool):
    """The steps, and the arrays that mask."""
    found, more = self.static_steps(transposed), {}
    ids, block_mask, block_size = self.masks
    nq, nk = (-(-n // self.block) for n in (self.sweep.num_queries, self.sweep.num_keys))
    for n, leaf in enumerate(self.sweep.leaves):
      more[f"table{n}"] = self.table(
        leaf.of_head(0).layout[None, None], leaf.block_size, transposed
      )
    if block_mask is not None:
      mine = block_mask[:, np.asarray(self.heads)] if block_mask.shape[1] > 1 else block_mask
      more["block_mask"] = self.table(mine, block_size, transposed)
      found = found.masked(*_joined_blocks(mine, block_size, self.block, nq, nk))
    if ids is not None:
      fill = lambda x: jnp.pad(x, [(0, 0), (0, nq * self.block - self.T)], mode="edge")
      ids = fill(ids)
      more["ids_of_lines"] = ids[:, :, None], ("lines",)
      more["ids_of_others"] = ids[:, None, :], ("others",)
      ids = ids.reshape(ids.shape[0], -1, self.block)
      low, high = ids.min(axis=2), ids.max(axis=2)
      meet = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
      one_id = (low == high)[:, :, None] & (low == high)[:, None, :]
      same = one_id & (low[:, :, None] == low[:, None, :])
      found = found.masked(meet[:, None], same[:, None])
    return found, more

  def table(self, layout, size: int, transposed: bool):
    """A block table as an input: its entries along the other axis repeated for every token."""
    if transposed:
      layout = layout.swapaxes(2, 3)
    num = self.sweep.num_queries if transposed else self.sweep.num_keys
    lines = self.sweep.num_keys if transposed else self.sweep.num_queries
    num, lines = (-(-n // self.block) * self.block for n in (num, lines))
    per_block, span = max(1, self.block // size), max(1, size // self.block)
    groups = -(-lines // (self.block * span))
    layout = jnp.asarray(layout).astype(jnp.int8)
    layout = jnp.repeat(layout, size, axis=3)[..., :num]
    fill = lambda n, length: (0, max(0, length - n))
    shape = layout.shape
    layout = layout[:, :, : groups * per_block]
    layout = jnp.pad(
      layout, [(0, 0), (0, 0), fill(layout.shape[2], groups * per_block), fill(shape[3], num)]
    )
    return layout.reshape(*shape[:2], groups, per_block, num), ("table", span)

  # ----------------------------------------------------------------------------------- the views

  def queries(self, x):
    """[B, T, H, D] -> [sequences, tokens, heads * D], whole blocks and whole lanes."""
    return self._folded(x)

  def keys(self, x):
    """The same of keys."""
    if self.one.view == "summaries":
      (start,) = self.one.starts
      x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
      x = x.reshape(x.shape[0], -1, self.stride, *x.shape[2:])
      x = x[:, :, start : start + self.one.width]
      x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return self._folded(x)

  def _folded(self, x):
    B, H = x.shape[0], x.shape[2]
    x = _padded(x, 3, _up(x.shape[3]))
    if self.one.view in ("columns", "blocks"):
      x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride)
    if self.one.view == "columns":
      x = x.reshape(B, -1, self.stride * H * x.shape[3])
    elif self.one.view == "blocks":
      x = x.reshape(-1, self.stride, H * x.shape[3])
    else:
      x = x.reshape(B, x.shape[1], -1)
    return _padded(x, 1, -(-x.shape[1] // self.block) * self.block)

  def from_queries(self, x, D: int):
    """The way back, [B, T, Hg, D]."""
    return self._unfolded(x, self.sweep.num_queries, D)[:, : self.T]

  def from_keys(self, x, D: int):
    """The same of keys, zeros where a view has none."""
    x = self._unfolded(x, self.sweep.num_keys, D)
    if self.one.view == "summaries":
      (start,), width = self.one.starts, self.one.width
      x = x.reshape(x.shape[0], -1, width, *x.shape[2:])
      x = jnp.pad(x, [(0, 0), (0, 0), (start, self.stride - start - width), (0, 0), (0, 0)])
      x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x[:, : self.S]

  def _unfolded(self, x, length: int, D: int):
    x, heads = x[:, :length], len(self.heads)
    if self.one.view == "columns":
      x = x.reshape(x.shape[0], length * self.R, heads, -1)
    elif self.one.view == "blocks":
      x = x.reshape(-1, -(-self.T // self.stride) * self.stride, heads, x.shape[2] // heads)
    else:
      x = x.reshape(*x.shape[:2], heads, -1)
    return x[..., :D]

  def rows(self, x, fill: float):
    """Numbers of queries [B, T, Hg] -> [sequences, heads, 1, tokens]; `fill` where none is."""
    B, _, heads = x.shape
    if self.one.view in ("columns", "blocks"):
      x = _padded(x, 1, -(-x.shape[1] // self.stride) * self.stride, fill)
    if self.one.view == "columns":
      x = x.reshape(B, -1, self.R * heads)
    elif self.one.view == "blocks":
      x = x.reshape(-1, self.stride, heads)
    x = _padded(x, 1, -(-x.shape[1] // self.block) * self.block, fill)
    return x.swapaxes(1, 2)[:, :, None]

  def from_rows(self, x):
    """The way back."""
    x = x[:, :, 0, : self.sweep.num_queries].swapaxes(1, 2)
    if self.one.view == "columns":
      x = x.reshape(x.shape[0], -1, len(self.heads))
    elif self.one.view == "blocks":
      x = x.reshape(-1, -(-self.T // self.stride) * self.stride, len(self.heads))
    return x[:, : self.T]


# ------------------------------------------------------------------------------------------ arrays


def _block(length: int, sizes) -> int | None:
  """Tokens of a block that blocks of `sizes` fill, or that fit into them."""
  fits = lambda block: all(
    (block % size == 0 and size % 8 == 0) or size % block == 0 for size in sizes
  )
  most = min(BLOCK, -(-length // LANES) * LANES)
  larger, smaller = range(most + LANES, BLOCK + 1, LANES), range(most, 0, -LANES)
  return next((n for n in (*smaller, *larger) if fits(n)), None)


def _joined_blocks(mask, size: int, block: int, nq: int, nk: int):
  """Whether some, and whether all entries of a block mask attend, in the blocks of a list."""
  split = max(1, size // block)
  mask = jnp.repeat(jnp.repeat(mask, split, axis=2), split, axis=3)
  per = max(1, block // size)
  shape = mask.shape
  mask = mask[:, :, : nq * per, : nk * per]
  fill = [(0, n * per - m) for n, m in zip((nq, nk), mask.shape[2:], strict=True)]
  cut = lambda x: x.reshape(*shape[:2], nq, per, nk, per)
  # What lies past the ends counts for neither.
  some = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill])).any(axis=(3, 5))
  every = cut(jnp.pad(mask, [(0, 0), (0, 0), *fill], constant_values=True)).all(axis=(3, 5))
  return some, every


def _merge(a, b):
  """One softmax over two disjoint key sets, each one's (out, lse)."""
  (out_a, lse_a), (out_b, lse_b) = a, b
  lse = jnp.logaddexp(lse_a, lse_b)
  weight = lambda x: jnp.exp(x - jnp.where(lse == -jnp.inf, 0.0, lse))[..., None]
  out = weight(lse_a) * out_a.astype(jnp.float32) + weight(lse_b) * out_b.astype(jnp.float32)
  return out.astype(out_a.dtype), lse


def _join(parts, groups):
  """The heads of groups, [B, T, Hg, ...] each, in order."""
  if len(parts) == 1:
    return parts[0]
  heads = np.concatenate([np.asarray(heads) for heads, _ in groups])
  return jnp.concatenate(parts, axis=2)[:, :, np.argsort(heads)]


def _up(size: int) -> int:
  """Features as whole lanes: narrower heads would share the lanes of one tile."""
  return -(-size // LANES) * LANES


def _padded(x, axis: int, size: int, fill: float = 0.0):
  if x.shape[axis] == size:
    return x
  width = [(0, size - x.shape[axis] if n == axis else 0) for n in range(x.ndim)]
  return jnp.pad(x, width, constant_values=fill)
