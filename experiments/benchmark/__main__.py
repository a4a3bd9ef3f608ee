"""python -m experiments.benchmark [NAME ...]: runs the named benchmarks, all by default."""

import argparse
import importlib
import os
import pathlib

import jax

# Imported when they are run: not every machine has what each of them needs.
BENCHMARKS = {
  "attention": "attention on a GPU beside cuDNN and the roofline",
  "block_sparse": "block-sparse attention on a GPU beside cuDNN's dense attention",
  "checkpoints": "a save and a restore of a state of 2.4 GB, with digests",
  "memory": "the published memory table, and what XLA needs",
  "mesh": "training steps on one device and on two, by each axis of the mesh; only when named",
  "residual": "the products around attention on a GPU, each alone, beside cuBLAS and the roofline",
  "sample": "sampling: on a GPU from the paper's image models, on a CPU from the quickstart's",
  "step": "training steps of the paper's models on a GPU, with sparse and with dense attention",
  "tables": "renders the tables of README.md and docs from the results; only when named",
  "tpu_aot": "what the TPU compiler makes of kernels and training steps, hours; only when named",
  "tune": "measures tile sizes into pallas_kernels/tuning.json, on a GPU; only when named",
  "xla": "time and memory of the xla backend up to T = 65,536",
}
MODULES = {
  **{
    name: f"gpu.{name}"
    for name in ("attention", "block_sparse", "mesh", "residual", "sample", "step", "tune")
  },
  **{name: f"cpu.{name}" for name in ("checkpoints", "memory", "xla")},
  "tables": "tables",
  "tpu_aot": "tpu.aot",
}
ONLY_NAMED = ("mesh", "tables", "tpu_aot", "tune")
ON_GPU = ("attention", "block_sparse", "residual", "step", "tune")
IN_WORKERS = {"attention", "block_sparse", "residual", "tune"}


def main(argv: list[str] | None = None) -> int:
  """Returns the exit status: 1 where a measurement failed."""
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
    help="on a GPU: these shapes, patterns or models instead of all",
  )
  args = parser.parse_args(argv)
  if unknown := sorted(set(args.names) - set(BENCHMARKS)):
    parser.error(f"NAME={unknown[0]!r}: must be one of {', '.join(BENCHMARKS)}")
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
    complete &= module.run(args.out, args.only) if parts else module.run(args.out) is None
  return 0 if complete else 1


if __name__ == "__main__":
  raise SystemExit(main())
