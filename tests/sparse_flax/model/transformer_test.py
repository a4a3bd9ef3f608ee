"""The model against the paper's numbers, and against what its parts promise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pallas_kernels import residual
from sparse_flax import SparseTransformer
from sparse_flax.model import transformer
from tests.helpers import jaxprs
from tests.helpers.models import initial_model
from tests.helpers.models import nnx_mode  # noqa: F401
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL
from tests.helpers.models import small_model

IMAGENET = dict(
  modality="image", seq_len=12_288, width=512, num_heads=16, stride=128,
  attention_layers=("local", "column", "local", "local"), position_shape=(64, 64, 3),
)  # fmt: skip
QUICK_KEY = jax.random.key(0, impl="rbg")  # compiles much faster than the default

MUSIC = dict(modality="audio", attention_layers=("local", "column", "local", "local"))

# Parameters: those of arXiv:1904.10509, and of bodies that fit its three music lengths.
PAPER_MODELS = {
  "cifar10": (59_196_928, dict(
    modality="image", seq_len=3_072, width=256, num_layers=128, num_heads=2, ff_mult=2,
    qk_ratio=0.5, attention_layers=("column", "local", "local", "local"), stride=96,
    position_shape=(32, 32, 3))),
  "enwik8": (94_949_888, dict(
    modality="text", seq_len=12_288, width=512, num_layers=30, num_heads=8, stride=128,
    attention_layers=("fixed",), summary_width=32, sub_blocks=4, position_shape=(96, 128))),
  "imagenet64-152m": (151_645_184, dict(num_layers=48, **IMAGENET)),
  "imagenet64-300m": (302_959_616, dict(num_layers=96, **IMAGENET)),
  "music-65k": (151_840_256, dict(
    seq_len=65_536, width=512, num_layers=48, num_heads=8, stride=256, position_shape=(256, 256),
    **MUSIC)),
  "music-262k": (25_666_304, dict(
    seq_len=262_144, width=256, num_layers=32, num_heads=4, stride=512, position_shape=(512, 512),
    **MUSIC)),
  "music-1m": (2_707_328, dict(
    seq_len=1_048_576, width=128, num_layers=12, num_heads=2, stride=1_024,
    position_shape=(1_024, 1_024), **MUSIC)),
}  # fmt: skip


@pytest.mark.parametrize("count, options", PAPER_MODELS.values(), ids=PAPER_MODELS)
def test_parameter_counts_are_the_papers(count, options):
  model = nnx.eval_shape(lambda: SparseTransformer(**options, rngs=nnx.Rngs(0)))
  assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def losses_of(model, tokens, dropout_key=None):
  logits = model(tokens, dropout_key=dropout_key)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def plain(model):
  """graphdef and weights as a dict from path to array."""
  graphdef, params = nnx.split(model, nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def leaves_by_name(tree):
  leaves = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_at_first_the_loss_is_8_bits_and_only_the_logits_learn(nnx_mode):  # noqa: F811
  model = initial_model(dropout=0.3, embed_dropout=0.1)
  graphdef, params = plain(model)
  tokens = random_tokens()

  def run(params):
    losses = losses_of(nnx.merge(graphdef, params), tokens, QUICK_KEY)
    return losses.mean(), losses

  grads, losses = jax.jit(jax.grad(run, has_aux=True))(params)
  assert losses.shape == tokens.shape
  assert np.all(losses / np.float32(math.log(2)) == 8.0)
  moving = {name for name, grad in leaves_by_name(grads).items() if np.any(grad)}
  assert moving == {"logits/kernel"}


def test_all_weights_learn_once_the_logits_do():
  graphdef, params = plain(small_model(attention_layers=("fixed",), stride=5))
  tokens = random_tokens()
  run = lambda params: losses_of(nnx.merge(graphdef, params), tokens).mean()
  grads = jax.jit(jax.grad(run))(params)
  still = {name for name, grad in leaves_by_name(grads).items() if not np.any(grad)}
  # A bias of the keys moves all scores of a row alike, which the softmax takes back.
  assert still <= {"groups/0/attention/key/bias"}


def model_by_hand(params, mask, tokens):
  """The whole model in numpy and float64: two layers of one head, text of stride 5."""
  linear = lambda p, x: x @ p["kernel"] + p.get("bias", 0.0)

  def norm(p, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]

  embed, T = params["embedding"], tokens.shape[1]
  tables = [embed["positions"][n]["embedding"] for n in (0, 1)]
  x = (
    embed["tokens"]["embedding"][tokens]
    + tables[0][np.arange(T) // 5]
    + tables[1][np.arange(T) % 5]
  )
  x = np.concatenate([np.repeat(embed["start"], len(x), axis=0), x[:, :-1]], axis=1)
  for layer in range(2):
    p = jax.tree.map(lambda w, layer=layer: w[layer], params["groups"][0])
    y = norm(p["attention_norm"], x, 1e-5)
    q, k, v = (linear(p["attention"][name], y) for name in ("query", "key", "value"))
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) * mask
    x = x + linear(p["attention"]["out"], weights / weights.sum(-1, keepdims=True) @ v)
    u = linear(p["feed_forward"]["up"], norm(p["feed_forward_norm"], x, 1e-5))
    x = x + linear(p["feed_forward"]["down"], u / (1 + np.exp(-1.702 * u)))
  return linear(params["logits"], norm(params["final_norm"], x, 1e-6))


def test_every_number_of_the_definition():
  model = small_model(num_heads=1, qk_ratio=0.5)
  graphdef, params = plain(model)
  # A faint residual stream, so that the epsilons of the norms count.
  faint = ("embedding", "start", "out", "down")
  fade = lambda path, x: x * (0.003 if any(getattr(k, "key", k) in faint for k in path) else 1.0)
  params = jax.tree.map_with_path(fade, params)
  tokens = random_tokens()
  expected = model_by_hand(
    jax.tree.map(np.float64, params), model.patterns[0].mask(SMALL["seq_len"]), np.asarray(tokens)
  )
  np.testing.assert_allclose(nnx.merge(graphdef, params)(tokens), expected, atol=1e-4)


# ------------------------------------------------------------------------------------ causality

CYCLES = {
  "local-column": ("local", "column"),
  "column-local-local": ("column", "local", "local"),
  "strided": ("strided",),
  "block-summary": ("block", "summary"),
  "summary-block": ("summary", "block"),
  "fixed": ("fixed",),
  "mixed-heads": (("local", "column"), ("summary", "block")),
}


def reachable_slots(model):
  """[T, T]: whether the output of slot t depends on the input of slot s."""
  T = SMALL["seq_len"]
  reach = np.eye(T, dtype=bool)
  for pattern in model.patterns * model.num_groups:
    mask = pattern.mask(T).reshape(-1, T, T).any(axis=0)  # the projection mixes the heads
    reach = (mask | np.eye(T, dtype=bool)) @ reach  # the residual path keeps the slot itself
  return reach


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
def test_the_support_of_the_gradient_is_what_the_masks_reach(cycle):
  overrides = {} if isinstance(cycle[0], str) else dict(sub_blocks=1)  # one head per group
  model = small_model(attention_layers=cycle, num_layers=len(cycle), stride=4, **overrides)
  graphdef, params = plain(model)
  T = SMALL["seq_len"]
  tokens = jnp.arange(T)[None]  # all different: row s of the byte table is token s

  def mixed_logits(table):  # [T]: one random mixture per slot, so that nothing cancels
    changed = {**params, "embedding": {**params["embedding"], "tokens": {"embedding": table}}}
    logits = nnx.merge(graphdef, changed)(tokens)[0]
    return (logits * jax.random.normal(jax.random.key(9), logits.shape)).sum(-1)

  jacobian = jax.jit(jax.jacrev(mixed_logits))(params["embedding"]["tokens"]["embedding"])
  depends = np.asarray((jacobian[:, :T] != 0).any(-1))  # [T, T]: logits t on token s
  expected = np.zeros((T, T), bool)
  expected[:, :-1] = reachable_slots(model)[:, 1:]  # token s enters at slot s + 1
  np.testing.assert_array_equal(depends, expected)
  assert not depends[np.triu_indices(T)].any()


def test_two_factorized_layers_reach_everything_before():
  for cycle in (("local", "column"), ("column", "local"), ("strided", "strided"), ("fixed",) * 2):
    model = nnx.eval_shape(lambda cycle=cycle: small_model(attention_layers=cycle))
    assert reachable_slots(model)[np.tril_indices(SMALL["seq_len"])].all(), cycle


# -------------------------------------------------------------------------- scan, remat, dropout


def test_the_scan_is_a_loop_over_layers(nnx_mode):  # noqa: F811
  model, tokens = small_model(attention_layers=("local", "fixed"), num_layers=6), random_tokens()
  x = model.embedding(tokens)
  for n in range(3):
    for layer in jax.tree.map(lambda x, n=n: x[n], model.groups):
      x = layer(x)
  expected = model.logits(model.final_norm(x))
  np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(model, tokens), expected, atol=1e-5)


def kept_loss_and_gradient(remat, implementation, halves):
  """Bytes kept from the forward pass for the backward pass, the loss, and its gradient."""
  model = small_model(
    remat=remat,
    num_layers=4,
    implementation=implementation,
    dropout=0.2,
    attention_layers=("local",),
  )
  graphdef, params = plain(model)
  tokens = random_tokens()
  run = lambda params: losses_of(nnx.merge(graphdef, params), tokens, QUICK_KEY).mean()
  with residual.override(halves):
    loss, backward = jax.jit(lambda params: jax.vjp(run, params))(params)
  kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
  return kept, loss, jax.jit(lambda backward: backward(jnp.float32(1.0))[0])(backward)


@pytest.mark.one_day_in_six(4)
@pytest.mark.parametrize("remat", ["full", "none"])
def test_layers_in_a_loop_are_those_of_the_scan(remat, monkeypatch):
  """In two groups of two layers: loss, logits without dropout, and every gradient."""
  cycle = ("local", "column")
  model = small_model(remat=remat, num_layers=4, dropout=0.2, attention_layers=cycle)
  graphdef, params = plain(model)
  params["logits"]["kernel"] = 0.1 * jax.random.normal(QUICK_KEY, params["logits"]["kernel"].shape)

  def run(params):
    model, tokens = nnx.merge(graphdef, params), random_tokens()
    return losses_of(model, tokens, QUICK_KEY).mean(), model(tokens)

  def results():
    with residual.override("xla"):
      return jax.jit(jax.value_and_grad(run, has_aux=True))(params)

  scanned = results()
  monkeypatch.setattr(transformer, "LOOPED", ("xla",))
  with residual.override("xla"):
    assert not jaxprs.scans_of(jax.make_jaxpr(run)(params).jaxpr, 2)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, results(), scanned)


@pytest.mark.one_day_in_six(1)
@pytest.mark.smoke("None-xla", daily=0)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("halves", [None, "xla"])
def test_remat_changes_memory_and_nothing_else(halves, implementation):
  levels = ("full", "attention", "block", "hidden", "none")
  run = functools.partial(kept_loss_and_gradient, implementation=implementation, halves=halves)
  results = {name: run(name) for name in (*levels, "dots")}
  sizes = [results[name][0] for name in levels]
  assert sorted(set(sizes[:4])) == sizes[:4] and sizes[1] < results["dots"][0] < sizes[-1]
  # Between the halves stands nothing but attention, of which `xla` keeps no more than its result.
  only_result = halves == implementation == "xla"
  assert sizes[3] == sizes[4] if only_result else sizes[3] < sizes[4]
  for name in results:
    np.testing.assert_allclose(results[name][1], results["none"][1], rtol=1e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      results[name][2],
      results["none"][2],
    )


# What the backward pass computes again, and how many products it then has with local attention,
# whose own gradient has 5: two for each of 6 weights, and those of the forward pass but the last.
AGAIN = {
  "full": ("q k v attention_out attention_lse h stats u", 24),
  "attention": ("q k v h stats u", 22),
  "block": ("u", 18),
  "hidden": ("", 17),
  "none": ("", 17),
}


@pytest.mark.smoke("block", daily=1)
@pytest.mark.parametrize("remat", AGAIN)
def test_a_level_computes_again_what_it_does_not_keep(remat):
  model = small_model(
    remat=remat, attention_layers=("local",), implementation="xla", num_layers=3, dropout=0.2
  )
  graphdef, params = plain(model)
  run = lambda params: losses_of(nnx.merge(graphdef, params), random_tokens(), QUICK_KEY).mean()
  with residual.override("xla"):
    backward = jaxprs.scans_of(jax.make_jaxpr(jax.grad(run))(params).jaxpr, 3)[1]
  names = [x.params["name"] for x in backward if x.primitive.name == "name"]
  again, products = AGAIN[remat]
  assert [name.removeprefix("residual_") for name in names] == again.split()
  assert jaxprs.count_of(backward, "dot_general") == products


@functools.cache
def kept_features():
  """What dropout keeps of the one branch whose every feature is 1, as a function of biases, key."""
  model = small_model(
    width=16, num_layers=4, dropout=0.5, attention_layers=("local", "column")
  )  # fmt: skip
  graphdef, params = plain(model)
  tokens = random_tokens()
  zeros = jax.tree.map(jnp.zeros_like, params)
  zeros["final_norm"]["scale"] = jnp.ones(16)
  zeros["logits"]["kernel"] = jnp.eye(16, 256)

  def run(biases, key):  # [2 branches, 2 groups, 2 layers of the cycle]
    params = jax.tree.map(lambda x: x, zeros)
    for n, group in params["groups"].items():
      ends = group["attention"]["out"], group["feed_forward"]["down"]
      for bias, end in zip(biases, ends, strict=True):
        end["bias"] = jnp.broadcast_to(bias[:, n, None], end["bias"].shape)
    logits = nnx.merge(graphdef, params)(tokens, dropout_key=key)
    return logits[..., :16] > 0

  return jax.jit(run)


def kept_of(place, key):
  return np.asarray(kept_features()(jnp.zeros((2, 2, 2)).at[place].set(1.0), key))


def test_dropout_is_a_function_of_its_key_and_differs_by_layer_and_branch():
  key = jax.random.key(3)
  places = list(np.ndindex(2, 2, 2))
  kept = [kept_of(place, key) for place in places]
  for n, mask in enumerate(kept):
    assert 0.4 < mask.mean() < 0.6
    assert all((mask != other).mean() > 0.3 for other in kept[:n])
    assert (mask[0] != mask[1]).mean() > 0.3  # and by row of the batch
  np.testing.assert_array_equal(kept_of(places[0], key), kept[0])
  assert (kept_of(places[0], jax.random.key(4)) != kept[0]).mean() > 0.3


def test_dropout_is_off_without_a_key_and_embeddings_have_their_own():
  tokens = random_tokens()
  run = jax.jit(lambda model, key: model(tokens, dropout_key=key))
  plain_logits = run(small_model(), None)
  for model, key in (
    (small_model(dropout=0.5, embed_dropout=0.5), None),
    (small_model(), QUICK_KEY),
  ):
    np.testing.assert_allclose(run(model, key), plain_logits, atol=1e-5)
  assert np.abs(run(small_model(embed_dropout=0.5), QUICK_KEY) - plain_logits).max() > 0.1


def test_bfloat16_stays_close_to_float32_and_logits_are_float32():
  run = jax.jit(lambda model: model(random_tokens()))
  exact, rounded = (run(small_model(compute_dtype=d)) for d in ("float32", "bfloat16"))
  assert exact.dtype == rounded.dtype == jnp.float32
  assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()


# ------------------------------------------------------------------------------- initial values

WIDTH, DEPTH = 64, 4
TABLES = {
  "paper": (0.125 / 8, 0.125 / math.sqrt(2 * WIDTH), lambda fan_in: 0.125 / math.sqrt(fan_in)),
  "code": (0.013, 0.007 / math.sqrt(2), lambda fan_in: math.sqrt(0.125 / fan_in)),
  "default": (0.125 / 8, 0.125 / math.sqrt(2 * WIDTH), lambda fan_in: math.sqrt(0.125 / fan_in)),
}


@pytest.mark.parametrize("scheme", TABLES)
def test_initial_standard_deviations(scheme):
  model = initial_model(
    width=WIDTH, num_layers=DEPTH, init_scheme=scheme, ff_mult=4,
    attention_layers=("local", "column"), seq_len=60 * 64, position_shape=(60, 64),
  )  # fmt: skip
  token, position, matrix = TABLES[scheme]
  end = lambda fan_in: matrix(fan_in) / math.sqrt(2 * DEPTH)  # layers, not groups of the scan
  expected = {
    "embedding/tokens/embedding": token,
    "embedding/positions/0/embedding": position,
    "embedding/positions/1/embedding": position,
    "groups/1/attention/query/kernel": matrix(WIDTH),
    "groups/1/attention/key/kernel": matrix(WIDTH),
    "groups/1/attention/value/kernel": matrix(WIDTH),
    "groups/1/attention/out/kernel": end(WIDTH),
    "groups/0/feed_forward/up/kernel": matrix(WIDTH),
    "groups/0/feed_forward/down/kernel": end(4 * WIDTH),
  }
  leaves = leaves_by_name(plain(model)[1])
  for name, std in expected.items():
    assert np.std(leaves[name]) == pytest.approx(std, rel=0.05), name
    assert abs(np.mean(leaves[name])) < 0.1 * std, name
  assert np.std(leaves["embedding/start"]) == pytest.approx(token, rel=0.3)
  for name, leaf in leaves.items():
    if name.endswith("bias") or name == "logits/kernel":
      assert not np.any(leaf), name
    elif name.endswith("scale"):
      assert np.all(leaf == 1), name
    elif name.startswith("groups"):  # no two layers start alike
      assert np.abs(leaf[0] - leaf[1]).max() > 0, name


# ------------------------------------------------------------------------- attention and mistakes


def test_attention_weights_come_by_layer_head_and_row():
  model = small_model(attention_layers=(("local", "column"), "strided"), num_layers=4)
  rows = np.array([1, 20, 7])
  weights = np.asarray(jax.jit(lambda m, t: m.attention_weights(t, rows))(model, random_tokens()))
  assert weights.shape == (4, 2, 2, 3, SMALL["seq_len"])
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
  for layer in range(4):
    for h in range(2):
      mask = model.patterns[layer % 2].of_head(h).mask(SMALL["seq_len"])[rows]
      np.testing.assert_array_equal(weights[layer, 0, h] > 0, mask)
  assert np.abs(weights[0] - weights[2]).max() > 1e-6  # not one group's twice


def test_shorter_sequences_are_the_start_of_longer_ones():
  model, tokens = small_model(attention_layers=("fixed",)), random_tokens()
  run = jax.jit(lambda model, tokens: model(tokens))
  logits = run(model, tokens)
  np.testing.assert_allclose(run(model, tokens[:, :9]), logits[:, :9], atol=1e-5)
  np.testing.assert_allclose(run(model, tokens.astype(jnp.uint8)), logits, atol=1e-5)
  with pytest.raises(ValueError, match="T=24 tokens are more than seq_len=23"):
    model(random_tokens(length=24))


MISTAKES = [
  (dict(modality="video"), "modality='video': must be one of"),
  (dict(seq_len=0), "seq_len=0: must be a whole number >= 1"),
  (dict(num_heads=5), "num_heads=5 must divide width=12"),
  (dict(num_layers=3, attention_layers=("local", "column")), "num_layers=3: must be a multiple"),
  (dict(attention_layers=()), r"attention_layers=\(\)"),
  (dict(attention_layers="local"), "attention_layers='local': must be a tuple"),
  (dict(attention_layers=("lokal",)), "attention_layers has 'lokal': must be one of"),
  (dict(attention_layers=(("local",) * 3,)), "num_heads=2 must be a multiple of 3"),
  (dict(stride=0), "stride=0"),
  (dict(attention_layers=("fixed",), summary_width=0), "summary_width=0"),
  (dict(attention_layers=("fixed",), summary_width=3), "at most stride=5"),
  (dict(attention_layers=("fixed",), stride=9, sub_blocks=3), "sub_blocks=3: must divide the 2"),
  (dict(qk_ratio=0.1), "qk_ratio=0.1"),
  (dict(ff_mult=0.01), "ff_mult=0.01"),
  (dict(dropout=1.0), r"dropout=1.0: must be in \[0, 1\)"),
  (dict(embed_dropout=-0.1), "embed_dropout=-0.1"),
  (dict(position_shape=(4, 5)), r"position_shape=\(4, 5\): text needs"),
  (dict(modality="image"), "an image needs"),
  (dict(init_scheme="best"), "init_scheme='best'"),
  (dict(activation="relu"), "activation='relu'"),
  (dict(rope="spiral"), "rope='spiral'"),
  (dict(rope="tokens", num_heads=4), "rope='tokens': .* = 3 features per head, .* even"),
  (dict(rope="axes", num_heads=6), "rope='axes': .* = 2 features .* even number >= 4"),
  (dict(remat="some"), "remat='some'"),
  (dict(compute_dtype="int8"), "compute_dtype='int8'"),
  (dict(param_dtype="float16"), "param_dtype='float16'"),
  (dict(implementation="magic"), "implementation='magic'"),
]  # fmt: skip


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=str)
def test_a_mistake_is_named_with_its_value(overrides, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: small_model(**overrides))
