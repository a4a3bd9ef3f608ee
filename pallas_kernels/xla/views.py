"""q, k, v as a pass sees them: many independent problems of attention, and the way back."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Num

from pallas_kernels.lowering.heads import Heads
from pallas_kernels.lowering.heads import take
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.xla import sizes


def needs_positions(plan: Plan) -> bool:
  """Whether masks or logits want original positions, which only the natural view has."""
  return bool(plan.extras & {"lengths", "block_mask", "positions"})


def view_of(plan: Plan, pass_: Pass, of_group: Heads) -> "View":
  """How a pass of some heads is solved."""
  make = functools.partial(View, pass_, of_group, plan.B, plan.T, plan.H)
  short = pass_.window is not None and pass_.window <= sizes.TILE
  if pass_.view == "natural" and not needs_positions(plan) and pass_.causal and short:
    window = min(pass_.window, plan.T)
    # Blocks narrower than 64 waste the matrix units, wider ones waste logits outside the window.
    return make("windows", stride=min(max(window, 64), 256, plan.T), halo=window - 1)
  if pass_.view == "summaries":
    return make(pass_.view, pass_.stride)  # a summary column keeps its place in a short sequence
  return make(pass_.view, min(pass_.stride, plan.T))


@dataclasses.dataclass(frozen=True)
class View:
  """q, k, v of one pass and its heads as N problems, `[N, H, T, D]`, and the way back.

  A window becomes blocks of queries that each carry the keys of the window before them, unless
  original positions are needed; all other views are reshapes.

  Attributes:
    pass_: which pairs.
    heads: its query heads.
    B, T, H: batch rows, queries, and all query heads.
    kind: of the pass, or "windows".
    stride: tokens of a row of the view.
    halo: keys before the first query, in a block of a window.
  """

  pass_: Pass
  heads: Heads
  B: Any
  T: int
  H: int
  kind: str
  stride: int
  halo: int = 0

  @property
  def rows(self) -> int:
    """Of the view; the last one is padded."""
    return -(-self.T // self.stride)

  def arrays(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of the problems."""
    return self.queries(q), self.keys(k), self.keys(v)

  def queries(self, x: Num[Array, "B T H D"]) -> Num[Array, "N h t D"]:
    x = take(x, self.heads)
    if self.kind in ("natural", "summaries"):
      return x.transpose(0, 2, 1, 3)
    x = self._fold(x)  # [B, rows, stride, h, D]
    if self.kind == "columns":
      return x.transpose(0, 2, 3, 1, 4).reshape(-1, x.shape[3], self.rows, x.shape[4])
    return x.transpose(0, 1, 3, 2, 4).reshape(-1, x.shape[3], self.stride, x.shape[4])

  def keys(self, x: Num[Array, "B S Hkv D"]) -> Num[Array, "N h s D"]:
    x = jnp.repeat(x, self.H // x.shape[2], axis=2)
    if self.kind == "summaries":
      x, starts, width = self._fold(take(x, self.heads)), self.pass_.starts, self.pass_.width
      starts = [starts[h % len(starts)] for h in self.heads]
      columns = [x[:, :, start : start + width, n] for n, start in enumerate(starts)]
      x = jnp.stack(columns, axis=1)  # [B, h, rows, width, D]
      return x.reshape(*x.shape[:2], -1, x.shape[-1])
    x = self.queries(x)
    if self.kind != "windows":
      return x
    x = x.reshape(self.B, self.rows, *x.shape[1:])
    steps = -(-self.halo // self.stride)  # blocks that the window reaches back
    late = lambda n: jnp.pad(x, [(0, 0), (n, 0)] + [(0, 0)] * 3)[:, : self.rows]
    x = jnp.concatenate([late(n) for n in range(steps, -1, -1)], axis=3)
    x = x[:, :, :, steps * self.stride - self.halo :]
    return x.reshape(-1, *x.shape[2:])

  def restore(
    self, out: Float[Array, "N h t D"], lse: Float[Array, "N h t"]
  ) -> tuple[Array, Array]:
    """Results in the order of q: `[B, T, h, D]` and `[B, T, h]`."""
    return self._unfold(out), self._unfold(lse[..., None])[..., 0]

  def masks(self, arrays: Arrays) -> tuple:
    """What masks each of the problems, as `problems.Problem.masks` has it."""
    q_ids = k_ids = first_key = blocks = None
    ids, kv_ids, block_mask = arrays.segment_ids, arrays.kv_segment_ids, arrays.block_mask
    if ids is not None:
      per_head = lambda x: jnp.broadcast_to(x[:, :, None, None], (*x.shape, self.H, 1))
      ids = per_head(ids)
      kv_ids = ids if kv_ids is None else per_head(kv_ids)
      q_ids, k_ids = self.queries(ids)[..., 0], self.keys(kv_ids)[..., 0]
    if self.kind == "windows":  # keys before the sequence began
      first_key = np.maximum(0, self.halo - self.stride * np.arange(self.rows))
      first_key = jnp.tile(jnp.asarray(first_key, jnp.int32), self.B)
    if block_mask is not None:
      blocks = block_mask if block_mask.shape[1] == 1 else block_mask[:, np.asarray(self.heads)]
      blocks = jnp.broadcast_to(blocks, (self.B, *blocks.shape[1:]))
    return q_ids, k_ids, first_key, blocks

  def _fold(self, x: Any) -> Array:
    """`[B, T, h, D]` -> `[B, rows, stride, h, D]`, padded at the end: in the future of all."""
    x = jnp.pad(x, [(0, 0), (0, self.rows * self.stride - self.T), (0, 0), (0, 0)])
    return x.reshape(self.B, self.rows, self.stride, *x.shape[2:])

  def _unfold(self, x: Array) -> Array:
    if self.kind in ("natural", "summaries"):
      return x.transpose(0, 2, 1, 3)
    h, D = x.shape[1], x.shape[3]
    if self.kind == "columns":
      x = x.reshape(self.B, self.stride, h, self.rows, D).transpose(0, 3, 1, 2, 4)
    else:
      x = x.reshape(self.B, self.rows, h, self.stride, D).transpose(0, 1, 3, 2, 4)
    return x.reshape(self.B, self.rows * self.stride, h, D)[:, : self.T]
