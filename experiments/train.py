"""Trains a Sparse Transformer; the same command continues a run that was stopped.

  python -m experiments.train --config=cifar10:quick
  python -m experiments.train --config=enwik8 --config.data.path=FILE --workdir=DIR
  python -m experiments.train --config=cifar10 --init_from=DIR_OR_WORKDIR

--config.group.field=value changes any field of the config; --help lists configs and fields. On many
hosts run the same command on each (docs/pods.md). It goes on too where the data have moved, on
another mesh, and with other values of model.remat, model.implementation, eval.pictures and
train.*_every. Ctrl-C, like SIGTERM, ends the run after the step that is under way, and saves that;
a second Ctrl-C ends it at once, and so does the first while data are prepared.

A finished run goes on with a larger --config.train.steps. The learning rate is then that of the
longer schedule; the log says from what to what it changes.

--init_from begins with the weights of an export, or the averaged ones of a run's newest checkpoint,
and with a new optimizer at step 0. Each weight that does not fit the model is named. The same
command, or that without the flag, continues the run, and does not read them again.

At each evaluation TensorBoard (WORKDIR/tensorboard/) gets config.eval.pictures samples and as many
completions of held-out examples, of which half is given, and pictures of attention. Of a text these
are the first 512 bytes, of a sound the first second. Runs of several processes draw nothing.

--profile=START:STOP writes an XProf trace of the steps START to STOP - 1, as the log counts them,
to WORKDIR/profile/ and says what opens it; of many processes each writes its own.

Exit status: 0 finished; 2 bad input, nothing written; 3 the loss or a weight is not finite; 4 no
checkpoint is sound; 75 stopped (SIGTERM, a preemption) and saved, to be started again; 130 stopped
by Ctrl-C, and saved unless it ended at once; 1 anything else, such as a full disk or the watchdog.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import jax
import ml_collections

from experiments import cli
from experiments import distributed
from sparse_flax import train
from sparse_flax.run import errors
from sparse_flax.sample import pictures
from sparse_flax.train import watchdog


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  watched: watchdog.Watchdog | None = None,
  profile: range = range(0),
  wandb: str | None = None,
  init_from: str | None = None,
) -> dict:
  """Trains `config` in `workdir` and returns the last evaluation on the validation split.

  Leaves with the status that tells how the run ended, if it did not finish.
  """
  stop = Stop()

  def say(line: str) -> None:
    try:
      print(line, flush=True)
    except BrokenPipeError:  # Ctrl-C ends `| tee` too, and may do so before we hear of it
      if not stop.asked.wait(1):
        raise
      cli.discard(sys.stdout)

  try:
    with stop.by_sigterm():
      return train.train(
        config,
        workdir,
        init_from=init_from,
        say=say,
        stop=stop.asked.is_set,
        around_loop=stop.by_ctrl_c(),
        on_evaluation=pictures.Drawer(),
        wandb=wandb,
        watched=watched,
        profile=profile,
      )
  except errors.NonFiniteError as error:
    cli.fail(str(error), status=cli.NOT_FINITE)
  except errors.StorageError as error:
    cli.tell(str(error))
    os._exit(cli.FAILED)  # else everything that still holds a file has its say, with tracebacks
  except errors.Preempted as end:
    status = cli.INTERRUPTED if stop.interrupted else cli.PREEMPTED
    cli.fail(f"{end}; start the same command again to go on", status=status)


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__, takes_config=True)
  parser.add_argument(
    "--workdir", help="the run's folder, gs://... too; default: runs/CONFIG-VARIANT"
  )
  parser.add_argument(
    "--init_from", metavar="DIR", help="begin with the weights of this export or run"
  )
  parser.add_argument(
    "--stall_report", type=float, default=600, help="seconds without a step: print all stacks"
  )
  parser.add_argument(
    "--stall_exit", type=float, default=1_800, help="seconds without a step: end, status 1; 0 never"
  )
  parser.add_argument(
    "--profile", metavar="START:STOP", help="an XProf trace of these steps, to WORKDIR/profile/"
  )
  parser.add_argument(
    "--wandb", metavar="PROJECT", help="send to Weights & Biases too what TensorBoard gets"
  )
  cli.add_compilation_cache(parser)
  distributed.add_flags(parser)
  args, config, name = cli.parse_config(parser, argv)
  workdir = args.workdir or os.path.join("runs", name)
  with cli.readable_errors():
    for flag in ("stall_report", "stall_exit"):
      if not 0 <= getattr(args, flag) <= 1e7:
        raise ValueError(f"--{flag}={getattr(args, flag)}: must be seconds in [0, 10,000,000]")
    profile = range(0) if args.profile is None else _steps(args.profile)
    cli.keep_compiled(args.compilation_cache)
    watched = watchdog.Watchdog(report_after=args.stall_report, end_after=args.stall_exit)
    distributed.join(args)
    hush()
    how = dict(profile=profile, wandb=args.wandb, init_from=args.init_from)
    run(config, workdir, watched=watched, **how)
  return 0


def _steps(text: str) -> range:
  """START:STOP as a range.

  Raises:
    ValueError: it is none, or an empty one.
  """
  match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
  steps = range(*map(int, match.groups())) if match else range(0)
  if not steps or steps.start < 1:
    raise ValueError(f"profile={text}: must be START:STOP, whole numbers with 1 <= START < STOP")
  return steps


def hush() -> None:
  """Of a save that fails, Orbax says the same for every array, with tracebacks; we say it once."""
  for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  hook = sys.unraisablehook
  closed = lambda what: (
    isinstance(what.exc_value, RuntimeError) and "loop is" in str(what.exc_value)
  )
  sys.unraisablehook = lambda what: None if closed(what) else hook(what)


@dataclasses.dataclass
class Stop:
  """Whether SIGTERM or Ctrl-C has asked for the end of a run."""

  asked: threading.Event = dataclasses.field(default_factory=threading.Event)
  interrupted: bool = False  # by Ctrl-C

  def by_sigterm(self) -> contextlib.AbstractContextManager:
    """Takes SIGTERM. Of many processes JAX's preemption service does; this would disable it."""
    if jax.process_count() > 1:
      return contextlib.nullcontext()
    return _handled(signal.SIGTERM, lambda *_: self.asked.set())

  @contextlib.contextmanager
  def by_ctrl_c(self) -> Iterator[None]:
    """Takes Ctrl-C; a second one ends the process where it is.

    Of many processes Ctrl-C becomes a SIGTERM, so that all of them save the same step.
    """
    # Python runs handlers between two lines of the main thread, which may be compiling for minutes;
    # a thread of ours hears of a signal when it comes.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with _handled(signal.SIGINT, lambda *_: None):
      before = signal.set_wakeup_fd(theirs.fileno())
      listener = threading.Thread(target=self._listen, args=(ours,), daemon=True)
      listener.start()
      try:
        yield
      finally:
        signal.set_wakeup_fd(before)
        theirs.close()  # ends the thread
        listener.join()
        ours.close()

  def _listen(self, signals: socket.socket) -> None:
    while received := signals.recv(1):
      if received[0] == signal.SIGINT and not self.interrupted:
        self.interrupted = True
        self.asked.set()
        if jax.process_count() > 1:
          os.kill(os.getpid(), signal.SIGTERM)
        cli.tell(
          "Ctrl-C: the run ends after this step and says what is saved; a second Ctrl-C ends it at "
          "once"
        )
      elif received[0] == signal.SIGINT:
        cli.tell(
          "ended by a second Ctrl-C; the same command goes on from the last checkpoint, if any"
        )
        os._exit(cli.INTERRUPTED)


@contextlib.contextmanager
def _handled(kind: signal.Signals, handler: Callable) -> Iterator[None]:
  """Handles a signal, unless it is ignored, as a shell has Ctrl-C for what runs behind `&`."""
  before = signal.getsignal(kind)
  if before != signal.SIG_IGN:
    signal.signal(kind, handler)
  try:
    yield
  finally:
    signal.signal(kind, before)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
