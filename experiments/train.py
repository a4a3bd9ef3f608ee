"""Trains a Sparse Transformer; the same command continues a run that was stopped.

  python -m experiments.train --config=configs/cifar10.py:quick
  python -m experiments.train --config=configs/enwik8.py --config.data.path=FILE --workdir=DIR

--config.group.field=value changes any field of the config. On many hosts run the same command on
each (docs/pods.md). Exit status: 0 finished; 2 bad input, nothing written; 3 the loss or a weight
is not finite; 4 no checkpoint is sound; 75 stopped (SIGTERM, a preemption) and saved, to be started
again; 1 anything else, such as a full disk or the watchdog.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from collections.abc import Sequence

import jax
import ml_collections

from experiments import cli
from experiments import distributed
from sparse_flax import errors
from sparse_flax import train
from sparse_flax import watchdog


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  stop: Callable[[], bool] = lambda: False,
  watched: watchdog.Watchdog | None = None,
) -> dict:
  """Trains `config` in `workdir` and returns the last evaluation on the validation split.

  Leaves with the status that tells how the run ended, if it did not finish.
  """
  say = lambda line: print(line, flush=True)
  try:
    return train.train(config, workdir, say=say, stop=stop, watched=watched)
  except errors.NonFiniteError as error:
    cli.fail(str(error), status=cli.NOT_FINITE)
  except errors.StorageError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(cli.FAILED)  # else everything that still holds a file has its say, with tracebacks
  except errors.Preempted as end:
    cli.fail(f"{end}; start the same command again to go on", status=cli.PREEMPTED)


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument(
    "--workdir", help="the run's folder, gs://... too; default: runs/CONFIG-VARIANT"
  )
  parser.add_argument(
    "--stall_report", type=float, default=600, help="seconds without a step: print all stacks"
  )
  parser.add_argument(
    "--stall_exit", type=float, default=1_800, help="seconds without a step: end, status 1; 0 never"
  )
  distributed.add_flags(parser)
  args, config, name = cli.parse_config(parser, argv)
  workdir = args.workdir or os.path.join("runs", name)
  with cli.readable_errors():
    for flag in ("stall_report", "stall_exit"):
      if not 0 <= getattr(args, flag) <= 1e7:
        raise ValueError(f"--{flag}={getattr(args, flag)}: must be seconds in [0, 10,000,000]")
    watched = watchdog.Watchdog(report_after=args.stall_report, end_after=args.stall_exit)
    distributed.join(args)
    hush()
    run(config, workdir, stop=stop_by_signal(), watched=watched)
  return 0


def hush() -> None:
  """Of a save that fails, Orbax says the same for every array, with tracebacks; we say it once."""
  for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  hook = sys.unraisablehook
  closed = lambda what: (
    isinstance(what.exc_value, RuntimeError) and "loop is" in str(what.exc_value)
  )
  sys.unraisablehook = lambda what: None if closed(what) else hook(what)


def stop_by_signal() -> Callable[[], bool]:
  """Whether SIGTERM has come. Of many processes, JAX's preemption service catches it."""
  stop = threading.Event()
  if jax.process_count() == 1:  # a handler of ours would disable that service
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
  return stop.is_set


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
