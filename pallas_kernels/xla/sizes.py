"""How much is computed at once."""

LOGITS = 1 << 20  # at once: 4 MB in float32, about what the caches of a core hold
WHOLE = 1 << 19  # logits per head up to which a problem is solved whole
TILE = 512  # queries and keys of a tile of a long problem
