"""Epilogues as functions of arrays, beside plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.residual import epilogues

ROWS, COLUMNS = 37, 96
EPS = 1e-6


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def wide(*arrays):
  return [np.asarray(x, np.float64) for x in arrays]


def close(got, want, bound=1e-6):
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape
  assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def sigmoid(u):
  return 1 / (1 + np.exp(-1.702 * u))


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_moments_of_sums(offset):
  x = normal(0, ROWS, COLUMNS) + offset
  halves = [epilogues.row_sums(x[:, part]) for part in (slice(0, 32), slice(32, COLUMNS))]
  total, squares = (a + b for a, b in zip(*halves, strict=True))
  mean, rstd = epilogues.moments(total, squares, COLUMNS, EPS)
  (x,) = wide(x)
  close(mean, x.mean(1))
  # Squares cancel: by as much as the mean is larger than what varies.
  close(rstd, 1 / np.sqrt(x.var(1) + EPS), 1e-6 * (1 + offset**2))
  close(epilogues.normalised(*(jnp.asarray(y, jnp.float32) for y in (x, mean, rstd))),
        (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS),
        1e-6 * (1 + offset**2))  # fmt: skip


def test_rows_of_equal_numbers_have_a_finite_rstd():
  x = jnp.full((3, COLUMNS), 1.1, jnp.float32)
  _, rstd = epilogues.moments(*epilogues.row_sums(x), COLUMNS, EPS)
  assert np.isfinite(rstd).all()
  assert (np.asarray(rstd) <= EPS**-0.5 * 1.01).all()


def test_norm_then_product_is_affine_rows():
  x, w, gain, shift = (normal(n, *shape) for n, shape in enumerate(
    [(ROWS, 64), (64, COLUMNS), (64,), (64,)]))  # fmt: skip
  b = normal(4, COLUMNS)
  folded = gain[:, None] * w
  mean, rstd = epilogues.moments(*epilogues.row_sums(x), 64, EPS)
  got = epilogues.affine_rows(x @ folded, mean, rstd, folded.sum(0), b + shift @ w)
  x, w, gain, shift, b = wide(x, w, gain, shift, b)
  xhat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS)
  close(got, (xhat * gain + shift) @ w + b)


def test_norm_back_is_the_gradient_of_a_norm():
  x, grad = normal(0, ROWS, COLUMNS) + 2, normal(1, ROWS, COLUMNS)
  grad = grad - grad.mean(1, keepdims=True)
  mean, rstd = epilogues.moments(*epilogues.row_sums(x), COLUMNS, EPS)
  xhat = epilogues.normalised(x, mean, rstd)
  grad_std = epilogues.norm_back(grad, xhat, (grad * xhat).mean(1))
  with jax.enable_x64(True):

    def norm(x):
      centred = x - x.mean(1, keepdims=True)
      return centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + EPS)

    x, grad, rstd = wide(x, grad, rstd)
    (want,) = jax.vjp(norm, jnp.asarray(x))[1](jnp.asarray(grad))
    close(np.asarray(grad_std, np.float64) * rstd[:, None], np.asarray(want), 1e-5)


def test_gelu_and_its_derivative():
  u = jnp.linspace(-12, 12, ROWS * COLUMNS, dtype=jnp.float32).reshape(ROWS, COLUMNS)
  (exact,) = wide(u)
  s = sigmoid(exact)
  np.testing.assert_allclose(epilogues.gelu(u), exact * s, atol=2e-6)
  slope = (1 + epilogues.gelu_slope(u)) / 2
  np.testing.assert_allclose(slope, s + 1.702 * exact * s * (1 - s), atol=2e-6)
  by_jax = jax.vmap(jax.grad(lambda u: u * jax.nn.sigmoid(1.702 * u)))(u.ravel())
  np.testing.assert_allclose(slope, by_jax.reshape(u.shape), atol=2e-6)


def test_relu2_and_its_derivative():
  u = jnp.linspace(-3, 3, ROWS * COLUMNS, dtype=jnp.float32).reshape(ROWS, COLUMNS)
  (exact,) = wide(u)
  np.testing.assert_allclose(epilogues.relu2(u), np.maximum(exact, 0) ** 2, atol=2e-6)
  slope = (1 + epilogues.relu2_slope(u)) / 2
  np.testing.assert_allclose(slope, 2 * np.maximum(exact, 0), atol=2e-6)


def test_activation_back():
  grad, u, rstd = normal(0, ROWS, COLUMNS), 3 * normal(1, ROWS, COLUMNS), normal(2, ROWS) ** 2
  got = epilogues.activation_back(grad, epilogues.gelu_slope(u), rstd)
  grad, u, rstd = wide(grad, u, rstd)
  s = sigmoid(u)
  close(got, grad * (s + 1.702 * u * s * (1 - s)) * rstd[:, None])


def bits(seed):
  keep = np.random.default_rng(seed).random((ROWS, COLUMNS)) < 0.6
  words = (keep.reshape(ROWS, -1, 32) << np.arange(32, dtype=np.uint32)).sum(-1)
  return words.astype(np.uint32), keep


def test_packed_masks():
  words, keep = bits(0)
  assert keep.any(0).all()
  assert not keep.all(0).any()
  np.testing.assert_array_equal(epilogues.kept(jnp.asarray(words)), keep)
  # As a kernel has them: a vector for each word, columns in a layout of its own.
  rows = [jnp.asarray(words[:, n]) for n in (1, 2)]
  got = epilogues.kept(rows, jnp.arange(32, dtype=jnp.int32))
  np.testing.assert_array_equal(got, keep[:, 32:])
  np.testing.assert_array_equal(epilogues.kept(rows[:1]), keep[:, 32:64])


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.4])
def test_drop_add(rate):
  acc, bias, residual = normal(0, ROWS, COLUMNS), normal(1, COLUMNS), normal(2, ROWS, COLUMNS)
  _, keep = bits(1)
  got = epilogues.drop_add(acc, bias, residual, jnp.asarray(keep), rate)
  exact = wide(acc, bias, residual)
  close(got, exact[2] + np.where(keep, (exact[0] + exact[1]) / (1 - rate), 0))
  close(epilogues.drop_add(acc, bias, residual, None, rate), sum(exact[:2]) + exact[2])
  # Backward, a gradient passes where its number was kept.
  close(epilogues.drop(acc, jnp.asarray(keep), rate), np.where(keep, exact[0] / (1 - rate), 0))
