"""What masks pairs in decoding besides the pattern: segments and blocks of the whole sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Integer

from sparse_flax.model.cache_rows import Step


@dataclasses.dataclass(frozen=True)
class Masks:
  """What masks pairs besides the pattern, of all T steps, as `sparse_attention` takes it."""

  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None
  block_mask: Bool[Array, "Bm Hm nq nk"] | None = None
  block_size: int = 128

  def check(self, B: int, H: int, T: int | None) -> None:
    """Raises ValueError for masks that are not those of T steps."""
    size = self.block_size
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(f"block_size={size!r}: must be a whole number >= 1")
    if self.segment_ids is not None:
      shape, dtype = np.shape(self.segment_ids), jnp.result_type(self.segment_ids)
      if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"segment_ids {dtype}{list(shape)}: must be integers")
      if len(shape) != 2 or shape[0] != B or (T is not None and shape[1] != T):
        raise ValueError(
          f"segment_ids {list(shape)}: must be of all steps, [B, T] = {[B, T]}, not of this one"
        )
    if self.block_mask is not None:
      shape, dtype = np.shape(self.block_mask), jnp.result_type(self.block_mask)
      fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, H)
      fits = fits and jnp.issubdtype(dtype, jnp.bool_)
      blocks = None if T is None else (-(-T // size),) * 2
      if not fits or (blocks is not None and shape[2:] != blocks):
        raise ValueError(
          f"block_mask {dtype}{list(shape)}: must be bool, [{B} or 1, {H} or 1, nq, nk] of all "
          f"steps, {T=} in blocks of block_size={size}"
        )

  def allowed(self, heads: tuple[int, ...], step: Step, row: Integer[Array, "K"]):
    """Whether query `step` may see each row, [B or 1, heads or 1, K]; None where all it may."""
    shown, row = None, jnp.maximum(row, 0)  # slots that hold nothing yet have negative rows
    if self.segment_ids is not None:
      ids = jnp.asarray(self.segment_ids)
      own = jax.lax.dynamic_slice_in_dim(ids, step, 1, axis=1)
      shown = (ids[:, row] == own)[:, None]
    if self.block_mask is not None:
      blocks = jnp.asarray(self.block_mask)
      blocks = blocks if blocks.shape[1] == 1 else blocks[:, np.asarray(heads)]
      own = jax.lax.dynamic_index_in_dim(blocks, step // self.block_size, 2, keepdims=False)
      pairs = own[:, :, row // self.block_size]
      shown = pairs if shown is None else shown & pairs
    return shown
