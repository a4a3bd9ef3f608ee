"""The two halves of a residual block, around attention: which implementation, and derivatives.

    q, k, v, x = enter(x, stats, weights, options)
    y, stats = leave(attention's result, x, weights, bits, options)

`enter` hands x on, so that what comes back for it is added where the gradient of the norm is made.
Row sums go from one block to the next and have no gradient: each half knows its norm as a function
of its rows. What the backward pass reads has names, KEPT says which are kept by a policy.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import hardware
from pallas_kernels.residual import fold
from pallas_kernels.residual import options as options_lib
from pallas_kernels.residual import xla

Options = options_lib.Options
Bits = options_lib.Bits
Rows = Float[Array, "*B E"]
Stats = Float[Array, "..."]

IMPLEMENTATIONS = ("modules", "xla", "mosaic_gpu")
# Names of what the forward pass keeps, by the value of `remat`; beside it the input of each block.
_ATTENTION = ("attention_out", "attention_lse")
_BLOCK = (*_ATTENTION, *(f"residual_{name}" for name in ("q", "k", "v", "h", "stats")))
KEPT = {
  "full": (),
  "attention": _ATTENTION,
  "block": _BLOCK,
  "hidden": (*_BLOCK, "residual_u", "residual_g"),
}


# A context of JAX, so that programs traced with another choice are not found again.
_asked_for = jax.make_user_context(None)


@contextlib.contextmanager
def override(implementation: str | None) -> Iterator[None]:
  """Within it, in this thread, blocks that `implementation` can compute are computed by it.

  None, as outside of it, and "modules": by the modules of their layers. The kernels, "mosaic_gpu",
  have run in training steps with other sizes than now, and in no command yet.

  Raises:
    ValueError: there is no implementation of this name.
    NotImplementedError: the kernels do not run here; the message says why.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"{implementation=}: must be None or one of {IMPLEMENTATIONS}")
  if implementation == "mosaic_gpu" and (reason := hardware.why_not_hopper()) is not None:
    raise NotImplementedError(f"{implementation=}: {reason}")
  with _asked_for(implementation):
    yield


def choose(
  dtype: jax.typing.DTypeLike, E: int, F: int, widths: tuple[int, ...], activation: str
) -> str | None:
  """The implementation of the two halves that serves; None: the modules of the layers.

  Args:
    dtype: of the stream.
    E, F: widths of the stream and between the two products.
    widths: of q, k and v.
    activation: a name of `activations.ACTIVATIONS`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _asked_for.value != "mosaic_gpu":
    return None if _asked_for.value == "modules" else _asked_for.value
  if mesh.size > 1 or mesh.manual_axes:
    return None
  reason = _kernels().unsupported(jnp.dtype(dtype), E, F, widths, activation)
  return "mosaic_gpu" if reason is None else None


def row_sums(x: Rows, options: Options) -> Stats:
  """What the first `enter` needs of its rows; the later ones have it of `leave`."""
  return jax.lax.stop_gradient(_backend(options).row_sums(x))


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
    options: epsilon, the function f, the rate that the bits are of, and the implementation.
  """
  y, stats = _leave(o, x, weights, bits, options)
  return y, jax.lax.stop_gradient(stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _enter(x, stats, weights, options):
  return (*_backend(options).enter(x, stats, weights, options), x)


def _enter_forward(x, stats, weights, options):
  q, k, v = _backend(options).enter(x, stats, weights, options)
  named = (checkpoint_name(y, f"residual_{name}") for name, y in zip("qkv", (q, k, v), strict=True))
  return (*named, x), (x, stats, _without_masters(weights))


def _enter_backward(options, kept, cotangents):
  *dqkv, dx = cotangents
  x, stats, weights = kept
  dx, dweights = _backend(options).enter_back(x, stats, weights, tuple(dqkv), dx, options)
  return dx, jnp.zeros_like(stats), fold.EnterWeights(*_gradients(dweights), None)


_enter.defvjp(_enter_forward, _enter_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _leave(o, x, weights, bits, options):
  return _backend(options).leave(_beside(o), x, weights, bits, options)[:2]


def _leave_forward(o, x, weights, bits, options):
  y, stats, kept = _backend(options).leave(_beside(o), x, weights, bits, options)
  names = ("h", "stats", "u", "g")[: len(kept)]
  kept = tuple(checkpoint_name(x, f"residual_{name}") for x, name in zip(kept, names, strict=True))
  return (y, stats), (o, kept, _without_masters(weights), bits)


def _leave_backward(options, kept, cotangents):
  (o, inner, weights, bits), (dy, _) = kept, cotangents
  back = _backend(options).leave_back
  do, dx, dweights = back(_beside(o), inner, weights, bits, dy, options)
  return do.reshape(o.shape), dx, fold.LeaveWeights(*_gradients(dweights)), None


_leave.defvjp(_leave_forward, _leave_backward)


def _beside(o: Float[Array, "*B H D"]) -> Float[Array, "*B V"]:
  """All heads of a token beside each other; kept with heads, as attention keeps it."""
  return o.reshape(*o.shape[:-2], -1)


def _backend(options: Options) -> Any:
  return xla if options.implementation == "xla" else _kernels()


def _kernels() -> Any:
  """Imported where it is asked for: most who import this package have no such GPU."""
  return importlib.import_module("pallas_kernels.residual.mosaic_gpu")


def _without_masters(weights: Any) -> Any:
  """What backward passes read: nobody the values of the masters."""
  is_linear = lambda x: isinstance(x, fold.Linear)
  cut = lambda x: x._replace(master=None) if is_linear(x) else x
  return jax.tree.map(cut, weights, is_leaf=is_linear)


def _gradients(pairs: tuple[tuple[Array, Array], ...]) -> list[Any]:
  return [fold.Linear(None, dbias, dkernel, None) for dkernel, dbias in pairs]
