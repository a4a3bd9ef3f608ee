"""Queries from the middle of a sequence on give the rows that they give in the whole sequence."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from tests.helpers.arrays import assert_close
from tests.helpers.arrays import Case
from tests.helpers.arrays import EVERY_PATTERN

FIRST, T = 9, 7
SLOPES = jnp.asarray([0.1, 0.2, 0.4, 0.8])


def score_fn(logit, i, j, h):
  return logit - SLOPES[h] * (i - j).astype(jnp.float32)


def program(attend, traced):
  """(query_offset, q, k, v, dout, dlse) -> (out, lse, dq, dk, dv); the offset known, or traced."""

  def run(offset, q, k, v, dout, dlse):
    (out, lse), vjp = jax.vjp(functools.partial(attend, query_offset=offset), q, k, v)
    return out, lse, *vjp((dout, dlse))

  return jax.jit(run, static_argnums=() if traced else 0)


def whole_and_part(attend, case, run):
  """The last T rows of attention over the whole sequence; and what T queries give."""
  q, k, v, _, dout, dlse = case.arrays()
  dout, dlse = dout.at[:, :FIRST].set(0), dlse.at[:, :FIRST].set(0)
  whole = program(attend, traced=False)(0, q, k, v, dout, dlse)
  part = run(FIRST, q[:, FIRST:], k, v, dout[:, FIRST:], dlse[:, FIRST:])
  rows = [x[:, FIRST:] for x in whole[:3]]
  return [*rows, *whole[3:]], part


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke("xla-traced-fixed", "reference-known-strided", daily=1)
@pytest.mark.parametrize("name", EVERY_PATTERN)
@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_and_gradients_are_those_of_the_whole_sequence(implementation, traced, name):
  case = Case(EVERY_PATTERN[name], T=FIRST + T, Hkv=2)
  how = dict(pattern=case.pattern, implementation=implementation, return_lse=True)
  attend = functools.partial(sparse_attention, **how, score_fn=score_fn)
  expected, got = whole_and_part(attend, case, program(attend, traced))
  for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
    assert_close(a, b, tolerance=1e-5, what=what)


def test_traced_offsets_share_a_program():
  q = jnp.ones((1, 4, 1, 8))
  run = jax.jit(lambda c: sparse_attention(q, q, q, pattern=patterns.Local(3), query_offset=c))
  for offset in range(3):
    run(jnp.int32(offset))
  assert run._cache_size() == 1


def test_a_block_mask_is_of_the_queries_that_there_are():
  case = Case(patterns.Dense(), T=16)
  q, k, v, *_ = case.arrays()
  mask = jnp.asarray(np.random.default_rng(0).random((1, 1, 4, 4)) < 0.6)
  attend = functools.partial(sparse_attention, block_size=4, implementation="xla")
  whole = attend(q, k, v, block_mask=mask)
  part = attend(q[:, 8:], k, v, block_mask=mask[:, :, 2:], query_offset=np.int64(8))
  assert_close(part, whole[:, 8:], tolerance=1e-5, what="out")


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize(
  "implementation, dtype", [("mosaic_tpu", "float32"), ("mosaic_gpu", "bfloat16")]
)
def test_kernels_take_a_known_offset_and_refuse_a_traced_one(implementation, dtype):
  case = Case(patterns.Strided(48), B=1, T=256, H=1, Hkv=1, Dk=32, Dv=32, dtype=dtype)
  q, k, v, *_ = case.arrays()
  attend = functools.partial(sparse_attention, pattern=case.pattern, implementation=implementation)
  whole = sparse_attention(q, k, v, pattern=case.pattern, implementation="reference")
  part = attend(q[:, 128:], k, v, query_offset=128)
  assert_close(part, whole[:, 128:], tolerance=0.02, what="out")
  with pytest.raises(NotImplementedError, match=f"{implementation}.*query_offset is traced"):
    jax.jit(lambda c: attend(q[:, 128:], k, v, query_offset=c))(jnp.int32(128))


@pytest.mark.parametrize(
  "offset, message",
  [
    (-1, "query_offset=-1: must be >= 0"),
    (2**31 - 4, "query_offset=2147483644: must be >= 0, and 4 positions from there on"),
    (1.0, "query_offset=1.0: must be one whole number"),
    (True, "query_offset=True: must be one whole number"),
    (np.arange(2), "query_offset=array([0, 1]): must be one whole number"),
  ],
  ids=str,
)
def test_what_is_no_offset_is_refused(offset, message, as_a_user):
  q = jnp.ones((1, 4, 1, 8))
  with pytest.raises(ValueError, match=re.escape(message)):
    sparse_attention(q, q, q, query_offset=offset)


def test_messages_name_the_function_of_the_user(as_a_user):
  q = jnp.ones((1, 4, 1, 8))
  with pytest.raises(ValueError, match=r"score_fn=test_messages.*<lambda>"):
    sparse_attention(q, q, q, query_offset=3, score_fn=lambda logit, i, j, h: i)
