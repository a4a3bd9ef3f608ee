"""The online softmax in base 2, as all kernels compute it.

Logits are x = q k before the scale; a weight is exp2(c (x - top)), c = scale log2(e), top the
largest x of the row so far. x c - top c is one operation that rounds once, but top c was rounded
before: of logits near 1e10 float32 keeps 2^10, and exp2 must not meet such an error.

A softmax over some keys is a `State`, and so is (out, lse, 1) of a softmax that is finished: a
kernel takes up where another one ended, which merges the passes of a union into one softmax.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced

NO_MAXIMUM = -1e30  # of a row before its first key: finite, so that exp2(-inf - it) is 0
HUGE = 2.0**20  # from here on float32 keeps less than an eighth of a logit in base 2


class State(NamedTuple):
  """The softmax of a tile of queries over the keys so far.

  Attributes:
    total: [rows, Dv], the sum of weights times values.
    top: [rows], the largest logit.
    weight: [rows], the sum of weights.
  """

  total: jax.Array
  top: jax.Array
  weight: jax.Array


def start(Dv: int) -> State:
  """Before any key."""
  return State(gpu.zeros((TILE, Dv)), gpu.full((TILE,), NO_MAXIMUM), gpu.full((TILE,), 0.0))


def resume(out: Ref, lse: Traced, scale: float) -> State:
  """What ended in `out`, a tile in shared memory, and `lse`, of base 2."""
  total = gpu.load(out, layout=gpu.WGMMA, optimized=False).astype(jnp.float32)
  # Under its lse as the maximum, a softmax that is finished has weight 1.
  top = jnp.maximum(lse * (1 / (scale * gpu.LOG2E)), NO_MAXIMUM)
  # A row that had no key goes on from nothing.
  return State(total, top, jnp.where(lse > NO_MAXIMUM, 1.0, 0.0))


def rescale(
  state: State | None, xs: Sequence[Traced], scale: float, Dv: int | None = None
) -> tuple[list[Traced], State]:
  """Weights of the logits `xs`, and the state with their keys, but for the values of these.

  The values are the caller's to add to `total`, which is in units of the new maximum. A state of
  None, before any key, saves the rescaling and takes `Dv`.
  """
  ps, top, factor = weights(xs, None if state is None else state.top, scale)
  weight = functools.reduce(jnp.add, ps).sum(axis=1)
  # Nothing to rescale: the first tile of keys starts the sums.
  if state is None:
    return ps, State(gpu.zeros((TILE, Dv)), top, weight)
  total = state.total * gpu.over_columns(factor, state.total.shape[1])
  return ps, State(total, top, state.weight * factor + weight)


def store(state: State, out: Ref, scale: float) -> Traced:
  """Writes the result of a state to shared memory and returns its lse."""
  mean, lse = finish(*state, scale)
  out[...] = mean.astype(out.dtype)
  return lse


def weights(
  xs: Sequence[Traced], top: Traced | None, scale: float
) -> tuple[list[Traced], Traced, Traced | None]:
  """Weights of tiles of logits, whose keys are the columns; new maxima and factor of what was.

  Args:
    xs: [rows, keys] each.
    top: maximum per row before, or None at the start.
  """
  c = scale * gpu.LOG2E
  new_top = functools.reduce(jnp.maximum, xs).max(axis=1)
  new_top = jnp.maximum(new_top, NO_MAXIMUM if top is None else top)
  # A power of two rounds nothing. The weights of such rows are 0 and 1 all the same.
  factor = jnp.where(jnp.abs(new_top * c) > HUGE, 2.0 ** math.floor(math.log2(c)), c)
  columns = lambda row, x: gpu.over_columns(row, x.shape[1])
  ps = [jnp.exp2(x * columns(factor, x) - columns(new_top * factor, x)) for x in xs]
  return ps, new_top, None if top is None else jnp.exp2((top - new_top) * factor)


def finish(total: Traced, top: Traced, weight: Traced, scale: float) -> tuple[Traced, Traced]:
  """The mean of values, and the log-sum-exp in base 2: 0 and -inf for rows without keys."""
  # A query may have no key at all: then the result is 0, as the reference has it.
  empty = weight == 0
  share = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, weight))
  lse = jnp.where(empty, -jnp.inf, top * (scale * gpu.LOG2E) + jnp.log2(weight))
  return total * gpu.over_columns(share, total.shape[1]), lse


def safe_lse(lse: Traced) -> Traced:
  """lse under which weights are computed again: inf for rows without keys, whose weights are 0.

  Huge ones are raised by what rounding may hide, so that no weight is above 1: in such rows all
  may vanish.
  """
  size = jnp.abs(lse)
  raised = lse + jnp.where(size > HUGE, size / HUGE, 0.0)
  return jnp.where(lse == -jnp.inf, jnp.inf, raised)
