"""Sparse Transformers in Flax: the model, its attention layer, and the patterns they attend by."""

from pallas_kernels import moved as _finder
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax import moved as _moved
from sparse_flax.model.attention import SparseSelfAttention
from sparse_flax.model.attention_fn import attention_fn
from sparse_flax.model.cross_attention import SparseCrossAttention
from sparse_flax.model.rope import rope
from sparse_flax.model.transformer import SparseTransformer

__all__ = [
  "SparseCrossAttention",
  "SparseSelfAttention",
  "SparseTransformer",
  "attention_fn",
  "patterns",
  "rope",
  "sparse_attention",
]

__getattr__ = _finder.alias("sparse_flax", _moved.NEW_PATHS)
