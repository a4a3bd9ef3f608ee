"""The device that programs are built for, read here and nowhere else, and what runs on it.

It need not be in this machine: under an abstract mesh with an abstract device, it is that one.
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import Any
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
  cores = jax.devices()[0].core_count if device is None else device.num_cores
  assert cores is not None  # every GPU says it
  return cores


def memory() -> int | None:
  """Bytes that JAX gives programs of a device; None where it is not here, or does not tell.

  Nor where there are several processes, whose limits may differ: they must trace one program.
  """
  here = jax.local_devices()[0]
  if jax.process_count() > 1 or not is_here() or here.device_kind != device_kind():
    return None
  return (here.memory_stats() or {}).get("bytes_limit")


def max_active_clusters(*, blocks: int, threads: int, smem: int) -> int | None:
  """How many clusters of thread blocks the GPU runs at once, as its driver says.

  Args:
    blocks: thread blocks of a cluster.
    threads: of a thread block.
    smem: bytes of shared memory of a thread block.

  Returns:
    Their number; None where the device is not in this machine, or the driver does not tell.
  """
  here = jax.devices()[0]
  if platform() != "gpu" or here.platform != "gpu" or here.device_kind != device_kind():
    return None
  return _ask_for_clusters(here.local_hardware_id, blocks, threads, smem)


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


# Of cuda.h: ids of CUfunction_attribute and CUlaunchAttributeID, and what is launched with them.
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14
_CLUSTER_DIMENSION = 4
# Occupancy is that of a kernel; this one needs nothing beyond what the question names.
_EMPTY_KERNEL = b"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry empty() { ret; }
"""


class _LaunchAttribute(ctypes.Structure):
  _fields_ = [("id", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
  _fields_ = [
    ("grid", ctypes.c_uint * 3),
    ("block", ctypes.c_uint * 3),
    ("smem", ctypes.c_uint),
    ("stream", ctypes.c_void_p),
    ("attributes", ctypes.POINTER(_LaunchAttribute)),
    ("num_attributes", ctypes.c_uint),
  ]


@functools.cache
def _ask_for_clusters(ordinal: int, blocks: int, threads: int, smem: int) -> int | None:
  cluster = _LaunchAttribute(id=_CLUSTER_DIMENSION, value=(blocks, 1, 1))
  config = _LaunchConfig(
    grid=(blocks, 1, 1),
    block=(threads, 1, 1),
    smem=smem,
    attributes=ctypes.pointer(cluster),
    num_attributes=1,
  )
  clusters = ctypes.c_int()
  try:
    with _empty_kernel(ordinal) as (call, kernel):
      call("cuFuncSetAttribute", kernel, _MAX_DYNAMIC_SHARED_SIZE_BYTES, smem)
      call("cuFuncSetAttribute", kernel, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
      call("cuOccupancyMaxActiveClusters", ctypes.byref(clusters), kernel, ctypes.byref(config))
  except (OSError, AttributeError, RuntimeError) as reason:  # no library, no such function, refused
    logger.warning("the CUDA driver does not say how many clusters run at once: %s", reason)
    return None
  return clusters.value


@contextlib.contextmanager
def _empty_kernel(ordinal: int) -> Iterator[tuple]:
  """A call of the driver by name, and a loaded kernel, in the context that JAX has as well."""
  driver = ctypes.CDLL("libcuda.so.1")

  def call(name: str, *args: Any) -> None:
    if status := getattr(driver, name)(*args):
      raise RuntimeError(f"{name} returned {status}")

  device, context = ctypes.c_int(), ctypes.c_void_p()
  module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
  with contextlib.ExitStack() as undo:
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    undo.callback(call, "cuDevicePrimaryCtxRelease_v2", device)
    call("cuCtxPushCurrent_v2", context)
    undo.callback(call, "cuCtxPopCurrent_v2", ctypes.byref(context))
    call("cuModuleLoadData", ctypes.byref(module), _EMPTY_KERNEL)
    undo.callback(call, "cuModuleUnload", module)
    call("cuModuleGetFunction", ctypes.byref(kernel), module, b"empty")
    yield call, kernel
