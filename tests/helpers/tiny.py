"""The smallest run that goes through everything: 6 steps of a text model with 15,000 weights."""

import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import enwik8
from sparse_flax import model as model_lib
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from tests.helpers.paths import TESTS

GOLDEN = TESTS / "golden"


def config(path: pathlib.Path, **groups: dict) -> ml_collections.ConfigDict:
  """A config for the file `path`; `groups` are {group: {field: value}} to change."""
  config = enwik8.get_config("quick").copy_and_resolve_references()
  config.unlock()
  config.model.update(seq_len=32, width=16, num_heads=2, stride=8, summary_width=2, sub_blocks=2)
  config.model.update(num_layers=1, position_shape=(4, 8), dropout=0.1, implementation="reference")
  config.data.update(name="bytes", path=str(path), batch_size=4)
  config.train.update(steps=6, log_every=1, eval_every=2, save_every=3, ema_decay=0.5)
  config.optim.update(learning_rate=1e-2, warmup_steps=2)
  config.mesh.data = 1
  config.eval.update(min_context=0, pictures=0)
  for group, values in groups.items():
    config[group].update(values)
  return config.lock()


def golden_config(param_dtype: str) -> ml_collections.ConfigDict:
  """What was given to the runs in tests/golden, with the data where they are now."""
  config = enwik8.get_config("quick").copy_and_resolve_references()
  config.unlock()
  config.model.update(seq_len=32, width=8, num_heads=2, stride=8, summary_width=2, sub_blocks=2)
  config.model.update(num_layers=2, ff_mult=2.0, attention_layers=("fixed", "strided"))
  config.model.update(position_shape=(4, 8), dropout=0.0, param_dtype=param_dtype)
  config.data.update(name="bytes", path=str(GOLDEN / "text"), batch_size=4)
  config.train.update(steps=403, log_every=1, eval_every=200, save_every=1_000, ema_decay=0.9)
  config.optim.update(learning_rate=2e-2, warmup_steps=5)
  config.mesh.data = 1
  config.eval.update(min_context=0, pictures=0)
  return config.lock()


def text_file(path: pathlib.Path, *, seed: int = 0, size: int = 2_000) -> pathlib.Path:
  """A file of `size` bytes between "a" and "z": 100 of them are validation, 100 test."""
  path.write_bytes(np.random.RandomState(seed).randint(97, 123, size).astype(np.uint8).tobytes())
  return path


def restore(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict:
  """The newest state of a run, on one device."""
  shapes = jax.eval_shape(train.make_step(config)[0], jax.random.key(0))
  where = sharding.replicated(sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1))
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.restore(checkpoints.latest_step(), checkpoint.laid_out(shapes, where))


def random_weights(config: ml_collections.ConfigDict, *, seed: int = 0) -> dict:
  """Of a config's model: small, and all of them matter."""
  _, shapes = model_lib.graph_and_shapes(**config.model)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), shapes)


def leaf_bytes(tree) -> dict[str, bytes]:
  """Every leaf's bytes, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
