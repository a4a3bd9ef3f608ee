"""With what a run may go on, and how Ctrl-C ends one."""

import json
import os
import signal
import subprocess
import sys

import pytest

from experiments import cli
from experiments import train as launcher
from sparse_flax import evaluate
from sparse_flax import train
from sparse_flax.run import checkpoint
from sparse_flax.run import digest
from sparse_flax.run import errors
from sparse_flax.run import workdir as workdir_lib
from sparse_flax.train import metrics
from tests.helpers import tiny
from tests.helpers import tiny_config

IDENTITY = {
  split: dict(name="bytes", version="1.0.0", digest=f"sha256:{split}", remark="as published")
  for split in ("train", "validation")
}


@pytest.fixture
def run(tmp_path):
  workdir_lib.start(tmp_path / "run", tiny.config(tmp_path / "text"), data=IDENTITY)
  return tmp_path / "run"


def other(run, field, value):
  group, _, name = field.rpartition(".")
  config = tiny.config(run.parent / "text").copy_and_resolve_references().unlock()
  with config.ignore_type():
    (config[group] if group else config)[name] = value
  return config.lock()


def changes(run):
  return json.loads((run / "changes.json").read_text())


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("data.path", "/mnt/elsewhere"),
    ("train.log_every", 7),
    ("train.eval_every", 7),
    ("train.save_every", 7),
    ("train.keep_every", 7),
    ("eval.pictures", 7),
    ("model.remat", "full"),
    ("model.implementation", "xla"),
    ("mesh.fsdp", 2),
  ],
)
def test_what_does_not_change_the_result_may_differ(run, field, value):
  stored = (run / "config.json").read_bytes()
  config = other(run, field, value)
  workdir_lib.check(run, config)
  workdir_lib.check(run, config, data=IDENTITY)
  assert not (run / "changes.json").exists()
  workdir_lib.start(run, config, data=IDENTITY)
  assert workdir_lib.load_config(run) == config and changes(run) == {field: value}
  assert (run / "config.json").read_bytes() == stored
  assert workdir_lib.load_config(run, data_path="/mnt/third").data.path == "/mnt/third"
  first = tiny.config(run.parent / "text")
  workdir_lib.start(run, first, data=IDENTITY)
  assert workdir_lib.load_config(run) == first and changes(run) == {}


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("seed", 1),
    ("data.name", "enwik8"),
    ("data.split_seed", 1),
    ("train.steps", 7),
    ("train.accumulation", 2),
    ("train.max_skipped", 3),
    ("model.width", 32),
    ("model.param_dtype", "bfloat16"),
    ("eval.monitor_batches", 1),  # the best step is chosen by it
  ],
)
def test_what_changes_the_result_is_refused(run, field, value):
  with pytest.raises(ValueError, match=rf"another config.*\n  config\.{field}: .* -> {value!r}$"):
    workdir_lib.check(run, other(run, field, value), data=IDENTITY)


def test_a_finished_run_may_have_more_steps(run):
  longer = other(run, "train.steps", 9)
  for done in (None, 0, 3):  # of 6
    with pytest.raises(ValueError, match=r"or raise train\.steps once all 6 are done\n.*: 6 -> 9$"):
      workdir_lib.check(run, longer, done=done)
  workdir_lib.check(run, longer, data=IDENTITY, done=6)
  workdir_lib.start(run, longer, data=IDENTITY)
  assert workdir_lib.load_config(run) == longer and workdir_lib.planned_steps(run) == 9
  workdir_lib.check(run, longer, done=7)
  with pytest.raises(ValueError, match=r"config\.train\.steps: 9 -> 8$"):
    workdir_lib.check(run, other(run, "train.steps", 8), done=7)
  with pytest.raises(
    ValueError, match=rf"^config\.train\.steps=6: must be at least 7, which {run}"
  ):
    workdir_lib.check(run, tiny.config(run.parent / "text"), done=7)
  workdir_lib.check(run, other(run, "train.steps", 20), done=9)


@pytest.mark.one_day_in_six(5)
@pytest.mark.promotes
def test_more_steps_have_the_schedule_of_their_number(tmp_path):
  text, workdir, lines = tiny.text_file(tmp_path / "text"), tmp_path / "run", []
  for steps in (6, 8):
    config = tiny.config(text, train=dict(steps=steps))
    train.train(config, str(workdir), say=lines.append)
  rates = [train.optimizer_of(config)[1](n) for n in (6, 7)]
  assert "RESUMING" in "".join(lines) and [
    line for line in lines if line.startswith("  extended")
  ] == [f"  extended   from 6 to 8 steps; the learning rate goes from 0 to {rates[0]:.3g}"]
  records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  shown = {x["step"]: x["learning_rate"] for x in records if "learning_rate" in x}
  assert [shown[7], shown[8]] == pytest.approx([float(x) for x in rates])
  assert checkpoint.latest_step(workdir) == workdir_lib.load_config(workdir).train.steps == 8


def test_data_are_told_by_what_they_are_and_not_by_words_about_them(run):
  moved = other(run, "data.path", "/mnt/elsewhere")
  said_better = {split: x | dict(remark="complete") for split, x in IDENTITY.items()}
  workdir_lib.check(run, moved, data=said_better)
  more = {split: x | dict(license="free") for split, x in IDENTITY.items()}
  workdir_lib.check(run, moved, data=more)  # of a later version, which knows more of them
  damaged = IDENTITY | {"validation": IDENTITY["validation"] | dict(digest="sha256:other")}
  with pytest.raises(ValueError, match=r"other data.*\n  data\.validation\.digest: .*other'$"):
    workdir_lib.check(run, moved, data=damaged)
  (run / "data.json").unlink()  # nothing tells that they are the same
  with pytest.raises(ValueError, match=r"config\.data\.path: .* -> '/mnt/elsewhere'$"):
    workdir_lib.check(run, moved)


def test_changes_of_what_may_not_change_are_refused(run):
  (run / "changes.json").write_text('{"model.width": 32}')
  with pytest.raises(ValueError, match=r"changes\.json: config\.model\.width: cannot change"):
    workdir_lib.load_config(run)


@pytest.mark.parametrize("field", ["mesh.sequence", "train.keep_every", "data.path"])
def test_a_config_without_a_field_is_refused_in_one_line(run, field):
  group, _, name = field.partition(".")
  stored = json.loads((run / "config.json").read_text())
  del stored[group][name]
  (run / "config.json").write_text(json.dumps(stored))
  with pytest.raises(ValueError, match=rf"another config.*\n  config\.{field}: 'absent' -> .*$"):
    workdir_lib.check(run, tiny.config(run.parent / "text"), data=IDENTITY)


def test_damaged_files_are_told(run):
  config = tiny.config(run.parent / "text")
  (run / "data.json").write_text('{"train": 3}')
  with pytest.raises(ValueError, match=r"other data.*\n  data\.train: 3 -> 'absent'$"):
    workdir_lib.check(run, config, data=IDENTITY)
  (run / "config.json").write_text(json.dumps(config.to_dict() | {"data": 3}))
  with pytest.raises(ValueError, match=r"not a config of this version\nconfig\.data=3: there is"):
    workdir_lib.load_config(run, data_path="/mnt/elsewhere")


@pytest.mark.promotes
def test_a_command_that_cannot_run_here_leaves_a_run_as_it_is(run, tmp_path):
  (run / "data.json").unlink()  # it is of other data
  stored = (run / "config.json").read_bytes()
  config = tiny.config(tiny.text_file(tmp_path / "text"), model=dict(implementation="mosaic_gpu"))
  with pytest.raises(ValueError, match=r"^config\.model\.implementation='mosaic_gpu': .*$"):
    train.train(config, str(run))
  assert list(run.iterdir()) == [run / "config.json"]
  assert (run / "config.json").read_bytes() == stored


# --------------------------------------------------------------------------------------- Ctrl-C

# The command around a loop that saves nothing.
LOOP = """
import sys, time
from experiments import train
from sparse_flax.run import errors

def loop(config, workdir, *, say, stop, around_loop, **others):
  with around_loop:
    say("ready")
    while not (stop() and workdir == "once"):
      time.sleep(0.01)
    say("saved")
    raise errors.Preempted("STOPPED")

train.train.train = loop
train.run(None, sys.argv[1])
"""


@pytest.fixture
def start_loop():
  children = []
  yield lambda kind, **how: children.append(_start_loop(kind, **how)) or children[-1]
  for child in children:
    child.kill()


def _start_loop(kind, **how):
  """A process that Ctrl-C reaches, as in a terminal, also where it is ignored here."""
  ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    child = subprocess.Popen([sys.executable, "-c", LOOP, kind], stdout=subprocess.PIPE, **how)
  finally:
    signal.signal(signal.SIGINT, ignored)
  assert child.stdout.readline().strip() in (b"ready", "ready")
  return child


@pytest.mark.one_day_in_three(0)
@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # the launcher sets its own
  text, add = tiny.text_file(tmp_path / "text"), metrics.Progress.add

  def add_and_press(self, step, record):
    add(self, step, record)
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(metrics.Progress, "add", add_and_press)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
  try:
    with pytest.raises(SystemExit) as end:
      config = f"--config={tiny_config.__file__}:fixed,{text}"
      changed = ["--config.train.steps=100", "--config.train.save_every=100"]
      launcher.main(
        [config, f"--workdir={tmp_path / 'run'}", "--config.train.eval_every=100", *changed]
      )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, before)
  step = checkpoint.latest_step(tmp_path / "run")
  said = capsys.readouterr().err
  assert end.value.code == 130 and 2 <= step < 100
  assert f"STOPPED at step {step}, saved is step {step}; start the same command again" in said
  assert "a second Ctrl-C ends it at once" in said


def test_a_second_ctrl_c_ends_at_once(start_loop):
  child = start_loop("twice", stderr=subprocess.PIPE, text=True)
  child.send_signal(signal.SIGINT)
  assert child.stderr.readline().startswith("Ctrl-C: the run ends after this step")
  child.send_signal(signal.SIGINT)
  _, said = child.communicate(timeout=20)
  assert child.returncode == 130 and "the same command goes on" in said


@pytest.mark.one_day_in_three(0)
def test_ctrl_c_that_ends_the_reader_of_the_output_too(start_loop):
  child = start_loop("once", stderr=subprocess.STDOUT)
  child.stdout.close()  # as `2>&1 | tee log` has it
  child.send_signal(signal.SIGINT)
  assert child.wait(20) == 130


@pytest.mark.promotes
def test_ctrl_c_while_data_are_prepared_ends_at_once(tmp_path, monkeypatch, capsys):
  def prepare(config, split):
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("goes on")

  monkeypatch.setattr(evaluate, "open_dataset", prepare)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(SystemExit) as end, cli.readable_errors():
      launcher.run(tiny.config(tiny.text_file(tmp_path / "text")), str(tmp_path / "run"))
  finally:
    signal.signal(signal.SIGINT, before)
  assert end.value.code == 130 and capsys.readouterr().err == "stopped from the keyboard\n"
  assert not (tmp_path / "run").exists()


def test_sigterm_is_no_ctrl_c():
  stop = launcher.Stop()
  with stop.by_sigterm(), stop.by_ctrl_c():
    assert not stop.asked.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked.wait(20) and not stop.interrupted


# --------------------------------------------------------------------------------------- dropout


def forget_dropout(path):
  """Makes a checkpoint's record that of a version that did not write down how masks are drawn."""
  about = json.loads(path.read_text())
  del about["dropout"], about["sha256"]
  path.write_text(json.dumps(about | dict(sha256=digest.of_json(about))))


@pytest.mark.one_day_in_six(1)
@pytest.mark.promotes
@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_a_run_that_drew_other_masks_goes_on_and_says_so_once(tmp_path, rate):
  config = tiny.config(tiny.text_file(tmp_path / "text"), model=dict(dropout=rate))
  workdir, told = tmp_path / "run", []

  def go_on():
    lines = []
    with pytest.raises(errors.Preempted):
      train.train(config, str(workdir), say=lines.append, stop=lambda: True)
    told.append([line for line in lines if line.startswith("  dropout")])

  go_on()
  forget_dropout(workdir / "checkpoints" / "1" / "about" / "metadata")
  go_on()
  go_on()
  line = "  dropout    other masks from here on than those of the version that saved step 1"
  assert told == [[], [line] if rate else [], []]
