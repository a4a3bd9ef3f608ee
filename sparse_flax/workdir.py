"""A run's folder: the config it was started with, and the identity of its data."""

import json
from typing import Any

import ml_collections
from etils import epath

from sparse_flax import digest
from sparse_flax import validate

# What another machine may need otherwise: it changes where arrays lie, not what is computed.
_MAY_CHANGE = "mesh."


def load_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that a run was started with.

  Raises:
    ValueError: there is none, or it is not one that this version can read.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir}: has no config.json, so it is not the folder of a training run")
  config = ml_collections.ConfigDict(_with_tuples(_load(path))).lock()
  problems = validate.validate_fields(config)
  if problems:
    raise ValueError("\n".join([f"{path}: is not a config of this version", *problems]))
  return config


def check(
  workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict | None = None
) -> None:
  """Makes sure that a run in `workdir`, if any, has this config and these data; writes nothing.

  The mesh may be another one.

  Args:
    workdir: the run's folder, which need not exist.
    config: of the command given now.
    data: {split: identity} of the data opened now; None before they are.

  Raises:
    ValueError: one line per difference, `field: old -> new`.
  """
  steps = epath.Path(workdir) / "checkpoints"
  if not (epath.Path(workdir) / "config.json").exists() and steps.is_dir() and any(steps.iterdir()):
    raise ValueError(f"{workdir}: holds checkpoints but no config.json; choose another --workdir")
  for name, now in (("config", config.to_dict()), ("data", data)):
    path = epath.Path(workdir) / f"{name}.json"
    if now is None or not path.exists():
      continue
    old, new = (validate.flatten(values) for values in (_load(path), json.loads(to_json(now))))
    lines = [
      f"  {name}.{field}: {old.get(field, 'absent')!r} -> {new.get(field, 'absent')!r}"
      for field in sorted(old.keys() | new.keys())
      if not (name == "config" and field.startswith(_MAY_CHANGE))
      and (field not in old or field not in new or old[field] != new[field])
    ]
    if lines:
      what = "another config" if name == "config" else "other data"
      head = f"{workdir}: this run was started with {what}; choose another --workdir\n"
      raise ValueError(head + "\n".join(lines))


def start(workdir: epath.PathLike, config: ml_collections.ConfigDict, *, data: dict) -> None:
  """Makes the folder of a run with `config.json` and `data.json`, each whole or not at all.

  Files that are there stay: `check` found nothing in them that matters.

  Raises:
    ValueError: the folder cannot be written.
  """
  workdir = epath.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    for name, values in (("data", data), ("config", config.to_dict())):
      if not (workdir / f"{name}.json").exists():
        temporary = workdir / f"{name}.json.tmp"
        temporary.write_text(to_json(values))
        temporary.replace(workdir / f"{name}.json")
  except OSError as error:
    reason = error.strerror or error
    raise ValueError(f"--workdir={workdir}: cannot be written: {reason}") from error


def config_digest(config: ml_collections.ConfigDict) -> str:
  """SHA-256 of what may not change of a config: a checkpoint keeps it."""
  fields = validate.flatten(json.loads(to_json(config.to_dict())))
  kept = {name: value for name, value in fields.items() if not name.startswith(_MAY_CHANGE)}
  return digest.of_json(kept)


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
