"""What every result needs beside its figures, and how it is printed and written."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import jax


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
  """Writes the rows with device, versions, date and commit, and prints where they are.

  On a GPU also with its power cap and clocks.
  """
  save(path, rows, **facts)
  print(f"\nwrote {path}", flush=True)


def save(path: pathlib.Path, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
  """As `write`, in silence; a stop leaves what there was before, or all of it."""
  result = {**origin(), **facts, "rows": list(rows)}
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_suffix(".unfinished")
  unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
  unfinished.replace(path)


def origin() -> dict[str, Any]:
  """Device, versions, date and commit; on a GPU also its power cap and clocks."""
  return {
    "device": _device(),
    "versions": _versions(),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "commit": _commit(),
    **({"gpu": gpu_state()} if jax.default_backend() == "gpu" else {}),
  }


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """Prints columns, the first to the left, all others to the right."""
  cells = [[str(cell) for cell in row] for row in (header, *rows)]
  widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
  for row in cells:
    first, *columns = (
      cell.ljust(w) if n == 0 else cell.rjust(w)
      for n, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    print("  ".join((first, *columns)), flush=True)


def num_bytes(compiled: jax.stages.Compiled) -> int:
  """Peak bytes of a compiled program: arguments + outputs + temporaries - aliases."""
  stats = compiled.memory_analysis()
  return (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    - stats.alias_size_in_bytes
  )


def short_device() -> str:
  """The device in a file name: h100 for an NVIDIA H100 80GB HBM3."""
  kind = jax.devices()[0].device_kind.removeprefix("NVIDIA ")
  model = re.search(r"\b[A-Za-z]+\d+[A-Za-z]*\b", kind)
  return re.sub(r"\W+", "_", model[0] if model else kind).lower()


def gpu_state() -> dict[str, str]:
  """Power cap and clocks of the first GPU as they are now, by nvidia-smi; empty without it."""
  fields = ("power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem")
  return _nvidia_smi(*fields)


def _nvidia_smi(*fields: str) -> dict[str, str]:
  command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
  try:
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(zip(fields, (value.strip() for value in output.split(",")), strict=True))
  except (OSError, subprocess.SubprocessError, ValueError):
    return {}


def _versions() -> dict[str, str]:
  """Of Python and JAX, and of CUDA's parts and the driver where there are any."""
  wanted = r"jax|jaxlib|flax|jax-cuda\d+-plugin|nvidia-(cudnn|cuda-runtime|cuda-nvcc).*"
  installed = {}
  for package in importlib.metadata.distributions():
    name = (package.name or "").lower().replace("_", "-")
    if re.fullmatch(wanted, name):
      installed[name] = package.version
  python = {"python": platform.python_version()}
  return python | dict(sorted(installed.items())) | _nvidia_smi("driver_version")


def _device() -> str:
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  model = platform.processor() or platform.machine()
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = f"{names[0]}, {len(names)} cores" if names else model
  except OSError:
    pass
  return f"CPU ({model})"


def _commit() -> str:
  """The commit of the working tree, marked "with changes" where what is measured differs from it.

  A copy of the tree without its history is told by SPARSE_FLAX_COMMIT.
  """
  if told := os.environ.get("SPARSE_FLAX_COMMIT"):
    return told
  options = dict(cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=True)
  git = lambda *args: subprocess.run(("git", *args), **options).stdout.strip()
  measured = (":/*.py", ":/pallas_kernels/*.json")
  try:
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + (" with changes" if changed else "")
