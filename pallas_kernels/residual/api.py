"""The two halves of a residual block, around attention: which implementation, and derivatives.

    q, k, v, x = enter(x, stats, weights, options)
    y, stats = leave(attention's result, x, weights, bits, options)

`enter` hands x on, so that what comes back for it is added where the gradient of the norm is made.
Row sums go from one block to the next and have no gradient: each half knows its norm as a function
of its rows. What the backward pass reads has names, KEPT says which are kept by a policy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.residual import fold
from pallas_kernels.residual import options as options_lib
from pallas_kernels.residual import xla

Options = options_lib.Options
Bits = options_lib.Bits
Rows = Float[Array, "*B E"]
Stats = Float[Array, "*B n 2"]

# Names of what the forward pass keeps, by the value of `remat`; beside it the input of each block.
_ATTENTION = ("attention_out", "attention_lse")
_BLOCK = (*_ATTENTION, *(f"residual_{name}" for name in ("q", "k", "v", "h", "stats")))
KEPT = {
  "full": (),
  "attention": _ATTENTION,
  "block": _BLOCK,
  "hidden": (*_BLOCK, "residual_u"),
}


def row_sums(x: Rows) -> Stats:
  """What the first `enter` needs of its rows; the later ones have it of `leave`."""
  return jax.lax.stop_gradient(xla.row_sums(x))


def enter(
  x: Rows, stats: Stats, weights: fold.EnterWeights, options: Options
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B V"], Rows]:
  """Queries, keys and values of the normalised x, and x."""
  return _enter(x, jax.lax.stop_gradient(stats), weights, options)


def leave(
  o: Float[Array, "*B H D"],
  x: Rows,
  weights: fold.LeaveWeights,
  bits: Bits | None,
  options: Options,
) -> tuple[Rows, Stats]:
  """y = h + drop(down(f(up(norm h)))) with h = x + drop(out(o)), and the row sums of y.

  Args:
    o: attention's result, in heads: what attention itself keeps is then kept once.
    x: of `enter`.
    weights: folded.
    bits: what dropout keeps at the ends of the two branches; None: everything.
    options: epsilon, the function f, and the rate that the bits are of.
  """
  y, stats = _leave(o, x, weights, bits, options)
  return y, jax.lax.stop_gradient(stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _enter(x, stats, weights, options):
  return (*xla.enter(x, stats, weights, options), x)


def _enter_forward(x, stats, weights, options):
  q, k, v = xla.enter(x, stats, weights, options)
  named = (checkpoint_name(y, f"residual_{name}") for name, y in zip("qkv", (q, k, v), strict=True))
  return (*named, x), (x, stats, _kernels(weights))


def _enter_backward(options, kept, cotangents):
  x, stats, kernels = kept
  *dqkv, dx = cotangents
  dx, dweights = xla.enter_back(x, stats, kernels, tuple(dqkv), dx, options)
  return dx, jnp.zeros_like(stats), fold.EnterWeights(*_gradients(dweights))


_enter.defvjp(_enter_forward, _enter_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _leave(o, x, weights, bits, options):
  return xla.leave(_flat(o), x, weights, bits, options)[:2]


def _leave_forward(o, x, weights, bits, options):
  y, stats, h, inner, u = xla.leave(_flat(o), x, weights, bits, options)
  h, inner, u = (
    checkpoint_name(value, f"residual_{name}")
    for name, value in dict(h=h, stats=inner, u=u).items()
  )
  return (y, stats), (o, h, inner, u, _kernels(weights), bits)


def _leave_backward(options, kept, cotangents):
  o, h, stats, u, kernels, bits = kept
  dy, _ = cotangents
  do, dx, dweights = xla.leave_back(_flat(o), h, stats, u, kernels, bits, dy, options)
  return do.reshape(o.shape), dx, fold.LeaveWeights(*_gradients(dweights)), None


_leave.defvjp(_leave_forward, _leave_backward)


def _flat(o: Float[Array, "*B H D"]) -> Float[Array, "*B V"]:
  return o.reshape(*o.shape[:-2], -1)


def _kernels(weights: tuple[fold.Linear, ...]) -> tuple[Array, ...]:
  return tuple(layer.kernel for layer in weights)


def _gradients(pairs: tuple[tuple[Array, Array], ...]) -> list[Any]:
  return [fold.Linear(None, dbias, dkernel) for dkernel, dbias in pairs]
