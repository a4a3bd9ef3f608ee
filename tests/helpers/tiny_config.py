"""A config file for launched runs: --config=tests/helpers/tiny_config.py:KIND,PATH."""

import pathlib

import ml_collections

from tests.helpers import tiny

MODELS = {
  "fixed": {},
  # All that a mesh can shard, dropout apart, which is drawn for the whole batch anyway.
  "mixed": dict(
    attention_layers=("fixed", "strided"), num_layers=2, num_heads=8, implementation="xla"
  ),
}


def get_config(arg: str) -> ml_collections.ConfigDict:
  kind, path = arg.split(",")
  return tiny.config(pathlib.Path(path), model=MODELS[kind], data=dict(batch_size=16))
