"""A run's folder: the config it was started with, what of it has changed, the identity of its data.

`config.json` and `data.json` are written once, and stay as they are. `changes.json` has the fields
of the last command that differ from `config.json`, by their names; it is not there as long as none
ever did.
"""

import json
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
  workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict | None = None
) -> None:
  """Makes sure that a run in `workdir`, if any, goes on as it began; writes nothing.

  What the result does not depend on may differ: the mesh, `model.remat`, `model.implementation`,
  every `train.*_every`, `eval.pictures`, and `data.path` where the data themselves are the same.

  Args:
    workdir: the run's folder, which need not exist.
    config: of the command given now.
    data: {split: identity} of the data opened now; None before they are.

  Raises:
    ValueError: one line per difference, `field: old -> new`.
  """
  workdir = epath.Path(workdir)
  steps = workdir / "checkpoints"
  if (workdir / "config.json").exists():
    _check_config(workdir, config)
  elif steps.is_dir() and any(steps.iterdir()):
    raise ValueError(f"{workdir}: holds checkpoints but no config.json; choose another --workdir")
  if data is not None and (workdir / "data.json").exists():
    _check_data(workdir, data)


def _check_config(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
  old, new = _fields(_load(workdir / "config.json")), _fields(_plain(config))
  if unknown := sorted(old.keys() - new.keys()):
    lines = [f"  config.{field}={old[field]!r}: there is no such field" for field in unknown]
    head = f"{workdir}/config.json: is not a config of this version; choose another --workdir"
    raise ValueError("\n".join([head, *lines]))
  judged_later = (workdir / "data.json").exists()
  lines = [
    f"  config.{field}: {old.get(field, 'absent')!r} -> {new[field]!r}"
    for field in sorted(new)
    if field not in old
    or (
      old[field] != new[field]
      and not _MAY_CHANGE.fullmatch(field)
      and not (field == _PATH and judged_later)
    )
  ]
  if lines:
    head = f"{workdir}: this run was started with another config; choose another --workdir"
    raise ValueError("\n".join([head, *lines]))


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


def start(workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict) -> None:
  """Makes the folder of a run, or notes with what a run goes on; each file whole or not at all.

  `config.json` and `data.json` that are there stay: `check` found nothing in them that matters.

  Raises:
    ValueError: the folder cannot be written.
  """
  workdir = epath.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, values in (("data", data), ("config", _plain(config))):
      if not (workdir / f"{name}.json").exists():
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
  if fixed := [x for x in changes if x != _PATH and not _MAY_CHANGE.fullmatch(x)]:
    raise ValueError(f"{path}: config.{fixed[0]}: cannot change while a run goes on")
  return changes


def _fields(values: dict) -> dict:
  return validate.flatten(validate.completed(values))


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
