"""Weights in bfloat16: what is summed up over steps or micro-batches is float32 all the same."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments import evaluate as evaluate_command
from experiments import export as export_command
from sparse_flax import evaluate
from sparse_flax import export
from sparse_flax import sample
from sparse_flax import train
from sparse_flax.model import transformer
from sparse_flax.run import checkpoint
from sparse_flax.train import optim
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
SIZES = dict(
  modality="text",
  seq_len=8,
  width=16,
  num_layers=1,
  num_heads=2,
  attention_layers=("local",),
  stride=4,
  position_shape=(2, 4),
  compute_dtype="float32",
  param_dtype="bfloat16",
  remat="none",
  implementation="reference",
)


def in_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_averages_follow_the_weights():
  """At 0.999, which bfloat16 has not: a mean of it would stay where it began."""
  weights = {"w": jnp.ones(4, jnp.bfloat16)}
  ema = optim.in_float32(weights)
  for _ in range(700):
    ema = optim.average(ema, {"w": jnp.full(4, 2.0, jnp.bfloat16)}, decay=0.999)
  assert ema["w"].dtype == jnp.float32
  np.testing.assert_allclose(ema["w"], 2 - 0.999**700, rtol=1e-4)


@pytest.mark.one_day_in_six(1)
def test_micro_batches_are_summed_in_float32():
  """The optimizer keeps the gradient that it is given: of 64 parts, and of the whole at once."""
  tx = optax.chain(optax.trace(decay=0.0), optax.scale_by_learning_rate(lambda _: 0.0))
  build = lambda rngs: transformer.SparseTransformer(**SIZES, rngs=rngs)
  graphdef, _ = transformer.graph_and_shapes(**SIZES)
  state = train.init_state(jax.random.key(0), build=build, tx=tx, loss_scale="none")
  kernel = state["params"]["logits"]["kernel"]
  kernel = 0.3 * jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
  state["params"]["logits"]["kernel"] = kernel  # so that all gradients are there from the start
  tokens = jnp.asarray(np.random.RandomState(0).randint(97, 101, (64, 8)), jnp.uint8)

  def gradient(parts):
    how = dict(graphdef=graphdef, tx=tx, schedule=lambda _: 0.0, ema_decay=0.9, accumulation=parts)
    step = jax.jit(functools.partial(train.train_step, **how))
    trace = step(state, tokens, jax.random.key(0))[0]["opt"][0].trace
    assert {x.dtype for x in jax.tree.leaves(trace)} == {jnp.dtype(jnp.float32)}
    return np.concatenate([x.ravel() for x in jax.tree.leaves(in_float64(trace))])

  whole = gradient(1)
  # Rounding to bfloat16 once would be 2e-3; sums in bfloat16 were far more.
  assert np.linalg.norm(gradient(64) - whole) < 1e-5 * np.linalg.norm(whole)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run that began with averages and moments in bfloat16, gone on with; and its export."""
  root = tmp_path_factory.mktemp("run")
  shutil.copytree(tiny.GOLDEN / "bfloat16", root / "run")
  config, lines = tiny.golden_config("bfloat16"), []
  result = train.train(config, str(root / "run"), say=lines.append)
  assert lines[0] == f"RESUMING {root / 'run'} at step 400"
  assert export_command.main([f"--workdir={root / 'run'}", f"--out={root / 'out'}"]) == 0
  return dict(root=root, config=config, result=result)


@pytest.mark.one_day_in_six(0)
def test_what_a_run_keeps(run):
  state = tiny.restore(run["config"], run["root"] / "run")
  assert run["result"]["bits_per_byte"] < 0.45  # it was 0.39
  kernel = lambda tree: tree["groups"][0]["attention"]["query"]["kernel"]
  adam = state["opt"][1]
  assert kernel(state["params"]).dtype == jnp.bfloat16
  for kept in (state["ema"], adam.mu, adam.nu):
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
  # Its values need float32: rounding would change them.
  for kept in (state["ema"], adam.nu):
    assert (kernel(kept).astype(jnp.bfloat16).astype(jnp.float32) != kernel(kept)).mean() > 0.5


@pytest.mark.one_day_in_six(0)
def test_what_was_saved_in_bfloat16_is_widened(run):
  _, _, params, _ = checkpoint.restore_params(run["root"] / "run", 400)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  kernel = params["logits"]["kernel"]
  np.testing.assert_array_equal(kernel.astype(jnp.bfloat16).astype(jnp.float32), kernel)
  result = evaluate_command.run(str(run["root"] / "run"), step=400)
  assert result["bits_per_byte"] == pytest.approx(0.41905, rel=1e-2)  # as it was


@pytest.mark.one_day_in_six(2)
def test_an_export_is_what_was_scored(run):
  config, graph, params, step = checkpoint.restore_params(run["root"] / "run")
  exported, exported_graph, exported_params = export.load(run["root"] / "out")
  assert exported == config and tiny.leaf_bytes(exported_params) == tiny.leaf_bytes(params)
  scored = evaluate.evaluate(exported, exported_params, split="validation", step=step)
  assert scored["bits_per_byte"] == run["result"]["bits_per_byte"]
  how = dict(key=jax.random.key(0), num=2)
  samples = [
    sample.generate(*x, **how) for x in ((graph, params), (exported_graph, exported_params))
  ]
  np.testing.assert_array_equal(*samples)
  assert len(np.unique(samples[0])) > 8


@pytest.mark.one_day_in_six(5)
def test_weights_in_bfloat16_are_exported_and_loaded(run, tmp_path):
  params = tiny.restore(run["config"], run["root"] / "run")["params"]
  export.save(tmp_path, run["config"], params, step=403)
  _, graph, loaded = export.load(tmp_path)
  assert tiny.leaf_bytes(loaded) == tiny.leaf_bytes(params)
  assert loaded["logits"]["kernel"].dtype == jnp.bfloat16
  assert nnx.merge(graph, loaded)(jnp.zeros((1, 32), jnp.uint8)).dtype == jnp.float32
