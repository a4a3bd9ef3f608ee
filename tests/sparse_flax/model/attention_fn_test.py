"""Flax's own layers attend over the pairs of a pattern, and are told what cannot be honoured."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparse_flax
from pallas_kernels import patterns
from tests.helpers.arrays import assert_close

PATTERN = patterns.PerHead((patterns.Strided(4), patterns.Fixed(5, 1, 2)))
T, E, H = 11, 16, 4


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(0), (2, T, E))


def nnx_layer(attend=None, **options):
  options = dict(num_heads=H, in_features=E, decode=False) | options
  options |= {} if attend is None else dict(attention_fn=attend)
  return nnx.MultiHeadAttention(**options, rngs=nnx.Rngs(0))


def linen_layer(attend=None, **options):
  options |= {} if attend is None else dict(attention_fn=attend)
  return nn.MultiHeadDotProductAttention(num_heads=H, **options)


def dense_mask(pattern, T=T, S=T):
  i, j = np.arange(T)[:, None], np.arange(S)[None]
  heads = [np.broadcast_to(pattern.of_head(h).allowed(i, j), (T, S)) for h in range(H)]
  return jnp.asarray(np.stack(heads)[None])


@pytest.mark.one_day_in_three(2)
@pytest.mark.promotes
@pytest.mark.parametrize("options", [{}, dict(normalize_qk=True, dtype=jnp.bfloat16)], ids=str)
def test_nnx_computes_what_it_does_with_the_mask(x, options):
  got = nnx_layer(sparse_flax.attention_fn(PATTERN, "xla"), **options)(x)
  expected = nnx_layer(**options)(x, mask=dense_mask(PATTERN))
  assert got.dtype == expected.dtype
  assert_close(got, expected, tolerance=0.02 if "dtype" in options else 1e-5, what="out")


@pytest.mark.promotes
@pytest.mark.parametrize("options", [{}, dict(normalize_qk=True, dtype=jnp.bfloat16)], ids=str)
def test_linen_computes_what_it_does_with_the_mask(x, options):
  layer = linen_layer(sparse_flax.attention_fn(PATTERN, "xla"), **options)
  variables = layer.init(jax.random.key(1), x)
  got = layer.apply(variables, x)
  expected = linen_layer(**options).apply(variables, x, mask=dense_mask(PATTERN))
  assert got.dtype == expected.dtype
  assert_close(got, expected, tolerance=0.02 if "dtype" in options else 1e-5, what="out")


@pytest.mark.promotes
def test_gradients_batch_axes_and_other_lengths(x):
  pattern = patterns.Local(6, causal=False)
  attend, plain = nnx_layer(sparse_flax.attention_fn(pattern, "xla")), nnx_layer()
  q, kv = x[:, None].repeat(3, 1), x[:, None, :7].repeat(3, 1)
  mask = dense_mask(pattern, S=7)[None]
  loss = lambda layer, q, kv, **how: (layer(q, kv, **how) ** 2).sum()
  got = jax.grad(loss, (1, 2))(attend, q, kv)
  expected = jax.grad(loss, (1, 2))(plain, q, kv, mask=mask)
  for a, b, what in zip(got, expected, ("q", "kv"), strict=True):
    assert_close(a, b, tolerance=1e-5, what=what)
  without = sparse_flax.attention_fn(pattern)(*(x[0].reshape(T, H, -1),) * 3)
  assert without.shape == (T, H, E // H)


@pytest.mark.promotes
def test_is_causal_makes_a_pattern_causal(x):
  layer = nnx_layer(sparse_flax.attention_fn(patterns.Dense(causal=False), "xla"))
  got, expected = layer(x, is_causal=True), nnx_layer()(x, is_causal=True)
  assert_close(got, expected, tolerance=1e-5, what="out")


def test_grouped_heads_of_nnx(x):
  layer = nnx_layer(sparse_flax.attention_fn(PATTERN, "xla"))
  q, k = layer.query(x), layer.key(x)[:, :, :2]
  expected = sparse_flax.sparse_attention(q, k, k, pattern=PATTERN, implementation="reference")
  assert_close(layer.attention_fn(q, k, k), expected, tolerance=1e-5, what="out")


def test_equal_functions_are_one_program():
  made = [sparse_flax.attention_fn(patterns.Strided(4), "xla") for _ in range(2)]
  assert made[0] == made[1] and hash(made[0]) == hash(made[1])
  assert nnx.graphdef(nnx_layer(made[0])) == nnx.graphdef(nnx_layer(made[1]))


REFUSED = {
  "mask": (dict(mask=np.ones((1, 1, T, T), bool)), "mask bool[1, 1, 11, 11]: sparse_flax"),
  "bias": (dict(bias=np.ones((1, 1, T, T))), "bias float64[1, 1, 11, 11]"),
  "dropout": (dict(dropout_rate=0.1), "dropout_rate=0.1"),
  "precision": (dict(precision="highest"), "precision='highest'"),
  "module": (dict(module=7), "module=7"),
  "positions": (dict(input_positions=np.arange(T)), "input_positions int64[11]"),
  "promote": (dict(promote_dtype=max), "promote_dtype:"),
  "dot": (dict(einsum_dot_general=max), "einsum_dot_general:"),
  "qk": (dict(qk_attn_weights_einsum=max), "qk_attn_weights_einsum:"),
  "av": (dict(attn_weights_value_einsum=max), "attn_weights_value_einsum:"),
}  # fmt: skip


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_what_it_would_ignore_it_refuses(options, message, as_a_user):
  q = jnp.ones((1, T, H, 4))
  attend = sparse_flax.attention_fn(patterns.Strided(4))
  with pytest.raises(ValueError, match=re.escape(message) + ".*cannot honour"):
    attend(q, q, q, **options)


def test_dropout_of_a_deterministic_call_is_none(x):
  attend = sparse_flax.attention_fn(patterns.Strided(4), "xla")
  layer = nnx_layer(attend, dropout_rate=0.5)
  assert layer(x, deterministic=True).shape == x.shape
  with pytest.raises(ValueError, match=r"dropout_rate=0\.5: .* deterministic=True"):
    layer(x, deterministic=False)
  linen = linen_layer(attend, dropout_rate=0.5)
  variables = linen.init(jax.random.key(1), x, deterministic=True)
  with pytest.raises(ValueError, match=r"dropout_rate=0\.5"):
    linen.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(2)})


def test_layers_refuse_masks_sown_weights_and_their_decode_mode(x):
  attend = sparse_flax.attention_fn(patterns.Strided(4), "xla")
  layer, mask = nnx_layer(attend), nn.make_causal_mask(x[..., 0])
  with pytest.raises(ValueError, match="causal ones need no mask"):
    layer(x, mask=mask)
  with pytest.raises(ValueError, match="sow_weights must be False"):
    layer(x, sow_weights=True)
  layer.init_cache(x.shape)
  with pytest.raises(ValueError, match="in decode mode, this layer masks its cache"):
    layer(x[:, :1], decode=True)
  linen = linen_layer(attend, decode=True)
  variables = linen.init(jax.random.key(1), x)
  with pytest.raises(ValueError, match="in decode mode, this layer masks its cache"):
    linen.apply(variables, x[:, :1], mutable=["cache"])
  plain = linen_layer(attend)
  variables = plain.init(jax.random.key(1), x)
  for options, message in ((dict(mask=mask), "mask"), (dict(sow_weights=True), "module")):
    with pytest.raises(ValueError, match=f"^{message}.*cannot honour"):
      plain.apply(variables, x, **options, mutable=["intermediates"])


def test_what_is_no_pattern_is_refused(as_a_user):
  with pytest.raises(ValueError, match="must be a pattern"):
    sparse_flax.attention_fn(patterns.Strided)
