"""Sparse Transformers in Flax: the model, its attention layer, and the patterns they attend by."""

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax.attention import SparseSelfAttention
from sparse_flax.transformer import SparseTransformer

__all__ = ["SparseSelfAttention", "SparseTransformer", "patterns", "sparse_attention"]
