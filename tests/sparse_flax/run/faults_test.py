"""One process: it is killed, stopped, poisoned, starved and hung, and no run is lost."""

import os
import pathlib
import random
import shutil
import signal
import time

import pytest

from tests.helpers import pod
from tests.helpers import tiny

STEPS = 40
KILLS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("faults")
  tiny.text_file(root / "text", size=4_000)
  return root


def start(root, name, *more, steps=STEPS, **environment):
  changes = dict(train__steps=steps, train__save_every=4, train__eval_every=20)
  args = pod.arguments("fixed", root / "text", root / name, **changes)
  return pod.Pod(root / "output", *args, *more, **environment)


def finish(root, name, *more, **environment):
  child = start(root, name, *more, **environment)
  assert child.wait() == [0], child.text()
  return child.text()


@pytest.fixture(scope="module")
def straight(root):
  """The state and the losses of the run that nothing happens to."""
  finish(root, "straight")
  assert [x["step"] for x in pod.records(root / "straight") if "loss" in x] == [
    *range(1, STEPS + 1)
  ]
  return pod.weights(root / "straight"), pod.losses(root / "straight")


def check(root, name, straight):
  """Ended with the same bits, and every step is recorded once."""
  assert pod.weights(root / name) == straight[0]
  steps = [x["step"] for x in pod.records(root / name) if "loss" in x]
  assert steps == [*range(1, STEPS + 1)] and pod.losses(root / name) == straight[1]


@pytest.mark.one_day_in_six(2)
@pytest.mark.parametrize(
  "kills", [3, pytest.param(KILLS, marks=pytest.mark.slow)], ids=lambda n: f"{n}-kills"
)
def test_sigkill_at_any_moment_changes_no_bit(root, straight, kills):
  """A random moment after the first line, of which most are within or between saves."""
  name, chance, done = f"killed-{kills}", random.Random(kills), 0
  while done < kills:
    child = start(root, name, "--config.train.log_every=1")
    child.wait_for("compiling" if chance.random() < 0.2 else "tokens/s")
    time.sleep(chance.random() * 0.5)
    if child.children[0].poll() is not None:  # too quick for us: from the beginning
      shutil.rmtree(root / name)
      continue
    child.kill()
    child.wait()
    done += 1
  finish(root, name)
  check(root, name, straight)


@pytest.mark.one_day_in_six(0)
def test_sigterm_is_a_pause(root, straight):
  child = start(root, "stopped")
  child.wait_for("step 7/")
  child.children[0].send_signal(signal.SIGTERM)
  assert child.wait() == [75], child.text()
  assert "STOPPED at step" in child.text() and "same command again" in child.text()
  assert "RESUMING" in finish(root, "stopped")
  check(root, "stopped", straight)


@pytest.mark.one_day_in_six(5)
def test_a_run_goes_on_with_other_devices(root, straight):
  """Not with the same bits: sums are taken in another order."""
  for devices, mesh in (
    (4, "--config.mesh.data=4"),
    (2, "--config.mesh.fsdp=2"),
    (1, "--config.mesh.data=1"),
  ):
    child = start(root, "moved", mesh, JAX_NUM_CPU_DEVICES=str(devices))
    if devices == 1:
      assert child.wait() == [0], child.text()
    else:
      child.wait_for(f"step {20 if devices == 2 else 5}/")
      child.children[0].send_signal(signal.SIGTERM)
      assert child.wait() == [75], child.text()
  assert pod.losses(root / "moved") == pytest.approx(straight[1], rel=1e-4)


@pytest.mark.one_day_in_six(1)
def test_one_bad_batch_costs_nothing_but_itself(root, straight):
  said = finish(root, "one-bad", NAN_STEPS="6")
  assert "1 skipped" in said
  records = {x["step"]: x for x in pod.records(root / "one-bad") if "skipped" in x}
  assert records[6]["skipped"] == 1 and "loss" not in records[6]
  assert records[7]["skipped"] == 0 and len(records) == STEPS
  assert records[5]["loss"] == pytest.approx(straight[1][4], rel=1e-6)  # of another program


@pytest.mark.one_day_in_six(4)
def test_bad_batches_in_a_row_end_the_run_and_the_same_command_goes_on(root, straight):
  bad = ",".join(map(str, range(7, 30)))
  child = start(root, "bad", NAN_STEPS=bad)
  assert child.wait() == [3], child.text()
  said = child.text()
  assert "step 16: loss nan" in said and "10 updates in a row were skipped" in said
  assert "goes on from step 4, the last good checkpoint" in said  # not from 8, 12 or 16
  assert "RESUMING" in finish(root, "bad")  # the batches are good again
  check(root, "bad", straight)


@pytest.mark.one_day_in_six(2)
def test_a_full_disk_ends_clearly_and_harms_nothing(root, straight):
  child = start(root, "full", FILE_LIMIT="9:2000")
  assert child.wait() == [1], child.text()
  said = child.text()
  assert "File too large" in said.splitlines()[-1] and "Traceback" not in said
  finish(root, "full")
  check(root, "full", straight)


@pytest.mark.one_day_in_six(1)
def test_a_hung_step_is_reported_and_ended(root, straight):
  child = start(root, "hung", "--stall_report=2", "--stall_exit=5", HANG="6")
  assert child.wait() == [1], child.text()
  said = child.text()
  assert "NO STEP for" in said and "pod_child.py" in said and "Timeout (0:0" in said
  finish(root, "hung")
  check(root, "hung", straight)


@pytest.mark.smoke("FILE/run", daily=0)
@pytest.mark.parametrize("place", ["/proc/run", "FILE/run"])
def test_a_workdir_that_cannot_be_written(root, place):
  workdir = place.replace("FILE", str(root / "text"))
  args = pod.arguments("fixed", root / "text", pathlib.Path(workdir))
  child = pod.Pod(root / "output", *args)
  assert child.wait() == [2], child.text()
  (line,) = child.text().strip().splitlines()
  assert workdir in line


@pytest.mark.one_day_in_six(4)
def test_data_that_vanished_are_missed_by_name(root, straight):
  text = tiny.text_file(root / "vanishing", size=4_000)
  args = pod.arguments("fixed", text, root / "vanished", train__steps=4)
  child = pod.Pod(root / "output", *args)
  assert child.wait() == [0], child.text()
  os.remove(text)
  child = pod.Pod(root / "output", *args)
  assert child.wait() == [2], child.text()
  assert "vanishing" in child.text() and "Traceback" not in child.text()
