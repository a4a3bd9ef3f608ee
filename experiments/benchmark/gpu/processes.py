"""Programs of `steps`, each in a process of its own: one, or many that compile side by side."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

from experiments.benchmark.gpu.steps import child

ROOT = pathlib.Path(__file__).resolve().parents[3]
LIBRARIES = ("configs", "pallas_kernels", "sparse_flax")  # what is measured of a checkout
# Of JAX in a process that has the device to itself, but for what its parent holds.
MEMORY_ALONE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
# Where others compile or wait beside it, none may take what they need.
MEMORY_BESIDE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.85", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
SIDE_BY_SIDE = 8  # processes at once, each of which may hold a model's state


class Program(NamedTuple):
  """What a process runs.

  Attributes:
    name: of a module in `steps`.
    job: what it is given.
    checkout: whose libraries are measured; None: these.
  """

  name: str
  job: dict[str, Any]
  checkout: pathlib.Path | None = None


@contextlib.contextmanager
def packages(checkout: pathlib.Path | None) -> Iterator[str]:
  """The folder to import from: the libraries of a checkout, and the benchmark of this one."""
  if checkout is None:
    yield str(ROOT)
    return
  with tempfile.TemporaryDirectory(prefix="step-baseline-") as folder:
    for name in LIBRARIES:
      os.symlink(checkout.resolve() / name, os.path.join(folder, name))
    os.symlink(ROOT / "experiments", os.path.join(folder, "experiments"))
    yield folder


def told_by(
  program: Program,
  *,
  seconds: float,
  memory: dict[str, str] = MEMORY_ALONE,
  on_start: Callable[[subprocess.Popen], None] = lambda process: None,
) -> dict[str, Any]:
  """What a program tells, with an `error` where it did not come to its end.

  Args:
    program: what runs.
    seconds: after which it is killed.
    memory: JAX's variables of the environment for its share of the device.
    on_start: gets the process, for who may have to end it before.
  """
  name = f"experiments.benchmark.gpu.steps.{program.name}"
  command = (sys.executable, "-P", "-m", name, json.dumps(program.job))
  with packages(program.checkout) as path:
    env = {key: x for key, x in os.environ.items() if key != "XLA_PYTHON_CLIENT_PREALLOCATE"}
    env = memory | env | {"PYTHONPATH": os.pathsep.join((path, env.get("PYTHONPATH", "")))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    # A session of its own: compilers of PyTorch are processes too, and end with it.
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    on_start(process)
    try:
      output, errors = process.communicate(timeout=seconds)
      last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
      error = f"exit status {process.returncode}: {last.strip()}"[:1_000]
    except subprocess.TimeoutExpired:
      error = f"not done within {seconds} s"
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.returncode is None:
      output, errors = process.communicate()
  figures = child.told(output)
  return figures if process.returncode == 0 else {"error": error} | figures


class _Started:
  """Processes that a stop of this one ends."""

  def __init__(self):
    self.processes: list[subprocess.Popen] = []

  def __enter__(self) -> "_Started":
    return self

  def __exit__(self, *_: Any) -> None:
    for process in self.processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, signal.SIGKILL)


def told_in_turns(
  programs: dict[Hashable, Program], *, seconds: float
) -> Iterator[tuple[Hashable, dict[str, Any]]]:
  """Key and figures of each program, as they end: all compile side by side, and then take turns.

  Args:
    programs: those that know `child.Turn`.
    seconds: after which one is killed, the time that it waits for others included.
  """
  at_once = max(1, min(SIDE_BY_SIDE, len(programs), os.cpu_count() or 1))
  with (
    tempfile.TemporaryDirectory(prefix="turns-") as folder,
    concurrent.futures.ThreadPoolExecutor(at_once) as pool,
    _Started() as started,
  ):
    turn = os.path.join(folder, "turn")

    def figures_of(program: Program) -> dict[str, Any]:
      program = program._replace(job=program.job | dict(turn=turn))
      on_start = started.processes.append
      return told_by(program, seconds=seconds, memory=MEMORY_BESIDE, on_start=on_start)

    waiting = {pool.submit(figures_of, program): key for key, program in programs.items()}
    try:
      for done in concurrent.futures.as_completed(waiting):
        yield waiting[done], done.result()
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
