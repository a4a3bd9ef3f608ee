"""Packed dropout masks: their digits, their share, and the same bits on every mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import patterns
from pallas_kernels.residual import dropout
from sparse_flax.model import block
from sparse_flax.parallel import sharding
from tests.helpers import jaxprs
from tests.helpers.models import random_tokens
from tests.helpers.models import small_model

SEED = jnp.array([3, 5], jnp.uint32)
EXACT = {  # the digits of the probability to keep
  0.25: (1, 1),
  0.5: (1,),
  0.75: (0, 1),
  0.4: (1, 0, 0, 1, 1, 0, 0, 1, 1),  # 1 - 205 / 512
  0.1: (1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1),  # 1 - 205 / 2,048
}


@pytest.mark.parametrize("rate", EXACT)
def test_digits(rate):
  digits = dropout.digits_of(rate)
  assert digits == EXACT[rate]
  assert dropout.keep_probability(rate) == sum(d * 0.5**n for n, d in enumerate(digits, 1))


@pytest.mark.parametrize("rate", [1e-12, 1e-4, 0.01, 0.3, 0.77, 0.999, 1 - 1e-12])
def test_what_is_kept_is_never_all_or_nothing_and_close_to_what_was_asked(rate):
  kept = dropout.keep_probability(rate)
  assert 0 < kept < 1 and len(dropout.digits_of(rate)) <= 32
  if 1e-6 < rate < 1 - 1e-6:
    assert abs(1 - kept - rate) <= 1e-3 * min(rate, 1 - rate)


def test_bits_are_the_binary_fold_of_hashes_of_digit_and_place():
  """In numpy, from the definition: words of a hash come in turn, the last digit is folded first."""
  shape = (2, 3, 70)
  bits = np.asarray(dropout.keep_bits(SEED, 0.4, shape))
  assert bits.shape == (2, 3, 3) and bits.dtype == np.uint32
  number, expected = np.arange(18, dtype=np.uint32), np.zeros(18, np.uint32)
  words = [
    np.asarray(word)
    for n in range(5)
    for word in dropout.hashes.threefry2x32_p.bind(
      *SEED, jnp.asarray(number ^ np.uint32(SEED[1] + n)), jnp.asarray(number)
    )
  ]
  for n in reversed(range(9)):
    expected = words[n] | expected if EXACT[0.4][n] else words[n] & expected
  np.testing.assert_array_equal(bits.reshape(-1), expected)
  places = np.arange(70)
  kept = bits[..., places // 32] >> (places % 32).astype(np.uint32) & 1
  np.testing.assert_array_equal(dropout.unpack(jnp.asarray(bits), 70), kept == 1)


def test_bits_of_rare_drops_are_zero_at_the_places_that_a_hash_draws():
  """In numpy, from the definition: how many by the first word, five bits a place of the other."""
  number = np.arange(20_000, dtype=np.uint32)
  hashed = dropout.hashes.threefry2x32_p.bind(*SEED, jnp.asarray(number ^ SEED[1]), number)
  expected = []
  for random, places in zip(*(np.asarray(x).tolist() for x in hashed), strict=True):
    drawn = sum(random < limit for limit in dropout.limits_of(0.01))
    gone = {places >> 5 * n & 31 for n in range(drawn)}
    expected.append(2**32 - 1 - sum(1 << place for place in gone))
  assert len({x.bit_count() for x in expected}) >= 4
  bits = dropout.keep_bits(SEED, 0.01, (20_000, 32))
  np.testing.assert_array_equal(bits[:, 0], np.array(expected, np.uint32))


@pytest.mark.smoke()
@pytest.mark.parametrize("rate", [1e-5, 0.01, dropout.RARE])
def test_rare_drops_are_independent_but_for_what_is_left_out(rate):
  """So many of 32 are gone as of 32 draws apart, by the probability of each number of places."""
  at_least = [1.0, *(limit / 2**32 for limit in dropout.limits_of(rate)), 0.0]
  ways = [[0.0] * 33 for _ in range(7)]  # [places][different ones]
  ways[0][0] = 1.0
  for n in range(6):
    for gone in range(7):
      ways[n + 1][gone] += ways[n][gone] * gone / 32
      ways[n + 1][gone + 1] += ways[n][gone] * (32 - gone) / 32
  for gone in range(5):
    got = sum((at_least[n] - at_least[n + 1]) * ways[n][gone] for n in range(7))
    assert got == pytest.approx(
      math.comb(32, gone) * rate**gone * (1 - rate) ** (32 - gone), abs=1e-6
    )
  expected = sum((at_least[n] - at_least[n + 1]) * (31 / 32) ** n for n in range(7))
  assert dropout.keep_probability(rate) == pytest.approx(expected, abs=1e-12)


def test_masks_of_older_versions():
  same = {(v, rate) for v in (1, 2, 3) for rate in (0.0, 0.01, 0.25) if dropout.same_masks(v, rate)}
  assert same == {(3, 0.01), (3, 0.25), (2, 0.25), *((v, 0.0) for v in (1, 2, 3))}


@pytest.mark.parametrize("rate", [0.25, 0.4, 0.1, 0.01])
@pytest.mark.parametrize("width", [64, 40])
def test_the_share_that_is_kept(rate, width):
  kept = np.asarray(
    dropout.unpack(jax.jit(lambda s: dropout.keep_bits(s, rate, (5_000, width)))(SEED), width)
  )
  p = dropout.keep_probability(rate)
  assert kept.shape == (5_000, width)
  within = lambda share, count: abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)
  assert within(kept.mean(), kept.size)
  assert all(within(share, len(kept)) for share in kept.mean(axis=0))
  both = (kept[:, 1:] & kept[:, :-1]).mean()  # neighbours are independent
  assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / kept[:, 1:].size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_kept_makes_up_for_what_is_not(dtype):
  """Exactly, but for one rounding of the result: the factor itself is not rounded."""
  x = jnp.full((2_000, 512), 0.6, dtype)
  y = block.drop(x, 0.4, key=jax.random.key(0)).astype(jnp.float32)
  p, value = dropout.keep_probability(0.4), float(x[0, 0])
  np.testing.assert_allclose(y[y != 0], value / p, rtol=2.0**-8 if dtype == "bfloat16" else 1e-3)
  scaled = np.float64(jnp.asarray(value / p, dtype)) * p
  assert abs(y.mean() - scaled) < 5 * scaled * math.sqrt((1 - p) / p / y.size)


def test_other_seeds_give_other_bits():
  draw = lambda *seed: np.asarray(dropout.keep_bits(jnp.array(seed, jnp.uint32), 0.5, (64, 64)))
  assert len({draw(*seed).tobytes() for seed in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8)], ids=str)
def test_a_device_makes_its_own_share_of_the_same_bits(shape):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
  x = jnp.zeros((8, 16, 40))
  draw = lambda x, seed: block.bits_like(x, 0.4, seed)
  expected = draw(x, SEED)
  with jax.set_mesh(mesh):
    program = jax.jit(draw).lower(x, SEED).compile()
    got = program(x, SEED)
  np.testing.assert_array_equal(got, expected)
  share = (8 // (shape[0] * shape[1]), 16 // shape[3], 2)
  assert got.addressable_shards[0].data.shape == share
  assert "all-gather" not in program.as_text() and "collective" not in program.as_text()


def test_explicit_axes_give_the_same_bits():
  mesh = jax.make_mesh((2, 4), ("x", "y"))
  x = jnp.zeros((8, 16, 40))
  run = lambda x: block.masked(x + 1.0, block.bits_like(x, 0.4, SEED), 0.4)
  expected = run(x)
  with jax.set_mesh(mesh):
    for spec in (jax.P("x", "y"), jax.P("x", None, "y")):
      got = jax.jit(run)(jax.device_put(x, spec))
      assert jax.typeof(got).sharding.spec == jax.P(*spec, *(None,) * (3 - len(spec)))
      np.testing.assert_array_equal(got, expected)


def test_a_block_drops_the_same_under_explicit_axes():
  init = nnx.initializers.lecun_normal()
  layer = block.Block(
    width=16, num_heads=2, pattern=patterns.Strided(4), qk_ratio=1.0, ff_mult=2, dropout=0.3,
    dtype=jnp.float32, param_dtype=jnp.float32, implementation="xla", kernel_init=init,
    out_init=init, rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(0), (4, 16, 16))
  loss = lambda layer, x: (layer(x, dropout_key=jax.random.key(1)) ** 2).sum()
  expected = jax.jit(jax.value_and_grad(loss, 1))(layer, x)
  mesh = jax.make_mesh((2, 2), ("x", "y"))
  with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(loss, 1))(layer, jax.device_put(x, jax.P("x")))
  assert jax.typeof(got[1]).sharding.spec == jax.P("x", None, None)
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
  np.testing.assert_allclose(got[1], expected[1], atol=1e-4)


def test_pmap_gives_every_device_the_bits_of_its_own_array():
  x = jnp.zeros((4, 2, 6, 40))
  draw = lambda x: block.bits_like(x, 0.4, SEED)
  got = jax.pmap(draw, devices=jax.devices()[:4])(x)
  np.testing.assert_array_equal(got, np.broadcast_to(draw(x[0]), (4, 2, 6, 2)))


def test_the_gradient_is_zero_just_where_the_output_is():
  x = jax.random.normal(jax.random.key(0), (3, 7, 50))
  run = lambda x: block.drop(x, 0.4, key=jax.random.key(1))
  y, back = jax.vjp(run, x)
  (dx,) = back(jnp.ones_like(x))
  np.testing.assert_array_equal(dx != 0, y != 0)
  np.testing.assert_allclose(dx[dx != 0], 1 / dropout.keep_probability(0.4), rtol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_step_hashes_once_for_each_layer_and_branch(remat):
  """And outside of what is computed again: the backward pass reads bits."""
  model = small_model(remat=remat, dropout=0.4, num_layers=4, attention_layers=("local",))
  graphdef, params = nnx.split(model, nnx.Param)
  params = nnx.to_pure_dict(params)
  tokens, key = random_tokens(), jax.random.key(0)
  loss = lambda params: (nnx.merge(graphdef, params)(tokens, dropout_key=key) ** 2).mean()
  scans = jaxprs.scans_of(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, 4)
  hashes = [jaxprs.count_of(scan, "threefry2x32") for scan in scans]
  assert hashes == [2 * 5, 0]  # two branches of 9 digits, two digits a hash
