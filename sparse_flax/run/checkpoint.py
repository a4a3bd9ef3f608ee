"""Orbax checkpoints of a run's state, with digests: what comes back is what was saved, or nothing.

Orbax writes a step whole or not at all, but does not notice when bits change later. Each step
therefore carries `about`: a digest of every array, the validation result, a digest of config.json,
and a digest of all that. Restoring checks them and falls back to the newest step that is sound.
"""

import contextlib
import dataclasses
import gc
import itertools
import math
import sys
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from pallas_kernels.residual import dropout
from sparse_flax import model as model_lib
from sparse_flax.parallel import sharding
from sparse_flax.run import digest
from sparse_flax.run import errors
from sparse_flax.run import workdir as workdir_lib

# What TensorStore says when storage cannot be reached; a step is not damaged by that.
_OUTAGES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
_DAMAGED = "checkpoints-damaged"  # where steps that were refused are moved to, beside checkpoints/


class Checkpoints:
  """Saves and restores the state of a run: params, ema if any, opt, step, ... as plain trees.

  Kept are the two newest steps, the best one, and every `keep_every` steps. Saving goes on in the
  background; leaving the `with` block waits for it. All processes of a run make the same calls.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    keep_every: int = 0,
    read_only: bool = False,
    say: Callable[[str], None] = print,
  ):
    """Args:
    workdir: the run's folder; checkpoints have to be of the config.json that lies there.
    keep_every: steps; 0 keeps none for being a multiple.
    read_only: nothing is written, made or moved.
    say: takes a line for each step that is refused.
    """
    import orbax.checkpoint as ocp  # slow to import, and errors in flags should come fast

    self._ocp, self._read_only, self._say = ocp, read_only, say
    self._workdir = epath.Path(workdir).resolve()
    self._directory = self._workdir / "checkpoints"
    config = self._workdir / "config.json"
    self._config_digest = None
    if config.exists():
      self._config_digest = workdir_lib.config_digest(config.read_text())
    self._bits_per_byte = {}  # step -> of the validation split
    policies = ocp.checkpoint_managers
    preserved = [policies.LatestN(2), _Best(self._bits_per_byte)]
    preserved += [policies.EveryNSteps(keep_every)] if keep_every else []
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        # Orbax has a read_only of its own, which warns about itself on stderr.
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        save_root_metadata=not read_only,
        preservation_policy=policies.AnyPreservationPolicy(preserved),
      ),
      # The averages lie apart: evaluation and sampling read nothing else.
      item_names=("state", "ema", "about"),
    )
    if not read_only:
      for step in self._manager.all_steps():
        about, _ = self._about(step)
        self._bits_per_byte[step] = about.get("bits_per_byte")

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *error) -> None:
    try:
      self._manager.close()
    except Exception as failure:
      if kind is None:
        raise self._storage_error(failure) from failure

  def steps(self) -> list[int]:
    """All saved steps, the newest last."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def same_dropout(self, step: int, *rates: float) -> bool:
    """Whether the masks of the steps after `step` are those that its own program would draw."""
    version = self._about(step)[0].get("dropout", 1)  # 1 is not written down
    return all(dropout.same_masks(version, rate) for rate in rates)

  def reached_preemption(self, step: int) -> bool:
    """Whether a process was told to end, and all have agreed on this step to save and stop at."""
    return self._manager.reached_preemption(step)

  def save(self, state: dict, *, bits_per_byte: float | None = None) -> None:
    """Saves `state` under state["step"], with the validation result where there is one.

    Raises:
      errors.StorageError: this one, or the one before, could not be written.
    """
    step = int(state["step"])
    if bits_per_byte is not None and not math.isfinite(bits_per_byte):
      bits_per_byte = None  # no result that could be the best
    without_ema = {name: value for name, value in state.items() if name != "ema"}
    about = {
      "step": step,
      "digests": digest.digests(state),
      "bits_per_byte": bits_per_byte,
      "config": self._config_digest,
      "dropout": dropout.VERSION,
    }
    about["sha256"] = digest.of_json(about)
    self._bits_per_byte[step] = bits_per_byte
    args = self._ocp.args
    items = {"state": args.StandardSave(without_ema)}
    if "ema" in state:
      items["ema"] = args.StandardSave(state["ema"])
    try:
      self._manager.save(step, args=args.Composite(**items, about=args.JsonSave(about)), force=True)
    except Exception as error:
      raise self._storage_error(error) from error

  def wait(self) -> None:
    """Returns when everything is on the disk.

    Raises:
      errors.StorageError: it could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._storage_error(error) from error

  def restore(self, step: int, shapes: dict) -> dict:
    """The state saved at `step`.

    Args:
      step: a step that was saved.
      shapes: the state as jax.ShapeDtypeStruct with shardings: where each leaf shall lie. With
        "ema" or "params" alone nothing else is read. A leaf that was saved in a narrower dtype, as
        averages of bfloat16 weights once were, is widened.

    Raises:
      ValueError: no such step; the message lists those there are.
      errors.DamagedError: it is not what was saved; the message names what.
    """
    if step not in self.steps():
      raise ValueError(f"step={step}: no checkpoint of it in {self._directory}: {self.steps()}")
    state, problems = self._restore(step, shapes)
    if problems:
      raise errors.DamagedError(_refusal(self._directory / str(step), problems))
    return state

  def restore_newest(self, shapes: dict) -> tuple[dict, int] | None:
    """The state of the newest sound step, and that step; None where nothing was ever saved.

    Steps that are refused are named through `say` and, unless this is read-only, moved aside.

    Raises:
      errors.DamagedError: there are steps, but none is sound.
    """
    refused, lines = [], []
    for step in reversed(self.steps()):
      state, problems = self._restore(step, shapes)
      if not problems:
        self._set_aside(refused)
        return state, step
      refused.append(step)
      lines.append(_refusal(self._directory / str(step), problems))
      self._say(lines[-1])
    if refused:
      raise errors.DamagedError("\n".join([f"{self._directory}: no step is sound", *lines]))
    return None

  def _restore(self, step: int, shapes: dict) -> tuple[dict, list[str]]:
    """A state, and what is wrong with it."""
    about, problems = self._about(step)
    if not problems and self._config_digest and about["config"] not in (None, self._config_digest):
      problems = ["about: is of another config than config.json"]
    state = {}
    if not problems:
      with _no_noise():
        state, problems = self._read(step, _as_saved(shapes, about["digests"]))
    if not _everywhere(not problems):
      return {}, problems or ["another process cannot read it"]
    computed = digest.digests(state)
    saved = {x: y for x, y in about["digests"].items() if x.partition("/")[0] in shapes}
    names = sorted(x for x in computed.keys() | saved.keys() if computed.get(x) != saved.get(x))
    if names:
      return state, [f"{name}: differs from what was saved" for name in names]
    return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), state, shapes), []

  def _read(self, step: int, shapes: dict) -> tuple[dict, list[str]]:
    """What Orbax makes of a step, and what it does not like."""
    state, problems = {}, []
    without_ema = {name: value for name, value in shapes.items() if name != "ema"}
    # Without the manager, which would wait for all processes after each one.
    for item, wanted in dict(state=without_ema, ema=shapes.get("ema")).items():
      if not wanted or problems:
        continue
      handler, args = self._reader(wanted, whole=item == "ema" or "step" in wanted)
      try:
        restored = handler.restore(self._directory / str(step) / item, args=args)
        state |= {"ema": restored} if item == "ema" else restored
      except Exception as error:  # Orbax reports damage in many ways
        _stop_at_outage(error, self._directory)
        problems.append(f"{item}: {_first_line(error)}")
      handler.close()
    return state, problems

  def _reader(self, wanted: dict, *, whole: bool) -> tuple[Any, Any]:
    """Orbax's handler, and its arguments, for an item or a part of one."""
    if whole:
      return self._ocp.StandardCheckpointHandler(), self._ocp.args.StandardRestore(wanted)
    how = self._ocp.checkpoint_utils.construct_restore_args(wanted)
    args = self._ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
    return self._ocp.PyTreeCheckpointHandler(), args

  def _about(self, step: int) -> tuple[dict, list[str]]:
    """What a step says of itself, and what is wrong with that."""
    try:
      handler = self._ocp.JsonCheckpointHandler()
      args = self._ocp.args.JsonRestore()
      about = dict(handler.restore(self._directory / str(step) / "about", args=args))
      handler.close()
      hashed = {name: value for name, value in about.items() if name != "sha256"}
      if about["sha256"] == digest.of_json(hashed) and about["step"] == step:
        return about, []
      return {}, ["about: differs from what was saved"]
    except Exception as error:
      _stop_at_outage(error, self._directory)
      return {}, [f"about: {_first_line(error)}"]

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Moves damaged steps to where they are in nobody's way, and can be looked at."""
    if not steps or self._read_only:
      return
    if jax.process_index() == 0:
      for step in steps:
        folder = self._workdir / _DAMAGED
        folder.mkdir(exist_ok=True)
        names = (folder / f"{step}-{n}" for n in itertools.count())
        (self._directory / str(step)).rename(next(path for path in names if not path.exists()))
    _everywhere(True)
    for step in steps:
      self._bits_per_byte.pop(step, None)
    self._manager.reload()

  def _storage_error(self, error: Exception) -> errors.StorageError:
    return errors.StorageError(
      f"{self._directory}: a checkpoint could not be written: {_first_line(error)}"
    )


@dataclasses.dataclass
class _Best:
  """Orbax's policy for the step with the lowest of `bits_per_byte`."""

  bits_per_byte: dict[int, float | None]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    bits = [self.bits_per_byte.get(info.step) for info in checkpoints]
    best = min((x for x in bits if x is not None), default=None)
    return [x is not None and x == best for x in bits]


def latest_step(workdir: epath.PathLike) -> int | None:
  """The newest saved step of a run; None if there is none."""
  if not (epath.Path(workdir) / "checkpoints").is_dir():
    return None
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.latest_step()


def laid_out(shapes: Any, shardings: Any) -> Any:
  """`shapes`, each leaf to lie on its sharding (or all on the one given)."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, shapes)
  struct = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(struct, shapes, shardings)


def _as_saved(shapes: dict, digests: dict[str, str]) -> dict:
  """`shapes` with the dtypes that were saved, where the ones wanted hold all their values."""

  def of(path, wanted):
    dtype = digests.get(digest.name_of(path), "").partition("[")[0] or wanted.dtype
    narrower = jnp.promote_types(dtype, wanted.dtype) == wanted.dtype
    return jax.ShapeDtypeStruct(
      wanted.shape, dtype if narrower else wanted.dtype, sharding=wanted.sharding
    )

  return jax.tree.map_with_path(of, shapes)


def restore_params(
  workdir: epath.PathLike,
  step: int | None = None,
  *,
  average: bool = True,
  data_path: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  say: Callable[[str], None] = print,
) -> tuple[ml_collections.ConfigDict, nnx.GraphDef, dict, int]:
  """What evaluation, samples and pictures need of a run.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None is the newest that is sound.
    average: the averaged weights, where the run keeps them; else those of the last update.
    data_path: where the run's data are now, if they have moved since.
    mesh: the devices that shall hold the weights, by the rules of `parallel.sharding`; None is one.
    say: takes a line for each step that is refused.

  Returns:
    The run's config, the model's graph, its weights for nnx.merge(graph, weights), in float32
    whatever they are trained in, and the step they are of.

  Raises:
    ValueError: the folder is not that of a run, or there is no such checkpoint.
    errors.DamagedError: the checkpoint is not what was saved.
  """
  config = workdir_lib.load_config(workdir, data_path=data_path)
  graphdef, shapes = model_lib.graph_and_shapes(**config.model)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  name = "ema" if average and config.train.ema_decay else "params"
  shapes = {name: laid_out(shapes, sharding.by_rules(shapes, mesh) if mesh else where)}
  with Checkpoints(workdir, read_only=True, say=say) as checkpoints:
    if step is not None:
      return config, graphdef, checkpoints.restore(step, shapes)[name], step
    newest = checkpoints.restore_newest(shapes)
  if newest is None:
    raise ValueError(f"{workdir}: holds no checkpoint yet; train first")
  return config, graphdef, newest[0][name], newest[1]


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
  """Orbax drops other reads when one fails; each would print a traceback when it is collected."""
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    yield
  finally:
    gc.collect()
    sys.unraisablehook = hook


def _everywhere(ok: bool) -> bool:
  """Whether it holds in all processes, which all have to ask."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def _stop_at_outage(error: Exception, path: epath.Path) -> None:
  """Raises StorageError if a step could not be reached, which does not make it a damaged one."""
  away = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
  if away or str(error).startswith(_OUTAGES):
    raise errors.StorageError(f"{path}: {_first_line(error)}") from error


def _refusal(path: epath.Path, problems: list[str]) -> str:
  ending = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
  return f"DAMAGED {path} is refused: {'; '.join(problems[:3])}{ending}"


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:200]}"
