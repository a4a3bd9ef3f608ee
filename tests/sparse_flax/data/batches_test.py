"""Batches by step, and evaluation windows, on streams whose bytes are their own positions."""

import numpy as np
import pytest

from sparse_flax import data
from sparse_flax.data import dataset as dataset_lib


def dataset_of(*lengths, name="counting"):
  """Streams of the given lengths; all together they count 0, 1, 2, ..."""
  values = np.arange(sum(lengths)).astype(np.uint8)
  streams = dataset_lib.Arrays(np.split(values, np.cumsum(lengths)[:-1]))
  return data.Dataset(name, "train", "text", None, streams, "1.0.0", "")


def images_of(count):
  images = np.repeat(np.arange(count, dtype=np.uint8), 12).reshape(count, 2, 2, 3)
  streams = dataset_lib.Arrays(images)
  return data.Dataset("tiny", "train", "image", (2, 2, 3), streams, "1.0.0", "")


def epoch_of(batch_at, steps, epoch=0):
  return np.concatenate([batch_at(step) for step in range(epoch * steps, (epoch + 1) * steps)])


def test_an_epoch_is_a_shuffled_cut_from_one_offset():
  batch_at = data.make_batches(dataset_of(250), seq_len=7, batch_size=2, seed=1)
  epochs = [epoch_of(batch_at, steps=17, epoch=e) for e in range(8)]  # (250 - 7 + 1) // 7 // 2
  for windows in epochs:
    starts = windows[:, 0].astype(int)
    np.testing.assert_array_equal(windows, starts[:, None] + np.arange(7))
    assert len(set(starts)) == 34
    assert len(set(starts % 7)) == 1
    assert not np.array_equal(starts, np.sort(starts))
  assert len({windows[0, 0] % 7 for windows in epochs}) > 2  # each epoch draws its own offset


def test_each_image_comes_once_in_an_epoch_and_in_a_new_order():
  batch_at = data.make_batches(images_of(60), seq_len=12, batch_size=10, seed=3)
  epochs = [epoch_of(batch_at, steps=6, epoch=e)[:, 0] for e in range(3)]
  for order in epochs:
    np.testing.assert_array_equal(np.sort(order), np.arange(60))
  assert not np.array_equal(epochs[0], epochs[1])


def test_half_of_the_images_are_mirrored_anew_in_each_epoch():
  images = np.arange(60 * 12).astype(np.uint8).reshape(60, 2, 2, 3)
  dataset = data.Dataset(
    "tiny", "train", "image", (2, 2, 3), dataset_lib.Arrays(images), "1.0.0", ""
  )
  make = lambda mirror: data.make_batches(dataset, seq_len=12, batch_size=10, seed=3, mirror=mirror)
  mirrored = []
  for epoch in range(2):
    plain, mixed = (epoch_of(make(mirror), 6, epoch) for mirror in (False, True))
    same = (mixed == plain).all(axis=1)
    turned = plain.reshape(60, 2, 2, 3)[:, :, ::-1].reshape(60, 12)
    np.testing.assert_array_equal(mixed[~same], turned[~same])
    assert 15 < same.sum() < 45
    mirrored.append({tuple(x) for x in plain[~same]})
  assert mirrored[0] != mirrored[1]
  with pytest.raises(ValueError, match="mirror=True must be False: counting has no images"):
    data.make_batches(dataset_of(50), seq_len=7, batch_size=1, seed=0, mirror=True)


def test_a_ragged_last_batch_is_dropped():
  batch_at = data.make_batches(images_of(25), seq_len=12, batch_size=10, seed=3)
  epochs = [epoch_of(batch_at, steps=2, epoch=e)[:, 0] for e in range(20)]
  assert all(len(set(order)) == 20 for order in epochs)
  assert set(np.concatenate(epochs)) == set(range(25))  # not always the same ones


def test_streams_never_mix_and_short_ones_are_left_out():
  lengths = (100, 5, 16, 120)  # of windows of 16: the second has none, the third exactly one
  batch_at = data.make_batches(dataset_of(*lengths), seq_len=16, batch_size=2, seed=0)
  for epoch in range(5):
    starts = epoch_of(batch_at, steps=6, epoch=epoch)[:, 0].astype(int)
    inside = [(0, 100), (105, 121), (121, 241)]
    assert all(any(a <= start <= b - 16 for a, b in inside) for start in starts)


@pytest.mark.parametrize("step", [0, 1, 33, 100_000])
def test_batches_depend_on_nothing_but_seed_and_step(step):
  make = lambda seed: data.make_batches(dataset_of(250), seq_len=7, batch_size=4, seed=seed)
  used = make(5)
  for earlier in (3, 70_000, 12):
    used(earlier)
  np.testing.assert_array_equal(used(step), make(5)(step))
  assert not np.array_equal(used(step), make(6)(step))


@pytest.mark.parametrize("dataset", [dataset_of(250), images_of(30)], ids=["text", "images"])
def test_the_rows_of_two_hosts_make_the_global_batch(dataset):
  seq_len = 12
  hosts = [data.make_batches(dataset, seq_len=seq_len, batch_size=6, seed=2) for _ in range(3)]
  for step in (0, 7, 1234):
    rows = [hosts[0](step, rows=range(0, 3)), hosts[1](step, rows=range(3, 6))]
    np.testing.assert_array_equal(np.concatenate(rows), hosts[2](step))


def test_a_host_reads_only_its_rows(monkeypatch):
  dataset, reads = dataset_of(250), []
  read = dataset.streams.read
  monkeypatch.setattr(dataset.streams, "read", lambda *at: reads.append(at) or read(*at))
  data.make_batches(dataset, seq_len=7, batch_size=8, seed=0)(5, rows=range(2, 4))
  assert len(reads) == 2


def test_the_order_is_the_one_of_earlier_releases():
  """If this fails, runs that go on after an update see other batches: bump the data versions."""
  batch_at = data.make_batches(dataset_of(250), seq_len=7, batch_size=8, seed=11)
  assert batch_at(0)[:, 0].tolist() == [75, 152, 124, 180, 89, 12, 222, 47]
  assert batch_at(1000)[:, 0].tolist() == [88, 165, 81, 46, 32, 116, 109, 242]


@pytest.mark.parametrize("min_context", [0, 1, 5, 15], ids=lambda m: f"context{m}")
@pytest.mark.parametrize("lengths", [(16,), (1,), (250,), (40, 7, 16, 33)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4], ids=lambda b: f"batch{b}")
def test_every_byte_is_scored_once_with_enough_context(lengths, min_context, batch_size):
  dataset = dataset_of(*lengths)
  batches = data.eval_batches(dataset, seq_len=16, min_context=min_context, batch_size=batch_size)
  seen, starts = [], np.cumsum((0, *lengths))
  for tokens, scored in batches:
    assert tokens.shape == scored.shape == (batch_size, 16)
    assert tokens.dtype == np.uint8
    assert scored.dtype == bool
    for row, slots in zip(tokens, scored, strict=True):
      if slots.any():
        first = np.flatnonzero(slots)[0]
        begins_a_stream = row[0] in starts and first == 0
        assert begins_a_stream or first >= min_context
        used = row[: np.flatnonzero(slots)[-1] + 1].astype(int)
        np.testing.assert_array_equal(np.diff(used), 1)  # true neighbours, no padding between
      seen += row[slots].tolist()
  assert seen == list(range(sum(lengths)))  # each once, and in order


@pytest.mark.parametrize(
  "min_context, num_windows", [(0, 407), (6_144, 813), (10_752, 3_249), (12_160, 38_968)]
)
def test_enwik8_has_as_many_windows_as_the_paper_implies(min_context, num_windows):
  streams = dataset_lib.Arrays([np.zeros(5_000_000, np.uint8)])
  dataset = data.Dataset("enwik8", "test", "text", None, streams, "1.0.0", "")
  batches = data.eval_batches(dataset, seq_len=12_288, min_context=min_context, batch_size=64)
  assert sum(int(scored.any(axis=1).sum()) for _, scored in batches) == num_windows


def test_images_are_scored_whole():
  batches = list(data.eval_batches(images_of(7), seq_len=12, min_context=0, batch_size=4))
  tokens, scored = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  np.testing.assert_array_equal(tokens[:7, 0], np.arange(7))
  assert scored[:7].all()
  assert not scored[7:].any()
  assert len(tokens) == 8


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: data.make_batches(dataset_of(50), seq_len=7, batch_size=7, seed=0), "at most 6"),
    (
      lambda: data.make_batches(dataset_of(5), seq_len=7, batch_size=1, seed=0),
      r"seq_len=7 must be at most 5, the longest part of the train split of counting",
    ),
    (lambda: data.make_batches(dataset_of(50), seq_len=7, batch_size=0, seed=0), "batch_size=0"),
    (lambda: data.make_batches(dataset_of(50), seq_len=7, batch_size=1, seed=-1), "seed=-1"),
    (lambda: data.make_batches(images_of(5), seq_len=7, batch_size=1, seed=0), "must be 12"),
    (
      lambda: data.eval_batches(images_of(5), seq_len=12, min_context=1, batch_size=1),
      "min_context=1 must be 0",
    ),
    (
      lambda: data.eval_batches(dataset_of(50), seq_len=12, min_context=12, batch_size=1),
      "min_context=12 must be in",
    ),
  ],
  ids=["batch", "short", "empty-batch", "seed", "image-size", "image-context", "context"],
)
def test_mistakes_are_refused_at_once(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_digest_covers_both_ends():
  values = np.zeros(25_000_000, np.uint8)  # 2,500 records

  def digest(position):
    changed = values.copy()
    changed[position] = 1
    streams = dataset_lib.Arrays([changed])
    return data.Dataset("x", "train", "text", None, streams, "1.0.0", "").identity["digest"]

  same = digest(12_000_000)  # in the middle, between the first and the last 1,000 records
  assert same == digest(14_999_999)
  assert len({same, digest(0), digest(9_999_999), digest(15_000_000), digest(24_999_999)}) == 5
