"""The report of a run: one page that needs nothing else."""

from sparse_flax.view.report.page import Attention
from sparse_flax.view.report.page import attention_values
from sparse_flax.view.report.page import AVERAGE_BYTES
from sparse_flax.view.report.page import build
from sparse_flax.view.report.page import MAP_BYTES
from sparse_flax.view.report.page import pack
from sparse_flax.view.report.page import SAMPLE_BYTES

__all__ = [
  "AVERAGE_BYTES",
  "MAP_BYTES",
  "SAMPLE_BYTES",
  "Attention",
  "attention_values",
  "build",
  "pack",
]  # fmt: skip
