"""Sparse attention for the `attention_fn` of Flax's own layers, NNX's and Linen's."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import api
from pallas_kernels import patterns
from sparse_flax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class AttentionFn:
  """`nnx.dot_product_attention`, and Linen's, over the pairs of a pattern."""

  pattern: patterns.Pattern
  implementation: api.Implementation | None = None

  def __post_init__(self):
    patterns.check(self.pattern, "pattern")
    api.load_backend(self.implementation)

  def __call__(
    self,
    query: Float[Array, "*B T H Dk"],
    key: Float[Array, "*B S Hkv Dk"],
    value: Float[Array, "*B S Hkv Dv"],
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    *,
    is_causal: bool = False,
    input_positions: Array | None = None,
    promote_dtype: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
  ) -> Float[Array, "*B T H Dv"]:
    """What Flax's layers call; the names are theirs. Softmax is in float32 in any case.

    Raises:
      ValueError: an argument that would change the result, and that sparse attention cannot honour.
    """
    del broadcast_dropout, dropout_rng  # of dropout, which is refused
    del force_fp32_for_softmax  # always so
    _refuse(
      mask=mask,
      bias=bias,
      dropout_rate=dropout_rate if dropout_rate and not deterministic else None,
      precision=None if precision in _DEFAULT_PRECISIONS else precision,
      module=module,
      input_positions=input_positions,
      promote_dtype=promote_dtype,
      einsum_dot_general=einsum_dot_general,
      qk_attn_weights_einsum=qk_attn_weights_einsum,
      attn_weights_value_einsum=attn_weights_value_einsum,
    )
    pattern = self.pattern
    if is_causal and not pattern.causal:
      pattern = pattern & patterns.Dense()
    dtype = dtype or jnp.result_type(query, key, value)
    batch = query.shape[:-3]
    q, k, v = (
      x.astype(dtype).reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
    )
    out = sharding.over_devices(q, k, v, pattern=pattern, implementation=self.implementation)
    return out.reshape(*batch, *out.shape[1:])


def attention_fn(
  pattern: patterns.Pattern, implementation: api.Implementation | None = None
) -> AttentionFn:
  """A function for `nnx.MultiHeadAttention` and `nn.MultiHeadDotProductAttention` to attend with.

    layer = nnx.MultiHeadAttention(
        num_heads=8, in_features=512, decode=False, rngs=nnx.Rngs(0),
        attention_fn=sparse_flax.attention_fn(patterns.Strided(128)))

  The pattern takes the place of the layer's mask: most patterns are causal without one. A query
  without keys gets zeros, not the mean of all values. What the function would have to ignore it
  refuses: masks (so the `decode` mode of those layers, too), biases, dropout of weights unless
  `deterministic`, a precision, and weights that are to be sown.

  Args:
    pattern: which pairs attend; queries and keys are both counted from 0.
    implementation: of `sparse_attention`; None is the best one that works here.
  """
  return AttentionFn(pattern, implementation)


_DEFAULT_PRECISIONS = (None, "default", jax.lax.Precision.DEFAULT)

# What to do about each argument that is refused.
_INSTEAD = {
  "mask": (
    "the pattern says which pairs attend, and causal ones need no mask; padding and packed "
    "documents are segment_ids of sparse_flax.SparseSelfAttention, which also decodes (in decode "
    "mode, this layer masks its cache)"
  ),
  "bias": "a score_fn of sparse_flax.SparseSelfAttention adds to logits",
  "dropout_rate": "weights are not dropped: pass deterministic=True, or drop the layer's output",
  "precision": "products are in the dtype of q, k and v, summed in float32: leave it None",
  "module": "weights are not kept, so that none can be sown: sow_weights must be False",
  "input_positions": "only rope reads them: sparse_flax.SparseSelfAttention has rope and positions",
  "promote_dtype": "arrays are cast to dtype, or to their common one: leave it None",
  "einsum_dot_general": "products are the kernels' own: leave it None",
  "qk_attn_weights_einsum": "products are the kernels' own: leave it None",
  "attn_weights_value_einsum": "products are the kernels' own: leave it None",
}


def _refuse(**given: Any) -> None:
  for name, value in given.items():
    if value is not None:
      text = f"{name}={value!r}" if isinstance(value, str | int | float) else name
      if hasattr(value, "shape") and hasattr(value, "dtype"):
        text = f"{name} {value.dtype}{list(value.shape)}"
      raise ValueError(f"{text}: sparse_flax.attention_fn cannot honour it; {_INSTEAD[name]}")
