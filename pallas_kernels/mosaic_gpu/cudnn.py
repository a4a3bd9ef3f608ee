"""Dense causal attention by cuDNN, for calls that need not repeat bit by bit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import hardware
from pallas_kernels.lowering.plan import Plan
from pallas_kernels.patterns import Dense


def cudnn_serves(plan: Plan) -> bool:
  """Whether cuDNN computes this: plain causal attention of equal sizes, on a GPU."""
  is_dense = plan.pattern.period == 1 and plan.pattern.of_head(0) == Dense()
  # Programs for a GPU that is not here cannot ask for its version of cuDNN.
  here = hardware.platform() == "gpu" and hardware.is_here()
  return is_dense and not plan.extras and plan.Dk == plan.Dv and here


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
  options = dict(scale=scale, is_causal=True, implementation="cudnn")
  return jax.nn.dot_product_attention(q, k, v, **options)[:, :T]
