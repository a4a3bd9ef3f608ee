"""The losses of the first steps that `experiments.train` runs, on real bytes of the package."""

import math
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from experiments.benchmark.gpu import training
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import ours
from pallas_kernels import api
from sparse_flax.data import samples

EVERY = 20  # steps after which the losses so far are told


def windows_of(modality: str, seq_len: int) -> UInt8[np.ndarray, "N T"]:
  """The package's bytes of a kind, cut into sequences; larger pictures are tiles of small ones."""
  if modality == "image":
    images = samples.cifar10_images()
    side = math.isqrt(seq_len // (images[0].size))
    count = len(images) // side**2
    tiles = images[: count * side**2].reshape(count, side, side, *images.shape[1:])
    streams = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1)
  else:
    streams = samples.enwik8_bytes() if modality == "text" else samples.violin_codes()
  return streams[: streams.size // seq_len * seq_len].reshape(-1, seq_len)


def batches_of(
  modality: str, seq_len: int, batch_size: int, steps: int
) -> UInt8[np.ndarray, "S B T"]:
  """A batch for each step, the same in every process."""
  windows = windows_of(modality, seq_len)
  return windows[np.random.RandomState(0).randint(len(windows), size=(steps, batch_size))]


def measure(job: dict[str, Any]) -> None:
  """Tells the losses of the steps, in bits per byte.

  Args:
    job: `recipe` and `changes`, of `ours.config_of`, `steps`, the `seed` of dropout, and what
      `residual.override` is given.
  """
  config = ours.config_of(job["recipe"], job["changes"])
  made = training.prepare(config)
  model = config.model
  batches = batches_of(model.modality, model.seq_len, config.data.batch_size, job["steps"])
  with jax.set_mesh(made.mesh), ours.residual_by(job["residual"]):
    traced = made.step.trace(*made.shapes)
    program, state = traced.lower().compile(), made.first_state()
  blocks = ", ".join(api.implementations_in(traced.jaxpr, "blocks")) or "modules"
  child.tell(remat=model.remat, blocks_by=blocks)
  key, nats = jax.random.key(job["seed"]), []
  for n, batch in enumerate(batches, 1):
    tokens = jax.device_put(batch, made.shapes[1].sharding)
    state, record = program(state, tokens, key)
    nats.append(record["loss"])
    if n % EVERY == 0 or n == job["steps"]:
      child.tell(losses=[round(float(x) / math.log(2), 6) for x in nats])


if __name__ == "__main__":
  sys.exit(child.main(measure))
