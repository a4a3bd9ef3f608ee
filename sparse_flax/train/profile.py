"""An XProf trace of some steps of a run: what the devices did, kernel by kernel, and the host."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from collections.abc import Iterator

import jax
from etils import epath


def check(profile: range, steps: int) -> None:
  """Raises ValueError unless `profile` is empty or lies within the steps 1 to `steps` of a run."""
  if profile and not 1 <= profile.start < profile.stop <= steps + 1:
    raise ValueError(
      f"profile={profile.start}:{profile.stop}: must be START:STOP with 1 <= START < STOP <= "
      f"{steps + 1}, as the run has {steps} steps and STOP is not traced"
    )


class Profiler:
  """Traces steps into `profile/` of a run's folder; every process writes a trace of its own.

  With several processes each has a folder `process_N` there: JAX names a trace after the host and
  the second, which processes of one host share.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    steps: range,
    *,
    first: int,
    pause: Callable[[], contextlib.AbstractContextManager],
    say: Callable[[str], None],
  ):
    """Args:
    workdir: the run's folder.
    steps: which to trace, counted from 1; none where it is empty.
    first: how many steps were done before.
    pause: what happens inside of its result takes no time of the log's.
    say: takes the lines that a person shall read.
    """
    self._folder = epath.Path(workdir) / "profile"
    if jax.process_count() > 1:
      self._folder /= f"process_{jax.process_index()}"
    self._steps, self._pause, self._say = steps, pause, say
    self._local = ""
    self._running = self._failed = False
    if steps and first >= steps[-1]:
      say(f"no profile: step {steps[-1]:,} was done before, the run goes on after {first:,}")

  @contextlib.contextmanager
  def step(self, step: int, *, settle: Callable[[], None]) -> Iterator[None]:
    """Around the start of a step; `settle` waits until all that were started have ended."""
    if step in self._steps and not self._running:
      settle()
      with self._pause():
        self._start()
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield
    if self._running and step + 1 not in self._steps:
      settle()
      with self._pause():
        self._stop()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    """A run that ends among these steps has a trace of those that it took."""
    if self._running:
      self._stop()

  def _start(self) -> None:
    # JAX writes to folders of this machine only; the run's may be an object store's.
    self._local = tempfile.mkdtemp()
    self._running = True
    self._attempt(lambda: jax.profiler.start_trace(self._local))

  def _stop(self) -> None:
    if not self._failed and self._attempt(self._write):
      where = os.fspath(self._folder)
      self._say(
        f"PROFILE in {where}; to open it: pip install xprof; xprof --port=8791 {where}; then "
        "http://localhost:8791"
      )
    self._running = False

  def _write(self) -> None:
    jax.profiler.stop_trace()
    root = pathlib.Path(self._local)
    for path in filter(pathlib.Path.is_file, root.rglob("*")):
      copy = self._folder / path.relative_to(root).as_posix()
      copy.parent.mkdir(parents=True, exist_ok=True)
      copy.write_bytes(path.read_bytes())
    shutil.rmtree(root, ignore_errors=True)

  def _attempt(self, call: Callable[[], None]) -> bool:
    """Whether it succeeds. The run goes on without a profile: that is less than a run."""
    try:
      call()
    except Exception as error:  # whatever a profiler or a file system says
      self._failed = True
      self._say(f"no profile: {' '.join(f'{type(error).__name__}: {error}'.split())}")
    return not self._failed
