"""The model: embeddings, residual blocks, attention layers, and the caches to decode with."""

from sparse_flax.model import cache
from sparse_flax.model.arguments import COMPUTE_DTYPES
from sparse_flax.model.arguments import MODALITIES
from sparse_flax.model.arguments import PARAM_DTYPES
from sparse_flax.model.attention import SparseSelfAttention
from sparse_flax.model.block import activation
from sparse_flax.model.block import ACTIVATIONS
from sparse_flax.model.block import Block
from sparse_flax.model.block import GELU_SLOPE
from sparse_flax.model.cross_attention import SparseCrossAttention
from sparse_flax.model.embedding import check_bytes
from sparse_flax.model.embedding import VOCABULARY
from sparse_flax.model.initialization import INIT_SCHEMES
from sparse_flax.model.layer_patterns import LEARNED_NAMES
from sparse_flax.model.layer_patterns import PATTERN_NAMES
from sparse_flax.model.layer_patterns import patterns_of
from sparse_flax.model.learned import recipes_of
from sparse_flax.model.learned import stage_at
from sparse_flax.model.learned_attention import LearnedSelfAttention
from sparse_flax.model.order import Order
from sparse_flax.model.remat import level_in
from sparse_flax.model.remat import REMATS
from sparse_flax.model.rope import ROPES
from sparse_flax.model.shorten import Lengthen
from sparse_flax.model.shorten import Shorten
from sparse_flax.model.transformer import graph_and_shapes
from sparse_flax.model.transformer import SparseTransformer

__all__ = [
  "ACTIVATIONS",
  "COMPUTE_DTYPES",
  "GELU_SLOPE",
  "INIT_SCHEMES",
  "LEARNED_NAMES",
  "MODALITIES",
  "PARAM_DTYPES",
  "PATTERN_NAMES",
  "REMATS",
  "ROPES",
  "VOCABULARY",
  "Block",
  "LearnedSelfAttention",
  "Lengthen",
  "Order",
  "Shorten",
  "SparseCrossAttention",
  "SparseSelfAttention",
  "SparseTransformer",
  "activation",
  "cache",
  "check_bytes",
  "graph_and_shapes",
  "level_in",
  "patterns_of",
  "recipes_of",
  "stage_at",
]
