"""Bits per byte of a whole split: no dropout, every byte scored exactly once.

The weights are the averaged ones, or with train.ema_decay=0 those that were trained.
"""

import itertools
import math
from collections.abc import Callable

from sparse_flax import extras

extras.need("train", of=__name__)

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import UInt8

from pallas_kernels import api
from pallas_kernels import hardware
from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax.parallel import sharding


def token_nats(
  logits: Float[Array, "B T V"], tokens: UInt8[Array, "B T"] | Integer[Array, "B T"]
) -> Float[Array, "B T"]:
  """-log p of every byte, in nats and float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), tokens.astype(jnp.int32)
  )


def open_dataset(config: ml_collections.ConfigDict, split: str) -> data.Dataset:
  """The split that `config.data` names.

  Raises:
    ValueError: no such data or split, or data of another kind than the model is for.
  """
  # Runs of earlier versions may have a path beside a sample, which has always been read without.
  path = "" if config.data.name in data.SAMPLES else config.data.path
  dataset = data.open_dataset(
    config.data.name,
    path=path,
    split=split,
    seq_len=config.model.seq_len,
    split_seed=config.data.split_seed,
    field=config.data.field,
    skip_damaged=config.data.skip_damaged,
  )
  return checked(dataset, config)


def checked(dataset: data.Dataset, config: ml_collections.ConfigDict) -> data.Dataset:
  """The data set, if it is one for the model.

  Raises:
    ValueError: it has another modality, or images of another size.
  """
  if dataset.modality != config.model.modality:
    raise ValueError(
      f"config.model.modality={config.model.modality!r}: must be {dataset.modality!r} "
      f"for config.data.name={dataset.name!r}"
    )
  if dataset.image_shape and math.prod(dataset.image_shape) != config.model.seq_len:
    raise ValueError(
      f"config.model.seq_len={config.model.seq_len}: must be {math.prod(dataset.image_shape)} for "
      f"images of {dataset.image_shape}"
    )
  return dataset


class Evaluator:
  """Scores weights on one split; compiles once and can be called again and again."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    *,
    min_context: int,
    batch_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Args:
    config: of the run that trained the weights.
    dataset: the split.
    min_context: true bytes known before each scored one, the beginning of the split apart.
    batch_size: sequences at a time; None is a micro-batch of training. The result is the same.
    mesh: None is one device.
    """
    graphdef, _ = model_lib.graph_and_shapes(**config.model)
    mesh = mesh or sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = batch_size or config.data.batch_size // config.train.accumulation
    self._config, self._dataset, self._min_context = config, dataset, min_context
    self._batch_size = rows * -(-batch_size // rows)
    self._by_batch = sharding.by_batch(mesh)

    def nats_of_rows(params, tokens, scored: Bool[Array, "B T"]) -> Float[Array, "B"]:
      nats = token_nats(nnx.merge(graphdef, params)(tokens), tokens)
      return jnp.where(scored, nats, 0.0).sum(axis=1)

    # Every process gets the whole result.
    self._nats_of_rows = jax.jit(nats_of_rows, out_shardings=sharding.replicated(mesh))

  def __call__(
    self,
    params: dict,
    *,
    step: int,
    max_batches: int | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
  ) -> dict:
    """The score, with all that is needed to know what it is a score of.

    Args:
      params: the averaged weights.
      step: of the checkpoint they are from.
      max_batches: stop after so many; None scores the whole split.
      on_progress: called with the number of bytes scored so far.

    Returns:
      `bits_per_byte` = nats / (bytes_scored ln 2), the other things one must know to compare it,
      and plain JSON values throughout.

    Raises:
      ValueError: `min_context` leaves nothing to score, or is not 0 for images.
    """
    batches = data.eval_batches(
      self._dataset,
      seq_len=self._config.model.seq_len,
      min_context=self._min_context,
      batch_size=self._batch_size,
    )
    nats, num_bytes, waiting, attention = 0.0, 0, None, ""
    for tokens, scored in itertools.islice(batches, max_batches):
      placed = [
        sharding.place(lambda rows, x=x: x[rows], self._by_batch, x.shape) for x in (tokens, scored)
      ]
      if waiting is None:
        program = self._nats_of_rows.trace(params, *placed)
        attention = ", ".join(api.implementations_in(program.jaxpr))
      sums = self._nats_of_rows(params, *placed)
      if waiting is not None:  # fetched one batch late: the device is at work on the next
        nats += _total(waiting)
        on_progress(num_bytes)
      waiting = sums
      num_bytes += int(scored.sum())
    assert waiting is not None, "every split has a batch"
    nats += _total(waiting)
    model = self._config.model
    return {
      "bits_per_byte": nats / (num_bytes * math.log(2)),
      "step": step,
      "data": self._dataset.identity,
      "split": self._dataset.split,
      "bytes_scored": num_bytes,
      "bytes_in_split": self._dataset.num_bytes,
      "context": model.seq_len,
      "min_context": self._min_context,
      "ema": self._config.train.ema_decay > 0,
      "dtype": model.compute_dtype,
      "attention": attention,
      "backend": hardware.platform(),
      "device": hardware.device_kind(),
    }


def _total(nats_of_rows: Float[Array, "B"]) -> float:
  # In float64 from here on, so that the result does not depend on the batch size.
  return float(np.asarray(nats_of_rows, np.float64).sum())


def evaluate(
  config: ml_collections.ConfigDict,
  params: dict,
  *,
  split: str = "test",
  dataset: data.Dataset | None = None,
  min_context: int | None = None,
  step: int,
  batch_size: int | None = None,
  on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> dict:
  """Bits per byte of the averaged weights `params` on all of `split`; see Evaluator.

  Args:
    config: of the run that trained the weights.
    params: the averaged weights, as checkpoint.restore_params returns them.
    split: "train", "validation" or "test", of the config's data.
    dataset: is scored instead of these; of `data.of_arrays`, for example.
    min_context: None is the config's.
    step: of the checkpoint.
    batch_size: sequences at a time; None is a micro-batch of training.
    on_progress: called with the number of bytes scored so far.
  """
  min_context = config.eval.min_context if min_context is None else min_context
  dataset = checked(dataset, config) if dataset else open_dataset(config, split)
  evaluator = Evaluator(config, dataset, min_context=min_context, batch_size=batch_size)
  return evaluator(params, step=step, on_progress=on_progress)
