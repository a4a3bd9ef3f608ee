"""What sampling starts from, exactly or refused, and what its files are called."""

import os
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import PIL.Image
import pytest
from etils import epath
from flax import nnx

from configs import audio
from configs import cifar10
from experiments import sample as launcher
from sparse_flax import data
from sparse_flax import sample
from sparse_flax import SparseTransformer
from sparse_flax.run import checkpoint
from sparse_flax.run import workdir
from sparse_flax.sample import files
from sparse_flax.view.report import samples
from tests.helpers import tiny
from tests.helpers.models import initial_model
from tests.helpers.models import small_model


@pytest.fixture(scope="module")
def weights():
  graphdef, params = nnx.split(small_model(), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def generate(weights, **options):
  return sample.generate(*weights, key=jax.random.key(0), temperature=0, **options)


def test_bytes_and_integers_of_any_kind_are_the_same_prompt(weights, as_a_user):
  text = b"\x00The\xff"
  kinds = [
    text,
    bytearray(text),
    list(text),
    np.array(list(text), np.int64),
    jnp.array(list(text), jnp.int32),
    np.array(list(text), np.uint8),
    b"",
    [],
    np.zeros(0, np.float32),
  ]
  rows = generate(weights, num=len(kinds), prompts=kinds)
  for row in rows[:6]:
    np.testing.assert_array_equal(row, rows[0])
  assert rows[0, :5].tobytes() == text
  for row in rows[7:]:
    np.testing.assert_array_equal(row, rows[6])


WRONG_PROMPTS = {
  "text": ("The ", "'The ' is text"),
  "256": (np.array([0, 256]), "with the value 256"),
  "-1": (np.array([-1], np.int8), "with the value -1"),
  "2**40": ([2**40], "with the value 1099511627776"),
  "2**70": ([2**70], "of dtype object"),
  "float": (np.array([7.0]), "of dtype float64"),
  "bool": (np.array([True]), "of dtype bool"),
  "rows": (np.zeros((1, 3), np.uint8), r"has shape (1, 3)"),
  "None": (None, "has shape ()"),
}


@pytest.mark.parametrize("case", WRONG_PROMPTS)
def test_prompts_that_are_no_bytes_are_refused(weights, as_a_user, case):
  prompt, message = WRONG_PROMPTS[case]
  with pytest.raises(ValueError) as error:
    generate(weights, num=2, prompts=[b"The ", prompt])
  assert str(error.value).startswith("prompts[1]") and message in str(error.value)


@pytest.mark.parametrize("prompts", [b"The ", "The "], ids=["bytes", "text"])
def test_one_prompt_is_not_a_list_of_prompts(weights, as_a_user, prompts):
  with pytest.raises(ValueError, match=r"prompts\[0\]"):
    generate(weights, num=4, prompts=prompts)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num=1.5), "num=1.5: must be a whole number"),
    (dict(num=1, top_k=2.5), "top_k=2.5: must be a whole number from 1 to 256"),
    (dict(num=1, top_k=257), "top_k=257"),
    (dict(num=1, top_p=float("nan")), "top_p=nan"),
    (dict(num=1, temperature=float("nan")), "temperature=nan"),
    (dict(num=1, temperature=1e-40), "temperature=1e-40: must be 0, or a number >= 1e-06"),
  ],
  ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_options_beside_the_range_are_refused(weights, as_a_user, options, message):
  with pytest.raises(ValueError, match=message):
    sample.generate(*weights, key=jax.random.key(0), **options)


def test_a_cold_draw_is_the_likeliest_byte(weights):
  cold = sample.generate(*weights, key=jax.random.key(0), num=2, temperature=1e-6)
  np.testing.assert_array_equal(cold, generate(weights, num=2))


# ---------------------------------------------------------------------------------------- tokens
WRONG_TOKENS = {
  "300": np.full((1, 4), 300),
  "-1": np.full((1, 4), -1),
  "2**40": np.full((1, 4), 2**40),
  "float": np.full((1, 4), 7.0, np.float32),
  "bool": np.ones((1, 4), bool),
}


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_tokens_that_are_no_bytes_are_refused(as_a_user, case):
  model, tokens = initial_model(), WRONG_TOKENS[case]
  calls = {
    "tokens": (model, model.prefill, lambda x: model.attention_weights(x, np.array([1]))),
    "token": (lambda x: model.decode_step(x[:, 0], 1, model.init_cache(1)),),
  }
  for name, functions in calls.items():
    for call in functions:
      with pytest.raises(ValueError, match=rf"^{name} (of dtype|with the value) .* in \[0, 255\]"):
        call(tokens)


def test_known_tokens_are_checked_under_jit_too(as_a_user):
  model = initial_model()
  shape = lambda tokens: jax.eval_shape(lambda: model.embedding(tokens)).shape
  assert shape(jnp.array([[0, 255]], jnp.int32)) == (1, 2, 12)
  with pytest.raises(ValueError, match="tokens with the value 256"):
    shape(jnp.array([[0, 256]], jnp.int32))


def test_traced_tokens_that_are_no_bytes_give_nan():
  graphdef, params = nnx.split(initial_model())
  embed = jax.jit(lambda tokens: nnx.merge(graphdef, params).embedding(tokens))
  tokens = jnp.array([[0, -1, 255, 256, 7]], jnp.int32)
  shown = np.isnan(np.asarray(embed(tokens))).all(axis=-1)
  assert shown.tolist() == [[False, False, True, False, True]]  # each a slot later
  whole = jnp.array([[0, 255, 128, 7]], jnp.int32)
  np.testing.assert_array_equal(embed(whole), embed(whole.astype(jnp.uint8)))


# --------------------------------------------------------------------------------------- launcher
def make_run(folder, config):
  """A run's folder with weights as they are at first."""
  model = SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  workdir.start(folder, config, data={})
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save({"step": jnp.asarray(3), "params": params, "ema": params})
  return epath.Path(folder)


@pytest.fixture
def text_run(tmp_path, monkeypatch):
  """A run whose samples are noise: nothing has to be compiled."""
  noise = np.random.default_rng(0)
  draw = lambda *weights, num, **options: noise.integers(0, 256, (num, 32)).astype(np.uint8)
  monkeypatch.setattr(launcher.sample, "generate", draw)
  return make_run(tmp_path / "run", tiny.config(tiny.text_file(tmp_path / "data.txt")))


def test_partial_windows_of_recordings_hide_no_whole_ones():
  rng = np.random.default_rng(0)
  lengths = (20, 100, 31, 32, 70)  # of 32: none and an end, 3 and an end, an end, 1, 2 and an end
  codes = [rng.integers(0, 256, length).astype(np.uint8) for length in lengths]
  streams = data.dataset.Arrays(codes)
  test_split = data.Dataset("audio", "test", "audio", None, streams, "1.0.0", "")
  config = audio.get_config("quick").copy_and_resolve_references().unlock()
  config.model.update(seq_len=32, position_shape=(4, 8), stride=8)
  source = types.SimpleNamespace(config=config, open_dataset=lambda split: test_split)
  whole = [x[n : n + 32] for x in codes for n in range(0, len(x) - 31, 32)]
  assert len(whole) == 6
  for count in (1, 3, 6):
    np.testing.assert_array_equal(launcher._held_out(source, count), whole[:count])
  with pytest.raises(ValueError, match="--num=28: at most 24; the test split of audio has 6"):
    launcher._held_out(source, 7)


@pytest.mark.one_day_in_six(5)
def test_no_run_of_sample_replaces_the_files_of_another(text_run):
  runs = [
    dict(num=1),
    dict(num=2),
    dict(num=1, temperature=0.5),
    dict(num=1, temperature=1e-5, top_k=40, top_p=0.9),
    dict(num=1, temperature=0.5),
    dict(num=1, seed=10),
    dict(num=1, keep=0.25),
    dict(num=1, keep=0.5),
  ]
  paths = [launcher.run(text_run, **options) for options in runs]
  stems = [
    "samples-seed0",
    "samples-seed0_run2",
    "samples-seed0_temperature0.5",
    "samples-seed0_temperature1e-05_top_k40_top_p0.9",
    "samples-seed0_temperature0.5_run2",
    "samples-seed10",
    "completions-seed0",
    "completions-seed0_run2",
  ]
  for stem, written in zip(stems, paths, strict=True):
    assert all(path.name.startswith(f"{stem}-00") for path in written[:1])
  everything = [path for written in paths for path in written]
  assert len(set(everything)) == len(everything) == 1 + 2 + 4 + 2 * 3
  shown, left_out = samples.to_html(
    [samples.Sample(path.name, path.read_bytes()) for path in everything]
  )
  assert not left_out and shown.count("<figure>") == len(everything)
  for heading in ("seed 0<", "seed 0, run 2<", "seed 0, temperature 1e-05, top_k 40, top_p 0.9<"):
    assert f"<h3>Samples, {heading}" in shown
  assert "<h3>Completions beside the originals, seed 0, run 2<" in shown


@pytest.mark.parametrize("options", [{}, {"keep": 0.25}], ids=["samples", "completions"])
@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_runs_of_sample_that_end_together_replace_nothing(modality, options, tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  shape = (4, 8, 1) if modality == "image" else (4, 8)
  model = dict(modality=modality, seq_len=32, position_shape=shape)
  config = ml_collections.ConfigDict(dict(model=model, train=dict(ema_decay=0.9)))
  restore = lambda *args, **how: (config, None, None, 3)
  monkeypatch.setattr(checkpoint, "restore_params", restore)
  examples = lambda *args, **how: rng.integers(0, 256, (1, 32)).astype(np.uint8)
  monkeypatch.setattr(launcher, "_held_out", examples)
  draw = lambda *weights, num, **options: rng.integers(0, 256, (num, 32)).astype(np.uint8)
  monkeypatch.setattr(launcher.sample, "generate", draw)
  free_stem, others = samples.free_stem, {}

  def free_until_another_run_ends(*args, **named):
    monkeypatch.setattr(samples, "free_stem", free_stem)
    stem = free_stem(*args, **named)
    others.update((path, path.read_bytes()) for path in launcher.run(tmp_path, num=1, **options))
    return stem

  monkeypatch.setattr(samples, "free_stem", free_until_another_run_ends)
  mine = launcher.run(tmp_path, num=1, **options)
  assert {path: path.read_bytes() for path in others} == others
  there = sorted([*mine, *others])
  assert sorted(others.popitem()[0].parent.iterdir()) == there


@pytest.mark.one_day_in_three(0)
def test_a_report_that_is_older_than_the_samples_says_so(text_run, capsys):
  (path,) = launcher.run(text_run, num=1)
  page = path.with_name("report.html")
  page.write_text("<body><main>a &lt;main&gt;</main></body>")
  opened = path.with_name("opened.html")
  os.link(page, opened)  # as a browser has it: only a new file does not change it
  command = f"python -m experiments.visualize --workdir={text_run} --step=3"
  for _ in range(2):  # said once
    assert launcher.main([f"--workdir={text_run}", "--num=1"]) == 0
    assert capsys.readouterr().err == f"{page} is older than these; to make it again: {command}\n"
    older = page.read_text()
    assert older.count("is older than some of the samples") == older.count(command) == 1
    assert older.startswith('<body><main><p class="none">This page')
    assert older.endswith("</p>a &lt;main&gt;</main></body>")
  assert opened.read_text() == "<body><main>a &lt;main&gt;</main></body>"


def test_pictures_that_cannot_be_prompts_are_named(tmp_path):
  config = cifar10.get_config("quick")
  path = tmp_path / "prompt.png"
  PIL.Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)
  with pytest.raises(ValueError, match=r"--prompt=.*prompt\.png: has pixels of mode I;16"):
    files.read_prompt(path, config.model)
  PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
  path.write_bytes(path.read_bytes()[:1_000])
  with pytest.raises(ValueError, match=r"--prompt=.*prompt\.png: is not a picture"):
    files.read_prompt(path, config.model)
