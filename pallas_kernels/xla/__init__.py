"""Exact attention in jax.numpy that runs everywhere and never builds a T x T array.

Every pass (lowering/passes.py) becomes N independent problems of T queries and S keys. Small ones
are solved whole, many at a time; long ones tile by tile with an online softmax over the lists of
key tiles. Either way at most about `sizes.LOGITS` logits exist at once, and the backward pass
computes them again from q, k and the merged log-sum-exp.
"""

from pallas_kernels.xla.backend import backward
from pallas_kernels.xla.backend import forward
from pallas_kernels.xla.backend import lse_of_natural
from pallas_kernels.xla.backend import natural_lse
from pallas_kernels.xla.backend import planned
from pallas_kernels.xla.backend import takes_lists
from pallas_kernels.xla.backend import unsupported

__all__ = [
  "backward",
  "forward",
  "lse_of_natural",
  "natural_lse",
  "planned",
  "takes_lists",
  "unsupported",
]
