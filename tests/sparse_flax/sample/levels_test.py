"""Sampling from models of several levels: groups of steps, and prompts that end within one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import sample
from sparse_flax.model import levels
from tests.helpers.models import small_model

BASE = dict(attention_layers=("local",), stride=4, num_layers=1, num_layers_after=1)
INNER = {
  "two": dict(shorten=3, num_layers=1, attention_layers=("dense",)),
  "three": dict(
    shorten=3, num_layers=1, inner=dict(shorten=2, num_layers=1, attention_layers=("dense",))
  ),
}


@pytest.fixture(scope="module", params=INNER)
def weights(request):
  model = small_model(**BASE, inner=INNER[request.param])
  graphdef, params = nnx.split(model, nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def generate(weights, *, num, **options):
  return sample.generate(*weights, key=jax.random.key(0), num=num, **options)


@pytest.mark.one_day_in_six(0)
@pytest.mark.smoke(daily=1)
def test_a_row_is_the_same_alone_and_among_16_and_follows_the_whole_model(weights):
  prompts = np.random.default_rng(0).integers(0, 256, (16, 7)).astype(np.uint8)
  prompts = [prompt[: 7 - n % 3] for n, prompt in enumerate(prompts)]  # 5 are known of all
  many = generate(weights, num=16, prompts=prompts, temperature=0)
  for row, prompt in zip(many, prompts, strict=True):
    np.testing.assert_array_equal(row[: len(prompt)], prompt)
  logits = jax.jit(lambda params, tokens: nnx.merge(weights[0], params)(tokens))(
    weights[1], jnp.asarray(many)
  )
  likeliest = np.argmax(logits, axis=-1)
  for row, prompt, wanted in zip(many, prompts, likeliest, strict=True):
    np.testing.assert_array_equal(row[len(prompt) :], wanted[len(prompt) :])
  alone = generate(weights, num=1, prompts=prompts[:1], temperature=0)
  np.testing.assert_array_equal(alone, many[:1])


@pytest.mark.one_day_in_six(3)
@pytest.mark.smoke(daily=1)
def test_pieces_and_shorter_lengths_change_nothing(weights):
  told = []
  whole = generate(weights, num=2)
  in_pieces = generate(weights, num=2, on_progress=lambda *steps: told.append(steps))
  np.testing.assert_array_equal(in_pieces, whole)
  assert told[-1] == (23, 23) and len(told) > 3
  np.testing.assert_array_equal(generate(weights, num=2, length=8), whole[:, :8])


def test_inner_levels_take_a_step_for_a_group():
  """In the program there is one step of the innermost level for a scan over groups."""
  model = small_model(**BASE, inner=INNER["three"])
  taken = []

  def one_step(beginning, carry, step):
    taken.append(beginning)
    return carry, step

  steps = jnp.arange(24)
  levels.scan_steps(one_step, (), steps, count=24, phase=0, factors=model.factors)
  assert sorted(taken) == [0, 0, 1, 2]  # each is traced once


@pytest.mark.slow
def test_kernels_of_a_step_are_run_for_each_stack():
  model = small_model(**BASE, inner=INNER["two"], width=16, compute_dtype="bfloat16")
  options = dict(key=jax.random.key(0), num=2, temperature=0)
  said = []
  options["on_programs"] = lambda *names: said.append(names[1])
  expected = sample.generate(model, **options)
  actual = sample.generate(model, **options, implementation="triton")
  np.testing.assert_array_equal(actual, expected)
  assert said == ["xla", "triton"]
