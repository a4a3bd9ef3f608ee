"""A run of a model of two levels: on several devices, resumed, exported, and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate as evaluate_command
from experiments import export as export_command
from experiments import sample as sample_command
from experiments import visualize
from sparse_flax import export
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import validate
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
INNER = dict(shorten=3, num_layers=2, attention_layers=("local", "column"), num_heads=4)
TWO = dict(
  num_layers=1, num_layers_after=1, attention_layers=("local",), stride=4, inner=INNER
)  # fmt: skip


def config_of(path, **groups):
  return tiny.config(path, model=TWO, **groups)


@pytest.mark.one_day_in_three(2)
def test_devices_that_share_the_batch_and_the_weights_change_nothing(tmp_path):
  results = []
  for mesh in (dict(data=1), dict(data=2, fsdp=2, tensor=2)):
    config = config_of(tmp_path, mesh=mesh)
    init, step = train.make_step(config)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(init, jax.random.key(0))
      layout = sharding.by_rules(shapes, mesh)
      state = jax.jit(init, out_shardings=layout)(jax.random.key(0))
      tokens = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.uint8)
      for _ in range(2):
        state, record = jax.jit(step)(state, jnp.asarray(tokens), jax.random.key(1))
    results.append((record["loss"], state["params"]))
  pool = layout["params"]["inner"]["shorten"]["pool"]["kernel"].spec
  assert pool == jax.P("fsdp", "tensor")
  assert layout["params"]["inner"]["lengthen"]["spread"]["kernel"].spec == jax.P("tensor", "fsdp")
  (loss, params), (loss_of_8, params_of_8) = results
  np.testing.assert_allclose(loss_of_8, loss, rtol=1e-5)
  for actual, wanted in zip(*map(jax.tree.leaves, (params_of_8, params)), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_what_is_not_sharded_is_refused_with_the_reason(tmp_path):
  config = config_of(tiny.text_file(tmp_path / "text"), mesh=dict(data=1, sequence=2))
  assert validate.validate(config) == [
    "config.mesh.sequence=2: must be 1 with config.model.inner: the groups of a device would have "
    "to begin with a row of the device before"
  ]


@pytest.mark.parametrize(
  ("inner", "problem"),
  [
    (dict(shorten=1, num_layers=1), "inner.shorten=1: must be a whole number from 2 to 64"),
    (dict(shorten=3, num_layers=1, dept=1), "inner.dept=1: there is no such field"),
    (dict(shorten=3), "inner.num_layers: is missing; must be a whole number"),
    (
      dict(shorten=3, num_layers=1, inner=dict(shorten=2, num_layers=1, width="x")),
      "inner.inner.width='x': must be a whole number >= 1",
    ),
    (dict(shorten=3, num_layers=1, num_heads=3), "inner.num_heads=3 must divide width=16"),
    (dict(shorten=16, num_layers=1), "inner.shorten=16: the layers around it must reach at least"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_of_a_level_is_one_line(inner, problem, tmp_path):
  config = config_of(tiny.text_file(tmp_path / "text")).copy_and_resolve_references()
  with config.unlocked():
    config.model.inner = inner
  (found,) = validate.validate(config)
  assert found.startswith(f"config.model.{problem}")


def test_a_run_without_the_field_goes_on_and_another_level_is_refused(tmp_path):
  values = tiny.config(tmp_path).to_dict()
  del values["model"]["inner"], values["model"]["num_layers_after"]
  assert validate.completed(values)["model"]["inner"] == {}
  fields = validate.by_field(config_of(tmp_path).to_dict())
  assert fields["model.inner"] == INNER and "model.inner.shorten" not in fields
  assert validate.flatten(config_of(tmp_path).to_dict())["model.inner.shorten"] == 3


@pytest.mark.one_day_in_three(1)
def test_commands_take_a_model_of_two_levels(tmp_path, capsys):
  """Trained, resumed, evaluated, sampled, exported, drawn."""
  text, run = tiny.text_file(tmp_path / "text"), tmp_path / "run"
  lines = []
  train.train(config_of(text, train=dict(steps=3)), str(run), say=lines.append)
  said = "\n".join(lines)
  assert "2 levels" in said and "level 1" in said and "3 tokens a row" in said
  train.train(config_of(text, train=dict(steps=6)), str(run), say=lines.append)
  assert f"RESUMING {run} at step 3" in lines
  result = evaluate_command.run(str(run))
  assert 0 < result["bits_per_byte"] < 9
  assert sample_command.run(run, num=1, keep=0.4)
  assert export_command.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 0
  config, _, params = export.load(tmp_path / "out")
  assert config.model.inner.shorten == 3
  assert tiny.leaf_bytes(params) == tiny.leaf_bytes(checkpoint.restore_params(run)[2])
  names = export.flatten(params, cycle=export.cycles_of(config.model))
  layers = ("before.0", "after.0", "inner.layers.0", "inner.layers.1")
  assert {f"{layer}.attention.out.kernel" for layer in layers} < set(names)
  drawn = [path.name for path in visualize.run(run, num=2, examples=2)]
  assert "report.html" in drawn and "attention-layer003-seed0.png" in drawn
