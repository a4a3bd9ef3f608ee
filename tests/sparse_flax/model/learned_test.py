"""Layers that choose the blocks that they read: what they may know, and what moves what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import learned
from sparse_flax import LearnedSelfAttention
from sparse_flax import SparseTransformer
from sparse_flax.model import learned_attention
from sparse_flax.model import remat
from sparse_flax.parallel import sharding
from tests.helpers.models import nnx_mode as nnx_mode

B, E, H, HKV, SIZE = 1, 16, 4, 2, 4
OWN = {"moba": dict(key_conv=3), "nsa": dict(window=3), "indexer": dict(index_size=4)}
CASES = [(name, share) for name in OWN for share in (1, 2, 8)]
LISTS = {1: "group", 2: "all", 8: "head"}  # by the queries that share a list


def recipe_of(name, share, **more):
  sizes = dict(block_size=SIZE, top=4 + share // SIZE, query_block=share, lists=LISTS[share])
  return learned.RECIPES[name](**(sizes | OWN[name] | more))


def layer_of(name, share, **more):
  """All weights matter, also those that are zero at first."""
  layer = LearnedSelfAttention(
    width=E, num_heads=H, num_kv_heads=HKV, recipe=recipe_of(name, share), rngs=nnx.Rngs(0), **more
  )
  rng = np.random.default_rng(4)
  graph, params = nnx.split(layer, nnx.Param)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * max(x.shape[0], 4) ** -0.5, x.dtype)
  return nnx.merge(graph, jax.tree.map(fill, params))


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def first_token_that_leaks(run, x, changed) -> int | None:
  """In bits. Every row of the batch has another token changed, the last one none."""
  T = x.shape[1]
  rows = np.repeat(np.asarray(x), T + 1, axis=0)
  rows[np.arange(T), np.arange(T)] = changed
  out = np.asarray(run(jnp.asarray(rows)))
  assert all((out[u, u] != out[T, u]).any() for u in range(T))
  leaks = (u for u in range(T) if not np.array_equal(out[u, :u], out[T, :u]))
  return next(leaks, None)


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize(("name", "share"), CASES)
def test_no_output_depends_on_a_later_token(name, share):
  T, layer = 8 * SIZE + 3, layer_of(name, share)
  x, changed = normal(0, 1, T, E), 3 * normal(1, T, E)
  assert first_token_that_leaks(jax.jit(layer), x, changed) is None


def test_a_choice_by_the_mean_of_a_lists_queries_is_found_out(monkeypatch):
  real = learned_attention.select_blocks

  def planted(q, pooled, *, query_block, **how):
    B, T, H, D = q.shape
    rows = jnp.pad(q, [(0, 0), (0, -T % query_block), (0, 0), (0, 0)])
    rows = rows.reshape(B, -1, query_block, H, D).mean(axis=2)
    return real(rows.repeat(query_block, axis=1)[:, :T], pooled, query_block=query_block, **how)

  monkeypatch.setattr(learned_attention, "select_blocks", planted)
  T, layer = 8 * SIZE + 3, layer_of("moba", 2)
  assert first_token_that_leaks(jax.jit(layer), normal(0, 1, T, E), 3 * normal(1, T, E)) is not None


@pytest.mark.one_day_in_three(2)
def test_an_indexer_and_the_rest_have_losses_of_their_own():
  """Exactly: neither of an indexer's losses moves the other's weights; no scored block, loss 0."""
  layer = layer_of("indexer", 2)
  graph, params = nnx.split(layer, nnx.Param)

  @jax.jit
  def program(params, x):
    def both(params, x):
      out, losses = nnx.merge(graph, params)(x, losses=True)
      return jnp.square(out).sum(), losses["index"]

    (_, loss), vjp = jax.vjp(both, params, x)
    return loss, vjp((1.0, 0.0)), vjp((0.0, 1.0))

  moved = lambda tree: [bool(np.any(x)) for x in jax.tree.leaves(tree)]

  def split(tree):
    tree = nnx.to_pure_dict(tree)
    return tree.pop("index"), {n: x for n, x in tree.items() if n != "key"} | {
      "key": tree["key"]["kernel"]  # a bias of keys moves nothing in a softmax
    }

  loss, of_loss, of_index = program(params, normal(0, B, 31, E))
  index, others = split(of_loss[0])
  assert loss > 0 and not any(moved(index)) and all(moved(others)) and all(moved(of_loss[1]))
  index, others = split(of_index[0])
  assert all(moved(index)) and not any(moved((others, of_index[1])))
  loss, _, of_index = program(params, normal(0, B, SIZE - 1, E))  # no complete block
  assert loss == 0 and not any(moved(of_index))


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_a_block_that_nobody_reads_moves_only_where_it_is_pooled(name):
  """`moba` has no gradient for it, exactly; `nsa` has one, by its attention to pooled keys."""
  layer, x = layer_of(name, 2), normal(0, B, 60, E)
  read = np.asarray(layer.chosen(x))[0, :, -2:].any(axis=(0, 1))  # by the last block's queries
  unread = int(np.flatnonzero(~read)[-1])
  changes = lambda x: jnp.square(layer._attended(layer._given(x), None, 4, False)[0][:, -4:]).sum()
  grad = jax.jit(jax.grad(changes))(x)[:, unread * SIZE : (unread + 1) * SIZE - 2]
  assert np.any(grad) == (name == "nsa")


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_six(1)
@pytest.mark.parametrize("name", OWN)
def test_what_is_kept_for_the_backward_pass_changes_nothing(name):
  """But that the lists are kept in any case, and not made again."""
  layer, x, grads = layer_of(name, 2), normal(0, B, 31, E), {}
  graph, params = nnx.split(layer, nnx.Param)
  for level in ("none", "full", "attention", "block", "hidden", "dots"):

    def run(x, params, _):
      out, losses = nnx.merge(graph, params)(x, losses=True)
      return jnp.square(out).sum() + sum(losses.values())

    kept = remat.rematerialised(run, level, one_by_one=True)
    program = jax.jit(jax.grad(kept, argnums=1))
    grads[level] = program(x, params, None)
    if level in ("full", "dots"):
      jaxpr = str(program.trace(x, params, None).jaxpr)
      assert jaxpr.count("name=attention_blocks") == 1, "chosen again for the backward pass"
  for level, found in grads.items():
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(grads["none"]), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=level)


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize(("name", "share"), CASES)
def test_steps_give_what_the_whole_does(name, share, monkeypatch):
  """From nothing; from prompts that end inside a list and a block, choosing at every step."""
  T, layer = 5 * SIZE + 3, layer_of(name, share)
  x = normal(0, 2, T, E)
  whole = np.asarray(jax.jit(layer)(x))
  for P in (0, 11):
    step = jax.jit(lambda x, t, cache: layer.decode_step(x, t, cache))
    if P:
      monkeypatch.setattr(learned_attention, "_ROWS_AS_CHEAP", 0)
      out, cache = layer.prefill(x[:, :P], T)
      np.testing.assert_allclose(out, whole[:, :P], rtol=1e-4, atol=1e-5)
      cache = jax.tree.map(lambda y: y[None], cache)
    else:
      cache = layer.init_cache(2, T)
    for t in range(P, T):
      out, cache = step(x[:, t], t, cache)
      np.testing.assert_allclose(out, whole[:, t], rtol=1e-4, atol=1e-5, err_msg=f"{P=} {t=}")


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("name", OWN)
def test_a_stage_that_covers_everything_is_the_dense_one(name):
  layer, x = layer_of(name, 2), normal(0, 2, 27, E)
  (dense, lost), (wide, of_wide) = (layer(x, stage=s, losses=True) for s in ("dense", 40))
  np.testing.assert_allclose(dense, wide, rtol=1e-5, atol=1e-6)
  assert lost.keys() == of_wide.keys() == ({"index"} if name == "indexer" else set())
  for found, expected in zip(lost.values(), of_wide.values(), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_three(1)
@pytest.mark.parametrize("name", OWN)
def test_documents_of_a_row_are_those_alone(name):
  layer, x, first = layer_of(name, 1), normal(0, 1, 30, E), 3 * SIZE
  ids = jnp.asarray(np.repeat([0, 1], [first, 30 - first])[None])
  out = layer(x, ids)
  np.testing.assert_allclose(out[:, :first], layer(x[:, :first]), rtol=1e-4, atol=1e-5)
  other = x.at[:, :first].set(normal(1, 1, first, E))
  np.testing.assert_array_equal(out[:, first:], layer(other, ids)[:, first:])


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize("name", OWN)
def test_weights_are_those_of_the_layer(name):
  """Of `nsa` up to a factor, for its gates do not add up to 1."""
  layer, x = layer_of(name, 2), normal(0, 1, 27, E)
  weights = layer.weights(x)
  given = layer._given(x)
  out, _ = layer._attended(given, None, 4, False)
  made = jnp.einsum("bhqs,bshd->bqhd", weights, jnp.repeat(given.v, H // HKV, axis=2))
  if name == "nsa":
    made *= (out * made).sum(-1, keepdims=True) / (made * made).sum(-1, keepdims=True)
  np.testing.assert_allclose(made, out, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(weights.sum(axis=-1), np.ones((1, H, 27)), rtol=1e-5)


@pytest.mark.one_day_in_three(1)
def test_layers_are_built_in_both_modes_and_can_be_stacked(nnx_mode):
  build = lambda rngs: LearnedSelfAttention(
    width=E, num_heads=H, recipe=learned.Indexer(block_size=4, top=3, query_block=2), rngs=rngs
  )
  stack = nnx.vmap(build)(nnx.Rngs(0).split(3))

  def run(x, layer):
    out, losses = layer(x, losses=True)
    return x + out, losses["index"]

  x, losses = jax.jit(lambda x, stack: jax.lax.scan(run, x, stack))(normal(0, 1, 20, E), stack)
  assert losses.shape == (3,) and np.isfinite(x).all()


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("learned.top=2", dict(name="nsa", top=2)),
    ("learned.query_block=3", dict(name="moba", query_block=3)),
    ("learned.lists='each'", dict(name="moba", lists="each")),
    ("learned.key_conv=4", dict(name="moba", key_conv=4)),
    ("learned.window=0", dict(name="nsa", window=0)),
    ("learned.index_heads=-1", dict(name="indexer", index_heads=-1)),
    ("learned.block_size=0", dict(name="indexer", block_size=0)),
  ],
)
def test_a_recipe_that_makes_no_sense_says_why(field, change):
  with pytest.raises(ValueError, match="must") as error:
    recipe_of(change.pop("name"), 2, **change)
  assert field in str(error.value)


def test_a_stage_with_too_few_blocks_says_why():
  with pytest.raises(ValueError, match="stage=1: must be a whole number >= 2"):
    layer_of("moba", 2, stage=1)


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_heads_and_tokens_are_not_sharded(axis):
  layer, sizes = layer_of("moba", 2), dict(data=1, fsdp=1, tensor=1, sequence=1) | {axis: 2}
  run = functools.partial(jax.eval_shape, layer)
  refused = pytest.raises(NotImplementedError, match=f"mesh axis {axis}=2: must be 1")
  with jax.set_mesh(sharding.make_mesh(**sizes)), refused:
    run(jax.ShapeDtypeStruct((2, 16, E), jnp.float32))


@pytest.mark.parametrize("outer,inner", [("local", "nsa"), ("moba", "dense")])
def test_models_with_inner_levels_say_that_they_have_none(outer, inner):
  sizes = dict(modality="text", seq_len=16, position_shape=(4, 4), width=8, num_heads=2, stride=4)
  inside = dict(shorten=2, num_layers=1, attention_layers=(inner,))
  layers = dict(num_layers=1, attention_layers=(outer,), inner=inside)
  with pytest.raises(ValueError, match="must be patterns in a model with inner levels"):
    SparseTransformer(**sizes, **layers, rngs=nnx.Rngs(0))
