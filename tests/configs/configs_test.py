"""The recipes: the paper's numbers, all variants, and models that can be built."""

import functools
import importlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_flax import train
from sparse_flax.model import transformer
from sparse_flax.run import validate

VARIANTS = {
  "cifar10": (
    *("", "quick", "dense", "fixed", "strided", "moba", "nsa", "indexer", "record"),
    *("shorten", "patches"),
  ),
  "enwik8": (
    *("", "quick", "dense", "fixed", "strided", "moba", "nsa", "indexer", "shorten", "megabyte"),
  ),
  "imagenet64": ("", "quick", "300m"),
  "audio": ("", "quick", "262k", "1m", "1m-shorten"),
  "photographs": ("", "quick"),
  "recall": ("", "moba", "indexer", "dense", "strided", "fixed", "long"),
}
ALL = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def get_config(name, variant=""):
  return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.mark.smoke(daily=4)
@pytest.mark.promotes  # optax's Adam mixes dtypes
@pytest.mark.parametrize(("name", "variant"), ALL)
def test_every_variant_is_valid_and_takes_a_step(name, variant):
  config = get_config(name, variant)
  assert validate.validate_fields(config) == []
  build = lambda rngs: transformer.SparseTransformer(**config.model, rngs=rngs)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
  tx, schedule = train.optimizer_of(config)
  options = dict(graphdef=graphdef, tx=tx, schedule=schedule, accumulation=1, ema_decay=0.9)
  init = functools.partial(train.init_state, build=build, tx=tx, loss_scale="none")
  state = jax.eval_shape(init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((2, config.model.seq_len), jnp.uint8)
  step = functools.partial(train.train_step, **options)
  new, record = jax.eval_shape(step, state, tokens, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert record["loss"].shape == () and record["loss"].dtype == jnp.float32


@pytest.mark.parametrize(
  ("name", "variant", "parameters"),
  [
    ("cifar10", "", 59_196_928),
    ("enwik8", "", 94_949_888),
    ("imagenet64", "", 151_645_184),
    ("imagenet64", "300m", 302_959_616),
    ("audio", "", 151_840_256),
    ("audio", "262k", 25_666_304),
    ("audio", "1m", 2_707_328),
    ("cifar10", "shorten", 59_592_192),
    ("cifar10", "patches", 88_844_416),
    ("enwik8", "shorten", 90_222_080),
    ("enwik8", "megabyte", 229_229_056),
    ("audio", "1m-shorten", 3_367_680),
    ("photographs", "", 83_685_888),
  ],
)
def test_number_of_parameters(name, variant, parameters):
  model = get_config(name, variant).model
  shapes = nnx.eval_shape(lambda: transformer.SparseTransformer(**model, rngs=nnx.Rngs(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


# What the paper states, and the schedule that follows from it.
PAPER = {
  "cifar10": dict(
    model=dict(seq_len=3_072, num_layers=128, width=256, num_heads=2, ff_mult=2, qk_ratio=0.5),
    more=dict(dropout=0.25, attention_layers=("column", "local", "local", "local"), stride=96),
    optim=dict(learning_rate=3.5e-4),
    steps=120 * (48_000 // 16),
  ),
  "enwik8": dict(
    model=dict(seq_len=12_288, num_layers=30, width=512, num_heads=8, ff_mult=4, qk_ratio=1),
    more=dict(dropout=0.4, attention_layers=("fixed",), stride=128, summary_width=32, sub_blocks=4),
    optim=dict(learning_rate=2.5e-4),
    steps=80 * 915,
  ),
  "imagenet64": dict(
    model=dict(seq_len=12_288, num_layers=48, width=512, num_heads=16, ff_mult=4, qk_ratio=1),
    more=dict(dropout=0.01, attention_layers=("local", "column", "local", "local"), stride=128),
    optim=dict(learning_rate=1.5e-4),
    steps=70 * (1_281_149 // 128),
  ),
  "audio": dict(
    model=dict(seq_len=65_536, num_layers=48, width=512, num_heads=8, ff_mult=4, qk_ratio=1),
    more=dict(dropout=0.01, attention_layers=("local", "column", "local", "local"), stride=256),
    optim=dict(learning_rate=1.5e-4),
    steps=100_000,
  ),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipe_is_the_papers(name):
  config, paper = get_config(name), PAPER[name]
  model, optim_, steps = config.model.to_dict(), config.optim.to_dict(), config.train.steps
  common = dict(b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0, warmup_steps=5_000)
  assert model | paper["model"] | paper["more"] == model
  assert optim_ | common | paper["optim"] | dict(final_lr_ratio=0.0, loss_scale="none") == optim_
  assert steps == paper["steps"] and config.train.ema_decay == 0.999
  assert (model["compute_dtype"], model["param_dtype"], model["remat"]) == (
    "bfloat16",
    "float32",
    "auto",
  )


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_variant_lists_the_known_ones(name):
  with pytest.raises(ValueError) as error:
    get_config(name, "qick")
  assert all(f":{variant}" in str(error.value) for variant in VARIANTS[name][1:])
  assert "'qick'" in str(error.value)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_config_is_locked_and_plain(name, variant):
  config = get_config(name, variant)
  json.dumps(config.to_dict(), allow_nan=False)
  with pytest.raises(AttributeError):
    config.model.strde = 3
  command = f"--config=configs/{name}.py" + (f":{variant}" if variant == "quick" else "")
  assert command in importlib.import_module(f"configs.{name}").__doc__


def test_configs_import_no_library_of_ours():
  for path in pathlib.Path("configs").glob("*.py"):
    modules = re.findall(r"^\s*(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
    assert set(modules) <= {"ml_collections", "configs"}, path
