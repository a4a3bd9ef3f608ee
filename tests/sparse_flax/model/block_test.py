"""A block by folded weights, against its modules one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_flax
from pallas_kernels import residual
from sparse_flax.model import block
from tests.helpers.models import nnx_mode  # noqa: F401
from tests.helpers.models import random_tokens
from tests.helpers.models import small_model

KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def folded():
  with residual.override("xla"):
    yield


def loss_and_gradients(**overrides):
  overrides = dict(attention_layers=("local", "fixed"), num_layers=4, dropout=0.3) | overrides
  graphdef, params = nnx.split(small_model(**overrides), nnx.Param)
  tokens = random_tokens()
  weights = jax.random.normal(jax.random.key(0), (*tokens.shape, 256))

  def loss(params):
    return (nnx.merge(graphdef, params)(tokens, dropout_key=KEY) * weights).mean()

  return jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(params))


def by_modules(monkeypatch, run):
  with monkeypatch.context() as patched:
    patched.setattr(block.Block, "weights", lambda self: None)
    return run()


@pytest.mark.one_day_in_six(1)
@pytest.mark.smoke("bfloat16-0.1", daily=0)
@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1), ("float16", 0.02)]
)
def test_losses_and_gradients_are_those_of_the_modules(monkeypatch, dtype, tolerance):
  run = lambda: loss_and_gradients(compute_dtype=dtype, remat="attention")
  (loss, grads), (other, expected) = run(), by_modules(monkeypatch, run)
  np.testing.assert_allclose(loss, other, rtol=tolerance, atol=tolerance * 1e-2)
  pairs = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True)
  for (path, a), b in pairs:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert a.dtype == b.dtype, name
    if not name.endswith("key/bias"):  # whose gradient is zero, and rounding
      assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


def test_prefill_is_that_of_the_modules(monkeypatch, nnx_mode):  # noqa: F811
  model, tokens = small_model(attention_layers=("local", "fixed"), num_layers=4), random_tokens()
  run = lambda: jax.jit(lambda model: model.prefill(tokens))(model)
  got, expected = run(), by_modules(monkeypatch, run)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.smoke()
@pytest.mark.parametrize(
  "change",
  [
    dict(qk_norm=True),
    dict(rope="tokens"),
    dict(rope="axes", qk_norm=True, activation="relu2"),
  ],
  ids=str,
)
def test_norms_and_rope_stand_between_the_halves(monkeypatch, change):
  options = dict(attention_layers=("local",), num_layers=2, dropout=0.0, **change)
  run = lambda: loss_and_gradients(compute_dtype="float32", **options)
  (loss, grads), (other, expected) = run(), by_modules(monkeypatch, run)
  np.testing.assert_allclose(loss, other, rtol=2e-5, atol=2e-7)
  pairs = zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True)
  for (path, a), b in pairs:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.abs(b).max() > 0, name  # that of the keys' bias too: no softmax takes it off
    assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max(), name


def test_squared_relu_stands_between_the_products():
  feed = small_model(activation="relu2").groups[0].feed_forward
  feed = jax.tree.map(lambda x: x[0], feed)
  x = jax.random.normal(KEY, (3, 12))
  u = np.asarray(x) @ np.asarray(feed.up.kernel) + np.asarray(feed.up.bias)
  expected = np.maximum(u, 0) ** 2 @ np.asarray(feed.down.kernel) + np.asarray(feed.down.bias)
  np.testing.assert_allclose(feed(x), expected, atol=1e-5)


LAYERS = {
  "no_biases": dict(use_bias=False),
  "no_dtype": dict(dtype=None),
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_layers_that_halves_do_not_have_are_left_to_the_modules(options):
  model = small_model()
  layer = jax.tree.map(lambda x: x[0], model.groups)[0]
  assert layer.weights() is not None
  shape = dict(width=12, num_heads=2, pattern=layer.attention.pattern, dtype=jnp.float32)
  layer.attention = sparse_flax.SparseSelfAttention(**shape | options, rngs=nnx.Rngs(0))
  x = jax.random.normal(KEY, (2, 23, 12))
  with pytest.raises(NotImplementedError, match=r"blocks by xla: .*(no bias|no dtype)"):
    layer(x)  # they are asked for
  with residual.override(None):
    assert layer.weights() is None
    got = layer(x)
  h = x + layer.attention(layer.attention_norm(x))
  expected = h + layer.feed_forward(layer.feed_forward_norm(h))
  np.testing.assert_allclose(got, expected, atol=1e-5)
