"""Multi-head self-attention over the pairs that a pattern allows: the layer to import."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import patterns
from pallas_kernels import reference
from pallas_kernels import scores
from sparse_flax.model import cache as cache_lib
from sparse_flax.model import cache_masks
from sparse_flax.model import heads
from sparse_flax.model.heads import apart as apart  # was imported from here
from sparse_flax.model.rope import Positions


class SparseSelfAttention(heads.Heads):
  """out = concat_h(softmax(q_h k_h^T / sqrt(Dk), over the pattern's pairs) v_h) W_p + b_p.

  arXiv:1904.10509, Eq. 2-8: a union of patterns is its merged head (Eq. 7), `patterns.PerHead` its
  multi-head attention (Eq. 8).

    layer = SparseSelfAttention(
        width=512, num_heads=8, pattern=patterns.Strided(128), rngs=nnx.Rngs(0))
    y = layer(x)  # [B, T, 512] -> [B, T, 512], any T
  """

  def __init__(
    self,
    *,
    width: int,
    num_heads: int,
    pattern: patterns.Pattern,
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
    width: E, the model width; a multiple of num_heads.
    num_heads: H. Values have E / H features per head.
    pattern: which pairs attend; per-head patterns count query heads.
    qk_ratio: width of all queries over E; 0.5 is the paper's half-size.
    dtype: of the computation; None takes it from x and the weights. Softmax is in float32.
    param_dtype: of the weights.
    implementation: of `sparse_attention`; None is the best one that works here.
    kernel_init: of query, key and value; default: normal, variance 0.125 / fan_in.
    out_init: of the projection back; default: `kernel_init`.
    num_kv_heads: of keys and values (grouped-query attention): divides num_heads; None: equal.
    use_bias: whether q, k, v and the projection back have biases.
    qk_norm: whether queries and keys pass a LayerNorm with a gain and no bias, over the features of
      a head, as in `nnx.MultiHeadAttention(normalize_qk=True)`; before `rope`.
    rope: (q or k [B, T, H, Dk], positions [T] or [B, T]) -> the same shape, `sparse_flax.rope()`
      for one; None: attention sees no positions but the pattern's.
    rngs: source of the initial values.

    Raises:
      ValueError: num_heads does not divide width or qk_ratio * width, num_kv_heads not num_heads.
    """
    super().__init__(
      width=width,
      kv_width=width,
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
    *,
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
    block_size: int = 128,
    score_fn: Callable | None = None,
    positions: Positions | None = None,
  ) -> Float[Array, "B T E"]:
    """Args:
    x: the layer's input.
    segment_ids, block_mask, block_size, score_fn: as in `sparse_attention`.
    positions: what `rope` turns queries and keys by; default 0, 1, ... The pattern and `score_fn`
      count tokens all the same.

    Raises:
      ValueError: what does not fit, or nothing would read.
      NotImplementedError: what the implementation, or a mesh with a sequence axis, cannot do.
    """
    masks = dict(segment_ids=segment_ids, block_mask=block_mask, block_size=block_size)
    return self.attend(*self._heads(x, positions), **masks, score_fn=score_fn)

  def weights(
    self,
    x: Float[Array, "B T E"],
    rows: Integer[np.ndarray, "Q"] | None = None,
    *,
    score_fn: Callable | None = None,
    positions: Positions | None = None,
  ) -> Float[Array, "B H Q T"]:
    """The float32 probabilities of the query rows `rows` (None: of all rows)."""
    q, k, _ = self._heads(x, positions)
    options = dict(pattern=self.pattern, scores=scores.Scores(q.shape[-1] ** -0.5, None, score_fn))
    return reference.attention_weights(q, k, **options, rows=rows)

  def init_cache(
    self, batch_size: int, length: int, *, num_layers: int = 1, sparse: bool = True
  ) -> cache_lib.Cache:
    """Room for the keys and values of `length` steps, for `num_layers` layers like this one.

    Args:
      batch_size: B.
      length: steps.
      num_layers: L.
      sparse: keep what the pattern needs; False keeps, and reads, everything.

    Raises:
      ValueError: the pattern lets a query attend to later keys.
    """
    self._check_decodes()
    return cache_lib.init_cache(
      self.pattern,
      num_layers=num_layers,
      length=length,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      batch_size=batch_size,
      k_size=self.key.out_features // self.num_kv_heads,
      v_size=self.value.out_features // self.num_kv_heads,
      dtype=self.key.dtype or self.key.param_dtype,
      sparse=sparse,
    )

  def prefill(
    self,
    x: Float[Array, "B P E"],
    length: int,
    *,
    sparse: bool = True,
    segment_ids: Integer[Array | np.ndarray, "B P"] | None = None,
    block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
    block_size: int = 128,
    score_fn: Callable | None = None,
    positions: Positions | None = None,
  ) -> tuple[Float[Array, "B P E"], cache_lib.Cache]:
    """`__call__`, and the cache, without an axis for layers, as P steps of `length` leave it.

    Args:
      x: the layer's input of the first P steps.
      length: steps that the cache has room for.
      sparse: as in `init_cache`.
      segment_ids, block_mask, block_size, score_fn, positions: as in `__call__`, of P tokens.

    Raises:
      ValueError: the pattern lets a query attend to later keys, or P > length.
    """
    q, k, v = self._heads(x, positions)
    masks = dict(segment_ids=segment_ids, block_mask=block_mask, block_size=block_size)
    cache = self.filled(k, v, length, sparse=sparse)
    return self.attend(q, k, v, **masks, score_fn=score_fn), cache

  def filled(
    self, k: Float[Array, "B P H Dk"], v: Float[Array, "B P H Dv"], length: int, *, sparse: bool
  ) -> cache_lib.Cache:
    """The cache that steps with these keys and values leave; see `prefill`."""
    self._check_decodes()
    if k.shape[1] > length:
      raise ValueError(f"{length=}: must be at least {k.shape[1]}, the steps that are read")
    of_cache = dict(num_heads=self.num_heads, length=length, sparse=sparse)
    return cache_lib.fill(self.pattern, k, v, **of_cache)

  def decode_step(
    self,
    x: Float[Array, "B E"],
    step: Integer[Array, ""],
    cache: cache_lib.Cache,
    *,
    layer: int | Integer[Array, ""] = 0,
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
    block_size: int = 128,
    score_fn: Callable | None = None,
    positions: Integer[Array | np.ndarray, ""] | Integer[Array | np.ndarray, "B"] | None = None,
  ) -> tuple[Float[Array, "B E"], cache_lib.Cache]:
    """Row `step` of `__call__`, given the keys and values of the rows before it.

    Keys are kept as attention reads them, normalised and turned.

    Args:
      x: the layer's input of this step alone.
      step: 0, 1, 2, ...; each step once and in this order.
      cache: from `init_cache`, then from the step before.
      layer: which layer of the cache is this one's.
      segment_ids, block_mask, block_size, score_fn: of the whole sequence, as in `__call__`; what
        concerns later rows is not read.
      positions: of this step, in the whole batch or in each sequence; default `step`.

    Returns:
      The layer's output of this step, and the cache with this step's key and value.
    """
    given = cache_masks.Masks(segment_ids, block_mask, block_size)
    if self.rope is None:
      q, k, v = self._heads(x, positions)
    else:
      at = jnp.asarray(step if positions is None else positions)
      at = at.reshape(-1) if at.ndim == 0 else at[:, None]  # [T] or [B, T] of T = 1
      q, k, v = (y[:, 0] for y in self._heads(x[:, None], at))
    options = dict(step=step, layer=layer, score_fn=score_fn, masks=given)
    out, cache = cache_lib.attend(q, k, v, cache, **options)
    return self.back(out), cache

  def _check_decodes(self) -> None:
    if not self.pattern.causal:
      raise ValueError(f"pattern={self.pattern}: decoding needs one with causal=True")

  def _heads(self, x: Float[Array, "*B E"], positions=None) -> tuple[Float[Array, "*B H D"], ...]:
    positions = self.checked_positions(positions, x)
    q, k, v = heads.apart(x, 3)
    q, k, v = self.queries(q, positions), self.keys(k, positions), self.values(v)
    return tuple(
      checkpoint_name(x, f"residual_{name}") for x, name in zip((q, k, v), "qkv", strict=True)
    )
