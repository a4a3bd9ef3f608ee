"""From the names in a config's `attention_layers` to patterns."""

from collections.abc import Sequence
from typing import Any

from pallas_kernels import patterns

PATTERN_NAMES = ("dense", "local", "column", "strided", "block", "summary", "fixed")
# Layers that choose blocks of keys while they run: `learned.RECIPES`.
LEARNED_NAMES = ("moba", "nsa", "indexer")
Entry = str | Sequence[str]  # one name, or one per group of heads


def make_pattern(
  entry: Entry,
  *,
  num_heads: int,
  stride: int,
  summary_width: int = 0,
  sub_blocks: int = 1,
) -> patterns.Pattern:
  """The pattern that an entry of `attention_layers` names.

  Args:
    entry: a name of PATTERN_NAMES, or g names: the heads then form g groups of neighbours, each
      with its own pattern and, for "summary" and "fixed", all sub-blocks. Of LEARNED_NAMES, which
      choose among all earlier keys, it is `Dense`.
    num_heads: H; a multiple of g and, per group, of sub_blocks where a summary is asked for.
    stride: l, tokens.
    summary_width: c, tokens; for "summary" and "fixed".
    sub_blocks: V; head h of a group has its summary at (h % V) c before the end of a block.

  Raises:
    ValueError: an unknown name, or numbers that do not go together.
  """
  if not isinstance(entry, str):
    if not entry or num_heads % len(entry):
      raise ValueError(
        f"attention_layers has {entry!r}: {num_heads=} must be a multiple of {len(entry)}"
      )
    if learned := [name for name in entry if name in LEARNED_NAMES]:
      raise ValueError(
        f"attention_layers has {entry!r}: {learned[0]!r} must be a whole layer, not heads"
      )
    size = num_heads // len(entry)
    options = dict(stride=stride, summary_width=summary_width, sub_blocks=sub_blocks)
    groups = [make_pattern(name, num_heads=size, **options) for name in entry]
    return patterns.PerHead(tuple(group.of_head(h) for group in groups for h in range(size)))

  if entry not in PATTERN_NAMES + LEARNED_NAMES:
    names = PATTERN_NAMES + LEARNED_NAMES
    raise ValueError(f"attention_layers has {entry!r}: must be one of {names}")
  if stride < 1:
    raise ValueError(f"{stride=}: must be a whole number >= 1")
  if entry in ("summary", "fixed"):
    if summary_width < 1 or sub_blocks < 1 or summary_width * sub_blocks > stride:
      raise ValueError(
        f"{summary_width=}, {sub_blocks=}: {entry!r} needs both >= 1 and their product "
        f"at most {stride=}"
      )
    if num_heads % sub_blocks:
      raise ValueError(f"{sub_blocks=}: must divide the {num_heads} heads that are {entry!r}")
  match entry:
    case "dense" | "moba" | "nsa" | "indexer":
      return patterns.Dense()
    case "local":
      return patterns.Local(stride)
    case "column":
      return patterns.Column(stride)
    case "strided":
      return patterns.Strided(stride)
    case "block":
      return patterns.Block(stride)
    case "fixed":
      return patterns.Fixed(stride, summary_width, sub_blocks)
  summaries = patterns.Fixed(stride, summary_width, sub_blocks).summaries
  return summaries[0] if sub_blocks == 1 else patterns.PerHead(summaries)


def patterns_of(
  *,
  attention_layers: Sequence[Entry],
  num_heads: int,
  stride: int,
  summary_width: int = 0,
  sub_blocks: int = 1,
  **others: Any,
) -> tuple[patterns.Pattern, ...]:
  """The cycle of patterns of a SparseTransformer; its other arguments do not matter."""
  del others
  sizes = dict(num_heads=num_heads, stride=stride)
  sizes |= dict(summary_width=summary_width, sub_blocks=sub_blocks)
  return tuple(make_pattern(entry, **sizes) for entry in attention_layers)
