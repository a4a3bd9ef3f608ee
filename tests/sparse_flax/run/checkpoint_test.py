"""Checkpoints: which are kept, how they come back; and what a run's folder refuses."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_flax.model import transformer
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import workdir as workdir_lib
from tests.helpers import tiny


def state_at(step):
  weights = {"a": {"kernel": jnp.arange(8.0).reshape(4, 2) + step}, "b": jnp.float32(step)}
  return {
    "step": jnp.int32(step),
    "params": weights,
    "ema": jax.tree.map(lambda x: -x, weights),
    "opt": ({"mu": weights}, jnp.int32(step)),
  }


def save_all(workdir, scores):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(state_at(step), bits_per_byte=score)


def kept(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_two_newest_and_the_best_are_kept(tmp_path):
  save_all(tmp_path, {1: 5.0, 2: 3.0, 3: None, 4: 4.0})
  save_all(tmp_path, {5: None, 6: 6.0})  # as after a restart
  assert kept(tmp_path) == [2, 5, 6]
  assert checkpoint.latest_step(tmp_path) == 6


def test_multiples_of_keep_every_are_kept_for_good(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep_every=4) as checkpoints:
    for step in range(1, 10):
      checkpoints.save(state_at(step), bits_per_byte=1.0 if step == 2 else None)
  assert kept(tmp_path) == [2, 4, 8, 9]


def test_no_checkpoint_yet(tmp_path):
  assert checkpoint.latest_step(tmp_path) is None


@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize("devices", [1, 4], ids=lambda n: f"{n}-devices")
def test_state_comes_back_with_every_bit_where_it_is_wanted(tmp_path, devices):
  save_all(tmp_path, {3: 4.0})
  mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, sequence=1)
  where = sharding.replicated(mesh)
  shapes = checkpoint.laid_out(jax.eval_shape(lambda: state_at(0)), where)
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    state = checkpoints.restore(3, shapes)
  assert tiny.leaf_bytes(state) == tiny.leaf_bytes(state_at(3))
  assert all(x.sharding == where for x in jax.tree.leaves(state))


def make_run(workdir, config, *, step=5):
  """The folder of a run whose averaged weights are all ones."""
  model = transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  ones = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  workdir_lib.start(workdir, config, data={"train": {"digest": "sha256:1"}})
  with checkpoint.Checkpoints(workdir) as checkpoints:
    checkpoints.save({"step": jnp.int32(step), "params": {"none": jnp.zeros(1)}, "ema": ones})
  return ones


@pytest.mark.one_day_in_three(2)
def test_averaged_weights_come_back_with_config_and_graph(tmp_path):
  config = tiny.config(tmp_path / "text")
  ones = make_run(tmp_path / "run", config)
  found, graphdef, ema, step = checkpoint.restore_params(tmp_path / "run")
  assert step == 5 and found == config
  assert tiny.leaf_bytes(ema) == tiny.leaf_bytes(ones)
  logits = nnx.merge(graphdef, ema)(jnp.zeros((1, 32), jnp.uint8))
  assert logits.shape == (1, 32, 256)
  with pytest.raises(ValueError, match=r"step=4: no checkpoint .*\[5\]"):
    checkpoint.restore_params(tmp_path / "run", 4)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "has no config.json"),
    ("{", "is not valid JSON"),
    ('{"seed": 0, "modle": 1}', r"config\.modle=1: there is no such field(.|\n)*model\.width"),
  ],
  ids=["missing", "broken", "another-version"],
)
def test_config_of_a_folder_that_is_no_run(tmp_path, text, message):
  if text is not None:
    (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    workdir_lib.load_config(tmp_path)


def test_every_difference_of_a_config_is_named(tmp_path):
  config, data = tiny.config(tmp_path / "text"), {"train": {"digest": "sha256:1"}}
  workdir_lib.check(tmp_path / "run", config, data=data)  # nothing there yet
  workdir_lib.start(tmp_path / "run", config, data=data)
  workdir_lib.check(tmp_path / "run", config, data=data)
  other = tiny.config(tmp_path / "text", model=dict(width=32), data=dict(name="enwik8"))
  with pytest.raises(ValueError) as error:
    workdir_lib.check(tmp_path / "run", other, data=data)
  lines = str(error.value).splitlines()
  assert lines[1:] == ["  config.data.name: 'bytes' -> 'enwik8'", "  config.model.width: 16 -> 32"]
  with pytest.raises(ValueError, match=r"data\.train\.digest: 'sha256:1' -> 'sha256:2'"):
    workdir_lib.check(tmp_path / "run", config, data={"train": {"digest": "sha256:2"}})
