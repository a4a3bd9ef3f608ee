"""The recipes of docs/learned.md keep the order of time, and train what they say."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import recipes
from tests.helpers.paths import ROOT

EXAMPLES = recipes.examples(ROOT / "docs" / "learned.md")
pytestmark = pytest.mark.promotes
B, H, HKV, D, E = 1, 4, 2, 8, 12
SIZE = 4


@functools.cache
def recipe(name):
  """The function of an example, without the lines after it, which call it."""
  (source,) = (x for x in EXAMPLES if f"def {name}(" in x)
  return recipes.run(source.partition("\n\n\nq = ")[0])[name]


def normal(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def arrays(T, seed=0):
  """q, k, v, and x of a layer, whose gates and indexer have weights of their own."""
  rng = np.random.default_rng(seed)
  heads = (normal(rng, B, T, h, D) for h in (H, HKV, HKV))
  return *heads, normal(rng, B, T, E)


WEIGHTS = [
  normal(np.random.default_rng(9), *shape) for shape in ((E, 2, 4), (E, 1, 4), (E, 2, HKV))
]
GATES = normal(np.random.default_rng(8), E, H, 3)


def attend(name, q, k, v, x, share):
  how = dict(size=SIZE, top=4 + share // SIZE, share=share)
  if name == "moba":
    return recipe(name)(q, k, v, **how)
  if name == "nsa":
    return recipe(name)(q, k, v, jnp.einsum("bte,ehx->bthx", x, GATES), window=3, **how)
  return recipe(name)(q, k, v, x, WEIGHTS, **how)[0]


CASES = [(name, share) for name in ("moba", "nsa", "indexer") for share in (1, 2, 8)]


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize(("name", "share"), CASES, ids=lambda x: str(x))
def test_no_output_depends_on_a_later_token(name, share):
  """In bits. Every row of the batch has another token changed, the last one none."""
  T, rng = 8 * SIZE + 3, np.random.default_rng(1)
  rows = [np.repeat(np.asarray(x), T + 1, axis=0) for x in arrays(T)]
  for x in rows:
    x[np.arange(T), np.arange(T)] = 3 * rng.standard_normal(x[0].shape)
  out = np.asarray(jax.jit(functools.partial(attend, name, share=share))(*rows))
  for u in range(T):
    np.testing.assert_array_equal(out[u, :u], out[T, :u], err_msg=f"token {u}")
    assert (out[u, u] != out[T, u]).all()


@pytest.mark.one_day_in_three(0)
def test_the_indexer_and_the_rest_have_losses_of_their_own():
  """Exactly: neither loss moves the other's weights; without scored blocks the loss is 0."""

  def both(arrays, weights):
    out, loss = recipe("indexer")(*arrays, weights, size=SIZE, share=2, top=4)
    return jnp.square(out).sum(), loss

  @jax.jit
  def program(*given):
    (_, loss), vjp = jax.vjp(both, *given)
    return loss, vjp((1.0, 0.0)), vjp((0.0, 1.0))

  is_zero = lambda tree: [not np.any(x) for x in jax.tree.leaves(tree)]
  loss, ((*of_heads, of_x), of_weights), of_index = program(arrays(31), WEIGHTS)
  assert loss > 0
  assert not any(is_zero(of_heads)) and all(is_zero((of_x, of_weights)))
  assert all(is_zero(of_index[0])) and not any(is_zero(of_index[1]))
  loss, _, of_index = program(arrays(7), WEIGHTS)  # the own block, and a forced one
  assert loss == 0 and all(is_zero(of_index))


@pytest.mark.one_day_in_three(2)
def test_the_loss_of_the_indexer_is_the_divergence_from_the_mass():
  """List by list in float64; d loss / d scores is softmax - mass."""
  rng, (T, share, top, Hl) = np.random.default_rng(3), (9, 4, 3, 2)
  nq = -(-T // share)
  query, mix, pooled = normal(rng, B, nq, 2, 4), normal(rng, B, nq, 2, Hl), normal(rng, B, 5, 4)
  lists = jnp.asarray(rng.integers(0, 5, (B, Hl, nq, top)), jnp.int32)
  scored = jnp.asarray(rng.random(lists.shape) < 0.6).at[:, :, 0].set(False)
  mass = jnp.asarray(rng.random((B, T, H, top)), jnp.float32)
  total, number = 0.0, 0
  for x, n in itertools.product(range(Hl), range(1, nq)):
    own = np.asarray(scored[0, x, n])
    if not own.any():
      continue
    keys = np.asarray(pooled[0])[np.asarray(lists[0, x, n])]
    scores = np.maximum(np.asarray(query[0, n]) @ keys.T * 0.5, 0)  # [heads, top]
    scores = (np.asarray(mix[0, n, :, x]) @ scores)[own]
    of_list = np.asarray(mass[0, n * share : (n + 1) * share, 2 * x : 2 * x + 2]).sum(axis=(0, 1))
    target = of_list[own] / of_list[own].sum()
    total += (target * (np.log(target) - scores + np.log(np.exp(scores).sum()))).sum()
    number += 1
  index_loss = recipe("indexer").__globals__["index_loss"]
  got = index_loss(query, mix, pooled, lists, scored, mass, share)
  np.testing.assert_allclose(got, total / number, rtol=1e-5)
