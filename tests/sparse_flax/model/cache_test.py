"""Decoding step by step gives what the whole sequence at once gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import patterns
from sparse_flax import SparseSelfAttention
from sparse_flax.model import cache_rows
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL
from tests.helpers.models import small_model

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


@pytest.mark.smoke(daily=5)
@each_pattern
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("length", [LENGTH, 4], ids=["long", "shorter-than-stride"])
def test_what_a_step_reads_is_what_was_written_and_what_the_mask_allows(pattern, length, sparse):
  for h in range(pattern.period):
    head = pattern.of_head(h)
    kept = cache_rows.of_pattern(head, length, sparse=sparse)
    written = [np.full(rows.length, -1) for rows, _ in kept]
    for t, allowed in enumerate(head.mask(length)):
      keys, earlier = [], []
      for (rows, reads), there in zip(kept, written, strict=True):
        there[min(int(rows.slot(t)), rows.length - 1)] = t
        slots = rows.first(t) + np.arange(rows.size)
        row = rows.row(slots, t)
        seen = (row >= 0) & reads.allowed(t, row)
        np.testing.assert_array_equal(row[seen], there[slots[seen]])
        keys += [j for j in row[seen] if not any(x.allowed(t, j) for x in earlier)]
        earlier.append(reads)
      assert sorted(keys) == list(np.flatnonzero(allowed))


@pytest.mark.parametrize(
  "pattern, kept, read",
  [
    (patterns.Dense(), 12_288, 12_288),
    (patterns.Local(128), 128, 128),
    (patterns.Column(128), 12_288, 96),
    (patterns.Strided(128), 128 + 12_288, 128 + 96),
    (patterns.Block(128), 128, 128),
    (patterns.Summary(128, 32), 3_072 + 1, 3_072),
    (patterns.Fixed(128, 32, 4).of_head(1), 3_168 + 1, 3_168),
    (patterns.Local(20_000), 12_288, 12_288),
  ],
  ids=str,
)
def test_rows_kept_and_read_at_the_length_of_enwik8(pattern, kept, read):
  parts = [rows for rows, _ in cache_rows.of_pattern(pattern, 12_288)]
  assert sum(rows.length for rows in parts) == kept
  assert sum(rows.size for rows in parts) == read


@functools.partial(jax.jit, static_argnames=("P", "sparse"))
def decoded_layer(layer, x, *, P=0, sparse=True):
  """The first P rows at once, the others one by one."""
  T, parts = x.shape[1], []
  cache = layer.init_cache(x.shape[0], T, sparse=sparse)
  if P:
    out, filled = layer.prefill(x[:, :P], T, sparse=sparse)
    parts, cache = [out], jax.tree.map(lambda x: x[None], filled)

  def step(cache, t_and_x):
    out, cache = layer.decode_step(t_and_x[1], t_and_x[0], cache)
    return cache, out

  _, out = jax.lax.scan(step, cache, (jnp.arange(P, T), x[:, P:].swapaxes(0, 1)))
  return jnp.concatenate([*parts, out.swapaxes(0, 1)], axis=1)


@pytest.mark.smoke(daily=5)
@each_pattern
@pytest.mark.parametrize("how", [dict(), dict(P=13), dict(P=13, sparse=False)], ids=str)
def test_a_layer_decodes_what_it_computes_at_once(pattern, how):
  layer = SparseSelfAttention(
    width=12, num_heads=2, qk_ratio=0.5, pattern=pattern, implementation="reference",
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (3, LENGTH, 12)) * 3.0
  np.testing.assert_allclose(decoded_layer(layer, x, **how), at_once(layer, x), atol=1e-5)


def test_a_pattern_that_sees_later_keys_cannot_be_decoded():
  layer = SparseSelfAttention(
    width=4, num_heads=1, pattern=patterns.Dense(causal=False), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="needs one with causal=True"):
    layer.init_cache(1, 8)


@functools.partial(jax.jit, static_argnames=("P", "spoil", "sparse", "kernels"))
def decoded_logits(model, tokens, *, P=0, sparse=True, kernels=None, spoil=lambda caches: caches):
  """Teacher-forced: the true byte goes in at every step. `spoil` is applied after every step."""
  T, parts = tokens.shape[1], []
  run_blocks = kernels and kernels.run_blocks_of(model.groups, tokens.shape[0])
  caches = model.init_cache(tokens.shape[0], sparse=sparse)
  if P:
    logits, caches = model.prefill(tokens[:, :P], sparse=sparse)
    parts = [logits]

  def step(caches, t_and_token):
    t, token = t_and_token
    logits, caches = model.decode_step(token, t, caches, run_blocks=run_blocks)
    return spoil(caches), logits

  # What goes in at step 0 must not matter.
  before = jnp.roll(tokens, 1, axis=1).T
  _, logits = jax.lax.scan(step, caches, (jnp.arange(P, T), before[P:]))
  return jnp.concatenate([*parts, logits.swapaxes(0, 1)], axis=1)


def assert_equal_logits(got, expected, tolerance):
  """Of the largest |logit|, at every position."""
  assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


CYCLES = {
  **{name: (name,) for name in ("dense", "local", "column", "strided", "fixed")},
  "local-column": ("local", "column"),
  "block-summary": ("block", "summary"),
  "heads-and-layers": (("local", "column"), "strided", "local", "local"),
}
each_cycle = pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)


@pytest.mark.smoke(
  "{'P': 12}-strided", "{'P': 12}-fixed", "{'P': 12, 'sparse': False}-heads-and-layers", daily=2
)
@each_cycle
@pytest.mark.parametrize("how", [dict(), dict(P=1), dict(P=12), dict(P=12, sparse=False)], ids=str)
def test_teacher_forced_decoding_gives_the_logits_of_the_whole_sequence(cycle, how):
  model = small_model(attention_layers=cycle, num_layers=2 * len(cycle), qk_ratio=0.5)
  tokens = random_tokens()
  assert_equal_logits(decoded_logits(model, tokens, **how), at_once(model, tokens), 1e-5)


def _spoilt(change):
  """What changes every key array."""
  one = lambda part: dataclasses.replace(part, key=change(part.key))
  return lambda caches: tuple(tuple(map(one, cache)) for cache in caches)


SPOILT = {
  "layers-swapped": _spoilt(lambda key: key[::-1]),
  "rows-shifted": _spoilt(lambda key: jnp.roll(key, 1, axis=3)),
  "batch-rolled": _spoilt(lambda key: jnp.roll(key, 1, axis=1)),
}


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize(
  "cycle", [("strided",), ("fixed",), ("dense",)], ids=lambda cycle: cycle[0]
)
def test_the_comparison_notices_a_wrong_cache(cycle, spoil):
  model, tokens = small_model(attention_layers=cycle), random_tokens()
  wrong, right = decoded_logits(model, tokens, spoil=spoil), at_once(model, tokens)
  # Slot 0 reads only what its own step wrote.
  assert_equal_logits(wrong[:, 0], right[:, 0], 1e-5)
  with pytest.raises(AssertionError):
    assert_equal_logits(wrong, right, 3e-2)


def test_half_precision_caches_are_of_half_size():
  cache = small_model(compute_dtype="bfloat16").init_cache(1)
  assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
