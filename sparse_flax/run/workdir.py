"""A run's folder: the config it was started with, what of it has changed, which data it is of.

`config.json` and `data.json` are written once, and stay as they are; so is `init.json`, of a run
that began with the weights of another one. `changes.json` has the fields of the last command that
differ from `config.json`, by their names; it is not there as long as none ever did.
"""

import json
import os
import re
from typing import Any

import ml_collections
from etils import epath

from sparse_flax.run import digest
from sparse_flax.run import files
from sparse_flax.run import validate

# What a run may go on with other values of: where arrays lie, what is computed again or by which
# kernels, how often something is written; not what is computed.
_MAY_CHANGE = re.compile(r"mesh\.\w+|model\.(remat|implementation)|train\.\w+_every|eval\.pictures")
# Data are told by their identity, of which this is prose.
_PATH, _REMARK = "data.path", "remark"
_STEPS = "train.steps"  # of a finished run they may be raised


def load_config(
  workdir: epath.PathLike, *, data_path: str | None = None
) -> ml_collections.ConfigDict:
  """The config of a run, as the last command that trained it had it.

  Args:
    workdir: the run's folder, or that of an export.
    data_path: where its data are now, if they have moved since.

  Raises:
    ValueError: there is none, or it is not one that this version can read.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir}: has no config.json, so it is not the folder of a training run")
  values = validate.completed(_load(path))
  changes = _changes(workdir) | ({} if data_path is None else {_PATH: data_path})
  for field, value in changes.items():
    group, _, name = field.rpartition(".")
    if isinstance(inside := values.setdefault(group, {}), dict):  # else the validation says so
      inside[name] = value
  config = ml_collections.ConfigDict(_with_tuples(values)).lock()
  problems = validate.validate_fields(config)
  if problems:
    raise ValueError("\n".join([f"{path}: is not a config of this version", *problems]))
  return config


def check(
  workdir: epath.PathLike,
  config: ml_collections.ConfigDict,
  *,
  data: dict | None = None,
  done: int | None = None,
  init_from: str | os.PathLike | None = None,
) -> None:
  """Makes sure that a run in `workdir`, if any, goes on as it began; writes nothing.

  What the result does not depend on may differ: the mesh, `model.remat`, `model.implementation`,
  every `train.*_every`, `eval.pictures`, and `data.path` where the data themselves are the same. A
  run that has done all its steps may have more of them from now on.

  Args:
    workdir: the run's folder, which need not exist.
    config: of the command given now.
    data: {split: identity} of the data opened now; None before they are.
    done: steps of the newest checkpoint; None without one.
    init_from: whose weights the command says that the run begins with; None: it does not say.

  Raises:
    ValueError: one line per difference, `field: old -> new`; or the steps are fewer than those
      done; or the run began with other weights.
  """
  workdir = epath.Path(workdir)
  steps = workdir / "checkpoints"
  if (workdir / "config.json").exists():
    _check_config(workdir, config, done)
    _check_init(workdir, init_from)
  elif steps.is_dir() and any(steps.iterdir()):
    raise ValueError(f"{workdir}: holds checkpoints but no config.json; choose another --workdir")
  if data is not None and (workdir / "data.json").exists():
    _check_data(workdir, data)


def _check_config(workdir: epath.Path, config: ml_collections.ConfigDict, done: int | None) -> None:
  old, new = _fields(_load(workdir / "config.json")), _fields(_plain(config))
  old |= {field: value for field, value in _changes(workdir).items() if field == _STEPS}
  if unknown := sorted(old.keys() - new.keys()):
    lines = [f"  config.{field}={old[field]!r}: there is no such field" for field in unknown]
    head = f"{workdir}/config.json: is not a config of this version; choose another --workdir"
    raise ValueError("\n".join([head, *lines]))
  steps = new[_STEPS]
  raised = done is not None and done == old.get(_STEPS) and steps > done
  judged_later = (workdir / "data.json").exists()
  lines = [
    line
    for field in sorted(new)
    for line in _changed(field, old.get(field, "absent"), new[field])
    if field not in old
    or (
      old[field] != new[field]
      and not _MAY_CHANGE.fullmatch(field)
      and not (field == _PATH and judged_later)
      and not (field == _STEPS and raised)
    )
  ]
  if len(lines) == 1 and done is not None and steps < done:
    raise ValueError(f"config.{_STEPS}={steps}: must be at least {done}, which {workdir} has done")
  if lines:
    head = f"{workdir}: this run was started with another config; choose another --workdir"
    if _STEPS in old and old[_STEPS] != steps and not raised:
      head += f", or raise {_STEPS} once all {old[_STEPS]} are done"
    raise ValueError("\n".join([head, *lines]))


def _changed(field: str, old: Any, new: Any) -> list[str]:
  """A line for a field, or for each that differs inside of one that holds others."""
  if not isinstance(old, dict) or not isinstance(new, dict):
    return [f"  config.{field}: {old!r} -> {new!r}"]
  before, after = (validate.flatten(x, f"{field}.") for x in (old, new))
  return [
    f"  config.{name}: {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
    for name in sorted(before.keys() | after.keys())
    if name not in before or name not in after or before[name] != after[name]
  ]


def _check_init(workdir: epath.Path, init_from: str | os.PathLike | None) -> None:
  if init_from is None:
    return
  begun = begun_from(workdir)
  absolute = lambda path: os.fspath(path) if files.is_remote(path) else os.path.abspath(path)
  if begun is None or absolute(begun["from"]) != absolute(init_from):
    weights = f"the weights of {begun['from']}" if begun else "random weights"
    raise ValueError(
      f"init_from={os.fspath(init_from)}: the run in {workdir} began with {weights}; leave it out "
      "to go on, or choose another --workdir"
    )


def _check_data(workdir: epath.Path, data: dict) -> None:
  old = validate.flatten(_load(workdir / "data.json"))
  new = validate.flatten(json.loads(to_json(data)))
  lines = [
    f"  data.{field}: {value!r} -> {new.get(field, 'absent')!r}"
    for field, value in sorted(old.items())
    if field.partition(".")[0] in data
    and not field.endswith(f".{_REMARK}")
    and (field not in new or new[field] != value)
  ]
  if lines:
    head = f"{workdir}: this run was started with other data; choose another --workdir"
    raise ValueError("\n".join([head, *lines]))


def begun_from(workdir: epath.PathLike) -> dict | None:
  """What is known of the weights that a run began with; None where they were random.

  Returns:
    "from": the folder of a run or an export; the "step" of its checkpoint; whether they were
    "averaged"; and their "sha256".
  """
  path = epath.Path(workdir) / "init.json"
  return _load(path) if path.exists() else None


def told(begun: dict) -> str:
  """A line for people, of what `begun_from` gives."""
  kind = "averaged weights" if begun["averaged"] else "weights"
  return f"with the {kind} of {begun['from']}, step {begun['step']:,}"


def planned_steps(workdir: epath.PathLike) -> int | None:
  """`train.steps` of the last command that trained a run; None where there is no run yet."""
  if not (epath.Path(workdir) / "config.json").exists():
    return None
  return load_config(workdir).train.steps


def start(
  workdir: epath.PathLike,
  config: ml_collections.ConfigDict,
  *,
  data: dict,
  init: dict | None = None,
) -> None:
  """Makes the folder of a run, or notes with what a run goes on; each file whole or not at all.

  `config.json`, `data.json` and `init.json` that are there stay: `check` found nothing in them that
  matters.

  Args:
    workdir: the run's folder.
    config: of the command.
    data: {split: identity} of its data.
    init: as `begun_from` will give it; None for random weights.

  Raises:
    ValueError: the folder cannot be written.
  """
  workdir = epath.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, values in (("data", data), ("init", init), ("config", _plain(config))):
      if values is not None and not (workdir / f"{name}.json").exists():
        files.write(workdir / f"{name}.json", to_json(values).encode())
    old, new = _fields(_load(workdir / "config.json")), _fields(_plain(config))
    changes = {field: value for field, value in new.items() if old[field] != value}
    if changes != _changes(workdir):
      files.write(workdir / "changes.json", to_json(changes).encode())
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f"--workdir={workdir}: cannot be written: {reason}") from error


def config_digest(text: str) -> str:
  """SHA-256 of what a stored config says, the mesh apart: checkpoints and exports keep it.

  Of the text as it was written: fields that are added later do not change it.
  """
  fields = validate.flatten(json.loads(text))
  return digest.of_json({name: x for name, x in fields.items() if not name.startswith("mesh.")})


def _changes(workdir: epath.PathLike) -> dict:
  path = epath.Path(workdir) / "changes.json"
  changes = _load(path) if path.exists() else {}
  may = lambda field: field in (_PATH, _STEPS) or _MAY_CHANGE.fullmatch(field)
  if fixed := [x for x in changes if not may(x)]:
    raise ValueError(f"{path}: config.{fixed[0]}: cannot change while a run goes on")
  return changes


def _fields(values: dict) -> dict:
  # As a file gives them back: defaults may be tuples, too.
  return validate.by_field(json.loads(to_json(validate.completed(values))))


def _plain(config: ml_collections.ConfigDict) -> dict:
  """The values as a file gives them back: without tuples."""
  return json.loads(to_json(config.to_dict()))


def _load(path: epath.Path) -> dict:
  try:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
      raise ValueError("must be an object")
    return values
  except ValueError as error:  # of JSON, or of UTF-8
    raise ValueError(f"{path}: is not valid JSON: {error}") from error


def to_json(values: dict) -> str:
  """As every file of a run has it."""
  return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _with_tuples(values: Any) -> Any:
  """JSON has no tuples, and patterns have to be hashable."""
  if isinstance(values, dict):
    return {name: _with_tuples(value) for name, value in values.items()}
  if isinstance(values, list):
    return tuple(_with_tuples(value) for value in values)
  return values
