"""The walls of the house: data flows configs -> experiments -> sparse_flax -> pallas_kernels."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOUSE = ("pallas_kernels", "sparse_flax", "configs", "experiments")
MAY_IMPORT = {
  "pallas_kernels": {"pallas_kernels"},
  "sparse_flax": {"pallas_kernels", "sparse_flax"},
  "configs": {"configs"},
  "experiments": {"pallas_kernels", "sparse_flax", "experiments"},
}
# Between the files of the kernels: patterns -> passes -> backends -> api.
KERNEL_ORDER = (
  "hardware", "patterns", "functions", "scores", "lowering.blocks", "lowering.bits",
  "lowering.lists", "lowering.heads", "lowering.passes", "lowering.plan", "protocol", "tuning",
  "reference", "xla.sizes", "xla.softmax", "xla.views", "xla.tiles", "xla.problems", "xla.backend",
  "mosaic_gpu.gpu", "mosaic_gpu.views", "mosaic_gpu.forward", "mosaic_gpu.backward",
  "mosaic_gpu.stream", "mosaic_gpu.stream_forward", "mosaic_gpu.stream_backward",
  "mosaic_gpu.sizes", "mosaic_gpu.groups", "mosaic_gpu.run_passes", "mosaic_gpu.run_lists",
  "mosaic_gpu.backend", "mosaic_gpu.cudnn", "mosaic_tpu.operands", "mosaic_tpu.steps",
  "mosaic_tpu.sweep", "mosaic_tpu.kernels", "mosaic_tpu.grid", "mosaic_tpu.views",
  "mosaic_tpu.launches", "mosaic_tpu.backend", "partitioning", "api",
)  # fmt: skip
# Code in data: none of these may be called or imported anywhere.


def files():
  return [path for part in HOUSE for path in sorted((ROOT / part).rglob("*.py"))]


def imported(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
  part = path.relative_to(ROOT).parts[0]
  for name in imported(path):
    top = name.partition(".")[0]
    assert top not in HOUSE or top in MAY_IMPORT[part], f"{path} imports {name}"
    if part == "configs":
      assert top in ("configs", "ml_collections", "math"), f"{path} imports {name}"
    if part == "pallas_kernels":
      assert top not in ("flax", "ml_collections", "optax"), f"{path} imports {name}"
    if part in ("pallas_kernels", "sparse_flax"):
      launching = name.startswith(("absl.flags", "absl.app", "argparse"))
      assert not launching, f"{path} imports {name}: libraries know no flags"


def test_kernel_files_import_only_what_lies_below_them():
  for n, name in enumerate(KERNEL_ORDER):
    above = {f"pallas_kernels.{other}" for other in KERNEL_ORDER[n + 1 :]}
    found = set(imported(ROOT / "pallas_kernels" / f"{name.replace('.', '/')}.py"))
    assert not {x for x in found if any(x.startswith(a) for a in above)}, name
