"""Trains a Sparse Transformer; the same command continues a run that was stopped.

  python -m experiments.train --config=configs/cifar10.py:quick
  python -m experiments.train --config=configs/enwik8.py --config.data.path=FILE --workdir=DIR

--config.group.field=value changes any field of the config. Exit status: 0 finished, 2 bad input
(nothing written), 3 the loss or a weight is not finite.
"""

import os
import sys
from collections.abc import Sequence

import ml_collections

from experiments import cli
from sparse_flax import train


def run(config: ml_collections.ConfigDict, workdir: str) -> dict:
  """Trains `config` in `workdir` and returns the last evaluation on the validation split.

  Leaves with status 3 when the loss or a weight is not finite.
  """
  try:
    return train.train(config, workdir, say=lambda line: print(line, flush=True))
  except train.NonFiniteError as error:
    cli.fail(str(error), status=cli.NOT_FINITE)


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", help="the run's folder; default: runs/CONFIG-VARIANT")
  args, config, name = cli.parse_config(parser, argv)
  workdir = args.workdir or os.path.join("runs", name)
  with cli.readable_errors():
    run(config, workdir)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
