"""Ends a process that stands still: a collective whose partner is gone waits for ever."""

import faulthandler
import sys
import threading
import time
from typing import TextIO


class Watchdog:
  """Prints all stacks after `report_after` seconds without a beat, and ends with status 1 at last.

  The end comes from a thread of C that needs no interpreter lock, so that nothing can keep it.

  Used as a context; outside of it nothing is watched.
  """

  def __init__(self, *, report_after: int | float = 0, end_after: int | float = 0):
    """Args:
    report_after: seconds; 0 never.
    end_after: seconds; 0 never.
    """
    self._report_after, self._end_after = report_after, end_after
    self._limit, self._last = 0.0, 0.0
    self._stop = threading.Event()
    self._thread = None

  def beat(self, *, patience: int | float = 1) -> None:
    """Something has happened; the next may take `patience` times as long (compilation, saving)."""
    if self._thread is None:
      return
    self._last, self._limit = time.monotonic(), self._report_after * patience
    if self._end_after:
      faulthandler.dump_traceback_later(self._end_after * patience, exit=True, file=_stderr())

  def __enter__(self) -> "Watchdog":
    if self._report_after or self._end_after:
      self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
      self.beat()
      self._thread.start()
    return self

  def __exit__(self, *error) -> None:
    if self._thread is not None:
      self._stop.set()
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    reported = None  # the beat after which stacks were printed
    while not self._stop.wait(min(1.0, self._report_after / 4 or 1.0)):
      last, limit = self._last, self._limit
      seconds = time.monotonic() - last
      if limit and seconds > limit and last != reported:
        reported = last
        print(f"NO STEP for {seconds:.0f} s; all stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(_stderr(), all_threads=True)


def _stderr() -> TextIO | int:
  """The process's own, whatever a program has put in its place; by number where Python has none."""
  return sys.__stderr__ or 2
