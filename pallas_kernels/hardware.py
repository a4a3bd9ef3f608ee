"""The device that programs are built for, read here and nowhere else, and what runs on it.

It need not be in this machine: under an abstract mesh with an abstract device, it is that one.
"""

import functools
import logging
from typing import Literal

import jax

# Releases of JAX on which our kernels for NVIDIA GPUs are known to fail, and how they fail.
KNOWN_BAD_JAX: dict[str, str] = {}
# Releases of JAX on which all of them ran on a GPU. On others they run, after one warning.
RAN_ON_A_GPU = ("0.11.2",)
# Parts of the names of devices of compute capability 9.0.
_HOPPER = ("H100", "H200", "H800", "H20")

logger = logging.getLogger(__name__)


def platform() -> str:
  """Of JAX: "cpu", "gpu" or "tpu"."""
  device = _abstract_device()
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name == "cuda" else name


def is_here() -> bool:
  """Whether JAX runs programs on such devices in this process."""
  return platform() == jax.default_backend()


def simulated(kernels_for: Literal["gpu", "tpu"]) -> bool:
  """Whether kernels for such devices are interpreted: where programs are built for others."""
  return platform() != kernels_for


def has_tall_tiles() -> bool:
  """Whether a TPU's tile of bfloat16 has 16 sublanes: 8 heads or tokens do not lie side by side."""
  return device_kind().startswith("TPU7")


def device_kind() -> str:
  """As JAX names it, "NVIDIA H100 80GB HBM3"."""
  return (_abstract_device() or jax.devices()[0]).device_kind


def num_cores() -> int:
  """Streaming multiprocessors of a GPU."""
  device = _abstract_device()
  return jax.devices()[0].core_count if device is None else device.num_cores


def compute_capability() -> str:
  """Of a GPU, "9.0"; "unknown" where neither a device nor its name tells."""
  here, kind = jax.devices()[0], device_kind()
  if here.device_kind == kind:
    return getattr(here, "compute_capability", "unknown")
  return "9.0" if any(name in kind for name in _HOPPER) else "unknown"


def why_not_nvidia() -> str | None:
  """Why our kernels for NVIDIA GPUs cannot run; None where they can: there, or simulated on a CPU.

  Says once, in the log, when the release of JAX is one on which they have not run on a GPU yet.
  """
  version = jax.__version__
  if version in KNOWN_BAD_JAX:
    return f"known to fail with JAX {version}: {KNOWN_BAD_JAX[version]}"
  if platform() == "gpu" and version not in RAN_ON_A_GPU:
    _warn_of_version(version)
  return None


def why_not_hopper() -> str | None:
  """`why_not_nvidia` of kernels that are made for Hopper GPUs alone."""
  if platform() == "gpu" and (capability := compute_capability()).partition(".")[0] != "9":
    return f"made for compute capability 9.x (Hopper), not {capability}"
  return why_not_nvidia()


@functools.cache
def _warn_of_version(version: str) -> None:
  logger.warning(
    "our kernels for NVIDIA GPUs ran on a GPU with JAX %s; with JAX %s they were only compiled",
    ", ".join(RAN_ON_A_GPU),
    version,
  )


def _abstract_device() -> jax.sharding.AbstractDevice | None:
  return jax.sharding.get_abstract_mesh().abstract_device
