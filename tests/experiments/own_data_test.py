"""Folders of one's own from end to end: each trained, sampled and reported by one command."""

import json
import pathlib

import numpy as np
import PIL.Image
import pytest
import soundfile

from experiments import sample
from experiments import train
from experiments import visualize


def write_photographs(folder: pathlib.Path) -> None:
  """300 of mixed sizes and formats in folders by month, some grey, some with transparent parts."""
  random = np.random.default_rng(0)
  kinds = (
    ("RGB", "JPEG", "jpg"), ("RGB", "PNG", "png"), ("RGB", "WEBP", "webp"), ("L", "JPEG", "JPEG"),
    ("L", "PNG", "PNG"), ("RGBA", "PNG", "png"), ("RGBA", "WEBP", "webp"),
  )  # fmt: skip
  for n in range(300):
    mode, kind, suffix = kinds[n % len(kinds)]
    colours = PIL.Image.fromarray(random.integers(0, 256, (5, 7, 3)).astype(np.uint8))
    size = tuple(map(int, random.integers(20, 200, 2)))
    image = colours.resize(size, PIL.Image.Resampling.BILINEAR)
    if mode == "RGBA":
      image.putalpha(PIL.Image.linear_gradient("L").resize(size))
    month = folder / f"2026-{n % 12 + 1:02}"
    month.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(month / f"IMG {n:04}.{suffix}", kind)


def write_texts(folder: pathlib.Path) -> None:
  (folder / "notes").mkdir(parents=True)
  random = np.random.default_rng(0)
  words = [
    "sparse",
    "attention",
    "reads",
    "long",
    "sequences,",
    "byte",
    "by",
    "byte;",
    "café",
    "日本",
  ]
  draw = lambda num: " ".join(random.choice(words, num))
  for n in range(5):
    (folder / f"chapter {n}.txt").write_text(draw(200))
    (folder / "notes" / f"{n}.md").write_text(f"# {n}\r\n\r\n{draw(150)}\r\n")
  lines = [json.dumps(dict(id=n, text=draw(20))) for n in range(10)]
  (folder / "posts.jsonl").write_text("\n".join(lines))


def write_recordings(folder: pathlib.Path) -> None:
  """MP3 in stereo, and WAV of floats, one of them louder than full scale."""
  folder.mkdir()
  for n in range(6):
    seconds = np.arange(44_100) / 44_100
    sound = (0.3 + 0.2 * n) * np.sin(2 * np.pi * 110 * (n + 2) * seconds).astype(np.float32)
    if n % 2:
      soundfile.write(folder / f"song {n}.wav", sound, 44_100, subtype="FLOAT")
    else:
      stereo = np.stack([sound, 0.5 * sound], axis=1)
      soundfile.write(folder / f"song {n}.mp3", stereo, 44_100, format="MP3")


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke()
@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
  ("recipe", "write", "model"),
  [
    ("cifar10", write_photographs, dict(seq_len=768, position_shape=(16, 16, 3), stride=48)),
    ("enwik8", write_texts, dict(sub_blocks=2)),
    (
      "audio",
      write_recordings,
      dict(seq_len=64, position_shape=(8, 8), stride=8, attention_layers=("local",)),
    ),
  ],
  ids=["photographs", "texts", "recordings"],
)
def test_a_folder_is_trained_sampled_and_reported(recipe, write, model, tmp_path, capsys):
  write(tmp_path / "mine")
  model = dict(width=8, num_heads=2, num_layers=1, implementation="reference") | model
  tiny = [f"--config.model.{name}={value}" for name, value in model.items()]
  workdir = f"--workdir={tmp_path / 'run'}"
  path = f"--config.data.path={tmp_path / 'mine'}"
  steps = ["--config.train.steps=3", "--config.train.log_every=1", "--config.eval.pictures=0"]
  assert train.main([f"--config={recipe}:quick", path, workdir, *tiny, *steps]) == 0
  assert sample.main([workdir, "--num=2"]) == 0
  assert visualize.main([workdir, "--num=1", "--examples=2"]) == 0
  out = capsys.readouterr().out
  name = {"cifar10": "images", "enwik8": "texts", "audio": "audio"}[recipe]
  assert f"train      {name} " in out and "step 3/3" in out
  folder = tmp_path / "run" / "samples" / "3"
  page = (folder / "report.html").read_text()
  samples = [path for path in folder.iterdir() if path.name.startswith("samples-")]
  assert samples and "No samples" not in page and f"{name} (" in page
