"""Steps of sampling of a model, at several numbers of sequences, and whether they draw what a pass
over the whole sequence predicts."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import UInt8

from experiments.benchmark.gpu import sample
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import ours
from pallas_kernels import api

# The choice of a cached step may lack so much of the greatest uncached logit, in units of the
# standard deviation of a position's logits: bfloat16 rounds both sides in another order.
LARGEST_GAP = 0.25


def compare(
  logits: Float[Array, "B n 256"], tokens: UInt8[Array, "B n"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """The share of tokens that are the likeliest byte, and how much a logit lacks of it at most.

  The second in units of the standard deviation of a position's logits.
  """
  tokens = tokens.astype(jnp.int32)
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  gap = (logits.max(axis=-1) - chosen) / logits.std(axis=-1)
  return (logits.argmax(axis=-1) == tokens).mean(dtype=jnp.float32), gap.max()


def measure(job: dict[str, Any]) -> None:
  """Tells {"batch_B": figures} for each number of sequences B, and of the first what is checked.

  Args:
    job: `recipe` and `changes`, of `ours.config_of`; `implementation` of a step; `batches`; `steps`
      of a call; `checked` bytes of each sequence, from the first on, 0: none; the file of
      `child.Turn`.
  """
  turn = child.Turn(job.get("turn"))
  model = ours.config_of(job["recipe"], job["changes"]).model
  batches, checked, how = job["batches"], job["checked"], dict(implementation=job["implementation"])
  api.load_backend(model.implementation)  # of the uncached pass
  # In the middle, where a group of all levels begins.
  first = model.seq_len // 2 // job["steps"] * job["steps"]
  drawings = [sample.compiled(model, B, first=first, steps=job["steps"], **how) for B in batches]
  if checked:
    greedy = sample.compiled(model, batches[0], first=0, steps=checked, temperature=0.0, **how)
    graph = nnx.graphdef(greedy.model)

    def verdict(params, tokens):
      padded = jnp.pad(tokens, ((0, 0), (0, model.seq_len - checked)))
      return compare(nnx.merge(graph, params)(padded)[:, :checked], tokens)

    tokens = jax.ShapeDtypeStruct((batches[0], checked), jnp.uint8)
    lowered = jax.jit(verdict).lower(greedy.start.out_info[0], tokens)
    uncached = lowered.compile()
  turn.alone()
  for B, drawing in zip(batches, drawings, strict=True):
    steps, _ = sample.timed(drawing, B)
    ms = 1e3 * sample.seconds(steps) / job["steps"]
    figures = dict(ms_per_step=round(ms, 5), bytes_per_second=round(1e3 * B / ms))
    if jax.default_backend() == "gpu":
      figures["launches"] = round(len(timing.kernels_of(steps)) / job["steps"], 2)
    child.tell(**{f"batch_{B}": figures})
  if checked:
    params, carry = greedy.start(jax.random.key(2))
    keys, lengths = jax.random.split(jax.random.key(1), batches[0]), jnp.zeros(batches[0], np.int32)
    _, tokens = greedy.run(params, carry, keys, lengths)
    alike, gap = map(float, uncached(params, tokens))
    child.tell(alike=round(alike, 5), largest_gap=round(gap, 5), checked=checked * batches[0])
    if not gap <= LARGEST_GAP:
      raise ValueError(
        f"a cached step chose a byte whose uncached logit lacks {gap:.3f} deviations"
      )


if __name__ == "__main__":
  sys.exit(child.main(measure))
