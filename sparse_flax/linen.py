"""The same modules for Linen projects: factories that take the same arguments, without `rngs`.

    layer = sparse_flax.linen.SparseSelfAttention(
        width=512, num_heads=8, pattern=patterns.Strided(128))
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x)

Weights are plain arrays under "params", also inside `nn.scan` and `nn.remat`. Dropout takes
`dropout_key` as an argument of `apply`, as the originals do.
"""

from flax import linen as nn
from flax import nnx

from sparse_flax import attention
from sparse_flax import transformer


def SparseSelfAttention(*, name: str | None = None, **kwargs) -> nn.Module:
  """Linen twin of sparse_flax.SparseSelfAttention."""
  return nnx.bridge.to_linen(attention.SparseSelfAttention, name=name, **kwargs)


def SparseTransformer(*, name: str | None = None, **kwargs) -> nn.Module:
  """Linen twin of sparse_flax.SparseTransformer."""
  return nnx.bridge.to_linen(transformer.SparseTransformer, name=name, **kwargs)
