"""Trains the packaged CIFAR-10 sample, evaluates it, and draws samples and attention pictures.

  python -m experiments.quickstart [--workdir=runs/quickstart]

What `make quickstart` runs: the launchers train, evaluate, sample and visualize, one after the
other in one process.
"""

import sys
import time
from collections.abc import Sequence

from experiments import cli
from experiments import evaluate
from experiments import sample
from experiments import train
from experiments import visualize

PRETRAINED = (
  "python -m experiments.sample --weights=experiments/pretrained/cifar10 --num=16 --keep=0.5"
)


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", default="runs/quickstart", help="the run's folder")
  own = ["--config", f"{cli.CONFIGS / 'cifar10.py'}:quick"]
  args, config, _ = cli.parse_config(parser, [*argv, *own])
  start = time.monotonic()
  with cli.readable_errors():
    print("1/4  training: a 1-layer Sparse Transformer on 1,000 real images\n", flush=True)
    train.run(config, args.workdir)
    print("\n2/4  evaluating 100 images that it has never seen\n", flush=True)
    result = evaluate.run(args.workdir)
    print("\n3/4  drawing samples and completions, byte after byte\n", flush=True)
    pictures = sample.run(args.workdir, num=16)
    pictures += sample.run(args.workdir, num=16, keep=0.5)
    print("\n4/4  drawing where the heads attend\n", flush=True)
    pictures += visualize.run(args.workdir)
  print(f"\nDone in {time.monotonic() - start:.0f} s.")
  print(f"{result['bits_per_byte']:.2f} bits/dim on held-out images, 8.00 before training", end="")
  print(" (PNG needs 5.73 on CIFAR-10)")
  print("Look at:")
  for path in pictures:
    print(f"  {path}")
  print(f"A model that an H200 trained completes images in a minute or two:\n  {PRETRAINED}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
