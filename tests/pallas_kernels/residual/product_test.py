"""Products and their epilogues in Pallas's simulator beside plain formulas; as an H100 has them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import residual
from pallas_kernels.residual import fold
from pallas_kernels.residual import kernels
from pallas_kernels.residual import mosaic_gpu
from pallas_kernels.residual import product
from pallas_kernels.residual.plan import Sizes

EPS = kernels.EPS
RATE = 0.25
# Three tiles for each thread block of the simulator, the last one cut; and an odd number of rows.
ROWS = (712, 333)
BODIES = {
  "streams": Sizes(columns=128),
  "streams, two ahead": Sizes(columns=128, ahead=2, behind=2, depth=32, stages=4),
  "stays": Sizes(columns=128, depth=32, stays=True, stages=3),
  "three consumers": Sizes(columns=128, stays=True, consumers=3, stages=4, ahead=2),
  "two columns of tiles": Sizes(columns=64, stays=True),
  "across": Sizes(columns=128, across=True),
}


def normal(seed, *shape, scale=1.0, dtype=jnp.bfloat16):
  return (jax.random.normal(jax.random.key(seed), shape) * scale).astype(dtype)


def weights(seed, *shape):
  """[K, N] or [N, K] of entries that leave the scale of what they multiply, about."""
  return normal(seed, *shape, scale=max(shape) ** -0.5)


def centred(seed, *shape):
  """`weights` after a norm, whose columns sum to zero, but for their rounding."""
  w = weights(seed, *shape).astype(jnp.float32)
  return (w - w.mean(0, keepdims=True)).astype(jnp.bfloat16)


def masks(seed, R, E):
  """Packed words, and the same as booleans."""
  keep = np.asarray(jax.random.bernoulli(jax.random.key(seed), 1 - RATE, (R, E)))
  words = (keep.reshape(R, E // 32, 32) << np.arange(32, dtype=np.uint32)).sum(-1)
  return jnp.asarray(words.astype(np.uint32).T), keep


def wide(x):
  return np.asarray(x, np.float64)


def normalised(x):
  x = wide(x)
  mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  rstd = 1 / np.sqrt(variance + EPS)
  return (x - mean) * rstd, mean, rstd


def gelu(u):
  return u / (1 + np.exp(-1.702 * u))


def gelu_slope(u):
  s = 1 / (1 + np.exp(-1.702 * u))
  return s + 1.702 * u * s * (1 - s)


def close(got, want, bound=5e-3):
  got, want = wide(got), wide(want)
  assert got.shape == want.shape
  assert np.isfinite(got).all()
  assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def stats_close(stats, x):
  """Sums of the rows of x, in any number of parts; of rows past the end there are some, too."""
  x, got = wide(x), wide(stats).sum(0)[:, : len(x)]
  np.testing.assert_allclose(got[0], x.sum(1), atol=1e-3 * x.shape[1] ** 0.5)
  np.testing.assert_allclose(got[1], (x * x).sum(1), rtol=1e-5)
  assert stats.shape[-1] == -(-len(x) // 128) * 128
  assert np.isfinite(stats).all()


def norm_of(x, w, seed):
  bias = normal(seed, w.shape[1], dtype=jnp.float32)
  sums = w.astype(jnp.float32).sum(0)
  return kernels.Norm(kernels.stats_of(x), sums, bias, x.shape[1])


CASES = [(R, name) for R in ROWS for name in BODIES]
by_body = pytest.mark.parametrize("R,body", CASES, ids=[f"{name}-{R}" for R, name in CASES])
some = pytest.mark.smoke("stays-712")
some_masked = pytest.mark.smoke("True-streams-333", "False-across-712")


@some
@by_body
def test_enter(R, body):
  x, w = normal(0, R, 64) + 3, weights(1, 64, 128)
  norm = norm_of(x, w, 2)
  q, k = kernels.enter(x, w, norm, (64, 64), BODIES[body])
  want = normalised(x)[0] @ wide(w) + wide(norm.bias)
  close(jnp.concatenate([q, k], 1), want)


@some_masked
@by_body
@pytest.mark.parametrize("dropped", [True, False])
def test_drop_add(R, body, dropped):
  a, w, x = normal(0, R, 64), weights(1, 64, 128), normal(2, R, 128)
  bias = normal(3, 128, dtype=jnp.float32)
  words, keep = masks(4, R, 128)
  how = (words, RATE) if dropped else ()
  y, stats = kernels.drop_add(a, w, bias, x, *how, sizes=BODIES[body])
  z = wide(a) @ wide(w) + wide(bias)
  close(y, wide(x) + (np.where(keep, z / (1 - RATE), 0) if dropped else z))
  stats_close(stats, y)


def test_numbers_of_rows_that_pad_are_finite():
  """Tiles of 192 rows: one holds all 150 rows, not all 256 that these are padded to."""
  a, w, x = normal(0, 150, 64), weights(1, 64, 128), normal(2, 150, 128)
  bias = normal(3, 128, dtype=jnp.float32)
  y, stats = kernels.drop_add(a, w, bias, x, sizes=BODIES["three consumers"])
  stats_close(stats, y)


@some
@by_body
def test_widen(R, body):
  h, w = normal(0, R, 64), weights(1, 64, 128)
  norm = norm_of(h, w, 2)
  u, g = kernels.widen(h, w, norm, BODIES[body])
  want = normalised(h)[0] @ wide(w) + wide(norm.bias)
  close(u, want)
  close(g, gelu(want))


@pytest.mark.one_day_in_six(3)
def test_squared_relu_and_its_gradient():
  R, E, F = 150, 64, 128
  how = dict(sizes=BODIES["stays"], activation="relu2")
  h, w = normal(0, R, E), weights(1, E, F)
  norm = norm_of(h, w, 2)
  u, g = kernels.widen(h, w, norm, **how)
  close(g, np.maximum(normalised(h)[0] @ wide(w) + wide(norm.bias), 0) ** 2)
  dm, down = normal(3, R, E), weights(4, F, E)
  got = kernels.narrow_back(dm, down, u, norm, **how)
  close(got.du, (wide(dm) @ wide(down).T) * 2 * np.maximum(wide(u), 0) * normalised(h)[2])


@some
@by_body
def test_narrow_back(R, body):
  dm, w, h = normal(0, R, 64), weights(1, 128, 64), normal(2, R, 32)
  up = weights(3, 32, 128)
  norm = norm_of(h, up, 4)
  xhat, _, rstd = normalised(h)
  u = jnp.asarray(xhat @ wide(up) + wide(norm.bias)).astype(jnp.bfloat16)
  got = kernels.narrow_back(dm, w, u, norm, BODIES[body])
  grad = (wide(dm) @ wide(w).T) * gelu_slope(wide(u))
  close(got.du, grad * rstd)
  close(wide(got.sums).sum((0, 1)), grad.sum(0))
  back = wide(got.back).sum(0)[:, :R]
  close(back[0], (grad * rstd * (wide(u) - wide(norm.bias))).sum(1), 1e-4)


@some_masked
@by_body
@pytest.mark.parametrize("dropped", [True, False])
def test_widen_back(R, body, dropped):
  du, w, h, dy = normal(0, R, 64), centred(1, 128, 64), normal(2, R, 128), normal(3, R, 128)
  norm = norm_of(h, w, 4)
  xhat, _, _ = normalised(h)
  words, keep = masks(5, R, 128)
  exact = wide(du) @ wide(w).T  # times rstd already
  # As `narrow_back` would give them, in two parts.
  total = np.pad((exact * xhat).sum(1), (0, -R % 128))[None]
  back = jnp.asarray(np.stack([0.25 * total, 0.75 * total]), jnp.float32)
  how = (words, RATE) if dropped else ()
  dh, da, sums = kernels.widen_back(du, w, h, norm, back, dy, *how, sizes=BODIES[body])
  mean = lambda z: z.mean(1, keepdims=True)
  want = exact - mean(exact) - xhat * mean(exact * xhat) + wide(dy)
  close(dh, want)
  after = np.where(keep, want / (1 - RATE), 0) if dropped else want
  close(da, after)
  close(wide(sums).sum((0, 1)), wide(da).sum(0), 1e-4)


@some
@by_body
def test_multiply(R, body):
  a, w = normal(0, R, 64), weights(1, 128, 64)
  close(kernels.multiply(a, w, BODIES[body]), wide(a) @ wide(w).T)


SPANNING = {
  "streams": Sizes(columns=128, depth=32),
  "stays": Sizes(columns=128, depth=32, stays=True),
  "across": Sizes(columns=128, depth=32, across=True),
  "twice": Sizes(columns=128, depth=32, twice=True, in_turn=True, prefetch=True),
}
SPAN_CASES = [(R, name) for R in ROWS for name in SPANNING]


@pytest.mark.smoke("twice-712-True", "streams-333-True", "across-712-True", "stays-333-False")
@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("R,body", SPAN_CASES, ids=[f"{name}-{R}" for R, name in SPAN_CASES])
def test_enter_back(R, body, dropped):
  grads = [normal(n, R, width) for n, width in enumerate((32, 32, 64))]
  w, x, dh = centred(3, 128, 128), normal(4, R, 128) + 2, normal(5, R, 128)
  words, keep = masks(6, R, 128)
  how = (words, RATE) if dropped else ()
  stats = kernels.stats_of(x)
  dx, dm, xhat, sums = kernels.enter_back(
    grads, w, x, stats, dh, *how, eps=EPS, sizes=SPANNING[body]
  )
  normal_x, _, rstd = normalised(x)
  grad = np.concatenate([wide(g) for g in grads], 1) @ wide(w).T
  mean = lambda z: z.mean(-1, keepdims=True)
  want = rstd * (grad - mean(grad) - normal_x * mean(grad * normal_x)) + wide(dh)
  close(xhat, normal_x)
  close(dx, want)
  close(dm, np.where(keep, want / (1 - RATE), 0) if dropped else want)
  close(wide(sums).sum((0, 1)), wide(dm).sum(0), 1e-4)


def test_rows_far_from_zero():
  """|mean| / std of 1,000: the mean is taken off after the product."""
  x = normal(0, 130, 64, dtype=jnp.float32)
  x = (x + 1_000.0).astype(jnp.bfloat16)
  w = weights(1, 64, 128)
  norm = norm_of(x, w, 2)
  u, _ = kernels.widen(x, w, norm, BODIES["stays"])
  close(u, normalised(x)[0] @ wide(w) + wide(norm.bias), 2e-2)


def test_sizes_that_do_not_fit_are_refused():
  a, w = normal(0, 128, 512), weights(1, 512, 512)
  with pytest.raises(ValueError, match="bytes of shared memory"):
    kernels.multiply(a, w, Sizes(stays=True))
  with pytest.raises(ValueError, match="must be a multiple"):
    kernels.multiply(a[:, :72], w[:, :72], Sizes())
  with pytest.raises(ValueError, match="in another slot"):
    kernels.multiply(a, w, Sizes(stages=1))


def test_tiles_of_parts_of_rows_are_refused_where_whole_ones_are_summed():
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  stats = jax.ShapeDtypeStruct((1, 2, 128), jnp.float32)
  call = functools.partial(kernels.enter_back, sizes=Sizes(columns=64, depth=32))
  x = array(128, 128)
  with pytest.raises(ValueError, match="parts of rows"):
    jax.eval_shape(call, (array(128, 64),), array(128, 64), x, stats, x)


@pytest.mark.parametrize("K,N", [(512, 256), (512, 512)])
def test_sizes_are_chosen_by_both_sides(K, N):
  """K = 512 is the width of one model and the hidden width of another."""
  assert kernels.sizes_of("drop_add", K, N).stays == (N == 512)


# -------------------------------------------------------------------------------------- lowering

H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
)
SHAPES = {  # R, E, F, widths of q, k and v
  "cifar10": (49_152, 256, 512, (128, 128, 256)),
  "enwik8": (98_304, 512, 2_048, (512, 512, 512)),
  "imagenet64": (49_152, 512, 2_048, (512, 512, 512)),
  "odd": (1_000, 256, 1_024, (128, 128, 256)),
}


def calls(R, E, F, widths):
  """Each kernel with the shapes that it has in a block."""
  bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  N, padded = sum(widths), -(-R // 128) * 128
  stats = f32((E // kernels.sizes_of("drop_add", F, E).columns, 2, padded))
  norm = lambda n: kernels.Norm(stats, f32((n,)), f32((n,)), E)
  words = jax.ShapeDtypeStruct((E // 32, R), jnp.uint32)
  x, wide = bf16((R, E)), bf16((R, F))
  back = f32((F // kernels.sizes_of("narrow_back", E, F).columns, 1, padded))

  def with_norm(function):
    def call(norm, *args):
      return function(norm._replace(width=E, eps=EPS), *args)

    return call

  bare = lambda n: norm(n)._replace(width=None, eps=None)
  return {
    "enter": (
      with_norm(lambda norm, x, w: kernels.enter(x, w, norm, widths)),
      (bare(N), x, bf16((E, N))),
    ),
    "drop_add attention": (
      lambda *args: kernels.drop_add(*args, rate=RATE),
      (x, bf16((E, E)), f32((E,)), x, words),
    ),
    "widen": (with_norm(lambda norm, h, w: kernels.widen(h, w, norm)), (bare(F), x, bf16((E, F)))),
    "drop_add": (
      lambda *args: kernels.drop_add(*args, rate=RATE),
      (wide, bf16((F, E)), f32((E,)), x, words),
    ),
    "narrow_back": (
      with_norm(lambda norm, dm, w, u: kernels.narrow_back(dm, w, u, norm)),
      (bare(F), x, bf16((F, E)), wide),
    ),
    "widen_back": (
      with_norm(
        lambda norm, du, w, h, back, dy, words: kernels.widen_back(
          du, w, h, norm, back, dy, words, RATE
        )
      ),
      (bare(F), wide, bf16((E, F)), x, back, x, words),
    ),
    "multiply": (kernels.multiply, (x, bf16((E, E)))),
    "enter_back": (
      lambda grads, *args: kernels.enter_back(grads, *args, rate=RATE),
      (tuple(bf16((R, n)) for n in widths), bf16((E, N)), x, stats, x, words),
    ),
  }


NAMES = tuple(calls(*SHAPES["odd"]))


def lowered(function, *args):
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("enter_back-enwik8", "narrow_back-imagenet64")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_an_h100_without_copies(name, shape):
  function, args = calls(*SHAPES[shape])[name]
  program = lowered(function, *args)
  assert program.count("mosaic_gpu_v2") == 1
  for copy in ("stablehlo.transpose", "stablehlo.gather", "stablehlo.pad", "stablehlo.slice"):
    assert copy not in program


@pytest.mark.parametrize("E", mosaic_gpu.WIDTHS)
def test_all_that_is_supported_fits(E, monkeypatch):
  """Sizes are checked before a kernel is traced, which does not happen here."""

  def launch(name, body, *, inputs, outputs, **how):
    return [jnp.zeros(x.shape, x.dtype) for x in outputs.values()]

  monkeypatch.setattr(product.gpu, "launch", launch)
  options = residual.Options(1e-5, "quick_gelu", 0.25, "mosaic_gpu")
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  wide = functools.partial(array, dtype=jnp.float32)
  linear = lambda K, N: fold.Linear(array(K, N), wide(N), wide(K, N), wide(N))
  words = array(1, 256, E // 32, dtype=jnp.uint32)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
  sizes = itertools.product((128, 512, 2_048, 4_096, 8_192), ((128, 256), (512, 512), (2_048,) * 2))
  for F, (N, V) in sizes:
    assert mosaic_gpu.unsupported(jnp.dtype(jnp.bfloat16), E, F, (N, N, V), "quick_gelu") is None
    joint = fold.Joint(array(E, 2 * N + V), wide(2 * N + V), wide(2 * N + V))
    entering = fold.EnterWeights(linear(E, N), linear(E, N), linear(E, V), joint)
    leaving = fold.LeaveWeights(linear(V, E), linear(E, F), linear(F, E))

    def run(x, entering, leaving, words):
      stream = residual.start(x, options, drops=True)
      *_, v, x = residual.enter(stream, entering, options)
      heads = v.reshape(*v.shape[:-1], 1, -1)
      stream = residual.leave(heads, x, leaving, (words, words), options)
      return residual.end(stream, options).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
      jax.eval_shape(jax.grad(run), array(1, 256, E), entering, leaving, words)


CLUSTERS = {
  "2 together": dict(together=2),
  "4 together": dict(together=4),
  "beside": dict(beside=2),
  "beside, twice": dict(beside=2, twice=True, in_turn=True, behind=2, stages=6, prefetch=True),
  "across": dict(columns=512, across=True, stages=2, together=2),
}


def spanning(R, clusters):
  """`enter_back` of rows of 512 columns by clusters, and what it shall give."""
  grads = [normal(0, R, 192)]
  w, x, dh = centred(1, 512, 192), normal(2, R, 512) + 2, normal(3, R, 512)
  words, keep = masks(4, R, 512)
  sizes = Sizes(**dict(depth=32, stages=3) | CLUSTERS[clusters])
  run = lambda: kernels.enter_back(grads, w, x, kernels.stats_of(x), dh, words, RATE, sizes=sizes)
  xhat, _, rstd = normalised(x)
  grad = wide(grads[0]) @ wide(w).T
  mean = lambda z: z.mean(-1, keepdims=True)
  dx = rstd * (grad - mean(grad) - xhat * mean(grad * xhat)) + wide(dh)
  return run, dx, np.where(keep, dx / (1 - RATE), 0), xhat


@pytest.mark.one_day_in_six(1)
@pytest.mark.parametrize("clusters", ["beside", "beside, twice", "across"])
def test_clusters_that_span_rows_lower(clusters):
  """The simulator has no clusters."""
  run, *_ = spanning(200, clusters)
  assert lowered(run).count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("clusters", ["2 together", "4 together"])
def test_clusters_lower(clusters):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  call = lambda a, w: kernels.multiply(a, w, Sizes(**CLUSTERS[clusters]))
  assert lowered(call, array(1_000, 1_024), array(512, 1_024)).count("mosaic_gpu_v2") == 1


STAY = {
  "2": dict(stages=6, beside=2, prefetch=True),
  "4": dict(stages=8, ahead=2, behind=2, beside=4),
  "2, three consumers": dict(stages=4, consumers=3, beside=2),
}


def beside(R, clusters):
  """`narrow_back`, of weights that stay and have 512 columns, and what it shall give."""
  dm, w, u, h = normal(0, R, 256), weights(1, 512, 256), normal(2, R, 512), normal(3, R, 64)
  norm = norm_of(h, weights(4, 64, 512), 5)
  sizes = Sizes(columns=128, stays=True, **STAY[clusters])
  run = lambda: kernels.narrow_back(dm, w, u, norm, sizes)
  grad = (wide(dm) @ wide(w).T) * gelu_slope(wide(u))
  du = grad * normalised(h)[2]
  rows = (du * (wide(u) - wide(norm.bias))).sum(1)[None]
  return run, du, rows, grad.sum(0)


@pytest.mark.smoke()
@pytest.mark.parametrize("clusters", STAY)
def test_clusters_of_weights_that_stay_lower(clusters):
  run, *_ = beside(200, clusters)
  assert lowered(run).count("mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1_000, 20_000, 333])
@pytest.mark.parametrize("clusters", STAY)
def test_clusters_of_weights_that_stay(clusters, R):
  run, du, rows, columns = beside(R, clusters)
  got = run()
  close(got.du, du)
  close(wide(got.back).sum(0)[:, :R], rows, 1e-4)
  close(wide(got.sums).sum((0, 1)), columns)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1_000, 20_000, 333])
@pytest.mark.parametrize("clusters", ["2 together", "4 together"])
def test_clusters(clusters, R):
  """The last tiles of a cluster may not exist."""
  a, w = normal(0, R, 1_024), weights(1, 512, 1_024)
  close(kernels.multiply(a, w, Sizes(**CLUSTERS[clusters])), wide(a) @ wide(w).T)


@pytest.mark.gpu
@pytest.mark.parametrize("R", [1_000, 20_000, 333])
@pytest.mark.parametrize("clusters", ["beside", "beside, twice", "across"])
def test_clusters_that_span_rows(clusters, R):
  run, *wants = spanning(R, clusters)
  *gots, sums = run()
  for got, want in zip(gots, wants, strict=True):
    close(got, want)
  close(wide(sums).sum((0, 1)), wide(gots[1]).sum(0), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["multiply", "narrow_back"])
def test_equal_bits_in_two_runs(name):
  R, E, F = 20_000, 256, 512
  dm, w, u, h = normal(0, R, E), weights(1, F, E), normal(2, R, F), normal(3, R, E)
  norm = norm_of(h, weights(4, E, F), 5)
  run = jax.jit(
    (lambda: kernels.narrow_back(dm, w, u, norm)) if name == "narrow_back" else
    (lambda: (kernels.multiply(dm, w),))
  )  # fmt: skip
  for first, second in zip(run(), run(), strict=True):
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (first, second)))
