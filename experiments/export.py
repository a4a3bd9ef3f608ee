"""Writes the weights of a run as model.safetensors and config.json, for other programs.

  python -m experiments.export --workdir=DIR --out=DIR [--step=N] [--average=false]
    [--dtype=bfloat16]

--average=false writes the weights after the last update instead; --dtype=bfloat16 rounds all
matrices, for a file of half the size. The file says which weights it has, and whether rounded.
`sparse_flax.export.load(DIR)` reads them back, and its docstring has the names. `evaluate`,
`sample` and `visualize` take the folder as --weights=DIR, and `train` as --init_from=DIR.
"""

import sys
from collections.abc import Sequence

from experiments import cli
from experiments import sources
from sparse_flax import export
from sparse_flax.run import checkpoint


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", help="the folder of a training run")
  parser.add_argument("--out", help="the folder to write to, made if it is not there")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  sources.add_average(parser)
  parser.add_argument(
    "--dtype", choices=export.DTYPES, help="of matrices in the file; default: as the run has them"
  )
  args = parser.parse_args(argv)
  if not args.out:
    cli.fail("--out=DIR is missing: the folder to write to")
  with cli.readable_errors():
    folder = cli.open_workdir(args.workdir)
    average = args.average is not False
    config, _, params, step = checkpoint.restore_params(folder, args.step, average=average)
    options = dict(step=step, averaged=average, dtype=args.dtype)
    for path in export.save(args.out, config, params, **options):
      print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
