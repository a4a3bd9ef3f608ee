"""Small models for the tests of the model, and the two modes of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import SparseTransformer

# Neither a multiple of the stride nor of the other sizes, and more than three blocks long.
SMALL = dict(
  modality="text",
  seq_len=23,
  width=12,
  num_layers=2,
  num_heads=2,
  ff_mult=2,
  attention_layers=("strided",),
  stride=5,
  summary_width=2,
  sub_blocks=2,
  position_shape=(5, 5),
  compute_dtype="float32",
  implementation="reference",
)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def nnx_mode(request):
  """Runs a test in both modes: whatever it does with modules has to work in each."""
  with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
    yield


def initial_model(**overrides) -> SparseTransformer:
  """A model as it is before training."""
  return SparseTransformer(**{**SMALL, **overrides}, rngs=nnx.Rngs(0))


def small_model(**overrides) -> SparseTransformer:
  """A model in which every weight, also W_out, biases and gains, is random and matters.

  Kernels have a standard deviation of 1 / sqrt(fan_in).
  """
  build = lambda: SparseTransformer(**{**SMALL, **overrides}, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(nnx.eval_shape(build), nnx.Param)
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    noise, name = rng.normal(size=leaf.shape), path[-1].key
    factor = {"kernel": leaf.shape[max(0, len(leaf.shape) - 2)] ** -0.5, "embedding": 1.0}
    value = noise * factor.get(name, 0.2) + (name == "scale")
    return jnp.asarray(value, leaf.dtype)

  return nnx.merge(graphdef, jax.tree.map_with_path(fill, nnx.to_pure_dict(params)))


def random_tokens(*, batch_size: int = 2, length: int = SMALL["seq_len"], seed: int = 1):
  tokens = np.random.default_rng(seed).integers(0, 256, (batch_size, length))
  return jnp.asarray(tokens, jnp.int32)
