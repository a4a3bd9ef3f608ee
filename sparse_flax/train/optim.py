"""Adam, schedule, averaging and loss scaling of arXiv:1904.10509 and of its authors' later code.

Beside them Muon, and linear decay.
"""

import re
from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
from typing import cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

# What learns from a loss of its own, beside the model's.
_APART = re.compile(r"/index/\w+/")

# Stacking layers for lax.scan adds an axis, so the rank of a leaf does not tell a matrix from a
# bias: its name does.
_NOT_DECAYED = ("bias", "scale")

# The root mean square of Adam's usual updates. Muon's are made as large, so that matrices can have
# Adam's learning rate and decay (arXiv:2502.16982, section 2.2).
_MUON_RMS = 0.2

# Dynamic loss scale: its start, its growth per good step (twice in 2,000), its floor when halved.
FIRST_LOSS_SCALE = 2.0**16
_LOSS_SCALE_GROWTH = 2.0 ** (1 / 2_000)
_LOSS_SCALE_FLOOR = 2.0**10


def make_schedule(
  *,
  learning_rate: float,
  warmup_steps: int,
  steps: int,
  final_lr_ratio: float = 0.0,
  schedule: str = "cosine",
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Linear warm-up, then half a cosine or a line: a function of the number of updates done before.

  With t = update + 1, w = `warmup_steps`, T = `steps`, and s = (t - w) / (T - w) kept in [0, 1],
  the rate is `learning_rate` times

      t / w                            while t < w
      r + (1 - r) (1 + cos(pi s)) / 2  then, with "cosine"
      r + (1 - r) (1 - s)              then, with "linear"

  Args:
    learning_rate: the highest rate.
    warmup_steps: w, updates.
    steps: T, updates in all.
    final_lr_ratio: r, what is left at the end, as a share of `learning_rate`.
    schedule: "cosine" or "linear".

  Raises:
    ValueError: of `schedule`.
  """
  if schedule not in ("cosine", "linear"):
    raise ValueError(f"{schedule=}: must be 'cosine' or 'linear'")

  def rate(update):
    t = jnp.asarray(update, jnp.float32) + 1.0
    done = jnp.clip((t - warmup_steps) / max(steps - warmup_steps, 1), 0.0, 1.0)
    if schedule == "linear":
      left = final_lr_ratio + (1.0 - final_lr_ratio) * (1.0 - done)
    else:
      left = final_lr_ratio + (1.0 - final_lr_ratio) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return learning_rate * jnp.where(t < warmup_steps, t / max(warmup_steps, 1), left)

  return rate


def decays(params: dict) -> dict:
  """True for each leaf that weight decay shrinks: all but biases and the gains of norms.

  Embeddings, position tables and the start vector do shrink.
  """
  return jax.tree.map_with_path(
    lambda path, _: _name(path).rpartition("/")[2] not in _NOT_DECAYED, params
  )


def matrices(params: dict) -> dict:
  """True for each leaf that Muon moves: the matrices of layers, [layers, in, out].

  Embeddings, position tables, the start vector and the logits are Adam's, as biases and gains are,
  and the matrices between levels.
  """
  of_layers = lambda path: re.match(r"(inner/)*(groups|before|after)/.*/kernel$", _name(path))
  return jax.tree.map_with_path(lambda path, _: bool(of_layers(path)), params)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def make_optimizer(
  *,
  schedule: Callable,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  name: str = "adam",
  momentum: float = 0.95,
  muon_ratio: float = 1.0,
  momentum_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Clip by global norm, Adam or Muon, decoupled decay: p <- p - rate (update + weight_decay p).

  The decay takes p as it was before the update. The last element of the state counts the updates.

  Args:
    schedule: of `make_schedule`.
    b1: of Adam's mean of gradients.
    b2: of Adam's mean of their squares.
    eps: of Adam.
    weight_decay: of what `decays` names.
    clip_norm: the largest norm of the gradient; of indexers, which learn from a loss of their own,
      the largest norm of theirs.
    name: "adam" or "muon", which leaves to Adam what `matrices` does not name.
    momentum: of Muon's mean of gradients, by Nesterov.
    muon_ratio: how far matrices move with Muon; with 1 as far as Adam's usual updates would move
      them, 0.2 rate in the root mean square.
    momentum_dtype: "float32" or "bfloat16", of the means of gradients that are kept; those of their
      squares are float32.

  Raises:
    ValueError: of `name`.
  """
  if name not in ("adam", "muon"):
    raise ValueError(f"{name=}: must be 'adam' or 'muon'")
  kept = None if momentum_dtype == "float32" else jnp.dtype(momentum_dtype)  # None: the gradients'
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=kept)
  if name == "muon":
    by_kind: dict[Hashable, optax.GradientTransformation] = {
      "adam": adam,
      "muon": _muon(momentum, muon_ratio, kept),
    }
    kinds = lambda params: jax.tree.map(lambda x: "muon" if x else "adam", matrices(params))
    update = optax.partition(by_kind, kinds)
  else:
    update = adam
  return optax.chain(
    _clipped(clip_norm),
    update,
    optax.add_decayed_weights(weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule),
  )


def _muon(momentum: float, ratio: float, dtype: jnp.dtype | None) -> optax.GradientTransformation:
  """Of stacks of matrices [layers, in, out], each of which is made orthogonal for itself."""
  each = lambda updates: jax.tree.map(
    lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), updates
  )
  # The elements of an orthogonal matrix have the root mean square 1 / sqrt(its longer side).
  size = lambda x: ratio * _MUON_RMS * max(x.shape[-2:]) ** 0.5
  return optax.chain(
    optax.contrib.scale_by_muon(beta=momentum, mu_dtype=dtype, weight_dimension_numbers=each),
    optax.stateless(lambda updates, _: jax.tree.map(lambda x: size(x) * x, updates)),
  )


def _clipped(most: float) -> optax.GradientTransformation:
  """Clips the gradient by its norm, and that of indexers by its own, as if each were alone."""
  clip = optax.clip_by_global_norm(most)

  def update(updates, state, params=None):
    own, others = split_apart(updates)
    if not own:
      return clip.update(updates, state, params)
    by_name: dict[str, Any] = {}
    for part in (own, others):
      by_name.update(cast(dict, clip.update(part, state)[0]))
    return jax.tree.map_with_path(lambda path, _: by_name[_name(path)], updates), state

  return optax.GradientTransformation(clip.init, update)


def split_apart(tree: dict) -> tuple[dict[str, Array], dict[str, Array]]:
  """Leaves by their names: those of indexers, and all others."""
  leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  own = {name: x for name, x in leaves.items() if _APART.search(name)}
  return own, {name: x for name, x in leaves.items() if name not in own}


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
