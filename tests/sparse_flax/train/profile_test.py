"""An XProf trace of some steps: it is there, of these steps, and changes nothing else."""

import contextlib
import gzip
import json
import pathlib
import re

import jax
import pytest

from sparse_flax import train
from sparse_flax.run import errors
from sparse_flax.train import profile
from tests.helpers import tiny

pytestmark = pytest.mark.promotes  # optax's Adam mixes dtypes


def run(config, workdir, **how):
  lines = []
  with contextlib.suppress(errors.Preempted):
    train.train(config, str(workdir), say=lambda text: lines.extend(text.splitlines()), **how)
  return lines


def losses(workdir):
  records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(record["step"], record["loss"]) for record in records if "loss" in record]


def traced(folder: pathlib.Path) -> list[int]:
  """The steps in the only trace of a folder."""
  (binary,) = folder.glob("plugins/profile/*/*.xplane.pb")
  assert binary.stat().st_size > 1_000
  (text,) = binary.parent.glob("*.trace.json.gz")
  events = json.loads(gzip.decompress(text.read_bytes()))["traceEvents"]
  return sorted(int(x["args"]["step_num"]) for x in events if x.get("name") == "train")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folders of a run, of one with a trace of its steps 3 and 4, and what that one said."""
  root = tmp_path_factory.mktemp("profile")
  config = tiny.config(tiny.text_file(root / "text"))
  run(config, root / "plain")
  return root, config, run(config, root / "profiled", profile=range(3, 5))


@pytest.mark.one_day_in_six(3)
def test_steps_are_traced_and_losses_are_the_same(runs):
  root, config, said = runs
  assert traced(root / "profiled" / "profile") == [3, 4]
  (line,) = (line for line in said if line.startswith("PROFILE"))
  where = str(root / "profiled" / "profile")
  assert line.startswith(f"PROFILE in {where}; ") and f"xprof --port=8791 {where}" in line
  assert said.index(line) > next(n for n, line in enumerate(said) if line.startswith("step 4/6"))
  assert losses(root / "profiled") == losses(root / "plain") and len(losses(root / "plain")) == 6
  states = [tiny.restore(config, root / name) for name in ("plain", "profiled")]
  assert tiny.leaf_bytes(states[0]) == tiny.leaf_bytes(states[1])
  assert not (root / "plain" / "profile").exists()


@pytest.mark.one_day_in_six(5)
def test_a_run_that_ends_or_goes_on_among_the_steps_traces_those_it_takes(runs, tmp_path):
  _, config, _ = runs
  run(config, tmp_path / "run", profile=range(2, 6), stop=iter([False, False, True]).__next__)
  assert traced(tmp_path / "run" / "profile") == [2, 3]
  (tmp_path / "run" / "profile").rename(tmp_path / "first")
  said = run(config, tmp_path / "run", profile=range(2, 6))
  assert any("RESUMING" in line for line in said)
  assert traced(tmp_path / "run" / "profile") == [4, 5]
  (tmp_path / "run" / "profile").rename(tmp_path / "second")
  said = run(config, tmp_path / "run", profile=range(2, 6))
  assert "no profile: step 5 was done before, the run goes on after 6" in said
  assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize("steps", [range(0, 3), range(2, 8), range(7, 9)], ids=str)
def test_steps_that_a_run_does_not_have_are_refused(steps, tmp_path):
  config = tiny.config(tiny.text_file(tmp_path / "text"))
  message = f"profile={steps.start}:{steps.stop}: must be START:STOP with 1 <= START < STOP <= 7"
  with pytest.raises(ValueError, match=re.escape(message)):
    train.train(config, str(tmp_path / "run"), profile=steps)
  assert not (tmp_path / "run").exists()


def test_each_of_many_processes_has_a_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  monkeypatch.setattr(jax, "process_index", lambda: 2)
  said = []
  arguments = dict(first=0, pause=contextlib.nullcontext, say=said.append)
  with (
    profile.Profiler(tmp_path, range(1, 2), **arguments) as profiler,
    profiler.step(1, settle=lambda: None),
  ):
    jax.numpy.ones(3).sum().block_until_ready()
  assert traced(tmp_path / "profile" / "process_2") == [1]
  assert f"PROFILE in {tmp_path / 'profile' / 'process_2'}; " in said[0]
