"""Muon for the matrices of layers, the means that it and Adam keep, and runs without an average."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate as evaluate_command
from experiments import export as export_command
from sparse_flax import export
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.run import workdir as workdir_lib
from sparse_flax.train import optim
from tests.helpers import tiny

pytestmark = pytest.mark.promotes  # optax's optimizers mix dtypes
RATE, RATIO, DECAY = 0.1, 0.5, 0.01
HOW = dict(b1=0.9, b2=0.99, eps=1e-8, weight_decay=DECAY, clip_norm=1.0)
SHAPES = {
  "groups": [
    {"query": {"kernel": (3, 8, 4), "bias": (3, 4)}, "down": {"kernel": (3, 4, 16)}},
  ],
  "logits": {"kernel": (8, 16)},
  "embedding": {"tokens": {"embedding": (16, 8)}},
}


def optimizer(name="muon", **options):
  return optim.make_optimizer(
    schedule=lambda _: RATE, name=name, muon_ratio=RATIO, **{**HOW, **options}
  )


def trees(count):
  """Weights of a model with three layers, and so many gradients."""
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  is_shape = lambda x: isinstance(x, tuple)
  return [jax.tree.map(draw, SHAPES, is_leaf=is_shape) for _ in range(1 + count)]


def moved(tx, params, *grads):
  """The last of the updates, and the state behind it."""

  @jax.jit  # one after the other, operations take longer than their compilation
  def run():
    state = tx.init(params)
    for grad in grads:
      updates, state = tx.update(grad, state, params)
    return updates, state

  return run()


def test_matrices_of_layers_are_made_orthogonal_each_for_itself():
  params, *grads = trees(2)
  updates, _ = moved(optimizer(), params, *grads)
  for name in ("query", "down"):
    update, weight = (x["groups"][0][name]["kernel"] for x in (updates, params))
    size = RATE * RATIO * 0.2 * math.sqrt(max(update.shape[1:]))
    singular = np.linalg.svd((update + RATE * DECAY * weight) / size, compute_uv=False)
    assert singular.shape == (3, 4) and singular.min() > 0.6 and singular.max() < 1.3
  # The second layer alone moves as it does among others; clipping would see other gradients.
  tx = optimizer(clip_norm=1e9)
  second = lambda tree: {"groups": jax.tree.map(lambda x: x[1:2], tree["groups"])}
  among, _ = moved(tx, params, *grads)
  alone, _ = moved(tx, second(params), *map(second, grads))
  np.testing.assert_allclose(
    alone["groups"][0]["down"]["kernel"][0], among["groups"][0]["down"]["kernel"][1], rtol=1e-5
  )


def test_what_is_no_matrix_of_a_layer_is_adams():
  params, *grads = trees(2)
  muon, _ = moved(optimizer(), params, *grads)
  adam, _ = moved(optimizer("adam"), params, *grads)
  differs = jax.tree.map(lambda a, b: bool((a != b).any()), muon, adam)
  assert differs == optim.matrices(params)
  assert sum(jax.tree.leaves(differs)) == 2


def test_another_name_is_refused():
  with pytest.raises(ValueError, match="name='sgd': must be 'adam' or 'muon'"):
    optimizer("sgd")
  with pytest.raises(ValueError, match="schedule='constant': must be 'cosine' or 'linear'"):
    optim.make_schedule(learning_rate=1.0, warmup_steps=1, steps=2, schedule="constant")


def test_means_are_kept_in_bfloat16_and_squares_in_float32():
  params, *grads = trees(2)
  for name in ("adam", "muon"):
    updates, state = moved(optimizer(name, momentum_dtype="bfloat16"), params, *grads)
    exact, _ = moved(optimizer(name), params, *grads)
    dtypes = {"mu": set(), "nu": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
      for kind in dtypes.keys() & set(names):
        dtypes[kind].add(leaf.dtype)
    assert dtypes == {"mu": {jnp.dtype(jnp.bfloat16)}, "nu": {jnp.dtype(jnp.float32)}}
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
      assert 0 < np.abs(a - b).max() < 0.05 * np.abs(b).max()


def test_state_and_updates_on_a_mesh():
  """Means of gradients lie like their weights, and cut matrices move as whole ones do."""
  params, grad = trees(1)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=1)
  tx = optimizer()
  expected, state = moved(tx, params, grad)
  layout = sharding.by_rules({"params": params, "opt": state}, mesh)
  mean = layout["opt"][1].inner_states["muon"].inner_state[0].mu["groups"][0]
  assert mean["query"]["kernel"].spec == jax.P(None, "fsdp", "tensor")
  assert mean["down"]["kernel"].spec == jax.P(None, "tensor", "fsdp")
  update = jax.jit(tx.update, out_shardings=(layout["params"], layout["opt"]))
  grad, params = (jax.device_put(x, layout["params"]) for x in (grad, params))
  got, _ = update(grad, jax.device_put(tx.init(params), layout["opt"]), params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run by Muon, of bfloat16 weights and without an average, and one that was stopped."""
  root = tmp_path_factory.mktemp("runs")
  config = tiny.config(
    tiny.text_file(root / "text"),
    model=dict(param_dtype="bfloat16", remat="none"),
    train=dict(ema_decay=0.0),
    optim=dict(name="muon", schedule="linear", momentum_dtype="bfloat16"),
  )
  result = train.train(config, str(root / "straight"), say=str)
  stops = iter([False, False, False, True])
  with pytest.raises(errors.Preempted):
    train.train(config, str(root / "stopped"), say=str, stop=lambda: next(stops))
  train.train(config, str(root / "stopped"), say=str)
  return dict(root=root, config=config, result=result)


@pytest.mark.one_day_in_six(3)
def test_a_resumed_run_ends_with_the_same_bits(runs):
  states = [tiny.restore(runs["config"], runs["root"] / name) for name in ("straight", "stopped")]
  assert int(states[0]["step"]) == 6
  assert tiny.leaf_bytes(states[0]) == tiny.leaf_bytes(states[1])
  lines = (runs["root"] / "straight" / "metrics.jsonl").read_text().splitlines()
  rates = [x["learning_rate"] for x in map(json.loads, lines) if "learning_rate" in x]
  assert rates == pytest.approx([5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3, 0.0], abs=1e-9)


@pytest.mark.one_day_in_six(4)
def test_nothing_keeps_an_average(runs):
  state = tiny.restore(runs["config"], runs["root"] / "straight")
  assert state.keys() == {"step", "params", "opt"}
  steps = runs["root"] / "straight" / "checkpoints"
  assert not [*steps.glob("*/ema")] and [*steps.glob("*/state")]


@pytest.mark.one_day_in_six(1)
def test_the_weights_themselves_are_scored_and_exported(runs, capsys):
  workdir, out = runs["root"] / "straight", runs["root"] / "out"
  state = tiny.restore(runs["config"], workdir)
  _, _, params, step = checkpoint.restore_params(workdir)
  assert tiny.leaf_bytes(params) == tiny.leaf_bytes(optim.in_float32(state["params"])) and step == 6
  result = evaluate_command.run(str(workdir), split="validation")
  assert result == runs["result"] and result["ema"] is False
  assert "weights   of the last update (not averaged), step 6" in capsys.readouterr().out
  assert export_command.main([f"--workdir={workdir}", f"--out={out}"]) == 0
  assert tiny.leaf_bytes(export.load(out)[2]) == tiny.leaf_bytes(params)


@pytest.mark.one_day_in_six(4)
def test_a_run_that_once_kept_copies_as_averages_goes_on(tmp_path):
  """With ema_decay=0 earlier versions kept an average that was equal to the weights."""
  config = tiny.config(tmp_path / "text", train=dict(ema_decay=0.0))
  state = jax.jit(train.make_step(config)[0])(jax.random.key(0))
  workdir_lib.start(tmp_path / "run", config, data={})
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(state | {"ema": state["params"]})
  assert tiny.leaf_bytes(tiny.restore(config, tmp_path / "run")) == tiny.leaf_bytes(state)
  params = checkpoint.restore_params(tmp_path / "run")[2]
  assert tiny.leaf_bytes(params) == tiny.leaf_bytes(state["params"])
