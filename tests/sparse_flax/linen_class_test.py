"""The Linen twins are classes like any of Linen: lifted, inherited, and annotated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from flax import nnx

import sparse_flax
from pallas_kernels import hardware
from pallas_kernels import patterns
from sparse_flax import linen
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL

LAYER = dict(width=12, num_heads=2, pattern=patterns.Strided(4))


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (2, 9, 12))


def test_remat_of_a_class_changes_nothing(x):
  plain, lifted = linen.SparseSelfAttention(**LAYER), nn.remat(linen.SparseSelfAttention)(**LAYER)
  variables = plain.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, variables, lifted.init(jax.random.key(1), x))
  loss = lambda layer: lambda variables: (layer.apply(variables, x) ** 2).sum()
  grads = (jax.jit(jax.grad(loss(layer)))(variables) for layer in (plain, lifted))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *grads)


def test_a_subclass_has_fields_and_parameters_of_its_own(x):
  class Scaled(linen.SparseSelfAttention):
    factor: float = 2.0

    @nn.compact
    def __call__(self, x):
      gain = self.param("gain", nn.initializers.ones, (1, 1, 12))
      return super().__call__(x) * gain * self.factor

  layer = Scaled(**LAYER, factor=3.0)
  variables = layer.init(jax.random.key(1), x)
  assert set(variables["params"]) == {"query", "key", "value", "out", "gain"}
  params = {name: value for name, value in variables["params"].items() if name != "gain"}
  plain = linen.SparseSelfAttention(**LAYER).apply({"params": params}, x)
  np.testing.assert_allclose(layer.apply(variables, x), 3.0 * plain, atol=1e-5)


def test_one_layer_may_be_called_twice(x):
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = linen.SparseSelfAttention(**LAYER, name="layer")
      return layer(layer(x))

  variables = Twice().init(jax.random.key(1), x)
  layer = linen.SparseSelfAttention(**LAYER)
  once = lambda x: layer.apply({"params": variables["params"]["layer"]}, x)
  np.testing.assert_allclose(Twice().apply(variables, x), once(once(x)), atol=1e-5)


def test_other_methods_are_those_of_the_nnx_module(x):
  layer = linen.SparseSelfAttention(**LAYER)
  variables = layer.init(jax.random.key(1), x)
  weights = layer.apply(variables, x, method=lambda layer, x: layer.nnx_module().weights(x))
  assert weights.shape == (2, 2, 9, 9)
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_annotations_of_an_initializer_are_kept(x):
  init = nn.initializers.xavier_uniform()
  boxed = nn.with_partitioning(init, ("data", None))
  layer = linen.SparseSelfAttention(**LAYER, kernel_init=boxed, out_init=init)
  variables = layer.init(jax.random.key(1), x)
  specs = nn.get_partition_spec(variables)["params"]
  assert specs["query"]["kernel"] == jax.P("data", None)
  assert specs["query"]["bias"] == specs["out"]["kernel"] == jax.P()
  plain = linen.SparseSelfAttention(**LAYER, kernel_init=init)
  values = plain.init(jax.random.key(1), x)
  jax.tree.map(np.testing.assert_array_equal, values, nn.unbox(variables))
  for weights in (variables, nn.unbox(variables)):
    np.testing.assert_array_equal(layer.apply(weights, x), plain.apply(values, x))
  grads = jax.grad(lambda v: (layer.apply(v, x) ** 2).sum())(variables)
  assert jax.tree.structure(grads) == jax.tree.structure(variables)


@pytest.mark.one_day_in_three(0)
def test_a_scan_adds_its_axis_to_the_annotations(x):
  class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      init = nn.with_partitioning(nn.initializers.xavier_uniform(), ("data", None))
      return x + linen.SparseSelfAttention(**LAYER, kernel_init=init, name="attention")(x), None

  stack = nn.scan(
    nn.remat(Residual),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
    metadata_params={nn.meta.PARTITION_NAME: "layers"},
  )()
  variables = stack.init(jax.random.key(1), x, None)
  kernel = nn.get_partition_spec(variables)["params"]["attention"]["query"]["kernel"]
  assert kernel == jax.P("layers", "data", None)
  assert nn.unbox(variables)["params"]["attention"]["query"]["kernel"].shape == (3, 12, 12)
  assert stack.apply(variables, x, None)[0].shape == x.shape


def test_the_transformer_may_be_rematerialised():
  tokens = random_tokens()
  model = nn.remat(linen.SparseTransformer)(**SMALL)
  variables = jax.eval_shape(model.init, jax.random.key(1), tokens)
  grads = jax.grad(lambda variables: model.apply(variables, tokens).sum())
  assert jax.eval_shape(grads, variables) == variables


def test_kernels_are_imported_when_the_layer_is_made(monkeypatch):
  monkeypatch.setattr(hardware, "KNOWN_BAD_JAX", {jax.__version__: "a name is gone"})
  with pytest.raises(NotImplementedError, match="a name is gone"):
    linen.SparseSelfAttention(**LAYER, implementation="mosaic_gpu")


def test_weights_that_are_missing_are_named(x):
  layer = linen.SparseSelfAttention(**LAYER)
  variables = layer.init(jax.random.key(1), x)
  del variables["params"]["value"]
  with pytest.raises(errors.ScopeParamNotFoundError, match="value"):
    layer.apply(variables, x)


def test_arguments_that_make_no_sense_are_refused():
  with pytest.raises(TypeError, match="windows"):
    linen.SparseSelfAttention(**LAYER, windows=3)
  with pytest.raises(ValueError, match="num_heads=5 must divide width=12"):
    linen.SparseSelfAttention(**LAYER | dict(num_heads=5)).init(
      jax.random.key(0), jnp.ones((1, 4, 12))
    )


# ------------------------------------------------------------------- what layers take besides


EVERYTHING = dict(
  width=16,
  num_heads=4,
  pattern=patterns.PerHead((patterns.Local(3), patterns.Column(2))),
  num_kv_heads=2,
  use_bias=False,
  qk_norm=True,
  rope=sparse_flax.rope(),
  implementation="reference",
)
OF_CALL = dict(
  segment_ids=np.asarray([[0] * 4 + [1] * 5] * 2), positions=np.asarray([*range(4), *range(5)])
)


def of_nnx(kind, variables, **fields):
  """The NNX module with the weights that Linen holds."""
  graphdef, _ = nnx.split(kind(**fields, rngs=nnx.Rngs(0)), nnx.Param)
  return nnx.merge(graphdef, nnx.restore_int_paths(nn.unbox(variables)["params"]))


def wide(x):
  return jnp.concatenate([x, x[..., :4]], axis=-1)


def test_everything_that_the_layer_takes_its_twin_takes(x):
  x, layer = wide(x), linen.SparseSelfAttention(**EVERYTHING)
  variables = jax.jit(lambda x: layer.init(jax.random.key(1), x, **OF_CALL))(x)
  assert set(variables["params"]) == {"query", "key", "value", "out", "query_norm", "key_norm"}
  score_fn = lambda logit, i, j, h: logit * 2
  twin = of_nnx(sparse_flax.SparseSelfAttention, variables, **EVERYTHING)
  options = dict(**OF_CALL, block_mask=jnp.ones((1, 1, 3, 3), bool), block_size=3)
  got = jax.jit(lambda v, x: layer.apply(v, x, **options, score_fn=score_fn))(variables, x)
  expected = jax.jit(lambda m, x: m(x, **options, score_fn=score_fn))(twin, x)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  cache = layer.apply(variables, 2, 9, method=lambda layer, *of: layer.nnx_module().init_cache(*of))
  step = lambda layer, *of: layer.nnx_module().decode_step(*of)
  run = jax.jit(lambda v, x: layer.apply(v, x[:, 0], jnp.int32(0), cache, method=step)[0])
  np.testing.assert_allclose(run(variables, x), jax.jit(twin)(x)[:, 0], atol=1e-5)


def test_cross_attention_has_a_twin_that_may_be_rematerialised_and_annotated(x):
  fields = dict(width=12, num_heads=4, num_kv_heads=1, kv_width=5, qk_norm=True)
  init = nn.with_partitioning(nn.initializers.xavier_uniform(), ("data", None))
  x_kv = jax.random.normal(jax.random.key(2), (2, 6, 5))
  layer = nn.remat(linen.SparseCrossAttention)(**fields, kernel_init=init)
  variables = layer.init(jax.random.key(1), x, x_kv)
  assert nn.get_partition_spec(variables)["params"]["key"]["kernel"] == jax.P("data", None)
  twin = of_nnx(sparse_flax.SparseCrossAttention, variables, **fields)
  np.testing.assert_allclose(layer.apply(variables, x, x_kv), twin(x, x_kv), atol=1e-5)
  ids = np.zeros(x.shape[:2], int), np.asarray([[0] * 4 + [1] * 2, [0] * 6])
  of_lengths = dict(segment_ids=ids[0], kv_segment_ids=ids[1])
  got = layer.apply(variables, x, x_kv, **of_lengths)
  np.testing.assert_allclose(got, twin(x, x_kv, **of_lengths), atol=1e-5)
  np.testing.assert_allclose(got[0], twin(x[:1], x_kv[:1, :4])[0], atol=1e-5)

  class Scaled(linen.SparseCrossAttention):
    factor: float = 2.0

    def __call__(self, x, x_kv):
      return super().__call__(x, x_kv) * self.factor

  scaled = Scaled(**fields, factor=3.0).apply(nn.unbox(variables), x, x_kv)
  np.testing.assert_allclose(scaled, 3.0 * twin(x, x_kv), atol=1e-5)


def test_arrays_of_a_call_pass_through_remat_and_functions_through_a_module_of_yours(x):
  x, plain = wide(x), linen.SparseSelfAttention(**EVERYTHING)
  variables = jax.jit(plain.init)(jax.random.key(1), x)
  lifted = nn.remat(linen.SparseSelfAttention)(**EVERYTHING)
  expected, got = (jax.jit(layer.apply)(variables, x, **OF_CALL) for layer in (plain, lifted))
  np.testing.assert_allclose(got, expected, atol=1e-6)

  class Scored(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = linen.SparseSelfAttention(**EVERYTHING, name="layer")
      return layer(x, score_fn=lambda logit, i, j, h: logit * 2)

  scored = nn.remat(Scored)()
  score_fn = lambda logit, i, j, h: logit * 2
  expected = jax.jit(lambda v: plain.apply(v, x, score_fn=score_fn).sum())(variables)
  loss = lambda v: scored.apply({"params": {"layer": v["params"]}}, x).sum()
  value, grads = jax.jit(jax.value_and_grad(loss))(variables)
  np.testing.assert_allclose(value, expected, atol=1e-4)
  assert jax.tree.structure(grads) == jax.tree.structure(variables)
