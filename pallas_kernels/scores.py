"""How a logit is made of a product q k: scale, then a soft cap, then any function of the pair."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import functions
from pallas_kernels.functions import Function


@dataclasses.dataclass(frozen=True)
class Scores:
  """The logits of products q k, which `__call__` makes.

  Attributes:
    scale: factor of the products; a traced one is part of `score_fn` in traced scores.
    soft_cap: c of c tanh(logit / c), which keeps logits inside -c ... c; None for no cap.
    score_fn: (logit, i, j, h) -> logit, of query i, key j and query head h.
    learned: which of the arrays that `traced` found may want gradients.
  """

  scale: float | Float[Array, ""]
  soft_cap: float | None = None
  score_fn: Callable[..., Any] | None = None
  learned: tuple[int, ...] = ()

  @property
  def only_scale(self) -> bool:
    """Whether logits are products times the scale."""
    return self.soft_cap is None and self.score_fn is None

  @property
  def of_positions(self) -> bool:
    """Whether traced logits depend on where a pair is, besides its head."""
    if self.score_fn is None:
      return False
    assert isinstance(self.score_fn, Function), "asked of traced scores"
    return self.score_fn.uses(1) or self.score_fn.uses(2)

  def traced(self, held: list) -> "Scores":
    """With what `score_fn` computes in its place, and what it holds added to `held`.

    A traced scale is something that a function holds.

    Raises:
      ValueError: `score_fn` fails, or does not give one floating point number for a pair.
    """
    scale_is_traced = isinstance(self.scale, jax.core.Tracer)
    if not scale_is_traced and (self.score_fn is None or isinstance(self.score_fn, Function)):
      return self
    name = "scale" if self.score_fn is None else f"score_fn={functions.name_of(self.score_fn)}"
    whole = Scores(self.scale, self.soft_cap, self.score_fn)._natural
    function = whole if scale_is_traced or self.score_fn is None else self.score_fn
    position = jax.ShapeDtypeStruct((), jnp.int32)
    args = jax.ShapeDtypeStruct((), jnp.float32), position, position, position
    first = len(held)
    try:
      score_fn = functions.trace(name, function, args, held, constant=False)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
      raise ValueError(
        f"{name}: is traced for one pair of JAX numbers: must branch by jax.numpy.where, and look "
        f"up jax.numpy arrays, not numpy's: {type(error).__name__}: {error}"
      ) from error
    except Exception as error:
      raise ValueError(
        f"{name}: fails for the (logit, i, j, h) of one pair: {type(error).__name__}: {error}"
      ) from error
    if not jnp.issubdtype(score_fn.result(name).dtype, jnp.floating):
      raise ValueError(
        f"{name}: gives {score_fn.result(name).dtype}, must give floating point numbers"
      )
    learned = [
      n
      for n, x in enumerate(held[first:], first)
      if isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    changes = dict(score_fn=score_fn, learned=tuple(learned))
    return dataclasses.replace(self, **changes) if not scale_is_traced else Scores(1.0, **changes)

  def __call__(
    self, products: Float[Array, "..."], i: Any, j: Any, h: Any, held: tuple = ()
  ) -> Float[Array, "..."]:
    """The logits of the pairs (i, j) of heads h, which broadcast against the products.

    Of traced scores, with what they hold.
    """
    logits = self.capped(products)
    if self.score_fn is not None:
      changed = self.score_fn(logits, i, j, h, held=held)
      logits = jnp.broadcast_to(changed, logits.shape).astype(logits.dtype)
    return logits

  def capped(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
    """What `score_fn` is given."""
    logits = products * self.scale
    return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)

  def _natural(self, product: Any, i: Any, j: Any, h: Any) -> Any:
    logit = self.capped(product)
    return logit if self.score_fn is None else self.score_fn(logit, i, j, h)


def attending(mask: Any, i: Any, j: Any) -> tuple:
  """Positions of pairs `[..., t, s]` with those that the mask hides moved to one that attends.

  A function may be anything at pairs that do not attend, and its derivative times 0 no number.
  """
  xp: Any = np if isinstance(mask, np.ndarray) else jnp
  first = xp.argmax(mask, axis=-1, keepdims=True)
  some = mask.any(axis=-1, keepdims=True)
  in_row = xp.take_along_axis(xp.broadcast_to(j, mask.shape), first, axis=-1)
  rows = xp.broadcast_to(i, some.shape)
  row = xp.argmax(some)  # of all rows, for those without keys
  i = xp.where(some, rows, rows.reshape(-1)[row])
  in_row = xp.where(some, in_row, in_row.reshape(-1)[row])
  return i, xp.where(mask, j, in_row)


def logits_of_learned(scores: Scores, held: Any, i: Any, j: Any, h: Any, mask: Any) -> tuple:
  """(products, learned arrays) -> logits where `mask` says, and those arrays.

  Args:
    held: what traced scores hold, those that are learned among it.
    i, j, h: positions and heads of the pairs; they broadcast to the products.
    mask: which pairs attend.
  """
  if scores.learned:
    i, j = attending(mask, i, j)

  def logits(products: Any, *values: Any) -> Any:
    given = list(held)
    for n, x in zip(scores.learned, values, strict=True):
      given[n] = x
    return scores(products, i, j, h, held=tuple(given))

  return logits, tuple(held[n] for n in scores.learned)
