"""A path that is given is the data that are read, also by the variants that ship a sample."""

import pytest

from experiments import cli
from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import train
from sparse_flax.run import validate
from sparse_flax.run import workdir
from tests.helpers import data_files as files
from tests.helpers import tiny

# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def parse(name, *flags):
  return cli.parse_config(cli.Parser(""), [f"--config=configs/{name}", *flags])[1]


@pytest.mark.parametrize(
  "name, write, expected",
  [
    ("cifar10.py:quick", files.write_cifar10, "cifar10"),
    ("audio.py:quick", files.write_recordings, "audio"),
    ("imagenet64.py:quick", files.write_imagenet64, "downsampled_imagenet/64x64"),
  ],
)
def test_quick_takes_the_folder_that_it_is_given(tmp_path, name, write, expected):
  write(tmp_path)
  config = parse(name, f"--config.data.path={tmp_path}")
  assert config.data.name == expected and config.is_locked
  assert validate.validate(config) == []
  assert evaluate.open_dataset(config, "train").name == expected


def test_quick_takes_any_text_but_no_damaged_enwik8(tmp_path, monkeypatch):
  (tmp_path / "book.txt").write_bytes(b"To be read. " * 100)
  config = parse("enwik8.py:quick", "--config.data.path", str(tmp_path / "book.txt"))
  assert config.data.name == "bytes" and validate.validate(config) == []
  assert evaluate.open_dataset(config, "train").streams.read(0, 0, 11).tobytes() == b"To be read."
  (tmp_path / "enwik8").write_bytes(b"To be read. " * 100)
  (tmp_path / "copy.zip").write_bytes(b"To be read. " * 100)
  for path, message in {
    tmp_path: "enwik8 has exactly 100,000,000",
    tmp_path / "enwik8": "enwik8 has exactly 100,000,000",
    tmp_path / "copy.zip": "copy.zip is not the published archive",
  }.items():
    config = parse("enwik8.py:quick", f"--config.data.path={path}")
    (problem,) = validate.validate(config)
    assert config.data.name == "enwik8" and message in problem
  monkeypatch.setattr(data.sources.raw, "ENWIK8_BYTES", 1_200)
  config = parse("enwik8.py:quick", f"--config.data.path={tmp_path / 'book.txt'}")
  assert config.data.name == "enwik8" and validate.validate(config) == []


def test_quick_without_a_path_is_the_sample_and_a_wrong_path_is_named():
  for flags in ((), ("--config.data.path=",)):
    assert parse("enwik8.py:quick", *flags).data.name == "enwik8_sample"
  (problem,) = validate.validate(parse("cifar10.py:quick", "--config.data.path=/no/where"))
  assert problem == "config.data.path='/no/where': no such file or folder"


def test_a_path_beside_a_sample_is_refused_where_a_run_begins(tmp_path):
  config = parse(
    "cifar10.py:quick", f"--config.data.path={tmp_path}", "--config.data.name=cifar10_sample"
  )
  (problem,) = validate.validate(config)
  assert problem.startswith(f"config.data.path={str(tmp_path)!r}: must be empty")
  assert "data.name='cifar10'" in problem
  with pytest.raises(ValueError, match="must be empty"):
    data.open_dataset(
      "cifar10_sample", path=str(tmp_path), split="test", seq_len=3_072, split_seed=0
    )
  # Runs of earlier versions have such configs: they can still be evaluated and sampled from.
  assert evaluate.open_dataset(config, "test").name == "cifar10_sample"


def test_a_run_that_began_on_the_sample_with_a_path_goes_on_without_it(tmp_path):
  # Earlier versions took such a path and did not read it.
  old = parse(
    "cifar10.py:quick", f"--config.data.path={tmp_path}", "--config.data.name=cifar10_sample"
  )
  identity = {"train": {"digest": "sha256:1"}}
  workdir.start(tmp_path / "run", old, data=identity)
  now = parse("cifar10.py:quick", "--config.data.path=")
  assert validate.validate(now) == []
  workdir.check(tmp_path / "run", now, data=identity)
  with pytest.raises(ValueError, match=r"config\.data\.name: 'cifar10_sample' -> 'cifar10'"):
    workdir.check(tmp_path / "run", parse("cifar10.py:quick", f"--config.data.path={tmp_path}"))


def test_none_on_the_command_line_is_the_default_again():
  for flags in (["--config.model.implementation=None"], ["--config.model.implementation", "None"]):
    config = parse("enwik8.py:quick", *flags)
    assert config.model.implementation is None and config.is_locked
  assert validate.validate(config) == []
  # Where None is no value, it is a text like any other.
  assert parse("enwik8.py:quick", "--config.data.path=None").data.path == "None"
  assert parse("enwik8.py:quick", "--config.model.implementation=xla").model.implementation == "xla"


@pytest.mark.promotes
def test_the_banner_says_how_the_data_relate_to_the_published_set(tmp_path):
  said = []
  config = tiny.config(tiny.text_file(tmp_path / "text"), train=dict(steps=1, eval_every=1))
  train.train(config, str(tmp_path / "run"), say=said.append)
  assert "\n  data       a file of your own\n" in said[1]
