"""Floating point operations of the model by formula, and what devices could do at best.

XLA's own count is of no use here: it takes the body of a scan once and kernels as nothing.
"""

import ml_collections

from sparse_flax.model import learned
from sparse_flax.model import levels

# Dense bfloat16 peak of one device, operations per second, by the start of its `device_kind`; from
# the makers' data sheets, without structured sparsity. The longest start that fits counts.
_PEAK = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2_250e12,
  "NVIDIA GB200": 2_500e12,
  "TPU v3": 61.5e12,  # a device is one core
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1_153.5e12,  # a device is half a chip
}


def forward_flops(model: ml_collections.ConfigDict) -> float:
  """Operations of one forward pass over one sequence: products of weights, and visible pairs.

      2 n [N (2 d q + 2 d^2 + 2 d f) + 256 d] + 2 N n k (q + d)

  with n tokens, N layers, width d, query width q, feed-forward width f and k keys per query on
  average over layers, heads and positions (arXiv:1904.10509 has no figure; the formula is ours).
  Layers that choose their blocks read `top` of them; what the choice takes is not counted.

  With inner levels each counts by its own n, d, q, f and k; groups of k rows of width d cost
  2 k d d' on their way to the inner width d' and as much on the way back, where these are products.

  Args:
    model: the arguments of SparseTransformer.
  """
  return sum(level_flops(model)) + 2 * model["seq_len"] * 256 * model["width"]


def level_flops(model: ml_collections.ConfigDict) -> list[float]:
  """The same, for the layers of each level, the outermost first, without the logits.

  What turns rows into groups, and groups into rows, counts as the inner level's.
  """
  found, around, given = [], None, dict(model.items())
  for level in levels.specs_of(**given):
    n, d = level.length, level.width
    q, f = round(level.qk_ratio * d), round(level.ff_mult * d)
    recipes = learned.recipes_of(**{**given, "attention_layers": level.attention_layers})
    read = [recipe or pattern for recipe, pattern in zip(recipes, level.patterns, strict=True)]
    pairs = sum(x.num_pairs(n) for x in read) / len(read)
    weights = level.depth * (2 * d * q + 2 * d * d + 2 * d * f)
    products = (level.pool == "linear") + (level.up == "linear") if around else 0
    between = 2 * n * level.shorten * around.width * d * products if around else 0
    found.append(2 * n * weights + 2 * level.depth * pairs * (q + d) + between)
    around = level
  return found


def train_flops(model: ml_collections.ConfigDict, *, batch_size: int) -> float:
  """Operations of one training step: forward and twice that backward; recomputation not counted."""
  return 3 * batch_size * forward_flops(model)


def peak_flops(device_kind: str) -> float | None:
  """The bfloat16 peak of one device per second; None where the table does not know it."""
  starts = [kind for kind in _PEAK if device_kind.startswith(kind)]
  return _PEAK[max(starts, key=len)] if starts else None
