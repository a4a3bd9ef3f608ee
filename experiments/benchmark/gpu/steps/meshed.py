"""The step that `experiments.train` runs, on all devices of a mesh: losses, time, what crosses."""

import sys
from typing import Any

import jax

from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu import traffic
from experiments.benchmark.gpu import training
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import ours
from pallas_kernels import api

OF_NCCL = "nccl"  # part of the names of all kernels that move what crosses


def kernel_figures(kernels: list[tuple[str, float]], devices: int, step_ms: float) -> dict:
  """Of a device: ms of all kernels of a step, of those that move, and the share of these hidden.

  Kernels that run side by side have more time together than the step has.
  """
  total = sum(ms for _, ms in kernels) / devices
  moving = sum(ms for name, ms in kernels if OF_NCCL in name.lower()) / devices
  hidden = min(max(total - step_ms, 0.0), moving) / moving if moving else None
  figures = dict(kernel_ms=total, nccl_ms=moving, nccl_hidden=hidden)
  return {name: value and round(value, 3) for name, value in figures.items()}


def measure(job: dict[str, Any]) -> None:
  """Tells the figures of a step.

  Args:
    job: `recipe` and `changes`, of `ours.config_of`, `losses`, the number of first steps whose
      losses are told, and what `residual.override` is given.
  """
  config = ours.config_of(job["recipe"], job["changes"])
  made = training.prepare(config)
  with jax.set_mesh(made.mesh), ours.residual_by(job["residual"]):
    traced = made.step.trace(*made.shapes)
    program = traced.lower().compile()
    state, tokens, key = made.first_state(), made.tokens(), jax.random.key(1)
  child.tell(
    moved_gb={
      kind: round(x / 1e9, 6) for kind, x in traffic.bytes_moved(program.as_text()).items()
    },
    formula_gb={kind: round(x / 1e9, 6) for kind, x in traffic.formula(config).items()},
    blocks_by=", ".join(api.implementations_in(traced.jaxpr, "blocks")) or "modules",
  )

  def start() -> dict[str, jax.Array]:
    nonlocal state
    state, record = program(state, tokens, key)
    return record

  child.tell(losses=[float(start()["loss"]) for _ in range(job["losses"])])
  ms = child.median_ms(start, jax.block_until_ready)
  child.tell(ms=ms)
  if jax.default_backend() == "gpu":
    child.tell(**kernel_figures(timing.kernels_of(start), made.mesh.size, ms))


if __name__ == "__main__":
  sys.exit(child.main(measure))
