"""What the heads of a trained model are for, named by a rule on their averages over many inputs.

Of each head's attention, averaged over inputs and predicted places:

- columns: at least half lies in the rows above, on the own column or the one left of it; of texts
  and sounds, whole strides back, before the own block;
- rows: else at least half lies on the row of pixels that ends with the predicted one, from the one
  above it on; of texts and sounds, on the last stride of bytes;
- data-dependent: else at least half lies elsewhere when the input is another one;
- positional memory: else at most a quarter does: the same places whatever the input;
- mixed: what is left.

The column to the left counts because the query of a pixel's first channel stands there: it reads
the byte before the one that it predicts (in the first column, from the end of the row above). The
start vector is the same place for every input. A head whose pattern is a row or a column can hardly
be anything else; what moves with the input says then whether it chooses there. arXiv:1904.10509,
Figure 2, has these kinds in a model of dense attention.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from sparse_flax.view.averages import Averages

ROWS, COLUMNS, MEMORY = "rows", "columns", "positional memory"
DATA, MIXED = "data-dependent", "mixed"
MOST, FEW = 0.5, 0.25
RULE = {  # the first that holds, for who reads the numbers
  COLUMNS: f"above >= {MOST}",
  ROWS: f"recent >= {MOST}",
  DATA: f"change >= {MOST}",
  MEMORY: f"change <= {FEW}",
  MIXED: "none of these",
}
# Of `Averages.numbers`, as the table calls them.
NUMBERS = {"above": "above", "recent": "last row", "start": "start", "change": "changes"}


def kind_of(*, above: float, recent: float, change: float) -> str:
  """The name of a head, from three shares of its attention.

  Args:
    above: on the own column in the rows above, and on the one left of it, from 0 to 1.
    recent: on the last row of pixels.
    change: what lies elsewhere for another input.
  """
  if above >= MOST:
    return COLUMNS
  if recent >= MOST:
    return ROWS
  if change >= MOST:
    return DATA
  return MEMORY if change <= FEW else MIXED


def kinds_of(averages: Averages, names: Sequence[Sequence[str]]) -> list[dict]:
  """The kinds of every layer and of its heads, as plain JSON values.

  Args:
    averages: of all layers, over two inputs at least.
    names: of each layer's heads, which may be fewer than the averages have.

  Returns:
    Of each layer `layer`, its number; `kind`, those of its heads, each once; and `heads`, with
    `name`, `kind` and the shares `above`, `recent`, `start` and `change` of `Averages.numbers`.

  Raises:
    ValueError: the averages are of one input, which says nothing about another.
  """
  if averages.num_inputs < 2:
    raise ValueError(f"num_inputs={averages.num_inputs}: must be at least 2 to tell kinds")
  found = []
  for layer, heads in enumerate(names):
    of_heads = []
    for h, name in enumerate(heads):
      shares = {key: _share(averages.numbers[key][layer, h]) for key in NUMBERS}
      kind = kind_of(**{key: shares[key] for key in ("above", "recent", "change")})
      of_heads.append(dict(name=name, kind=kind, **shares))
    kind = " and ".join(dict.fromkeys(head["kind"] for head in of_heads))
    found.append(dict(layer=layer, kind=kind, heads=of_heads))
  return found


def table(layers: Sequence[dict]) -> str:
  """`kinds_of` for a terminal, a line for each head, and below them the rule."""
  rows = [("layer", "head", "kind", *NUMBERS.values())]
  for layer in layers:
    label = f"{layer['layer']} {layer['kind']}"
    for head in layer["heads"]:
      shares = [f"{100 * head[key]:.0f} %" for key in NUMBERS]
      rows.append((label, head["name"], head["kind"], *shares))
      label = ""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  texts = 3  # the first columns; the others are numbers
  cells = lambda row: [
    text.ljust(width) if n < texts else text.rjust(width)
    for n, (text, width) in enumerate(zip(row, widths, strict=True))
  ]
  lines = ["  ".join(cells(row)).rstrip() for row in rows]
  least, most = f">= {100 * MOST:.0f} %", f"<= {100 * FEW:.0f} %"
  rule = (f"{COLUMNS}: above {least}", f"{ROWS}: last row {least}", f"{DATA}: changes {least}")
  lines.append("; else ".join((*rule, f"{MEMORY}: changes {most}", MIXED)))
  return "\n".join(lines)


def _share(value: Float32[np.ndarray, ""] | np.float32) -> float:
  return round(float(value), 4)
