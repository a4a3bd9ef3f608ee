"""The loop: what a run writes, stops, continues and refuses; and the step by itself."""

import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import train
from sparse_flax.model import transformer
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.train import optim
from tests.helpers import tiny

pytestmark = pytest.mark.promotes  # optax's Adam mixes dtypes


def run(config, workdir):
  lines = []
  result = train.train(config, str(workdir), say=lines.append)
  return result, "\n".join(lines).splitlines()


class Killed(Exception):
  pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A run without a stop, and the same one killed in step 5 and started again."""
  root = tmp_path_factory.mktemp("runs")
  config = tiny.config(tiny.text_file(root / "text"))

  def kill(line):
    if line.startswith("step 5/6"):
      raise Killed

  straight = run(config, root / "straight")
  with pytest.raises(Killed):
    train.train(config, str(root / "stopped"), say=kill)
  resumed = run(config, root / "stopped")
  return dict(root=root, config=config, straight=straight, resumed=resumed)


@pytest.mark.one_day_in_three(2)
def test_resumed_run_ends_with_the_same_bits(runs):
  states = [tiny.restore(runs["config"], runs["root"] / name) for name in ("straight", "stopped")]
  assert int(states[0]["step"]) == 6
  assert tiny.leaf_bytes(states[0]) == tiny.leaf_bytes(states[1])
  assert runs["straight"][0] == runs["resumed"][0]


def test_first_line_tells_fresh_from_resumed(runs):
  root = runs["root"]
  assert runs["straight"][1][0] == f"FRESH RUN in {root / 'straight'}"
  assert runs["resumed"][1][0] == f"RESUMING {root / 'stopped'} at step 3"


def test_banner_names_size_data_and_devices(runs):
  text = "\n".join(runs["straight"][1])
  for word in ("parameters", "128 tokens", "FLOP", "1 x cpu", "bytes 1.0.0", "sha256:", "files"):
    assert word in text


def test_metrics_of_a_resumed_run_have_each_step_once(runs):
  records = {}
  for name in ("straight", "stopped"):
    lines = (runs["root"] / name / "metrics.jsonl").read_text().splitlines()
    records[name] = [json.loads(line) for line in lines]
  assert [x["step"] for x in records["stopped"]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
  for name in ("step", "loss", "learning_rate", "grad_norm", "validation_bits_per_byte"):
    assert [x.get(name) for x in records["straight"]] == [x.get(name) for x in records["stopped"]]
  assert not any("tokens_per_second" in x for x in records["straight"][:1])  # it compiled
  assert all(
    x["tokens_per_second"] > 0 for x in records["straight"][1:] if "loss" in x and x["step"] != 1
  )


def test_first_loss_is_8_bits_and_falls(runs):
  assert "  computed   attention by reference, remat none" in runs["straight"][1]
  lines = [x for x in runs["straight"][1] if x.startswith("step") and "loss" in x]
  assert lines[0] == "step 1/6  loss 5.55 nats  8.00 bits/byte"
  assert runs["straight"][0]["bits_per_byte"] < 7.8
  assert runs["straight"][0]["bytes_scored"] == 100


def test_run_leaves_what_the_design_says(runs):
  names = {path.name for path in (runs["root"] / "straight").iterdir()}
  assert names == {"config.json", "data.json", "metrics.jsonl", "tensorboard", "checkpoints"}
  saved = json.loads((runs["root"] / "straight" / "config.json").read_text())
  assert saved["model"]["position_shape"] == [4, 8]


@pytest.mark.one_day_in_six(5)
def test_finished_run_has_nothing_left(runs):
  result, lines = run(runs["config"], runs["root"] / "straight")
  assert lines[0].startswith("RESUMING") and "nothing left to train" in lines
  assert result == runs["straight"][0]


def test_another_config_is_refused_by_its_differences(runs):
  other = runs["config"].copy_and_resolve_references()
  other.model.stride = 4
  workdir = runs["root"] / "straight"
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  with pytest.raises(ValueError, match=r"config\.model\.stride: 8 -> 4$"):
    run(other, workdir)
  assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_other_data_are_refused(runs):
  path = runs["root"] / "text"
  text = path.read_bytes()
  tiny.text_file(path, seed=1)
  with pytest.raises(ValueError, match=r"other data(.|\n)*data\.train\.digest: 'sha256:"):
    run(runs["config"], runs["root"] / "straight")
  path.write_bytes(text)


@pytest.mark.one_day_in_three(1)
def test_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
  config = tiny.config(
    tiny.text_file(tmp_path / "text"), optim=dict(learning_rate=1e30), train=dict(max_skipped=3)
  )
  with pytest.raises(errors.NonFiniteError, match=r"step \d: loss .*learning_rate"):
    run(config, tmp_path / "run")
  assert checkpoint.latest_step(tmp_path / "run") is None


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
  """(fresh state, jitted step) for settings of the step."""
  config = tiny.config(tiny.text_file(tmp_path_factory.mktemp("data") / "text"))
  tx, schedule = train.optimizer_of(config)

  def make(*, accumulation=1, loss_scale="none", **model):
    build = lambda rngs: transformer.SparseTransformer(**{**config.model, **model}, rngs=rngs)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
    state = train.init_state(jax.random.key(0), build=build, tx=tx, loss_scale=loss_scale)
    state["params"]["logits"]["kernel"] += 0.1  # so that all gradients are there from the start
    state["params"]["logits"]["kernel"] *= jax.random.normal(jax.random.key(1), (16, 256))
    options = dict(accumulation=accumulation, ema_decay=0.9)
    step = functools.partial(train.train_step, graphdef=graphdef, tx=tx, schedule=schedule)
    return state, jax.jit(functools.partial(step, **options))

  return make


TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 256, (8, 32)), jnp.uint8)


@pytest.mark.one_day_in_three(0)
def test_accumulation_and_devices_do_not_change_the_step(stepper):
  state, step = stepper(dropout=0.0)
  once, record = step(state, TOKENS, jax.random.key(2))
  state, step = stepper(dropout=0.0, accumulation=2)
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=1, sequence=1)
  state = jax.device_put(state, sharding.replicated(mesh))
  spread, spread_record = step(
    state, jax.device_put(TOKENS, sharding.by_batch(mesh)), jax.random.key(2)
  )
  chex.assert_trees_all_close(record, spread_record, rtol=1e-5)
  # Adam divides small gradients by their size, which magnifies rounding.
  chex.assert_trees_all_close(once["ema"], spread["ema"], atol=2e-4)


@pytest.mark.one_day_in_three(1)
def test_step_counts_averages_and_draws_another_dropout(stepper):
  state, step = stepper(dropout=0.5)
  new, record = step(state, TOKENS, jax.random.key(2))
  assert int(new["step"]) == 1 and float(record["learning_rate"]) == pytest.approx(5e-3)
  mean = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state["ema"], new["params"])
  chex.assert_trees_all_close(new["ema"], mean, rtol=1e-5)
  again = step(state, TOKENS, jax.random.key(2))[1]["loss"]
  later = step(state | {"step": jnp.int32(1)}, TOKENS, jax.random.key(2))[1]["loss"]
  assert float(record["loss"]) == float(again) != float(later)


def test_float16_overflow_changes_only_scale_and_step(stepper):
  state, step = stepper(dropout=0.0, compute_dtype="float16", loss_scale="dynamic")
  fine, record = step(state, TOKENS, jax.random.key(2))
  assert record["skipped"] == 0 and math.isfinite(record["grad_norm"])
  assert float(fine["loss_scale"]) > optim.FIRST_LOSS_SCALE
  huge = state | {"loss_scale": jnp.float32(2.0**120)}
  skipped, record = step(huge, TOKENS, jax.random.key(2))
  assert record["skipped"] == 1 and not math.isfinite(record["grad_norm"])
  assert int(skipped["step"]) == 1 and float(skipped["loss_scale"]) == 2.0**119
  kept = {name: state[name] for name in ("params", "ema", "opt")}
  assert tiny.leaf_bytes({name: skipped[name] for name in kept}) == tiny.leaf_bytes(kept)
