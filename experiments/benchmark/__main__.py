"""Measures speed and memory: python -m experiments.benchmark [NAME ...], all by default."""

import argparse
import importlib
import os
import pathlib
import sys

import jax

# Imported when they are run: not every machine has what each of them needs.
BENCHMARKS = {
  "attention": "attention on a GPU beside cuDNN and the roofline",
  "block_sparse": "block-sparse attention on a GPU beside cuDNN's dense attention",
  "checkpoints": "a save and a restore of a state of 2.4 GB, with digests",
  "compare": "runs of record, sequence by sequence; only when named, and alone: it has flags of "
  "its own, see compare --help",
  "curves": "200 steps of each recipe by its modules and by kernels, on a GPU; only when named",
  "learned": "attention to blocks that are chosen while a model runs, on a GPU: rates, memory, "
  "decoding",
  "memory": "the published memory table, and what XLA needs",
  "mesh": "training steps on 1, 2, 4, ... GPUs of one host, by each axis; only when named",
  "multiscale": "models of several scales beside flat ones on a GPU: training steps and sampling; "
  "only when named",
  "plots": "draws the plots of README.md and docs from the results; only when named",
  "record": "trains a recipe and enters it into benchmarks/records.md; only when "
  "named, and alone: it has flags of its own, see record --help",
  "residual": "the products around attention on a GPU, each alone, beside cuBLAS and the roofline",
  "sample": "sampling: on a GPU from the paper's image models, on a CPU from the quickstart's",
  "step": "training steps of the paper's models on a GPU, beside PyTorch's and plain JAX's",
  "tables": "renders the tables of README.md and docs from the results; only when named",
  "tpu_aot": "what the TPU compiler makes of kernels and training steps, hours; only when named",
  "tune": "measures tile sizes into pallas_kernels/tuning.json, on a GPU; only when named",
  "xla": "time and memory of the xla backend up to T = 65,536",
}
MODULES = {
  **{
    name: f"gpu.{name}"
    for name in (
      "attention",
      "block_sparse",
      "curves",
      "learned",
      "mesh",
      "multiscale",
      "residual",
      "sample",
      "step",
      "tune",
    )
  },
  **{name: f"cpu.{name}" for name in ("checkpoints", "memory", "xla")},
  "plots": "plots",
  "tables": "tables",
  "tpu_aot": "tpu.aot",
}
ONLY_NAMED = (
  "compare", "curves", "mesh", "multiscale", "plots", "record", "tables", "tpu_aot", "tune",
)  # fmt: skip
ON_GPU = (
  "attention", "block_sparse", "curves", "learned", "multiscale", "residual", "step", "tune",
)  # fmt: skip
IN_WORKERS = {*ON_GPU, "mesh"}
ALONE = ("compare", "record")  # have flags of their own


def main(argv: list[str] | None = None) -> int:
  """Returns the exit status: 1 where a measurement failed."""
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in ALONE:
    return importlib.import_module(f"experiments.benchmark.{argv[0]}").main(argv[1:])
  parser = argparse.ArgumentParser(prog="python -m experiments.benchmark", description=__doc__)
  known = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
  parser.add_argument("names", nargs="*", metavar="NAME", help=known)
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("benchmarks"), help="folder of the JSON files"
  )
  parser.add_argument(
    "--only",
    type=lambda text: tuple(text.split(",")),
    default=(),
    metavar="PART[,PART]",
    help="on a GPU: these parts, shapes, patterns, models or implementations instead of all",
  )
  parser.add_argument(
    "--remat", type=_remats, metavar="WHAT[,WHAT]", help="step: these instead of each recipe's own"
  )
  parser.add_argument(
    "--baseline", type=_checkout, metavar="DIR", help="step: also the step of this checkout"
  )
  parser.add_argument("--devices", type=int, metavar="N", help="mesh: at most so many")
  args = parser.parse_args(argv)
  if unknown := sorted(set(args.names) - set(BENCHMARKS)):
    parser.error(f"NAME={unknown[0]!r}: must be one of {', '.join(BENCHMARKS)}")
  if alone := [name for name in args.names if name in ALONE]:
    parser.error(f"NAME={alone[0]!r}: must come first and alone, before flags of its own")
  of_step = dict(remats=args.remat, baseline=args.baseline)
  of_step = {name: value for name, value in of_step.items() if value}
  if of_step and args.names and "step" not in args.names:
    parser.error("--remat and --baseline: only step reads them")
  if args.devices and "mesh" not in args.names:
    parser.error("--devices: only mesh reads it")
  names = args.names or [name for name in BENCHMARKS if name not in ONLY_NAMED]
  if IN_WORKERS & set(names):
    # Read when JAX finds the GPU: the memory must be left to the processes that measure.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  backend = jax.default_backend()
  missing = f"needs an NVIDIA GPU, and JAX finds none here (its backend is {backend!r})"
  if backend != "gpu" and (asked := [name for name in args.names if name in ON_GPU]):
    parser.exit(2, f"{asked[0]}: {missing}\n")
  complete = True
  for name in names:
    if name in ON_GPU and backend != "gpu":
      print(f"{name}: skipped, {missing}", flush=True)
      continue
    module = importlib.import_module(f"experiments.benchmark.{MODULES[name]}")
    parts = getattr(module, "PARTS", ())
    if unknown := sorted(set(args.only) - set(parts)):
      parser.error(f"--only={unknown[0]}: {name} has {', '.join(parts) or 'no parts'}")
    # Those for a GPU say whether every row has its figures.
    options = {"step": of_step, "mesh": dict(devices=args.devices)}.get(name, {})
    complete &= (
      module.run(args.out, args.only, **options) if parts else module.run(args.out) is None
    )
  return 0 if complete else 1


def _remats(text: str) -> tuple[str, ...]:
  from sparse_flax import model  # other benchmarks start faster without

  names = tuple(text.split(","))
  if unknown := [name for name in names if name not in model.REMATS]:
    known = ", ".join(model.REMATS)
    raise argparse.ArgumentTypeError(f"{unknown[0]!r}: must be names of {known}, by commas")
  return names


def _checkout(text: str) -> pathlib.Path:
  path = pathlib.Path(text)
  if missing := [
    x for x in ("configs", "pallas_kernels", "sparse_flax") if not (path / x).is_dir()
  ]:
    raise argparse.ArgumentTypeError(
      f"{text!r}: must be the folder of a checkout of this repository, and has no {missing[0]}/"
    )
  return path


if __name__ == "__main__":
  raise SystemExit(main())
