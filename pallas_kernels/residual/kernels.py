"""The products of a block, forward and backward, each with all that follows it as its epilogue.

    forward                                         backward
    F1 enter    q, k, v = norm(x) W + b             B4 enter_back   dx, dm, xhat
    F2 drop_add h = x + drop(o W + b)               B3 multiply     do = da W^T
    F3 widen    u = norm(h) W + b, g = f(u)         B2 widen_back   dh, da
    F4 drop_add y = h + drop(g W + b)               B1 narrow_back  du

W and b of F1 and F3 have the norm's gain and bias in them, and each column of W sums to zero, as
does each row of d W^T then (fold.py). What a norm needs of its rows is `stats` [tiles, 2, Rp]: sums
of x and of x^2 over parts of the columns, padded to whole tiles of 128 rows, as F2 and F4 leave it;
`stats_of` makes it of any array.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import BFloat16
from jaxtyping import Float32
from jaxtyping import UInt32

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.residual import epilogues
from pallas_kernels.residual import product
from pallas_kernels.residual.plan import Epilogue
from pallas_kernels.residual.plan import PAD_ROWS
from pallas_kernels.residual.plan import Sizes
from pallas_kernels.residual.plan import SLICE
from pallas_kernels.residual.strip import Strip

EPS = 1e-5  # of the models' norms
MOST_PARTS = 16  # of sums over columns that an epilogue adds itself: they take shared memory

# By kernel, and by what K and N are at most, smallest first: the fastest of those measured
# (docs/notes/residual.md). Weights stay where a range of columns of them fits beside the rings. An
# epilogue waits least where both slices of 128 columns are loaded while its product runs, and may
# be on their way while the next one does (`ahead`, `behind` = 2). The simulator has no clusters:
# what changes here runs on a card first, `make test-gpu PART=residual`.
_ANY = math.inf
_cut = functools.partial(Sizes, columns=128, stays=True)
SIZES = {
  "enter": {
    (256, _ANY): _cut(stages=8, behind=2, consumers=3),
    (512, _ANY): _cut(stages=8, beside=2),
    (_ANY, _ANY): Sizes(behind=2),
  },
  "drop_add": {
    (256, 256): _cut(stages=8, ahead=2, behind=2),
    (512, 256): Sizes(ahead=2, behind=2, together=2),
    (512, 512): _cut(stages=6),
    (_ANY, _ANY): Sizes(ahead=2, behind=2),
  },
  "widen": {
    (256, _ANY): _cut(stages=7, prefetch=True, beside=2),
    (512, _ANY): _cut(stages=7, prefetch=True, beside=2, behind=2, in_turn=True),
    (_ANY, _ANY): Sizes(),
  },
  "narrow_back": {
    (256, _ANY): _cut(stages=4, consumers=3),
    (512, _ANY): _cut(stages=5, ahead=2, prefetch=True),
  },
  "widen_back": {
    (512, _ANY): Sizes(together=2),
    (_ANY, _ANY): Sizes(in_turn=True),
  },
  "multiply": {
    (256, _ANY): Sizes(stays=True, stages=6, behind=2),
    (512, _ANY): _cut(stages=8, ahead=2, behind=2, prefetch=True),
  },
  "enter_back": {
    (_ANY, 256): Sizes(in_turn=True, twice=True),
    (_ANY, 512): Sizes(depth=32, stages=6, in_turn=True, twice=True, beside=2),
  },
}


def sizes_of(name: str, K: int, N: int) -> Sizes:
  """How a kernel is cut that multiplies [R, K] by [K, N]."""
  fitting = (sizes for most, sizes in SIZES[name].items() if most[0] >= K and most[1] >= N)
  sizes = next(fitting, Sizes())
  if gpu.simulated():
    sizes = dataclasses.replace(sizes, together=1, beside=1)
  columns = sizes.columns
  while columns > SLICE and N % columns:
    columns //= 2
  beside = 1 if N // columns % sizes.beside else sizes.beside
  return dataclasses.replace(sizes, columns=columns, beside=beside)


class Norm(NamedTuple):
  """What makes norm(x) W of x W'.

  Attributes:
    stats: sums of the rows.
    sums: of the columns of W' as it is rounded.
    bias: b', float32.
    width: columns of x.
    eps: added to the variance.
  """

  stats: Float32[Array, "tiles 2 Rp"]
  sums: Float32[Array, " N"]
  bias: Float32[Array, " N"]
  width: int
  eps: float = EPS


def in_rows(stats: Float32[Array, "tiles n Rp"]) -> Float32[Array, "tiles*n Rp"]:
  return stats.reshape(-1, stats.shape[-1])


def stats_of(x: BFloat16[Array, "R E"]) -> Float32[Array, "1 2 Rp"]:
  """Sums of the rows of an array that no kernel here has made."""
  pair = jnp.stack(epilogues.row_sums(x.astype(jnp.float32)))
  return jnp.pad(pair, [(0, 0), (0, -x.shape[0] % PAD_ROWS)])[None]


# --------------------------------------------------------------------------------------- forward


def enter(
  x: BFloat16[Array, "R E"],
  w: BFloat16[Array, "E N"],
  norm: Norm,
  widths: Sequence[int],
  sizes: Sizes | None = None,
) -> tuple[BFloat16[Array, "R _"], ...]:
  """norm(x) W + b, cut into arrays of these widths."""

  def run(strip: Strip, moments: tuple, sums: tuple) -> tuple:
    for j in strip.slices:
      strip.put(j, out=_affine(strip, j, *moments))
    strip.rows_done()
    return sums

  results = product.launch(
    "enter",
    [x],
    w,
    Epilogue(run=run, before=_moments_by(norm), outputs=dict(out=tuple(widths))),
    sizes or sizes_of("enter", *w.shape),
    rows=dict(stats=in_rows(norm.stats)),
    columns=dict(sums=norm.sums, bias=norm.bias),
  )
  return tuple(results[f"out{n}"] for n in range(len(widths)))


def drop_add(
  a: BFloat16[Array, "R K"],
  w: BFloat16[Array, "K E"],
  bias: Float32[Array, " E"],
  x: BFloat16[Array, "R E"],
  words: UInt32[Array, "_ R"] | None = None,
  rate: float = 0.0,
  sizes: Sizes | None = None,
) -> tuple[BFloat16[Array, "R E"], Float32[Array, "tiles 2 Rp"]]:
  """x + drop(a W + b), and its stats."""

  def run(strip: Strip, _: None, sums: tuple) -> tuple:
    pair = _no_sum(), _no_sum()
    if strip.plan.has_words:
      strip.wait_rows()
    for j in strip.slices:
      x = strip.take("x", j)
      y = epilogues.drop_add(strip.part(j), strip.column("bias", j), x, strip.keep(j), rate)
      y = _rounded(y)
      pair = _add(pair, epilogues.row_sums(gpu.widened(y)))
      strip.put(j, out=y)
    if strip.plan.has_words:
      strip.rows_done()
    strip.put_rows(*pair)
    return sums

  results = product.launch(
    "drop_add",
    [a],
    w,
    Epilogue(run=run, outputs=dict(out=(w.shape[1],)), row_sums=2),
    sizes or sizes_of("drop_add", *w.shape),
    inputs=dict(x=x),
    columns=dict(bias=bias),
    words=words,
  )
  return results["out0"], results["row_sums"]


def widen(
  h: BFloat16[Array, "R E"],
  w: BFloat16[Array, "E F"],
  norm: Norm,
  sizes: Sizes | None = None,
  *,
  activation: str = "quick_gelu",
) -> tuple[BFloat16[Array, "R F"], BFloat16[Array, "R F"]]:
  """u = norm(h) W + b, and g = f(u); f is one of `epilogues.ACTIVATIONS`."""
  f = epilogues.ACTIVATIONS[activation]

  def run(strip: Strip, moments: tuple, sums: tuple) -> tuple:
    for j in strip.slices:
      u = _affine(strip, j, *moments)
      strip.put(j, u=u, g=f.value(u))
    strip.rows_done()
    return sums

  F = w.shape[1]
  results = product.launch(
    "widen",
    [h],
    w,
    Epilogue(run=run, before=_moments_by(norm), outputs=dict(u=(F,), g=(F,))),
    sizes or sizes_of("widen", *w.shape),
    rows=dict(stats=in_rows(norm.stats)),
    columns=dict(sums=norm.sums, bias=norm.bias),
  )
  return results["u0"], results["g0"]


# -------------------------------------------------------------------------------------- backward


class Narrowed(NamedTuple):
  """What `narrow_back` gives.

  Attributes:
    du: gradient of u times rstd.
    back: per row and part of the columns, what `widen_back` takes: sums of du (u - b).
    sums: to be summed over its first axis: the gradient of b'.
  """

  du: BFloat16[Array, "R F"]
  back: Float32[Array, "tiles 1 Rp"]
  sums: Float32[Array, "parts 1 F"]


def narrow_back(
  dm: BFloat16[Array, "R E"],
  w: BFloat16[Array, "F E"],
  u: BFloat16[Array, "R F"],
  norm: Norm,
  sizes: Sizes | None = None,
  *,
  activation: str = "quick_gelu",
) -> Narrowed:
  """du = (dm W^T) f'(u) rstd.

  Args:
    dm: gradient of what g W + b is, after dropout.
    w: of the product that followed f.
    u: argument of f, as `widen` gave it.
    norm: that `widen` had.
    sizes: None: those that serve.
    activation: f, one of `epilogues.ACTIVATIONS`.
  """
  f = epilogues.ACTIVATIONS[activation]

  def before(strip: Strip) -> tuple[Traced, Traced]:
    slope = lax.optimization_barrier(f.slope(strip.first("u", 0)))
    _, rstd = _moments(strip, norm)
    return slope, rstd

  def run(strip: Strip, before: tuple[Traced, Traced], sums: tuple) -> tuple:
    slope, rstd = before
    weight = strip.weight(1.0 / rstd)  # the gradient of the bias is that of u without rstd
    total = _no_sum()
    for j in strip.slices:
      u = strip.read("u", j) if j == 0 else strip.first("u", j)
      slope = slope if j == 0 else f.slope(u)
      du = epilogues.activation_back(strip.part(j), slope, rstd)
      b = epilogues.over_rows(strip.column("bias", j), du.shape[0])
      # As it is before it is rounded, which is fewer instructions; a mean does not feel it.
      total = total + (du * (u - b)).sum(axis=1)
      strip.put(j, out=du)
      # Behind that the warps need not meet again for what is loaded next.
      if j == 0:
        strip.rows_done()
      strip.done("u", j)
      sums = strip.add_columns(sums, "out", j, du, weight)
    strip.put_rows(total)
    return sums

  F, E = w.shape
  results = product.launch(
    "narrow_back",
    [dm],
    w,
    Epilogue(
      run=run,
      before=before,
      outputs=dict(out=(F,)),
      row_sums=1,
      column_sums=True,
      by_tiles=True,
    ),
    sizes or sizes_of("narrow_back", E, F),
    transposed=True,
    inputs=dict(u=u),
    rows=dict(stats=in_rows(norm.stats)),
    columns=dict(bias=norm.bias),
  )
  return Narrowed(results["out0"], results["row_sums"], results["column_sums"])


def widen_back(
  du: BFloat16[Array, "R F"],
  w: BFloat16[Array, "E F"],
  h: BFloat16[Array, "R E"],
  norm: Norm,
  back: Float32[Array, "tiles 1 Rp"],
  dy: BFloat16[Array, "R E"],
  words: UInt32[Array, "_ R"] | None = None,
  rate: float = 0.0,
  sizes: Sizes | None = None,
) -> tuple[BFloat16[Array, "R E"], BFloat16[Array, "R E"], Float32[Array, "parts 1 E"]]:
  """dh = norm' (du W^T) + dy; da, dh after dropout; parts of da's sums over rows.

  Without `words` nothing is dropped, and da is dh.
  """
  names = ("dh", "da") if words is not None else ("dh",)
  if back.shape[0] > MOST_PARTS:
    back = back.sum(axis=0, keepdims=True)

  def run(strip: Strip, moments: tuple, sums: tuple) -> tuple:
    mean, rstd = moments
    (total,) = strip.row_totals("back", 1)
    along = total * (1 / norm.width)
    for j in strip.slices:
      xhat = epilogues.normalised(strip.take("h", j), mean, rstd)
      dh = epilogues.norm_back(strip.part(j) + strip.take("dy", j), xhat, along)
      values = dict(dh=dh)
      if words is not None:
        values |= dict(da=epilogues.drop(dh, strip.keep(j), rate))
      strip.put(j, **values)
      sums = strip.add_columns(sums, names[-1], j)
    strip.rows_done()
    return sums

  E, F = w.shape
  results = product.launch(
    "widen_back",
    [du],
    w,
    Epilogue(
      run=run,
      before=_moments_by(norm),
      outputs={name: (E,) for name in names},
      column_sums=True,
    ),
    sizes or sizes_of("widen_back", F, E),
    transposed=True,
    inputs=dict(h=h, dy=dy),
    rows=dict(stats=in_rows(norm.stats), back=in_rows(back)),
    words=words,
  )
  return results["dh0"], results[f"{names[-1]}0"], results["column_sums"]


def multiply(
  a: BFloat16[Array, "R K"], w: BFloat16[Array, "N K"], sizes: Sizes | None = None
) -> BFloat16[Array, "R N"]:
  """a W^T."""

  def run(strip: Strip, _: None, sums: tuple) -> tuple:
    for j in strip.slices:
      strip.put(j, out=strip.part(j))
    return sums

  N, K = w.shape
  epilogue = Epilogue(run=run, outputs=dict(out=(N,)))
  sizes = sizes or sizes_of("multiply", K, N)
  return product.launch("multiply", [a], w, epilogue, sizes, transposed=True)["out0"]


def enter_back(
  grads: Sequence[BFloat16[Array, "R _"]],
  w: BFloat16[Array, "E N"],
  x: BFloat16[Array, "R E"],
  stats: Float32[Array, "tiles 2 Rp"],
  dh: BFloat16[Array, "R E"],
  words: UInt32[Array, "_ R"] | None = None,
  rate: float = 0.0,
  eps: float = EPS,
  sizes: Sizes | None = None,
) -> tuple[
  BFloat16[Array, "R E"],
  BFloat16[Array, "R E"],
  BFloat16[Array, "R E"],
  Float32[Array, "parts 1 E"],
]:
  """dx = norm' (d W^T) + dh; dm, dx after dropout; xhat; parts of dm's sums over rows.

  Args:
    grads: of q, k and v: d, cut as `enter` has cut its result.
    w: of `enter`.
    x: of `enter`.
    stats: of x.
    dh: gradient of x that came past the norm.
    words: of the layer before, whose result is x.
    rate: of dropout.
    eps: of the norm.
    sizes: how the product is cut: a tile spans whole rows.
  """
  E = w.shape[0]
  names = ("dx", "dm") if words is not None else ("dx",)

  def before(strip: Strip) -> tuple[Traced, Traced]:
    strip.wait_rows()
    return epilogues.moments(*strip.row_totals("stats", 2), E, eps)

  def run(strip: Strip, moments: tuple, sums: tuple) -> tuple:
    mean, rstd = moments
    twice = strip.block.sizes.twice
    xhat = lambda x: epilogues.normalised(x, mean, rstd)
    total = _no_sum()
    for j in strip.slices:
      x = strip.take("x", j, again=True) if twice else strip.first("x", j)
      total = total + (strip.part(j) * xhat(x)).sum(axis=1)
    along = strip.meet(total) * rstd * (1 / E)
    for j in strip.slices:
      normal = xhat(strip.take("x", j) if twice else strip.last("x", j))
      values = {}

      def dx(j: int = j, normal: Traced = normal, values: dict = values) -> Traced:
        grad = strip.part(j) * epilogues.over_columns(rstd, SLICE) + strip.take("dh", j)
        values["dx"] = epilogues.norm_back(grad, normal, along)
        return values["dx"]

      def dm(j: int = j, values: dict = values) -> Traced:
        return epilogues.drop(values["dx"], strip.keep(j), rate)

      strip.put(j, xhat=normal, dx=dx, **(dict(dm=dm) if words is not None else {}))
      sums = strip.add_columns(sums, names[-1], j)
    strip.rows_done()
    return sums

  outputs = {name: (E,) for name in (*names, "xhat")}
  results = product.launch(
    "enter_back",
    grads,
    w,
    Epilogue(run=run, before=before, outputs=outputs, column_sums=True, whole=("x",), meets=True),
    sizes or _spanning(sizes_of("enter_back", w.shape[1], E), E),
    transposed=True,
    inputs=dict(x=x, dh=dh),
    rows=dict(stats=in_rows(stats)),
    words=words,
  )
  return results["dx0"], results[f"{names[-1]}0"], results["xhat0"], results["column_sums"]


def _spanning(sizes: Sizes, E: int) -> Sizes:
  """Tiles of whole rows: those of more than 256 columns have fewer rows."""
  if sizes.columns * sizes.beside == E:
    return sizes
  wide = E > 256
  stages = 2 if wide else sizes.stages
  return dataclasses.replace(sizes, columns=E, across=wide, stages=stages, beside=1)


# --------------------------------------------------------------------------------------- helpers


def _moments(strip: Strip, norm: Norm) -> tuple[Traced, Traced]:
  """mean and rstd of a strip's rows."""
  strip.wait_rows()
  return epilogues.moments(*strip.row_totals("stats", 2), norm.width, norm.eps)


def _moments_by(norm: Norm) -> Callable:
  return functools.partial(_moments, norm=norm)


def _affine(strip: Strip, j: int, mean: Traced, rstd: Traced) -> Traced:
  columns = strip.column("sums", j), strip.column("bias", j)
  return epilogues.affine_rows(strip.part(j), mean, rstd, *columns)


def _rounded(x: Traced) -> Traced:
  """In bfloat16, two at a time: what is also read again in float32 would be converted by one."""
  return lax.optimization_barrier(x.astype(jnp.bfloat16))


def _no_sum() -> Traced:
  return gpu.full((gpu.TILE,), 0.0)


def _add(pair: tuple, other: tuple) -> tuple[Traced, Traced]:
  return pair[0] + other[0], pair[1] + other[1]
