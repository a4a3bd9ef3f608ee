"""python -m experiments.benchmark tables: the tables of documents, rendered from benchmarks/*.json.

A document holds a table between two comments, and everything between them is rendered:

    <!-- table: NAME -->
    <!-- end -->
"""

import json
import pathlib
import re
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from experiments.benchmark import cells

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NO_BREAK = "\0"  # a space of a command, while lines are broken


class Table(NamedTuple):
  """A table of a document.

  Attributes:
    benchmark: the command's name.
    file: what it has written.
    cells: the file's content -> rows of cells, the header first.
    source: whether a line below the table says where its figures are from.
  """

  benchmark: str
  file: str
  cells: Callable[[cells.Result], cells.Cells]
  source: bool = True


def render(name: str, results: pathlib.Path = RESULTS) -> str:
  """The Markdown of a table, and of its source.

  Raises:
    ValueError: there is no table of this name.
  """
  if name not in TABLES:
    raise ValueError(f"<!-- table: {name} -->: no such table, there are {', '.join(TABLES)}")
  table = TABLES[name]
  result = json.loads((results / table.file).read_text())
  header, *rows = ([*row] for row in table.cells(result))
  line = lambda row: f"| {' | '.join(row)} |\n".replace("  ", " ")
  text = line(header) + "|---" * len(header) + "|\n" + "".join(map(line, rows))
  return text + (f"\n{source(table, result)}\n" if table.source else "")


def source(table: Table, result: cells.Result) -> str:
  """Device, versions, date and commit of a result, its command and its file."""
  versions = result["versions"]
  cudnn = next((x for name, x in versions.items() if name.startswith("nvidia-cudnn")), "")
  device = result.get("compiler") or re.sub(r"^CPU \((.*)\)$", r"\1", result["device"])
  commit = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{5}\b", r"\1", result["commit"])
  facts = (
    device,
    result.get("gpu", {}).get("power.limit", "").replace(".00 W", " W"),
    f"JAX {versions['jax']}",
    f"driver {versions['driver_version']}" if "driver_version" in versions else "",
    f"cuDNN {cudnn}" if cudnn else "",
    result["date"].partition(" ")[0],
    f"commit {commit}",
    f"`python -m experiments.benchmark {table.benchmark}`".replace(" ", _NO_BREAK),
    f"`benchmarks/{table.file}`",
  )
  line = ", ".join(fact for fact in facts if fact)
  text = textwrap.fill(f"({line}.)", 100, break_long_words=False, break_on_hyphens=False)
  return text.replace(_NO_BREAK, " ")


def rendered(text: str, results: pathlib.Path = RESULTS) -> str:
  """A document with all of its tables as they are to be."""
  # Empty lines: some readers of Markdown need them around a table.
  return BLOCK.sub(lambda block: f"{block[1]}\n{render(block[2], results)}\n{block[3]}", text)


def documents() -> list[pathlib.Path]:
  """Those that may hold tables."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(results: pathlib.Path) -> None:
  """Renders every table of every document from a folder of results, and says what has changed."""
  for path in documents():
    old = path.read_text()
    new = rendered(old, results)
    if new != old:
      path.write_text(new)
    if count := len(BLOCK.findall(old)):
      what = "written" if new != old else "up to date"
      print(f"{path.relative_to(ROOT)}: {count} tables, {what}", flush=True)


TABLES = {
  "sample": Table("sample", "sample_h200.json", cells.sample),
  "sample_steps": Table("sample", "sample_h200.json", cells.sample_steps),
  "xla": Table("xla", "xla_cpu.json", cells.xla),
  "memory": Table("memory", "memory_cpu.json", cells.memory),
  "attention_shares": Table(
    "attention", "attention_h100.json", cells.attention_shares, source=False
  ),
  "attention_first": Table("attention", "attention_h100.json", cells.attention_first),
  "attention_shapes": Table("attention", "attention_h100.json", cells.attention_shapes),
  "attention_shares_h200": Table(
    "attention", "attention_h200.json", cells.attention_shares, source=False
  ),
  "attention_first_h200": Table("attention", "attention_h200.json", cells.attention_first),
  "block_sparse_rates": Table(
    "block_sparse", "block_sparse_h100.json", cells.block_sparse_rates, source=False
  ),
  "block_sparse_ms": Table("block_sparse", "block_sparse_h100.json", cells.block_sparse_ms),
  "step": Table("step", "step_h100.json", cells.step),
  "step_h200": Table("step", "step_h200.json", cells.step),
  "step_models": Table("step", "step_h200.json", cells.step_models),
  "mesh": Table("mesh", "mesh_h200.json", cells.mesh),
  "tpu_bundles": Table("tpu_aot", "tpu_aot.json", cells.tpu_bundles, source=False),
  "tpu_memory": Table("tpu_aot", "tpu_aot.json", cells.tpu_memory),
}
