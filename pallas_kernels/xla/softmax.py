"""One tile of logits: what it adds to an online softmax, and to the gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

NO_MAXIMUM = -1e30  # where a running maximum starts: finite, so that exp(-inf - it) is 0


def _matmul(equation: str, a: Array, b: Array) -> Array:
  """The product in the dtype of the second operand, summed in float32."""
  return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def start(q: Array, v: Array) -> tuple[Array, Array, Array]:
  """The online softmax before any key: weighted sum, running maximum, sum of weights."""
  rows = q.shape[:-1]
  zeros = jnp.zeros(rows, jnp.float32)
  return jnp.zeros((*rows, v.shape[-1]), jnp.float32), zeros + NO_MAXIMUM, zeros


def attend(
  q: Array, k: Array, v: Array, mask: Any, logits_of: Callable, state: Any
) -> tuple[Array, Array, Array]:
  """The online softmax after the keys k `[..., h, s, D]`."""
  total, top, weight = state
  logits = logits_of(_matmul("...td,...sd->...ts", q, k))
  new_top = jnp.maximum(top, jnp.max(logits, axis=-1, where=mask, initial=NO_MAXIMUM))
  weights = jnp.where(mask, jnp.exp(logits - new_top[..., None]), 0.0)
  keep = jnp.exp(top - new_top)
  total = total * keep[..., None] + _matmul("...ts,...sd->...td", weights, v)
  return total, new_top, weight * keep + weights.sum(axis=-1)


def finish(total: Array, top: Array, weight: Array) -> tuple[Array, Array]:
  """Output and log-sum-exp; zeros and -inf for a row without keys."""
  safe = jnp.where(weight == 0, 1.0, weight)
  return total / safe[..., None], jnp.where(weight == 0, -jnp.inf, top + jnp.log(safe))


def gradients(
  q: Array,
  k: Array,
  v: Array,
  dout: Array,
  lse: Array,
  delta: Array,
  mask: Any,
  logits_of: Callable,
  learned: Any,
) -> tuple:
  """What the pairs of one tile add to dq, dk, dv and to the gradients of learned arrays.

  lse and delta are `[..., h, t, 1]`.
  """
  logits, pull = jax.vjp(logits_of, _matmul("...td,...sd->...ts", q, k), *learned)
  weights = jnp.where(mask, jnp.exp(logits - lse), 0.0)
  dweights = _matmul("...td,...sd->...ts", dout, v)
  # A pair that is masked may have any logit, and any derivative of it.
  dproducts, *of_learned = pull(weights * (dweights - delta))
  dproducts = jnp.where(mask, dproducts, 0.0)
  of_learned = [jnp.where(mask.any(), x, 0.0).astype(jnp.float32) for x in of_learned]
  dq = _matmul("...ts,...sd->...td", dproducts, k)
  dk = _matmul("...ts,...td->...sd", dproducts, q)
  return dq, dk, _matmul("...ts,...td->...sd", weights, dout), of_learned
