"""Decoding step by step gives what the whole sequence at once gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import patterns
from sparse_flax import decode
from sparse_flax import SparseSelfAttention
from tests.model_helpers import fast_compilation  # noqa: F401
from tests.model_helpers import random_tokens
from tests.model_helpers import SMALL
from tests.model_helpers import small_model

LENGTH = SMALL["seq_len"]

PATTERNS = {
  "dense": patterns.Dense(),
  "local": patterns.Local(5),
  "column": patterns.Column(5),
  "strided": patterns.Strided(5),
  "block": patterns.Block(5),
  "summary": patterns.Summary(5, 2),
  "summary-offset": patterns.Summary(5, 1, 3),
  "fixed": patterns.Fixed(5, 2, 2),
  "per-head": patterns.PerHead((patterns.Local(3), patterns.Column(4))),
  "union": patterns.Local(4) | patterns.Column(3) | patterns.Block(6),
  "intersection": patterns.Local(9) & patterns.Column(2),
  "union-of-per-head": patterns.PerHead((patterns.Local(2), patterns.Block(7)))
  | patterns.Summary(6, 1),
  "layout": patterns.BlockLayout(np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool), 6),
  "where": patterns.Where(lambda i, j: (i - j) % 3 != 1),
}
at_once = jax.jit(lambda model, x: model(x))
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


@each_pattern
@pytest.mark.parametrize("length", [LENGTH, 4], ids=["long", "shorter-than-stride"])
def test_the_keys_of_a_row_are_those_of_the_mask_each_once(pattern, length):
  for h in range(pattern.period):
    head = pattern.of_head(h)
    keys_of_row = functools.partial(decode.keys_of_row, head, S=length)
    rows = jax.jit(jax.vmap(keys_of_row))(jnp.arange(length))
    for row, allowed in zip(np.asarray(rows), head.mask(length), strict=True):
      keys = row[row >= 0]
      assert sorted(keys) == list(np.flatnonzero(allowed))


def test_a_row_of_a_strided_pattern_costs_two_square_roots():
  keys = lambda pattern: jax.eval_shape(lambda i: decode.keys_of_row(pattern, i, S=12_288), 0)
  assert keys(patterns.Strided(128)).shape == (128 + 96,)
  assert keys(patterns.Fixed(128, 32, 4).of_head(1)).shape == (128 + 32 * 96,)


@jax.jit
def decoded_layer(layer, x):
  def step(cache, t_and_x):
    out, cache = layer.decode_step(t_and_x[1], t_and_x[0], cache)
    return cache, out

  steps = (jnp.arange(x.shape[1]), x.swapaxes(0, 1))
  _, out = jax.lax.scan(step, layer.init_cache(x.shape[0], x.shape[1]), steps)
  return out.swapaxes(0, 1)


@each_pattern
def test_a_layer_decodes_what_it_computes_at_once(pattern):
  layer = SparseSelfAttention(
    width=12, num_heads=2, qk_ratio=0.5, pattern=pattern, implementation="reference",
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (3, LENGTH, 12)) * 3.0
  np.testing.assert_allclose(decoded_layer(layer, x), at_once(layer, x), atol=1e-5)


def test_a_pattern_that_sees_later_keys_cannot_be_decoded():
  layer = SparseSelfAttention(
    width=4, num_heads=1, pattern=patterns.Dense(causal=False), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="needs one with causal=True"):
    layer.init_cache(1, 8)


@functools.partial(jax.jit, static_argnames="spoil")
def decoded_logits(model, tokens, *, spoil=lambda cache: cache):
  """Teacher-forced: the true byte goes in at every step. `spoil` is applied after every step."""

  def step(cache, t_and_token):
    logits, cache = model.decode_step(t_and_token[1], t_and_token[0], cache)
    return spoil(cache), logits

  # What goes in at step 0 must not matter.
  before = jnp.roll(tokens, 1, axis=1).T
  steps = (jnp.arange(tokens.shape[1]), before)
  _, logits = jax.lax.scan(step, model.init_cache(tokens.shape[0]), steps)
  return logits.swapaxes(0, 1)


CYCLES = {
  "dense": ("dense",),
  "local-column": ("local", "column"),
  "strided": ("strided",),
  "block-summary": ("block", "summary"),
  "fixed": ("fixed",),
  "heads-and-layers": (("local", "column"), "strided", "local", "local"),
}


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
def test_teacher_forced_decoding_gives_the_logits_of_the_whole_sequence(cycle):
  model = small_model(attention_layers=cycle, num_layers=2 * len(cycle), qk_ratio=0.5)
  tokens = random_tokens()
  np.testing.assert_allclose(decoded_logits(model, tokens), at_once(model, tokens), atol=1e-5)


SPOILT = {
  "layers-swapped": lambda cache: decode.Cache(cache.key[::-1], cache.value[::-1]),
  "value-forgotten": lambda cache: decode.Cache(cache.key, cache.value.at[:, :, :, 3].set(0.0)),
  "batch-rolled": lambda cache: decode.Cache(jnp.roll(cache.key, 1, axis=2), cache.value),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_the_comparison_notices_a_wrong_cache(spoil):
  model, tokens = small_model(), random_tokens()
  wrong = decoded_logits(model, tokens, spoil=spoil)
  # Slot 0 reads only what its own step wrote.
  np.testing.assert_allclose(wrong[:, 0], at_once(model, tokens)[:, 0], atol=1e-5)
  assert np.abs(wrong - at_once(model, tokens)).max() > 1e-3


def test_half_precision_decoding_stays_close():
  model, tokens = small_model(compute_dtype="bfloat16"), random_tokens()
  assert model.init_cache(1).key.dtype == jnp.bfloat16
  np.testing.assert_allclose(decoded_logits(model, tokens), at_once(model, tokens), atol=0.1)
