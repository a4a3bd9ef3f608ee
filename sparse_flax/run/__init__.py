"""A run on disk: its folder, checkpoints, digests, and the checks of its config."""

from sparse_flax import extras

extras.need("train", of=__name__)

from sparse_flax.run import digest
from sparse_flax.run import files
from sparse_flax.run.checkpoint import Checkpoints
from sparse_flax.run.checkpoint import laid_out
from sparse_flax.run.checkpoint import latest_step
from sparse_flax.run.checkpoint import restore_params
from sparse_flax.run.errors import DamagedError
from sparse_flax.run.errors import NonFiniteError
from sparse_flax.run.errors import Preempted
from sparse_flax.run.errors import StorageError
from sparse_flax.run.validate import checked
from sparse_flax.run.workdir import begun_from
from sparse_flax.run.workdir import check
from sparse_flax.run.workdir import config_digest
from sparse_flax.run.workdir import load_config
from sparse_flax.run.workdir import planned_steps
from sparse_flax.run.workdir import start
from sparse_flax.run.workdir import to_json
from sparse_flax.run.workdir import told

__all__ = [
  "Checkpoints",
  "DamagedError",
  "NonFiniteError",
  "Preempted",
  "StorageError",
  "begun_from",
  "check",
  "checked",
  "config_digest",
  "digest",
  "files",
  "laid_out",
  "latest_step",
  "load_config",
  "planned_steps",
  "restore_params",
  "start",
  "to_json",
  "told",
]
