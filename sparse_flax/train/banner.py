"""Lines of the log that say what a run is: before its first step, and when a stage begins."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from pallas_kernels import api
from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax import run
from sparse_flax.model import levels
from sparse_flax.train import flops
from sparse_flax.train import metrics
from sparse_flax.train import optim
from sparse_flax.train import step as step_lib

_OTHER_MASKS = "other masks from here on than those of the version that saved step"


def opening(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoints: run.Checkpoints,
  newest: tuple[dict, int] | None,
  *,
  planned: int | None,
  params: dict,
  splits: dict[str, data.Dataset],
  mesh: jax.sharding.Mesh,
) -> Iterator[str]:
  """Where a run begins, and what it is.

  Args:
    config: of the run.
    workdir: its folder.
    checkpoints: in it.
    newest: the state that the run goes on with, and its step; None: it begins.
    planned: `train.steps` of the command before; None: there was none.
    params: the weights, or their shapes.
    splits: the data by their names.
    mesh: of devices.
  """
  yield f"RESUMING {workdir} at step {newest[1]:,}" if newest else f"FRESH RUN in {workdir}"
  yield from _differences(config, workdir, checkpoints, newest, planned=planned)
  yield _table(config, workdir, params=params, splits=splits, mesh=mesh)


def computed(jaxpr: Any) -> str:
  """Which implementations compute a step, and what its forward pass keeps."""
  parts = ((of, api.implementations_in(jaxpr, of)) for of in ("attention", "blocks"))
  by_part = [f"{of} by {', '.join(names)}" for of, names in parts if names]
  kept = f"remat {model_lib.level_in(jaxpr)}"
  return f"  {'computed':<11}{', '.join((*by_part, kept))}"


def stage_begins(stage: int | str | None, step: int) -> str:
  """What layers that choose read from this step on."""
  read = "all blocks" if stage == "dense" else f"{stage} blocks of keys for each list"
  return f"  {'stage':<11}{read} from step {step:,} on"


def _differences(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoints: run.Checkpoints,
  newest: tuple[dict, int] | None,
  *,
  planned: int | None,
) -> Iterator[str]:
  """Lines of what is not as in a run that begins with random weights and ends as planned."""
  if begun := run.begun_from(workdir):
    yield f"  {'begun':<11}{run.told(begun)}"
  if newest is None:
    return
  state, first = newest
  if not checkpoints.same_dropout(first, config.model.dropout, config.model.embed_dropout):
    yield f"  {'dropout':<11}{_OTHER_MASKS} {first:,}"
  if planned is not None and planned != config.train.steps:
    yield f"  {'extended':<11}{_extended(config, planned, state)}"


def _extended(config: ml_collections.ConfigDict, planned: int, state: dict) -> str:
  """What more steps than were planned make of the learning rate of the next one."""
  before = ml_collections.ConfigDict(config.to_dict())
  before.train.steps = planned
  update = int(optim.updates_done(state["opt"]))  # what follows each process computes by itself
  rates = [float(step_lib.optimizer_of(x)[1](update)) for x in (before, config)]
  steps = f"from {planned:,} to {config.train.steps:,} steps"
  return f"{steps}; the learning rate goes from {rates[0]:.3g} to {rates[1]:.3g}"


def _table(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  params: dict,
  splits: dict[str, data.Dataset],
  mesh: jax.sharding.Mesh,
) -> str:
  """What is about to run, on what, and where its files go."""
  model, size = config.model, config.data.batch_size
  step_flops = flops.train_flops(model, batch_size=size)
  axes = " x ".join(f"{name} {length}" for name, length in mesh.shape.items() if length > 1)
  layers = ", ".join(map(str, model.attention_layers))
  found = levels.specs_of(**model)
  shape = f"{model.num_layers} layers of width {model.width}, attention {layers}"
  shape = shape if len(found) == 1 else f"{len(found)} levels"
  lines = {
    "model": f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, "
    f"{shape}, {model.compute_dtype}",
    **_by_level(model, found),
    "step": f"{size * model.seq_len:,} tokens ({size} sequences of {model.seq_len:,}), "
    f"{metrics.short(step_flops)} FLOP",
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes or 'of one'}",
    **{
      split: f"{dataset.name} {dataset.identity['version']}, {dataset.num_bytes:,} bytes, "
      f"{dataset.identity['digest'][:19]}"
      for split, dataset in splits.items()
    },
    "data": "; ".join(dict.fromkeys(dataset.remark for dataset in splits.values())),
    "files": f"{workdir}: metrics.jsonl, tensorboard/, checkpoints/",
  }
  return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())


def _by_level(model: ml_collections.ConfigDict, found: Sequence[levels.Spec]) -> dict[str, str]:
  """A line for each level of a model that has several."""
  lines, total = {}, flops.forward_flops(model)
  for n, (level, cost) in enumerate(zip(found, flops.level_flops(model), strict=True)):
    layers = f"{level.num_layers} + {level.num_layers_after}" if n + 1 < len(found) else level.depth
    lines[f"level {n}"] = (
      f"{layers} layers of width {level.width}, {level.factor} "
      f"{'token' if level.factor == 1 else 'tokens'} a row, attention "
      f"{', '.join(map(str, level.attention_layers))}, {cost / total:.0%} of the FLOP"
    )
  return lines if len(found) > 1 else {}
