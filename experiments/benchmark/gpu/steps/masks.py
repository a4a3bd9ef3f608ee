"""Our patterns as JSON, and as functions of integers that other libraries' compilers can read."""

import dataclasses
from collections.abc import Callable
from typing import Any


def described(pattern: Any) -> dict[str, Any]:
  """The class and the fields of a pattern of `pallas_kernels.patterns`."""
  return {"kind": type(pattern).__name__, **dataclasses.asdict(pattern)}


def mask_of(pattern: dict[str, Any]) -> Callable[[Any, Any, Any, Any], Any]:
  """(sequence, head, query, key) -> whether they attend, as FlexAttention asks for it.

  Raises:
    ValueError: a kind of pattern that no recipe has.
  """
  match pattern:
    case {"kind": "Dense", "causal": True}:
      return lambda b, h, i, j: j <= i
    case {"kind": "Local", "window": window, "causal": True}:
      return lambda b, h, i, j: (j <= i) & (i - j < window)
    case {"kind": "Column", "stride": stride}:
      return lambda b, h, i, j: (j <= i) & ((i - j) % stride == 0)
    case {"kind": "Strided", "stride": stride}:
      return lambda b, h, i, j: (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))
    case {"kind": "Fixed", "stride": stride, "summary": width, "num_subblocks": count}:

      def fixed(b, h, i, j):
        # Keys between the end of a block and the summary that this head reads.
        after = stride - 1 - j % stride - h % count * width
        return (j <= i) & ((i // stride == j // stride) | ((after >= 0) & (after < width)))

      return fixed
  raise ValueError(f"{pattern}: no peer has a mask of this kind")


def heads_of(pattern: dict[str, Any]) -> int:
  """How many heads differ before they repeat."""
  return pattern.get("num_subblocks", 1)
