"""What is drawn at the evaluations of a run, and that the run is the same without."""

import io
import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

from configs import audio
from configs import cifar10
from configs import enwik8
from sparse_flax import data
from sparse_flax import extras
from sparse_flax import SparseTransformer
from sparse_flax import train
from sparse_flax.run import errors
from sparse_flax.sample import pictures
from sparse_flax.train import boards
from tests.helpers import event_files
from tests.helpers import tiny

CONFIGS = {"image": cifar10, "text": enwik8, "audio": audio}
SIZES = dict(seq_len=48, width=8, num_layers=2, num_heads=2, stride=12)
SHAPES = {"image": (4, 4, 3), "text": (4, 12), "audio": (4, 12)}


def evaluation(modality, said, *, num=2):
  """Of a model that has learned nothing."""
  config = CONFIGS[modality].get_config("quick").copy_and_resolve_references().unlock()
  config.model.update(position_shape=SHAPES[modality], **SIZES)
  config.model.update(summary_width=2, sub_blocks=2)
  config.eval.pictures = num
  model = SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  rng = np.random.RandomState(0)
  arrays = rng.randint(97, 123, (3, *SHAPES["image"]) if modality == "image" else (1, 120))
  split = data.of_arrays(arrays.astype(np.uint8), split="validation", modality=modality)
  told = dict(validation=split, say=said.append, on_progress=lambda *steps: None)
  return train.Evaluation(config=config, step=300, params=params, **told)


def pixels_of(item):
  assert item.pixels.dtype == np.uint8 and item.pixels.shape[2] == 3
  return item.pixels


@pytest.mark.one_day_in_three(0)
def test_pictures_of_a_model_of_images():
  said = []
  drawn = pictures.Drawer()(evaluation("image", said))
  assert list(drawn) == ["samples", "completions", "attention/layer0", "attention/layer1"]
  assert pixels_of(drawn["samples"]).shape == (104, 204, 3)  # 2 of 96 x 96 and what is between
  # A caption above; given, drawn and original: the upper half is the same in all three.
  rows = pixels_of(drawn["completions"])[20 + 4 :, 4:].reshape(2, 100, 3, 100, 3)
  given, completed, original = (rows[0, :96, n, :96] for n in range(3))
  np.testing.assert_array_equal(given[:48], original[:48])
  np.testing.assert_array_equal(completed[:48], original[:48])
  assert (given[48:] == 128).all() and (completed[48:] != original[48:]).mean() > 0.9
  assert len(np.unique(pixels_of(drawn["attention/layer1"]).reshape(-1, 3), axis=0)) > 10
  assert said[0] == "compiling what draws samples ..."
  assert said[1].startswith("step 300/1,000  drawn in ")
  assert said[1].endswith(" s: 2 samples, 2 completions, attention")


@pytest.mark.one_day_in_three(1)
def test_texts_end_early(monkeypatch):
  monkeypatch.setattr(pictures, "TEXT_BYTES", 16)
  said = []
  drawn = pictures.Drawer()(evaluation("text", said))
  text = drawn["completions"].text
  first, second = text.split("\n\n--- 2, given\n")
  given, drawn_first = first.removeprefix("--- 1, given\n").split("\n--- 1, drawn\n")
  assert len(given) == 8 and given.isalpha() and second[:8].isalpha()
  assert text.isascii() or "�" in drawn_first + second
  assert len(drawn["samples"].text.split("\n\n--- ")) == 2
  assert said[1].endswith("2 completions, of each the first 16 of 48 bytes, attention")


@pytest.mark.one_day_in_three(1)
def test_sounds_can_be_heard_and_compared():
  one, again = (pictures.Drawer()(evaluation("audio", [])) for _ in range(2))
  assert [name for name in one if "attention" not in name] == [
    "samples/1", "samples/2", "completions/1", "completions/2",
  ]  # fmt: skip
  sounds = [item for item in one.values() if isinstance(item, boards.Sound)]
  assert all(x.samples.shape == (48,) and x.rate == data.SAMPLE_RATE for x in sounds)
  np.testing.assert_array_equal(one["samples/1"].samples, again["samples/1"].samples)


def test_none_are_drawn_where_none_are_wanted_or_can_be(monkeypatch):
  said = []
  assert pictures.Drawer()(evaluation("text", said, num=0)) == {} and said == []
  monkeypatch.setitem(extras.MODULES, "view", ("no_such_package",))
  drawer = pictures.Drawer()
  assert drawer(evaluation("image", said)) == drawer(evaluation("image", said)) == {}
  assert said == [
    "nothing is drawn at evaluations: a picture needs no_such_package: pip install "
    "'sparse-flax[view]', or [all]"
  ]
  drawer = pictures.Drawer()
  for _ in range(2):
    assert list(drawer(evaluation("text", said))) == ["samples", "completions"]
  assert said[1].startswith("no pictures of attention at evaluations: a picture needs no_such")
  assert len(said) == 5 and not any("attention" in line for line in said[2:])
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert pictures.Drawer()(evaluation("text", said)) == {} and "several processes" in said[-1]


def test_what_fails_in_drawing_ends_the_drawing(monkeypatch):
  def fail(*args, **how):
    raise RuntimeError("RESOURCE_EXHAUSTED:\nout of memory")

  monkeypatch.setattr(pictures, "generate", fail)
  said, drawer = [], pictures.Drawer()
  for _ in range(2):
    assert drawer(evaluation("text", said)) == {}
  assert said[1:] == [
    "nothing is drawn at evaluations: RuntimeError: RESOURCE_EXHAUSTED: out of memory"
  ]


@pytest.mark.one_day_in_six(5)
@pytest.mark.promotes
def test_a_run_with_pictures_is_the_same_bit_for_bit(tmp_path):
  """Also on several devices, and where it was stopped and goes on with another number of them."""
  path = tiny.text_file(tmp_path / "text")
  on = dict(data=2, fsdp=2)
  config = lambda num: tiny.config(path, mesh=on, eval=dict(pictures=num))
  how = dict(on_evaluation=pictures.Drawer(), say=lambda line: None)
  train.train(config(0), str(tmp_path / "without"), **how)
  asked = iter([False, False, False, True])
  with pytest.raises(errors.Preempted):
    train.train(config(2), str(tmp_path / "with"), stop=lambda: next(asked), **how)
  found = event_files.values(tmp_path / "with" / "tensorboard")
  # At 4 it was stopped.
  assert {step for name, step in found if name == "completions/text_summary"} == {2}
  picture = PIL.Image.open(io.BytesIO(found["attention/layer0", 2].image.encoded_image_string))
  assert picture.size[0] > 500
  train.train(config(0), str(tmp_path / "with"), **how)
  state = lambda name: tiny.leaf_bytes(tiny.restore(config(0), tmp_path / name))
  assert state("with") == state("without")
  assert _results(tmp_path / "with") == _results(tmp_path / "without")


def _results(workdir):
  """Records without times."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  is_time = lambda name: "second" in name or name == "time"
  return [{n: x for n, x in json.loads(line).items() if not is_time(n)} for line in lines]
