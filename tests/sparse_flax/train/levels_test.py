"""A run of a model of two levels: on several devices, resumed, exported, and drawn."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import evaluate as evaluate_command
from experiments import export as export_command
from experiments import sample as sample_command
from experiments import visualize
from sparse_flax import evaluate
from sparse_flax import export
from sparse_flax import model as model_lib
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import validate
from sparse_flax.view import layers as layers_lib
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
INNER = dict(shorten=3, num_layers=2, attention_layers=("local", "column"), num_heads=4)
TWO = dict(
  num_layers=1, num_layers_after=1, attention_layers=("local",), stride=4, inner=INNER
)  # fmt: skip


def config_of(path, **groups):
  return tiny.config(path, model=TWO, **groups)


@pytest.mark.one_day_in_six(2)
def test_devices_that_share_the_batch_and_the_weights_change_nothing(tmp_path):
  config = config_of(tmp_path)
  graphdef, _ = model_lib.graph_and_shapes(**config.model)
  weights = tiny.random_weights(config)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.uint8)

  def loss(params, tokens):
    return evaluate.token_nats(nnx.merge(graphdef, params)(tokens), tokens).mean()

  results = []
  for shape in (dict(data=1), dict(data=2, fsdp=2, tensor=2)):
    mesh = sharding.make_mesh(**dict(fsdp=1, tensor=1, sequence=1) | shape)
    layout = sharding.by_rules(weights, mesh)
    with jax.set_mesh(mesh):
      placed = jax.device_put(weights, layout), jax.device_put(tokens, sharding.by_batch(mesh))
      results.append(jax.jit(jax.grad(loss), out_shardings=layout)(*placed))
  assert layout["inner"]["shorten"]["pool"]["kernel"].spec == jax.P("fsdp", "tensor")
  assert layout["inner"]["lengthen"]["spread"]["kernel"].spec == jax.P("tensor", "fsdp")
  for actual, wanted in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_what_is_not_sharded_is_refused_with_the_reason(tmp_path):
  config = config_of(tiny.text_file(tmp_path / "text"), mesh=dict(data=1, sequence=2))
  assert validate.validate(config) == [
    "config.mesh.sequence=2: must be 1 with config.model.inner: the groups of a device would have "
    "to begin with a row of the device before"
  ]
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=2)
  graphdef, shapes = model_lib.graph_and_shapes(**config.model)
  tokens = jax.ShapeDtypeStruct((1, 32), np.uint8)
  with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="sequence=2: the groups"):
    jax.eval_shape(lambda params, x: nnx.merge(graphdef, params)(x), shapes, tokens)


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
def test_an_export_has_each_layer_by_its_stack(tmp_path):
  config = config_of(tmp_path)
  params = tiny.random_weights(config)
  export.save(tmp_path / "out", config, params, step=1)
  loaded, _, again = export.load(tmp_path / "out")
  assert loaded.model.inner.shorten == 3 and tiny.leaf_bytes(again) == tiny.leaf_bytes(params)
  names = export.flatten(params, cycle=export.cycles_of(config.model))
  layers = ("before.0", "after.0", "inner.layers.0", "inner.layers.1")
  assert {f"{layer}.attention.out.kernel" for layer in layers} < set(names)


def test_layers_are_numbered_as_they_run(tmp_path):
  model = config_of(tmp_path).model
  named = [layers_lib.head_names(model, layer) for layer in range(layers_lib.num_layers(model))]
  assert [len(names) for names in named] == [2, 4, 4, 2]
  assert [names[0] for names in named] == [
    "head 0, local", "head 0, local", "head 0, column", "head 0, local"
  ]  # fmt: skip
  assert layers_lib.row_name(model, 1) == "groups of 3, " and not layers_lib.row_name(model, 3)


@pytest.mark.slow
def test_commands_take_a_model_of_two_levels(tmp_path):
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
  drawn = [path.name for path in visualize.run(run, num=2, examples=2)]
  assert "report.html" in drawn and "attention-layer003-seed0.png" in drawn
