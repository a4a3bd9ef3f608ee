"""Batches by step number for training, and every byte exactly once for evaluation."""

import functools
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax.data import dataset as dataset_lib

BatchAt = Callable[..., UInt8[np.ndarray, "B T"]]
Rows = Sequence[int] | Integer[np.ndarray, "B"]


def make_batches(
  dataset: dataset_lib.Dataset,
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  mirror: bool = False,
) -> BatchAt:
  """Shuffled training batches as a pure function of the seed and the step.

  Each epoch draws one offset in [0, seq_len), cuts the streams from there into consecutive windows
  of seq_len bytes and shuffles these; an image is a stream of one window, so it is never cut. Short
  streams use the offset modulo what they can spare, and streams below seq_len are left out. An
  epoch has as many whole batches as the worst offset leaves, so that the epoch of a step is known
  without looking at earlier ones (enwik8: 915 batches of 8 windows of 12,288 bytes).

  Args:
    dataset: a train split.
    seq_len: bytes of a window; the size of an image for images.
    batch_size: windows of a step, over all hosts.
    seed: in [0, 2**32).
    mirror: swaps left and right of each image with probability 1/2, drawn for each epoch.

  Returns:
    batch_at(step, rows=None): uint8 [len(rows), seq_len], the given rows (numbers below batch_size)
    of the batch of a step, all by default. A host that asks for its own rows reads only those.

  Raises:
    ValueError: if the data holds less than one batch, or an argument is out of range.
  """
  _check(dataset, seq_len=seq_len, batch_size=batch_size)
  if not 0 <= seed < 2**32:
    raise ValueError(f"{seed=} must be in [0, 2**32)")
  shape = dataset.image_shape or ()
  if mirror and not shape:
    raise ValueError(f"{mirror=} must be False: {dataset.name} has no images")
  # Streams too short for a window get no bytes, so no window comes from them.
  lengths = np.where(dataset.streams.lengths >= seq_len, dataset.streams.lengths, 0)
  spare = np.clip(lengths - seq_len + 1, 1, seq_len)  # how many offsets leave a window
  fewest = int(((lengths - spare + 1) // seq_len).sum())
  if not fewest:
    raise ValueError(
      f"{seq_len=} must be at most {dataset.streams.lengths.max():,}, the longest part of the "
      f"{dataset.split} split of {dataset.name}: take more data or shorter sequences"
    )
  if fewest < batch_size:
    raise ValueError(
      f"{batch_size=} must be at most {fewest}, the windows of {seq_len=} bytes in the "
      f"{dataset.split} split of {dataset.name} ({dataset.num_bytes:,} bytes)"
    )
  steps_per_epoch = fewest // batch_size

  @functools.lru_cache(maxsize=2)  # a prefetching thread may be an epoch ahead
  def epoch_of(number: int):
    # RandomState is frozen for good, unlike numpy's newer generators: a run that goes on under
    # another numpy sees the same order.
    random = np.random.RandomState([seed, number])
    offsets = random.randint(seq_len) % spare
    counts = (lengths - offsets) // seq_len
    order = random.permutation(int(counts.sum()))
    return offsets, counts, np.cumsum(counts), order, random.random_sample(len(order)) < 0.5

  def batch_at(step: int, rows: Rows | None = None) -> UInt8[np.ndarray, "B T"]:
    number, position = divmod(int(step), steps_per_epoch)
    offsets, counts, ends, order, mirrored = epoch_of(number)
    batch = order[position * batch_size : (position + 1) * batch_size]
    windows = batch if rows is None else batch[np.asarray(rows)]
    tokens = np.empty((len(windows), seq_len), np.uint8)
    for row, window in enumerate(windows):
      index = int(np.searchsorted(ends, window, side="right"))
      start = int(offsets[index] + (window - ends[index] + counts[index]) * seq_len)
      read = dataset.streams.read(index, start, start + seq_len)
      if mirror and mirrored[window]:
        read = np.reshape(read, shape)[:, ::-1].ravel()
      tokens[row] = read if dataset.places is None else read[dataset.places]
    return tokens

  return batch_at


def eval_batches(
  dataset: dataset_lib.Dataset, *, seq_len: int, min_context: int, batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
  """The whole split in windows, in order, with each byte scored exactly once.

  Within a stream windows advance by seq_len - min_context and score their last bytes only; the
  first scores all of its bytes, the last one is moved back to end where the stream ends and scores
  what is left. A stream shorter than seq_len is one window, padded at its end.

  Args:
    dataset: any split.
    seq_len: bytes of a window; the size of an image for images.
    min_context: true bytes that come before each scored byte in its window, but for the first
      window of a stream; in [0, seq_len), and 0 for images.
    batch_size: windows of a batch, over all hosts; the last batch is padded.

  Returns:
    Pairs (tokens, scored) of shape [batch_size, seq_len]: uint8, and bool, true where the byte is
    to be scored; padding is zero and never scored.

  Raises:
    ValueError: if an argument is out of range.
  """
  _check(dataset, seq_len=seq_len, batch_size=batch_size)
  if dataset.image_shape and min_context:
    raise ValueError(f"{min_context=} must be 0 for images, which have no bytes before them")
  if not 0 <= min_context < seq_len:
    raise ValueError(f"{min_context=} must be in [0, {seq_len=})")
  batches = _eval_batches(dataset.streams, seq_len, seq_len - min_context, batch_size)
  if dataset.places is None:
    return batches
  # An image is one window, of which all is scored.
  return ((tokens[:, dataset.places], scored) for tokens, scored in batches)


def end_batches(
  dataset: dataset_lib.Dataset, *, seq_len: int, context: int, last: int, batch_size: int
) -> Iterator[tuple[UInt8[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
  """The last bytes of each whole window of the split, with `context` bytes before them and no more.

  Each stream is cut from its beginning into consecutive windows of seq_len, and its rest left out:
  whatever the context, the same bytes are scored, in the same order.

  Args:
    dataset: a split of texts or recordings.
    seq_len: bytes of a window, and of a row of a batch.
    context: true bytes before the first scored one of each window; in [0, seq_len - last].
    last: bytes to score of each; in [1, seq_len].
    batch_size: windows of a batch, over all hosts; the last batch is padded.

  Returns:
    Pairs as of `eval_batches`: a row begins with the context, and ends with padding.

  Raises:
    ValueError: an argument is out of range, the data are images, or no stream has a window.
  """
  _check(dataset, seq_len=seq_len, batch_size=batch_size)
  if dataset.image_shape:
    raise ValueError(
      f"{dataset.name=}: must have text or sound, whose windows have bytes before them"
    )
  if not 1 <= last <= seq_len:
    raise ValueError(f"{last=} must be in [1, {seq_len=}]")
  if not 0 <= context <= seq_len - last:
    raise ValueError(f"{context=} must be in [0, {seq_len - last}], {seq_len=} less {last=}")
  if not num_ends(dataset, seq_len=seq_len):
    raise ValueError(
      f"{seq_len=} must be at most {dataset.streams.lengths.max():,}, the longest part of the "
      f"{dataset.split} split of {dataset.name}"
    )
  return _end_batches(dataset.streams, seq_len, context, last, batch_size)


def num_ends(dataset: dataset_lib.Dataset, *, seq_len: int) -> int:
  """How many windows `end_batches` has, padding apart."""
  return int((np.asarray(dataset.streams.lengths) // seq_len).sum())


def num_windows(dataset: dataset_lib.Dataset, *, seq_len: int, min_context: int) -> int:
  """How many windows `eval_batches` has, padding apart."""
  lengths = np.asarray(dataset.streams.lengths)
  more = -(-np.maximum(lengths - seq_len, 0) // (seq_len - min_context))
  return int(((lengths > 0) + more).sum())


def _eval_batches(streams, seq_len, advance, batch_size):
  empty = lambda dtype: np.zeros((batch_size, seq_len), dtype)
  tokens, scored, filled = empty(np.uint8), empty(bool), 0
  for index, length in enumerate(streams.lengths.tolist()):
    scored_up_to = 0
    while scored_up_to < length:
      stop = min(scored_up_to + (advance if scored_up_to else seq_len), length)
      start = max(stop - seq_len, 0)
      tokens[filled, : stop - start] = streams.read(index, start, stop)
      scored[filled, scored_up_to - start : stop - start] = True
      scored_up_to = stop
      filled += 1
      if filled == batch_size:
        yield tokens, scored
        tokens, scored, filled = empty(np.uint8), empty(bool), 0
  if filled:
    yield tokens, scored


def _end_batches(streams, seq_len, context, last, batch_size):
  ends = (
    (index, stop)
    for index, length in enumerate(streams.lengths.tolist())
    for stop in range(seq_len, length + 1, seq_len)
  )
  for part in itertools.batched(ends, batch_size):
    tokens = np.zeros((batch_size, seq_len), np.uint8)
    scored = np.zeros((batch_size, seq_len), bool)
    for row, (index, stop) in enumerate(part):
      tokens[row, : context + last] = streams.read(index, stop - context - last, stop)
    scored[: len(part), context : context + last] = True
    yield tokens, scored


def _check(dataset, *, seq_len, batch_size):
  if dataset.image_shape and seq_len != np.prod(dataset.image_shape):
    raise ValueError(
      f"{seq_len=} must be {np.prod(dataset.image_shape)}, the bytes of an image of {dataset.name}"
    )
  for field, value in (("seq_len", seq_len), ("batch_size", batch_size)):
    if value < 1:
      raise ValueError(f"{field}={value} must be at least 1")
