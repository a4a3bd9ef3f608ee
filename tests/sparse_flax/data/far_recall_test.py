"""Questions about records that stood far before."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax import data
from sparse_flax.data import far_recall

CASES = [(512, dict(records=8)), (512, dict(records=8, delay=8)), (4_096, dict(key=3))]


def sequence(seq_len, split="train", index=5, **sizes):
  sizes = far_recall.Sizes(**sizes)
  return far_recall.Recall(seq_len, split, sizes).read(index, 0, seq_len), sizes


@pytest.mark.parametrize(("seq_len", "fields"), CASES)
def test_every_record_is_asked_for_once_and_answered_by_it(seq_len, fields):
  x, sizes = sequence(seq_len, **fields)
  key, delay, half = sizes.key, sizes.delay, x[: seq_len // 2]
  values = {
    tuple(half[i + 1 : i + 1 + key]): half[i + 1 + key] for i in np.flatnonzero(half == 254)
  }
  places = np.flatnonzero(far_recall.answers(jnp.asarray(x[None]), sizes)[0])
  asked = [tuple(x[i - delay - key : i - delay]) for i in places]
  assert len(values) == sizes.count(seq_len) and sorted(asked) == sorted(values)
  assert [values[key] for key in asked] == x[places].tolist()
  assert places.min() >= 3 * seq_len // 4
  assert (x[places - delay - key - 1] == 255).all() and (x == 255).sum() == len(places)
  assert all((x[i - delay : i] == 253).all() for i in places)


def test_sequences_are_functions_of_the_split_and_the_number():
  first, again = (sequence(512, records=4)[0] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  for other in (sequence(512, index=6, records=4), sequence(512, "test", records=4)):
    assert (other[0] != first).any()
  # A run that goes on later has to see the same ones.
  assert (
    far_recall.Recall(16, "train", far_recall.Sizes(records=1)).read(0, 0, 16).tolist() == GOLDEN
  )


GOLDEN = [254, 84, 208, 26, 56, 46, 49, 1, 43, 38, 0, 4, 55, 255, 84, 208]


def test_what_does_not_fit_is_refused():
  check = lambda seq_len, path="", **recall: data.check(
    far_recall.NAME, path=path, seq_len=seq_len, recall=recall
  )
  assert check(512, records=8) == []
  for problems, right in (
    (check(64, records=8), "data.recall.records=8: 8 records with questions need 96 tokens"),
    (check(2**17, records=129), "data.recall.key=1: must be more for 129 records"),
    (check(512, path="here", records=8), "must be empty"),
  ):
    assert len(problems) == 1 and right in problems[0]
  with pytest.raises(ValueError, match=r"must fit model\.seq_len=64"):
    data.open_dataset(
      far_recall.NAME, path="", split="test", seq_len=64, split_seed=0, recall=dict(records=8)
    )
