"""What of the package needs more than its core: the extras of pyproject.toml, and their modules."""

import importlib.util

# Modules that tell whether an extra is installed: what its rooms import first of it.
MODULES = {
  "data": ("PIL", "etils.epath", "tensorflow_datasets"),
  "train": ("chex", "ml_collections", "optax", "orbax.checkpoint", "safetensors", "tensorboardX"),
  "view": ("PIL", "matplotlib", "plotly"),
  "wandb": ("wandb",),
}
_NOT_IN_ALL = ("wandb",)


class MissingExtraError(ModuleNotFoundError):
  """An extra of this package is not installed."""


def need(extra: str, *, of: str) -> None:
  """For the head of a module.

  Args:
    extra: of MODULES.
    of: the module, or what else needs it, for the message.

  Raises:
    MissingExtraError: naming what to install.
  """
  missing = [name for name in MODULES[extra] if not _is_there(name)]
  if missing:
    others = "" if extra in _NOT_IN_ALL else ", or [all]"
    raise MissingExtraError(
      f"{of} needs {', '.join(missing)}: pip install 'sparse-flax[{extra}]'{others}",
      name=missing[0],
    )


def _is_there(module: str) -> bool:
  package, _, _ = module.rpartition(".")
  return (not package or _is_there(package)) and importlib.util.find_spec(module) is not None
