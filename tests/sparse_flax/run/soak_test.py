"""A week in an hour: a run that is killed, stopped, poisoned and damaged, and started again."""

import os
import pathlib
import random
import signal
import time

import pytest

from tests.helpers import pod
from tests.helpers import tiny

FAULTS = ("kill", "kill", "term", "nan", "truncate")
STATUS = {"kill": -signal.SIGKILL, "truncate": -signal.SIGKILL, "term": 75, "nan": 3}
STEPS_PER_RESTART = 10
# One batch in 100 is bad in the undisturbed run too: it is skipped in both.
BAD_BATCHES = dict(NAN_STEPS="17", NAN_EVERY="100")
ALL_BAD = dict(NAN_STEPS="0", NAN_EVERY="1")


def start(root: pathlib.Path, name: str, steps: int, **environment) -> pod.Pod:
  changes = dict(train__steps=steps, train__save_every=5, train__eval_every=50)
  args = pod.arguments("fixed", root / "text", root / name, **changes)
  return pod.Pod(root / "output", *args, **environment)


def step_of(workdir: pathlib.Path) -> int:
  """The newest step that is recorded; the last line may be half written."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return max((int(line.split(",")[0].split(":")[1]) for line in lines), default=0)


def disturb(child: pod.Pod, fault: str, chance: random.Random, *, workdir, limit: int) -> int:
  """Does harm at a random moment, before step `limit`; returns the exit status."""
  if fault != "nan":  # that one ends by itself
    # Most after some steps, saves among them; some before the first one.
    child.wait_for("compiling" if chance.random() < 0.2 else " nats")
    end = time.monotonic() + 2 * chance.random()
    while time.monotonic() < end and step_of(workdir) < limit:
      time.sleep(0.005)
    child.children[0].send_signal(signal.SIGTERM if fault == "term" else signal.SIGKILL)
  return child.wait()[0]


def truncate(workdir: pathlib.Path, chance: random.Random) -> bool:
  """Halves a file of the newest checkpoint, if there is an older one to go back to."""
  steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
  if len(steps) < 2:
    return False
  newest = max(steps, key=lambda path: int(path.name))
  files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size > 100)
  file = chance.choice(files)
  os.truncate(file, file.stat().st_size // 2)
  return True


@pytest.mark.slow
def test_a_run_survives_a_week(tmp_path, capsys):
  """SOAK_RESTARTS restarts; the end is that of the run that nothing happens to."""
  restarts = int(os.environ.get("SOAK_RESTARTS", "20"))
  steps, workdir = STEPS_PER_RESTART * restarts, tmp_path / "soaked"
  tiny.text_file(tmp_path / "text", size=4_000)
  chance, counts, first = random.Random(restarts), dict.fromkeys(STATUS, 0), time.monotonic()
  for done in range(restarts):
    fault = chance.choice(FAULTS)
    child = start(tmp_path, "soaked", steps, **(ALL_BAD if fault == "nan" else BAD_BATCHES))
    limit = STEPS_PER_RESTART * done + 10  # so that the end is not reached before
    status = disturb(child, fault, chance, workdir=workdir, limit=limit)
    assert status == STATUS[fault], f"{fault}: status {status}\n{child.text()}"
    if fault == "truncate" and not truncate(workdir, chance):
      fault = "kill"
    counts[fault] += 1
    if (done + 1) % 20 == 0:
      with capsys.disabled():
        print(f"\n{done + 1} restarts, step {step_of(workdir):,}: {counts}", flush=True)
  for name in ("soaked", "straight"):
    child = start(tmp_path, name, steps, **BAD_BATCHES)
    assert child.wait(timeout=1_200) == [0], child.text()
  with capsys.disabled():
    minutes = (time.monotonic() - first) / 60
    print(f"\n{restarts} restarts, {steps:,} steps in {minutes:.0f} min: {counts}", flush=True)

  assert pod.weights(workdir) == pod.weights(tmp_path / "straight")
  kept = [
    [{k: x.get(k) for k in ("step", "loss", "skipped")} for x in pod.records(tmp_path / name)
     if "skipped" in x]
    for name in ("soaked", "straight")
  ]  # fmt: skip
  assert [x["step"] for x in kept[0]] == [*range(1, steps + 1)]
  assert kept[0] == kept[1] and any(x["skipped"] for x in kept[0]) == (steps >= 17)
