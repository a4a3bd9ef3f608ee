"""The Linen twins: the same numbers from plain arrays under "params"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from pallas_kernels import patterns
from sparse_flax import linen
from sparse_flax import SparseSelfAttention
from sparse_flax import SparseTransformer
from tests.helpers.models import nnx_mode  # noqa: F401
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL

LAYER = dict(width=12, num_heads=2, pattern=patterns.Strided(4))


def names(params):
  leaves = jax.tree.leaves_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def from_linen(module, variables):
  """The NNX module with the weights that Linen holds."""
  graphdef, _ = nnx.split(module, nnx.Param)
  return nnx.merge(graphdef, nnx.restore_int_paths(variables["params"]))


def test_the_layer_is_its_nnx_twin(nnx_mode):  # noqa: F811
  x = jax.random.normal(jax.random.key(0), (2, 9, 12))
  layer = linen.SparseSelfAttention(**LAYER)
  variables = layer.init(jax.random.key(1), x)
  assert set(variables) - {"nnx"} == {"params"}
  parts = ("query", "key", "value", "out")
  assert names(variables["params"]) == {f"{p}/{kind}" for p in parts for kind in ("kernel", "bias")}
  assert all(type(leaf) is type(x) for leaf in jax.tree.leaves(variables["params"]))
  twin = from_linen(SparseSelfAttention(**LAYER, rngs=nnx.Rngs(0)), variables)
  np.testing.assert_allclose(layer.apply(variables, x), twin(x), atol=1e-6)


@pytest.mark.one_day_in_three(1)
def test_the_transformer_is_its_nnx_twin_and_learns():
  tokens = random_tokens()
  model = linen.SparseTransformer(**SMALL, dropout=0.5)
  variables = model.init(jax.random.key(1), tokens)
  twin = from_linen(SparseTransformer(**SMALL, rngs=nnx.Rngs(0)), variables)

  def loss(params, key=None):
    logits = model.apply({**variables, "params": params}, tokens, dropout_key=key)
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 7])

  params = variables["params"]
  params["logits"]["kernel"] = jax.random.normal(jax.random.key(2), (12, 256))
  twin.logits.kernel[...] = params["logits"]["kernel"]
  logits = model.apply(variables, tokens)
  np.testing.assert_allclose(logits, twin(tokens), atol=1e-5)
  assert np.abs(logits - model.apply(variables, tokens, dropout_key=jax.random.key(0))).max() > 0.1
  grads = jax.jit(jax.grad(loss))(params)
  assert names(grads) == names(params)
  assert np.any(grads["logits"]["kernel"])


def test_a_linen_stack_may_scan_and_rematerialise_the_layer():
  class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + linen.SparseSelfAttention(**LAYER, name="attention")(x), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.remat(Residual, prevent_cse=False)
      split = dict(variable_axes={"params": 0, "nnx": 0}, split_rngs={"params": True}, length=3)
      return nn.scan(layer, **split)(name="layers")(x, None)[0]

  x = jax.random.normal(jax.random.key(0), (2, 9, 12))
  stack = Stack()
  variables = jax.jit(stack.init)(jax.random.key(1), x)
  kernel = variables["params"]["layers"]["attention"]["query"]["kernel"]
  assert kernel.shape == (3, 12, 12)
  assert np.abs(kernel[0] - kernel[1]).max() > 0
  grads = jax.jit(jax.grad(lambda v: stack.apply(v, x).sum(), allow_int=True))(variables)
  assert np.all(np.any(grads["params"]["layers"]["attention"]["value"]["kernel"], axis=(1, 2)))
