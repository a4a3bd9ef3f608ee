"""What every result needs beside its figures, and how it is printed and written."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Sequence
from typing import Any

import jax


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]], **more: Any) -> None:
  """Writes the rows with device, versions, date and commit, and prints where they are."""
  packages = ("jax", "jaxlib", "flax")
  result = {
    "device": _device(),
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    "commit": _commit(),
    **more,
    "rows": list(rows),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
  print(f"\nwrote {path}", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
  """Prints columns, the first to the left, all others to the right."""
  cells = [[str(cell) for cell in row] for row in (header, *rows)]
  widths = [max(len(row[n]) for row in cells) for n in range(len(header))]
  for row in cells:
    first, *rest = (
      cell.ljust(w) if n == 0 else cell.rjust(w)
      for n, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    print("  ".join((first, *rest)), flush=True)


def num_bytes(compiled: jax.stages.Compiled) -> int:
  """Peak bytes of a compiled program: arguments + outputs + temporaries - aliases."""
  stats = compiled.memory_analysis()
  return (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    - stats.alias_size_in_bytes
  )


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
  """The commit of the working tree, marked where files differ from it."""
  run = lambda *args: subprocess.run(args, capture_output=True, text=True, check=True).stdout
  try:
    commit = run("git", "rev-parse", "--short=12", "HEAD").strip()
    changed = run("git", "status", "--porcelain", "--untracked-files=no", "--", "*.py").strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + (" with changes" if changed else "")
