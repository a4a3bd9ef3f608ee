"""The two halves of a block against the reference: values, and the gradient of every leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hardware
from pallas_kernels import residual
from pallas_kernels.residual import activations
from pallas_kernels.residual import dropout
from pallas_kernels.residual import fold
from pallas_kernels.residual import reference
from pallas_kernels.residual import xla

EPSILON = 1e-5
R, E, V, N, F = 37, 40, 24, 20, 72  # rows, widths of stream, values, queries, hidden


def arrays(dtype="float32", *, gain: float | None = None, offset: float = 0.0) -> dict:
  """Weights and inputs by name; gains around 1 or all `gain`; rows of mean around `offset`."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  affine = lambda rows, columns: reference.Affine(
    normal(rows, columns) / rows**0.5, normal(columns)
  )
  norm = lambda: reference.Norm(
    1 + 0.3 * normal(E) if gain is None else jnp.full(E, gain, dtype), normal(E)
  )
  return dict(
    x=normal(R, E) + offset * normal(R, 1),
    o=normal(R, V),
    norms=(norm(), norm()),
    projections=(affine(E, N), affine(E, N), affine(E, V)),
    out=affine(V, E),
    up=affine(E, F),
    down=affine(F, E),
  )


def bits_of(rate: float, n: int = 0):
  """Of block n."""
  seeds = jnp.array([[1 + n, 2], [3 + n, 4]], jnp.uint32)
  return tuple(dropout.keep_bits(seed, rate, (R, E)) for seed in seeds) if rate else None


def mixed(values, seed: int = 1):
  """One number that depends on every element in its own way."""
  rng = np.random.default_rng(seed)
  weigh = lambda y: (y * jnp.asarray(rng.normal(size=y.shape), y.dtype)).astype(jnp.float32).sum()
  return sum(weigh(y) for y in values)


def expected_of(given: dict, rate: float, activation: str):
  """q, k and v of two blocks, and what comes out of them; attention's result depends on v."""
  x, results = given["x"], []
  for n in range(2):
    q, k, v = reference.enter(x, given["norms"][0], given["projections"], epsilon=EPSILON)
    bits = bits_of(rate, n)
    x = reference.leave(
      given["o"] + v, x, given["out"], given["norms"][1], given["up"], given["down"],
      kept=bits and tuple(dropout.unpack(words, E) for words in bits),
      keep_probability=dropout.keep_probability(rate),
      activation=activations.ACTIVATIONS[activation].value,
      epsilon=EPSILON,
    )  # fmt: skip
    results += [q, k, v]
  return *results, x


def folded(given: dict, dtype):
  first, second = given["norms"]
  normed = lambda layer, norm: fold.after_norm(
    layer.kernel, layer.bias, gain=norm.gain, shift=norm.shift, dtype=dtype
  )
  entering = fold.EnterWeights(*(normed(layer, first) for layer in given["projections"]))
  plain = lambda layer: fold.linear(layer.kernel, layer.bias, dtype)
  leaving = fold.LeaveWeights(
    plain(given["out"]), normed(given["up"], second), plain(given["down"])
  )
  return entering._replace(joint=fold.joint(*entering[:3])), leaving


def got_of(given: dict, rate: float, activation: str, dtype=None, implementation="xla"):
  x, o = (given[name].astype(dtype or given[name].dtype) for name in ("x", "o"))
  entering, leaving = folded(given, x.dtype)
  options = residual.Options(EPSILON, activation, rate, implementation)
  stream, results = residual.start(x, options, drops=rate > 0), []
  for n in range(2):
    q, k, v, x = residual.enter(stream, entering, options)
    heads = (o + v).reshape(R, 4, V // 4)
    stream = residual.leave(heads, x, leaving, bits_of(rate, n), options)
    results += [q, k, v]
  return *results, residual.end(stream, options)


def relative(got, expected) -> float:
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6)


def compare(given, *, rate, activation="quick_gelu", tolerance, **how):
  """Values, and gradients of every input, all relative to the largest entry of the array."""
  run = lambda f: jax.jit(jax.value_and_grad(lambda given: _with_values(f(given)), has_aux=True))
  expect = functools.partial(expected_of, rate=rate, activation=activation)
  get = functools.partial(got_of, rate=rate, activation=activation, **how)
  (_, values), gradients = run(expect)(given)
  (_, own_values), own_gradients = run(get)(given)
  leaves = jax.tree.leaves_with_path
  for tree, own in ((values, own_values), (gradients, own_gradients)):
    for (path, a), (_, b) in zip(leaves(tree), leaves(own), strict=True):
      assert relative(b, a) <= tolerance, jax.tree_util.keystr(path)


def _with_values(values):
  return mixed(values), values


@pytest.mark.parametrize(
  ("rate", "activation"), [(0.0, "quick_gelu"), (0.25, "relu"), (0.4, "quick_gelu")]
)
def test_values_and_every_gradient(rate, activation):
  compare(arrays(), rate=rate, activation=activation, tolerance=2e-5)


@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize("offset", [0.0, 1_000.0])
def test_the_algebra_is_exact(offset):
  """In float64, where the sums of squares of rows with mean / std = 10^3 leave 10 digits."""
  with jax.enable_x64(True):
    compare(arrays("float64", offset=offset), rate=0.4, tolerance=1e-12 if offset == 0 else 1e-7)


def test_gains_of_zero_have_gradients():
  compare(arrays(gain=0.0), rate=0.25, tolerance=2e-5)


def test_rows_far_from_zero():
  compare(arrays(offset=30.0), rate=0.25, tolerance=2e-3)


@pytest.mark.one_day_in_six(3)
@pytest.mark.smoke("0.4", daily=0)
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_kernels_agree_with_the_reference(rate, monkeypatch):
  for name, value in dict(R=150, E=256, V=256, N=128, F=256).items():
    monkeypatch.setitem(globals(), name, value)
  compare(arrays(), rate=rate, tolerance=3e-2, dtype=jnp.bfloat16, implementation="mosaic_gpu")


def test_bfloat16_is_as_close_as_its_digits():
  compare(arrays(), rate=0.25, tolerance=3e-2, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_row_sums_go_on_with_the_rows_and_have_no_gradient(dtype):
  given = arrays(dtype)
  leaving = folded(given, jnp.dtype(dtype))[1]
  run = lambda x: residual.leave(
    given["o"][:, None], x, leaving, bits_of(0.4), residual.Options(EPSILON, "relu", 0.4, "xla")
  )
  y, *_, stats, _ = run(given["x"])
  exact = np.asarray(y, np.float64)
  expected = np.stack([exact.sum(1), (exact**2).sum(1)], axis=1)[:, None]
  np.testing.assert_allclose(stats, expected, rtol=1e-5, atol=1e-4)
  assert not np.any(jax.grad(lambda x: run(x).stats.sum().astype(jnp.float32))(given["x"]))


@pytest.mark.one_day_in_three(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_weights_are_never_rounded_to_the_dtype_of_the_stream(dtype):
  """Rows of 1 and of 2^-12: their sum has no place in either dtype."""
  x = jnp.full((4_097, 8), 2.0**-12, dtype).at[0].set(1)
  sums = xla.weight_gradient(x, jnp.ones((4_097, 3), dtype))
  assert sums.dtype == jnp.float32
  np.testing.assert_array_equal(sums, np.full((8, 3), 2.0))
  given = arrays()
  grads = jax.grad(lambda given: mixed(got_of(given, 0.0, "quick_gelu", jnp.dtype(dtype))))(given)
  for path, grad in jax.tree.leaves_with_path(grads):
    rounded = grad.astype(dtype).astype(grad.dtype)
    name = jax.tree_util.keystr(path)
    assert grad.dtype == jnp.float32
    assert name in ("['x']", "['o']") or np.mean(rounded != grad) > 0.5, name


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_derivatives_of_activations(name):
  f, u = activations.ACTIVATIONS[name], jnp.linspace(-30, 30, 1_001) + 0.013
  value, slope = f.with_derivative(u)
  np.testing.assert_array_equal(value, f.value(u))
  np.testing.assert_allclose(slope, jax.vmap(jax.grad(f.value))(u), atol=2e-6)


def test_quick_gelu_is_u_times_a_sigmoid():
  u = jnp.linspace(-30, 30, 1_001)
  exact = np.asarray(u, np.float64) / (1 + np.exp(-1.702 * np.asarray(u, np.float64)))
  got = activations.ACTIVATIONS["quick_gelu"].value(u)
  np.testing.assert_allclose(got, exact, atol=3e-6)


def test_kernels_that_cannot_run_are_refused_and_not_replaced(monkeypatch):
  monkeypatch.setattr(hardware, "why_not_hopper", lambda: "made for Hopper")
  with pytest.raises(NotImplementedError, match="made for Hopper"), residual.override("mosaic_gpu"):
    pass
  with pytest.raises(ValueError, match="'cuda': must be None or one"), residual.override("cuda"):
    pass


def chosen(E=256, *, dtype="bfloat16", widths=(128, 128, 256), **how) -> str | None:
  return residual.choose(dtype, E, 2 * E, widths, "quick_gelu", **how)


@pytest.fixture
def one_gpu(monkeypatch):
  """The mesh of one device, which says that it is a Hopper GPU."""
  monkeypatch.setattr(hardware, "platform", lambda: "gpu")
  monkeypatch.setattr(hardware, "why_not_hopper", lambda: None)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",))):
    yield


def test_kernels_serve_where_they_run_and_nobody_asked_for_others(one_gpu, monkeypatch):
  assert chosen() == chosen(implementation="mosaic_gpu") == "mosaic_gpu"
  assert chosen(implementation="xla") is None
  for name, expected in dict(modules=None, xla="xla", mosaic_gpu="mosaic_gpu").items():
    with residual.override(name):
      assert chosen(implementation="xla") == expected
  monkeypatch.setattr(hardware, "why_not_hopper", lambda: "an A100")
  assert chosen() is None
  monkeypatch.setattr(hardware, "platform", lambda: "cpu")
  assert chosen() is None


def test_without_a_mesh_kernels_serve_the_only_device(one_gpu, monkeypatch):
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    for num, expected in ((1, "mosaic_gpu"), (8, None)):
      monkeypatch.setattr(jax, "device_count", lambda num=num: num)
      assert chosen() == expected


def test_sizes_that_kernels_do_not_have_are_said_once_or_refused(one_gpu, caplog):
  assert chosen(384) is chosen(384) is chosen(dtype="float32") is None
  assert chosen(512, widths=(64, 64, 256)) is None
  said = [record.message for record in caplog.records]
  assert said == [
    "blocks by their modules: width=384: the kernels have (256, 512)",
    "blocks by their modules: queries, keys and values of (64, 64, 256), hidden 1024: "
    "must be multiples of 128",
  ]
  with residual.override("mosaic_gpu"), pytest.raises(NotImplementedError, match="bfloat16"):
    chosen(dtype="float32")
  with residual.override("xla"), pytest.raises(NotImplementedError, match="by xla: no biases"):
    chosen(refused="no biases")
  assert chosen(refused="no biases") is None
