"""What TensorBoard and Weights & Biases get, the latter played by a module of our own."""

import io
import json
import sys

import numpy as np
import PIL.Image
import pytest
import soundfile

from configs import enwik8
from sparse_flax.run import errors
from sparse_flax.train import boards
from sparse_flax.train import metrics
from tests.helpers import event_files

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
SAMPLES = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
SHOWN = {
  "picture": boards.Image(PIXELS),
  "text": boards.Text("one <b>\n# two"),
  "sound/1": boards.Sound(SAMPLES, 12_000),
}

# It notes what it gets, and fails where the file of that name lies beside it.
FAKE = """
import pathlib
calls = []
def Image(pixels): return "image", pixels.shape
def Html(text): return "html", text
def Audio(samples, sample_rate): return "audio", len(samples), sample_rate
def fail(where):
  if pathlib.Path(__file__).with_name(where).exists():
    raise RuntimeError("no\\nlogin")
class Run:
  def define_metric(self, name, step_metric): calls.append(("define", name, step_metric))
  def log(self, values):
    fail("log")
    calls.append(("log", values))
  def finish(self, exit_code): calls.append(("finish", exit_code))
def init(**how):
  fail("init")
  calls.append(("init", how))
  return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  (tmp_path / "packages").mkdir()
  (tmp_path / "packages" / "wandb.py").write_text(FAKE)
  monkeypatch.syspath_prepend(tmp_path / "packages")
  monkeypatch.delitem(sys.modules, "wandb", raising=False)
  yield tmp_path / "packages"
  sys.modules.pop("wandb", None)


def open_run(workdir, said):
  return boards.WandB("mine", workdir, config=enwik8.get_config("quick"), say=said.append)


def test_tensorboard_shows_pictures_texts_and_sounds(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "soundfile", None)  # as on a machine without libsndfile
  with metrics.Writer(tmp_path, step=0) as writer:
    writer.show(7, SHOWN)
  found = event_files.values(tmp_path / "tensorboard")
  pixels = PIL.Image.open(io.BytesIO(found["picture", 7].image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(pixels), PIXELS)
  (text,) = found["text/text_summary", 7].tensor.string_val
  assert text == b"    one <b>\n    # two"  # a block, which Markdown leaves as it is
  sound, rate = soundfile.read(io.BytesIO(found["sound/1", 7].audio.encoded_audio_string))
  assert rate == 12_000
  np.testing.assert_allclose(sound, SAMPLES, atol=2e-4)
  assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_wandb_gets_the_same_and_goes_on_with_its_run(tmp_path, wandb):
  workdir, said = tmp_path / "enwik8-quick", []
  workdir.mkdir()
  for step in (0, 4):
    with metrics.Writer(workdir, step=step, wandb=open_run(workdir, said)) as writer:
      writer.write(step + 1, loss=2.0)
      writer.show(step + 1, SHOWN)
  module = sys.modules["wandb"]
  (_, how), define, scalars, shown, finish, (_, again), *_ = module.calls
  assert how == again and how["id"] == json.loads((workdir / "wandb.json").read_text())["id"]
  assert (how["project"], how["name"], how["resume"]) == ("mine", "enwik8-quick", "allow")
  assert how["config"]["model"]["width"] == 128 and how["dir"] == str(workdir)
  assert define == ("define", "*", "step") and finish == ("finish", 0)
  assert scalars == ("log", {"step": 1, "loss": 2.0})
  assert shown[1] == {
    "step": 1,
    "picture": ("image", (2, 3, 3)),
    "text": ("html", "<pre>one &lt;b&gt;\n# two</pre>"),
    "sound/1": ("audio", 100, 12_000),
  }
  with pytest.raises(KeyError), metrics.Writer(workdir, step=0, wandb=open_run(workdir, said)):
    raise KeyError
  assert module.calls[-1] == ("finish", 1) and said == []


def test_wandb_that_does_not_take_the_run_is_told_in_one_line(tmp_path, wandb):
  (wandb / "init").touch()
  with pytest.raises(errors.StorageError, match=r"^wandb='mine': RuntimeError: no login$"):
    open_run(tmp_path, [])
  assert not (tmp_path / "wandb.json").exists()


def test_a_run_goes_on_without_wandb(tmp_path, wandb):
  said = []
  with metrics.Writer(tmp_path, step=0, wandb=open_run(tmp_path, said)) as writer:
    (wandb / "log").touch()
    for step in (1, 2):
      writer.write(step, loss=1.0)
  assert said == ["no more is sent to Weights & Biases: RuntimeError: no login"]
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
