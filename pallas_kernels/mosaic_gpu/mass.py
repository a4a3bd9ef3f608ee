"""The share of each query's softmax on the blocks of its list, given the log-sum-exp."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels import xla
from pallas_kernels.lowering import heads
from pallas_kernels.lowering import indexed
from pallas_kernels.lowering import lists
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.mosaic_gpu import run_lists
from pallas_kernels.mosaic_gpu import stream


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def mass_of(plan: Plan, arrays: Arrays, lse: Float[Array, "B T H"]) -> Float[Array, "B T H top"]:
  """The mass of `sparse_attention(return_mass=True)`, float32.

  A call of its own, beside that of the result: who stops its gradient, as an indexer does, pays for
  none. The gradient is `xla`'s.

  Args:
    plan: of the call, with the kernels of its one group.
    arrays: of the call.
    lse: the natural log-sum-exp, of whose cotangent this gives a part.
  """
  (group,) = plan.groups
  (sweep,) = group.kernels
  frame = run_lists.frame_of(plan, group, arrays)
  of = run_lists.entries_of(plan, arrays, frame.problem)
  rows = sweep.view.rows(lse / math.log(2))
  q = heads.take(arrays.q, group.heads)
  sums = stream.masses_kernel(
    frame,
    q,
    arrays.k,
    *arrays[3:5],
    rows,
    width=of.blocks.shape[-1],
    scale=run_lists.factor(plan),
    blocks=sweep.dq_blocks,
  )
  return _of_lists(plan, arrays, frame.problem, of, sums)


def _of_lists(
  plan: Plan,
  arrays: Arrays,
  problem: lists.Problem,
  of: indexed.Entries,
  sums: Float[Array, "B H nq width size"],
) -> Float[Array, "B T H top"]:
  """What was summed by the entries of tiles, by those of lists."""
  wanted = indexed.blocks_of_lists(run_lists.listed_by(plan, arrays, problem.heads), problem)
  parts, flat = wanted.shape[3], wanted.reshape(*wanted.shape[:3], -1)
  entries = jnp.where(of.kinds == indexed.NONE, -1, of.blocks)
  entries, flat = _broadcast(entries, flat)
  same = entries[..., None, :] == flat[..., :, None]
  there, place = same.any(axis=-1) & (flat < problem.nk), same.argmax(axis=-1)
  B, H, nq, width, size = sums.shape
  # [.., entries of the tile, lists of it, queries of a list], and then entries of the lists.
  by_list = sums.reshape(B, H, nq, width, parts, size // parts)
  shape = (*place.shape[:2], nq, parts, -1)
  place, there = (jnp.swapaxes(x.reshape(shape), 3, 4)[..., None] for x in (place, there))
  place, there = (jnp.broadcast_to(x, (B, H, *x.shape[2:])) for x in (place, there))
  found = jnp.where(there, jnp.take_along_axis(by_list, place, axis=3), 0.0)
  top = arrays.block_indices.shape[-1]
  found = found.reshape(B, H, nq, top, -1, parts, size // parts).sum(axis=4)
  found = jnp.moveaxis(found, 3, -1).reshape(B, H, nq * size, top)
  return jnp.swapaxes(found[:, :, : plan.T], 1, 2)


def _broadcast(
  entries: Int[Array, "Be He nq width"], wanted: Int[Array, "Bi Hi nq n"]
) -> tuple[Int[Array, "B H nq width"], Int[Array, "B H nq n"]]:
  """Both of as many batch rows and heads: lists may be for all, and segments are not."""
  lead = jnp.broadcast_shapes(entries.shape[:3], wanted.shape[:3])
  return tuple(jnp.broadcast_to(x, (*lead, x.shape[3])) for x in (entries, wanted))


def _forward(plan: Plan, arrays: Arrays, lse: Array) -> tuple:
  # Named here: what a policy keeps is what the gradient reads.
  mass = checkpoint_name(mass_of(plan, arrays, lse), "attention_lse")
  return mass, (arrays, lse, mass)


def _backward(plan: Plan, residuals: tuple, dmass: Array) -> tuple:
  """Of P itself dS = P dmass; what it owes to the log-sum-exp goes there."""
  arrays, lse, mass = residuals
  plan = xla.planned(dataclasses.replace(plan, return_mass=True))
  nothing = jnp.zeros((*arrays.q.shape[:3], arrays.v.shape[-1]), plan.dtype)
  grads = xla.backward(plan, arrays, nothing, (lse, jnp.zeros_like(mass)), nothing, None, dmass)
  return grads, -(dmass * mass).sum(axis=-1)


mass_of.__wrapped__.defvjp(_forward, _backward)  # pyrefly: ignore[missing-attribute]
