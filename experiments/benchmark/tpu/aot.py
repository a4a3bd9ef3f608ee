"""What the TPU compiler makes of our kernels and of the paper's training steps; no TPU is needed.

Kernels: bundles (a bundle issues in a cycle) of a step without and with a mask, and of all that is
issued for a visited block and head; memory; bytes of HBM, by walking the windows of the kernels and
adding what the compiler counts for everything else; and the copies that only move q, k or v. Beside
them JAX's splash attention. Steps: whether they fit a chip, and what crosses between chips.
"""

import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from experiments.benchmark import report
from experiments.benchmark.tpu import compiler as compiler_lib
from experiments.benchmark.tpu import jobs as jobs_lib

# What every chip has in full; of the rest others than v5e have smaller blocks, for time.
_IN_FULL = ("dense", "local", "column", "dense_lanes", "long", "enwik8", "enwik8_column")
# One case for each kernel and each way to read heads.
QUICK = ("column", "cifar10_column", "long")
CASES, CONFIGS = tuple(jobs_lib.CASES), tuple(jobs_lib.BODIES)
PARTS = ("kernels", "splash", "step")
_FIGURES = ("bundles_full", "bundles_masked", "bundles_per_block")


def jobs() -> list[str]:
  """All of the table."""
  small = lambda chip, case: "" if chip == "v5e" or case in _IN_FULL else "small:"
  return [
    *(f"{small(chip, case)}kernels/{chip}/{case}" for chip in compiler_lib.CHIPS for case in CASES),
    *(
      f"splash/{chip}/{mask}/{block}"
      for chip in compiler_lib.CHIPS
      for mask in ("dense", "local")
      for block in (512, 1_024)
    ),
    *(f"step/{chip}/{name}/1" for chip in compiler_lib.CHIPS for name in CONFIGS),
    *(f"step/{chip}/{name}/256" for chip in compiler_lib.PODS for name in CONFIGS),
  ]


def compile_jobs(*names: str, timeout: float = 3_600) -> list[dict]:
  """The rows of some jobs, each with its "job"; a last one has an "error" if one failed.

  In a process of their own: the compiler reads its flags once, and some of its failures abort.
  """
  rows, error = [], ""
  with tempfile.TemporaryDirectory() as folder:
    steps = all(name.startswith("step") for name in names)
    environment = os.environ | compiler_lib.environment(None if steps else folder)
    command = [sys.executable, "-m", "experiments.benchmark.tpu.jobs", *names]
    options = dict(capture_output=True, text=True, env=environment, timeout=timeout)
    try:
      done = subprocess.run(command, **options)
      output, error = done.stdout, done.stderr.strip()[-2_000:]
    except subprocess.TimeoutExpired as late:
      output, error = (late.stdout or b"").decode(), f"not done after {timeout:.0f} s"
  for line in output.splitlines():
    if line.startswith("{"):
      answer = json.loads(line)
      rows += [dict(job=answer["job"]) | row for row in answer["rows"]]
  missing = [name for name in names if name not in {row["job"] for row in rows}]
  return [*rows, *(dict(job=name, error=error) for name in missing[:1])]


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Prints the table and writes tpu_aot.json; whether everything was compiled."""
  print(__doc__, flush=True)
  if compiler_lib.libtpu_path() is None:
    print("libtpu is missing: pip install libtpu, on Linux on x86-64")
    return False
  names = [name for name in jobs() if not only or any(part in name for part in only)]
  rows, workers = [], os.cpu_count() or 2
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for n, compiled in enumerate(pool.map(compile_jobs, names), 1):
      rows += compiled
      error = compiled[-1].get("error", "")[-300:]
      print(f"  {n} of {len(names)}: {compiled[0]['job']} {error}", flush=True)
  kernels = [
    (
      f"{row['chip']} {row.get('case') or 'splash ' + row['mask']} {row.get('direction', '')}",
      kernel["kernel"],
      row.get("block", ""),
      *(f"{kernel.get(x, 0):,.0f}" for x in _FIGURES),
      f"{kernel['vmem_bytes'] / 2**20:,.1f}",
      f"{row['hbm_bytes'] / row['hbm_bytes_of_arrays']:.2f}" if "hbm_bytes" in row else "",
      len(row["moves"]) if "moves" in row else "",
    )
    for row in rows
    for kernel in row.get("kernels", ())
  ]
  header = ("kernel", "", "block", "full", "masked", "per block", "VMEM MiB", "HBM", "moves")
  report.print_table(header, kernels)
  steps = [
    (
      f"{row['chip']} x {row['devices']} {row['config']}",
      f"{row['hbm_need'] / compiler_lib.GIB:.2f} of {row['hbm'] / compiler_lib.GIB:.0f}",
      ", ".join(f"{count} {name}" for name, count in row["collectives"].items()),
      row["moves"],
    )
    for row in rows
    if "hbm" in row
  ]
  report.print_table(("step", "HBM GiB", "collectives", "moves"), steps)
  report.write(out / "tpu_aot.json", rows, compiler=compiler_lib.libtpu_version())
  return not any("error" in row for row in rows)
