"""The backend protocol in jax.numpy: the passes of a group of heads merge into one softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.lowering import heads
from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.xla import listed
from pallas_kernels.xla import problems
from pallas_kernels.xla import views


def unsupported(plan: Plan) -> str | None:
  """None: it computes everything."""
  del plan


def takes_lists(plan: Plan) -> bool:
  """All, of any sizes."""
  del plan
  return True


def planned(plan: Plan) -> Plan:
  """With the views of all heads' passes; lists of blocks are swept as they are."""
  if plan.block_indices is not None:
    return plan
  groups = []
  for group in plan.lowered(natural=views.needs_positions(plan)):
    each = tuple(views.view_of(plan, pass_, group.heads) for pass_ in group.passes)
    groups.append(dataclasses.replace(group, kernels=each))
  return dataclasses.replace(plan, groups=tuple(groups))


def forward(plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T H Dv"], Any]:
  """The result, and the natural log-sum-exp of its logits; with the mass, where that is wanted."""
  if plan.block_indices is not None:
    out, lse, mass = listed.forward(plan, arrays)
    return out.astype(plan.dtype), (lse, mass) if plan.return_mass else lse
  parts = []
  for group in plan.groups:
    part = None
    for view in group.kernels:
      problem = problems.of_view(view, arrays, plan.scores, plan.block_size)
      new = view.restore(*problems.solve(problem, problem.forward, view.arrays(*arrays[:3])))
      part = new if part is None else heads.merge(*part, *new)
    parts.append(part)
  of_groups = [group.heads for group in plan.groups]
  out, lse = (heads.join(x, of_groups) for x in zip(*parts, strict=True))
  return out.astype(plan.dtype), lse


def natural_lse(plan: Plan, residual: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
  """What `forward` returned."""
  del plan
  return residual


def lse_of_natural(plan: Plan, lse: Float[Array, "B T H"]) -> Float[Array, "B T H"]:
  """What `forward` returned."""
  del plan
  return lse


def backward(
  plan: Plan,
  arrays: Arrays,
  out: Float[Array, "B T H Dv"],
  residual: Any,
  dout: Float[Array, "B T H Dv"],
  dlse: Float[Array, "B T H"] | None,
  dmass: Float[Array, "B T H top"] | None = None,
) -> Arrays:
  """Gradients of q, k, v and of learned arrays.

  With P = exp(S - lse) of the merged lse, dS = P (dP - delta), delta = rowsum(dout out) - dlse:
  every pass of a merged pattern uses the same two rows, and the merge is never differentiated.
  The mass m of a block, the sum of its P, adds its cotangent to dP, and dm m to delta.
  """
  lse, mass = residual if plan.return_mass else (residual, None)
  learned = [arrays.held[n] for n in plan.scores.learned]
  delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  delta = delta if dlse is None else delta - dlse
  delta = delta if dmass is None else delta + jnp.sum(dmass * mass, axis=-1)
  # A row without keys has no pair to use these, and its cotangent of lse = -inf may be anything.
  has_keys = jnp.isfinite(lse)
  lse, delta = jnp.where(has_keys, lse, 0.0), jnp.where(has_keys, delta, 0.0)
  if plan.block_indices is not None:
    grads, of_learned = listed.backward(plan, arrays, dout, lse, delta, dmass)
    pairs = zip((*grads, *of_learned), (*arrays[:3], *learned), strict=True)
    return plan.gradients(arrays, *(grad.astype(x.dtype) for grad, x in pairs))
  grads = tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays[:3])
  of_learned = [jnp.zeros(x.shape, jnp.float32) for x in learned]
  for group in plan.groups:
    for view in group.kernels:
      in_view, pull = jax.vjp(view.arrays, *arrays[:3])
      rows = view.queries(dout), view.queries(lse[..., None]), view.queries(delta[..., None])
      problem = problems.of_view(view, arrays, plan.scores, plan.block_size)
      *parts, each = problems.solve(problem, problem.backward, (*in_view, *rows))
      of_learned = [a + b.sum(axis=0) for a, b in zip(of_learned, each, strict=True)]
      parts = tuple(part.astype(x.dtype) for part, x in zip(parts, in_view, strict=True))
      grads = tuple(a + b.astype(jnp.float32) for a, b in zip(grads, pull(parts), strict=True))
  pairs = zip((*grads, *of_learned), (*arrays[:3], *learned), strict=True)
  return plan.gradients(arrays, *(grad.astype(x.dtype) for grad, x in pairs))
