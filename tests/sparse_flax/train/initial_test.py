"""Runs that begin with the weights of another run, or of an export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments import train as launcher
from sparse_flax import export
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.run import workdir as workdir_lib
from sparse_flax.train import initial
from tests.helpers import tiny
from tests.helpers import tiny_config

# ml_collections loads config files the old way.
pytestmark = [
  pytest.mark.promotes,
  pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),
]


# Two layers, of which each has a pattern of its own.
TURNS = dict(num_layers=2, num_heads=4, attention_layers=("local", "strided"))


def save_run(folder, config):
  """The folder of a run at step 3; its averaged weights."""
  ema = tiny.random_weights(config)
  workdir_lib.start(folder, config, data={})
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save({"step": jnp.int32(3), "params": {"none": jnp.zeros(1)}, "ema": ema})
  return ema


def load(folder, config, **how):
  """As `train` does, on one device."""
  mesh = sharding.make_mesh(**config.mesh)
  shapes = jax.eval_shape(train.make_step(config)[0], jax.random.key(0))["params"]
  shapes = checkpoint.laid_out(shapes, sharding.by_rules(shapes, mesh))
  return initial.load(folder, config, shapes=shapes, mesh=mesh, **how)


@pytest.mark.one_day_in_six(3)
def test_weights_of_a_run_or_an_export_whose_layers_take_turns_otherwise(tmp_path):
  config = tiny.config(tmp_path / "text", model=TURNS)
  old = save_run(tmp_path / "run", config)
  export.save(tmp_path / "out", config, old, step=3)
  mesh = dict(fsdp=2, tensor=2)
  new = tiny.config(tmp_path / "text", model=TURNS | dict(attention_layers=("fixed",)), mesh=mesh)
  records = []
  for folder in (tmp_path / "run", tmp_path / "out"):
    params, record = load(folder, new)
    layers = [tiny.leaf_bytes(export.flatten(x, cycle=n)) for x, n in ((old, 2), (params, 1))]
    assert layers[0] == layers[1]
    records.append(record)
  assert records[0] == records[1] | {"from": str(tmp_path / "run")}
  assert (records[1]["step"], records[1]["averaged"]) == (3, True)

  export.save(tmp_path / "rounded", config, old, step=3, dtype="bfloat16")
  params, _ = load(tmp_path / "rounded", new)
  kernel = export.flatten(params, cycle=1)["logits.kernel"]
  np.testing.assert_array_equal(kernel, old["logits"]["kernel"].astype(jnp.bfloat16))

  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:  # the other run goes on
    later = tiny.random_weights(config, seed=4)
    checkpoints.save({"step": jnp.int32(4), "params": later, "ema": later})
  # One that has begun, but has saved nothing, needs what it began with.
  assert load(tmp_path / "run", new, recorded=records[0])[1] == records[0]
  with pytest.raises(ValueError, match="holds other weights than those that the run began with"):
    load(tmp_path / "run", new, recorded=records[0] | {"step": 4})


@pytest.mark.one_day_in_six(1)
def test_every_weight_that_does_not_fit_is_named_and_nothing_written(tmp_path, capsys):
  config = tiny.config(text := tiny.text_file(tmp_path / "text"))
  save_run(tmp_path / "wide", tiny.config(text, model=dict(ff_mult=2.0, num_layers=4)))
  before = sorted(tmp_path.rglob("*"))
  flags = [f"--config={tiny_config.__file__}:fixed,{text}", "--config.model.qk_norm=True"]
  flags += [f"--workdir={tmp_path / 'new'}", f"--init_from={tmp_path / 'wide'}"]
  with pytest.raises(SystemExit) as end:
    launcher.main([*flags, "--config.model.num_layers=2"])
  assert end.value.code == 2
  head, *lines = capsys.readouterr().err.splitlines()
  assert head == f"init_from={tmp_path / 'wide'}: its weights do not fit the model of this config"
  assert "  layers.0-1.feed_forward.up.kernel is [16, 32], must be [16, 64]" in lines
  assert "  layers.2-3.attention.out.bias is not in this model" in lines
  assert [x for x in lines if "norm.scale is missing" in x and "layers.0-1.attention." in x]
  assert len(lines) == 3 + 16 + 2 and sorted(tmp_path.rglob("*")) == before
  with pytest.raises(ValueError, match=r"init_from=/no/where: must be the folder of an export, or"):
    load("/no/where", config)


def test_what_a_run_began_with_does_not_change(tmp_path):
  config, record = tiny.config(tmp_path / "text"), {"from": "runs/a", "step": 3, "averaged": True}
  for folder, init, said in (("new", record, "the weights of runs/a"), ("old", None, "random")):
    workdir_lib.start(tmp_path / folder, config, data={}, init=init)
    workdir_lib.check(tmp_path / folder, config)
    with pytest.raises(ValueError, match=rf"^init_from=runs/b: the run in .* began with {said}"):
      workdir_lib.check(tmp_path / folder, config, init_from="runs/b")
  workdir_lib.check(tmp_path / "new", config, init_from="runs/../runs/a/")


@pytest.mark.one_day_in_six(5)
def test_a_run_begins_with_them_and_goes_on_without_them(tmp_path, capsys):
  text = tiny.text_file(tmp_path / "text")
  config = tiny.config(text)
  weights = save_run(tmp_path / "old", config)
  new, lines = tmp_path / "new", []
  how = dict(say=lines.append, init_from=tmp_path / "old")
  with pytest.raises(errors.Preempted):
    train.train(config, str(new), stop=lambda: True, **how)
  assert lines[:2] == [
    f"FRESH RUN in {new}",
    f"  begun      with the averaged weights of {tmp_path / 'old'}, step 3",
  ]
  # What was saved first are these weights, and an optimizer that has done nothing.
  shapes = jax.eval_shape(train.make_step(config)[0], jax.random.key(0))
  where = sharding.replicated(sharding.make_mesh(**config.mesh))
  with checkpoint.Checkpoints(new, read_only=True) as checkpoints:
    first = checkpoints.restore(0, checkpoint.laid_out(shapes, where))
  for kind in ("params", "ema"):
    assert tiny.leaf_bytes(first[kind]) == tiny.leaf_bytes(weights)
  assert first["step"] == 0 and not any(x.any() for x in jax.tree.leaves(first["opt"]))
  (tmp_path / "old").rename(tmp_path / "gone")
  train.train(config, str(new), **how)  # the same command
  assert [x for x in lines if x.startswith("  begun")] == 2 * lines[1:2]
  result = evaluate.run(new)
  assert result["init_from"]["from"] == str(tmp_path / "old")
  assert f"  begun     with the averaged weights of {tmp_path / 'old'}" in capsys.readouterr().out
