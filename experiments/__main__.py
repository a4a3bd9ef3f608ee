"""python -m experiments: lists the commands."""

import ast
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent


def commands() -> dict[str, str]:
  """What each command does, by its name: those modules and folders that can be run."""
  found = {}
  for path in sorted(FOLDER.glob("*.py")) + sorted(FOLDER.glob("*/__main__.py")):
    text = path.read_text()
    name = path.parent.name if path.name == "__main__.py" else path.stem
    if path.parent / path.name != pathlib.Path(__file__) and "__main__" in text:
      found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
  return found


def main() -> int:
  print("Commands, from the folder of a clone; --help of each says more:\n")
  for name, does in commands().items():
    print(f"  python -m experiments.{name:<11} {does}")
  print("\nConfigs and their fields: python -m experiments.train --help")
  return 0


if __name__ == "__main__":
  sys.exit(main())
