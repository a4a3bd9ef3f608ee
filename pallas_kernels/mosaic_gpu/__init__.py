"""Kernels for NVIDIA Hopper GPUs, in Pallas Mosaic GPU, as a backend of `sparse_attention`."""

from pallas_kernels.mosaic_gpu.backend import backward
from pallas_kernels.mosaic_gpu.backend import forward
from pallas_kernels.mosaic_gpu.backend import lse_of_natural
from pallas_kernels.mosaic_gpu.backend import natural_lse
from pallas_kernels.mosaic_gpu.backend import planned
from pallas_kernels.mosaic_gpu.backend import takes_lists
from pallas_kernels.mosaic_gpu.backend import unsupported
from pallas_kernels.mosaic_gpu.cudnn import cudnn_attention
from pallas_kernels.mosaic_gpu.cudnn import cudnn_serves
from pallas_kernels.mosaic_gpu.mass import mass_of

__all__ = [
  "backward",
  "cudnn_attention",
  "cudnn_serves",
  "forward",
  "lse_of_natural",
  "mass_of",
  "natural_lse",
  "planned",
  "takes_lists",
  "unsupported",
]
