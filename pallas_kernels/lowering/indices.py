"""Blocks that are listed: who shares a list, and the block mask that lists mean."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Int

from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan


def of_blocks(indices: Int[Array, "Bi Hi nq top"], nk: int) -> Bool[Array, "Bi Hi nq nk"]:
  """Whether a list has a block; numbers that are no block count for none."""
  blocks = jnp.arange(nk, dtype=indices.dtype)
  return (indices[..., None] == blocks[None, None, None, None]).any(axis=-2)


def per_query_head(plan: Plan, indices: Int[Array, "Bi Hi nq top"]) -> Int[Array, "Bi H nq top"]:
  """With a list for every query head, or one for all of them."""
  if indices.shape[1] in (1, plan.H):
    return indices
  return jnp.repeat(indices, plan.H // plan.Hkv, axis=1)


def as_mask(plan: Plan) -> Plan:
  """The plan of the same call with a block mask, of blocks as large as both kinds allow."""
  assert plan.block_indices is not None
  rows, of_heads = plan.block_indices
  block_mask = rows, 1 if of_heads == 1 else plan.H
  size = math.gcd(plan.block_size, plan.query_block)
  no_lists = dict(block_indices=None, query_block=0)
  return dataclasses.replace(plan, block_mask=block_mask, block_size=size, **no_lists)


def mask_of(plan: Plan, arrays: Arrays) -> Arrays:
  """The arrays for `as_mask(plan)`, of those for the plan itself."""
  size = math.gcd(plan.block_size, plan.query_block)
  mask = of_blocks(per_query_head(plan, arrays.block_indices), -(-plan.S // plan.block_size))
  mask = jnp.repeat(mask, plan.query_block // size, axis=2)[:, :, : -(-plan.T // size)]
  mask = jnp.repeat(mask, plan.block_size // size, axis=3)[..., : -(-plan.S // size)]
  return arrays._replace(block_mask=mask, block_indices=None)
