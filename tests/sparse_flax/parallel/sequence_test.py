"""Sequences sharded over devices: results and gradients are those of one device."""

import functools

import jax
import pytest

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax.parallel import sequence
from sparse_flax.parallel import sharding
from tests.helpers.arrays import assert_close

B, T, H = 2, 64, 4
PATTERNS = {
  "local": patterns.Local(8),
  "local_of_other_length": patterns.Local(11),
  "column": patterns.Column(8),
  "strided": patterns.Strided(8),
  "fixed": patterns.Fixed(8, 2, 2),
  "block": patterns.Block(8),
  "summary": patterns.Summary(8, 3, 1),
  "union": patterns.Block(8) | patterns.Summary(8, 2),
  "per_head": patterns.PerHead((patterns.Local(8), patterns.Column(8))),
  "all_heads_alike": patterns.PerHead((patterns.Local(8), patterns.Local(8))),
  "fixed_of_three": patterns.Fixed(8, 2, 3),  # 4 heads: the summaries do not come out even
}


@pytest.fixture(scope="module")
def arrays():
  return jax.random.normal(jax.random.key(0), (4, B, T, H, 8))


def run(attend, q, k, v, dout):
  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def shared(pattern, arrays, *, implementation="xla", **axes):
  axes = dict(data=1, fsdp=1, tensor=1, sequence=1) | axes
  how = dict(pattern=pattern, implementation=implementation)
  attend = functools.partial(sharding.over_devices, **how)
  with jax.set_mesh(sharding.make_mesh(**axes)):
    return jax.jit(functools.partial(run, attend))(*arrays)


def check(pattern, arrays, **how):
  truth = run(
    functools.partial(sparse_attention, pattern=pattern, implementation="reference"), *arrays
  )
  for what, a, b in zip(
    ("out", "dq", "dk", "dv"), shared(pattern, arrays, **how), truth, strict=True
  ):
    assert_close(a, b, tolerance=2e-6, what=what)


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke(
  "column-2",
  "strided-4",
  "union-4",
  "fixed_of_three-4",
  daily=1,
)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_whole_sequence(name, n, arrays):
  check(PATTERNS[name], arrays, sequence=n)


def test_with_heads_and_batch_shared_out_too(arrays):
  check(patterns.Fixed(8, 2, 2), arrays, data=2, tensor=2, sequence=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "column", "strided", "fixed"])
def test_kernels_for_tpus_serve_the_parts(name, arrays):
  check(PATTERNS[name], arrays, sequence=2, implementation="mosaic_tpu")


@pytest.mark.parametrize(
  ("pattern", "n", "message"),
  [
    (patterns.Dense(), 2, r"must be 1 for Dense\(causal=True\), which would gather"),
    (patterns.Local(8, causal=False), 2, "must be 1 for Local"),
    (patterns.Local(33), 2, "must leave every device a window of 33 tokens, not 32"),
    (patterns.Column(6), 2, "must divide stride=6 and the 10.6667 rows"),
    (patterns.Column(2), 4, "must divide stride=2 and the 32 rows"),
    (patterns.Fixed(16, 2), 8, "must divide the 4 rows of 16 tokens"),
    (patterns.Block(16) | patterns.Summary(8, 2), 2, r"must be 1 for Union\(patterns=\(Block"),
    (patterns.Local(8) | patterns.Column(4), 2, r"must be 1 for Union\(patterns=\(Local"),
  ],
  ids=str,
)
def test_what_cannot_be_shared_out_is_refused(pattern, n, message, arrays):
  assert sequence.problem(pattern, T, 1) is None
  with pytest.raises(ValueError, match=f"mesh axis sequence={n}: {message}"):
    shared(pattern, arrays, sequence=n)
