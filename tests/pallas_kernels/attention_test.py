"""Every implementation on every pattern against `reference`, and `reference` against numpy."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import IMPLEMENTATIONS
from pallas_kernels import patterns
from pallas_kernels import reference
from pallas_kernels import sparse_attention
from pallas_kernels import tuning
from pallas_kernels import xla
from pallas_kernels.lowering.plan import of_call
from pallas_kernels.mosaic_gpu.resident import short
from pallas_kernels.scores import Scores
from pallas_kernels.xla import sizes as xla_sizes
from tests.helpers.arrays import assert_close
from tests.helpers.arrays import assert_near
from tests.helpers.arrays import Case
from tests.helpers.arrays import EVERY_PATTERN
from tests.helpers.arrays import jitted_vjp
from tests.helpers.arrays import vjp_program

# What the GPU's kernels take; on a CPU they run in a simulator, which is slow.
SIZES = {"mosaic_gpu": dict(B=1, H=2, Hkv=2, Dk=32, Dv=32, dtype="bfloat16")}
# Relative to the largest value: float32 sums in another order; bfloat16 and float16 round the
# inputs of every product (8 and 11 bits).
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}

CASES = [
  *(Case(pattern, name=name) for name, pattern in EVERY_PATTERN.items()),
  # Shorter than most strides.
  *(Case(pattern, name=name, T=3) for name, pattern in EVERY_PATTERN.items()),
  *(
    Case(EVERY_PATTERN[name], name=name, T=T)
    for T in (1, 36)  # 36 is divisible by most strides
    for name in ("local", "column", "strided", "summary", "fixed", "layout")
  ),
  *(
    Case(EVERY_PATTERN[name], name=name, Hkv=2, Dv=6, segments=3)
    for name in ("dense", "strided", "fixed", "summary", "per_head", "layout", "where")
  ),
  *(Case(pattern, name=name, dtype="bfloat16") for name, pattern in EVERY_PATTERN.items()),
  *(Case(EVERY_PATTERN[name], name=name, dtype="float16") for name in ("local", "fixed")),
  # More than one block of a window, whole columns, layouts coarser than a tile or than T.
  Case(patterns.Local(300), name="local", T=701, B=1, H=2, Hkv=1),
  Case(patterns.Column(7), name="column", T=701, B=1, H=2, Hkv=1),
  Case(patterns.Local(100) | patterns.Column(9), name="strided", T=333, Hkv=2, segments=3),
  Case(patterns.Local(100), name="local", T=333, dtype="bfloat16"),
  Case(patterns.Local(600), name="wide", T=1201, B=1, H=1, Hkv=1),
  Case(patterns.BlockLayout(np.eye(3, dtype=bool), 700), name="layout", T=1201, B=1, H=1, Hkv=1),
  Case(patterns.BlockLayout(np.eye(2, dtype=bool), 90), name="layout", T=40, B=1),
  # Keys with ids of their own.
  *(
    Case(EVERY_PATTERN[name], name=name, Hkv=2, segments=3, kv_segments=3)
    for name in ("dense", "strided", "fixed", "per_head", "where")
  ),
  Case(patterns.Local(100), name="local", T=333, Hkv=2, segments=4, kv_segments=3),
  Case(patterns.Dense(causal=False), T=23, S=57, Hkv=2, Dv=6, segments=3, kv_segments=3),
  Case(patterns.Local(40, causal=False), T=701, S=333, B=1, segments=3, kv_segments=4),
]

# Small enough for the simulator.
_kernel = functools.partial(Case, B=1, H=2, Hkv=1, dtype="bfloat16")
_narrow = functools.partial(_kernel, Dk=32, Dv=32)
_single = functools.partial(_narrow, H=1)
KERNEL_CASES = [
  _narrow(patterns.Local(64), T=130, segments=3),
  _kernel(patterns.Local(64), T=150, Dk=64, Dv=64, H=1),  # its two edges fold into one tile
  _narrow(patterns.Local(100), T=1),
  _single(patterns.Local(128), T=500, name="walks"),  # of several tiles, with keys before them
  _single(patterns.Local(200), T=330, segments=3, name="five_tiles"),
  _kernel(patterns.Local(100), T=200, Dk=128, Dv=64, H=1),
  _single(patterns.Local(1), T=70),
  _single(patterns.Local(300), T=400, name="wide"),
  _kernel(patterns.Column(2), T=48, Dk=64, Dv=128),  # 24, 63, 64, 65, 96 rows of a column
  _narrow(patterns.Column(2), T=126, dtype="float16"),
  _single(patterns.Column(2), T=128),
  _single(patterns.Column(2), T=130),
  _kernel(patterns.Column(2), T=192, Dk=96, Dv=96, H=1),
  _kernel(patterns.Column(2), T=400, Dk=256, Dv=256, H=1, name="long_column"),
  _narrow(patterns.Column(5), T=3),
  _narrow(patterns.Block(64), T=128, segments=3),
  _kernel(patterns.Block(65), T=130, Dk=128, Dv=64),
  _narrow(patterns.Block(24), T=50),
  _kernel(patterns.Column(3), T=290, Dk=32, Dv=64, H=8, Hkv=2),
  _narrow(patterns.Block(20), T=180, segments=3, dtype="float16"),
  _narrow(patterns.Summary(16, 4, 4), T=70),
  _narrow(patterns.Strided(4), T=71),
  _narrow(patterns.Strided(4), T=1),
  _kernel(patterns.Strided(2), T=132, Dk=256, Dv=256, H=1),  # the column first, by streaming
  _narrow(patterns.Local(70) | patterns.Column(3), T=100, H=1, name="union"),
  _narrow(patterns.Fixed(24, 4, 2), T=70, H=4, Hkv=2),
  _narrow(patterns.Fixed(24, 4, 2), T=48, H=3),
  _narrow(patterns.Fixed(64, 8), T=50),
  _kernel(patterns.Fixed(96, 16), T=192, Dk=64, Dv=64, H=1, name="fixed_of_96"),
  _narrow(patterns.Dense(), T=65, segments=2),
  _narrow(patterns.Dense(), T=1, dtype="float16"),
  _kernel(patterns.Dense(), T=200, Dk=64, Dv=64, H=1),  # by streaming, and by lists
  _kernel(patterns.Dense(), T=200, Dk=128, Dv=128, H=1),
  _narrow(
    patterns.PerHead((patterns.Local(20), patterns.Column(7), patterns.Fixed(32, 4, 2))),
    T=50, H=3, Hkv=3,
  ),
  _narrow(patterns.Local(64), T=130, segments=3, kv_segments=3),
  _single(patterns.Local(200), T=330, segments=4, kv_segments=3, name="five_tiles"),
  _narrow(patterns.Block(64), T=128, segments=3, kv_segments=2),
  _narrow(patterns.Block(20), T=180, segments=9, kv_segments=9, dtype="float16"),
  _single(patterns.Block(300), T=300, Dk=64, Dv=64, segments=2, kv_segments=2, name="owns_some"),
  _kernel(patterns.Block(512), T=520, Dk=128, Dv=128, H=1, segments=3, kv_segments=3, name="long"),
  _narrow(patterns.Strided(9), T=65, segments=2, kv_segments=2),
  _narrow(patterns.Dense(causal=False), T=77, S=301, segments=3, kv_segments=3),
]  # fmt: skip
# The models of the paper, and a head of today: stride, summary width and what `Case` needs.
_PAPER = {
  "enwik8": (128, 32, dict(T=12_288, H=2, Hkv=2, Dk=64, Dv=64)),
  "imagenet64": (128, 8, dict(T=12_288, H=2, Hkv=2, Dk=32, Dv=32)),
  "cifar10": (128, 8, dict(T=3_072, H=2, Hkv=2, Dk=128, Dv=128)),
  "cifar10_narrow": (128, 8, dict(T=3_072, H=2, Hkv=2, Dk=64, Dv=128)),
  "audio64k": (256, 32, dict(T=8_192, H=2, Hkv=2, Dk=64, Dv=64)),
  "modern32k": (128, 32, dict(T=4_096, H=4, Hkv=2, Dk=128, Dv=128)),
  "wide": (64, 16, dict(T=2_048, H=2, Hkv=1, Dk=256, Dv=256)),
  "odd": (96, 24, dict(T=3_001, H=3, Hkv=1, Dk=96, Dv=96, dtype="float16")),
  "uneven": (100, 12, dict(T=1_999, H=2, Hkv=2, Dk=128, Dv=64)),
}


def _of_the_paper(stride, width):
  yield patterns.Dense()
  yield patterns.Local(stride)
  yield patterns.Local(5 * stride + 1)
  yield patterns.Column(stride)
  yield patterns.Block(stride)
  yield patterns.Summary(stride, width)
  yield patterns.Strided(stride)
  yield patterns.Fixed(stride, width)
  yield patterns.Fixed(stride, width, 2)
  yield patterns.PerHead((patterns.Local(stride), patterns.Column(stride)))


# Pattern by pattern, so that tests side by side are not all of the shape that takes most memory.
GPU_CASES = [
  _kernel(pattern, name=f"{shape}-{type(pattern).__name__.lower()}", **how)
  for alike in zip(
    *(
      [(shape, pattern, how) for pattern in _of_the_paper(stride, width)]
      for shape, (stride, width, how) in _PAPER.items()
    ),
    strict=True,
  )
  for shape, pattern, how in alike
]
# Places past the last row of a sequence, in memory the next sequence's; keys that stream.
GPU_CASES += [
  _kernel(pattern, T=T, B=3, Dk=64, Dv=64, name=f"rows-{type(pattern).__name__.lower()}")
  for pattern, T in (
    (patterns.Summary(64, 16, offset=48), 384),
    (patterns.Fixed(64, 16, 2), 384),
    (patterns.Summary(128, 8), 3_072),
    (patterns.Column(4), 4_096),
    (patterns.Block(1_024), 4_000),
    (patterns.Strided(96), 3_072),
  )
]
# As many sequences as multiprocessors, almost: long walks.
GPU_CASES += [
  _kernel(patterns.Local(window), T=2_001, B=4, H=H, Hkv=H, Dk=D, Dv=D, name="walks-local")
  for window, H, D in ((128, 16, 32), (128, 8, 64), (256, 8, 64), (100, 4, 128))
]
GPU_CASES += [
  _kernel(pattern, T=T, segments=5, Dk=64, Dv=64)
  for pattern in (patterns.Dense(), patterns.Local(128), patterns.Local(600), patterns.Block(128))
  for T in (1_024, 1_111)
]
GPU_CASES += [
  _kernel(pattern, T=T, segments=5, kv_segments=4, Dk=64, Dv=64)
  for pattern in (patterns.Dense(), patterns.Local(128), patterns.Local(600), patterns.Block(128))
  for T in (1_024, 1_111)
]
GPU_CASES += [
  _kernel(patterns.Block(512), T=1_537, segments=5, kv_segments=4, Dk=128, Dv=128, name="long"),
  *(
    _kernel(patterns.Dense(causal=False), T=T, S=S, B=2, segments=5, kv_segments=4, Dk=D, Dv=D)
    for T, S, D in ((1_111, 2_001, 64), (2_001, 333, 128), (500, 777, 256))
  ),
]


def attend(case, implementation, ids):
  ids = dict(segment_ids=ids, kv_segment_ids=case.kv_ids())
  how = dict(pattern=case.pattern, **ids, return_lse=True)
  return functools.partial(sparse_attention, implementation=implementation, **how)


@pytest.mark.smoke(
  "dense-T23-float32",
  "fixed-T23-float32-Hkv2-Dv6-segments",
  "where-T23-float32",
  "per_head-T3-float32",
  "column-T701-float32-Hkv1",
  "local-T23-bfloat16",
  "dense-T23-float32-Hkv2-Dv6-S57-segments-kv_segments",
  daily=4,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_lse_and_gradients_match_the_reference(case):
  q, k, v, ids, dout, dlse = case.arrays()
  got = jitted_vjp(attend(case, "xla", ids), q, k, v, dout, dlse)
  # The truth is computed from the same rounded inputs, in float32.
  q32, k32, v32, dout32 = (x.astype(jnp.float32) for x in (q, k, v, dout))
  truth = jitted_vjp(attend(case, "reference", ids), q32, k32, v32, dout32, dlse)
  dtypes = [q.dtype, jnp.float32, q.dtype, k.dtype, v.dtype]
  for what, a, b, dtype in zip(("out", "lse", "dq", "dk", "dv"), got, truth, dtypes, strict=True):
    assert a.dtype == dtype, f"{what} is {a.dtype}"
    assert_close(a, b, tolerance=TOLERANCE[case.dtype], what=what)


def check_kernels(case, runs: int = 1):
  q, k, v, ids, dout, dlse = case.arrays()
  program = vjp_program(attend(case, "mosaic_gpu", ids))
  got = program(q, k, v, dout, dlse)
  for _ in range(runs - 1):
    for first, again in zip(got, program(q, k, v, dout, dlse), strict=True):
      np.testing.assert_array_equal(first, again)
  wide = (x.astype(jnp.float32) for x in (q, k, v, dout))
  truth = jitted_vjp(attend(case, "reference", ids), *wide, dlse)
  assert_close(got[1], truth[1], tolerance=1e-4, what="lse")
  for what, n, bound in (("out", 0, 5e-3), ("dq", 2, 1e-2), ("dk", 3, 1e-2), ("dv", 4, 1e-2)):
    assert got[n].dtype == q.dtype
    assert_near(got[n], truth[n], cotangent=dout, tolerance=bound, what=what)


@pytest.mark.smoke(
  "local-T130-bfloat16-Hkv1-D32-segments",
  "column-T48-bfloat16-Hkv1-D64-Dv128",
  "long_column-T400-bfloat16-D256",
  "summary-T70-bfloat16-Hkv1-D32",
  "strided-T71-bfloat16-Hkv1-D32",
  "fixed-T70-bfloat16-Hkv2-D32",
  "dense-T77-bfloat16-Hkv1-D32-S301-segments-kv_segments",
)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_match_the_reference(case):
  check_kernels(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_kernels_match_the_reference_on_a_gpu_and_repeat_bit_by_bit(case):
  check_kernels(case, runs=3)


# As the tuning table may have it. Forward, steps that bring one tile of keys per warpgroup walk; of
# those that bring all, none does. Backward, one or two warpgroups sum dk and dv.
WALK, ALL = 64, 512
WINDOWS = [
  ("fwd", WALK, 2, 2, _single(patterns.Local(100), T=450)),
  ("fwd", WALK, 1, 3, _single(patterns.Local(64), T=450, segments=2)),
  ("fwd", WALK, 3, 1, _single(patterns.Local(256), T=600)),
  ("fwd", ALL, 2, 2, _single(patterns.Local(130), T=450)),
  ("fwd", ALL, 1, 3, _kernel(patterns.Local(100), T=450, Dk=32, Dv=64, segments=2)),
  ("bwd", WALK, 1, 2, _single(patterns.Local(64), T=450)),
  ("bwd", WALK, 1, 2, _kernel(patterns.Local(100), T=150, Dk=32, Dv=64, segments=2)),
]
LONG_WALKS = [
  (*sizes, _kernel(patterns.Local(window), T=2_001, B=4, H=H, Hkv=H, Dk=D, Dv=D))
  for sizes in (("fwd", WALK, 2, 1), ("fwd", WALK, 2, 2), ("fwd", WALK, 3, 3), ("fwd", ALL, 1, 1),
                ("fwd", ALL, 2, 2), ("fwd", ALL, 2, 3), ("bwd", WALK, 1, 1), ("bwd", WALK, 1, 2))
  for window, H, D in ((128, 16, 32), (96, 8, 64))
]  # fmt: skip


def check_windows(direction, block_k, stages, warpgroups, case, runs: int = 1):
  sizes = tuning.BlockSizes(64, block_k, stages, warpgroups)
  with tuning.override("local", direction, sizes):
    check_kernels(case, runs)


@pytest.mark.smoke("bwd-64-1-2-local-T150-bfloat16-Hkv1-D32-Dv64-segments", daily=1)
@pytest.mark.parametrize("direction,block_k,stages,warpgroups,case", WINDOWS, ids=str)
def test_windows(direction, block_k, stages, warpgroups, case):
  check_windows(direction, block_k, stages, warpgroups, case)


SHORT = [
  _single(patterns.Column(5), T=400),  # 80, 21, 56, 128 rows
  _kernel(patterns.Column(3), T=63, B=2, Dk=128, Dv=128),
  _narrow(patterns.Strided(4), T=224, H=1),
  _single(patterns.Block(128), T=200, Dk=64, Dv=64),
]


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke(daily=2)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short_sequences(case):
  check_kernels(case)


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke("128-True", "256-False", daily=0)
@pytest.mark.parametrize("T,by_short", [(48, True), (128, True), (192, False), (256, False)])
def test_short_sequences_of_wide_heads(T, by_short):
  case = _kernel(patterns.Column(2), T=T, H=1, Dk=128, Dv=128)  # 24, 64, 96 and 128 rows
  with mock.patch.object(short, "backward", wraps=short.backward) as backward:
    check_kernels(case)
  assert backward.called == by_short


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize(
  "pattern,T", [(patterns.Column(2), 512), (patterns.Strided(2), 400)], ids=str
)
def test_four_tiles_with_their_derivatives_in_memory(pattern, T):
  with tuning.override("column", "bwd", tuning.BlockSizes(256, 256, 1, 2)):
    check_kernels(_kernel(pattern, T=T, H=1, Dk=64, Dv=64))


@pytest.mark.one_day_in_three(1)
def test_four_warpgroups_of_a_window():
  sizes = tuning.BlockSizes(256, 256, 2, 4, at_once=1)
  with tuning.override("local", "fwd", sizes):
    check_kernels(_single(patterns.Local(100), T=200))


@pytest.mark.gpu
@pytest.mark.parametrize("direction,block_k,stages,warpgroups,case", LONG_WALKS, ids=str)
def test_windows_on_a_gpu(direction, block_k, stages, warpgroups, case):
  check_windows(direction, block_k, stages, warpgroups, case, runs=3)


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke("Strided(stride=8)", daily=0)
@pytest.mark.parametrize(
  "pattern", [patterns.Strided(8), patterns.Fixed(16, 4), patterns.Local(64)], ids=repr
)
def test_huge_values_give_numbers(pattern):
  case = _narrow(pattern, T=40, H=1)
  q, k, v, _, dout, dlse = case.arrays()
  q, k, v = (jnp.where(x > 0, 3e4, -3e4).astype(x.dtype) for x in (q, k, v))
  out, lse, *grads = jitted_vjp(attend(case, "mosaic_gpu", None), q, k, v, dout, dlse)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, lse, *grads))
  # Weights that tie may be lost to rounding where passes meet; what is left is a mean of values.
  assert np.abs(np.asarray(out, np.float32)).max() <= 3.01e4


@pytest.mark.one_day_in_six(2)
@pytest.mark.smoke("Local(window=16, causal=True)", daily=0)
@pytest.mark.parametrize("pattern", [patterns.Local(16), patterns.Fixed(16, 4)], ids=repr)
def test_kernels_under_transformations(pattern):
  case = _narrow(pattern, T=32, B=2, H=1)
  q, k, v, _, dout, _ = case.arrays()
  run = functools.partial(sparse_attention, pattern=pattern, implementation="mosaic_gpu")

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(run, q, k, v, dout):
    out, vjp = jax.vjp(run, q, k, v)
    return out, *vjp(dout)

  expected = gradients(run, q, k, v, dout)
  split = [x.reshape(2, 1, 1, *x.shape[1:]) for x in (q, k, v, dout)]
  for got, want in zip(gradients(jax.vmap(jax.vmap(run)), *split), expected, strict=True):
    np.testing.assert_array_equal(got.reshape(want.shape), want)

  def layers(q, k, v):
    step = lambda x, _: (run(x, k, v), None)
    if jax.default_backend() == "gpu":  # the simulator has effects, which checkpoint does not take
      step = jax.checkpoint(step)
    return jax.lax.scan(step, q, length=1)[0]

  for got, want in zip(gradients(layers, q, k, v, dout), expected, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(
  "T,D,Hkv",
  [(1, 64, 2), (777, 64, 2), (2_048, 32, 4), (2_001, 96, 1), (1_500, 128, 4), (640, 256, 2)],
)
def test_dense_by_cudnn_matches_the_reference(T, D, Hkv):
  case = Case(patterns.Dense(), T=T, B=2, H=4, Hkv=Hkv, Dk=D, Dv=D, dtype="bfloat16")
  q, k, v, _, dout, _ = case.arrays()

  @functools.partial(jax.jit, static_argnums=0)
  def run(implementation, q, k, v, dout):
    how = dict(implementation=implementation, deterministic=False)
    out, vjp = jax.vjp(functools.partial(sparse_attention, **how), q, k, v)
    return out, *vjp(dout)

  assert "cudnn" in run.lower("mosaic_gpu", q, k, v, dout).as_text()
  got = run("mosaic_gpu", q, k, v, dout)
  truth = run("reference", *(x.astype(jnp.float32) for x in (q, k, v, dout)))
  for n, what in enumerate(("out", "dq", "dk", "dv")):
    bound = 1e-2 if n else 5e-3
    assert_near(got[n], truth[n], cotangent=dout, tolerance=bound, what=what)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_dense_repeats_bit_by_bit_unless_told_otherwise(D):
  q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 2, 2048, 4, D), jnp.bfloat16)
  dense = functools.partial(sparse_attention, implementation="mosaic_gpu")

  @jax.jit
  def run(q, k, v, dout):
    out, vjp = jax.vjp(dense, q, k, v)
    return out, *vjp(dout)

  assert "cudnn" not in run.lower(q, k, v, dout).as_text()
  first = run(q, k, v, dout)
  for _ in range(5):
    for a, b in zip(first, run(q, k, v, dout), strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("strided", "layout")
@pytest.mark.parametrize("name", EVERY_PATTERN)
def test_long_inputs_are_swept_in_tiles(name, monkeypatch):
  """The same numbers when whole problems, tiles and chunks are small, so that all loops turn."""
  monkeypatch.setattr(xla_sizes, "WHOLE", 16)
  monkeypatch.setattr(xla_sizes, "TILE", 4)
  monkeypatch.setattr(xla_sizes, "LOGITS", 64)
  case = Case(EVERY_PATTERN[name], T=37, Hkv=2, Dv=6, segments=3)
  q, k, v, ids, dout, dlse = case.arrays()
  how = dict(pattern=case.pattern, scores=Scores(case.Dk**-0.5), segment_ids=ids)

  @jax.jit  # not by `sparse_attention`, whose programs for the usual sizes would be found again
  def run(q, k, v, dout, dlse):
    plan, arrays = of_call(q, k, v, **how)
    plan = xla.planned(plan)
    out, lse = xla.forward(plan, arrays)
    return out, lse, *xla.backward(plan, arrays, out, lse, dout, dlse)[:3]

  got = run(q, k, v, dout, dlse)
  truth = jitted_vjp(attend(case, "reference", ids), q, k, v, dout, dlse)
  for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, truth, strict=True):
    assert_close(a, b, tolerance=TOLERANCE["float32"], what=what)


@pytest.mark.parametrize("largest_constant", [0, 1 << 20])  # masks computed, and held
@pytest.mark.parametrize("name", EVERY_PATTERN)
def test_reference_matches_plain_numpy(name, largest_constant, monkeypatch):
  monkeypatch.setattr(reference, "LARGEST_CONSTANT", largest_constant)
  check_reference(Case(EVERY_PATTERN[name], T=17, Hkv=2, Dv=6, segments=2))


@pytest.mark.parametrize("S", [17, 29])
@pytest.mark.parametrize("name", ["strided", "union_of_any"])
def test_reference_with_ids_of_keys_matches_plain_numpy(name, S):
  check_reference(Case(EVERY_PATTERN[name], T=17, S=S, Hkv=2, Dv=6, segments=3, kv_segments=3))


def check_reference(case):
  q, k, v, ids, *_ = case.arrays()
  out, lse = attend(case, "reference", ids)(q, k, v)
  expected_out, expected_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
  T, S = case.T, case.num_keys
  mask = np.broadcast_to(case.pattern.mask(T, S), (case.pattern.period, T, S))
  kv_ids = case.kv_ids() if case.kv_segments else ids
  q, k, v, ids, kv_ids = (np.asarray(x, np.float64) for x in (q, k, v, ids, kv_ids))
  for b, t, h in np.ndindex(2, T, 4):
    keys = np.flatnonzero(mask[h % len(mask), t] & (kv_ids[b] == ids[b, t]))
    if keys.size:
      logits = k[b, keys, h // 2] @ q[b, t, h] / np.sqrt(8)
      weights = np.exp(logits - logits.max())
      expected_out[b, t, h] = weights @ v[b, keys, h // 2] / weights.sum()
      expected_lse[b, t, h] = logits.max() + np.log(weights.sum())
  assert_close(out, expected_out, tolerance=1e-5, what="out")
  assert_close(lse, expected_lse, tolerance=1e-5, what="lse")


@pytest.mark.smoke("fixed-xla", "strided-reference", daily=3)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", EVERY_PATTERN)
def test_the_support_of_the_gradient_is_the_mask(name, implementation):
  pattern = EVERY_PATTERN[name]
  q, k, v, *_ = Case(pattern, T=24, B=1, Hkv=1).arrays()
  how = dict(pattern=pattern, implementation=implementation)
  first_feature = lambda v: sparse_attention(q, k, v, **how)[0, :, :, 0]
  influence = jax.jit(jax.jacrev(first_feature))(v)[:, :, 0, :, 0, 0]  # [T, H, S]
  mask = np.broadcast_to(pattern.mask(24), (pattern.period, 24, 24))
  for h in range(4):
    np.testing.assert_array_equal(influence[:, h] != 0, mask[h % len(mask)])


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_keys_give_zeros_and_send_no_gradient(implementation):
  case = Case(patterns.Summary(8, 2), T=12, **SIZES.get(implementation, {}))
  q, k, v, _, dout, dlse = case.arrays()
  # Even huge logits must not turn a masked pair into NaN.
  out, lse, dq, dk, dv = jitted_vjp(attend(case, implementation, None), 1e4 * q, k, v, dout, dlse)
  assert np.all(np.asarray(out[:, :6]) == 0) and np.all(np.isneginf(lse[:, :6]))
  assert np.all(np.asarray(dq[:, :6]) == 0)
  unread = [t for t in range(12) if t not in (6, 7)]
  assert np.all(np.asarray(dk)[:, unread] == 0) and np.all(np.asarray(dv)[:, unread] == 0)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, dq, dk, dv))


@pytest.mark.one_day_in_six(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_cotangent_of_an_empty_row_does_harm(implementation):
  """Whoever merges results through lse meets -inf, and sends back what is no number."""
  case = Case(patterns.Summary(8, 2), T=12, **SIZES.get(implementation, {}))
  q, k, v, _, dout, dlse = case.arrays()
  wild = dlse.at[:, :6].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 0.0])[: case.H])
  tame = dlse.at[:, :6].set(0.0)
  for got, expected in zip(
    jitted_vjp(attend(case, implementation, None), q, k, v, dout, wild)[2:],
    jitted_vjp(attend(case, "reference", None), q, k, v, dout, tame)[2:],
    strict=True,
  ):
    assert_close(got, expected, tolerance=TOLERANCE[case.dtype], what="gradient")


@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_scale_and_transformations(implementation):
  q, k, v, *_ = Case(patterns.Strided(4), T=12).arrays()
  run = functools.partial(
    sparse_attention, pattern=patterns.Strided(4), implementation=implementation
  )
  assert_close(run(2 * q, k, v, scale=0.25), run(q, k, v, scale=0.5), tolerance=1e-6, what="scale")
  stacked = jax.vmap(run)(*(jnp.stack([x, -x]) for x in (q, k, v)))
  assert_close(stacked[1], run(-q, -k, -v), tolerance=1e-6, what="vmap")
  loss = lambda q: jnp.sum(run(q, k, v) ** 2)
  remat = jax.grad(jax.checkpoint(loss))(q)
  assert_close(remat, jax.grad(loss)(q), tolerance=1e-6, what="checkpoint")


@pytest.mark.smoke("fixed", "layout", daily=1)
@pytest.mark.parametrize(
  "name", ["local", "wide", "column", "strided", "block", "summary", "fixed", "layout", "where"]
)
def test_no_program_holds_an_array_of_T_by_T(name):
  T = 16_384
  big = {
    "local": patterns.Local(64), "column": patterns.Column(64), "strided": patterns.Strided(64),
    "block": patterns.Block(64), "summary": patterns.Summary(64, 4), "fixed": patterns.Fixed(64, 4),
    "wide": patterns.Local(4096), "where": patterns.Where(lambda i, j: (i + j) % 3 == 0),
    "layout": patterns.BlockLayout(np.eye(2, dtype=bool), T // 2),
  }  # fmt: skip
  q = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
  loss = lambda *qkv: sparse_attention(*qkv, pattern=big[name], implementation="xla").sum()
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
  # 16,384 x 16,384 booleans would be 268 MB; all tensors of this call together are 8 MB.
  assert program.memory_analysis().temp_size_in_bytes < 64e6


def test_a_policy_keeps_out_and_lse_by_name():
  case = Case(patterns.Strided(4), T=12)
  q, k, v, *_ = case.arrays()
  names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
  run = lambda q: attend(case, "xla", None)(q, k, v)[0].sum()
  count = lambda f: str(jax.make_jaxpr(jax.grad(f))(q)).count(" exp ")
  kept, recomputed = (jax.checkpoint(run, policy=p) for p in (names, None))
  assert count(kept) < count(recomputed)


@pytest.mark.one_day_in_six(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_number_of_a_batch_row_reaches_another(implementation):
  case = Case(patterns.Local(70), T=150, H=1, Hkv=1, Dk=32, Dv=32, dtype="bfloat16")
  q, k, v, _, dout, dlse = case.arrays()
  clean = jitted_vjp(attend(case, implementation, None), q, k, v, dout, dlse)
  q, k, v = (x.at[0].set(jnp.nan) for x in (q, k, v))
  spoilt = jitted_vjp(attend(case, implementation, None), q, k, v, dout, dlse)
  for a, b in zip(clean, spoilt, strict=True):
    np.testing.assert_array_equal(np.asarray(a[1], np.float32), np.asarray(b[1], np.float32))


WRONG = {
  "axes": (lambda q: (q[0], q, q, {}), "4 axes"),
  "batch": (lambda q: (q, q[:1], q[:1], {}), "agree in B"),
  "head size": (lambda q: (q, q[..., :4], q, {}), "one head size"),
  "groups": (lambda q: (q, q[:, :, :3], q[:, :, :3], {}), "Hkv=3 must divide H=4"),
  "dtype": (lambda q: (q, q.astype(jnp.bfloat16), q, {}), "must share one of"),
  "segments": (lambda q: (q, q, q, {"segment_ids": jnp.zeros((2, 5), jnp.int32)}), "shape"),
  "name": (lambda q: (q, q, q, {"implementation": "cuda"}), "one of reference, xla, mosaic_gpu"),
  "ids of keys": (
    lambda q: (q, q[:, :5], q[:, :5], {"segment_ids": jnp.zeros((2, 6), jnp.int32)}),
    r"segment_ids \[2, 6\] for keys \[B, S\] = \[2, 5\]: must come with kv_segment_ids",
  ),
  "ids of keys alone": (
    lambda q: (q, q, q, {"kv_segment_ids": jnp.zeros((2, 6), jnp.int32)}),
    r"kv_segment_ids without segment_ids: must come with them, .* shape \[B, T\] = \[2, 6\]",
  ),
  "shape of ids of keys": (
    lambda q: (q, q[:, :5], q[:, :5], {
      "segment_ids": jnp.zeros((2, 6), int), "kv_segment_ids": jnp.zeros((2, 6), jnp.int32),
    }),
    r"kv_segment_ids int32\[2, 6\]: must be integers of shape \[B, S\] = \[2, 5\]",
  ),
  "dtype of ids of keys": (
    lambda q: (q, q, q, {
      "segment_ids": jnp.zeros((2, 6), int), "kv_segment_ids": jnp.zeros((2, 6)),
    }),
    r"kv_segment_ids float32\[2, 6\]: must be integers",
  ),
  "signs of ids": (
    lambda q: (q, q, q, {
      "segment_ids": np.zeros((2, 6), np.int64), "kv_segment_ids": jnp.zeros((2, 6), jnp.uint32),
    }),
    "segment_ids int64, kv_segment_ids uint32: must both be signed, or both unsigned",
  ),
  "soft cap": (lambda q: (q, q, q, {"logits_soft_cap": 0.0}), "positive number"),
  "block size": (lambda q: (q, q, q, {"block_size": 0}), "whole number"),
  "blocks": (
    lambda q: (q, q, q, {"block_mask": jnp.ones((1, 1, 1, 1), bool), "block_size": 4}),
    r"\[2 or 1, 4 or 1, 2, 2\], T=6 and S=6 in blocks of block_size=4",
  ),
  "blocks' dtype": (
    lambda q: (q, q, q, {"block_mask": jnp.ones((1, 1, 1, 1))}), "must be bool"
  ),
}  # fmt: skip


NOT_ON_GPUS = {
  "float32": (Case(patterns.Local(4), Dk=32, Dv=32), "bfloat16 and float16"),
  "head size": (Case(patterns.Local(4), dtype="bfloat16"), r"32, 64, 96, 128, 192, 256"),
}


@pytest.mark.parametrize("what", NOT_ON_GPUS)
def test_what_kernels_cannot_do_is_named(what):
  case, words = NOT_ON_GPUS[what]
  q, k, v, ids, *_ = case.arrays()
  with pytest.raises(NotImplementedError, match=words):
    attend(case, "mosaic_gpu", ids)(q, k, v)


@pytest.mark.parametrize("what", WRONG)
def test_errors_say_what_is_wrong(what, as_a_user):
  q = Case(patterns.Dense(), T=6).arrays()[0]
  build, words = WRONG[what]
  q, k, v, more = build(q)
  with pytest.raises(ValueError, match=words):
    sparse_attention(q, k, v, **more)


NOT_BY_KERNELS = {
  "score_fn": (dict(score_fn=lambda s, i, j, h: s + jnp.ones(40)[j]), "score_fn"),
  "block_mask": (dict(block_mask=jnp.ones((1, 1, 2, 2), bool), block_size=32), "multiples of 128"),
}


@pytest.mark.parametrize("what", NOT_BY_KERNELS)
def test_what_kernels_do_not_take_is_named(what):
  how, words = NOT_BY_KERNELS[what]
  q = _narrow(patterns.Dense(), T=40, Hkv=2).arrays()[0]
  with pytest.raises(NotImplementedError, match=words):
    sparse_attention(q, q, q, implementation="mosaic_gpu", **how)
