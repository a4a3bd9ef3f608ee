"""The xla backend from T = 1,024 to 65,536: time and peak memory of every pattern.

B = 1, 2 heads of 64, float32, stride 256, summaries of 32. Dense stops at 16,384.
"""

import pathlib
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import report
from pallas_kernels import patterns
from pallas_kernels import sparse_attention

PATTERNS = {
  "local": patterns.Local(256),
  "column": patterns.Column(256),
  "block": patterns.Block(256),
  "summary": patterns.Summary(256, 32),
  "fixed": patterns.Fixed(256, 32),
  "strided": patterns.Strided(256),
  "dense": patterns.Dense(),
}
LENGTHS = tuple(1024 * 2**n for n in range(7))
LONGEST_DENSE = 16_384
SECONDS = 2.0  # of measuring per row: at least one call, at most 20


def attention(name: str, direction: str):
  """The jitted call that is measured: fwd, or fwdbwd with the gradients of q, k and v."""
  attend = lambda q, k, v: sparse_attention(q, k, v, pattern=PATTERNS[name], implementation="xla")
  if direction == "fwd":
    return jax.jit(attend)

  @jax.jit
  def both(q, k, v):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(out)

  return both


def arrays(T: int, seed: int = 0) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.standard_normal((1, T, 2, 64)), jnp.float32) for _ in range(3))


def measure(name: str, T: int, direction: str) -> dict:
  """Median time of a call and the peak memory of its program."""
  qkv = arrays(T)
  compiled = attention(name, direction).lower(*qkv).compile()
  jax.block_until_ready(compiled(*qkv))
  seconds = []
  while not seconds or (sum(seconds) < SECONDS and len(seconds) < 20):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*qkv))
    seconds.append(time.perf_counter() - start)
  return {
    "pattern": name,
    "direction": direction,
    "seq_len": T,
    "ms": round(1e3 * statistics.median(seconds), 3),
    "bytes": report.num_bytes(compiled),
  }


def slope(rows: list[dict], name: str, direction: str) -> float:
  """Of log memory over log T, from T = 4,096 on, by least squares."""
  chosen = [row for row in rows if (row["pattern"], row["direction"]) == (name, direction)]
  points = [(row["seq_len"], row["bytes"]) for row in chosen if row["seq_len"] >= 4096]
  T, size = np.log(np.asarray(points, float)).T
  return round(float(np.polyfit(T, size, 1)[0]), 3)


def resident_bytes(name: str, T: int) -> int:
  """Maximum resident memory of a fresh process that makes one call, forward and backward."""
  # Not resource.getrusage: its maximum of a child begins with what the parent had.
  program = (
    "import jax, re; from experiments.benchmark.cpu import xla; "
    f"jax.block_until_ready(xla.attention({name!r}, 'fwdbwd')(*xla.arrays({T}))); "
    "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
  )
  command = [sys.executable, "-c", program]
  kilobytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  return 1024 * int(kilobytes)


def run(out: pathlib.Path) -> None:
  """Measures, prints and writes xla_<platform>.json."""
  rows = []
  print(__doc__, flush=True)
  header = ("pattern", "direction", "T", "ms", "MB", "dense / this, time")
  table, dense = [], {}
  for T in LENGTHS:
    for name in ("dense", *(name for name in PATTERNS if name != "dense")):
      for direction in ("fwd", "fwdbwd"):
        if name == "dense" and T > LONGEST_DENSE:
          continue
        row = measure(name, T, direction)
        rows.append(row)
        if name == "dense":
          dense[T, direction] = row["ms"]
        ratio = f"{dense[T, direction] / row['ms']:.2f}" if T <= LONGEST_DENSE else ""
        figures = f"{row['ms']:,.1f}", f"{row['bytes'] / 1e6:,.1f}", ratio
        table.append((name, direction, f"{T:,}", *figures))
        print("  ".join(table[-1]), file=sys.stderr, flush=True)
  report.print_table(header, table)
  slopes = [
    {"pattern": name, "direction": direction, "slope": slope(rows, name, direction)}
    for name in PATTERNS
    for direction in ("fwd", "fwdbwd")
  ]
  print("\nslope of log memory over log T, from T = 4,096 on")
  report.print_table(("pattern", "direction", "slope"), [tuple(entry.values()) for entry in slopes])
  resident = None
  if sys.platform == "linux":
    resident = resident_bytes("strided", LENGTHS[-1])
    print(f"\none strided call, forward + backward, T = {LENGTHS[-1]:,}, in a fresh process:")
    print(f"{resident / 1e9:.2f} GB of maximum resident memory")
  path = out / f"xla_{jax.default_backend()}.json"
  report.write(path, rows, slopes=slopes, resident_bytes_strided_65536=resident)
