"""Bits per byte against sums in numpy, over whole splits, for any batch size."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import evaluate
from sparse_flax.model import transformer
from sparse_flax.parallel import sharding
from tests.helpers import tiny
from tests.helpers.jaxprs import equations
from tests.helpers.models import random_tokens
from tests.helpers.models import small_model


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """A config, weights whose predictions vary, their graph, and the bytes of the test split."""
  path = tiny.text_file(tmp_path_factory.mktemp("data") / "text")
  config = tiny.config(path)
  model = transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model, nnx.Param)
  params = nnx.to_pure_dict(params)
  noise = 0.3 * jax.random.normal(jax.random.key(1), params["logits"]["kernel"].shape)
  params["logits"]["kernel"] = params["logits"]["kernel"] + noise
  return config, params, graphdef, np.frombuffer(path.read_bytes()[-100:], np.uint8)


def bits(case, window, first):
  """Bits of the bytes of `window` from number `first` on, in float64."""
  config, params, graphdef, _ = case
  padded = np.zeros((1, config.model.seq_len), np.uint8)
  padded[0, : len(window)] = window
  logits = np.asarray(nnx.merge(graphdef, params)(jnp.asarray(padded))[0], np.float64)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return -sum(log_p[t, window[t]] for t in range(first, len(window))) / math.log(2)


def test_untrained_model_has_8_bits(case):
  config, params, _, _ = case
  zero = params | {"logits": {"kernel": jnp.zeros((16, 256))}}
  result = evaluate.evaluate(config, zero, split="test", step=0)
  assert result["bits_per_byte"] == pytest.approx(8, abs=1e-5)


@pytest.mark.smoke()
@pytest.mark.parametrize("batch_size", [1, 3, 4, 100], ids=lambda n: f"batch{n}")
def test_every_byte_counts_once_whatever_the_batch(case, batch_size):
  config, params, _, text = case
  windows = [(text[s : s + 32], 0) for s in (0, 32, 64)] + [(text[68:100], 28)]
  expected = sum(bits(case, *window) for window in windows) / 100
  result = evaluate.evaluate(config, params, split="test", step=0, batch_size=batch_size)
  assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
  assert result["bytes_scored"] == result["bytes_in_split"] == 100


def test_minimum_context_scores_the_same_bytes_with_more_before_them(case):
  config, params, _, text = case
  windows = [(text[:32], 0)] + [(text[s : s + 32], 24) for s in range(8, 65, 8)]
  windows.append((text[68:100], 28))
  expected = sum(bits(case, *window) for window in windows) / 100
  result = evaluate.evaluate(config, params, split="test", min_context=24, step=0)
  assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
  assert result["bytes_scored"] == 100 and result["min_context"] == 24


def test_the_context_curve_scores_the_same_bytes_with_more_before_them(case):
  config, params, _, text = case
  result = evaluate.context_curve(config, params, last=4, step=7)
  assert [x["context"] for x in result["contexts"]] == [0, 8, 16, 28]  # the stride is 8
  of_each = np.array(
    [
      [bits(case, text[stop - 4 - x["context"] : stop], x["context"]) / 4 for stop in (32, 64, 96)]
      for x in result["contexts"]
    ]
  )
  more = of_each - of_each[-1]
  for key, expected in (
    ("bits_per_byte", of_each.mean(axis=1)),
    ("standard_error", of_each.std(axis=1, ddof=1) / 3**0.5),
    ("more", more.mean(axis=1)),
    ("more_error", more.std(axis=1, ddof=1) / 3**0.5),
  ):
    got = [x[key] for x in result["contexts"]]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=key)
  assert abs(more[:-1]).min() > 1e-3  # the contexts matter
  expected = dict(last=4, bytes_scored=12, sequences=3, sequences_in_split=3, step=7, split="test")
  assert result | expected == result and "min_context" not in result
  assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_context_curve_of_one_window_has_no_errors(case):
  config, params, _, _ = case
  result = evaluate.context_curve(config, params, last=32, step=0, num=1)
  whole = evaluate.evaluate(config, params, step=0, num=1)["bits_per_byte"]
  assert result["contexts"] == [
    dict(context=0, bits_per_byte=whole, standard_error=None, more=0.0, more_error=None)
  ]


def test_context_curves_of_what_has_none(case, tmp_path):
  config, params, _, _ = case
  for last in (0, 33):
    with pytest.raises(ValueError, match=rf"last={last}: must be a whole number from 1 to 32"):
      evaluate.context_curve(config, params, last=last, step=0)
  short = evaluate.open_dataset(config, "test")
  long = config.copy_and_resolve_references()
  long.model.update(seq_len=128, position_shape=(16, 8))
  with pytest.raises(ValueError, match="seq_len=128 must be at most 100, the longest part of the"):
    evaluate.context_curve(long, params, last=8, dataset=short, step=0)
  with pytest.raises(ValueError, match="num=4: must be a whole number from 1 to 3"):
    evaluate.context_curve(config, params, last=8, num=4, step=0)


def test_devices_share_the_batch(case):
  config, params, _, _ = case
  dataset = evaluate.open_dataset(config, "test")
  scores = []
  for devices in (1, 4):
    mesh = sharding.make_mesh(data=devices, fsdp=1, tensor=1, sequence=1)
    weights = jax.device_put(params, sharding.replicated(mesh))
    evaluator = evaluate.Evaluator(config, dataset, min_context=0, batch_size=2, mesh=mesh)
    scores.append(evaluator(weights, step=0)["bits_per_byte"])
  assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_result_says_what_it_is_a_score_of(case):
  config, params, _, _ = case
  result = evaluate.evaluate(config, params, split="test", step=7)
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  assert result["data"]["digest"].startswith("sha256:") and result["data"]["name"] == "bytes"
  expected = dict(split="test", step=7, context=32, min_context=0, dtype="float32", ema=True)
  assert result | expected == result
  assert (result["attention"], result["backend"]) == ("reference", "cpu")


def test_part_of_a_split_says_so(case):
  config, params, _, _ = case
  dataset = evaluate.open_dataset(config, "test")
  evaluator = evaluate.Evaluator(config, dataset, min_context=0, batch_size=2)
  result = evaluator(params, step=0, max_batches=1)
  assert (result["bytes_scored"], result["bytes_in_split"]) == (64, 100)


def test_the_first_sequences_alone_and_the_error_of_their_mean(case):
  config, params, _, text = case
  of_each = np.array([bits(case, text[s : s + 32], 0) for s in (0, 32, 64)]) / 32
  told = []
  how = dict(num=3, batch_size=2, averaged=False, on_sequences=told.append)
  result = evaluate.evaluate(config, params, step=0, **how)
  (sequences,) = told
  np.testing.assert_allclose(sequences, of_each, rtol=1e-6)
  assert result["bits_per_byte"] == pytest.approx(of_each.mean(), rel=1e-6)
  assert result["standard_error"] == pytest.approx(of_each.std(ddof=1) / 3**0.5, rel=1e-3)
  expected = dict(sequences=3, sequences_in_split=4, bytes_scored=96, bytes_in_split=100, ema=False)
  assert result | expected == result


def test_two_models_on_the_same_sequences():
  random = np.random.RandomState(0)
  hard = random.normal(3.0, 0.7, 1_000)  # what the sequences are like, to both models
  a, b = (hard + random.normal(mean, 0.1, 1_000) for mean in (0.02, 0.0))
  difference, error = evaluate.paired_difference(a.astype(np.float32), b.astype(np.float32))
  assert difference == pytest.approx(a.mean() - b.mean(), abs=1e-6)
  assert error == pytest.approx(0.1 * 2**0.5 / 1_000**0.5, rel=0.1)
  with pytest.raises(ValueError, match=r"must be as many, >= 2"):
    evaluate.paired_difference(a[1:], b)


def test_the_error_of_sequences_of_different_lengths(case):
  config, params, _, text = case
  windows = [(text[s : s + 32], 0) for s in (0, 32, 64)] + [(text[68:100], 28)]
  of_each, sizes = np.array([bits(case, *x) for x in windows]), np.array([32, 32, 32, 4])
  result = evaluate.evaluate(config, params, step=0)
  # Where each sequence is left out in turn, the errors of the ratio are nearly the same.
  ratios = [np.delete(of_each, n).sum() / np.delete(sizes, n).sum() for n in range(4)]
  jackknife = np.sqrt(3 / 4 * np.square(ratios - np.mean(ratios)).sum())
  assert result["standard_error"] == pytest.approx(jackknife, rel=0.5)
  assert result["sequences"] == result["sequences_in_split"] == 4


def test_numbers_of_sequences(case):
  config, params, _, _ = case
  assert evaluate.evaluate(config, params, step=0, num=1)["standard_error"] is None
  for num in (0, 5, 12):
    with pytest.raises(ValueError, match=rf"num={num}: .* 1 to 4, the sequences of the test split"):
      evaluate.evaluate(config, params, step=0, num=num)
  with pytest.raises(ValueError, match="1 to 10, the sequences"):  # of 24 + 8 bytes, but the first
    evaluate.evaluate(config, params, step=0, num=0, min_context=24)


@pytest.mark.parametrize("min_context", [-1, 32], ids=str)
def test_minimum_context_out_of_range(case, min_context):
  config, params, _, _ = case
  with pytest.raises(ValueError, match=f"min_context={min_context}"):
    evaluate.evaluate(config, params, split="test", min_context=min_context, step=0)


def test_data_of_another_modality(case):
  other = case[0].copy_and_resolve_references()
  other.model.modality = "audio"
  with pytest.raises(ValueError, match=r"config\.model\.modality='audio': must be 'text'"):
    evaluate.open_dataset(other, "test")


@pytest.mark.one_day_in_six(1)
def test_logits_in_pieces_give_the_same_loss_and_gradients(monkeypatch):
  inner = dict(shorten=3, num_layers=1, attention_layers=("dense",))
  model = small_model(inner=inner, attention_layers=("local",))
  graphdef, params = nnx.split(model, nnx.Param)
  tokens = random_tokens()

  def loss(params):
    nats = evaluate.nats_of(nnx.merge(graphdef, params), tokens)
    return nats.sum(), nats

  results = []
  for long in (2**16, 16):
    monkeypatch.setattr(evaluate, "LONG", long)
    monkeypatch.setattr(evaluate, "PIECE", 8)  # 23 rows are no multiple of it
    run = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params))
    results.append(run(params))
    scans = [
      x.params["length"]
      for x in equations(jax.make_jaxpr(run)(params).jaxpr)
      if x.primitive.name == "scan"
    ]
    assert (3 in scans) == (long == 16)
  for actual, wanted in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)
