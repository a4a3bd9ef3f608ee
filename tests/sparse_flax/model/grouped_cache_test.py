"""Decoding with grouped heads, rotary positions, norms, masks and score functions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_flax
from pallas_kernels import patterns
from tests.helpers.arrays import assert_close

B, T, E = 2, 23, 24
PATTERNS = {
  "dense": patterns.Dense(),
  "local": patterns.Local(5),
  "strided": patterns.Strided(5),
  "fixed": patterns.Fixed(5, 1, 3),  # three summaries, in groups of two heads and of three
  "per-head": patterns.PerHead((patterns.Local(3), patterns.Column(4))),
  # Of six heads 0, 3, 4 and 1, 2, 5 are alike: key heads serve different numbers of them.
  "uneven": patterns.PerHead(tuple(patterns.Local(2 if h in (0, 3, 4) else 5) for h in range(6))),
}
BIAS = jnp.asarray(np.random.default_rng(0).normal(size=(6, T)), jnp.float32)
BLOCKS = jnp.asarray(np.random.default_rng(1).random((B, 6, 6, 6)) < 0.7)
WITH = {
  "nothing": {},
  "ids": dict(segment_ids=np.asarray([[0] * 9 + [3] * 14, [1] * 23])),
  "blocks": dict(block_mask=BLOCKS, block_size=4),
  "scores": dict(score_fn=lambda logit, i, j, h: logit + BIAS[h, i - j]),
  "all": dict(
    segment_ids=np.asarray([[0] * 9 + [3] * 14, [1] * 23]),
    block_mask=BLOCKS[:, :1],
    block_size=4,
    score_fn=lambda logit, i, j, h: jnp.tanh(logit) + BIAS[h, i - j],
  ),
}


def make_layer(pattern, **options):
  options = dict(num_kv_heads=2, qk_norm=True, use_bias=False, rope=sparse_flax.rope()) | options
  layer = sparse_flax.SparseSelfAttention(
    width=E, num_heads=6, pattern=pattern, implementation="reference", rngs=nnx.Rngs(0), **options
  )
  rng = np.random.default_rng(0)
  if layer.query_norm is not None:
    for norm in (layer.query_norm, layer.key_norm):
      norm.scale[...] = jnp.asarray(rng.normal(size=norm.scale.shape), jnp.float32)
  return layer


def decoded(layer, x, *, P=0, sparse=True, positions=None, **options):
  """The first P rows at once, the others one by one."""

  @jax.jit
  def run(layer, x):
    parts, cache = [], layer.init_cache(B, T, sparse=sparse)
    if P:
      cut = dict(options)
      if "segment_ids" in cut:
        cut["segment_ids"] = cut["segment_ids"][:, :P]
      if "block_mask" in cut:
        num = -(-P // cut["block_size"])
        cut["block_mask"] = cut["block_mask"][:, :, :num, :num]
      at = {} if positions is None else dict(positions=positions[:, :P])
      out, filled = layer.prefill(x[:, :P], T, sparse=sparse, **cut, **at)
      parts, cache = [out], jax.tree.map(lambda x: x[None], filled)

    def step(cache, t_and_x):
      t, x = t_and_x
      at = {} if positions is None else dict(positions=jnp.asarray(positions)[:, t])
      out, cache = layer.decode_step(x, t, cache, **options, **at)
      return cache, out

    _, out = jax.lax.scan(step, cache, (jnp.arange(P, T), x[:, P:].swapaxes(0, 1)))
    return jnp.concatenate([*parts, out.swapaxes(0, 1)], axis=1)

  return run(layer, x)


def inputs():
  return jax.random.normal(jax.random.key(1), (B, T, E))


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke("0-2-fixed", "13-3-per-head", "13-2-uneven", daily=2)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("P", [0, 13])
def test_decoding_gives_what_the_whole_sequence_gives(pattern, num_kv_heads, P):
  layer, x = make_layer(pattern, num_kv_heads=num_kv_heads), inputs()
  assert_close(
    decoded(layer, x, P=P), jax.jit(lambda m, x: m(x))(layer, x), tolerance=1e-5, what="out"
  )


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("fixed-all", "uneven-all", daily=1)
@pytest.mark.parametrize("options", WITH.values(), ids=WITH)
@pytest.mark.parametrize("name", ["fixed", "uneven", "strided"])
def test_masks_and_scores_are_those_of_the_whole_sequence(name, options):
  layer, x = make_layer(PATTERNS[name]), inputs()
  expected = jax.jit(lambda m, x: m(x, **options))(layer, x)
  assert_close(decoded(layer, x, P=9, **options), expected, tolerance=1e-5, what="out")


def test_positions_may_be_those_of_each_sequence():
  layer, x = make_layer(PATTERNS["local"]), inputs()
  at = np.stack([np.arange(T) * 2, np.arange(T) + 5])
  expected = jax.jit(lambda m, x: m(x, positions=at))(layer, x)
  assert_close(decoded(layer, x, P=4, positions=at), expected, tolerance=1e-5, what="out")


@pytest.mark.parametrize(
  "name, kept", [("dense", 2), ("strided", 2), ("fixed", 6), ("per-head", 4), ("uneven", 4)]
)
def test_a_cache_holds_the_key_heads_that_each_pattern_reads(name, kept):
  cache = make_layer(PATTERNS[name]).init_cache(B, T)
  heads = {part.heads: part.key.shape[2] for part in cache}
  assert sum(heads.values()) == kept
  assert all(part.key.shape[2] == part.value.shape[2] == len(part.key_heads) for part in cache)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(segment_ids=np.zeros((B, 1), int)), "[2, 1]: must be of all steps, [B, T] = [2, 23]"),
    (
      dict(block_mask=BLOCKS),
      "must be bool, [2 or 1, 6 or 1, nq, nk] of all steps, T=23",
    ),
    (dict(score_fn=3), "score_fn=3: must be a function of (logit, i, j, h), or None"),
  ],
  ids=["ids", "blocks", "scores"],
)
def test_what_is_not_of_all_steps_is_refused(options, message, as_a_user):
  layer = make_layer(PATTERNS["local"])
  with pytest.raises(ValueError, match=re.escape(message)):
    layer.decode_step(inputs()[:, 0], jnp.int32(0), layer.init_cache(B, T), **options)


def test_positions_need_rope_in_decoding_too():
  layer = make_layer(PATTERNS["local"], rope=None)
  with pytest.raises(ValueError, match="positions: only rope reads them"):
    layer.decode_step(inputs()[:, 0], jnp.int32(0), layer.init_cache(B, T), positions=jnp.int32(3))
