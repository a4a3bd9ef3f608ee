"""How a call is computed, before any kernel: passes, blocks, lists, groups of heads, the plan."""
