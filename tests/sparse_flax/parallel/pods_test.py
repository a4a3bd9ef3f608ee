"""Several processes: they train as one does, stop together, and say what they wait for."""

import os
import pathlib
import re
import signal

import pytest

from experiments import distributed
from tests.helpers import pod
from tests.helpers import tiny

# data, fsdp, tensor, sequence
AXES_AT_4 = ("4,1,1,1", "1,4,1,1", "1,1,4,1", "1,1,1,4")
AXES_AT_2 = ("2,2,1,1", "2,1,2,1", "2,1,1,2")


@pytest.mark.parametrize(
  ("environment", "joins"),
  [
    ({}, False),
    (dict(SLURM_NTASKS="1"), False),
    (dict(SLURM_NTASKS="16"), True),
    (dict(OMPI_COMM_WORLD_SIZE="2"), True),
    (dict(TPU_WORKER_HOSTNAMES="localhost"), False),
    (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
    (dict(JAX_COORDINATOR_ADDRESS="a:1"), True),
    (dict(JOBSET_NAME="train"), True),
    (dict(MEGASCALE_NUM_SLICES="2"), True),
  ],
  ids=str,
)
def test_who_is_one_of_many(environment, joins):
  assert distributed.is_one_of_many(environment | {"TPU_SKIP_MDS_QUERY": "1"}) == joins


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("pods")
  tiny.text_file(root / "text", size=4_000)
  return root


def train_on(root, kind, meshes, *, processes, devices, **changes):
  """The losses of runs of one launch, one per mesh."""
  folders = {mesh: root / f"{kind}-{processes}x{devices}-{mesh}" for mesh in meshes}
  workdirs = ";".join(f"{mesh}={folder}" for mesh, folder in folders.items())
  args = pod.arguments(kind, root / "text", root / "unused", **changes)
  how = dict(processes=processes, devices=devices)
  one = pod.Pod(root / "output", *args, **how, WORKDIRS=workdirs)
  assert one.wait(timeout=560) == [0] * processes, one.text()
  return {mesh: pod.losses(folder) for mesh, folder in folders.items()}


@pytest.fixture(scope="module")
def alone(root):
  """One process with one device."""
  (losses,) = train_on(root, "mixed", ["1,1,1,1"], processes=1, devices=1).values()
  assert len(losses) == 6 and losses[-1] < 5.3 < losses[0]
  return losses


def check(found, alone):
  for mesh, losses in found.items():
    assert losses == pytest.approx(alone, rel=1e-6), mesh


@pytest.mark.one_day_in_six(0)
def test_two_processes_train_as_one_does(root):
  (alone,) = train_on(root, "fixed", ["1,1,1,1"], processes=1, devices=1).values()
  check(train_on(root, "fixed", ["1,2,1,2"], processes=2, devices=2), alone)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 2)], ids=["1x4", "2x2"])
def test_every_axis_at_2_and_4_trains_as_one_device_does(root, alone, processes, devices):
  meshes = AXES_AT_4 + AXES_AT_2
  check(train_on(root, "mixed", meshes, processes=processes, devices=devices), alone)


@pytest.mark.slow
def test_all_axes_at_once(root, alone):
  check(train_on(root, "mixed", ["2,2,2,2"], processes=2, devices=8), alone)


def listening(pid: int) -> set[str]:
  """The hex addresses on which a process accepts connections."""
  inodes = set()
  for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
      inodes.add(found.group(1))
  rows = [
    line.split()
    for name in ("tcp", "tcp6")
    for line in pathlib.Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
  ]
  return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def stopped_at(both):
  """The step that both processes say they have stopped at and saved."""
  ends = set(re.findall(r"STOPPED at step (\d+), saved is step (\d+)", both.text()))
  assert len(ends) == 1 and len(set(*ends)) == 1, both.text()
  return int(ends.pop()[0])


@pytest.mark.one_day_in_six(2)
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(root):
  args = pod.arguments("fixed", root / "text", root / "stopped", train__steps=900, mesh__data=2)
  args += ["--config.train.eval_every=900", "--config.train.save_every=900"]
  how = dict(processes=2)
  both = pod.Pod(root / "output", *args, **how)
  both.wait_for("step 3/900")
  loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
  assert set() < listening(both.children[0].pid) <= loopback
  assert listening(both.children[1].pid) <= loopback
  both.children[1].send_signal(signal.SIGTERM)
  assert both.wait() == [75, 75], both.text()
  step = stopped_at(both)
  ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
  try:
    again = pod.Pod(root / "output", *args, **how)
  finally:
    signal.signal(signal.SIGINT, ignored)
  again.wait_for(f"step {step + 3}/900")
  again.children[1].send_signal(signal.SIGINT)
  assert again.wait() == [75, 130], again.text()
  assert f"at step {step}\n" in again.text()
  whole = [x["step"] for x in pod.records(root / "stopped") if "loss" in x]
  assert whole == list(range(1, stopped_at(again) + 1))


@pytest.mark.one_day_in_six(1)
def test_a_missing_host_is_told_before_the_abort(root):
  args = pod.arguments("fixed", root / "text", root / "missing")
  join = [f"--coordinator={pod.LOOPBACK}:{pod.free_port()}", "--num_processes=2", "--process_id=0"]
  one = pod.Pod(root / "output", *args, *join, "--join_seconds=3")
  assert one.wait(timeout=120) == [-signal.SIGABRT]
  lines = one.text()
  assert "waiting up to 3 s for 2 processes at 127.0.0.1" in lines
  assert "Does every host run this command?" in lines and "--worker=all" in lines
  assert not (root / "missing").exists()
