"""The three ways to combine patterns, spelled as entries of `attention_layers`."""

import pytest

from pallas_kernels import patterns
from sparse_flax.model.layer_patterns import make_pattern

dense, local, column = patterns.Dense(), patterns.Local(8), patterns.Column(8)
summary = lambda offset: patterns.Summary(8, 2, offset)
block = patterns.Block(8)

ENTRIES = {
  "dense": ("dense", 1, [dense] * 4),
  "local": ("local", 1, [local] * 4),
  "column": ("column", 1, [column] * 4),
  "merged-strided": ("strided", 1, [patterns.Strided(8)] * 4),
  "block": ("block", 1, [block] * 4),
  "merged-fixed": ("fixed", 1, [block | summary(0)] * 4),
  "fixed-sub-blocks": ("fixed", 2, [block | summary(0), block | summary(2)] * 2),
  "summary": ("summary", 1, [summary(0)] * 4),
  "summary-sub-blocks": ("summary", 4, [summary(0), summary(2), summary(4), summary(6)]),
  "two-groups": (("local", "column"), 1, [local, local, column, column]),
  "four-groups": (("local", "column", "block", "dense"), 1, [local, column, block, dense]),
  # The last sub-block has to be there in every group: only it reaches everything.
  "group-of-summaries": (("local", "summary"), 2, [local, local, summary(0), summary(2)]),
}  # fmt: skip


@pytest.mark.parametrize("entry, sub_blocks, heads", ENTRIES.values(), ids=ENTRIES)
def test_entries(entry, sub_blocks, heads):
  pattern = make_pattern(entry, num_heads=4, stride=8, summary_width=2, sub_blocks=sub_blocks)
  assert [pattern.of_head(h) for h in range(4)] == heads
  hash(pattern)


def test_a_group_with_too_few_heads_for_its_sub_blocks_is_refused():
  with pytest.raises(ValueError, match="sub_blocks=4: must divide the 2 heads"):
    make_pattern(("local", "fixed"), num_heads=4, stride=8, summary_width=2, sub_blocks=4)
