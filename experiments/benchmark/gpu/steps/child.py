"""What the programs that measure a step share: what they are given, what they tell, the clock.

Imports nothing but Python's own, for a peer may run where there is no JAX.
"""

import fcntl
import json
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

MARK = "FIGURES "  # at the start of a line that is for the parent, among whatever libraries print
WARM, STEPS = 3, 8  # steps before those that are timed, and these
TURN = 90  # seconds to measure, where others wait
SECONDS = 12.0  # of timed steps: slow ones are fewer, but at least 3


def main(measure: Callable[[dict], None]) -> int:
  """Runs `measure` on the JSON of the command line; what it raises is told in one line."""
  try:
    measure(json.loads(sys.argv[1]))
  except Exception as error:  # whatever a compiler says, the parent's table has a row for it
    traceback.print_exc()
    tell(error=text(error))
    return 1
  return 0


class Turn:
  """A process compiles beside others, and then has the device and the host to itself.

  A shared lock of a file while it compiles, an exclusive one from then to its end.
  """

  def __init__(self, path: str | None):
    """Args:
    path: of the file; None: there are no others.
    """
    # Closed, and so unlocked, when the process ends.
    self._file = path and open(path, "a")  # noqa: SIM115
    if self._file:
      fcntl.flock(self._file, fcntl.LOCK_SH)

  def alone(self) -> None:
    """Waits until nobody compiles or measures; from then on the process has `TURN` seconds."""
    if self._file:
      fcntl.flock(self._file, fcntl.LOCK_EX)
      signal.alarm(TURN)  # ends the process, so that one that hangs does not keep the others


def tell(**figures: Any) -> None:
  """Hands figures to the parent; what was told before is not lost if the process dies later."""
  print(f"{MARK}{json.dumps(figures)}", flush=True)


def told(output: str) -> dict[str, Any]:
  """All that a process told; of a line that was cut off nothing."""
  figures = {}
  for line in output.splitlines():
    if line.startswith(MARK) and line.endswith("}"):
      figures |= json.loads(line.removeprefix(MARK))
  return figures


def text(error: Exception) -> str:
  """One line for a table."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:1_000]


def median_ms(start: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
  """Median time from the end of a step to the end of the next.

  As in training, the next step is started before the last one is waited for: the device does not
  stand still while the host prepares.

  Args:
    start: starts a step; its result stands for the step.
    wait: returns when a step is done.
  """
  ends, running = [], start()
  while len(ends) <= WARM + STEPS:
    following = start()
    wait(running)
    ends.append(time.perf_counter())
    running = following
    if len(ends) > WARM + 3 and ends[-1] - ends[WARM] > SECONDS:
      break
  wait(running)
  times = [after - before for before, after in zip(ends[WARM:], ends[WARM + 1 :], strict=False)]
  return round(1e3 * statistics.median(times), 3)
