"""Bits per byte of a split or of its beginning: no dropout, every byte scored exactly once."""

import functools
import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

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
from jaxtyping import Key
from jaxtyping import UInt8

from pallas_kernels import api
from pallas_kernels import hardware
from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax.data import batches as batches_lib
from sparse_flax.model import order as order_lib
from sparse_flax.parallel import sharding

# Tokens of a sequence from which on the logits of a model with inner levels are made in pieces, and
# of a piece: 16 MB of logits.
LONG, PIECE = 2**16, 2**14
OnSequences = Callable[[Float[np.ndarray, "N"]], None]


def token_nats(
  logits: Float[Array, "B T V"], tokens: UInt8[Array, "B T"] | Integer[Array, "B T"]
) -> Float[Array, "B T"]:
  """-log p of every byte, in nats and float32."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), tokens.astype(jnp.int32)
  )


def nats_of(
  model: model_lib.SparseTransformer,
  tokens: UInt8[Array, "B T"] | Integer[Array, "B T"],
  *,
  dropout_key: Key[Array, ""] | None = None,
  stage: Any = None,
  losses: bool = False,
) -> Any:
  """-log p of every byte by a model, [B, T]; of long sequences with inner levels piece by piece.

  Inner levels are small beside the logits of a long sequence, 1 kB a token: these are made of
  `PIECE` rows at a time, and again for the backward pass. The other arguments are the model's; with
  `losses` those of its layers come too.
  """
  T = tokens.shape[1]
  x, found = model.hidden(tokens, dropout_key=dropout_key, stage=stage, losses=losses)
  if T <= LONG or not model.factors:
    nats = token_nats(model.head(x), tokens)
    return (nats, found) if losses else nats
  number = -(-T // PIECE)

  def cut(rows):
    padded = jnp.pad(rows, ((0, 0), (0, number * PIECE - T), *((0, 0),) * (rows.ndim - 2)))
    return jnp.moveaxis(padded.reshape(len(rows), number, PIECE, *rows.shape[2:]), 1, 0)

  # A scan keeps the compiler from merging the two computations.
  of_piece = jax.checkpoint(
    lambda model, x, tokens: token_nats(model.head(x), tokens), prevent_cse=False
  )
  _, nats = jax.lax.scan(
    lambda _, piece: (None, of_piece(model, *piece)), None, (cut(x), cut(tokens))
  )
  nats = jnp.moveaxis(nats, 0, 1).reshape(len(tokens), -1)[:, :T]
  return (nats, found) if losses else nats


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
    recall=config.data.recall.to_dict(),
  )
  return checked(dataset, config)


def checked(dataset: data.Dataset, config: ml_collections.ConfigDict) -> data.Dataset:
  """The data set, if it is one for the model, with its bytes in the order of the model.

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
  order = order_lib.Order.of(config.model)
  return dataset.read_at(None if order.is_raster else order.places)


def answers_of(config: ml_collections.ConfigDict) -> Callable[[Array], Array] | None:
  """tokens -> which of them are trained on and scored, of data that say so; None: all are."""
  if config.data.name != data.RECALL:
    return None
  return functools.partial(data.answers, sizes=data.RecallSizes(**config.data.recall))


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
    self._answers = answers = answers_of(config)
    mesh = mesh or sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = batch_size or config.data.batch_size // config.train.accumulation
    self._config, self._dataset, self._min_context = config, dataset, min_context
    self._batch_size = rows * -(-batch_size // rows)
    self._by_batch = sharding.by_batch(mesh)

    def nats_of_rows(
      params, tokens, scored: Bool[Array, "B T"], *, stage=None
    ) -> tuple[Float[Array, "B"], ...]:
      model = nnx.merge(graphdef, params)
      if answers is None:
        nats = nats_of(model, tokens, stage=stage)
        return (jnp.where(scored, nats, 0.0).sum(axis=1),)
      logits = model(tokens, stage=stage)
      sums = jnp.where(scored, token_nats(logits, tokens), 0.0).sum(axis=1)
      right = (logits.argmax(axis=-1) == tokens) & scored
      return sums, right.sum(axis=1, dtype=jnp.float32)

    # Every process gets the whole result.
    self._nats_of_rows = jax.jit(
      nats_of_rows, out_shardings=sharding.replicated(mesh), static_argnames="stage"
    )

  def __call__(
    self,
    params: dict,
    *,
    step: int,
    averaged: bool = True,
    num: int | None = None,
    max_batches: int | None = None,
    ends: tuple[int, int] | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    on_sequences: OnSequences = lambda bits: None,
  ) -> dict:
    """The score, with all that is needed to know what it is a score of.

    Args:
      params: the weights.
      step: of the checkpoint they are from.
      averaged: whether they are the averaged ones, for the record.
      num: sequences, the first of the split; None scores the whole split.
      max_batches: stop after so many; None scores them all.
      ends: (context, last) scores the last bytes of each whole window alone, with so many bytes
        before them and no more, instead of all with `min_context`.
      on_progress: called with the number of bytes scored so far.
      on_sequences: called once with the bits per byte of each sequence, in order: what two models
        gave the same sequences can be compared one by one.

    Returns:
      `accuracy`, of data with questions, the share of answers that are the likeliest byte;
      `bits_per_byte` = nats / (bytes_scored ln 2); `standard_error`, in the same unit, over the
      `sequences` that were scored, None for a single one; the other things one must know to compare
      them, and plain JSON values throughout.

    Raises:
      ValueError: `min_context` leaves nothing to score, or is not 0 for images; or the split has
        no `num` sequences.
    """
    model, context = self._config.model, self._min_context
    cut = dict(seq_len=model.seq_len, batch_size=self._batch_size)
    if ends is None:
      batches = data.eval_batches(self._dataset, min_context=context, **cut)
      where = dict(seq_len=model.seq_len, min_context=context)
      there = batches_lib.num_windows(self._dataset, **where)
    else:
      context, last = ends
      batches = batches_lib.end_batches(self._dataset, context=context, last=last, **cut)
      there = batches_lib.num_ends(self._dataset, seq_len=model.seq_len)
    if num is not None:
      if not 1 <= num <= there:
        raise ValueError(
          f"{num=}: must be a whole number from 1 to {there}, the sequences of the "
          f"{self._dataset.split} split of {self._dataset.name}"
        )
      batches = _first_of(batches, num)
    # By what the last update was made with.
    stage = model_lib.stage_at(model.learned_stages, max(step - 1, 0))
    how = {} if stage is None else {"stage": stage}
    found, sizes, num_bytes, waiting, attention = [], [], 0, None, ""
    for tokens, scored in itertools.islice(batches, max_batches):
      if self._answers:
        scored = scored & np.asarray(self._answers(jnp.asarray(tokens)))
      placed = [
        sharding.place(lambda rows, x=x: x[rows], self._by_batch, x.shape) for x in (tokens, scored)
      ]
      if waiting is None:
        program = self._nats_of_rows.trace(params, *placed, **how)
        attention = ", ".join(api.implementations_in(program.jaxpr))
      sums = self._nats_of_rows(params, *placed, **how)
      if waiting is not None:  # fetched one batch late: the device is at work on the next
        found.append(np.asarray(waiting, np.float64))
        on_progress(num_bytes)
      waiting = sums
      sizes.append(scored.sum(axis=1))
      num_bytes += int(sizes[-1].sum())
    assert waiting is not None, "every split has a batch"
    found.append(np.asarray(waiting, np.float64))
    sizes_of, (nats_of, *right) = np.concatenate(sizes), np.concatenate(found, axis=1)
    is_one = sizes_of > 0  # the others fill the last batch
    per_byte, error = _ratio(nats_of[is_one], sizes_of[is_one])
    on_sequences(nats_of[is_one] / sizes_of[is_one] / math.log(2))
    return {
      "bits_per_byte": per_byte / math.log(2),
      "standard_error": None if error is None else error / math.log(2),
      **({"accuracy": float(right[0].sum()) / num_bytes} if right else {}),
      "sequences": int(is_one.sum()),
      "sequences_in_split": there,
      "step": step,
      "data": self._dataset.identity,
      "split": self._dataset.split,
      "bytes_scored": num_bytes,
      "bytes_in_split": self._dataset.num_bytes,
      "context": model.seq_len if ends is None else sum(ends),
      "min_context": context,
      "ema": averaged and self._config.train.ema_decay > 0,
      "dtype": model.compute_dtype,
      "attention": attention,
      "backend": hardware.platform(),
      "device": hardware.device_kind(),
    }


def _first_of(batches: Iterator, num: int) -> Iterator:
  """Batches of `data.eval_batches`, of which the first `num` sequences alone are scored."""
  for tokens, scored in batches:
    scored[num:] = False
    yield tokens, scored
    num -= len(tokens)
    if num <= 0:
      return


def _ratio(
  nats: Float[np.ndarray, "N"], sizes: Integer[np.ndarray, "N"]
) -> tuple[float, float | None]:
  """sum(nats) / sum(sizes), and its standard error: sequences count as independent draws.

  The error is that of a ratio, sqrt(N / (N - 1) sum (nats - ratio sizes)^2) / sum(sizes). Where all
  sequences are of one length it is that of their mean; of a single one there is none.
  """
  # In float64, so that the result does not depend on the batch size.
  count, total = len(nats), float(sizes.sum())
  ratio = float(nats.sum()) / total
  if count < 2:
    return ratio, None
  squares = float(np.square(nats - ratio * sizes).sum())
  return ratio, math.sqrt(count / (count - 1) * squares) / total


def paired_difference(
  bits: Float[np.ndarray, "N"], others: Float[np.ndarray, "M"]
) -> tuple[float, float]:
  """Mean of bits - others, two models on the same sequences, and its standard error.

  Most of the spread of bits is that of the sequences, which both models share: the error is several
  times smaller than that of either mean.

  Args:
    bits, others: bits per byte of each sequence, in the same order, N = M >= 2.

  Raises:
    ValueError: they are not of as many sequences.
  """
  if bits.shape != others.shape or len(bits) < 2:
    raise ValueError(f"bits of {bits.shape} and {others.shape} sequences: must be as many, >= 2")
  difference = bits.astype(np.float64) - others
  return float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(len(bits))


def contexts_of(config: ml_collections.ConfigDict, *, last: int) -> list[int]:
  """The contexts of `context_curve`: 0, the model's stride, twice that and so on, and the longest.

  Raises:
    ValueError: `last`, the bytes to score of each window, is not in [1, seq_len]; or the model is
      one of images, which begin without a context and are always whole.
  """
  seq_len, stride, modality = config.model.seq_len, config.model.stride, config.model.modality
  if modality == "image":
    raise ValueError(f"config.model.{modality=}: must be 'text' or 'audio' for a context curve")
  if not 1 <= last <= seq_len:
    raise ValueError(f"{last=}: must be a whole number from 1 to {seq_len}, the model's seq_len")
  longest = seq_len - last
  steps = itertools.takewhile(lambda x: x < longest, (stride * 2**n for n in itertools.count()))
  return sorted({0, *steps, longest})


def context_curve(
  config: ml_collections.ConfigDict,
  params: dict,
  *,
  last: int,
  split: str = "test",
  dataset: data.Dataset | None = None,
  step: int,
  averaged: bool = True,
  num: int | None = None,
  batch_size: int | None = None,
  on_progress: Callable[[int], None] = lambda num_contexts: None,
) -> dict:
  """Bits per byte of the last bytes of each window, against the bytes given before them.

  The same bytes are scored with each of the contexts of `contexts_of`, so that differences are
  paired. A shorter context begins at the first position of the model, as a text does.

  Args:
    config: of the run that trained the weights; of a text or of sound.
    params: the weights, as checkpoint.restore_params returns them.
    last: bytes to score of each window; in [1, seq_len].
    split, dataset, step, averaged, num, batch_size: as for `evaluate`, whose sequences are the
      whole windows of the split here.
    on_progress: called with the number of contexts that are done.

  Returns:
    What `Evaluator` says of a score and does not depend on the context; `last`; and `contexts`, of
    which each has `context`, `bits_per_byte` and `standard_error` over windows, and `more` and
    `more_error`: by how much it needs more bits than the longest, paired by window. Errors are None
    where there is one window.

  Raises:
    ValueError: `last` is out of range, the split has no whole window, or its data are images or
      say themselves what is scored.
  """
  dataset = checked(dataset, config) if dataset else open_dataset(config, split)
  if answers_of(config) is not None:
    raise ValueError(f"config.data.name={config.data.name!r}: says itself which bytes are scored")
  if num is not None and num > 0:
    batch_size = min(num, batch_size or config.data.batch_size // config.train.accumulation)
  evaluator = Evaluator(config, dataset, min_context=0, batch_size=batch_size)
  contexts, results, of_windows = contexts_of(config, last=last), [], []
  how = dict(step=step, averaged=averaged, num=num, on_sequences=of_windows.append)
  for context in contexts:
    results.append(evaluator(params, ends=(context, last), **how))
    on_progress(len(results))
  own = ("bits_per_byte", "standard_error")
  curve = []
  for context, result, bits in zip(contexts, results, of_windows, strict=True):
    numbers = {key: result[key] for key in own}
    more, error = result["bits_per_byte"] - results[-1]["bits_per_byte"], None
    if len(bits) > 1:
      more, error = paired_difference(bits, of_windows[-1])
    curve.append(dict(context=context, **numbers, more=more, more_error=error))
  of_all = {k: v for k, v in results[-1].items() if k not in (*own, "context", "min_context")}
  return of_all | dict(last=last, contexts=curve)


def evaluate(
  config: ml_collections.ConfigDict,
  params: dict,
  *,
  split: str = "test",
  dataset: data.Dataset | None = None,
  min_context: int | None = None,
  step: int,
  averaged: bool = True,
  num: int | None = None,
  batch_size: int | None = None,
  on_progress: Callable[[int], None] = lambda num_bytes: None,
  on_sequences: OnSequences = lambda bits: None,
) -> dict:
  """Bits per byte of the weights `params` on `split`; see Evaluator.

  Args:
    config: of the run that trained the weights.
    params: the weights, as checkpoint.restore_params returns them.
    split: "train", "validation" or "test", of the config's data.
    dataset: is scored instead of these; of `data.of_arrays`, for example.
    min_context: None is the config's.
    step: of the checkpoint.
    averaged: whether they are the averaged weights, for the record.
    num: sequences, the first of the split; None scores all.
    batch_size: sequences at a time, at most `num`; None is a micro-batch of training.
    on_progress: called with the number of bytes scored so far.
    on_sequences: called once with the bits per byte of each sequence.
  """
  min_context = config.eval.min_context if min_context is None else min_context
  dataset = checked(dataset, config) if dataset else open_dataset(config, split)
  if num is not None and num > 0:  # no rows that fill a batch
    batch_size = min(num, batch_size or config.data.batch_size // config.train.accumulation)
  evaluator = Evaluator(config, dataset, min_context=min_context, batch_size=batch_size)
  calls = dict(on_progress=on_progress, on_sequences=on_sequences)
  return evaluator(params, step=step, averaged=averaged, num=num, **calls)
