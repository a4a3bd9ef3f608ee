"""What the arguments of a SparseTransformer may be; `levels.specs_of` checks those of levels."""

import math
from collections.abc import Sequence

from pallas_kernels import api
from sparse_flax.model import block
from sparse_flax.model import initialization
from sparse_flax.model import levels
from sparse_flax.model import order as order_lib
from sparse_flax.model import remat as remat_lib
from sparse_flax.model import rope as rope_lib

MODALITIES = ("image", "text", "audio")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PARAM_DTYPES = ("float32", "bfloat16")
CHOICES: dict[str, tuple[str | None, ...]] = {
  "modality": MODALITIES,
  "init_scheme": initialization.INIT_SCHEMES,
  "activation": tuple(block.ACTIVATIONS),
  "rope": rope_lib.ROPES,
  "remat": remat_lib.REMATS,
  "compute_dtype": COMPUTE_DTYPES,
  "param_dtype": PARAM_DTYPES,
  "implementation": (None, *api.IMPLEMENTATIONS),
}


def check_choices(**given: str | None) -> None:
  """Raises ValueError for a value that is none of CHOICES; all of these are given by name."""
  for name, choices in CHOICES.items():
    if given[name] not in choices:
      raise ValueError(f"{name}={given[name]!r}: must be one of {choices}")


def check_sizes(*, seq_len: int, embed_dropout: int | float) -> None:
  """Raises ValueError unless there are tokens, and the rate is in [0, 1)."""
  if not isinstance(seq_len, int) or seq_len < 1:
    raise ValueError(f"{seq_len=}: must be a whole number >= 1")
  if not 0.0 <= embed_dropout < 1.0:
    raise ValueError(f"{embed_dropout=}: must be in [0, 1)")


def check_positions(shape: tuple[int, ...], *, modality: str, seq_len: int) -> None:
  """Raises ValueError for a `position_shape` that is none of this modality and length."""
  places = math.prod(shape)
  if not shape or min(shape) < 1:
    raise ValueError(f"position_shape={shape}: must be whole numbers >= 1")
  if modality == "image" and (len(shape) != 3 or places != seq_len):
    raise ValueError(
      f"position_shape={shape}: an image needs (rows, columns, channels) with product {seq_len=}"
    )
  if modality != "image" and (len(shape) != 2 or places < seq_len):
    raise ValueError(
      f"position_shape={shape}: {modality} needs (seq_len / stride, stride), "
      f"whose product is {places} and must reach {seq_len=}"
    )


def check_rope(rope: str, order: order_lib.Order, specs: Sequence[levels.Spec]) -> None:
  """Raises ValueError for a `rope` that this order, or the heads of a level, cannot have."""
  if rope == "axes" and not order.is_raster:
    raise ValueError(f"{rope=}: must be 'none' or 'tokens' with order={order.name!r}")
  for spec in specs:
    turn = rope_lib.of_level(rope, order.shape, factor=spec.factor)
    size = round(spec.qk_ratio * spec.width) // spec.num_heads
    axes = 0 if turn is None else max(1, len(turn.shape))
    if axes and (size % 2 or size < 2 * axes):
      at = f"{spec.title}: " if spec.name else ""
      raise ValueError(
        f"{at}{rope=}: queries and keys have qk_ratio * width / num_heads = {size} features "
        f"per head, must be an even number >= {2 * axes}"
      )
