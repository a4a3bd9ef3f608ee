"""The halves of a residual block in jax.numpy, forward and backward, with folded weights.

Letters: x -> q, k, v, then from attention's o  h = x + drop(a),  a = o W_out + b;  u = h^ W_up + b,
g = f(u),  m = g W_down + b,  y = h + drop(m).  h^ is the normalised h, without gain and bias.
Arrays have the dtype of the stream, statistics and sums float32; each is rounded once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import UInt32

from pallas_kernels.residual import activations
from pallas_kernels.residual import dropout
from pallas_kernels.residual import fold
from pallas_kernels.residual import options as options_lib

named = options_lib.named
Options = options_lib.Options
Bits = options_lib.Bits
Rows = Float[Array, "*B E"]
Stats = Float[Array, "*B n 2"]

# Of products over rows on an H200, see docs/notes/residual.md.
TILE = 256, 128  # of cuBLAS's fastest kernels
FULL = 128  # tiles that fill the device
PARTS = 2, 4, 8, 16  # more take longer to be summed
FEW_ROWS = 4_096  # a product of fewer is not worth a sum


def row_sums(x: Rows) -> Stats:
  """Of each row the sums of x and of x^2, of one tile that spans the row."""
  x = fold.wide(x)
  return jnp.stack([x.sum(axis=-1), jnp.square(x).sum(axis=-1)], axis=-1)[..., None, :]


def enter(
  x: Rows, stats: Stats, weights: fold.EnterWeights, options: Options
) -> tuple[Float[Array, "*B _"], ...]:
  """q, k and v."""
  normed, _ = _normalised(x, stats, options.epsilon)
  return tuple(
    _product(x, layer).astype(x.dtype)
    for x, layer in zip(apart(normed, 3), weights[:3], strict=True)
  )


def enter_back(
  x: Rows,
  stats: Stats,
  bits: UInt32[Array, "*B W"] | None,
  weights: fold.EnterWeights,
  cotangents: tuple[Float[Array, "*B _"], ...],
  dx: Rows,
  options: Options,
) -> tuple[Rows, Rows, Float[Array, " E"], tuple[tuple[Array, Array], ...]]:
  """From dq, dk, dv and the gradient of x that comes by another way: all of x's gradient.

  Returns:
    dx; what dropout by `bits` leaves of it, and its sum over rows; (dW, db) of q, k and v.
  """
  normed, rstd = _normalised(x, stats, options.epsilon)
  kernels = (layer.kernel for layer in weights[:3])
  dnormed = sum(
    fold.wide(_back(dy, kernel)) for dy, kernel in zip(cotangents, kernels, strict=True)
  )
  pairs = zip(apart(normed, 3), cotangents, strict=True)
  dweights = tuple((weight_gradient(x, dy), column_sums(dy)) for x, dy in pairs)
  dx = fold.wide(dx) + _norm_back(dnormed, normed, rstd)
  dm = dropped(dx, bits, options).astype(x.dtype)
  return dx.astype(x.dtype), dm, column_sums(dm), dweights


def leave(
  o: Float[Array, "*B V"],
  x: Rows,
  weights: fold.LeaveWeights,
  bits: Bits | None,
  options: Options,
) -> tuple[Rows, Stats, tuple[Array, ...]]:
  """y and its row sums; and h, its row sums and u, of which the backward pass is made."""
  of_a, of_m = bits or (None, None)
  a = _product(o, weights.out)
  h = named("h", (fold.wide(x) + dropped(a, of_a, options)).astype(x.dtype))
  stats = named("stats", row_sums(h))
  normed, _ = _normalised(h, stats, options.epsilon)
  u = named("u", _product(normed, weights.up).astype(x.dtype))
  m = _product(_activation(options).value(fold.wide(u)).astype(x.dtype), weights.down)
  y = (fold.wide(h) + dropped(m, of_m, options)).astype(x.dtype)
  return y, row_sums(y), (h, stats, u)


def leave_back(
  o: Float[Array, "*B V"],
  kept: tuple[Array, ...],
  weights: fold.LeaveWeights,
  bits: Bits | None,
  dy: Rows,
  dm: Rows,
  options: Options,
) -> tuple[Float[Array, "*B V"], Rows, tuple]:
  """do, dx, (dW, db) of out and of up, dW of down; dm is what dropout leaves of dy."""
  of_a = None if bits is None else bits[0]
  (h, stats, u), (out, up, down) = kept, (layer.kernel for layer in weights)
  g, slope = _activation(options).with_derivative(fold.wide(u))
  du = (fold.wide(_back(dm, down)) * slope).astype(u.dtype)
  normed, rstd = _normalised(h, stats, options.epsilon)
  dh = (fold.wide(dy) + _norm_back(fold.wide(_back(du, up)), normed, rstd)).astype(h.dtype)
  da = dropped(dh, of_a, options)
  of_out, of_up = ((weight_gradient(x, dy), column_sums(dy)) for x, dy in ((o, da), (normed, du)))
  return _back(da, out), dh, (of_out, of_up, weight_gradient(g.astype(u.dtype), dm))


def column_sums(dy: Float[Array, "*B N"]) -> Float[Array, "N"]:
  """The gradient of a bias, float32."""
  return fold.wide(dy).sum(axis=range(dy.ndim - 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def apart(x: Float[Array, "*B E"], n: int) -> tuple[Float[Array, "*B E"], ...]:
  """x, n times, as if these were different arrays.

  XLA joins small products of one array; q, k and v are then slices of the joint result, which no
  kernel can read before they are copied: 15 ms of 187 in a step of CIFAR-10's model on an H100.
  """
  return jax.lax.optimization_barrier((x,) * n)


@apart.defjvp
def _apart_jvp(n, primals, tangents):
  return apart(*primals, n), tangents * n


def _normalised(x: Rows, stats: Stats, epsilon: float) -> tuple[Rows, Float[Array, "*B 1"]]:
  """(x - mean) / std, rounded, and 1 / std."""
  means = stats.sum(axis=-2) / x.shape[-1]
  mean, of_squares = means[..., :1], means[..., 1:]
  rstd = jax.lax.rsqrt(jnp.maximum(of_squares - jnp.square(mean), 0.0) + epsilon)
  return ((fold.wide(x) - mean) * rstd).astype(x.dtype), rstd


def _norm_back(
  dnormed: Float[Array, "*B E"], normed: Rows, rstd: Float[Array, "*B 1"]
) -> Float[Array, "*B E"]:
  """The gradient of x from that of the normalised x."""
  normed = fold.wide(normed)
  along = (dnormed * normed).mean(axis=-1, keepdims=True)
  return rstd * (dnormed - dnormed.mean(axis=-1, keepdims=True) - normed * along)


def dropped(
  x: Float[Array, "*B E"], bits: UInt32[Array, "*B W"] | None, options: Options
) -> Float[Array, "*B E"]:
  """What dropout leaves of x; its own gradient too."""
  return x if bits is None else dropout.masked(x, bits, options.rate)


def _product(x: Float[Array, "*B E"], layer: fold.Linear) -> Float[Array, "*B N"]:
  """x W + b; the product is rounded, as no more is to be written to memory."""
  y = jax.lax.dot_general(x, layer.kernel, (((x.ndim - 1,), (0,)), ((), ())))
  return fold.wide(y) + layer.bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _back(dy: Float[Array, "*B N"], kernel: Float[Array, "E N"]) -> Float[Array, "*B E"]:
  return jax.lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())))


@jax.custom_vjp
def multiply(x: Float[Array, "*B M"], kernel: Float[Array, "M N"]) -> Float[Array, "*B N"]:
  """x W, whose gradient for W is `weight_gradient`."""
  return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _multiply_forward(x, kernel):
  return multiply(x, kernel), (x, kernel)


def _multiply_backward(kept, dy):
  x, kernel = kept
  # In the order of JAX's own rule, and so with its bits.
  return _back(dy, kernel), weight_gradient(dy, x).T.astype(kernel.dtype)


multiply.defvjp(_multiply_forward, _multiply_backward)


def weight_gradient(
  x: Float[Array, "*B M"],
  dy: Float[Array, "*B N"],
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "M N"]:
  """x^T dy, the gradient of a kernel: a sum over all rows, never rounded to the stream's dtype.

  On an NVIDIA GPU a sum of such products over parts of the rows, whose tiles together fill the
  device: cuBLAS's first choice cuts no rows, and takes small tiles to have enough of them.
  """
  exact = dict(precision=precision, preferred_element_type=fold.wide_dtype(x.dtype))
  rows = tuple(range(x.ndim - 1))
  whole = lambda x, dy: jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), **exact)
  if (parts := parts_of(x.shape, dy.shape[-1])) is None:
    return whole(x, dy)

  def in_parts(x, dy):
    x, dy = (x.reshape(*parts, x.shape[-1]) for x in (x, dy))
    dims = (((2,), (2,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, dy, dims, **exact).sum(axis=(0, 1))

  return jax.lax.platform_dependent(x, dy, cuda=in_parts, default=whole)


def parts_of(shape: tuple[int, ...], N: int) -> tuple[int, int, int] | None:
  """(sequences, parts of each, rows of a part) for `weight_gradient` of [*B, M] and [*B, N].

  None where one product is better. Sequences are cut, or put together, by powers of two, so that
  what lies on several devices stays there.
  """
  *batch, T, M = shape
  B = math.prod(batch)
  tiles = -(-M // TILE[0]) * -(-N // TILE[1])
  wanted = max((n for n in PARTS if n * tiles <= FULL), default=1)
  if wanted == 1 or B * T < FEW_ROWS:
    return None
  if wanted < B:
    return None if B % wanted else (wanted, 1, B // wanted * T)
  cuts = max(n for n in (1, *PARTS) if n * B <= wanted and T % n == 0)
  return None if B * cuts == 1 else (B, cuts, T // cuts)


def _activation(options: Options) -> activations.Activation:
  return activations.ACTIVATIONS[options.activation]
