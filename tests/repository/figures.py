"""python -m tests.repository.figures: how the code is cut, in numbers.

Counts modules, imports between rooms, the length of functions and files, annotations and comments.
"""

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGES = ("pallas_kernels", "sparse_flax", "experiments", "configs")
KERNELS = ("mosaic_gpu", "mosaic_tpu", "decode", "residual")  # rooms of pallas_kernels


def files(*parts: str) -> list[Path]:
  return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
  """Package and folder of a module: `sparse_flax.train` of `sparse_flax.train.loop`."""
  path = ROOT.joinpath(*name.split(".")[:2])
  return ".".join(name.split(".")[:2]) if path.is_dir() else name.split(".")[0]


def imported(path: Path) -> Iterator[str]:
  """Full names of what a file imports from this repository, modules or their contents."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_between_rooms(package: str) -> list[tuple[str, str]]:
  """(module, imported name) where the two lie in different rooms of a package."""
  pairs = []
  for path in files(package):
    if path.name == "__init__.py":  # the public face of a room
      continue
    name = module_name(path)
    for other in imported(path):
      if other.split(".")[0] == package and room(other) != room(name):
        pairs.append((name, other))
  return pairs


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield f"{path.relative_to(ROOT)}:{node.name}", node


def num_lines(node: ast.FunctionDef) -> int:
  return node.end_lineno - node.lineno + 1


def is_annotated(node: ast.FunctionDef) -> bool:
  arguments = node.args
  named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
  named += [x for x in (arguments.vararg, arguments.kwarg) if x]
  named = [x for x in named if x.arg not in ("self", "cls")]
  returns = node.returns is not None or node.name == "__init__"
  return returns and all(x.annotation for x in named)


def top_level_functions(path: Path) -> Iterator[ast.FunctionDef]:
  """Functions and methods; not what is defined inside of them."""
  for node in ast.parse(path.read_text()).body:
    body = node.body if isinstance(node, ast.ClassDef) else [node]
    yield from (x for x in body if isinstance(x, ast.FunctionDef))


def comment_share(paths: list[Path]) -> float:
  """Lines with a comment among all lines that are not empty."""
  comments = lines = 0
  for path in paths:
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments += sum(token.type == tokenize.COMMENT for token in tokens)
    lines += sum(bool(line.strip()) for line in text.splitlines())
  return comments / lines


def main() -> None:
  every = [path for package in PACKAGES for path in files(package)]
  top = [x for x in (ROOT / "sparse_flax").glob("*.py") if x.name != "__init__.py"]
  print(f"modules at the top of sparse_flax: {len(top)}")
  between = imports_between_rooms("sparse_flax")
  print(f"imports between the rooms of sparse_flax: {len(set(between))}")
  rooms = {(room(name), room(other)) for name, other in between}
  print(f"rooms of sparse_flax that import another: {len(rooms)} pairs")
  for name, other in sorted(set(between), key=lambda pair: (room(pair[0]), pair)):
    print(f"    {name} <- {other}")
  sizes = sorted(((num_lines(node), name) for path in every for name, node in functions(path)))
  print(f"longest function: {sizes[-1][0]} lines, {sizes[-1][1]}")
  long = [x for x in sizes if x[0] > 100]
  print(f"functions above 100 lines: {len(long)}")
  for lines, name in reversed(long):
    print(f"    {lines} {name}")
  kernels = [node for path in files("pallas_kernels") for node in top_level_functions(path)]
  share = sum(map(is_annotated, kernels)) / len(kernels)
  print(f"fully annotated functions in pallas_kernels: {share:.0%} of {len(kernels)}")
  lengths = [len(path.read_text().splitlines()) for path in every]
  lengths = [length for length in lengths if length > 3]
  print(f"median file: {statistics.median(lengths)} lines of {len(lengths)} files")
  of_kernels = [path for name in KERNELS for path in files("pallas_kernels", name)]
  print(f"comment lines in kernels: {comment_share(of_kernels):.1%}")


if __name__ == "__main__":
  main()
