"""Sampling: what a row depends on, what comes back, and the files of the launcher."""

import itertools
import sys
import types
import wave

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from configs import audio
from configs import cifar10
from experiments import sample as launcher
from sparse_flax import sample
from sparse_flax import SparseTransformer
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import workdir
from sparse_flax.sample import files
from sparse_flax.view import grids
from tests.helpers import tiny
from tests.helpers.models import SMALL
from tests.helpers.models import small_model

LENGTH = SMALL["seq_len"]


@pytest.fixture(scope="module")
def weights():
  """graphdef and plain weights of a model whose logits are worth sampling from."""
  graphdef, params = nnx.split(small_model(), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def generate(weights, *, num, seed=0, **options):
  return sample.generate(*weights, key=jax.random.key(seed), num=num, **options)


def test_a_row_is_the_same_alone_and_among_others(weights):
  many = generate(weights, num=6)
  assert many.shape == (6, LENGTH) and many.dtype == np.uint8
  np.testing.assert_array_equal(generate(weights, num=1), many[:1])
  assert len(np.unique(many, axis=0)) == 6
  assert (generate(weights, num=6, seed=1) != many).any(axis=1).all()


def test_prompts_come_back_unchanged_and_are_read(weights):
  prompts = np.random.default_rng(0).integers(0, 256, (3, 9)).astype(np.uint8)
  got = generate(weights, num=3, prompts=prompts, temperature=0)
  np.testing.assert_array_equal(got[:, :9], prompts)
  assert len({tuple(row) for row in got[:, 9:]}) == 3
  alone = generate(weights, num=1, prompts=prompts[:1], temperature=0)
  np.testing.assert_array_equal(alone, got[:1])


def test_prompts_of_different_lengths_do_not_see_each_other(weights):
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 256, length).astype(np.uint8) for length in (9, 3, 17)]
  got = generate(weights, num=3, prompts=prompts)
  for row, prompt in zip(got, prompts, strict=True):
    np.testing.assert_array_equal(row[: len(prompt)], prompt)
  # What is known of all is read at once; alone, a longer prompt is: the samples are the same.
  np.testing.assert_array_equal(generate(weights, num=1, prompts=prompts[:1]), got[:1])
  started = [got[0, :9], got[1, :3], got[2, :3]]
  np.testing.assert_array_equal(generate(weights, num=3, prompts=started)[:2], got[:2])


def test_shorter_samples_are_the_beginnings_of_whole_ones(weights):
  prompts = [b"", b"abc"]
  whole = generate(weights, num=2, prompts=prompts)
  np.testing.assert_array_equal(generate(weights, num=2, prompts=prompts, length=7), whole[:, :7])


def test_who_samples_again_does_not_compile_again(weights, monkeypatch):
  how = dict(num=2, length=5, temperature=0.75)
  first = generate(weights, **how)
  monkeypatch.delattr(SparseTransformer, "decode_step")  # which only tracing needs
  np.testing.assert_array_equal(generate(weights, **how), first)


@pytest.mark.smoke("6", daily=0)
@pytest.mark.parametrize("num", [1, 6, 8])
def test_devices_share_the_rows_and_change_none(weights, num):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1, sequence=1)
  prompts = np.random.default_rng(1).integers(0, 256, (num, 5)).astype(np.uint8)
  expected = generate(weights, num=num, prompts=prompts)
  np.testing.assert_array_equal(generate(weights, num=num, prompts=prompts, mesh=mesh), expected)


def test_a_module_is_taken_as_well_as_a_graph_with_weights(weights):
  model = nnx.merge(*weights)
  how = dict(key=jax.random.key(3), num=2)
  np.testing.assert_array_equal(sample.generate(model, **how), sample.generate(*weights, **how))
  with pytest.raises(ValueError, match="params: must be None where model is a module"):
    sample.generate(model, weights[1], **how)
  with pytest.raises(ValueError, match="params=None: must be the weights"):
    sample.generate(weights[0], **how)


def test_dense_caches_draw_the_same(weights):
  np.testing.assert_array_equal(
    generate(weights, num=2, sparse=False), generate(weights, num=2, sparse=True)
  )


def test_top_k_and_top_p_keep_the_likeliest():
  logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.49, 0.01]]))
  kept = lambda **options: np.isfinite(sample.likely(logits, **options)).tolist()
  assert kept(top_k=2) == [[False, True, False, True], [True, True, True, False]]  # ties stay
  assert kept(top_p=0.4)[0] == [False, True, False, False]
  assert kept(top_p=0.71)[0] == [False, True, True, True]
  assert kept(top_p=0.7 - 1e-3) == [[False, True, False, True], [True, True, True, False]]
  assert kept(top_k=3, top_p=0.5)[0] == [False, True, False, True]
  assert kept() == [[True] * 4] * 2


def test_top_k_of_one_is_temperature_zero(weights):
  greedy = generate(weights, num=2, temperature=0)
  np.testing.assert_array_equal(generate(weights, num=2, top_k=1), greedy)
  np.testing.assert_array_equal(generate(weights, num=2, top_p=1e-6), greedy)


def test_temperature_zero_takes_the_likeliest_byte_of_the_whole_model(weights):
  got = generate(weights, num=1, temperature=0)
  logits = nnx.merge(*weights)(jnp.asarray(got))
  np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize("change", [dict(rope="tokens"), dict(rope="axes", activation="relu2")])
def test_placed_keys_are_kept_placed(change):
  """With rope and norms: a prompt, then steps by the caches, beside the whole model."""
  model = small_model(qk_norm=True, **change)
  prompt = np.arange(9, dtype=np.uint8)
  got = sample.generate(model, key=jax.random.key(0), num=1, prompts=[prompt], temperature=0)
  np.testing.assert_array_equal(got[0, 9:], np.argmax(model(jnp.asarray(got)), axis=-1)[0, 9:])


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (dict(rope="tokens", qk_norm=True), "rope and qk_norm between"),
    (dict(activation="relu2"), "activation='relu2', which"),
  ],
)
def test_kernels_of_a_step_refuse_what_they_do_not_have(monkeypatch, change, reason):
  model = small_model(**change)
  module = sys.modules["sparse_flax.sample.generate"]  # the package has the function by this name
  monkeypatch.setattr(module, "step_kernels", lambda name: types.SimpleNamespace())
  with pytest.raises(NotImplementedError, match=f"triton: {reason}"):
    sample.generate(model, key=jax.random.key(0), num=1, implementation="triton")


def test_progress_is_told_in_steps_and_changes_nothing(weights):
  told = []
  got = generate(weights, num=2, on_progress=lambda *steps: told.append(steps))
  np.testing.assert_array_equal(got, generate(weights, num=2))
  assert told[-1] == (LENGTH, LENGTH) and len(told) > 5
  assert all(a < b for (a, _), (b, _) in itertools.pairwise(told))


def test_every_step_of_every_row_draws_anew(weights):
  graphdef, params = weights
  flat = {**params, "logits": {"kernel": jnp.zeros_like(params["logits"]["kernel"])}}
  got = generate((graphdef, flat), num=8).astype(int)  # all bytes alike: only the keys matter
  assert (got[:, 1:] != got[:, :-1]).mean() > 0.9
  assert (got[1:] != got[:-1]).mean() > 0.9


@pytest.mark.one_day_in_six(2)
@pytest.mark.smoke("0.5", daily=0)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_softmax(weights, temperature):
  graphdef, params = weights
  # A few bytes are likely; the first byte of every row depends on the start vector alone.
  weights = graphdef, {**params, "logits": {"kernel": 3.0 * params["logits"]["kernel"]}}
  logits = nnx.merge(*weights)(jnp.zeros((1, 1), jnp.int32))[0, 0]
  expected = np.asarray(jax.nn.softmax(logits / temperature))
  got = generate(weights, num=4_000, temperature=temperature)[:, 0]
  counts = np.bincount(got, minlength=256) / 4_000
  error = np.sqrt(expected * (1 - expected) / 4_000)
  assert (np.abs(counts - expected) < 5 * error + 1e-3).all()
  assert np.abs(counts - np.asarray(jax.nn.softmax(logits / (1.5 - temperature)))).max() > 0.01


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num=0), "num=0"),
    (dict(num=1, temperature=-1.0), "temperature=-1.0"),
    (dict(num=1, top_k=0), "top_k=0"),
    (dict(num=1, top_p=0.0), "top_p=0.0"),
    (dict(num=2, prompts=np.zeros((1, 3), np.uint8)), "num=2 of them"),
    (dict(num=1, prompts=np.zeros((1, LENGTH), np.uint8)), f"samples' {LENGTH}"),
    (dict(num=1, length=LENGTH + 1), f"length={LENGTH + 1}: must be None or a whole number"),
  ],
  ids=["num", "temperature", "top_k", "top_p", "rows", "prompt", "length"],
)
def test_options_without_sense_are_refused(weights, options, message):
  with pytest.raises(ValueError, match=message):
    generate(weights, **options)


# ------------------------------------------------------------------------------------- pictures


def test_a_grid_shows_each_image_where_it_belongs():
  red, green = np.zeros((2, 48, 48, 3), np.uint8)
  red[..., 0], green[..., 1] = 255, 255
  grid = np.asarray(grids.draw_grid([[red, green], [None, red]], captions=["one", "two"]))
  places = np.ogrid[: grid.shape[0], : grid.shape[1]]
  upper, left = places[0] < 20 + 100, places[1] < 102
  is_red, is_green = (grid == (255, 0, 0)).all(-1), (grid == (0, 255, 0)).all(-1)
  assert is_red[upper & left].sum() == is_red[~upper & ~left].sum() == 96 * 96  # enlarged twice
  assert is_red.sum() == 2 * 96 * 96
  assert is_green[upper & ~left].sum() == is_green.sum() == 96 * 96
  assert (grid[-10, 10] > 200).all()  # nothing was put here
  assert (grid[:20] < 128).any()  # the captions


def test_unknown_bytes_are_grey():
  image = np.full((2, 2, 3), 7, np.uint8)
  flat = grids.with_unknown(image, known=5).reshape(-1)
  assert (flat[:5] == 7).all() and (flat[5:] == grids.GREY).all()
  assert (image == 7).all()


# ------------------------------------------------------------------------------------- launcher


def make_run(folder, config, *, step=3):
  """A run's folder with weights as they are at first."""
  model = SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  workdir.start(folder, config, data={})
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save({"step": jnp.asarray(step), "params": params, "ema": params})
  return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  return make_run(folder / "run", tiny.config(tiny.text_file(folder / "data.txt")))


def test_what_is_printed_of_a_text_is_no_command_to_a_terminal():
  assert launcher.beginning(b"some \x1b[31m words\xff\nand more\n") == (
    "some \N{REPLACEMENT CHARACTER}[31m words\N{REPLACEMENT CHARACTER}\nand more"
  )
  assert len(launcher.beginning(b"a" * 2_000)) == launcher.SHOWN_BYTES


@pytest.mark.one_day_in_three(2)
def test_texts_are_written_byte_by_byte(text_run, capsys):
  assert launcher.main([f"--workdir={text_run}", "--num=3", "--seed=5"]) == 0
  said = capsys.readouterr()
  printed = said.out.splitlines()
  assert printed[0].startswith("sampled 3 x 32 bytes in ")
  assert said.err == "attention of the steps by xla\n"
  texts = sorted((text_run / "samples" / "3").glob("samples-seed5-*.txt"))
  assert printed[-3:] == [str(path) for path in texts] and len(texts) == 3
  shown = [f"--- {path.name}\n{launcher.beginning(path.read_bytes())}\n" for path in texts]
  assert "".join(shown) in said.out
  assert [path.stat().st_size for path in texts] == [32] * 3


def test_held_out_text_is_completed_beside_the_original(text_run):
  paths = {path.stem: path.read_bytes() for path in launcher.run(text_run, num=6, keep=0.25)}
  held_out = (text_run.parent / "data.txt").read_bytes()[1_900:]
  for n in (0, 1):  # four completions of the first, two of the second
    example = held_out[32 * n : 32 * n + 32]
    assert paths[f"completions-seed0-{n:02}-original"] == example
    assert paths[f"completions-seed0-{n:02}-given"] == example[:8]
    drawn = [text for name, text in paths.items() if f"{n:02}-drawn" in name]
    assert len(drawn) == (4, 2)[n] and all(text[:8] == example[:8] for text in drawn)
    assert all(text[8:] != example[8:] for text in drawn)


@pytest.mark.one_day_in_six(1)
def test_files_of_different_lengths_are_completed_in_turn(text_run, tmp_path):
  texts = [b"Once upon", b"Two"]
  for n, text in enumerate(texts):
    (tmp_path / f"{n}.txt").write_bytes(text)
  files = [tmp_path / "0.txt", tmp_path / "1.txt"]
  written = launcher.run(text_run, num=9, prompt=files, seed=1)
  paths = {path.stem: path.read_bytes() for path in written}
  for n in range(3):  # four of the first, four of the second, one of the first
    assert paths[f"completions-seed1-{n:02}-given"] == texts[n % 2]
    drawn = [text for name, text in paths.items() if f"{n:02}-drawn" in name]
    assert len(drawn) == (4, 4, 1)[n] and all(text.startswith(texts[n % 2]) for text in drawn)
  with pytest.raises(ValueError, match="--num=4: must be at least 5, so that each of 2 prompts"):
    launcher.run(text_run, num=4, prompt=files)


@pytest.mark.one_day_in_six(0)
def test_a_file_is_completed(text_run, tmp_path):
  (tmp_path / "prompt.txt").write_bytes(b"Once upon")
  paths = launcher.run(text_run, num=2, prompt=[tmp_path / "prompt.txt"])
  drawn = [path.read_bytes() for path in paths if "drawn" in path.stem]
  assert len(drawn) == 2 and all(text.startswith(b"Once upon") for text in drawn)
  (tmp_path / "long.txt").write_bytes(bytes(100))
  with pytest.raises(ValueError, match="32 bytes are to be kept; a sample has 32"):
    launcher.run(text_run, num=2, prompt=[tmp_path / "long.txt"])


@pytest.mark.smoke(daily=4)
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--num=0"], "--num=0: must be a whole number >= 1"),
    (["--temperature=-1"], "--temperature=-1.0"),
    (["--top_k=0"], "--top_k=0: must be a whole number from 1 to 256"),
    (["--top_p=1.5"], "--top_p=1.5: must be in (0, 1]"),
    (["--keep=1.5"], "--keep=1.5: must be between 0 and 1"),
    (["--seed=-1"], "--seed=-1"),
    (["--step=7"], "step=7: no checkpoint"),
    (["--prompt=nowhere.txt"], "nowhere.txt: No such file"),
    (["--num=400", "--keep=0.5"], "at most 12"),
    (["--temprature=1"], "--temprature"),
  ],
  ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line_and_write_nothing(text_run, flags, message, capsys):
  before = sorted(text_run.rglob("*"))
  with pytest.raises(SystemExit) as error:
    launcher.main([f"--workdir={text_run}", *flags])
  assert error.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]
  assert sorted(text_run.rglob("*")) == before


def small(config, **model):
  config = config.copy_and_resolve_references()
  config.unlock()
  config.model.update(width=8, num_layers=1, num_heads=1, attention_layers=("column",), **model)
  return config.lock()


@pytest.mark.one_day_in_six(0)
def test_pictures_become_a_grid_of_prompt_completions_and_original(tmp_path):
  run = make_run(tmp_path / "run", small(cifar10.get_config("quick")))
  (path,) = launcher.run(run, num=2, keep=0.5)
  grid = np.asarray(PIL.Image.open(path))
  cell = lambda n: grid[-100:-4, 4 + 100 * n : 100 + 100 * n][::3, ::3]
  given, drawn, other, original = (cell(n) for n in range(4))
  assert (given[16:] == grids.GREY).all()
  for image in (given, drawn, other):
    np.testing.assert_array_equal(image[:16], original[:16])
  for image in (drawn, other):
    assert (image[16:] != original[16:]).mean() > 0.9
  assert (drawn[16:] != other[16:]).mean() > 0.9

  PIL.Image.fromarray(original).save(tmp_path / "prompt.png")
  read = files.read_prompt(tmp_path / "prompt.png", small(cifar10.get_config("quick")).model)
  np.testing.assert_array_equal(read, original.reshape(-1))
  PIL.Image.fromarray(original[:20]).save(tmp_path / "prompt.png")
  with pytest.raises(ValueError, match="is 32 x 20 pixels; the model draws 32 x 32"):
    launcher.run(run, prompt=[tmp_path / "prompt.png"])
  (tmp_path / "prompt.png").write_bytes(b"no picture")
  with pytest.raises(ValueError, match="is not a picture"):
    launcher.run(run, prompt=[tmp_path / "prompt.png"])


@pytest.mark.one_day_in_three(1)
def test_sounds_become_wav_files(tmp_path):
  config = small(audio.get_config("quick"), seq_len=64, position_shape=(8, 8), stride=8)
  paths = launcher.run(make_run(tmp_path / "run", config), num=2, keep=0.5)
  assert [path.name for path in paths] == [
    *(f"completions-seed0-00-{name}.wav" for name in ("drawn1", "drawn2", "given", "original")),
    "completions-seed0-all.wav",
  ]
  for path, length in zip(paths, (64, 64, 32, 64, 64 + 6_000 + 64), strict=True):
    with wave.open(str(path)) as wav:
      assert (wav.getframerate(), wav.getnframes()) == (12_000, length)
  first, second, given, _, joined = (path.read_bytes()[44:] for path in paths)
  assert joined == first + bytes(2 * 6_000) + second  # half a second of silence
  assert first[:64] == second[:64] == given and first[64:] != second[64:]
  again = launcher.run(tmp_path / "run", num=1, prompt=[paths[2]])
  np.testing.assert_array_equal(
    files.read_prompt(again[0], config.model)[:32], files.read_prompt(paths[2], config.model)
  )
