"""Writes a run's averaged weights as model.safetensors and config.json, for other programs.

  python -m experiments.export --workdir=DIR --out=DIR [--step=N]

`sparse_flax.export.load(DIR)` reads them back, and its docstring has the names.
"""

import sys
from collections.abc import Sequence

from experiments import cli
from sparse_flax import export
from sparse_flax.run import checkpoint


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", help="the folder of a training run")
  parser.add_argument("--out", help="the folder to write to, made if it is not there")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  args = parser.parse_args(argv)
  if not args.out:
    cli.fail("--out=DIR is missing: the folder to write to")
  with cli.readable_errors():
    folder = cli.open_workdir(args.workdir)
    config, _, params, step = checkpoint.restore_params(folder, args.step)
    for path in export.save(args.out, config, params, step=step):
      print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
