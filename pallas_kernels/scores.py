"""How a logit is made of a product q k: scale, then a soft cap, then any function of the pair."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Scores:
  """The logits of products q k, which `__call__` makes.

  Attributes:
    scale: factor of the products.
    soft_cap: c of c tanh(logit / c), which keeps logits inside -c ... c; None for no cap.
    score_fn: (logit, i, j, h) -> logit, of query i, key j and query head h.
  """

  scale: float
  soft_cap: float | None = None
  score_fn: Callable[[Any, Any, Any, Any], Any] | None = None

  @property
  def only_scale(self) -> bool:
    """Whether logits are products times the scale."""
    return self.soft_cap is None and self.score_fn is None

  @property
  def reads_heads(self) -> bool:
    """Whether `score_fn` makes use of the number of a head."""
    if self.score_fn is None:
      return False
    number, logit = (
      jax.ShapeDtypeStruct((1, 1), jnp.int32),
      jax.ShapeDtypeStruct((1, 1), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(self.score_fn)(logit, *(number,) * 3).jaxpr
    head = jaxpr.invars[3]
    return any(var is head for eqn in jaxpr.eqns for var in eqn.invars) or head in jaxpr.outvars

  def from_head(self, first) -> "Scores":
    """The same where heads are counted from `first`."""
    if self.score_fn is None:
      return self
    score_fn = lambda logit, i, j, h: self.score_fn(logit, i, j, h + first)
    return dataclasses.replace(self, score_fn=score_fn)

  def __call__(self, products: Float[Array, "..."], i, j, h) -> Float[Array, "..."]:
    """The logits of the pairs (i, j) of heads h, which broadcast against the products."""
    logits = products * self.scale
    if self.soft_cap is not None:
      logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
    if self.score_fn is not None:
      i, j, h = (x[(None,) * (logits.ndim - x.ndim)] for x in (i, j, h))
      changed = self.score_fn(logits, i, j, h)
      logits = jnp.broadcast_to(changed, logits.shape).astype(logits.dtype)
    return logits
