"""Sparse Transformers in Flax: the model, its attention layer, and the patterns they attend by."""

import importlib as _importlib
import types as _types

from pallas_kernels import __version__ as __version__
from pallas_kernels import moved as _finder
from pallas_kernels import patterns
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import sparse_attention
from sparse_flax import moved as _moved
from sparse_flax.model import learned
from sparse_flax.model.attention import SparseSelfAttention
from sparse_flax.model.attention_fn import attention_fn
from sparse_flax.model.cross_attention import SparseCrossAttention
from sparse_flax.model.learned_attention import LearnedSelfAttention
from sparse_flax.model.rope import rope
from sparse_flax.model.transformer import SparseTransformer

__all__ = [
  "LearnedSelfAttention",
  "SparseCrossAttention",
  "SparseSelfAttention",
  "SparseTransformer",
  "attention_fn",
  "learned",
  "patterns",
  "pool_blocks",
  "rope",
  "select_blocks",
  "sparse_attention",
]

_module_at_old_path = _finder.alias("sparse_flax", _moved.NEW_PATHS)


def __getattr__(name: str) -> _types.ModuleType:
  if name == "linen":  # loaded for those who use it
    return _importlib.import_module("sparse_flax.linen")
  return _module_at_old_path(name)
