"""The halves of a residual block by the kernels for Hopper: the functions of xla.py, for bfloat16.

What is left to XLA: gradients of wide weights, and sums over rows of what no kernel has made.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import BFloat16
from jaxtyping import Float32
from jaxtyping import UInt32

from pallas_kernels.residual import dropout
from pallas_kernels.residual import epilogues
from pallas_kernels.residual import fold
from pallas_kernels.residual import gradients
from pallas_kernels.residual import kernels
from pallas_kernels.residual import options as options_lib
from pallas_kernels.residual import outer

named = options_lib.named
Options = options_lib.Options
Bits = options_lib.Bits
Rows = BFloat16[Array, "*B E"]
Stats = Float32[Array, "1 2 Rp"]

WIDTHS = (256, 512)
UNIT = 128  # columns; of these all widths are multiples
# Blocks of one shape share their kernels: as a function of its own each is lowered, and compiled,
# once for all layers of a program.
_once = functools.partial(jax.jit, static_argnames=("options",))


def unsupported(dtype: jnp.dtype, E: int, F: int, widths: tuple[int, ...], activation: str):
  """Why the kernels cannot compute a block of these sizes; None: they can."""
  if dtype != jnp.bfloat16:
    return f"{dtype}: the kernels compute in bfloat16"
  if E not in WIDTHS:
    return f"width={E}: the kernels have {WIDTHS}"
  if any(width % UNIT for width in (F, *widths)):
    return f"queries, keys and values of {widths}, hidden {F}: must be multiples of {UNIT}"
  if activation not in epilogues.ACTIVATIONS:
    return f"activation={activation}: the kernels have {', '.join(epilogues.ACTIVATIONS)}"
  return None


def row_sums(x: Rows) -> Stats:
  return kernels.stats_of(_flat(x))


@_once
def enter(
  x: Rows, stats: Stats, weights: fold.EnterWeights, options: Options
) -> tuple[BFloat16[Array, "*B _"], ...]:
  """q, k and v."""
  joint = weights.joint
  norm = kernels.Norm(stats, joint.sums, joint.bias, x.shape[-1], options.epsilon)
  results = kernels.enter(_flat(x), joint.kernel, norm, _widths(weights))
  return tuple(_like(y, x) for y in results)


@_once
def enter_back(
  x: Rows,
  stats: Stats,
  bits: UInt32[Array, "*B W"] | None,
  weights: fold.EnterWeights,
  cotangents: tuple[BFloat16[Array, "*B _"], ...],
  dx: Rows,
  options: Options,
) -> tuple[Rows, Rows, Float32[Array, " E"], tuple[tuple[Array, Array], ...]]:
  """As `xla.enter_back`."""
  grads = tuple(_flat(dy) for dy in cotangents)
  kernel = weights.joint.kernel
  words, rate = (None, 0.0) if bits is None else (_words(bits), _rate(options))
  dx, dm, normed, of_dm = kernels.enter_back(
    grads, kernel, _flat(x), stats, _flat(dx), words, rate, eps=options.epsilon
  )
  products = [outer.Product(normed, grads)]
  of_weights, of_biases, (of_dm,) = gradients.over_rows(x.shape[-1], products, [of_dm], biases=True)
  dweights = tuple(zip(of_weights, of_biases, strict=True))
  return _like(dx, x), _like(dm, x), of_dm[0], dweights


@_once
def leave(
  o: BFloat16[Array, "*B V"],
  x: Rows,
  weights: fold.LeaveWeights,
  bits: Bits | None,
  options: Options,
) -> tuple[Rows, Stats, tuple[Array, ...]]:
  """As `xla.leave`; what is kept is h, its sums, u and f(u)."""
  of_a, of_m, rate = (None, None, 0.0) if bits is None else (*map(_words, bits), _rate(options))
  out, down = weights.out, weights.down
  h, stats = kernels.drop_add(_flat(o), out.kernel, out.bias, _flat(x), of_a, rate)
  # Here, not by who calls this: what a policy keeps is then not only kept, but read.
  h, stats = named("h", h), named("stats", stats)
  u, g = kernels.widen(
    h, weights.up.kernel, _norm(stats, weights, x, options), activation=options.activation
  )
  u, g = named("u", u), named("g", g)
  y, after = kernels.drop_add(g, down.kernel, down.bias, h, of_m, rate)
  return _like(y, x), after.sum(axis=0, keepdims=True), (_like(h, x), stats, u, g)


@_once
def leave_back(
  o: BFloat16[Array, "*B V"],
  kept: tuple[Array, ...],
  weights: fold.LeaveWeights,
  bits: Bits | None,
  dy: Rows,
  dm: Rows,
  options: Options,
) -> tuple[BFloat16[Array, "*B V"], Rows, tuple]:
  """As `xla.leave_back`."""
  h, stats, u, g = kept
  norm, rows, dm = _norm(stats, weights, h, options), _flat(h), _flat(dm)
  du, back, sums = kernels.narrow_back(
    dm, weights.down.kernel, u, norm, activation=options.activation
  )
  words, rate = (None, 0.0) if bits is None else (_words(bits[0]), _rate(options))
  dh, da, of_da = kernels.widen_back(
    du, weights.up.kernel, rows, norm, back, _flat(dy), words, rate
  )
  do = kernels.multiply(da, weights.out.kernel)
  pairs = (_flat(o), da), (rows, du), (g, dm)
  products = [outer.Product(a, (b,)) for a, b in pairs]
  (dout, dup, ddown), _, (of_up, of_da) = gradients.over_rows(h.shape[-1], products, [sums, of_da])
  # du has the factor rstd, and rows keep their mean, which the fold takes off each column of dup.
  dweights = (dout, of_da[0]), (dup, of_up[0]), ddown
  return _like(do, o), _like(dh, h), dweights


def _norm(stats, weights: fold.LeaveWeights, x: Array, options: Options) -> kernels.Norm:
  return kernels.Norm(stats, weights.up.sums, weights.up.bias, x.shape[-1], options.epsilon)


def _rate(options: Options) -> float:
  return 1.0 - dropout.keep_probability(options.rate)


def _words(bits: UInt32[Array, "*B W"]) -> UInt32[Array, "W R"]:
  """The words of a range of columns beside each other."""
  return _flat(bits).T


def _widths(weights: fold.EnterWeights) -> tuple[int, ...]:
  return tuple(layer.kernel.shape[-1] for layer in (weights.query, weights.key, weights.value))


def _flat(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1])


def _like(rows: Array, x: Array) -> Array:
  return rows.reshape(*x.shape[:-1], rows.shape[-1])
