"""Kernels for TPUs, in Pallas Mosaic TPU, as a backend of `sparse_attention`."""

from pallas_kernels.mosaic_tpu.backend import backward
from pallas_kernels.mosaic_tpu.backend import forward
from pallas_kernels.mosaic_tpu.backend import lse_of_natural
from pallas_kernels.mosaic_tpu.backend import natural_lse
from pallas_kernels.mosaic_tpu.backend import planned
from pallas_kernels.mosaic_tpu.backend import takes_lists
from pallas_kernels.mosaic_tpu.backend import unsupported

__all__ = [
  "backward",
  "forward",
  "lse_of_natural",
  "natural_lse",
  "planned",
  "takes_lists",
  "unsupported",
]
