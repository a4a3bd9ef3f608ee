"""Processes of the GPU benchmarks: whose libraries they have, their turns and their ends."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu.steps import child
from tests.helpers.paths import ROOT


def test_another_checkout_has_its_own_libraries_and_our_benchmark(tmp_path):
  for name in processes.LIBRARIES:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
  script = """
import configs, pallas_kernels, sparse_flax
import experiments.benchmark.gpu.steps.child
print(sparse_flax.__file__, experiments.__file__)
"""
  with processes.packages(tmp_path) as path:
    argv = [sys.executable, "-P", "-c", script]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    library, benchmark = map(os.path.realpath, done.stdout.split())
  assert not os.path.exists(path)
  assert library == str(tmp_path / "sparse_flax" / "__init__.py")
  assert benchmark == str(ROOT / "experiments" / "__init__.py")


def test_a_stop_ends_the_processes():
  with pytest.raises(KeyboardInterrupt), processes._Started() as started:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    started.processes.append(process)
    raise KeyboardInterrupt
  assert process.wait(timeout=10) == -signal.SIGKILL


def test_who_measures_waits_for_those_that_compile(tmp_path, monkeypatch):
  monkeypatch.setattr(child.signal, "alarm", lambda seconds: alarms.append(seconds))
  alarms, path = [], str(tmp_path / "turn")
  first, second = child.Turn(path), child.Turn(path)  # both compile
  locks = lambda: child.fcntl.flock(first._file, child.fcntl.LOCK_EX | child.fcntl.LOCK_NB)
  with pytest.raises(BlockingIOError):
    locks()
  second._file.close()  # as at the end of its process
  first.alone()
  assert alarms == [child.TURN]
  first._file.close()
  child.Turn(None).alone()
  assert len(alarms) == 1


def test_programs_share_a_turn_and_are_told_by_their_keys(monkeypatch):
  def told_by(program, *, seconds, memory, on_start):
    assert memory == processes.MEMORY_BESIDE and seconds == 5.0
    return dict(name=program.name, **program.job)

  monkeypatch.setattr(processes, "told_by", told_by)
  programs = {n: processes.Program("ours", dict(n=n)) for n in range(3)}
  told = dict(processes.told_in_turns(programs, seconds=5.0))
  assert {key: figures["n"] for key, figures in told.items()} == {0: 0, 1: 1, 2: 2}
  assert len({figures["turn"] for figures in told.values()}) == 1
  assert list(processes.told_in_turns({}, seconds=5.0)) == []
