"""The step that `experiments.train` runs, of these packages or of another checkout's.

Where another checkout is measured, `sparse_flax`, `pallas_kernels` and `configs` are its own and
may lie as they lay before these had rooms.
"""

import collections
import contextlib
import importlib
import re
import sys
import time
from typing import Any

import jax
import ml_collections

from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu import training
from experiments.benchmark.gpu.steps import child
from pallas_kernels import api

OTHERS = 16  # kernels of others that are told of
OUR_KERNELS = "mosaic"  # part of the names of all kernels in Mosaic, which XLA's own do not have


def config_of(recipe: str, changes: dict[str, dict[str, Any]]) -> ml_collections.ConfigDict:
  """The config NAME or NAME:VARIANT of the `configs` that is imported here, with changes."""
  name, _, variant = recipe.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(variant)
  for group, values in changes.items():
    config[group].update({field: _tuples(value) for field, value in values.items()})
  return config


def _tuples(value: Any) -> Any:
  """JSON has lists only."""
  if isinstance(value, dict):  # an inner level
    return {field: _tuples(x) for field, x in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def kernel_shares(kernels: list[tuple[str, float]]) -> dict[str, Any]:
  """Time of all kernels of a step, of ours and of the others by name; None where none ran.

  XLA numbers its kernels: those that differ in nothing else are summed, and the longest are told.
  """
  if not kernels:
    return dict(num_kernels=0, kernel_ms=None, ours_ms=None, ours_share=None, ours={}, others={})
  ours, others = collections.Counter(), collections.Counter()
  for name, ms in kernels:
    if OUR_KERNELS in name:
      ours[name] += ms
    else:
      others[re.sub(r"[_.]?\d+$", "", name)] += ms
  total = ours.total() + others.total()
  rounded = lambda pairs: {name: round(ms, 3) for name, ms in pairs}
  return dict(
    num_kernels=len(kernels),
    kernel_ms=round(total, 3),
    ours_ms=round(ours.total(), 3),
    ours_share=round(ours.total() / total, 4),
    ours=rounded(ours.most_common()),
    others=rounded(others.most_common(OTHERS)),
  )


def residual_by(implementation: str | None) -> contextlib.AbstractContextManager:
  """`residual.override`, of checkouts that have it; None leaves them as they are."""
  if implementation is None:
    return contextlib.nullcontext()
  return importlib.import_module("pallas_kernels.residual").override(implementation)


def measure(job: dict[str, Any]) -> None:
  """Tells the figures of a step.

  Args:
    job: `recipe` and `changes`, of `config_of`; what `residual.override` is given, if anything; and
      the file of `child.Turn`, if others are measured beside.
  """
  turn = child.Turn(job.get("turn"))
  with contextlib.suppress(ImportError):
    # Before the first trace: some commits count traces, and the import would end one of theirs.
    importlib.import_module("pallas_kernels.mosaic_gpu")
  begin = time.perf_counter()
  config = config_of(job["recipe"], job["changes"])
  made = training.prepare(config)
  with jax.set_mesh(made.mesh), residual_by(job.get("residual")):
    traced = made.step.trace(*made.shapes)
    program = traced.lower().compile()
    state, tokens, key = made.first_state(), made.tokens(), jax.random.key(1)
  child.tell(
    compile_s=round(time.perf_counter() - begin, 1),
    remat=config.model.remat,
    peak_gb=round(report.num_bytes(program) / 1e9, 6),
    temp_bytes=program.memory_analysis().temp_size_in_bytes,
  )
  # What is told here is later than some commits.
  if hasattr(api, "scopes_in"):
    level_in = importlib.import_module("sparse_flax.model").level_in
    child.tell(remat=level_in(traced.jaxpr))  # what "auto" is
  if implementations_in := getattr(api, "implementations_in", None):
    child.tell(attention_by=", ".join(implementations_in(traced.jaxpr)))
    with contextlib.suppress(TypeError):  # it told of attention alone
      child.tell(blocks_by=", ".join(implementations_in(traced.jaxpr, "blocks")) or "modules")

  def start() -> dict[str, jax.Array]:
    nonlocal state
    state, record = program(state, tokens, key)
    return record

  turn.alone()
  child.tell(ms=child.median_ms(start, jax.block_until_ready))
  child.tell(loss=float(start()["loss"]))
  if stats := jax.local_devices()[0].memory_stats():
    child.tell(in_use_gb=round(stats["peak_bytes_in_use"] / 1e9, 6))
  if jax.default_backend() == "gpu":
    child.tell(**kernel_shares(timing.kernels_of(start)))


if __name__ == "__main__":
  sys.exit(child.main(measure))
