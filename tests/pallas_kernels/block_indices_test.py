"""`sparse_attention(block_indices=...)`: listed blocks, the mass on each of them, and mistakes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh

from pallas_kernels import api
from pallas_kernels import patterns
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import indices
from pallas_kernels.lowering import plan as plans
from pallas_kernels.scores import Scores
from pallas_kernels.xla import sizes as xla_sizes
from tests.helpers.arrays import assert_close

B, H, D = 2, 4, 8
SLOPES = jnp.asarray([0.1, 0.2, 0.4, 0.8])


@dataclasses.dataclass(frozen=True)
class Lists:
  """A call with lists of random blocks, of which some are none."""

  T: int = 43
  S: int = 43
  Hkv: int = 2
  query_block: int = 8
  block_size: int = 8
  rows: int = B
  heads: int = 2
  top: int = 3
  pattern: patterns.Pattern = patterns.Dense()
  segments: bool = False
  learned: bool = False
  logits: int = 1 << 20  # at once

  def normal(self, *shape, seed=0):
    rng = np.random.default_rng([seed, self.T, *shape])
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def arrays(self):
    """q, k, v, and what the score function learns."""
    k, v = self.normal(B, self.S, self.Hkv, D), self.normal(B, self.S, self.Hkv, 6)
    return self.normal(B, self.T, H, D), k, v, SLOPES

  def indices(self):
    shape = self.rows, self.heads, -(-self.T // self.query_block)
    nk, rng = -(-self.S // self.block_size), np.random.default_rng(self.T)
    numbers = np.broadcast_to(np.arange(-1, nk + 1, dtype=np.int32), (*shape, nk + 2))
    return jnp.asarray(rng.permuted(numbers, axis=3)[..., : self.top])  # nk is none too

  def pairs(self):
    """The mask of all pairs that are listed, [rows, H or 1, T, S]."""
    j = np.arange(self.S) // self.block_size
    listed = (np.asarray(self.indices())[..., None] == j[None, None, None, None]).any(axis=3)
    listed = np.repeat(listed, self.query_block, axis=2)[:, :, : self.T]
    heads = 1 if self.heads == 1 else H // self.heads
    return jnp.asarray(np.repeat(listed, heads, axis=1))

  def options(self):
    options = dict(pattern=self.pattern)
    if self.segments:
      rng = np.random.default_rng(1)
      ids = lambda n: jnp.asarray(np.sort(rng.integers(0, 3, (B, n)), axis=1))
      options |= dict(segment_ids=ids(self.T), kv_segment_ids=ids(self.S))
    return options

  def call(self, implementation, q, k, v, slopes, **how):
    if self.learned:
      number = lambda x: x.astype(jnp.float32)
      how["score_fn"] = lambda x, i, j, h: jnp.sin(x) - slopes[h] * number(abs(i - j))
    return sparse_attention(q, k, v, implementation=implementation, **self.options(), **how)

  def listed(self, implementation, *arrays, **how):
    sizes = dict(block_size=self.block_size, query_block=self.query_block)
    return self.call(implementation, *arrays, block_indices=self.indices(), **sizes, **how)


CASES = {
  "grouped": Lists(),
  "each_head": Lists(query_block=4, heads=4, rows=1, logits=64),
  "one_list": Lists(query_block=16, heads=1, top=4, pattern=patterns.Local(17), logits=300),
  "every_query": Lists(query_block=1, T=23, S=37, segments=True, learned=True, logits=200),
  "odd": Lists(query_block=3, block_size=5, T=23, S=9, heads=4, pattern=patterns.Fixed(6, 2, 2)),
  "both_ways": Lists(
    T=23, S=37, pattern=patterns.PerHead((patterns.Local(6, causal=False), patterns.Dense()))
  ),
}


def results(program, arrays):
  """The results and their gradients for a cotangent of each; None for rows without keys."""

  @jax.jit
  def run(*arrays):
    outs, vjp = jax.vjp(program, *arrays)
    of = lambda n, x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32) + n).reshape(x.shape)
    return outs, vjp(type(outs)(*map(of, range(len(outs)), outs)))

  return run(*arrays)


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_reference(name, monkeypatch):
  case = CASES[name]
  monkeypatch.setattr(xla_sizes, "LOGITS", case.logits)
  program = functools.partial(case.listed, return_mass=True)
  names = "out", "lse", "mass", "dq", "dk", "dv", "dslopes"
  got, truth = (
    jax.tree.leaves(results(functools.partial(program, x), case.arrays()))
    for x in ("xla", "reference")
  )
  for what, a, c in zip(names, got, truth, strict=True):
    assert_close(a, c, tolerance=2e-5, what=what)
  has_keys = np.isfinite(truth[1])
  np.testing.assert_allclose(truth[2].sum(axis=-1), has_keys, atol=1e-6)
  assert not has_keys.all() or name in ("each_head", "one_list")


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("name", CASES)
def test_lists_mean_a_mask_of_blocks(name):
  """On `reference`, bit for bit."""
  case = CASES[name]
  mask = dict(block_mask=case.pairs(), block_size=1, return_lse=True)
  masked = jax.jit(functools.partial(case.call, "reference", **mask))(*case.arrays())
  listed = jax.jit(functools.partial(case.listed, "reference", return_lse=True))(*case.arrays())
  for what, a, c in zip(("out", "lse"), listed, masked, strict=True):
    np.testing.assert_array_equal(a, c, err_msg=what)


def test_mass_is_the_sum_of_weights():
  """By hand, in float64, with a block that is none and one that the pattern hides."""
  case = Lists(Hkv=4, heads=4, rows=1)
  q, k, v, slopes = case.arrays()
  _, _, mass = jax.jit(functools.partial(case.listed, "xla", return_mass=True))(q, k, v, slopes)
  logits = np.einsum("bthd,bshd->bths", q, k, dtype=np.float64) * D**-0.5
  mask = np.asarray(case.pairs()).transpose(0, 2, 1, 3) & np.tril(np.ones((43, 43), bool))[:, None]
  weights = np.exp(logits) * mask
  weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
  lists = np.asarray(case.indices())
  for slot in range(case.top):
    of_rows = np.repeat(lists[0, :, :, slot], 8, axis=1)[:, :43].T  # [T, H]
    own = of_rows[..., None] == np.arange(43) // 8
    np.testing.assert_allclose(mass[..., slot], (weights * own[None]).sum(axis=-1), atol=1e-6)


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("name", CASES)
def test_the_mask_for_kernels_has_the_pairs_that_are_listed(name):
  case = CASES[name]
  q, k, v, _ = case.arrays()
  sizes = dict(block_size=case.block_size, query_block=case.query_block)
  plan, arrays = plans.of_call(
    q, k, v, pattern=case.pattern, scores=Scores(1.0), block_indices=case.indices(), **sizes
  )
  mask, size = indices.mask_of(plan, arrays).block_mask, indices.as_mask(plan).block_size
  assert mask.shape[:2] == indices.as_mask(plan).block_mask and size == math.gcd(*sizes.values())
  assert mask.shape[2:] == (-(-case.T // size), -(-case.S // size))
  pairs = np.repeat(np.repeat(mask, size, axis=2), size, axis=3)[:, :, : case.T, : case.S]
  np.testing.assert_array_equal(pairs, case.pairs())


KERNELS = {
  "mosaic_gpu": (256, 128, 128, "bfloat16", 32),
  "mosaic_tpu": (64, 8, 16, "float32", 8),
}


@pytest.mark.one_day_in_six(2)
@pytest.mark.parametrize(
  "implementation", [pytest.param("mosaic_gpu", marks=pytest.mark.slow), "mosaic_tpu"]
)
def test_kernels_sweep_what_lists_mean(implementation):
  T, Q, size, dtype, D = KERNELS[implementation]
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, h, D)), dtype) for h in (2, 1, 1))
  numbers = rng.permuted(np.tile(np.arange(T // size, dtype=np.int32), (1, 1, T // Q, 1)), axis=3)
  lists = dict(block_indices=jnp.asarray(numbers[..., :2]), block_size=size, query_block=Q)

  @functools.partial(jax.jit, static_argnums=0)
  def program(implementation, q, k, v):
    how = dict(implementation=implementation, return_lse=True) | lists
    (out, lse), vjp = jax.vjp(functools.partial(sparse_attention, **how), q, k, v)
    return out, lse, *vjp((q[..., :D], jnp.ones_like(lse)))

  got, truth = program(implementation, q, k, v), program("reference", q, k, v)
  for what, a, c in zip(("out", "lse", "dq", "dk", "dv"), got, truth, strict=True):
    assert_close(a, c, tolerance=3e-2 if dtype == "bfloat16" else 1e-5, what=what)


# -------------------------------------------------------------------------------------- gradients


def loss(q, k, v, lists):
  how = dict(block_indices=lists, block_size=8, query_block=4, return_mass=True)
  out, lse, mass = sparse_attention(q, k, v, **how, implementation="xla")
  weigh = lambda x: (x * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)).sum()
  return weigh(out) + weigh(lse) + weigh(mass * 3)


def choose(q, k):
  return select_blocks(q, pool_blocks(k, 8), block_size=8, query_block=4, top=3)


@pytest.mark.one_day_in_three(1)
def test_gradients_are_slopes_and_nothing_comes_from_blocks_that_nobody_read():
  """Finite differences of the whole, choice included, where no choice changes."""
  normal = functools.partial(Lists().normal, 1, 45, 2, 4)
  x, along = ([normal(seed=seed + n) for n in range(3)] for seed in (0, 3))
  whole = jax.jit(jax.value_and_grad(lambda q, k, v: loss(q, k, v, choose(q, k)), (0, 1, 2)))
  lists = jax.jit(choose)
  step, slope = 3e-3, 0.0
  for sign in (1, -1):
    there = [a + sign * step * d for a, d in zip(x, along, strict=True)]
    np.testing.assert_array_equal(lists(*there[:2]), lists(*x[:2]))
    slope += sign * float(whole(*there)[0]) / (2 * step)
  _, grads = whole(*x)
  expected = sum(float((g * d).sum()) for g, d in zip(grads, along, strict=True))
  assert abs(slope - expected) < 3e-3 * abs(expected)
  # Without block 2 in any list, but its own, which those without it do not read.
  others = jnp.where(lists(*x[:2]) == 2, -1, lists(*x[:2]))
  _, dk, dv = jax.jit(jax.grad(loss, (0, 1, 2)))(*x, others)
  for of_keys in (dk, dv):
    assert not np.any(of_keys[:, 16:24]) and np.all(np.any(of_keys[:, :16], axis=-1))


# --------------------------------------------------------------------------------------- mistakes

Q = K = jnp.ones((2, 32, 4, 8))
LISTS = jnp.zeros((2, 4, 4, 2), jnp.int32)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      dict(block_indices=LISTS[:, :, :3]),
      "block_indices int32[2, 4, 3, 2]: must be int32 of shape",
    ),
    (
      dict(block_indices=LISTS[:, :3]),
      "[2 or 1, 4, 4 or 1, 4, top], T=32 in groups of query_block",
    ),
    (dict(block_indices=LISTS.astype(jnp.float32)), "block_indices float32[2, 4, 4, 2]: must be"),
    (dict(block_indices=[[0]]), "block_indices: must be an array, not list"),
    (dict(query_block=0), "query_block=0: must be a whole number >= 1, or None for block_size"),
    (dict(query_block=4), "[2 or 1, 4, 4 or 1, 8, top], T=32 in groups of query_block=4"),
    (
      dict(block_indices=None, query_block=8),
      "query_block without block_indices: is of the blocks",
    ),
    (dict(block_indices=None, return_mass=True), "return_mass without block_indices"),
    (dict(block_mask=jnp.ones((1, 1, 4, 4), bool)), "block_mask and block_indices: only one"),
    (
      dict(implementation="reference", block_indices=LISTS),
      "block_indices[0, 0, 0] has block 0 twice: must have each block once",
    ),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_mistakes_are_named(change, message, as_a_user):
  given = dict(block_indices=LISTS, block_size=8) | change
  with pytest.raises(ValueError, match=re.escape(message)):
    sparse_attention(Q, K, K, **given)


def test_kernels_say_what_they_do_not_take():
  """By name an error; without a name `xla` serves."""
  q = jnp.ones((1, 256, 1, 64), jnp.bfloat16)
  narrow = dict(block_indices=jnp.zeros((1, 1, 64, 1), jnp.int32), query_block=4)
  with pytest.raises(
    NotImplementedError, match=r"multiples of 128 are \(block_indices of query_bl"
  ):
    sparse_attention(q, q, q, implementation="mosaic_gpu", **narrow)
  small = dict(query_block=128, block_size=32, return_mass=True)
  small |= dict(block_indices=jnp.zeros((1, 1, 2, 1), jnp.int32))
  with pytest.raises(
    NotImplementedError, match="return_mass with query_block=128 and block_size=32"
  ):
    sparse_attention(q, q, q, implementation="mosaic_gpu", **small)
  lists = dict(block_indices=jnp.zeros((1, 1, 16, 1), jnp.int32), query_block=16)
  hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=hopper)):
    for how in (narrow, small):
      program = jax.jit(lambda q, how=how: sparse_attention(q, q, q, **how)).trace(q)
      assert api.implementations_in(program.jaxpr) == ("xla",)
    window = lambda w: patterns.Where(lambda i, j: i - j < w)  # of a traced array
    attend = lambda q, w: sparse_attention(q, q, q, pattern=window(w), **lists)
    program = jax.jit(attend).trace(q, jax.ShapeDtypeStruct((), jnp.int32))
    assert api.implementations_in(program.jaxpr) == ("xla",)
