"""Runs of the training command in processes of their own, one or several, on the loopback only."""

import contextlib
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.helpers import tiny
from tests.helpers import tiny_config
from tests.helpers.paths import ROOT

CONFIG = ROOT / "tests" / "helpers" / "tiny_config.py"
LOOPBACK = "127.0.0.1"


class Pod:
  """Processes of one run; lines of all of them go to files that `text` reads."""

  def __init__(self, folder: pathlib.Path, *args, processes=1, devices=1, **environment):
    """Starts `python -m tests.helpers.pod_child ARGS` in each process.

    Args:
      folder: for the output; made if it is not there.
      args: the training command's.
      processes: of the run.
      devices: simulated ones of each process.
      environment: more variables for the children.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self.files = [folder / f"output{n}-{time.monotonic_ns()}" for n in range(processes)]
    variables = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_COMPILATION_CACHE_DIR": os.environ["TEST_CACHE"],  # of tests/conftest.py
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "PYTHONPATH": str(ROOT),
      **environment,
    }
    join = [f"--coordinator={LOOPBACK}:{free_port()}", f"--num_processes={processes}"]
    self.children = []
    for n, file in enumerate(self.files):
      own = [*join, f"--process_id={n}"] if processes > 1 else []
      command = [sys.executable, "-m", "tests.helpers.pod_child", *map(str, args), *own]
      with file.open("w") as output:
        self.children.append(
          subprocess.Popen(command, stdout=output, stderr=output, env=variables, cwd=ROOT)
        )

  def text(self) -> str:
    return "\n".join(file.read_text() for file in self.files)

  def wait_for(self, words: str, *, timeout: float = 240) -> None:
    """Until `words` are printed."""
    end = time.monotonic() + timeout
    while words not in self.text():
      assert self.children[0].poll() is None, f"ended before {words!r}:\n{self.text()}"
      assert time.monotonic() < end, f"no {words!r} after {timeout} s:\n{self.text()}"
      time.sleep(0.02)

  def wait(self, *, timeout: float = 300) -> list[int]:
    """The exit statuses."""
    try:
      return [child.wait(timeout) for child in self.children]
    finally:
      self.kill()

  def kill(self) -> None:
    for child in self.children:
      with contextlib.suppress(ProcessLookupError):
        child.kill()


def arguments(kind: str, text: pathlib.Path, workdir: pathlib.Path, **changes) -> list[str]:
  """Of a run of tests/helpers/tiny_config.py; changes are group__field=value."""
  changes = [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
  return [f"--config={CONFIG}:{kind},{text}", f"--workdir={workdir}", *changes]


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind((LOOPBACK, 0))
    return probe.getsockname()[1]


def records(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: pathlib.Path) -> list[float]:
  return [x["loss"] for x in records(workdir) if "loss" in x]


def weights(workdir: pathlib.Path) -> str:
  """SHA-256 of the whole newest state of a run of kind "fixed"."""
  state = tiny.restore(tiny_config.get_config("fixed,none"), workdir)
  leaves = sorted(tiny.leaf_bytes(state).items())
  return hashlib.sha256(b"".join(name.encode() + value for name, value in leaves)).hexdigest()
