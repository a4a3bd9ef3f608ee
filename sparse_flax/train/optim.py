"""Adam, schedule, averaging and loss scaling of arXiv:1904.10509 and of its authors' later code."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

# Stacking layers for lax.scan adds an axis, so the rank of a leaf does not tell a matrix from a
# bias: its name does.
_NOT_DECAYED = ("bias", "scale")

# Dynamic loss scale: its start, its growth per good step (twice in 2,000), its floor when halved.
FIRST_LOSS_SCALE = 2.0**16
_LOSS_SCALE_GROWTH = 2.0 ** (1 / 2_000)
_LOSS_SCALE_FLOOR = 2.0**10


def make_schedule(
  *, learning_rate: float, warmup_steps: int, steps: int, final_lr_ratio: float = 0.0
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Linear warm-up, then half a cosine: a function of the number of updates done before.

  With t = update + 1, w = `warmup_steps`, T = `steps`, the rate is `learning_rate` times

      t / w                                            while t < w
      r + (1 - r) (1 + cos(pi (t - w) / (T - w))) / 2  then, with (t - w) / (T - w) kept in [0, 1]

  Args:
    learning_rate: the highest rate.
    warmup_steps: w, updates.
    steps: T, updates in all.
    final_lr_ratio: r, what is left at the end, as a share of `learning_rate`.
  """

  def schedule(update):
    t = jnp.asarray(update, jnp.float32) + 1.0
    done = jnp.clip((t - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    cosine = final_lr_ratio + (1.0 - final_lr_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return learning_rate * jnp.where(t < warmup_steps, t / max(warmup_steps, 1), cosine)

  return schedule


def decays(params: dict) -> dict:
  """True for each leaf that weight decay shrinks: all but biases and the gains of norms.

  Embeddings, position tables and the start vector do shrink.
  """

  def by_name(path, _):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.rpartition("/")[2] not in _NOT_DECAYED

  return jax.tree.map_with_path(by_name, params)


def make_optimizer(
  *,
  schedule: Callable,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
) -> optax.GradientTransformation:
  """Clip by global norm, Adam, decoupled decay: p <- p - rate (adam + weight_decay p).

  The decay takes p as it was before the update. The last element of the state counts the updates.
  """
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule),
  )


def updates_done(opt_state: tuple) -> Int[Array, ""]:
  """How many updates the optimizer has made; with a dynamic loss scale fewer than steps."""
  return opt_state[-1].count


def in_float32(tree: dict) -> dict:
  """What averages, moments and sums are kept in: in bfloat16 0.999 is 1, and they never move."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def average(ema: dict, params: dict, *, decay: float) -> dict:
  """ema <- decay ema + (1 - decay) params, from the initial weights, without bias correction.

  It is computed and kept in the dtype of `ema`.
  """
  of_leaf = lambda mean, new: decay * mean + (1.0 - decay) * new.astype(mean.dtype)
  return jax.tree.map(of_leaf, ema, params)


def next_loss_scale(
  scale: Float[Array, ""], *, loss_ok: Bool[Array, ""], grads_ok: Bool[Array, ""]
) -> Float[Array, ""]:
  """The loss scale after a step: it grows on success and halves when only the gradients overflow.

  A loss that is not finite says nothing about the scale and leaves it.
  """
  halved = jnp.where(scale > _LOSS_SCALE_FLOOR, 0.5 * scale, scale)
  return jnp.where(loss_ok, jnp.where(grads_ok, scale * _LOSS_SCALE_GROWTH, halved), scale)
