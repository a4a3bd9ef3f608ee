"""The recipes of docs/attention.md: their code, their masks, and the manual's picture of them.

  python -m tests.helpers.recipes docs/pictures/recipes.png

The manual is the only place of a recipe, and the tests the only place that runs a manual's code.
"""

import os
import re
import sys

import numpy as np

from sparse_flax.view import masks as masks_lib
from tests.helpers.paths import ROOT

MANUAL = ROOT / "docs" / "attention.md"
_SECTION = MANUAL.read_text().partition("\n## Recipes\n")[2].partition("\n## ")[0]
RECIPES = dict(re.findall(r"\n([^\n]+):\n\n```python\n(.*?)```", _SECTION, re.DOTALL))
T, TILE = 128, 8  # of the picture, tokens


def run(source: str) -> dict:
  """What the code of an example defines."""
  names = {}
  exec(compile(source, "example of docs/attention.md", "exec"), names)
  return names


def name(title: str) -> str:
  """The first words of a recipe's title."""
  return re.split("[:,;]", title)[0]


def masks(source: str, T: int) -> np.ndarray | None:
  """The first T queries and keys of what a recipe allows, [P, T, T]; None where it allows all."""
  names = run(source)
  if "route" in names:  # blocks of the first sequence and head
    blocks = np.asarray(names["route"](names["q"], names["k"]))[0, 0]
    size = names["q"].shape[1] // len(blocks)
    return np.tril(np.kron(blocks, np.ones((size, size), bool))[:T, :T])[None]
  if "pattern" not in names:
    return None
  mask = names["pattern"].mask(T)
  if "documents" in names:
    ids = np.asarray(names["documents"])[0, :T]
    mask = mask & (ids[:, None] == ids)
  return mask.reshape(-1, T, T)


def panels() -> list[tuple[str, np.ndarray]]:
  """Name and mask of all recipes that have one, a panel per head where heads differ."""
  found = []
  for title, source in RECIPES.items():
    several = masks(source, T)
    for h, mask in enumerate(() if several is None else several):
      head = f", head {h}" if len(several) > 1 else ""
      found.append((name(title) + head, mask))
  return found


def draw(path: str | os.PathLike) -> None:
  figure = masks_lib.draw_tiles(panels(), tile=TILE)
  figure.savefig(path, metadata={"Software": None})  # the same picture is the same file


if __name__ == "__main__":
  draw(*sys.argv[1:])
