"""Operation counts against those derived from the paper's Table 2, programs, and the log."""

import json
import math

import jax
import ml_collections
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

from configs import audio
from configs import cifar10
from configs import enwik8
from configs import imagenet64
from sparse_flax import model as model_lib
from sparse_flax import train
from sparse_flax.model import levels
from sparse_flax.train import flops
from tests.helpers import models
from tests.helpers import tiny

TERA = {
  "cifar10-strided": (cifar10, 0.384),
  "cifar10-fixed": (cifar10, 0.526),
  "cifar10-dense": (cifar10, 0.825),
  "enwik8-fixed": (enwik8, 3.52),
  "enwik8-strided": (enwik8, 2.39),
  "enwik8-dense": (enwik8, 6.96),
  "imagenet64-": (imagenet64, 3.84),
  "cifar10-shorten": (cifar10, 0.1575),
  "cifar10-patches": (cifar10, 0.0919),
  "enwik8-shorten": (enwik8, 1.063),
  "enwik8-megabyte": (enwik8, 1.19),
  "audio-1m-shorten": (audio, 1.984),
}


@pytest.mark.parametrize("name", TERA)
def test_forward_pass_of_the_papers_models(name):
  module, tera = TERA[name]
  config = module.get_config(name.partition("-")[2])
  assert flops.forward_flops(config.model) / 1e12 == pytest.approx(tera, rel=2e-3)


def test_training_is_three_forward_passes_per_sequence():
  model = enwik8.get_config("quick").model
  assert flops.train_flops(model, batch_size=8) == 24 * flops.forward_flops(model)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("cpu", None),
    ("NVIDIA GeForce RTX 4090", None),
  ],
)
def test_peak_of_known_devices_only(kind, peak):
  assert flops.peak_flops(kind) == peak


def products(jaxpr) -> int:
  """Operations of all matrix products of a program, those of a scan as often as it runs."""
  total = 0
  for equation in jaxpr.eqns:
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lengths)
    for inner in core.jaxprs_in_params(equation.params):
      total += times * products(inner)
  return total


@pytest.mark.promotes
def test_a_step_has_the_products_that_are_counted(tmp_path):
  """Nothing computed again; `reference` takes all pairs, of which a pattern counts its own."""
  model = dict(num_layers=3, ff_mult=2.0, qk_ratio=0.5, remat="none", implementation="reference")
  config = tiny.config(tmp_path / "text", model=model, train=dict(accumulation=2))
  model = config.model
  init, step = train.make_step(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((4, 32), np.uint8)
  jaxpr = jax.make_jaxpr(step)(shapes, tokens, jax.random.key(1)).jaxpr
  (pattern,) = model_lib.patterns_of(**dict(model.items()))
  hidden = 32 * 32 - pattern.mask(32).mean(axis=0).sum()  # pairs of a head
  uncounted = 3 * 4 * 2 * model.num_layers * hidden * (8 + 16)
  # The gradients of the tables: of bytes, and of positions.
  uncounted += 2 * 4 * 32 * (256 + sum(model.position_shape)) * model.width
  assert hidden > 500
  assert products(jaxpr) == flops.train_flops(model, batch_size=4) + uncounted


def test_products_of_every_level_are_counted():
  """`reference` takes all pairs, of which a pattern counts its own."""
  inner = dict(
    shorten=3, num_layers=1, num_layers_after=1, width=24, ff_mult=3.0,
    inner=dict(shorten=2, num_layers=2, attention_layers=("dense", "column"), qk_ratio=0.5),
  )  # fmt: skip
  sizes = dict(attention_layers=("local",), num_layers_after=2, inner=inner, remat="none")
  config = models.SMALL | sizes
  model = nnx.eval_shape(lambda: model_lib.SparseTransformer(**config, rngs=nnx.Rngs(0)))
  tokens = jax.ShapeDtypeStruct((1, 23), np.uint8)
  jaxpr = jax.make_jaxpr(lambda model, tokens: model(tokens))(model, tokens).jaxpr
  hidden = 0
  for level in levels.specs_of(**config):
    pairs = sum(x.num_pairs(level.length) for x in level.patterns) / len(level.patterns)
    width = (1 + level.qk_ratio) * level.width
    hidden += 2 * level.depth * (level.length**2 - pairs) * width
  arguments = ml_collections.ConfigDict(dict(qk_ratio=1.0) | config)
  assert products(jaxpr) == flops.forward_flops(arguments) + hidden
  assert sum(flops.level_flops(arguments)) == flops.forward_flops(arguments) - 2 * 23 * 256 * 12


@pytest.mark.one_day_in_six(4)
@pytest.mark.promotes
def test_the_log_shows_the_share_of_the_peak_that_these_operations_are(tmp_path, monkeypatch):
  peak = 1e9
  monkeypatch.setattr(flops, "peak_flops", lambda kind: peak)
  path = tiny.text_file(tmp_path / "text")
  config = tiny.config(path, train=dict(steps=4, log_every=2, accumulation=2), mesh=dict(data=2))
  said = []
  train.train(config, str(tmp_path / "run"), say=said.append)
  n, d, q, f, num_layers, batch_size = 32, 16, 16, 64, 1, 4
  (pattern,) = model_lib.patterns_of(**dict(config.model.items()))
  keys = pattern.mask(n).sum() / pattern.period / n  # per query
  forward = 2 * n * (num_layers * (2 * d * q + 2 * d * d + 2 * d * f) + 256 * d)
  forward += 2 * num_layers * n * keys * (q + d)
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  records = [record for record in map(json.loads, lines) if "mfu" in record]
  assert [record["step"] for record in records] == [2, 4]
  for record in records:
    share = 3 * batch_size * forward / record["step_seconds"] / (2 * peak)  # two devices
    assert record["mfu"] == pytest.approx(share, rel=1e-12)
    assert any(f"  {100 * share:.0f}% MFU" in line for line in said)
