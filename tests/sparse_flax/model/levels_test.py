"""Levels of groups: by their definition, causal, complete, and one step after the other."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax.model import levels
from sparse_flax.model import shorten
from tests.helpers.models import nnx_mode  # noqa: F401
from tests.helpers.models import random_tokens
from tests.helpers.models import small_model

BASE = dict(
  width=12, num_heads=2, attention_layers=("local",), stride=4, num_layers=1, num_layers_after=1
)
DENSE = dict(num_layers=1, attention_layers=("dense",))


def random_weights(module, *, seed: int = 0):
  """The module with weights that all matter."""
  graphdef, params = nnx.split(module, nnx.Param)
  rng = np.random.default_rng(seed)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return nnx.merge(graphdef, jax.tree.map(fill, params))


def pair(k: int, *, pool: str = "linear", up: str = "linear", E: int = 3, F: int = 3):
  """A Shorten and the Lengthen that goes with it."""
  init = nnx.initializers.normal(1.0)
  sizes = dict(factor=k, width=E, inner_width=F, dtype=jnp.float32, rngs=nnx.Rngs(0))
  down = shorten.Shorten(pool=pool, kernel_init=init, **sizes)
  return random_weights(down), random_weights(shorten.Lengthen(up=up, out_init=init, **sizes))


# ------------------------------------------------------------------------------- the definition


def normed(x, norm):
  x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
  return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def groups_by_definition(x, down, k):
  """Group g pools rows g k - k + 1 ... g k, zeros before row 0; one after the other."""
  groups = []
  for g in range(math.ceil(len(x) / k)):
    rows = []
    for row in range(g * k - k + 1, g * k + 1):
      there = np.zeros_like(x[0]) if row < 0 else x[row]
      rows.append(normed(there, down.norm) if down.norm and row >= 0 else there)
    if down.pool is None:
      groups.append(sum(rows) / k)
    else:
      kernel, bias = (np.asarray(y[...]) for y in (down.pool.kernel, down.pool.bias))
      groups.append(np.concatenate(rows) @ kernel + bias)
  return np.stack(groups)


def rows_by_definition(z, up, k, T):
  """Row t is made of group t // k."""
  rows = []
  for t in range(T):
    group = normed(z[t // k], up.norm)
    if up.spread is None:
      rows.append(group)
    else:
      kernel, bias = (np.asarray(y[...]) for y in (up.spread.kernel, up.spread.bias))
      rows.append((group @ kernel + bias).reshape(k, -1)[t % k])
  return np.stack(rows)


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize(
  ("pool", "up"), [("linear", "linear"), ("mean", "repeat"), ("linear", "repeat")]
)
def test_modules_are_their_definition(k, pool, up):
  down, back = pair(k, pool=pool, up=up)
  for T in sorted({1, k - 1, k, k + 1, 3 * k + 2}):
    x = np.random.default_rng(T).normal(size=(2, T, 3)).astype(np.float32)
    z = down(jnp.asarray(x))
    expected = np.stack([groups_by_definition(row, down, k) for row in x])
    np.testing.assert_allclose(z, expected, atol=1e-5)
    expected = np.stack([rows_by_definition(row, back, k, T) for row in np.asarray(z)])
    np.testing.assert_allclose(back(z, T), expected, atol=1e-5)


def test_without_layers_rows_get_the_norm_of_the_mean():
  down, back = pair(3, pool="mean", up="repeat")
  x = np.random.default_rng(0).normal(size=(1, 7, 3)).astype(np.float32)
  before = np.concatenate([np.zeros((2, 3), np.float32), x[0]])
  for t, row in enumerate(np.asarray(back(down(jnp.asarray(x)), 7))[0]):
    mean = before[t // 3 * 3 : t // 3 * 3 + 3].mean(axis=0)
    np.testing.assert_allclose(row, normed(mean, back.norm), atol=1e-5)


def test_the_first_values_are_near_the_mean_and_end_a_branch():
  noise = nnx.initializers.normal(1e-4)
  sizes = dict(factor=4, width=6, rngs=nnx.Rngs(0))
  down = shorten.Shorten(inner_width=6, kernel_init=noise, **sizes)
  rows = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
  near = down.pooled(jnp.asarray(rows), jnp.asarray(0))
  np.testing.assert_allclose(near, rows.mean(axis=1), atol=5e-3)
  other = shorten.Shorten(inner_width=8, kernel_init=noise, **sizes)
  assert np.abs(other.pool.kernel[...]).max() < 1e-3  # of another width there is only noise


# -------------------------------------------------------------------- causal, complete, and reach


class Top(nnx.Module):
  groups = before = inner = after = None


def structure(k: tuple[int, ...], reach: tuple[tuple[int, int], ...], T: int, monkeypatch=None):
  """Levels whose layers before and after carry `reach` rows; the innermost carries all."""
  inner: dict = {}
  for n, factor in reversed(list(enumerate(k))):
    sizes = dict(num_layers=1) if n + 1 == len(k) else dict(num_layers=1, num_layers_after=1)
    inner = dict(shorten=factor, inner=inner, **sizes)
  if monkeypatch:
    monkeypatch.setattr(levels, "_check_reach", lambda found: None)
  sizes = dict(width=3, num_heads=1, attention_layers=("dense",), stride=4)
  specs = levels.specs_of(seq_len=T, num_layers=1, num_layers_after=1, inner=inner, **sizes)
  top, turns = Top(), iter([x for pair in reach for x in pair])

  def make_stack(spec, num_layers, rngs):
    del num_layers, rngs
    return spec.length if spec is specs[-1] else taken[spec.name].pop(0)

  taken = {spec.name: [next(turns), next(turns)] for spec in specs[:-1]}
  init = nnx.initializers.normal(1.0)
  inits = dict(kernel_init=init, out_init=init, position_init=init)
  levels.add_layers(top, specs, make_stack=make_stack, **inits, epsilon=1e-5, rngs=nnx.Rngs(0))
  return random_weights(top)


def smeared(level, reach, x, key):
  """Layers that carry every row to the `reach` rows behind it."""
  del level, key
  T = x.shape[1]
  ago = np.arange(T)[:, None] - np.arange(T)
  weights = np.random.default_rng(reach).uniform(0.5, 1.0, (T, T)) * (ago >= 0) * (ago <= reach)
  mixed = jnp.einsum("ts,bse->bte", jnp.asarray(weights, x.dtype), jnp.tanh(x))
  return x + mixed


def reads(top, T: int) -> np.ndarray:
  """[t, s]: whether row t of the result depends on row s."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 3)), jnp.float32)
  run = lambda x: levels.run(top, x, None, run_stack=smeared, keep=True)[0].sum(axis=-1)
  return np.abs(jax.jit(jax.jacobian(run))(x)[:, 0]).sum(axis=-1) != 0


# k of each level; what layers before and after carry; whether each row sees all rows before it.
TABLE = {
  "k2": ((2,), ((0, 0),), True),
  "k3": ((3,), ((1, 0),), True),
  "k5_after": ((5,), ((0, 3),), True),
  "k4_both": ((4,), ((1, 1),), True),
  "k4_short": ((4,), ((1, 0),), False),
  "k8_short": ((8,), ((0, 5),), False),
  "k4_none": ((4,), ((0, 0),), False),
  "nested": ((3, 4), ((1, 0), (1, 1)), True),
  "middle_none": ((3, 4), ((3, 0), (0, 0)), False),
  "middle_short": ((3, 4), ((1, 0), (1, 0)), False),
  "by_the_outermost": ((3, 4), ((10, 0), (0, 0)), True),
}


@pytest.mark.smoke("nested", daily=1)
@pytest.mark.parametrize("case", TABLE)
def test_rows_see_what_is_before_them_and_nothing_else(case, monkeypatch):
  k, reach, is_complete = TABLE[case]
  T = 2 * math.prod(k) + 1
  found = reads(structure(k, reach, T, monkeypatch), T)
  past = np.tri(T, dtype=bool)
  assert not (found & ~past).any()
  assert (found == past).all() == is_complete


def with_shift(shift, self, x):
  """`Shorten.__call__` with another shift than k - 1."""
  B, T, E = x.shape
  G = -(-T // self.factor)
  rows = jnp.pad(self.rows(x), ((0, 0), (shift, self.factor), (0, 0)))[:, : G * self.factor]
  return self.pooled(rows.reshape(B, G, self.factor, E), jnp.arange(G))


def with_later_groups(self, z, T):
  """`Lengthen.__call__` by group (t + 1) // k."""
  rows = self.rows(z).reshape(len(z), -1, z.shape[-1])
  return jnp.pad(rows, ((0, 0), (0, 1), (0, 0)))[:, 1 : T + 1]


def with_fewer_groups(self, x):
  """`Shorten.__call__` with floor(T / k) groups."""
  return CORRECT(self, x)[:, : x.shape[1] // self.factor]


CORRECT = shorten.Shorten.__call__
MISTAKES = {
  "shift_k-2": ("Shorten", functools.partial(with_shift, 2)),
  "shift_0": ("Shorten", functools.partial(with_shift, 0)),  # pools the current group
  "shift_7": ("Shorten", functools.partial(with_shift, 7)),
  "later": ("Lengthen", with_later_groups),
  "floor": ("Shorten", with_fewer_groups),
}


@pytest.mark.smoke("shift_k-2", daily=1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, monkeypatch):
  top, T = structure((4,), ((2, 0),), 13), 13
  assert (reads(top, T) == np.tri(T, dtype=bool)).all()
  name, wrong = MISTAKES[mistake]
  monkeypatch.setattr(getattr(shorten, name), "__call__", lambda self, *args: wrong(self, *args))
  try:
    found = reads(top, T)
  except TypeError:  # rows are missing
    return
  assert (found != np.tri(T, dtype=bool)).any()


def specs(**model):
  return levels.specs_of(**dict(BASE, seq_len=48, width=12) | model)


@pytest.mark.parametrize(
  ("model", "numbers"),
  [
    (dict(stride=2, num_layers_after=0, inner=dict(shorten=4, **DENSE)), r"2 rows.* reach 1;"),
    (dict(stride=4, num_layers_after=0, inner=dict(shorten=8, **DENSE)), r"6 rows.* reach 3;"),
    (
      dict(num_layers=0, num_layers_after=0, inner=dict(shorten=4, **DENSE)),
      r"2 rows .* reach 0; .*raise num_layers",
    ),
    (
      dict(
        num_layers_after=0,
        inner=dict(shorten=3, num_layers=0, inner=dict(shorten=4, **DENSE)),
      ),
      r"inner\.inner\.shorten=4: .* 2 rows .* reach 0, .* 10 bytes and not 3; raise inner\.num_la",
    ),
    (
      dict(inner=dict(shorten=3, num_layers=1, stride=2, inner=dict(shorten=4, **DENSE))),
      r"2 rows .* reach 1, ",
    ),
    (dict(attention_layers=("column",), inner=dict(shorten=3, **DENSE)), r"1 rows .* reach 0;"),
    (
      dict(attention_layers=("block",), stride=6, inner=dict(shorten=4, **DENSE)),
      r"2 rows .* reach 0;",
    ),
  ],
  ids=["k4", "k8", "none", "middle_none", "middle_short", "column", "other_blocks"],
)
def test_layers_that_reach_too_few_rows_are_refused_with_both_numbers(model, numbers):
  with pytest.raises(ValueError, match=numbers):
    specs(**model)


@pytest.mark.parametrize(
  "model",
  [
    dict(num_layers=0, num_layers_after=0, inner=dict(shorten=2, **DENSE)),
    dict(stride=2, inner=dict(shorten=4, **DENSE)),
    dict(num_layers=0, attention_layers=("block",), stride=8, inner=dict(shorten=4, **DENSE)),
    dict(stride=11, inner=dict(shorten=3, num_layers=0, inner=dict(shorten=4, **DENSE))),
    dict(attention_layers=(("column", "local"),), inner=dict(shorten=8, **DENSE)),
    dict(attention_layers=("strided",), inner=dict(shorten=5, **DENSE)),
    dict(attention_layers=("fixed",), stride=8, summary_width=2, inner=dict(shorten=8, **DENSE)),
  ],
  ids=["k2", "both", "block", "by_the_outermost", "one_head", "strided", "fixed"],
)
def test_layers_that_reach_far_enough_are_taken(model):
  assert specs(**model)


@pytest.mark.parametrize(
  ("inner", "message"),
  [
    (dict(shorten=65, **DENSE), r"inner\.shorten=65: must be a whole number from 2 to 64"),
    (dict(shorten=3), r"inner\.num_layers is missing"),
    (DENSE, r"inner\.shorten is missing"),
    (dict(shorten=3, num_layers=0), r"inner\.num_layers=0: must be a whole number >= 1"),
    (dict(shorten=3, num_layers=1, num_layers_after=1), r"inner\.num_layers_after=1: must be 0"),
    (dict(shorten=3, num_layers=1, num_heads=5), r"inner\.num_heads=5 must divide width=12"),
    (dict(shorten=3, num_layers=1, stride=0), r"inner\.stride=0: must be"),
    (dict(shorten=3, num_layers=1, pool="max"), r"inner\.pool='max': must be one of"),
    (dict(shorten=3, num_layers=1, depth=2), r"inner\.depth=2: there is no such field"),
    (dict(shorten=3, num_layers=1, width=16, pool="mean"), r"inner\.pool='mean': must be 'linear'"),
    (
      dict(shorten=3, num_layers=1, inner=dict(shorten=2, num_layers=1, dropout=1.0)),
      r"inner\.inner\.dropout=1\.0: must be",
    ),
    (
      dict(shorten=3, num_layers=3, attention_layers=("local", "dense")),
      r"inner\.num_layers=3: must be a multiple of 2",
    ),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_is_named_with_its_level(inner, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: small_model(**BASE, inner=inner))


# ------------------------------------------------------------------------------- whole models

TWO = dict(BASE, inner=dict(shorten=3, num_layers=2, attention_layers=("column", "local")))
THREE = dict(
  BASE,
  inner=dict(
    shorten=3, num_layers=1, num_layers_after=1, width=8,
    inner=dict(shorten=2, width=12, positions=True, **DENSE),
  ),
)  # fmt: skip
MEGABYTE = dict(
  BASE, num_layers=0, attention_layers=("block",), inner=dict(shorten=4, width=16, **DENSE)
)
MEANS = dict(BASE, num_layers_after=0, inner=dict(shorten=2, pool="mean", up="repeat", **DENSE))
MODELS = {"two": TWO, "three": THREE, "megabyte": MEGABYTE, "means": MEANS}


def test_no_inner_level_is_the_model_of_before():
  names = lambda model: [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))
  ]
  flat, empty = small_model(), small_model(inner={}, num_layers_after=0)
  assert names(flat) == names(empty)
  assert nnx.graphdef(flat) == nnx.graphdef(empty)
  assert all(".groups" in x or "'groups'" in x for x in names(flat) if "attention" in x)
  expected = jax.jit(lambda model, tokens: model(tokens))(flat, random_tokens())
  actual = jax.jit(lambda model, tokens: model(tokens))(empty, random_tokens())
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.one_day_in_six(0)
def test_it_is_the_same_in_both_modes_of_nnx(nnx_mode):  # noqa: F811
  model, tokens = small_model(**TWO), random_tokens(length=7)
  logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
  filled, _ = jax.jit(lambda model, tokens: model.prefill(tokens))(model, tokens)
  np.testing.assert_allclose(filled, logits, atol=1e-5)
  assert np.abs(logits).max() > 0.1


def check_dependence(model, T: int, width: int) -> None:
  """Logits t depend on the slots up to t, all of them and no other."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, width)), jnp.float32)

  def logits(x):
    run_stack = lambda *stack: model._run_stack(*stack)[0]
    x = levels.run(model, x, None, run_stack=run_stack, keep=False)
    return model.head(x)[0, :, :2].sum(axis=-1)

  found = np.abs(jax.jit(jax.jacrev(logits))(x)[:, 0]).sum(axis=-1) != 0
  np.testing.assert_array_equal(found, np.tri(T, dtype=bool))


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("name", MODELS)
def test_logits_depend_on_all_bytes_before_and_on_no_other(name):
  check_dependence(small_model(**MODELS[name]), 23, BASE["width"])


def narrow(level: dict) -> dict:
  """A shipped level with few layers of small width; factors, patterns and strides stay."""
  cycle = len(level.get("attention_layers", ("local",)))
  few = {
    name: min(level[name], cycle) for name in ("num_layers", "num_layers_after") if name in level
  }
  inner = narrow(level["inner"]) if level.get("inner") else {}
  return level | few | dict(width=8, num_heads=2, ff_mult=2, inner=inner)


SHIPPED = {
  "cifar10:shorten": dict(seq_len=36, position_shape=(4, 3, 3)),
  "cifar10:patches": dict(seq_len=36, position_shape=(2, 6, 3)),
  "enwik8:shorten": dict(seq_len=31, position_shape=(4, 8), sub_blocks=1),
  "enwik8:megabyte": dict(seq_len=31, position_shape=(4, 8)),
  "audio:1m-shorten": dict(seq_len=31, position_shape=(4, 8)),
  "photographs:": dict(seq_len=36, position_shape=(2, 6, 3)),
}


@pytest.mark.one_day_in_six(5)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("recipe", SHIPPED)
def test_shipped_models_of_small_width_are_causal_and_complete(recipe):
  name, _, variant = recipe.partition(":")
  model = importlib.import_module(f"configs.{name}").get_config(variant).model.to_dict()
  sizes = narrow(model) | SHIPPED[recipe]
  sizes |= dict(compute_dtype="float32", implementation="reference", dropout=0.0)
  if sizes["sub_blocks"] == 1 and recipe == "enwik8:shorten":
    sizes["inner"]["sub_blocks"] = 1  # there are two heads
  check_dependence(small_model(**sizes), sizes["seq_len"], 8)


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_rows_of_one_pass(name):
  model, tokens = small_model(**MODELS[name]), random_tokens()
  expected = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
  run = jax.jit(
    lambda model, token, step, caches, beginning: model.decode_step(
      token, step, caches, beginning=beginning
    ),
    static_argnums=4,
  )
  longest = 2 * levels.group_size(model) + 1
  for P in (0, 1, longest - 2):
    caches = model.init_cache(2)
    if P:
      logits, filled = jax.jit(lambda model, known: model.prefill(known))(model, tokens[:, :P])
      np.testing.assert_allclose(logits, expected[:, :P], atol=1e-5)
      shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
      assert shapes(filled) == shapes(caches)
      caches = filled
    for step in range(P, tokens.shape[1] if P == 0 else min(P + 7, 23)):
      beginning = levels.beginning_at(step, model.factors)
      logits, caches = run(model, tokens[:, step - 1], step, caches, beginning)
      np.testing.assert_allclose(logits, expected[:, step], atol=1e-5, err_msg=f"{P=} {step=}")


def test_a_traced_step_needs_to_know_what_begins():
  model = nnx.eval_shape(lambda: small_model(**TWO))
  caches = jax.eval_shape(lambda: model.init_cache(1))
  token = jax.ShapeDtypeStruct((1,), jnp.int32)
  with pytest.raises(ValueError, match="step is traced"):
    jax.eval_shape(model.decode_step, token, jax.ShapeDtypeStruct((), jnp.int32), caches)


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("factors", [(3,), (3, 2), (2, 2, 2)], ids=str)
def test_a_scan_over_groups_takes_every_step_once_and_in_order(factors):
  size = math.prod(factors)
  for phase in {0, 1, size - 2}:
    for count in (2, 2 * size + 1):

      def one_step(beginning, carry, step):
        return carry + 1, (step, jnp.asarray(beginning), carry)

      steps = phase + jnp.arange(count)
      options = dict(count=count, phase=phase, factors=factors)
      _, (taken, beginning, order) = levels.scan_steps(one_step, jnp.asarray(0), steps, **options)
      np.testing.assert_array_equal(taken, steps)
      np.testing.assert_array_equal(order, np.arange(count))
      expected = [levels.beginning_at(int(step), factors) for step in steps]
      np.testing.assert_array_equal(beginning, expected)


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("remat", ["none", "attention", "dots"])
def test_gradients_are_the_same_whatever_is_kept(remat):
  def gradients(remat):
    model = small_model(**TWO, remat=remat, dropout=0.3)
    graphdef, params = nnx.split(model)
    loss = lambda params: jnp.square(
      nnx.merge(graphdef, params)(random_tokens(), dropout_key=jax.random.key(0))
    ).mean()
    return jax.jit(jax.grad(loss))(params)

  expected = jax.tree.leaves(gradients("full"))
  for actual, wanted in zip(jax.tree.leaves(gradients(remat)), expected, strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)
    assert np.isfinite(wanted).all()


@pytest.mark.one_day_in_three(2)
def test_weights_of_groups_lie_on_the_slots_that_they_pool():
  model, T = small_model(**THREE), 23
  weights = np.asarray(model.attention_weights(random_tokens(), np.arange(T)))
  assert weights.shape == (5, 2, 2, T, T)  # before, before, innermost, after, after
  np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
  inner = weights[2]
  for t in range(T):
    groups = {-(-s // 6) for s in range(T) if (inner[..., t, s] > 0).any()}
    assert max(groups) <= t // 6
  assert (weights == np.tril(weights)).all()


def test_fewer_heads_than_others_leave_zeros():
  weights = jnp.ones((1, 2, 1, 2), jnp.float32)
  on = levels.on_slots(weights, 3, 5, 4)
  np.testing.assert_allclose(on[0, 0, 0], [1, 1 / 3, 1 / 3, 1 / 3, 0])
  assert on.shape == (1, 4, 1, 5) and not on[:, 2:].any()
