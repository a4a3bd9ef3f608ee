"""Examples of docs/attention.md, patterns of docs/patterns.md, tables of docs/migration.md.

The build of the site (`make docs`) runs all examples; here is whether they are what they say.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from tests.helpers import recipes
from tests.helpers.arrays import assert_close

EXAMPLES = recipes.examples(recipes.MANUAL)
GALLERY = recipes.gallery()
T = 256
i, j = np.arange(T)[:, None], np.arange(T)[None, :]
WIDE = np.kron(np.random.default_rng(0).random((16, 16)) < 3 / 16, np.ones((16, 16), bool))
NEAR = (abs(i // 16 - j // 16) <= 2) & (abs(i % 16 - j % 16) <= 2)
KEYS = {
  "window and sinks": (j <= i) & ((i - j < 32) | (j < 4)),
  "dilated window": (j <= i) & (i - j < 64) & ((i - j) % 4 == 0),
  "48 tokens back, 16 ahead": (i - j < 48) & (j - i <= 16),
  "Longformer": (abs(i - j) < 32) | (i < 16) | (j < 16),
  "BigBird": (abs(i - j) < 32) | (i < 16) | (j < 16) | WIDE,
  "prefix LM": (j <= i) | (j < 50),
  "own chunk and the one before": (j <= i) & (i // 32 - j // 32 <= 1),
  "neighbours so far": (j <= i) & NEAR,
  "neighbours": NEAR,
  "row so far": (j <= i) & (i // 16 == j // 16),
}


@pytest.mark.parametrize("name", KEYS)
def test_the_gallery_allows_what_it_says(name):
  np.testing.assert_array_equal(GALLERY[name].mask(T), KEYS[name])


@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("name", GALLERY)
def test_the_gallery_matches_the_reference(name):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, 2, 8)), jnp.float32) for _ in range(3))

  def gradients(implementation):
    def loss(q, k, v):
      out = sparse_attention(q, k, v, pattern=GALLERY[name], implementation=implementation)
      return jnp.square(out).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

  for a, b in zip(
    *(jax.tree.leaves(gradients(which)) for which in ("xla", "reference")), strict=True
  ):
    assert_close(a, b, tolerance=1e-5, what=name)


def test_chosen_blocks_keep_the_order_of_time():
  """What comes after a token changes no bit of its output, and every token has keys."""
  named = recipes.run(example("def route"))
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, 2, 16)), jnp.float32) for _ in range(3))
  attend = jax.jit(
    lambda q, k, v: sparse_attention(
      q, k, v, block_mask=named["route"](q, k), block_size=32, return_lse=True
    )
  )
  out, lse = attend(q, k, v)
  assert np.isfinite(lse).all()
  for u in range(1, T, 9):
    other = [x.at[:, u].set(rng.standard_normal(x.shape[2:]) * 5) for x in (q, k, v)]
    changed, _ = attend(*other)
    np.testing.assert_array_equal(changed[:, :u], out[:, :u], err_msg=str(u))
    assert (np.asarray(changed[:, u]) != np.asarray(out[:, u])).all()


# ------------------------------------------------------------------------- from other libraries

SPLASH = {  # as the manual's tables have them, for T queries and S keys
  "full": (lambda m: m.FullMask((48, 64)), patterns.Dense(causal=False), 0),
  "causal": (lambda m: m.CausalMask((48, 64), offset=16), patterns.Dense(), 16),
  "left": (lambda m: m.LocalMask((48, 64), (7, 0), offset=16), patterns.Local(8), 16),
  "both": (lambda m: m.LocalMask((48, 64), (7, 7), offset=0), patterns.Local(8, causal=False), 0),
  "uneven": (
    lambda m: m.LocalMask((48, 64), (7, 2), offset=0),
    patterns.Where(lambda i, j: (i - j <= 7) & (j - i <= 2), causal=False),
    0,
  ),
  "no limit": (
    lambda m: m.LocalMask((48, 64), (7, None), offset=0),
    patterns.Where(lambda i, j: i - j <= 7, causal=False),
    0,
  ),
  "chunks": (lambda m: m.ChunkedCausalMask((64, 64), 16), patterns.Block(16), 0),
  "table": (
    lambda m: m.NumpyMask(WIDE[:48, :64]),
    patterns.BlockLayout(WIDE[:48, :64], block_size=1, causal=False),
    0,
  ),
  "union": (
    lambda m: m.LocalMask((64, 64), (3, 0), offset=0) | m.ChunkedCausalMask((64, 64), 16),
    patterns.Local(4) | patterns.Block(16),
    0,
  ),
}


@pytest.mark.parametrize("name", SPLASH)
def test_masks_of_splash_attention_are_the_patterns_beside_them(name):
  make, pattern, offset = SPLASH[name]
  theirs = make(splash_attention_mask)
  T, S = theirs.shape
  mask = pattern.allowed(np.arange(T)[:, None] + offset, np.arange(S)[None])
  np.testing.assert_array_equal(theirs[:, :], np.broadcast_to(mask, (T, S)))


def test_windows_of_jax_are_those_of_the_table():
  q = k = v = jax.random.normal(jax.random.key(0), (1, 32, 2, 8))
  for window, pattern in (
    ((5, 0), patterns.Local(6)),
    ((5, 5), patterns.Local(6, causal=False)),
    ((5, 2), patterns.Where(lambda i, j: (i - j <= 5) & (j - i <= 2), causal=False)),
  ):
    theirs = jax.nn.dot_product_attention(q, k, v, local_window_size=window)
    ours = sparse_attention(q, k, v, pattern=pattern, implementation="xla")
    assert_close(ours, theirs, tolerance=1e-5, what=str(window))


def example(words):
  (source,) = (x for x in EXAMPLES if words in x)
  return source


@pytest.mark.promotes
def test_sinks_take_their_share_of_the_softmax(as_a_user):
  attend = recipes.run(example("sinks"))["attend"]
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, 40, 2, 8)), jnp.float32) for _ in range(3))
  sinks = jnp.asarray([0.5, -1.0])
  logits = np.einsum("bthd,bshd->bhts", q, k) * 8**-0.5
  weights = np.exp(logits) * patterns.Local(64).mask(40)
  total = weights.sum(-1, keepdims=True) + np.exp(sinks)[None, :, None, None]
  expected = np.einsum("bhts,bshd->bthd", weights / total, v)
  assert_close(attend(q, k, v, sinks), expected, tolerance=1e-5, what="out")


@pytest.mark.promotes
def test_the_feature_for_a_bias_of_keys_is_that_bias(as_a_user):
  named = recipes.run(example("of every key"))
  q, v, bias = named["v"], named["v"], named["bias"]

  def one(q, v, bias):
    rows = (x[None] for x in (q, q, v))
    add = lambda logit, i, j, h: logit + bias[j]
    return sparse_attention(*rows, pattern=patterns.Local(32), score_fn=add)[0]

  assert_close(named["out"], jax.vmap(one)(q, v, bias), tolerance=1e-5, what="out")


@pytest.mark.promotes
def test_chunks_are_the_whole_prompt(as_a_user):
  named = recipes.run(example("chunks = []"))
  whole = sparse_attention(named["q"], named["k"], named["v"], pattern=patterns.Strided(16))
  assert_close(named["out"], whole, tolerance=1e-5, what="out")


def test_the_block_like_llamas_is_short():
  body = example("class Block").partition("class Block")[2].partition("\n\n\n@")[0]
  assert len(body.strip().splitlines()) <= 30
