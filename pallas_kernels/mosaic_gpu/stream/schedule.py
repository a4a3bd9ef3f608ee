"""The pairs of a pass that the streaming kernels compute, by formula."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The pairs of a pass, by formula.

  Attributes:
    view: "natural": one sequence [B, T, H, D]. "columns": [B, T/l, l, H, D], a sequence per
      residue. "blocks": the same array, a sequence per row. "summaries": natural queries against
      `width` columns of every row.
    stride: l, tokens per row of the view; T must be a multiple of it, except for "natural".
    distance: a query attends to keys at least that many rows of its sequence before it.
    window: keys back a query can see, itself included ("natural" only).
    width: summary columns of each row.
    starts: first summary column; query head h uses starts[h % len(starts)].
    finished: whether summaries of the query's own row are left out; else its j <= i count.
    own: whether the keys j <= i of the query's own row are swept too, under the same softmax
      (forward and dq of finished summaries: a merged head in one sweep).
  """

  view: Literal["natural", "columns", "blocks", "summaries"]
  stride: int = 1
  distance: int = 0
  window: int | None = None
  width: int = 0
  starts: tuple[int, ...] = (0,)
  finished: bool = False
  own: bool = False
