"""What the GPU benchmarks share: shapes, kernel times, parallel compilation, failures as rows."""

import concurrent.futures
import dataclasses
import os
import statistics
from collections.abc import Callable
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

ITERATIONS = 20


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


def with_gradients(attend: Callable) -> Callable:
  """(q, k, v, dout) -> out, dq, dk, dv: forward and backward of a public function, as used."""

  def both(q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)

  return both


def compile_all(jobs: dict[Hashable, Callable]) -> dict[Hashable, jax.stages.Compiled | Exception]:
  """Runs the jobs, each of which compiles a program, in threads; what one raises is its result."""

  def attempt(job):
    try:
      return job()
    except Exception as error:  # whatever a compiler says, the other programs go on
      return error

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))


def working(program: jax.stages.Compiled | Exception) -> jax.stages.Compiled:
  """A result of `compile_all`, raised here if it is an error."""
  if isinstance(program, Exception):
    raise program
  return program


def compiler(function: Callable, *args: jax.Array) -> Callable[[], jax.stages.Compiled]:
  """The job of compiling `function` for arguments like these."""
  return lambda: jax.jit(function).lower(*args).compile()


def kernel_ms(program: jax.stages.Compiled, *args: jax.Array) -> tuple[float, list[str]]:
  """Median over `ITERATIONS` calls of the time of all their kernels, and the kernels' names.

  Times are CUPTI's: what the host does between kernels is not in them, nor are plain memory copies,
  which none of the programs measured here makes.
  """
  for last in (False, False, True):
    try:
      _, calls = profiler.measure(program, aggregate=False, iterations=ITERATIONS)(*args)
      break
    except RuntimeError as error:
      # A kernel of something else among ours: rare, and gone the next time.
      if last or not any(words in str(error) for words in ("kernel launches", "Kernel names")):
        raise
  if not calls:
    raise RuntimeError("CUPTI saw no kernel: is another profiler attached?")
  ms = statistics.median(sum(ms for _, ms in kernels) for kernels in calls)
  return ms, [name[:80] for name, _ in calls[0]]


def text(error: Exception) -> str:
  """One line for a table."""
  return " ".join(f"{type(error).__name__}: {error}".split())[:400]
