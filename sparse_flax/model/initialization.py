"""Initial values of the weights, in the paper's words and in those of the authors' later code."""

import math

from flax import nnx

INIT_SCHEMES = ("default", "paper", "code")


def make_initializers(
  scheme: str, *, width: int, num_tables: int, num_layers: int
) -> dict[str, nnx.Initializer]:
  """Normal initialisers of all weights that do not start at zero, by standard deviation:

                         "paper"                              "code"
    token_init           0.125 / sqrt(width)                  0.013
    position_init        0.125 / sqrt(width num_tables)       0.007 / sqrt(num_tables)
    kernel_init          0.125 / sqrt(fan_in)                 sqrt(0.125 / fan_in)
    out_init             the line above / sqrt(2 num_layers), for the end of a residual branch

  arXiv:1904.10509 (section 6) writes 0.125 / sqrt(fan_in); the authors' later code takes 0.125 as
  a variance. "default" has the paper's embeddings and the code's matrices.

  Args:
    scheme: one of INIT_SCHEMES.
    width: E.
    num_tables: of positions, whose rows are added up.
    num_layers: all residual blocks of the model, not the groups of a scan.
  """
  if scheme == "code":
    token_std, position_std = 0.013, 0.007 / math.sqrt(num_tables)
  else:
    token_std, position_std = 0.125 / math.sqrt(width), 0.125 / math.sqrt(width * num_tables)
  variance = 0.125**2 if scheme == "paper" else 0.125
  matrix = lambda variance: nnx.initializers.variance_scaling(variance, "fan_in", "normal")
  return dict(
    token_init=nnx.initializers.normal(token_std),
    position_init=nnx.initializers.normal(position_std),
    kernel_init=matrix(variance),
    out_init=matrix(variance / (2 * num_layers)),
  )
