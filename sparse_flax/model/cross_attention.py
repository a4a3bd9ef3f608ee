"""Multi-head attention of one sequence to another."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import patterns
from sparse_flax.model import heads
from sparse_flax.model.rope import Positions


class SparseCrossAttention(heads.Heads):
  """`SparseSelfAttention` with queries of x and keys and values of x_kv.

  layer = SparseCrossAttention(width=512, num_heads=8, rngs=nnx.Rngs(0))
  y = layer(x, x_kv)  # [B, T, 512], [B, S, 512] -> [B, T, 512], any T and S
  """

  def __init__(
    self,
    *,
    width: int,
    num_heads: int,
    pattern: patterns.Pattern = patterns.Dense(causal=False),
    kv_width: int | None = None,
    qk_ratio: int | float = 1.0,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    kernel_init: nnx.Initializer | None = None,
    out_init: nnx.Initializer | None = None,
    num_kv_heads: int | None = None,
    use_bias: bool = True,
    qk_norm: bool = False,
    rope: heads.RotaryFn | None = None,
    rngs: nnx.Rngs,
  ):
    """Args:
    width: E, of x and of the result; a multiple of num_heads.
    num_heads: H. Values have E / H features per head.
    pattern: which pairs of a token of x and one of x_kv attend, both counted from 0; with
      causal=False, which `Dense`, `Local`, `BlockLayout` and `Where` take.
    kv_width: of x_kv; None: E.
    qk_ratio: width of all queries over E.
    dtype: of the computation; None takes it from the inputs and the weights. Softmax is in float32.
    param_dtype: of the weights.
    implementation: of `sparse_attention`; None is the best one that works here.
    kernel_init: of query, key and value; default: normal, variance 0.125 / fan_in.
    out_init: of the projection back; default: `kernel_init`.
    num_kv_heads: of keys and values (grouped-query attention): divides num_heads; None: equal.
    use_bias: whether q, k, v and the projection back have biases.
    qk_norm: whether queries and keys pass a LayerNorm with a gain and no bias, over the features of
      a head, as in `nnx.MultiHeadAttention(normalize_qk=True)`; before `rope`.
    rope: (q or k [B, T, H, Dk], positions [T] or [B, T]) -> the same shape, `sparse_flax.rope()`
      for one.
    rngs: source of the initial values.

    Raises:
      ValueError: sizes that do not divide each other, or a pattern of one sequence, which lets
        queries see the keys before them alone.
    """
    patterns.check(pattern, "pattern")
    if any(pattern.of_head(h).causal for h in range(pattern.period)):
      raise ValueError(
        f"pattern={pattern}: hides what comes after a query, and x_kv is another sequence than x: "
        "must be built with causal=False, as patterns.Dense(causal=False)"
      )
    if kv_width is not None and kv_width < 1:
      raise ValueError(f"{kv_width=}: must be a whole number >= 1, or None for {width=}")
    super().__init__(
      width=width,
      kv_width=kv_width or width,
      num_heads=num_heads,
      pattern=pattern,
      qk_ratio=qk_ratio,
      dtype=dtype,
      param_dtype=param_dtype,
      implementation=implementation,
      kernel_init=kernel_init,
      out_init=out_init,
      num_kv_heads=num_kv_heads,
      use_bias=use_bias,
      qk_norm=qk_norm,
      rope=rope,
      rngs=rngs,
    )

  def __call__(
    self,
    x: Float[Array, "B T E"],
    x_kv: Float[Array, "B S Ekv"],
    *,
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    kv_segment_ids: Integer[Array | np.ndarray, "B S"] | None = None,
    block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
    block_size: int = 128,
    score_fn: Callable | None = None,
    positions: Positions | None = None,
    kv_positions: Integer[Array | np.ndarray, "S"]
    | Integer[Array | np.ndarray, "B S"]
    | None = None,
  ) -> Float[Array, "B T E"]:
    """Args:
    x: what queries are made of.
    x_kv: what keys and values are made of.
    segment_ids, kv_segment_ids: of the tokens of x and of x_kv; those with equal ids attend. The
      lengths of sequences that are padded are such ids: 0 for all of x, and of x_kv 0 for the
      tokens and 1 for the padding.
    block_mask, block_size, score_fn: as in `sparse_attention`.
    positions, kv_positions: what `rope` turns queries and keys by; default 0, 1, ...

    Raises:
      ValueError: what does not fit, or nothing would read.
      NotImplementedError: what the implementation, or a mesh with a sequence axis, cannot do.
    """
    q = self.queries(x, self.checked_positions(positions, x))
    of_keys, of_values = heads.apart(x_kv, 2)
    at = self.checked_positions(kv_positions, x_kv, "kv_positions")
    k, v = self.keys(of_keys, at), self.values(of_values)
    masks = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
    masks |= dict(block_mask=block_mask, block_size=block_size)
    return self.attend(q, k, v, **masks, score_fn=score_fn)
