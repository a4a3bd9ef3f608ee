"""Dense causal attention by cuDNN, for calls that need not repeat bit by bit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import hardware
from pallas_kernels.patterns import Dense
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores


def cudnn_serves(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  block_mask: Array | None,
  *,
  pattern: Pattern,
  scores: Scores,
  block_size: int,
) -> bool:
  """Whether cuDNN computes this: plain causal attention of equal sizes, on a GPU."""
  del block_size
  is_dense = pattern.period == 1 and pattern.of_head(0) == Dense()
  equal = q.shape[-1] == v.shape[-1] and q.shape[1] == k.shape[1]
  plain = segment_ids is None and block_mask is None and scores.only_scale and scores.scale > 0
  # Programs for a GPU that is not here cannot ask for its version of cuDNN.
  return is_dense and equal and plain and hardware.platform() == "gpu" and hardware.is_here()


def cudnn_attention(
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T Hkv D"],
  v: Float[Array, "B T Hkv D"],
  *,
  scale: float,
) -> Float[Array, "B T H D"]:
  """Dense causal attention. Equal bits only with XLA's --xla_gpu_deterministic_ops=true."""
  T = q.shape[1]
  # Gradients are for even lengths only. A key after all queries is attended by none of them.
  q, k, v = (jnp.pad(x, ((0, 0), (0, T % 2), (0, 0), (0, 0))) for x in (q, k, v))
  how = dict(scale=scale, is_causal=True, implementation="cudnn")
  return jax.nn.dot_product_attention(q, k, v, **how)[:, :T]
