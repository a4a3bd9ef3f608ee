"""Sparse attention: arrays in, arrays out. Knows no Flax, no config and no names of mesh axes."""

from pallas_kernels import moved as _moved
from pallas_kernels import patterns
from pallas_kernels.api import IMPLEMENTATIONS
from pallas_kernels.api import sparse_attention
from pallas_kernels.reference import reference_attention

__all__ = ["IMPLEMENTATIONS", "patterns", "reference_attention", "sparse_attention"]

__version__ = "0.1.0"

__getattr__ = _moved.alias("pallas_kernels", _moved.PALLAS_KERNELS)
