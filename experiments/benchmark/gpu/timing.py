"""What the GPU benchmarks share: shapes, kernel times, worker processes, failures as rows.

Tracing and compiling our kernels keeps a process busy with one program at a time, so that programs
are compiled by many processes, and measured where they were compiled: one at a time, once all are.
"""

import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

ITERATIONS = 20
WORKERS = 14  # at most: each holds a CUDA context, and memory for one program; 0: this process
START_SECONDS = 180  # until a worker has imported JAX and found the GPU
COMPILE_SECONDS = 300  # of one program
MEASURE_SECONDS = 20  # of one program: a kernel that waits for itself never ends


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of q, k, v and the output, and what the patterns need."""

  B: int
  T: int
  H: int
  D: int
  stride: int
  width: int  # of a summary

  def arrays(self) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, [B, T, H, D] in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    size = (self.B, self.T, self.H, self.D)
    return tuple(jax.random.normal(key, size, jnp.bfloat16) for key in keys)


# The paper's four models, and a head of today.
SHAPES = {
  "enwik8": Shape(B=4, T=12_288, H=8, D=64, stride=128, width=32),
  "imagenet64": Shape(B=4, T=12_288, H=16, D=32, stride=128, width=8),
  "cifar10": Shape(B=16, T=3_072, H=2, D=128, stride=128, width=8),
  "audio64k": Shape(B=1, T=65_536, H=8, D=64, stride=256, width=32),
  "modern32k": Shape(B=1, T=32_768, H=16, D=128, stride=128, width=32),
}


def chosen(known, only: tuple[str, ...]) -> list[str]:
  """The names of `known` that `only` lists; all where it lists none of them."""
  return [name for name in known if name in only] or list(known)


def forward_alone(attend: Callable) -> Callable:
  """(q, k, v, dout) -> out: the arguments of `with_gradients`, the last of which jit drops."""
  return lambda q, k, v, dout: attend(q, k, v)


def with_gradients(attend: Callable) -> Callable:
  """(q, k, v, dout) -> out, dq, dk, dv: forward and backward of a public function, as used."""

  def both(q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)

  return both


def kernel_ms(program: jax.stages.Compiled, *args: jax.Array) -> tuple[float, list[str]]:
  """Median over `ITERATIONS` calls of the time of all their kernels, and the kernels' names.

  Times are CUPTI's: what the host does between kernels is not in them, nor are plain memory copies,
  which none of the programs measured here makes.
  """
  jax.block_until_ready(program(*args))
  calls = calls_of(lambda: program(*args), ITERATIONS)
  ms = statistics.median(sum(ms for _, ms in call) for call in calls)
  return ms, [name[:80] for name, _ in calls[0]]


def calls_of(call: Callable[[], Any], times: int) -> list[list[tuple[str, float]]]:
  """The kernels of each of so many equal calls, as `kernels_of`."""
  for _ in range(3):
    kernels = kernels_of(call, times)
    num = len(kernels) // times
    calls = [kernels[n : n + num] for n in range(0, len(kernels), num or 1)]
    names = {tuple(name for name, _ in each) for each in calls}
    if len(names) == 1 and len(calls) == times:
      return calls
  if not kernels:
    raise RuntimeError("CUPTI saw no kernel: is another profiler attached?")
  # A kernel of something else among ours: rare, and gone the next time.
  raise RuntimeError(f"{len(kernels)} kernels are not {times} equal calls, three times")


def kernels_of(call: Callable[[], Any], times: int = 1) -> list[tuple[str, float]]:
  """Name and ms of each kernel that so many calls run.

  As `profiler.measure`, which keeps the results of all calls: ten times the memory, and no worker
  gives back what it once had.
  """
  cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
  cupti._cupti_init()
  try:
    for _ in range(times):
      results = call()
    jax.block_until_ready(results)
  finally:
    kernels = cupti._cupti_get_timings(True)
  return kernels or []


def text(error: Exception) -> str:
  """One line for a table."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:400]


class Progress:
  """Prints a line for each of `total` results, with the time so far and an estimate of the rest."""

  def __init__(self, total: int):
    self.total, self.done, self.start = total, 0, time.perf_counter()

  def __call__(self, *words: Any) -> None:
    self.done += 1
    passed = time.perf_counter() - self.start
    left = passed / self.done * (self.total - self.done)
    words = ", ".join((f"{self.done} of {self.total}", *(str(word) for word in words)))
    print(f"{words}, {passed:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- jobs


class Job(NamedTuple):
  """A program to compile and to measure; it is sent to another process.

  Attributes:
    build: (*args) -> (function, make): what is compiled, and what makes its arguments. A function
      of a module, as is `look`.
    args: of `build`.
    cost: of compiling it, in any unit: workers get equal shares of it.
    look: tensor -> small array: what a measurement shall tell of each result.
    clock: (program, *arrays) -> figures: what measures it in the place of `kernel_ms`; `ms` and
      `kernels` are among them.
    alone: whether its process ends after it, and gives back the memory of the GPU.
  """

  build: Callable
  args: tuple
  cost: float = 1.0
  look: Callable | None = None
  clock: Callable | None = None
  alone: bool = False


class Measurement(NamedTuple):
  """Of a job: times, or an error.

  Attributes:
    ms: of the kernels of a call, together; None where there is an error.
    kernels: their names.
    seen: what `Job.look` gave of each result.
    error: one line.
    bytes: of the program, as XLA plans them: temp_bytes, argument_bytes and output_bytes.
    more: the other figures of `Job.clock`.
  """

  ms: float | None = None
  kernels: tuple[str, ...] = ()
  seen: tuple[np.ndarray, ...] = ()
  error: str | None = None
  bytes: dict[str, int] | None = None
  more: dict[str, Any] | None = None


class Programs:
  """The compiled jobs of one process."""

  def __init__(self):
    self.programs, self.helpers = {}, {}

  def compile(self, key: Hashable, job: Job) -> str | None:
    """Compiles all that a measurement runs; an error as one line."""
    try:
      function, make = job.build(*job.args)
      lowered = jax.jit(function).lower(*jax.eval_shape(make))  # no array is made yet
      results = jax.tree.leaves(lowered.out_info)
      looks = [self._helper(job.look, x) for x in results] if job.look else []
      self.programs[key] = lowered.compile(), self._helper(make), looks, job.clock
    except Exception as error:  # whatever a compiler says, the other programs go on
      return text(error)
    return None

  def measure(self, key: Hashable) -> Measurement:
    """Of a job that was compiled."""
    program, make, looks, clock = self.programs[key]
    try:
      arrays = make()
      results = jax.tree.leaves(program(*arrays)) if looks else []
      seen = tuple(np.asarray(look(x)) for look, x in zip(looks, results, strict=True))
      del results
      if clock:
        more = clock(program, *arrays)
        ms, kernels = more.pop("ms"), more.pop("kernels")
      else:
        more, (ms, kernels) = None, kernel_ms(program, *arrays)
      stats = program.memory_analysis()
    except Exception as error:  # one kernel that fails must not take the others' figures with it
      return Measurement(error=text(error))
    planned = dict(
      temp_bytes=stats.temp_size_in_bytes,
      argument_bytes=stats.argument_size_in_bytes,
      output_bytes=stats.output_size_in_bytes,
    )
    return Measurement(ms, tuple(kernels), seen, bytes=planned, more=more)

  def _helper(self, function: Callable, *args: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """A small program that many jobs share."""
    if (function, args) not in self.helpers:
      self.helpers[function, args] = jax.jit(function).lower(*args).compile()
    return self.helpers[function, args]


@contextlib.contextmanager
def measuring(jobs: dict[Hashable, Job]) -> Iterator[Callable[[Hashable], Measurement]]:
  """Compiles all jobs; gives what measures one of them, any number of times.

  Nothing else runs on the GPU then: compilers, which time kernels of their own, are done.
  """
  if WORKERS:
    workers = Workers(jobs)
    try:
      workers.start()
      yield workers.measure
    finally:
      workers.stop()
  else:
    programs = Programs()
    errors = {key: programs.compile(key, job) for key, job in jobs.items()}
    yield lambda key: Measurement(error=errors[key]) if errors[key] else programs.measure(key)


# ---------------------------------------------------------------------------------------- workers


def _work(connection, jobs: dict[Hashable, Job]) -> None:
  """A worker: says that it is there, compiles all, telling of each, and measures what is asked for.

  A measurement comes with whether this process can do another.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
  faulthandler.enable()
  programs = Programs()
  with contextlib.suppress(EOFError, OSError):  # the parent is gone
    connection.send(jax.default_backend())
    for key, job in jobs.items():
      connection.send((key, programs.compile(key, job)))
    usable = True
    while usable:
      key = connection.recv()
      measurement = programs.measure(key)
      usable = not jobs[key].alone and (measurement.error is None or _usable())
      connection.send((measurement, usable))
  os._exit(0)  # without JAX's farewell to a GPU that may not answer any more


def _usable() -> bool:
  """Whether the GPU still works for this process: not after an illegal access by a kernel."""
  try:
    jax.block_until_ready(jnp.zeros(8) + 1)
  except Exception:
    return False
  return True


class Died(Exception):
  """A worker that cannot go on, and why."""


class Worker:
  """A worker process, as its parent sees it."""

  def __init__(self, jobs: dict[Hashable, Job]):
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    self.jobs = jobs
    self.connection, other = context.Pipe()
    self.process = context.Process(target=_work, args=(other, jobs), daemon=True)
    self.process.start()
    other.close()

  def answer(self, seconds: float) -> Any:
    """Its next message."""
    try:
      if self.connection.poll(seconds):
        return self.connection.recv()
    except (EOFError, OSError):
      self.process.join(10)
      raise Died(f"its process ended with exit code {self.process.exitcode}") from None
    raise Died(f"no answer within {seconds} s")

  def measure(self, key: Hashable) -> tuple[Measurement, bool]:
    """And whether it can do another."""
    with contextlib.suppress(OSError):  # it is dead: so says its answer
      self.connection.send(key)
    return self.answer(MEASURE_SECONDS)

  def stop(self) -> None:
    self.process.kill()
    self.process.join(30)
    self.connection.close()


class Workers:
  """All jobs in worker processes. One that dies costs the job that it was at.

  What else it had is compiled again by a new one, once that is asked for.
  """

  def __init__(self, jobs: dict[Hashable, Job]):
    self.jobs = jobs
    self.share_of = _shares(jobs, max(1, min(len(jobs), os.cpu_count() - 1, WORKERS)))
    self.workers: dict[int, Worker] = {}  # of each share of the jobs
    self.measured: set[Hashable] = set()
    self.errors: dict[Hashable, str] = {}

  def start(self) -> None:
    """Returns when all is compiled."""
    # Of the processes to come: JAX would give most of the GPU's memory to the first.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    begin, shares = time.perf_counter(), set(self.share_of.values())
    what = f"{len(self.jobs)} programs in {len(shares)} processes"
    print(f"compiling {what}", file=sys.stderr, flush=True)
    for share in shares:
      self._begin(share)
    for share in shares:
      self._compile(share)
    seconds = time.perf_counter() - begin
    print(f"compiled {what}, {seconds:.0f} s", file=sys.stderr, flush=True)

  def measure(self, key: Hashable) -> Measurement:
    share = self.share_of[key]
    if key not in self.errors and not (share in self.workers and key in self.workers[share].jobs):
      self._end(share)
      self._begin(share, again=key)
      self._compile(share, again=key)
    if key in self.errors:
      return Measurement(error=self.errors[key])
    try:
      measurement, usable = self.workers[share].measure(key)
    except Died as death:
      self.errors[key] = text(death)
      measurement, usable = Measurement(error=self.errors[key]), False
    self.measured.add(key)
    if not usable:
      self._end(share)
    return measurement

  def stop(self) -> None:
    for worker in self.workers.values():
      worker.process.kill()  # all at once: a driver takes its time
    for share in tuple(self.workers):
      self._end(share)

  def _begin(self, share: int, again: Hashable = None) -> None:
    """A process for what is yet to be measured of a share, and for `again`."""
    done = (self.measured | set(self.errors)) - {again}
    unfinished = (key for key in self.jobs if self.share_of[key] == share and key not in done)
    if jobs := {key: self.jobs[key] for key in unfinished}:
      self.workers[share] = Worker(jobs)

  def _compile(self, share: int, again: Hashable = None) -> None:
    """Waits for the programs of a share; where its process dies, for a new one without that job."""
    while share in self.workers:
      worker = self.workers[share]
      waiting = lost = list(worker.jobs)  # all are lost if it does not even begin
      try:
        if (backend := worker.answer(START_SECONDS)) != jax.default_backend():
          raise Died(f"JAX runs on {backend!r} there, not on {jax.default_backend()!r}")
        while waiting:
          lost = waiting[:1]
          key, error = worker.answer(COMPILE_SECONDS)
          waiting.remove(key)
          if error:
            self.errors[key] = error
        return
      except Died as death:
        self.errors |= dict.fromkeys(lost, text(death))
        self._end(share)
        self._begin(share, again=None if again in lost else again)

  def _end(self, share: int) -> None:
    if share in self.workers:
      self.workers.pop(share).stop()


def _shares(jobs: dict[Hashable, Job], num: int) -> dict[Hashable, int]:
  """Whose job each is, of `num`: the costliest first, each to the one with the least to do."""
  load, share_of = [0.0] * num, {}
  for key in sorted(jobs, key=lambda key: -jobs[key].cost):
    share_of[key] = load.index(min(load))
    load[share_of[key]] += jobs[key].cost
  return share_of
