"""All arguments of `sparse_attention`: caps, functions of scores, masks of blocks, T != S."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.xla import sizes as xla_sizes
from tests.helpers.arrays import assert_close
from tests.helpers.arrays import EVERY_PATTERN

FUTURE = {  # patterns with pairs j > i
  "dense_both": patterns.Dense(causal=False),
  "local_both": patterns.Local(7, causal=False),
  "layout_both": patterns.BlockLayout(
    np.random.default_rng(3).random((2, 7, 6)) < 0.5, 4, causal=False
  ),
  "where_both": patterns.Where(lambda i, j: (i + j) % 3 != 0, causal=False),
  "union_both": patterns.Local(3, causal=False) | patterns.Column(4),
  "intersection_both": patterns.Local(9, causal=False) & patterns.Local(20),
  "per_head_both": patterns.PerHead((patterns.Dense(causal=False), patterns.Local(4))),
}
PATTERNS = EVERY_PATTERN | FUTURE
B, H = 2, 4


def alibi(score, i, j, h):
  """A penalty for distance whose slope is the head's."""
  number = lambda x: jnp.asarray(x, jnp.float32)
  return score - jnp.exp2(-number(h) - 1) * number(abs(i - j))


def bent(score, i, j, h):
  """Neither linear nor the same for all pairs; some are masked."""
  return jnp.where((i + 2 * j + h) % 5 == 0, -jnp.inf, jnp.sin(score) + 0.5 * score)


FUNCTIONS = {"none": None, "alibi": alibi, "bent": bent}


def arrays(T, S, Hkv=2, Dk=8, Dv=6, seed=0):
  """q, k, v and the cotangents of out and lse."""
  rng = np.random.default_rng([seed, T, S])
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  kv = [normal(B, S, Hkv, D) for D in (Dk, Dv)]
  return normal(B, T, H, Dk), *kv, normal(B, T, H, Dv), normal(B, T, H)


def blocks(T, S, size, of_batch=True, of_heads=True, seed=0):
  shape = (B if of_batch else 1, H if of_heads else 1, -(-T // size), -(-S // size))
  return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.5)


def run(implementation, q, k, v, dout, dlse, block_mask=None, **how):
  """out, lse, dq, dk, dv, as one program."""

  @jax.jit
  def program(q, k, v, dout, dlse, block_mask):
    masks = dict(block_mask=block_mask, return_lse=True, implementation=implementation)
    attend = functools.partial(sparse_attention, **how, **masks)
    (out, lse), vjp = jax.vjp(attend, q, k, v)
    return out, lse, *vjp((dout, dlse))

  return program(q, k, v, dout, dlse, block_mask)


def check(inputs, tolerance=1e-5, **how):
  got, truth = run("xla", *inputs, **how), run("reference", *inputs, **how)
  for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, truth, strict=True):
    assert np.isfinite(a).all() or what == "lse", what
    assert_close(a, b, tolerance=tolerance, what=what)


@pytest.fixture(params=["whole", "tiles"])
def sizes(request, monkeypatch):
  """Problems solved whole, or in small tiles."""
  if request.param == "tiles":
    jax.clear_caches()
    for name, value in dict(WHOLE=16, TILE=4, LOGITS=64).items():
      monkeypatch.setattr(xla_sizes, name, value)
    yield
    jax.clear_caches()
  else:
    yield


def by_hand(q, k, v, mask, scale, soft_cap, score_fn):
  """out and lse in float64 numpy, head by head."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (_, T, _, _), S, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
  i, j = np.arange(T, dtype=np.int32)[:, None], np.arange(S, dtype=np.int32)[None]
  out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
  for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
    scores = q[b, :, h] @ k[b, :, h // group].T * scale
    if soft_cap:
      scores = soft_cap * np.tanh(scores / soft_cap)
    if score_fn:
      head = np.full((1, 1), h, np.int32)
      scores = np.asarray(score_fn(jnp.asarray(scores, jnp.float32), i, j, head), np.float64)
    weights = np.where(mask[b, h], np.exp(scores), 0.0)
    total = weights.sum(-1)
    some = total > 0
    out[b, some, h] = weights[some] @ v[b, :, h // group] / total[some, None]
    lse[b, some, h] = np.log(total[some])
  return out, lse


@pytest.mark.smoke(daily=5)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("score_fn", FUNCTIONS)
@pytest.mark.parametrize("name", ["fixed", "per_head", "layout_both", "union_both"])
def test_it_is_what_the_door_says(name, score_fn, implementation):
  T, S, size, scale, soft_cap = 13, 19, 4, 0.7, 1.5
  q, k, v, *_ = arrays(T, S)
  pattern, mask = PATTERNS[name], blocks(T, S, size)
  pairs = np.broadcast_to(pattern.mask(T, S), (pattern.period, T, S))[np.arange(H) % pattern.period]
  wide = np.repeat(np.repeat(np.asarray(mask), size, 2), size, 3)[:, :, :T, :S]
  truth = by_hand(q, k, v, pairs & wide, scale, soft_cap, FUNCTIONS[score_fn])
  how = dict(scale=scale, logits_soft_cap=soft_cap, score_fn=FUNCTIONS[score_fn], block_size=size)
  how |= dict(pattern=pattern, block_mask=mask, return_lse=True)
  got = sparse_attention(q, k, v, **how, implementation=implementation)
  for what, a, b in zip(("out", "lse"), got, truth, strict=True):
    assert_close(a, b, tolerance=1e-5, what=what)


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("whole-fixed-9-31", "tiles-strided-31-9", daily=2)
@pytest.mark.parametrize("T,S", [(9, 31), (31, 9)])
@pytest.mark.parametrize("name", PATTERNS)
def test_lengths_may_differ(name, T, S, sizes):
  check(arrays(T, S), pattern=PATTERNS[name])


@pytest.mark.parametrize("T,S", [(1, 6), (6, 1)])
@pytest.mark.parametrize("name", ["dense_both", "strided"])
def test_of_one(name, T, S):
  check(arrays(T, S), pattern=PATTERNS[name])


@pytest.mark.smoke("tiles-local_both")
@pytest.mark.parametrize("name", FUTURE)
def test_later_keys(name, sizes):
  check(arrays(23, 23), pattern=PATTERNS[name])


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke("whole-fixed", "tiles-layout", daily=2)
@pytest.mark.parametrize("name", PATTERNS)
def test_scores_are_changed(name, sizes):
  check(arrays(25, 25), pattern=PATTERNS[name], score_fn=bent)


@pytest.mark.smoke("whole-strided-alibi")
@pytest.mark.parametrize("score_fn", [None, alibi])
@pytest.mark.parametrize("name", ["local", "strided", "fixed", "per_head_both"])
def test_scores_are_capped(name, score_fn, sizes):
  check(arrays(25, 25), pattern=PATTERNS[name], logits_soft_cap=0.8, score_fn=score_fn)


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke("whole-layout_both-True-True")
@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("of_heads", [True, False])
@pytest.mark.parametrize("name", ["dense", "per_head", "layout_both"])
def test_masks_of_blocks(name, of_batch, of_heads, sizes):
  T, S, size = (22, 22, 3) if of_batch else (21, 34, 8)
  mask = blocks(T, S, size, of_batch, of_heads)
  check(arrays(T, S), pattern=PATTERNS[name], block_mask=mask, block_size=size)


def test_masks_of_blocks_with_segments(sizes):
  ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (B, 22)), axis=1))
  how = dict(segment_ids=ids, block_mask=blocks(22, 22, 4), block_size=4, score_fn=bent)
  check(arrays(22, 22), pattern=patterns.Strided(4), **how)


@pytest.mark.one_day_in_six(3)
@pytest.mark.parametrize("name", ["dense_both", "local_both"])
def test_longer_than_a_tile(name):
  pattern = {"local_both": patterns.Local(300, causal=False)}.get(name, PATTERNS[name])
  mask = blocks(701, 1201, 100)
  check(arrays(701, 1201), 2e-5, pattern=pattern, block_mask=mask, block_size=100, score_fn=alibi)


def test_what_no_query_attends_has_no_gradient():
  mask = jnp.ones((1, 1, 4, 4), bool).at[:, :, :, 2].set(False).at[:, :, 1].set(False)
  out, lse, dq, dk, dv = run("xla", *arrays(16, 16), block_mask=mask, block_size=4, score_fn=bent)
  assert not np.any(out[:, 4:8]) and np.all(np.isneginf(lse[:, 4:8]))
  assert not np.any(dq[:, 4:8]) and not np.any(dk[:, 8:12]) and not np.any(dv[:, 8:12])
  assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))


def test_blocks_may_be_chosen_while_a_model_runs():
  """The base of learned sparsity: a mask made of the activations, in one program."""
  q, k, v, *_ = arrays(32, 32, Hkv=H, Dv=8)

  def choose(q, k):
    mean = lambda x: x.reshape(B, 8, 4, H, 8).mean(2)
    scores = jnp.einsum("bnhd,bmhd->bhnm", mean(q), mean(k))
    own = jnp.eye(8, dtype=bool)[None, None]
    return (scores >= jnp.sort(scores, -1)[..., -3:-2]) | own

  def loss(implementation, q, k, v):
    how = dict(block_mask=choose(q, k), block_size=4, implementation=implementation)
    return jnp.square(sparse_attention(q, k, v, **how)).sum()

  grads = [
    jax.jit(jax.grad(functools.partial(loss, name), (0, 1, 2))) for name in ("xla", "reference")
  ]
  for a, b in zip(*(grad(q, k, v) for grad in grads), strict=True):
    assert_close(a, b, tolerance=1e-5, what="gradient")


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("wrap", [jax.vmap, lambda f: jax.checkpoint(f, prevent_cse=False)])
def test_transformations(wrap):
  q, k, v, *_ = arrays(24, 24)
  many = (lambda x: jnp.stack([x, 2 * x])) if wrap is jax.vmap else lambda x: x
  mask = blocks(24, 24, 8)
  loss = lambda name: (
    lambda q, k, v: jnp.square(
      wrap(
        functools.partial(
          sparse_attention, block_mask=mask, block_size=8, score_fn=alibi, implementation=name
        )
      )(many(q), many(k), many(v))
    ).sum()
  )
  got, truth = (jax.grad(loss(name), (0, 1, 2))(q, k, v) for name in ("xla", "reference"))
  for a, b in zip(got, truth, strict=True):
    assert_close(a, b, tolerance=1e-5, what="gradient")


@dataclasses.dataclass(frozen=True, eq=False)
class OfTable(patterns.Pattern):
  """A pattern of another class than ours, equal to itself alone."""

  table: np.ndarray

  def allowed(self, i, j, h=0):
    return (j <= i) & self.table[j]


@dataclasses.dataclass(frozen=True)
class Unhashable(OfTable):
  pass


@pytest.mark.parametrize("kind", [OfTable, Unhashable])
def test_patterns_of_other_classes_may_hold_what_changes(kind):
  T = 24
  x = jax.random.normal(jax.random.key(0), (3, 1, T, 2, 4))
  table = np.arange(T) % 3 != 1
  for made in (kind(table), patterns.Local(3) | kind(table)):
    for _ in range(2):
      table[5:] = ~table[5:]
      got, expected = (
        sparse_attention(*x, pattern=made, implementation=name) for name in ("xla", "reference")
      )
      mask = np.broadcast_to(made.mask(T), (T, T))
      of_mask = sparse_attention(*x, pattern=patterns.BlockLayout(mask, 1))
      assert_close(got, of_mask, tolerance=1e-5, what="xla")
      assert_close(expected, of_mask, tolerance=1e-5, what="reference")
