"""Schedule, decay, averaging and loss scale against formulas written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax.model import transformer
from sparse_flax.train import optim

pytestmark = pytest.mark.promotes  # optax's Adam mixes dtypes

ADAM = dict(b1=0.9, b2=0.999, eps=1e-8)


@pytest.mark.parametrize(
  ("update", "factor"),
  [(0, 1 / 5), (3, 4 / 5), (4, 1.0), (54, 0.5), (104, 0.0), (200, 0.0)],
  ids=lambda x: str(x),
)
def test_schedule_is_the_papers(update, factor):
  schedule = optim.make_schedule(learning_rate=2.0, warmup_steps=5, steps=105)
  assert float(schedule(jnp.int32(update))) == pytest.approx(2.0 * factor, abs=1e-6)


@pytest.mark.parametrize(
  ("update", "factor"),
  [(0, 1 / 5), (4, 1.0), (29, 1 - 0.75 / 4), (104, 0.25), (200, 0.25)],
  ids=lambda x: str(x),
)
def test_a_line_comes_down_to_the_final_ratio(update, factor):
  rates = dict(learning_rate=2.0, warmup_steps=5, steps=105, final_lr_ratio=0.25)
  schedule = optim.make_schedule(**rates, schedule="linear")
  assert float(schedule(jnp.int32(update))) == pytest.approx(2.0 * factor, abs=1e-6)


def test_schedule_ends_at_the_final_ratio():
  schedule = optim.make_schedule(learning_rate=2.0, warmup_steps=0, steps=10, final_lr_ratio=0.25)
  assert float(schedule(9)) == pytest.approx(0.5)


def test_warmup_as_long_as_the_run_is_no_division_by_zero():
  schedule = optim.make_schedule(learning_rate=1.0, warmup_steps=10, steps=10)
  np.testing.assert_allclose([float(schedule(t)) for t in (0, 9)], [0.1, 1.0], rtol=1e-6)


def test_update_is_clipped_adam_with_decay_of_the_weight_before():
  rng = np.random.default_rng(0)
  params = {"kernel": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}
  grads = {"kernel": jnp.asarray(10 * rng.standard_normal((3, 2)), jnp.float32)}
  tx = optim.make_optimizer(schedule=lambda _: 0.1, weight_decay=0.5, clip_norm=1.0, **ADAM)
  opt, p = tx.init(params), np.asarray(params["kernel"], np.float64)
  clipped = np.asarray(grads["kernel"], np.float64)
  clipped /= np.linalg.norm(clipped)  # longer than 1
  m = v = np.zeros_like(p)
  for t in (1, 2, 3):
    updates, opt = tx.update(grads, opt, params)
    params = jax.tree.map(jnp.add, params, updates)
    m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
    adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    p = p - 0.1 * (adam + 0.5 * p)
    np.testing.assert_allclose(params["kernel"], p, rtol=1e-5, atol=2e-6)
  assert int(optim.updates_done(opt)) == 3


def test_decay_shrinks_what_has_rank_above_one_before_stacking():
  model = transformer.SparseTransformer(
    modality="text",
    seq_len=16,
    width=8,
    num_layers=4,
    num_heads=2,
    ff_mult=2.0,
    attention_layers=("local", "column"),
    stride=4,
    position_shape=(4, 4),
    rngs=nnx.Rngs(0),
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  decays = optim.decays(params)
  for (path, leaf), decayed in zip(
    jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(decays), strict=True
  ):
    stacked = "groups" in jax.tree_util.keystr(path)
    assert decayed == (leaf.ndim - stacked > 1), (path, leaf.shape)
  assert decays["embedding"]["start"] and decays["embedding"]["tokens"]["embedding"]


def test_average_has_no_bias_correction():
  ema = optim.average({"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}, decay=0.75)
  assert float(ema["w"]) == 1.5


@pytest.mark.parametrize(
  ("scale", "loss_ok", "grads_ok", "expected"),
  [
    (2.0**16, True, True, 2.0**16 * 2 ** (1 / 2000)),
    (2.0**16, True, False, 2.0**15),
    (2.0**10, True, False, 2.0**10),
    (2.0**16, False, False, 2.0**16),
  ],
  ids=["grows", "halves", "floor", "loss-says-nothing"],
)
def test_loss_scale(scale, loss_ok, grads_ok, expected):
  new = optim.next_loss_scale(
    jnp.float32(scale), loss_ok=jnp.bool(loss_ok), grads_ok=jnp.bool(grads_ok)
  )
  assert math.isclose(float(new), expected, rel_tol=1e-6)
