"""Sparse attention: arrays in, arrays out. Knows no Flax, no config and no names of mesh axes."""

from pallas_kernels import moved as _moved
from pallas_kernels import patterns
from pallas_kernels.api import IMPLEMENTATIONS
from pallas_kernels.api import sparse_attention
from pallas_kernels.reference import reference_attention
from pallas_kernels.selection import pool_blocks
from pallas_kernels.selection import select_blocks

__all__ = [
  "IMPLEMENTATIONS",
  "patterns",
  "pool_blocks",
  "reference_attention",
  "select_blocks",
  "sparse_attention",
]

__version__ = "0.1.0"

__getattr__ = _moved.alias("pallas_kernels", _moved.PALLAS_KERNELS)
