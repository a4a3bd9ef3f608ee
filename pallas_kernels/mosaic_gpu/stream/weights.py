"""The weights of a softmax whose log-sum-exp is known, for gradients."""

import jax
import jax.numpy as jnp


def weights(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """exp2 of logits in base 2, less the log-sum-exp; 0 where masked."""
  p = jnp.exp2(x)
  return p if mask is None else jnp.where(mask, p, 0.0)


def where_attending(derivative: jax.Array, mask: jax.Array | None) -> jax.Array:
  """The derivative where pairs attend: of others it may be anything."""
  return derivative if mask is None else jnp.where(mask, derivative, 0.0)
