"""From the features of tokens to the heads of attention, and back: what attention layers share."""

import functools
from collections.abc import Callable
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import api
from pallas_kernels import patterns
from pallas_kernels.residual.xla import apart as apart
from sparse_flax.model import rope as rope_lib
from sparse_flax.parallel import sharding

# (queries or keys [B, T, H, D], positions [T] or [B, T]) -> the same, turned.
RotaryFn = Callable[[Array, Array | np.ndarray], Array]


class Heads(nnx.Module):
  """Projections of x to queries, of x_kv to keys and values, and of their attention back.

  Keys and values have num_kv_heads heads, each of them for num_heads / num_kv_heads neighbouring
  heads of queries.
  """

  def __init__(
    self,
    *,
    width: int,
    kv_width: int,
    num_heads: int,
    pattern: patterns.Pattern,
    qk_ratio: int | float,
    dtype: jax.typing.DTypeLike | None,
    param_dtype: jax.typing.DTypeLike,
    implementation: str | None,
    kernel_init: nnx.Initializer | None,
    out_init: nnx.Initializer | None,
    num_kv_heads: int | None,
    use_bias: bool,
    qk_norm: bool,
    rope: RotaryFn | None,
    rngs: nnx.Rngs,
  ):
    qk_width = round(qk_ratio * width)
    if num_heads < 1 or width < 1 or width % num_heads:
      raise ValueError(f"{num_heads=} must divide {width=}")
    if qk_width < 1 or qk_width != qk_ratio * width or qk_width % num_heads:
      raise ValueError(f"{qk_ratio=}: qk_ratio * {width=} must be a multiple of {num_heads=}")
    num_kv_heads = _checked_kv_heads(num_kv_heads, num_heads)
    _check_rope(rope)
    patterns.check(pattern, "pattern")
    api.load_backend(implementation)
    kernel_init = kernel_init or nnx.initializers.variance_scaling(0.125, "fan_in", "normal")
    dtypes = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    linear = functools.partial(nnx.Linear, use_bias=use_bias, **dtypes)
    share = lambda features: features // num_heads * num_kv_heads
    self.num_heads = num_heads
    self.num_kv_heads = num_kv_heads
    self.pattern = pattern
    self.implementation = implementation
    self.rope = rope
    self.query = linear(width, qk_width, kernel_init=kernel_init)
    self.key = linear(kv_width, share(qk_width), kernel_init=kernel_init)
    self.value = linear(kv_width, share(width), kernel_init=kernel_init)
    self.out = linear(width, width, kernel_init=out_init or kernel_init)
    norm = lambda: nnx.LayerNorm(qk_width // num_heads, use_bias=False, **dtypes)
    self.query_norm = norm() if qk_norm else None
    self.key_norm = norm() if qk_norm else None

  def queries(self, x: Float[Array, "*B E"], positions=None) -> Float[Array, "*B H Dk"]:
    """Of the layer's input; `positions` are `checked_positions`."""
    return self.placed(_split(product(self.query, x), self.num_heads), "q", positions)

  def keys(self, x: Float[Array, "*B E"], positions=None) -> Float[Array, "*B Hkv Dk"]:
    return self.placed(_split(product(self.key, x), self.num_kv_heads), "k", positions)

  def placed(
    self,
    x: Float[Array, "*B H D"],
    name: Literal["q", "k"],
    positions=None,
    *,
    gain: Float[Array, " D"] | None = None,
  ) -> Float[Array, "*B H D"]:
    """Queries or keys of the projections as attention reads them: normalised, then turned.

    `gain` takes the place of the norm's own, which may be those of many layers.
    """
    norm = self.query_norm if name == "q" else self.key_norm
    if norm is not None and gain is not None:
      norm = nnx.merge(nnx.graphdef(norm), {"scale": gain})
    x = x if norm is None else norm(x)
    return x if self.rope is None else self._turned(name, x, positions)

  @property
  def placing(self) -> str | None:
    """What stands between the projections of queries and keys and attention, for messages."""
    there = {"rope": self.rope is not None, "qk_norm": self.query_norm is not None}
    names = [name for name, is_there in there.items() if is_there]
    return " and ".join(names) + " between the projections and attention" if names else None

  def values(self, x: Float[Array, "*B E"]) -> Float[Array, "*B Hkv Dv"]:
    return _split(product(self.value, x), self.num_kv_heads)

  def attend(self, q: Array, k: Array, v: Array, **options) -> Float[Array, "B T E"]:
    """Attention, and the projection back. `options` are those of `sharding.over_devices`."""
    return self.back(self.attended(q, k, v, **options))

  def attended(self, q: Array, k: Array, v: Array, **options) -> Float[Array, "B T H Dv"]:
    """Attention alone."""
    arguments: dict[str, Any] = dict(
      pattern=self.pattern, implementation=self.implementation, **options
    )
    return sharding.over_devices(q, k, v, **arguments)

  def split(
    self, q: Float[Array, "*B F"], k: Float[Array, "*B F_k"], v: Float[Array, "*B F_v"]
  ) -> tuple[Float[Array, "*B _ _"], ...]:
    """The heads of projections."""
    counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
    return tuple(_split(x, count) for x, count in zip((q, k, v), counts, strict=True))

  def back(self, out: Float[Array, "*B H Dv"]) -> Float[Array, "*B E"]:
    return product(self.out, out.reshape(*out.shape[:-2], -1))

  def checked_positions(self, positions, x: Float[Array, "*B E"], name: str = "positions"):
    """What `rope` is given: positions, by default 0, 1, ...; None where there is no `rope`.

    Raises:
      ValueError: positions that nothing would read, or that are no integers [T] or [B, T].
    """
    if self.rope is None:
      if positions is not None:
        raise ValueError(
          f"{name}: only rope reads them, and the layer has none: give it rope=sparse_flax.rope(), "
          "or leave them out"
        )
      return None
    B, T = x.shape[:2]
    if positions is None:
      return jnp.arange(T, dtype=jnp.int32)
    shape, dtype = np.shape(positions), getattr(positions, "dtype", None)
    if shape not in ((T,), (B, T)) or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(
        f"{name} {dtype or type(positions).__name__}{list(shape)}: must be an array of integers, "
        f"[T] = {[T]} or [B, T] = {[B, T]}"
      )
    return positions

  def _turned(self, name: str, x, positions):
    turned = self.rope(x, positions)
    if jnp.shape(turned) != x.shape:
      raise ValueError(
        f"rope={self.rope}: gives {list(jnp.shape(turned))} for {name} {list(x.shape)}, must keep "
        "the shape"
      )
    return turned.astype(x.dtype)


def product(layer: nnx.Linear, x: Float[Array, "*B E"]) -> Float[Array, "*B F"]:
  return layer(x, out_sharding=sharding.of_product(x, layer.kernel[...]))


def _split(x: Float[Array, "*B F"], num_heads: int) -> Float[Array, "*B H D"]:
  return x.reshape(*x.shape[:-1], num_heads, -1)


def _checked_kv_heads(num_kv_heads: int | None, num_heads: int) -> int:
  if num_kv_heads is None:
    return num_heads
  whole = isinstance(num_kv_heads, int | np.integer) and not isinstance(num_kv_heads, bool)
  if not whole or num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ValueError(
      f"{num_kv_heads=}: must be a whole number >= 1 that divides {num_heads=}, or None for as many"
    )
  return int(num_kv_heads)


def _check_rope(rope: RotaryFn | None) -> None:
  if rope is rope_lib.rope or rope is rope_lib.Rope:
    raise ValueError(
      "rope=sparse_flax.rope: makes the function that is wanted here: call it, rope()"
    )
  if rope is not None and not callable(rope):
    raise ValueError(
      f"{rope=}: must be a function of (q or k, positions), such as sparse_flax.rope(), or None"
    )
