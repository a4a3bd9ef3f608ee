"""What the TPU compiler says of a program. It runs on any x86 CPU, with libtpu and without a TPU.

`environment` has to be that of the process before JAX is imported: libtpu reads its flags once. The
compiler then writes every kernel's final instructions into a folder. A bundle is what issues in one
cycle; bundles say nothing of waiting for memory.
"""

import dataclasses
import glob
import itertools
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.extend.core as jex
import numpy as np
from jax._src.pallas import core as pallas_core
from jax.experimental import topologies

GIB = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_MOVES = ("transpose", "copy", "reshape")  # what is left of them when a program is optimised moves


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device of a kind, as JAX counts them.

  Attributes:
    topology: the smallest the compiler knows.
    hbm: bytes of memory.
  """

  topology: str
  hbm: int


CHIPS = {
  "v5e": Chip("v5e:2x2", 16 * GIB),
  "v5p": Chip("v5p:2x2x1", 95 * GIB),
  "v6e": Chip("v6e:2x2", 32 * GIB),
  "tpu7x": Chip("tpu7x:2x2x1", 96 * GIB),  # half a chip: each of its two cores is a device
}
PODS = {"v5e": "v5e:16x16", "v5p": "v5p:4x8x8"}  # 256 chips


def libtpu_path() -> str | None:
  """The TPU compiler: of the package, or where `make` puts it; None where there is none."""
  for folder in (*sys.path, f"{sys.prefix}/tpu"):
    path = pathlib.Path(folder, "libtpu", "libtpu.so")
    if path.is_file():
      return str(path)
  return None


def libtpu_version() -> str:
  """Of libtpu, from what is installed beside it."""
  folders = pathlib.Path(libtpu_path() or "").parent.parent.glob("libtpu-*.dist-info")
  return next((x.name.removesuffix(".dist-info") for x in folders), "unknown")


def environment(folder: str | None) -> dict[str, str]:
  """Of a process that compiles for TPUs; `folder` gets the compiler's notes, gigabytes of a model.

  Without it programs know nothing of their kernels.
  """
  flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true" if folder else ""
  return {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "LIBTPU_INIT_ARGS": flags,
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LIBRARY_PATH": libtpu_path() or "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
  }


def devices(topology: str) -> list:
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


class Program:
  """A compiled program.

  Attributes:
    hlo: the optimised program.
    compiled: of jax.
  """

  def __init__(self, function: Callable, arguments: tuple, mesh: jax.sharding.Mesh, **options):
    """Compiles `function` of arguments that are ShapeDtypeStructs for the devices of a mesh."""
    match = re.search(r"--xla_jf_dump_to=(\S+)", os.environ["LIBTPU_INIT_ARGS"])
    folder = match.group(1) if match else None
    for old in glob.glob(f"{folder}/*"):
      os.remove(old)
    with jax.set_mesh(mesh):
      traced = jax.jit(function, **options).trace(*arguments)
      self.jaxpr = traced.jaxpr
      self.compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    self.hlo = self.compiled.as_text()
    self._notes = {}
    for path in sorted(glob.glob(f"{folder}/*final_bundles.txt")):
      if "schedule-analysis" not in path:
        name = re.match(r"\d+-(.*)-\d+-final_bundles", os.path.basename(path)).group(1)
        original = glob.glob(f"{folder}/*-{glob.escape(name)}-02-original.txt")
        texts = [pathlib.Path(x).read_text() for x in (path, *original)]
        self._notes[name] = (texts[0], texts[-1])

  def hbm_need(self) -> int:
    """Bytes on each device: arguments, results that are no arguments, temporaries and code."""
    m = self.compiled.memory_analysis()
    arrays = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return arrays + m.temp_size_in_bytes + m.generated_code_size_in_bytes

  def kernels(self, prefix: str) -> list[str]:
    """The kernels' names in the program, by the beginning of their name."""
    return [name for name in self._notes if name.startswith(prefix)]

  def vmem(self, kernel: str) -> int:
    """Bytes of the kernel's own memory, its windows and what is spilled among them."""
    text = self._notes[kernel][1]
    sizes = re.findall(r"^ *#allocation\d+ \[.*space=vmem, size = (0x[0-9a-f]+)", text, re.M)
    return sum(int(size, 16) for size in sizes)

  def bundles(self, kernel: str, num_parts: int) -> tuple[int, list[int]]:
    """Of the whole kernel, and of its last `num_parts` parts that are run on a condition.

    Before those, some parts of a few bundles belong to every step.
    """
    lines = self._notes[kernel][0].splitlines()
    first = next(n for n, line in enumerate(lines) if re.match(r" *0 ", line))
    jumps = []
    for n, line in enumerate(lines[first:]):
      if jump := re.search(r"sbr\.rel \((!?%p\w+)\) target", line):
        jumps.append((n, jump.group(1)))
    parts = [(b[0] - a[0], a[1]) for a, b in itertools.pairwise(jumps)]
    while parts and parts[-1][1].startswith("!"):
      parts.pop()  # the loop's end, and copies to and from memory
    last = parts[max(0, len(parts) - num_parts) :]
    if len(last) < num_parts or any(name.startswith("!") for _, name in last):
      raise ValueError(f"{kernel}: {len(parts)} parts, {num_parts} were expected")
    return len(lines) - first, [size for size, _ in last]

  def moves(self, least: int) -> list[str]:
    """Operations that only move an array of `least` elements or more into another order.

    Copies that keep the order (between memories) are none; relayouts inside fusions are.
    """
    moved = []
    for line in self.hlo.splitlines():
      match = re.match(r"\s*(?:ROOT )?%\S+ = (\S+?)\[([\d,]*)\](\{\S*\})? ([\w-]+)\((.*)", line)
      if not match or match.group(4) not in _MOVES:
        continue
      dtype, shape, layout, name, operands = match.groups()
      if (dims := re.search(r"dimensions=\{([\d,]*)\}", operands)) and _is_sorted(dims.group(1)):
        continue
      if math.prod(int(n) for n in shape.split(",") if n) < least:
        continue
      order = lambda text: re.sub(r"S\(\d\)", "", text or "")
      source = re.search(r"%[\w.-]+", operands)
      other = source and self._type_of(source.group())
      if name == "copy" and other and order(other) == order(f"{dtype}[{shape}]{layout}"):
        continue
      moved.append(f"{name} {dtype}[{shape}]")
    return moved

  def _type_of(self, value: str) -> str | None:
    match = re.search(rf"{re.escape(value)} = (\S+)", self.hlo)
    return match and match.group(1)

  def collectives(self) -> dict[str, int]:
    """How often each kind stands in the program (once for all turns of a loop)."""
    count = lambda name: len(re.findall(rf" {name}(?:-start)?\(", self.hlo))
    return {name: n for name in COLLECTIVES if (n := count(name))}

  def other_bytes(self) -> int:
    """Bytes that all but the kernels read and write."""
    return int(self.compiled.cost_analysis().get("bytes accessed", 0))


def _is_sorted(numbers: str) -> bool:
  return numbers.split(",") == sorted(numbers.split(","), key=int)


# ----------------------------------------------------------------------------- launches of kernels


class Launch(NamedTuple):
  """One kernel in a program.

  Attributes:
    name: of the kernel.
    grid: its sizes.
    scalars: the arrays in scalar memory that drive it.
    bytes: what its windows move: a block moves when its index changes.
    blocks: the shapes of the windows.
  """

  name: str
  grid: tuple[int, ...]
  scalars: list[np.ndarray]
  bytes: int
  blocks: list[tuple[int, ...]]


def launches(jaxpr: Any) -> list[Launch]:
  """The kernels of one device's program, whose scalars have to be constants."""
  calls = []

  def run(jaxpr, consts, inputs):
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))
    value = lambda x: x.val if isinstance(x, jex.Literal) else known.get(x)
    for eqn in jaxpr.eqns:
      values = [value(x) for x in eqn.invars]
      inner = next((eqn.params[x] for x in ("jaxpr", "call_jaxpr") if x in eqn.params), None)
      if eqn.primitive.name == "pallas_call":
        calls.append(_launch(eqn.params, values))
        results = [None] * len(eqn.outvars)
      elif inner is not None and hasattr(inner, "consts"):
        results = run(inner.jaxpr, inner.consts, values[: len(inner.jaxpr.invars)])
      elif inner is not None:
        results = run(inner, [], values)
      elif all(x is not None for x in values):
        results = eqn.primitive.bind(*values, **eqn.params)
        results = results if eqn.primitive.multiple_results else [results]
      else:
        results = [None] * len(eqn.outvars)
      known |= dict(zip(eqn.outvars, results, strict=True))
    return [value(x) for x in jaxpr.outvars]

  run(jaxpr.jaxpr, jaxpr.consts, [None] * len(jaxpr.jaxpr.invars))
  return calls


def _launch(params: dict, values: list) -> Launch:
  mapping = params["grid_mapping"]
  scalars = [np.asarray(x) for x in values[: mapping.num_index_operands]]
  axes = [np.arange(n) for n in mapping.grid]
  points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
  total = 0
  for block in mapping.block_mappings:
    index = jax.vmap(lambda at, block=block: _block_index(block, at, scalars))
    at = np.stack(jax.jit(index)(points), axis=-1)
    changes = np.append(True, np.any(np.diff(at, axis=0) != 0, axis=1))
    sizes, shape = _sizes(block), block.array_aval.shape
    inside = [
      np.clip(n - at[changes, axis] * size, 0, size)
      for axis, (n, size) in enumerate(zip(shape, sizes, strict=True))
    ]
    total += int(np.prod(inside, axis=0).sum()) * block.array_aval.dtype.itemsize
  name = params["name"]
  shapes = [tuple(_sizes(block)) for block in mapping.block_mappings]
  return Launch(name, tuple(mapping.grid), scalars, total, shapes)


def _block_index(block: pallas_core.BlockMapping, at, scalars):
  """The index of the block at a point of the grid."""
  start = block.compute_start_indices_interpret(tuple(at), *scalars)
  return [n // size for n, size in zip(start, _sizes(block), strict=True)]


def _sizes(block: pallas_core.BlockMapping) -> list[int]:
  squeezed = pallas_core.Squeezed
  return [1 if isinstance(size, squeezed) else size.block_size for size in block.block_shape]
