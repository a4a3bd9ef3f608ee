"""The two halves of a residual block, around attention: which implementation, and derivatives.

    stream = start(x, options, drops=...)
    q, k, v, x = enter(stream, weights, options)                                for each block
    stream = leave(attention's result, x, weights, bits, options)
    x = end(stream, options)

`enter` hands x on, so that what comes back for it is added where the gradient of the norm is made.
There the gradient of the branch that was added last is made too: dropout is all that lies between.
Row sums go from one block to the next and have no gradient: each half knows its norm as a function
of its rows. What the backward pass reads has names, KEPT says which are kept by a policy.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import UInt32

from pallas_kernels import hardware
from pallas_kernels.residual import dropout
from pallas_kernels.residual import fold
from pallas_kernels.residual import options as options_lib
from pallas_kernels.residual import sharded
from pallas_kernels.residual import xla

Options = options_lib.Options
Bits = options_lib.Bits
Rows = Float[Array, "*B E"]
Stats = Float[Array, "..."]

logger = logging.getLogger(__name__)

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
  """Within it, in this thread, blocks are computed by `implementation`; None: as outside of it.

  "mosaic_gpu" are the kernels for Hopper, "xla" is their algebra in jax.numpy, "modules" is neither
  of them: the layers of a block, as they are.

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
  dtype: jax.typing.DTypeLike,
  E: int,
  F: int,
  widths: tuple[int, ...],
  activation: str,
  *,
  implementation: str | None = None,
  row_axes: tuple[tuple[str, ...], ...] = (),
  refused: str | None = None,
) -> str | None:
  """The implementation of the two halves that serves; None: the modules of the layers.

  Those, where the kernels do not run or do not have these sizes, which is said once: "xla" is
  slower than they are, and serves where `override` asks for it.

  Args:
    dtype: of the stream.
    E, F: widths of the stream and between the two products.
    widths: of q, k and v.
    activation: a name of `activations.ACTIVATIONS`.
    implementation: of attention, as it was asked for; who names another than our kernels there
      has none of ours here either.
    row_axes: as in `Options`. On several devices, where the kernels have not run yet, they serve
      if they are asked for and it has some.
    refused: why no halves can compute a block; None: they can.

  Raises:
    NotImplementedError: `override` asks for an implementation that cannot; the message says why.
  """
  asked_for, dtype = _asked_for.value, jnp.dtype(dtype)
  if asked_for == "modules" or (asked_for is None and not _kernels_serve(implementation)):
    return None
  name, unsupported = asked_for or "mosaic_gpu", None
  if name == "mosaic_gpu":
    refused = refused or _why_no_rows(row_axes)
    unsupported = _kernels().unsupported(dtype, E, F, widths, activation)
  if reason := refused or unsupported:
    if asked_for is not None:
      raise NotImplementedError(f"blocks by {name}: {reason}")
    if refused is None and dtype == jnp.bfloat16:  # who computes in another dtype knows it
      _say_once(f"blocks by their modules: {reason}")
    return None
  return name


def _kernels_serve(implementation: str | None) -> bool:
  """Where nobody asked for blocks by them: whether they run, on the only device."""
  mesh = jax.sharding.get_abstract_mesh()
  # Without a mesh, arrays may be on several devices all the same, and nothing here would tell.
  alone = mesh.size == 1 or (mesh.empty and jax.device_count() == 1)
  runs = hardware.platform() == "gpu" and hardware.why_not_hopper() is None
  return runs and alone and implementation in (None, "mosaic_gpu")


def _why_no_rows(row_axes: tuple[tuple[str, ...], ...]) -> str | None:
  """Why the devices of the mesh do not each have rows of their own; None: they have."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes:
    return "within a shard_map of the caller's"
  if mesh.size > 1 and not row_axes:
    return f"a mesh of {dict(mesh.shape)}, where devices share rows or their axes are unknown"
  return None


@functools.cache
def _say_once(message: str) -> None:
  logger.warning(message)


class Stream(NamedTuple):
  """The residual stream between two blocks: it goes to one `enter`, or to `end`, nowhere else.

  What comes back for `x` and for `branch` belongs together; any other use would part them.

  Attributes:
    x: its rows.
    branch: x again, for its gradient: what comes back is that of the feed-forward branch which was
      added last.
    bias: zeros, for their gradient: the sum over rows of what comes back for `branch`.
    stats: sums over the rows of x; they have no gradient.
    bits: what dropout kept at the end of that branch; None: everything.
  """

  x: Rows
  branch: Rows
  bias: Float[Array, " E"]
  stats: Stats
  bits: UInt32[Array, "*B W"] | None


def start(x: Rows, options: Options, *, drops: bool) -> Stream:
  """The stream in front of the first block; `drops`: whether the blocks have bits."""
  # There is no branch in front of it: what comes back for one goes nowhere, and is made all the
  # same, so that the first block is like all others.
  branch = jax.lax.stop_gradient(x)
  all_ones = jnp.full(dropout.words_of(x.shape), 0xFFFFFFFF, jnp.uint32) if drops else None
  return Stream(x, branch, _zeros(x), _backend(options).row_sums(branch), all_ones)


def end(stream: Stream, options: Options) -> Rows:
  """The rows behind the last block."""
  return _end(stream.x, stream.branch, stream.bias, stream.bits, options)


def enter(
  stream: Stream, weights: fold.EnterWeights, options: Options
) -> tuple[Float[Array, "*B N"], Float[Array, "*B N"], Float[Array, "*B V"], Rows]:
  """Queries, keys and values of the normalised rows, and the rows."""
  with jax.named_scope(f"blocks_by_{options.implementation}"):
    x, branch, bias, stats, bits = stream
    return _enter(x, branch, bias, stats, bits, weights, options)


def leave(
  o: Float[Array, "*B H D"],
  x: Rows,
  weights: fold.LeaveWeights,
  bits: Bits | None,
  options: Options,
) -> Stream:
  """y = h + drop(down(f(up(norm h)))) with h = x + drop(out(o)), as the next block takes it.

  Args:
    o: attention's result, in heads: what attention itself keeps is then kept once.
    x: of `enter`.
    weights: folded.
    bits: what dropout keeps at the ends of the two branches; None: everything.
    options: epsilon, the function f, the rate that the bits are of, and the implementation.
  """
  return Stream(*_leave(o, x, weights, bits, options), None if bits is None else bits[1])


def _zeros(x: Rows) -> Float[Array, " E"]:
  return jnp.zeros(x.shape[-1], fold.wide_dtype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _enter(x, branch, bias, stats, bits, weights, options):
  return (*_backend(options).enter(x, stats, weights, options), x)


def _enter_forward(x, branch, bias, stats, bits, weights, options):
  q, k, v = _backend(options).enter(x, stats, weights, options)
  q, k, v = (options_lib.named(name, y) for name, y in zip("qkv", (q, k, v), strict=True))
  return (q, k, v, x), (x, stats, bits, fold.without_masters(weights))


def _enter_backward(options, kept, cotangents):
  *dqkv, dx = cotangents
  x, stats, bits, weights = kept
  back = _backend(options).enter_back
  dx, dbranch, dbias, dweights = back(x, stats, bits, weights, tuple(dqkv), dx, options)
  dweights = fold.EnterWeights(*_gradients(dweights), None)
  return dx, dbranch, dbias, jnp.zeros_like(stats), None, dweights


_enter.defvjp(_enter_forward, _enter_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _leave(o, x, weights, bits, options):
  y, stats, _ = _backend(options).leave(_beside(o), x, weights, bits, options)
  return y, y, _zeros(x), stats


def _leave_forward(o, x, weights, bits, options):
  y, stats, kept = _backend(options).leave(_beside(o), x, weights, bits, options)
  return (y, y, _zeros(x), stats), (o, kept, fold.without_masters(weights), bits)


def _leave_backward(options, kept, cotangents):
  (o, inner, weights, bits), (dy, dm, dbias, _) = kept, cotangents
  back = _backend(options).leave_back
  do, dx, dweights = back(_beside(o), inner, weights, bits, dy, dm, options)
  dweights = fold.LeaveWeights(*_gradients((*dweights[:2], (dweights[2], dbias))))
  return do.reshape(o.shape), dx, dweights, None


_leave.defvjp(_leave_forward, _leave_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _end(x, branch, bias, bits, options):
  return x


def _end_forward(x, branch, bias, bits, options):
  return x, bits


def _end_backward(options, bits, dx):
  dm = xla.dropped(dx, bits, options).astype(dx.dtype)
  return dx, dm, xla.column_sums(dm), None


_end.defvjp(_end_forward, _end_backward)


def _beside(o: Float[Array, "*B H D"]) -> Float[Array, "*B V"]:
  """All heads of a token beside each other; kept with heads, as attention keeps it."""
  return o.reshape(*o.shape[:-2], -1)


def _backend(options: Options) -> Any:
  inner = xla if options.implementation == "xla" else _kernels()
  return sharded.Sharded(inner, options.row_axes) if options.row_axes else inner


def _kernels() -> Any:
  """Imported where it is asked for: most who import this package have no such GPU."""
  return importlib.import_module("pallas_kernels.residual.mosaic_gpu")


def _gradients(pairs: tuple[tuple[Array, Array], ...]) -> list[Any]:
  return [fold.Linear(None, dbias, dkernel, None) for dkernel, dbias in pairs]
