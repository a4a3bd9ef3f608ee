"""What ends a run that was asked for correctly: the launchers turn each into an exit status."""


class NonFiniteError(ArithmeticError):
  """The loss or the weights are no numbers any more."""


class StorageError(OSError):
  """A disk or a file failed while the run was under way."""


class DamagedError(RuntimeError):
  """No checkpoint of the run is sound."""


class Preempted(Exception):
  """The run was asked to stop, and has saved what it could: the same command continues it."""
