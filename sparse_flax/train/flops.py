"""Floating point operations of the model by formula, and what devices could do at best.

XLA's own count is of no use here: it takes the body of a scan once and kernels as nothing.
"""

import ml_collections

from sparse_flax import model as model_lib

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

  Args:
    model: the arguments of SparseTransformer.
  """
  n, d, num_layers = model["seq_len"], model["width"], model["num_layers"]
  q, f = round(model["qk_ratio"] * d), round(model["ff_mult"] * d)
  given = dict(model.items())
  cycle, recipes = model_lib.patterns_of(**given), model_lib.recipes_of(**given)
  pairs = sum((r or p).num_pairs(n) for r, p in zip(recipes, cycle, strict=True)) / len(cycle)
  weights = num_layers * (2 * d * q + 2 * d * d + 2 * d * f) + 256 * d
  return 2 * n * weights + 2 * num_layers * pairs * (q + d)


def train_flops(model: ml_collections.ConfigDict, *, batch_size: int) -> float:
  """Operations of one training step: forward and twice that backward; recomputation not counted."""
  return 3 * batch_size * forward_flops(model)


def peak_flops(device_kind: str) -> float | None:
  """The bfloat16 peak of one device per second; None where the table does not know it."""
  starts = [kind for kind in _PEAK if device_kind.startswith(kind)]
  return _PEAK[max(starts, key=len)] if starts else None
