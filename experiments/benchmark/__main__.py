"""python -m experiments.benchmark [NAME ...]: runs the named benchmarks, all by default."""

import argparse
import pathlib

from experiments.benchmark import memory
from experiments.benchmark import xla

BENCHMARKS = {"memory": memory, "xla": xla}


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
  known = "; ".join(
    f"{name}: {module.__doc__.splitlines()[0]}" for name, module in BENCHMARKS.items()
  )
  parser.add_argument("names", nargs="*", metavar="NAME", help=known)
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("benchmarks"), help="folder of the JSON files"
  )
  args = parser.parse_args(argv)
  if unknown := sorted(set(args.names) - set(BENCHMARKS)):
    parser.error(f"NAME={unknown[0]!r}: must be one of {', '.join(BENCHMARKS)}")
  for name in args.names or BENCHMARKS:
    BENCHMARKS[name].run(args.out)


if __name__ == "__main__":
  main()
