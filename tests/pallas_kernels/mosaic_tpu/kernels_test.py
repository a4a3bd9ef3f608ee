"""The kernels for TPUs in Pallas's interpreter, beside `reference`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import passes
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu import views
from tests.helpers.arrays import assert_close
from tests.helpers.arrays import Case
from tests.helpers.arrays import EVERY_PATTERN
from tests.helpers.arrays import jitted_vjp
from tests.pallas_kernels.attention_test import CASES as SUITE
from tests.pallas_kernels.attention_test import KERNEL_CASES

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
_RNG = np.random.default_rng(3)
_LAYOUT = _RNG.random((2, 9, 9)) < 0.4
_small = functools.partial(Case, B=2, T=150, H=2, Hkv=1, Dk=16, Dv=16)
_grouped = functools.partial(_small, H=4, Hkv=2)
_alike = functools.partial(_small, B=1, H=2, Hkv=2, dtype="bfloat16")
_whole = functools.partial(_alike, H=8, Hkv=8, Dk=128, Dv=128)
_SEVERAL_HEADS = ("per_head", "fixed", "dense")
CASES = [
  *(
    (_grouped if name in _SEVERAL_HEADS else _small)(pattern, name=name)
    for name, pattern in EVERY_PATTERN.items()
    if name != "layout"
  ),
  _small(patterns.Strided(16), dtype="bfloat16"),
  _small(EVERY_PATTERN["per_head"], name="one_and_two_passes", T=23, dtype="bfloat16"),
  _grouped(patterns.Fixed(16, 4, 2), T=1),
  _small(patterns.Summary(200, 8), name="no_summary"),
  _small(patterns.Dense(), segments=3),
  _small(patterns.Local(60), segments=3, kv_segments=3),
  _small(patterns.Dense(causal=False), T=61, S=530, segments=3, kv_segments=3),
  _small(patterns.Dense(causal=False), name="full", T=300, H=1, Hkv=1),
  _small(patterns.BlockLayout(_LAYOUT, 24), name="layout", T=230),
  _small(patterns.BlockLayout(_LAYOUT, 16) | patterns.Local(5), name="layout_or_local"),
  _small(patterns.Local(99), T=130, Dk=256, Dv=64, dtype="bfloat16"),
  # Several blocks of 512, and layouts whose blocks are smaller and larger than those.
  _small(patterns.Local(600), name="blocks", B=1, T=1_201, H=1, Hkv=1),
  _small(patterns.BlockLayout(_LAYOUT[0], 128), name="blocks", B=1, T=1_100, H=1, Hkv=1),
  _small(patterns.BlockLayout(_LAYOUT[0], 1_024), name="blocks", B=1, T=2_100, H=1, Hkv=1),
  # Heads share lanes; 8 heads or 8 columns lie in sublanes.
  _alike(patterns.Local(20), name="shared_lanes", H=4, Hkv=4, Dk=64, Dv=64),
  _alike(patterns.Fixed(16, 4, 2), name="shared_lanes", Dk=64, Dv=128),
  _whole(patterns.Local(70), name="heads"),
  _whole(patterns.Column(3), name="heads", T=100, dtype="float32"),
  _alike(patterns.Column(8), name="columns", H=1, Hkv=1, Dk=32, Dv=32, dtype="float32"),
  _alike(patterns.Column(8), name="columns", T=203, H=1, Hkv=1, Dk=128, Dv=128),
]
# Layouts there have blocks that these kernels refuse; those above have others.
SHARED = [
  case
  for case in (*SUITE, *KERNEL_CASES)
  if case.dtype != "float16" and not isinstance(case.pattern, patterns.BlockLayout)
]


def check(case, **how):
  q, k, v, ids, dout, dlse = case.arrays()
  ids = dict(segment_ids=ids, kv_segment_ids=case.kv_ids())
  run = functools.partial(sparse_attention, pattern=case.pattern, **ids, return_lse=True, **how)
  got = jitted_vjp(functools.partial(run, implementation="mosaic_tpu"), q, k, v, dout, dlse)
  truth = functools.partial(run, implementation="reference")
  wide = (x.astype(jnp.float32) for x in (q, k, v, dout))
  expected = jitted_vjp(truth, *wide, dlse)
  for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
    assert_close(a, b, tolerance=TOLERANCE[case.dtype], what=what)
  return got


@pytest.mark.smoke(
  "per_head-T150-float32-Hkv2-D16",
  "dense-T150-float32-Hkv1-D16-segments",
  "dense-T61-float32-Hkv1-D16-S530-segments-kv_segments",
  "shared_lanes-T150-bfloat16-D64-Dv128",
  "columns-T203-bfloat16-D128",
  daily=1,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_lse_and_gradients_match_the_reference(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_the_shared_suite(case):
  check(case)


@pytest.mark.slow
def test_narrow_heads_share_lanes_in_columns():
  check(_alike(patterns.Column(8), H=4, Hkv=4, Dk=32, Dv=64))


@pytest.mark.slow
def test_gradients_of_a_sequence_that_does_not_fit_have_a_kernel_each(monkeypatch):
  monkeypatch.setattr(views, "_DQ", 0)
  check(_grouped(patterns.Local(50)))
  check(_whole(patterns.Local(50)))


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("size", [16, 1_024])
def test_a_traced_block_mask_matches_the_reference(size):
  case, n = _grouped(patterns.Local(90)), -(-150 // size)
  mask = jnp.asarray(_RNG.random((2, 4, n, n)) < 0.6)
  check(case, block_mask=mask, block_size=size)


def test_scores_with_a_cap_and_a_function_match_the_reference():
  away = lambda logit, i, j, h: logit - 0.1 * ((i - j) * (h + 1)).astype(logit.dtype)
  check(_small(patterns.Local(70)), score_fn=away, logits_soft_cap=3.0, scale=-0.7)


def test_keys_that_nobody_sees_get_zeros():
  layout = np.zeros((3, 3), bool)
  layout[2, 1] = True
  out, lse, dq, dk, dv = check(_small(patterns.BlockLayout(layout, 48)))
  assert np.all(np.asarray(out[:, :96]) == 0) and np.all(np.isneginf(lse[:, :96]))
  assert all(np.all(np.asarray(x)[:, [*range(48), *range(96, 150)]] == 0) for x in (dk, dv))
  assert np.all(np.asarray(dq[:, :96]) == 0)


@pytest.mark.smoke(daily=6)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", [*EVERY_PATTERN])
def test_steps_visit_what_holds_pairs_and_mask_what_is_not_full(name, transposed):
  """Each block in no more than one step; every line begins and ends once, in one place."""
  pattern, T, block = EVERY_PATTERN[name].of_head(0), 29, 4
  one = passes.natural_pass(pattern)
  found = steps.steps_of(one, T, T, block, False, transposed)
  blocks = lambda x: np.pad(x, [(0, 3)] * 2).reshape(8, block, 8, block).swapaxes(1, 2)
  pairs = blocks(pattern.mask(T)).sum(axis=(2, 3))
  queries = blocks(np.ones((T, T), bool)).any(axis=3).sum(axis=2)  # what fills a block may attend
  flags, rows, columns = found.flags[0, 0], found.rows, found.columns
  visited = flags & (steps.FULL | steps.PARTIAL) != 0
  table = np.zeros((8, 8), int)
  np.add.at(table, (rows[visited], columns[visited]), 1)
  assert table.max() == 1
  np.testing.assert_array_equal(table > 0, pairs > 0)
  full = flags & steps.FULL != 0
  assert np.all(pairs[rows[full], columns[full]] == queries[rows[full], columns[full]] * block)
  lines = columns if transposed else rows
  assert sorted(lines[flags & steps.FIRST != 0]) == sorted(lines[flags & steps.LAST != 0])
  np.testing.assert_array_equal(lines[flags & steps.FIRST != 0], range(8))
  assert np.all(np.diff(lines) >= 0)


@pytest.mark.parametrize(
  ("how", "says"),
  [
    (dict(dtype="float16"), "float16 is not supported, bfloat16 and float32 are"),
    (dict(pattern=patterns.BlockLayout(_LAYOUT, 100)), "blocks of 100 are not supported"),
    (dict(pattern=patterns.Where(lambda i, j: jnp.arange(9)[j % 9] > 3)), "are no formula"),
    (dict(T=400_000), "of scalar memory"),
  ],
)
def test_what_is_not_supported_is_said(how, says):
  q = jax.ShapeDtypeStruct((1, how.get("T", 150), 2, 16), how.get("dtype", "float32"))
  pattern = how.get("pattern", patterns.Dense())
  run = functools.partial(sparse_attention, pattern=pattern, implementation="mosaic_tpu")
  with pytest.raises(NotImplementedError, match=says):
    jax.eval_shape(run, q, q, q)
