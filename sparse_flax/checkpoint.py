"""A run's folder: its config, the identity of its data, and Orbax checkpoints of its state."""

import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from etils import epath
from flax import nnx

from sparse_flax import transformer
from sparse_flax import validate

METRIC = "bits_per_byte"  # of the validation split: what "best" means


class Checkpoints:
  """Saves and restores the state of a run: params, ema, opt, step, ... as plain trees.

  Kept are the two newest steps and the best one. Saving goes on in the background; leaving the
  `with` block waits for it.
  """

  def __init__(self, workdir: epath.PathLike, *, read_only: bool = False):
    import orbax.checkpoint as ocp  # slow to import, and errors in flags should come fast

    policies = ocp.checkpoint_managers
    best = policies.BestN(
      n=1,
      get_metric_fn=lambda metrics: metrics[METRIC],
      reverse=True,
      keep_checkpoints_without_metrics=False,
    )
    self._args = ocp.args
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).resolve() / "checkpoints",
      options=ocp.CheckpointManagerOptions(
        # Orbax has a read_only of its own, which warns about itself on stderr.
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        save_root_metadata=not read_only,
        # Without it Orbax does not write the metrics.
        best_fn=lambda metrics: metrics[METRIC],
        best_mode="min",
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
      ),
      # The averages lie apart: evaluation and sampling read nothing else.
      item_names=("state", "ema"),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: dict, *, bits_per_byte: float | None = None) -> None:
    """Saves `state` under state["step"], with the validation result where there is one."""
    rest = {name: value for name, value in state.items() if name != "ema"}
    save = self._args.StandardSave
    self._manager.save(
      int(state["step"]),
      args=self._args.Composite(state=save(rest), ema=save(state["ema"])),
      metrics=None if bits_per_byte is None else {METRIC: bits_per_byte},
      force=True,
    )

  def restore(self, step: int, shapes: dict) -> dict:
    """The state saved at `step`.

    Args:
      step: a step that was saved.
      shapes: the state as jax.ShapeDtypeStruct with shardings: where each leaf shall lie.
    """
    rest = {name: value for name, value in shapes.items() if name != "ema"}
    items = self._restore(step, state=rest, ema=shapes["ema"])
    return {**items.state, "ema": items.ema}

  def restore_ema(self, step: int | None, shapes: dict) -> tuple[dict, int]:
    """The averaged weights of `step` (None: the newest), and that step.

    Raises:
      ValueError: no such checkpoint; the message lists those there are.
    """
    steps = sorted(self._manager.all_steps())
    step = steps[-1] if step is None and steps else step
    if step not in steps:
      raise ValueError(f"step={step}: no checkpoint of it in {self._manager.directory}: {steps}")
    return self._restore(step, ema=shapes).ema, step

  def _restore(self, step: int, **items: dict) -> Any:
    items = {name: self._args.StandardRestore(shapes) for name, shapes in items.items()}
    return self._manager.restore(step, args=self._args.Composite(**items))


def latest_step(workdir: epath.PathLike) -> int | None:
  """The newest saved step of a run; None if there is none."""
  if not (epath.Path(workdir) / "checkpoints").is_dir():
    return None
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.latest_step()


def abstract(make: Callable, *args, sharding: jax.sharding.Sharding) -> Any:
  """The shapes of make(*args), each leaf to lie on `sharding`; nothing is computed."""
  shapes = jax.eval_shape(make, *args)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def restore_params(
  workdir: epath.PathLike, step: int | None = None
) -> tuple[ml_collections.ConfigDict, nnx.GraphDef, dict, int]:
  """What evaluation, samples and pictures need of a run.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None is the newest.

  Returns:
    The run's config, the model's graph, its averaged weights for nnx.merge(graph, weights), and
    the step they are of.

  Raises:
    ValueError: the folder is not that of a run, or there is no such checkpoint.
  """
  config = load_config(workdir)
  build = lambda: transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(config.seed))
  graphdef, params = nnx.split(nnx.eval_shape(build), nnx.Param)
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = abstract(lambda: nnx.to_pure_dict(params), sharding=sharding)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    ema, step = checkpoints.restore_ema(step, shapes)
  return config, graphdef, ema, step


def load_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that a run was started with.

  Raises:
    ValueError: there is none, or it is not one that this version can read.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir}: has no config.json, so it is not the folder of a training run")
  try:
    values = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}: is not valid JSON: {error}") from error
  config = ml_collections.ConfigDict(_with_tuples(values)).lock()
  problems = validate.validate_fields(config)
  if problems:
    raise ValueError("\n".join([f"{path}: is not a config of this version", *problems]))
  return config


def check_workdir(
  workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict | None = None
) -> None:
  """Makes sure that a run in `workdir`, if any, has this config and these data; writes nothing.

  Args:
    workdir: the run's folder, which need not exist.
    config: of the command given now.
    data: {split: identity} of the data opened now; None before they are.

  Raises:
    ValueError: one line per difference, `field: old -> new`.
  """
  for name, now in (("config", config.to_dict()), ("data", data)):
    path = epath.Path(workdir) / f"{name}.json"
    if now is None or not path.exists():
      continue
    old, new = (validate.flatten(json.loads(text)) for text in (path.read_text(), _dump(now)))
    lines = [
      f"  {name}.{field}: {old.get(field, 'absent')!r} -> {new.get(field, 'absent')!r}"
      for field in sorted(old.keys() | new.keys())
      if field not in old or field not in new or old[field] != new[field]
    ]
    if lines:
      what = "another config" if name == "config" else "other data"
      head = f"{workdir}: this run was started with {what}; choose another --workdir\n"
      raise ValueError(head + "\n".join(lines))


def start_workdir(
  workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict
) -> None:
  """Makes the folder of a run with `config.json` and `data.json`, each whole or not at all."""
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  for name, values in (("data", data), ("config", config.to_dict())):
    temporary = workdir / f"{name}.json.tmp"
    temporary.write_text(_dump(values))
    temporary.replace(workdir / f"{name}.json")


def _dump(values: dict) -> str:
  return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _with_tuples(values: Any) -> Any:
  """JSON has no tuples, and patterns have to be hashable."""
  if isinstance(values, dict):
    return {name: _with_tuples(value) for name, value in values.items()}
  if isinstance(values, list):
    return tuple(_with_tuples(value) for value in values)
  return values
