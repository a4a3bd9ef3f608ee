"""Weights that a run begins with, where they are not random: of another run, or of an export."""

import functools
import os
import re
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from etils import epath

from sparse_flax import export
from sparse_flax import run
from sparse_flax.parallel import sharding

Cycles = list[tuple[int, ...]]


def load(
  init_from: str | os.PathLike,
  config: ml_collections.ConfigDict,
  *,
  shapes: dict,
  mesh: jax.sharding.Mesh,
  recorded: dict | None = None,
  say: Callable[[str], None] = print,
) -> tuple[dict, dict]:
  """Reads the weights of an export, or the averaged ones of a run, for another model.

  Layers count in the order in which they run, so the cycle of patterns may be another one.

  Args:
    init_from: the folder of an export, or of a run.
    config: of the run that begins.
    shapes: of its weights, with their shardings.
    mesh: of its devices.
    recorded: of a run that has begun before, but has saved nothing: the same weights are needed.
    say: takes a line for each checkpoint of the other run that is refused.

  Returns:
    The weights as the new model has them, in the dtype in which they were kept, and what
    `run.begun_from` shall give of them.

  Raises:
    ValueError: the folder is neither; a line for each weight that is missing, is not in the new
      model or has another shape; or they are not those that were recorded.
    run.DamagedError: they are not what was saved.
  """
  folder = epath.Path(init_from)
  if (folder / export.MODEL).exists():
    found = export.read(folder)
    source, params, step, averaged = found.config, found.params, found.step, found.averaged
    where = sharding.by_rules(params, mesh)
    params = jax.tree.map(_placed, params, where)
  elif run.latest_step(folder) is not None:
    step = recorded["step"] if recorded else None
    source, _, params, step = run.restore_params(folder, step, mesh=mesh, say=say)
    averaged = source.train.ema_decay > 0
  else:
    raise ValueError(
      f"init_from={os.fspath(init_from)}: must be the folder of an export, or of a run that has a "
      "checkpoint"
    )
  cycles = [export.cycles_of(x.model) for x in (source, config)]
  if problems := _misfits(params, shapes, cycles):
    head = f"init_from={os.fspath(init_from)}: its weights do not fit the model of this config"
    raise ValueError("\n".join([head, *(f"  {line}" for line in problems)]))
  record = {
    "from": os.fspath(init_from),
    "step": step,
    "averaged": averaged,
    "sha256": run.digest.of_json(run.digest.digests(params)),
  }
  if recorded and record["sha256"] != recorded["sha256"]:
    raise ValueError(
      f"init_from={os.fspath(init_from)}: holds other weights than those that the run began with"
    )
  if cycles[0] != cycles[1]:
    params = jax.jit(functools.partial(_in_cycles, shapes=shapes, cycles=cycles))(params)
  return params, record


def _placed(x: jax.Array, where: jax.NamedSharding) -> jax.Array:
  """An array that every process holds whole, on the devices of all."""
  values = np.asarray(x)
  return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def _in_cycles(params: dict, *, shapes: dict, cycles: Cycles) -> dict:
  old, new = cycles
  return export.unflatten(export.flatten(params, cycle=old), shapes, cycle=new)


def _misfits(params: dict, shapes: dict, cycles: Cycles) -> list[str]:
  """A line for each weight that does not fit; layers with the same trouble have one in common."""
  old, new = (
    jax.eval_shape(functools.partial(export.flatten, cycle=cycle), tree)
    for tree, cycle in zip((params, shapes), cycles, strict=True)
  )
  others, layers = [], {}  # (stack, name in a layer, trouble) -> numbers of layers
  for name in [*new, *(name for name in old if name not in new)]:
    if name not in old:
      trouble = "is missing"
    elif name not in new:
      trouble = "is not in this model"
    elif old[name].shape != new[name].shape:
      trouble = f"is {list(old[name].shape)}, must be {list(new[name].shape)}"
    else:
      continue
    if match := re.fullmatch(r"(.*?)(layers|before|after)\.(\d+)\.(.*)", name):
      level, stack, number, suffix = match.groups()
      layers.setdefault((level + stack, suffix, trouble), []).append(int(number))
    else:
      others.append(f"{name} {trouble}")
  return others + [
    f"{stack}.{_ranges(numbers)}.{name} {trouble}"
    for (stack, name, trouble), numbers in layers.items()
  ]


def _ranges(numbers: list[int]) -> str:
  """Rising numbers, in short.

  >>> _ranges([0, 1, 2, 5])
  '0-2,5'
  """
  parts: list[list[int]] = []
  for n in numbers:
    if parts and n == parts[-1][-1] + 1:
      parts[-1].append(n)
    else:
      parts.append([n])
  return ",".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else f"{x[0]}" for x in parts)
