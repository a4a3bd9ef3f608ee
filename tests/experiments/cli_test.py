"""What the commands say to mistakes: one message, exit status 2, nothing written."""

import json
import subprocess
import sys

import pytest

from experiments import __main__ as commands
from experiments import cli
from experiments import evaluate
from experiments import sample
from experiments import train
from experiments import visualize
from sparse_flax.run import errors
from sparse_flax.run import validate
from tests.helpers import tiny
from tests.helpers.paths import ROOT

# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = "--config=configs/enwik8.py:quick"


def failure(main, argv, capsys):
  """Runs a launcher that must fail; returns its exit status and what it said on stderr."""
  with pytest.raises(SystemExit) as stop:
    main([str(x) for x in argv])
  captured = capsys.readouterr()
  assert captured.out == "" and "Traceback" not in captured.err
  return stop.value.code, captured.err.strip()


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (
      [CONFIG, "--config.model.strde=3"],
      "--config.model.strde: no such field; did you mean --config.model.stride?",
    ),
    ([CONFIG, "--config.model=3"], "--config.model: is a group; set one of its fields"),
    ([CONFIG, "--config.model.stride=1.5"], "--config.model.stride=1.5: must be a whole number"),
    (
      [CONFIG, "--config.optim.learning_rate=fast"],
      "--config.optim.learning_rate=fast: must be a number",
    ),
    (
      [CONFIG, "--config.data.batch_size=0"],
      "config.data.batch_size=0: must be a whole number >= 1",
    ),
    ([CONFIG, "--config.train.steps=-5"], "config.train.steps=-5: must be a whole number >= 1"),
    (
      [CONFIG, "--config.optim.learning_rate=nan"],
      "config.optim.learning_rate=nan: must be a finite number",
    ),
    (
      ["--config=configs/cifar10.py", "--config.data.path=/no/where"],
      "config.data.path='/no/where': ",
    ),
    (["--config=configs/imagenet64.py:quick"], "config.data.path='': "),
    (
      ["--config=configs/cifar10.py:qick"],
      "--config: unknown variant 'qick': this config has :quick, :dense",
    ),
    (["--config=configs/cifar11.py"], "--config: No such file or directory: 'configs/cifar11.py'"),
    ([], "one --config=NAME[:VARIANT] or --config=FILE.py is needed, for example"),
    ([CONFIG, CONFIG], "one --config=NAME[:VARIANT] or --config=FILE.py is needed"),
    (["--config=cifar10:qick"], "--config: unknown variant 'qick': this config has :quick, :dense"),
    (["--config=cifar11"], "--config: No such file or directory: 'cifar11'"),
    ([CONFIG, "--workdri=x"], "--workdri: no such flag; did you mean --workdir?"),
    ([CONFIG, "more"], "'more' is no flag: write --name=value"),
    (
      [CONFIG, "--profile=3"],
      "profile=3: must be START:STOP, whole numbers with 1 <= START",
    ),
    ([CONFIG, "--profile=a:b"], "profile=a:b: must be START:STOP, whole numbers"),
    ([CONFIG, "--profile="], "profile=: must be START:STOP, whole numbers"),
    ([CONFIG, "--profile=5:5"], "profile=5:5: must be START:STOP, whole numbers"),
    ([CONFIG, "--profile=0:2"], "profile=0:2: must be START:STOP, whole numbers"),
    (
      [CONFIG, "--profile=3990:4002"],
      "profile=3990:4002: must be START:STOP with 1 <= START < STOP <= 4001, as the run has 4000",
    ),
  ],
  ids=lambda x: " ".join(x[-1:]) if isinstance(x, list) else "",
)
def test_bad_input_to_training(argv, message, tmp_path, capsys):
  status, said = failure(train.main, [*argv, f"--workdir={tmp_path / 'run'}"], capsys)
  assert status == 2 and said.startswith(message) and len(said.splitlines()) == 1, said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.promotes
def test_workdir_that_cannot_be_made(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  status, said = failure(train.main, [CONFIG, f"--workdir={tmp_path / 'file' / 'run'}"], capsys)
  assert status == 2 and "file" in said and len(said.splitlines()) == 1
  assert (tmp_path / "file").read_text() == ""


def test_workdir_of_another_config(tmp_path, capsys):
  (tmp_path / "config.json").write_text(json.dumps({"seed": 0}))
  status, said = failure(train.main, [CONFIG, f"--workdir={tmp_path}"], capsys)
  assert status == 2 and "this run was started with another config" in said
  assert "  config.train.steps: 'absent' -> " in said
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_overrides_reach_the_config():
  argv = [CONFIG, "--config.model.attention_layers=('local',('column','dense'))", "--x=1"]
  parser = cli.Parser("doc")
  parser.add_argument("--x", type=int)
  own, config, name = cli.parse_config(parser, [*argv, "--config.seed", "7"])
  assert (own.x, config.seed, name) == (1, 7, "enwik8-quick")
  assert config.model.attention_layers == ("local", ("column", "dense"))
  assert cli.parse_config(cli.Parser("doc"), ["--config=configs/audio.py"])[2] == "audio"


@pytest.mark.promotes
def test_train_and_evaluate_from_the_command_line(tmp_path, capsys, monkeypatch):
  config = tiny.config(tiny.text_file(tmp_path / "text"), train=dict(steps=1))
  monkeypatch.setattr(
    cli, "parse_config", lambda parser, argv: (parser.parse_args(argv), config, "tiny")
  )
  workdir = f"--workdir={tmp_path / 'run'}"
  assert train.main([workdir]) == 0
  assert evaluate.main([workdir, "--split=test"]) == 0
  shown = capsys.readouterr().out
  assert shown.startswith("FRESH RUN in ")
  result = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text())
  assert f"{result['bits_per_byte']:.4f} bits/byte" in shown
  assert "100 of 100 bytes" in shown and result["data"]["digest"] in shown
  status, said = failure(evaluate.main, [workdir, "--min_context=32"], capsys)
  assert status == 2 and "min_context=32" in said
  status, said = failure(evaluate.main, [workdir, "--step=9"], capsys)
  assert status == 2 and "step=9: no checkpoint" in said


@pytest.mark.promotes
def test_run_that_diverges_has_a_status_of_its_own(tmp_path, capsys, monkeypatch):
  def diverge(config, workdir, **how):
    raise errors.NonFiniteError("step 3: loss nan")

  monkeypatch.setattr(train.train, "train", diverge)
  assert failure(train.main, [CONFIG, f"--workdir={tmp_path}"], capsys) == (3, "step 3: loss nan")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "--workdir=DIR is missing"),
    (["--workdir=/no/where"], "--workdir=/no/where: no such folder"),
    (["--workdir=."], "--workdir=.: has no config.json"),
    (["--workdir=.", "--split=tset"], "argument --split: invalid choice: 'tset'"),
    (["--workdir=.", "--min_context=x"], "argument --min_context: invalid int value: 'x'"),
    (["--wrkdir=."], "unrecognized arguments: --wrkdir=."),
  ],
  ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_to_evaluation(argv, message, capsys):
  status, said = failure(evaluate.main, argv, capsys)
  assert status == 2 and said.startswith(message) and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("command", [train, evaluate, sample, visualize], ids=lambda x: x.__name__)
def test_a_compilation_cache_that_cannot_be_written(command, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  for folder, reason in ((f"{tmp_path}/file/deeper", f"{tmp_path}/file is no folder"), ("", "")):
    argv = [f"--compilation_cache={folder}"] + ([CONFIG] if command is train else [])
    status, said = failure(command.main, argv, capsys)
    assert status == 2 and len(said.splitlines()) == 1, said
    assert said.startswith(f"--compilation_cache={folder}: must be a folder that can be written: ")
    assert reason in said
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_wandb_needs_is_named(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
  for project, message in (
    ("mine", "wandb='mine' needs wandb: pip install 'sparse-flax[wandb]'"),
    ("", "wandb='': must be the name of a project"),
  ):
    argv = [CONFIG, f"--wandb={project}", f"--workdir={tmp_path / 'run'}"]
    assert failure(train.main, argv, capsys) == (2, message)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.one_day_in_three(0)
def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
  script = """
import sys
import jax, jax.numpy as jnp
from experiments import cli
count = {"hits": 0, "misses": 0}
def listen(event, **_):
  for kind in count:
    count[kind] += event == f"/jax/compilation_cache/cache_{kind}"
jax.monitoring.register_event_listener(listen)
cli.keep_compiled(sys.argv[1])
jax.jit(lambda x: jnp.tanh(x) + 1)(jnp.arange(8.0)).block_until_ready()
print(*count.values())
"""
  run = [sys.executable, "-c", script, str(tmp_path / "of" / "programs")]
  how = dict(cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
  first, second = (tuple(map(int, subprocess.run(run, **how).stdout.split())) for _ in range(2))
  assert first[0] == 0 < first[1] and second == (first[1], 0)


def test_folder_without_checkpoint(tmp_path, capsys):
  (tmp_path / "config.json").write_text("{}")
  status, said = failure(evaluate.main, [f"--workdir={tmp_path}"], capsys)
  assert status == 2 and "holds no checkpoint yet" in said


def test_the_command_itself(tmp_path):
  root = ROOT
  command = [sys.executable, "-m", "experiments.train", CONFIG, f"--workdir={tmp_path / 'run'}"]
  command += ["--config.data.batch_size=0", "--config.model.num_heads=3"]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
  assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
  first, second, *_ = done.stderr.splitlines()  # all mistakes at once
  assert first == "config.data.batch_size=0: must be a whole number >= 1"
  assert second == "config.model.num_heads=3: must divide width = 128"


@pytest.mark.parametrize("flags", [["--config=cifar10:fixed"], ["--config", "cifar10:fixed"]])
def test_a_config_of_this_repository_has_a_short_name(flags):
  _, config, name = cli.parse_config(cli.Parser(""), [*flags, "--config.model.stride=48"])
  assert name == "cifar10-fixed" and config.model.stride == 48
  assert config.model.attention_layers == ("fixed",)


def test_help_lists_configs_and_every_field(capsys):
  with pytest.raises(SystemExit, match="0"):
    train.main(["--help"])
  said = capsys.readouterr().out
  for name in cli.config_names():
    assert f"\n  {name} " in said
  assert ":quick, :300m" in said
  for field in validate.fields():
    before, _, after = said.partition(f"\n  --config.{field}\n      ")
    assert before and after and not after.startswith((";", "\n")), field


def test_the_commands_are_listed():
  there = {path.stem for path in (ROOT / "experiments").glob("*.py")} | {"benchmark"}
  no_commands = {"__init__", "__main__", "cli", "config_help", "distributed", "sources"}
  listed = commands.commands()
  assert set(listed) == there - no_commands and all(listed.values())


def test_progress_is_a_line_of_terminals_with_the_time_left(monkeypatch, capsys):
  now = 100.0
  monkeypatch.setattr(cli.time, "monotonic", lambda: now)
  for is_terminal, expected in ((False, []), (True, [1_500, 2_000])):
    monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
    progress = cli.Progress("scoring", 4_000, "bytes")
    said = []
    for seconds, done in ((1.0, 500), (0.5, 1_000), (50.0, 1_500), (50.5, 2_000)):
      now += seconds
      progress(done)
      said.append(capsys.readouterr().err)
    shown = [line.removeprefix("\r\033[K") for line in said if line]
    assert [int(line.split()[1].replace(",", "")) for line in shown] == expected
    progress.end()
    assert capsys.readouterr().err == "\r\033[K" * is_terminal
  # Since the first call: compilation was before it.
  assert shown[-1] == "scoring 2,000 of 4,000 bytes  14.9 bytes/s  2 min 15 s left"
