"""The code of pages: the patterns of docs/patterns.md, and the examples of docs/attention.md."""

import re

import numpy as np

from pallas_kernels import patterns
from tests.helpers.paths import ROOT

GALLERY = ROOT / "docs" / "patterns.md"
MANUAL = ROOT / "docs" / "attention.md"


def examples(path) -> list[str]:
  """The blocks of Python of a page, which the build of the site executes."""
  return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def run(source: str) -> dict:
  """What the code of an example defines."""
  names = {}
  exec(compile(source, "an example", "exec"), names)
  return names


def gallery() -> dict[str, patterns.Pattern]:
  """The patterns that the page draws, by their names."""
  found = {}
  names = dict(np=np, patterns=patterns, draw=found.update)
  for source in examples(GALLERY)[1:-1]:  # between the function `draw` and the reader's own
    exec(compile(source, str(GALLERY), "exec"), names)
  return found
