"""Tile sizes of the kernels: measured ones from tuning.json, and a way to try others.

`python -m experiments.benchmark tune` measures candidates and writes the file. What is not in it
runs with the default of its kernel.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import hardware

PATH = pathlib.Path(__file__).with_name("tuning.json")
Direction = Literal["fwd", "bwd"]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How one kernel cuts its work; not every kernel reads every field.

  Attributes:
    block_q: rows that a CTA owns: queries, backward keys too.
    block_k: keys of a step, where they stream; of windows forward those that a step brings: fewer
      than its queries see where a CTA walks along a sequence; of short sequences backward the
      rows up to which dS stays in memory.
    stages: steps in flight, where there is more than one.
    warpgroups: those that compute.
    at_once: of windows forward, tiles of logits that a warpgroup has in registers.
  """

  block_q: int
  block_k: int
  stages: int
  warpgroups: int
  at_once: int = 2


class Key(NamedTuple):
  """What the best sizes depend on.

  Attributes:
    device: its kind as JAX names it, "NVIDIA H100 80GB HBM3".
    kind: of the kernel: "local", "column", "block", "summary" or "dense".
    direction: "fwd" or "bwd".
    rows: length of a sequence of the kernel's view: of a column, of a block, else T.
    head_dim: of q and k.
    dtype: of q, k and v.
  """

  device: str
  kind: str
  direction: Direction
  rows: int
  head_dim: int
  dtype: str


def read(path: pathlib.Path = PATH) -> dict[Key, BlockSizes]:
  """The table in a file: a list of rows with the fields of `Key` and `BlockSizes`."""
  # Sizes that came later are not in all files.
  pick = lambda row, names: {name: row[name] for name in names if name in row}
  sizes = [field.name for field in dataclasses.fields(BlockSizes)]
  rows = json.loads(path.read_text())
  return {Key(**pick(row, Key._fields)): BlockSizes(**pick(row, sizes)) for row in rows}


def write(table: dict[Key, BlockSizes], path: pathlib.Path = PATH) -> None:
  """Writes a table, one row a line."""
  rows = [json.dumps({**key._asdict(), **vars(sizes)}) for key, sizes in sorted(table.items())]
  path.write_text("[\n " + ",\n ".join(rows) + "\n]\n" if rows else "[]\n")


TABLE = read()
# A context of JAX, so that programs traced under other sizes are not found again.
_forced = jax.make_user_context(None)


def block_sizes(
  kind: str, direction: Direction, rows: int, head_dim: int, dtype: Any
) -> BlockSizes | None:
  """The sizes to use on the device that is traced for; None for the kernel's own default."""
  if _forced.value is not None and _forced.value[:2] == (kind, direction):
    return _forced.value[2]
  device, dtype = hardware.device_kind(), jnp.dtype(dtype).name
  return TABLE.get(Key(device, kind, direction, rows, head_dim, dtype))


def context() -> tuple[str, Any]:
  """What sizes depend on besides the problem, for caches of what was chosen by them."""
  return hardware.device_kind(), _forced.value


@contextlib.contextmanager
def override(kind: str, direction: Direction, sizes: BlockSizes | None) -> Iterator[None]:
  """Within it, in this thread, one kernel has these sizes (None: its default), table or not."""
  with _forced((kind, direction, sizes)):
    yield
