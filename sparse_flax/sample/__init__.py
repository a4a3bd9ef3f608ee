"""Sampling from a trained model, step by step, by XLA or by kernels."""

from sparse_flax.sample.generate import as_multiplied
from sparse_flax.sample.generate import best
from sparse_flax.sample.generate import check_options
from sparse_flax.sample.generate import generate
from sparse_flax.sample.generate import IMPLEMENTATIONS
from sparse_flax.sample.generate import likely
from sparse_flax.sample.generate import Prompt
from sparse_flax.sample.generate import row_mesh
from sparse_flax.sample.generate import run_steps
from sparse_flax.sample.generate import step_kernels

__all__ = [
  "IMPLEMENTATIONS",
  "Prompt",
  "as_multiplied",
  "best",
  "check_options",
  "generate",
  "likely",
  "row_mesh",
  "run_steps",
  "step_kernels",
]
