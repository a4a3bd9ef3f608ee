"""The products around attention on a GPU, each alone with all that is fused to it, bfloat16.

Kernel times from CUPTI. The floor of a row is the larger of the time to move its arrays once at
this device's copy bandwidth and of the time of its product at the rate of a large square product,
both measured in this run; share: floor over ms. `matmul_ms` is cuBLAS's for the product alone, and
of gradients what XLA takes for all of them, sums included.
Checked first: relative errors of all results against plain float32 formulas, at most 5e-3.
`--only=sizes` measures every way to cut them as well.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import report
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import residual_sizes
from experiments.benchmark.gpu import timing
from pallas_kernels.residual import gradients
from pallas_kernels.residual import kernels
from pallas_kernels.residual import outer

RATE = 0.25
BOUND = 5e-3
SQUARE = 8_192  # rows and columns of the product whose rate is the roof
SIZES = "sizes"


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a block.

  Attributes:
    R: rows.
    E: width.
    F: width between the two products.
    widths: of q, k and v.
  """

  R: int
  E: int
  F: int
  widths: tuple[int, ...]


SHAPES = {
  "cifar10": Shape(49_152, 256, 512, (128, 128, 256)),
  "enwik8": Shape(98_304, 512, 2_048, (512, 512, 512)),
  "imagenet64": Shape(49_152, 512, 2_048, (512, 512, 512)),
}

# ------------------------------------------------------------------------------------ references


def wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b, summed in float32."""
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def exact(a: jax.Array, b: jax.Array) -> jax.Array:
  """a b of float32."""
  return jnp.matmul(a, b, precision="highest")


def normalised(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  x = wide(x)
  mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
  rstd = 1 / jnp.sqrt(variance + kernels.EPS)
  return (x - mean) * rstd, mean, rstd


def dropped(x: jax.Array, words: jax.Array) -> jax.Array:
  bits = (words.T[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
  return jnp.where(bits.reshape(x.shape) == 1, x / (1 - RATE), 0)


def norm_back(grad: jax.Array, xhat: jax.Array) -> jax.Array:
  mean = lambda x: x.mean(1, keepdims=True)
  return grad - mean(grad) - xhat * mean(grad * xhat)


def gelu(u: jax.Array) -> jax.Array:
  return u * jax.nn.sigmoid(1.702 * u)


# --------------------------------------------------------------------------------------- kernels


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel at a shape.

  Attributes:
    run: (sizes, *arrays) -> results.
    reference: (*arrays) -> the same in float32; what results have in parts is summed.
    make: () -> arrays.
    of_product: K and N.
    cut: name in `kernels.SIZES`; gradients have one of `gradients.CUTS`.
    by_xla: (*arrays) -> results, of gradients.
  """

  run: Callable
  reference: Callable
  make: Callable
  of_product: tuple[int, int]
  cut: str
  by_xla: Callable | None = None

  def default(self) -> kernels.Sizes | outer.Cut:
    """How it is cut where nothing else is asked for."""
    if self.by_xla:
      return gradients.CUTS[0]
    return kernels.sizes_of(self.cut, *self.of_product)


def _arrays(shape: Shape, *names: str) -> tuple[jax.Array, ...]:
  """Arrays by name, of the scale that they have in a model."""
  R, E, F, N = shape.R, shape.E, shape.F, sum(shape.widths)
  keys = iter(jax.random.split(jax.random.key(0), 32))
  normal = lambda *size: jax.random.normal(next(keys), size, jnp.bfloat16)
  float_weights = lambda K, N: jax.random.normal(next(keys), (K, N)) * K**-0.5
  weights = lambda K, N: float_weights(K, N).astype(jnp.bfloat16)
  centred = lambda w: (w - w.mean(0, keepdims=True)).astype(jnp.bfloat16)  # as after a norm
  vector = lambda n: jax.random.normal(next(keys), (n,))
  q, k, v = shape.widths
  make = dict(
    x=lambda: normal(R, E), h=lambda: normal(R, E), o=lambda: normal(R, E),
    dy=lambda: normal(R, E), dm=lambda: normal(R, E), u=lambda: normal(R, F),
    du=lambda: normal(R, F), g=lambda: normal(R, F),
    dq=lambda: normal(R, q), dk=lambda: normal(R, k), dv=lambda: normal(R, v),
    w_enter=lambda: centred(float_weights(E, N)), w_out=lambda: weights(E, E),
    w_up=lambda: centred(float_weights(E, F)),
    w_down=lambda: weights(F, E), b_enter=lambda: vector(N), b_up=lambda: vector(F),
    b_out=lambda: vector(E),
    words=lambda: jax.random.bits(next(keys), (E // 32, R), jnp.uint32)
    | jax.random.bits(next(keys), (E // 32, R), jnp.uint32),
  )  # fmt: skip
  return tuple(make[name]() for name in names)


def gradients_of(shape: Shape) -> dict[str, Kernel]:
  """All sums of a half of a block."""
  E, F, N = shape.E, shape.F, sum(shape.widths)

  def ways(products: Callable, *, biases: bool) -> dict[str, Callable]:
    """Ways to make gradients: the products of arrays, and what other kernels leave in parts."""
    rows = lambda sums: (*sums.weights, *(b[None] for b in sums.biases), *sums.totals)

    def run(sizes, parts, *arrays):
      cut = sizes or gradients.CUTS[0]
      return rows(gradients.by_kernels(products(*arrays), parts, cut, biases=biases))

    def by_xla(parts, *arrays):
      return rows(gradients.by_xla(products(*arrays), parts, biases=biases))

    def plain(parts, *arrays):
      pairs = [(a, b) for a, bs in products(*arrays) for b in bs]
      weights = [dot(a.T, b) for a, b in pairs]
      return (
        *weights,
        *(wide(b).sum(0)[None] for _, b in pairs if biases),
        *(x.sum(0) for x in parts),
      )

    return dict(run=run, by_xla=by_xla, reference=plain, cut="")

  def with_parts(names: tuple[str, ...], *shapes: tuple[int, ...]) -> Callable:
    parts = lambda: [jax.random.normal(jax.random.key(1), size) for size in shapes]
    return lambda: (parts(), *_arrays(shape, *names))

  pairs = lambda *arrays: [
    outer.Product(a, (b,)) for a, b in zip(arrays[::2], arrays[1::2], strict=True)
  ]
  of_enter = ways(lambda x, *grads: [outer.Product(x, grads)], biases=True)
  # Parts are as many as one H200 leaves.
  return {
    "enter_gradients": Kernel(
      make=with_parts(("x", "dq", "dk", "dv"), (264, 1, E)), of_product=(E, N), **of_enter
    ),
    "leave_gradients": Kernel(
      make=with_parts(("o", "dy", "h", "du", "g", "dm"), (99, 1, F), (132, 1, E)),
      of_product=(E, E + 2 * F),
      **ways(pairs, biases=False),
    ),
  }


def kernels_of(shape: Shape) -> dict[str, Kernel]:
  """All of a block, in the order in which a step runs them."""
  E, F, N = shape.E, shape.F, sum(shape.widths)
  arrays = lambda *names: functools.partial(_arrays, shape, *names)

  def with_stats(*names: str, of: str, w: str = "", b: str = "") -> Callable:
    """Arrays by name, after them stats of one, sums of the columns of another, and a bias."""

    def make() -> tuple[jax.Array, ...]:
      given = _arrays(shape, *names)
      by_name = dict(zip(names, given, strict=True))
      more = [kernels.stats_of(by_name[of])] if of in names else []
      if w:
        (weights,) = _arrays(shape, w) if w not in names else (by_name[w],)
        more += [wide(weights).sum(0), *_arrays(shape, b)]
      return *given, *more

    return make

  norm = lambda stats, sums, bias: kernels.Norm(stats, sums, bias, E)

  def enter(sizes, x, w, stats, sums, bias):
    return kernels.enter(x, w, norm(stats, sums, bias), shape.widths, sizes)

  def enter_plain(x, w, stats, sums, bias):
    y = exact(normalised(x)[0], wide(w)) + bias[None]
    return tuple(jnp.split(y, np.cumsum(shape.widths)[:-1].tolist(), axis=1))

  def drop_add(sizes, a, w, bias, x, words):
    return kernels.drop_add(a, w, bias, x, words, RATE, sizes)

  def drop_add_plain(a, w, bias, x, words):
    y = wide(x) + dropped(dot(a, w) + bias[None], words)
    return y, jnp.stack([y.sum(1), (y * y).sum(1)])

  def widen(sizes, h, w, stats, sums, bias):
    return kernels.widen(h, w, norm(stats, sums, bias), sizes)

  def widen_plain(h, w, stats, sums, bias):
    u = exact(normalised(h)[0], wide(w)) + bias[None]
    return u, gelu(u)

  def narrow_back(sizes, dm, w, u, h, w_up, stats, sums, bias):
    return kernels.narrow_back(dm, w, u, norm(stats, sums, bias), sizes)

  def narrow_back_plain(dm, w, u, h, w_up, stats, sums, bias):
    rstd = normalised(h)[2]
    grad = jax.vjp(gelu, wide(u))[1](dot(dm, w.T))[0]
    du = grad * rstd
    back = (du * (wide(u) - bias[None])).sum(1)[None]
    return du, back, grad.sum(0, keepdims=True)

  def widen_back(sizes, du, w, h, dy, words, back, stats, sums, bias):
    return kernels.widen_back(du, w, h, norm(stats, sums, bias), back, dy, words, RATE, sizes)

  def widen_back_plain(du, w, h, dy, words, back, stats, sums, bias):
    dh = norm_back(dot(du, w.T), normalised(h)[0]) + wide(dy)
    da = dropped(dh, words)
    return dh, da, da.sum(0, keepdims=True)

  def with_back() -> tuple[jax.Array, ...]:
    du, w, h, dy, words = _arrays(shape, "du", "w_up", "h", "dy", "words")
    tiles = F // kernels.sizes_of("narrow_back", E, F).columns
    grad = dot(du, w.T)
    total = (grad * normalised(h)[0]).sum(1)[None] / tiles
    stats, bias = kernels.stats_of(h), _arrays(shape, "b_up")[0]
    return du, w, h, dy, words, jnp.stack([total] * tiles), stats, wide(w).sum(0), bias

  def enter_back(sizes, dq, dk, dv, w, x, dh, words, stats):
    return kernels.enter_back((dq, dk, dv), w, x, stats, dh, words, RATE, sizes=sizes)

  def enter_back_plain(dq, dk, dv, w, x, dh, words, stats):
    xhat, _, rstd = normalised(x)
    dx = rstd * norm_back(dot(jnp.concatenate([dq, dk, dv], 1), w.T), xhat) + wide(dh)
    dm = dropped(dx, words)
    return dx, dm, xhat, dm.sum(0, keepdims=True)

  return {
    "enter": Kernel(
      enter,
      enter_plain,
      with_stats("x", "w_enter", of="x", w="w_enter", b="b_enter"),
      (E, N),
      "enter",
    ),
    "drop_add_attention": Kernel(
      drop_add, drop_add_plain, arrays("o", "w_out", "b_out", "x", "words"), (E, E), "drop_add"
    ),
    "widen": Kernel(
      widen, widen_plain, with_stats("h", "w_up", of="h", w="w_up", b="b_up"), (E, F), "widen"
    ),
    "drop_add": Kernel(
      drop_add, drop_add_plain, arrays("g", "w_down", "b_out", "h", "words"), (F, E), "drop_add"
    ),
    "narrow_back": Kernel(
      narrow_back,
      narrow_back_plain,
      with_stats("dm", "w_down", "u", "h", "w_up", of="h", w="w_up", b="b_up"),
      (E, F),
      "narrow_back",
    ),
    "widen_back": Kernel(widen_back, widen_back_plain, with_back, (F, E), "widen_back"),
    "multiply": Kernel(
      lambda sizes, a, w: (kernels.multiply(a, w, sizes),),
      lambda a, w: (dot(a, w.T),),
      arrays("dy", "w_out"),
      (E, E),
      "multiply",
    ),
    "enter_back": Kernel(
      enter_back,
      enter_back_plain,
      with_stats("dq", "dk", "dv", "w_enter", "x", "dy", "words", of="x"),
      (N, E),
      "enter_back",
    ),
  } | gradients_of(shape)


NAMES = tuple(kernels_of(SHAPES["cifar10"]))
CANDIDATES = residual_sizes.CANDIDATES
PARTS = (*SHAPES, *NAMES, SIZES)

# ------------------------------------------------------------------------------------------ jobs


def build(shape: Shape, name: str, sizes: kernels.Sizes | outer.Cut | None):
  """The kernel alone."""
  kernel = kernels_of(shape)[name]
  return functools.partial(kernel.run, sizes), kernel.make


def build_check(shape: Shape, name: str, sizes: kernels.Sizes | outer.Cut | None):
  """Relative errors of all results."""
  kernel = kernels_of(shape)[name]

  def errors(*args: jax.Array) -> jax.Array:
    wants = kernel.reference(*args)
    gots = [x.sum(0) if x.ndim == 3 else x for x in kernel.run(sizes, *args)]
    norm = lambda x: jnp.sqrt(jnp.square(wide(x)).sum())
    pairs = zip(gots, wants, strict=True)
    # Numbers of rows are padded to whole tiles.
    differs = lambda got, want: norm(wide(got)[:, : want.shape[1]] - want) / norm(want)
    return jnp.stack([differs(*pair) for pair in pairs])

  return errors, kernel.make


def build_by_xla(shape: Shape, name: str):
  """Gradients as they are made where no kernel serves."""
  kernel = kernels_of(shape)[name]
  return kernel.by_xla, kernel.make


def build_matmul(R: int, K: int, N: int):
  """A product alone, by cuBLAS."""
  key = jax.random.key(0)
  make = lambda: (jax.random.normal(key, (R, K), jnp.bfloat16),
                  jax.random.normal(key, (K, N), jnp.bfloat16))  # fmt: skip
  return jnp.matmul, make


def errors_of(result: jax.Array) -> jax.Array:
  return result


def num_bytes(shape: Shape, name: str) -> int:
  """Of all arrays that a kernel reads and writes, once."""
  kernel = kernels_of(shape)[name]
  args = jax.eval_shape(kernel.make)
  results = jax.eval_shape(kernel.reference, *args)
  size = lambda x: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
  # What only makes the reference is not read; results are bfloat16, their sums are small.
  unread = {"narrow_back": (3, 4), "enter": (), "widen": ()}.get(name, ())
  read = sum(size(x) for x in jax.tree.leaves([x for n, x in enumerate(args) if n not in unread]))
  return read + sum(2 * math.prod(x.shape) for x in results if x.shape[0] == shape.R)


def jobs_of(shapes: list[str], names: list[str], all_sizes: bool) -> dict[tuple, timing.Job]:
  """By what, shape, kernel and how it is cut."""
  jobs = {("copy", dtype): timing.Job(attention.build_copy, (dtype,), 0.1) for dtype in
          attention.COPIED}  # fmt: skip
  jobs["square",] = timing.Job(build_matmul, (SQUARE,) * 3, 0.1)
  for shape in shapes:
    for name in names:
      of, kernel = (SHAPES[shape], name), kernels_of(SHAPES[shape])[name]
      alone = (build_by_xla, of) if kernel.by_xla else (build_matmul, (of[0].R, *kernel.of_product))
      jobs["matmul", shape, name] = timing.Job(*alone, 0.2)
      for sizes in (None, *(CANDIDATES[name] if all_sizes else ())):
        jobs["check", shape, name, sizes] = timing.Job(
          build_check, (*of, sizes), 1.5, look=errors_of
        )
        jobs["time", shape, name, sizes] = timing.Job(build, (*of, sizes))
  return jobs


# ------------------------------------------------------------------------------------------ rows


def measure(shapes: list[str], names: list[str], all_sizes: bool) -> tuple[dict, list[dict]]:
  """Rates of this device, and the rows."""
  jobs, rows = jobs_of(shapes, names, all_sizes), []
  with timing.measuring(jobs) as measured:
    copies = {dtype: measured(("copy", dtype)) for dtype in attention.COPIED}
    square = measured(("square",))
    for result in (*copies.values(), square):
      if result.error:
        raise RuntimeError(f"no rates, no floor: {result.error}")
    copy = max(2 * attention.COPY_BYTES / x.ms / 1e6 for x in copies.values())
    rates = dict(copy_gb_per_s=round(copy, 1), tflops=round(2 * SQUARE**3 / square.ms / 1e9, 1))
    print(rates, flush=True)
    timed = [key for key in jobs if key[0] == "time"]
    progress = timing.Progress(len(timed))
    for key in timed:
      row = row_of(key[1:], measured, rates)
      rows.append(row)
      progress(*key[1:3], row.get("error") or f"{row['ms']} ms, share {row['share']}")
  return rates, rows


def row_of(key: tuple, measured: Callable, rates: dict[str, float]) -> dict:
  """Of a kernel at a shape, cut in one way."""
  shape_name, name, sizes = key
  shape = SHAPES[shape_name]
  kernel = kernels_of(shape)[name]
  (K, N), cut = kernel.of_product, sizes or kernel.default()
  row = dict(shape=shape_name, kernel=name, default=sizes is None, sizes=dataclasses.asdict(cut))
  check = measured(("check", *key))
  if check.error:
    return row | dict(ms=None, error=check.error)
  errors = [float(x) for x in check.seen[0]]
  row["errors"] = [float(f"{x:.2e}") if math.isfinite(x) else str(x) for x in errors]
  if not all(x <= BOUND for x in errors):
    row["error"] = f"relative errors {row['errors']}, at most {BOUND}"
  result, alone = measured(("time", *key)), measured(("matmul", shape_name, name))
  if result.error:
    return row | dict(ms=None, error=result.error)
  flops, size = 2 * shape.R * K * N, num_bytes(shape, name)
  memory, products = size / rates["copy_gb_per_s"] / 1e6, flops / rates["tflops"] / 1e9
  return row | dict(
    ms=round(result.ms, 5),
    kernels=list(result.kernels),
    matmul_ms=alone.ms and round(alone.ms, 5),
    memory_ms=round(memory, 5),
    products_ms=round(products, 5),
    share=round(max(memory, products) / result.ms, 4),
    gb_per_s=round(size / result.ms / 1e6, 1),
    tflops=round(flops / result.ms / 1e9, 1),
  )


def print_rows(rows: list[dict]) -> None:
  show = lambda value, digits: "" if value is None else f"{value:,.{digits}f}"
  table = []
  for row in rows:
    figures = (show(row.get(x), 4) for x in ("ms", "memory_ms", "products_ms", "matmul_ms"))
    cut = "default" if row["default"] else " ".join(str(x) for x in row["sizes"].values())
    rest = show(row.get("share"), 3), show(row.get("gb_per_s"), 0), show(row.get("tflops"), 0)
    table.append((f"{row['shape']} {row['kernel']}", cut, *figures, *rest))
  header = ("shape, kernel", "sizes", "ms", "memory", "products", "cuBLAS", "share", "GB/s", "TF/s")
  report.print_table(header, table)
  for row in rows:
    if "error" in row:
      print("FAILED", row["shape"], row["kernel"], row["sizes"], "\n ", row["error"])


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes residual_<device>.json; whether all default rows are right."""
  print(__doc__, flush=True)
  shapes, names = timing.chosen(SHAPES, only), timing.chosen(NAMES, only)
  rates, rows = measure(shapes, names, SIZES in only)
  print_rows(rows)
  report.write(
    out / f"residual_{report.short_device()}.json",
    rows,
    **rates,
    shapes={name: vars(SHAPES[name]) for name in shapes},
  )
  return not any("error" in row for row in rows if row["default"])
