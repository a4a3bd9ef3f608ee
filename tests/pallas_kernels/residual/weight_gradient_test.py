"""Sums over all rows by XLA: of parts of the rows on a GPU, and of all at once elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import residual
from pallas_kernels.residual import xla


@pytest.mark.parametrize("shape,N,parts", [
  ((65_536, 512), 2_048, (1, 4, 16_384)),
  ((65_536, 512), 512, (1, 16, 4_096)),
  ((49_152, 384), 1_536, (1, 4, 12_288)),
  ((1, 65_536, 256), 512, (1, 16, 4_096)),
  ((8, 12_288, 256), 512, (8, 2, 6_144)),
  ((16, 3_072, 256), 256, (16, 1, 3_072)),
  ((64, 3_072, 256), 256, (16, 1, 12_288)),
  ((24, 3_072, 256), 256, None),  # not by powers of two
  ((4_098, 512), 512, (1, 2, 2_049)),
  ((4_097, 512), 512, None),
  ((65_536, 2_048), 2_048, None),  # its own tiles fill the device
  ((40, 256), 256, None),
])  # fmt: skip
def test_parts_fill_the_device(shape, N, parts):
  assert xla.parts_of(shape, N) == parts


@pytest.mark.parametrize("shape", [(64, 5), (2, 32, 5), (32, 2, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_have_the_sum_of_the_whole(shape, dtype, monkeypatch):
  """The branch of a GPU, here on this processor."""
  monkeypatch.setattr(xla, "FEW_ROWS", 1)
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args))
  assert xla.parts_of(shape, 3) is not None
  x, dy = (jax.random.normal(jax.random.key(n), (*shape[:-1], n), dtype) for n in (5, 3))
  got = residual.weight_gradient(x, dy)
  x, dy = (np.asarray(x, np.float64).reshape(64, -1) for x in (x, dy))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, x.T @ dy, atol=1e-5)


def test_only_a_gpu_sums_parts():
  x, dy = (jax.ShapeDtypeStruct((4_096, n), "bfloat16") for n in (512, 512))
  traced = jax.jit(residual.weight_gradient).trace(x, dy)
  texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu", "tpu")}
  products = {p: text.count("stablehlo.dot_general") for p, text in texts.items()}
  assert products == dict(cuda=1, cpu=1, tpu=1)
  in_parts = {p: "batching_dims = [0, 1]" in text for p, text in texts.items()}
  assert in_parts == dict(cuda=True, cpu=False, tpu=False)


def test_a_product_has_the_gradients_of_jax():
  x, W = (
    jax.random.normal(jax.random.key(0), (2, 9, 5)),
    jax.random.normal(jax.random.key(1), (5, 3)),
  )
  loss = lambda product: lambda x, W: jnp.sin(product(x, W)).sum()
  got = jax.grad(loss(residual.multiply), (0, 1))(x, W)
  expected = jax.grad(loss(lambda x, W: x @ W), (0, 1))(x, W)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(a, b)
