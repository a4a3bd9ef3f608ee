"""Sums over rows in Pallas's simulator beside plain formulas; as an H100 has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.residual import gradients
from pallas_kernels.residual import outer
from pallas_kernels.residual import totals
from pallas_kernels.residual.outer import Cut
from pallas_kernels.residual.outer import Product

H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
)


def normal(seed, *shape, dtype=jnp.bfloat16):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def wide(x):
  return np.asarray(x, np.float64)


def close(got, want, bound):
  got, want = wide(got), wide(want)
  assert got.shape == want.shape
  assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def compare(products, parts, cut, bound):
  """The sums by the kernels beside those in float64."""
  got = gradients.by_kernels(products, parts, cut, biases=True)
  pairs = [(a, b) for a, bs in products for b in bs]
  for dw, (a, b) in zip(got.weights, pairs, strict=True):
    close(dw, wide(a).T @ wide(b), bound)
  for db, (_, b) in zip(got.biases, pairs, strict=True):
    close(db, wide(b).sum(0), bound)
  for total, x in zip(got.totals, parts, strict=True):
    close(total, wide(x).sum(0), bound)
  return got


def products_of(R, *shapes):
  """A [R, M] and several B [R, N], by (M, (N, ...))."""
  seeds = iter(range(100))
  return [
    Product(normal(next(seeds), R, M), tuple(normal(next(seeds), R, N) for N in widths))
    for M, widths in shapes
  ]


CUTS = {
  "one tile": (Cut(ranges=2), [(256, (128,))]),
  "two beside each other": (Cut(height=128, ranges=3, stages=2), [(128, (256,))]),
  "several": (Cut(height=128, ranges=1, step=32), [(128, (128, 256)), (256, (128,))]),
}


@pytest.mark.smoke("333-several", daily=1)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("R", [333, 40])
def test_sums_over_rows(R, cut):
  """Of a last step that is not full, and of fewer steps than ranges."""
  sizes, shapes = CUTS[cut]
  compare(products_of(R, *shapes), [], sizes, 1e-6)


def test_sums_of_parts(monkeypatch):
  """Where a thread takes 4, 2 or 1 values of each: in a loop, and what is left of it."""
  monkeypatch.setattr(totals, "SIMULATED", 4)
  parts = [normal(n, *shape, dtype=jnp.float32) for n, shape in enumerate([
    (1, 128), (35, 2, 256), (51, 256), (97, 1, 128),
  ])]  # fmt: skip
  for total, x in zip(totals.totals(parts), parts, strict=True):
    close(total, wide(x).sum(0), 1e-6)


def test_threads_take_less_of_more_parts(monkeypatch):
  monkeypatch.setattr(totals.gpu, "simulated", lambda: False)
  sizes = {(1, 512): 512, (48, 512): 512, (49, 512): 256, (72, 512): 256, (73, 512): 128}
  assert {parts: totals._size_of(*parts) for parts in sizes} == sizes
  # (batches of a loop, parts of each): what is left is less than one more.
  assert [totals._batches(*x) for x in ((35, 4), (51, 2), (97, 1))] == [(3, 11), (3, 17), (3, 32)]


def test_thread_blocks_share_an_array_of_parts(monkeypatch):
  monkeypatch.setattr(totals, "SIMULATED", 2)
  x = normal(0, 3, 4, 128, dtype=jnp.float32)
  close(totals.totals([x])[0], wide(x).sum(0), 1e-6)


@pytest.mark.parametrize("cut,shapes,reason", [
  (Cut(), [(128, (128,))], "no multiple of the tiles"),
  (Cut(stages=1), [(256, (256,))], "in another slot"),
  (Cut(stages=5), [(256, (256,))], "bytes of shared memory"),
])  # fmt: skip
def test_cuts_that_do_not_fit_are_refused(cut, shapes, reason):
  with pytest.raises(ValueError, match=reason):
    outer.plan_of(products_of(64, *shapes), cut, False)


def test_all_widths_have_a_cut():
  """The fast one where tiles fit."""
  cut = lambda *shapes: gradients.cut_of(products_of(8, *shapes))
  fast, other = gradients.CUTS
  assert cut((256, (128, 128, 256))) == fast
  assert cut((256, (256,)), (256, (512,)), (512, (256,))) == fast
  assert cut((128, (256,)), (256, (384,)), (384, (256,))) == other


@pytest.mark.parametrize("E,biases", [(1024, True), (512, False)])
def test_wide_streams_are_left_to_xla(E, biases, monkeypatch):
  monkeypatch.setattr(gradients, "by_kernels", None)
  products, part = products_of(40, (E, (128,))), normal(9, 3, 128, dtype=jnp.float32)
  got = gradients.over_rows(E, products, [part], biases=biases)
  ((x, (dq,)),) = products
  close(got.weights[0], wide(x).T @ wide(dq), 1e-6)
  assert len(got.biases) == biases
  for db in got.biases:
    close(db, wide(dq).sum(0), 1e-6)
  close(got.totals[0], wide(part).sum(0), 1e-6)


@pytest.mark.parametrize("E,biases", [(256, False), (256, True), (512, True)])
def test_kernels_make_what_pays(E, biases, monkeypatch):
  asked_for = []
  by_kernels = lambda *given, **how: asked_for.append((given[2], how)) or gradients.Sums([], [], [])
  monkeypatch.setattr(gradients, "by_kernels", by_kernels)
  gradients.over_rows(E, products_of(8, (E, (E, E, E))), [], biases=biases)
  assert asked_for == [(Cut(), dict(biases=biases))]


# -------------------------------------------------------------------------------------- lowering

HALVES = {
  "enter": [(256, (128, 128, 256))],
  "enter, 512": [(512, (512, 512, 512))],
  "leave": [(256, (256,)), (256, (512,)), (512, (256,))],
}
CUTS_OF = (*gradients.CUTS, Cut(step=32, stages=9))
ALL = [(half, cut) for half in HALVES for cut in CUTS_OF]
by_cut = pytest.mark.parametrize("half,cut", ALL, ids=[f"{x}-{n}" for n, (x, _) in enumerate(ALL)])


def parts_of(half):
  """What the other kernels of a half leave in parts."""
  ((width, _), *_) = HALVES[half]
  shapes = [(99, 2, 512), (132, 1, 256)] if half == "leave" else [(264, 1, width)]
  return [normal(n, *shape, dtype=jnp.float32) for n, shape in enumerate(shapes)]


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("enter-0")
@by_cut
def test_lowers_for_an_h100_without_copies(half, cut):
  products = jax.eval_shape(lambda: products_of(49_152, *HALVES[half]))
  call = functools.partial(gradients.by_kernels, cut=cut, biases=half != "leave")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=H100)
  with jax.sharding.use_abstract_mesh(mesh):
    parts = jax.eval_shape(lambda: parts_of(half))
    program = jax.jit(call).trace(products, parts).lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("mosaic_gpu_v2") == 2
  for copy in ("stablehlo.transpose", "stablehlo.pad", "stablehlo.reduce"):
    assert copy not in program


# ----------------------------------------------------------------------------------------- a card


@pytest.mark.gpu
@pytest.mark.parametrize("R", [20_000, 333, 40])
@by_cut
def test_gradients_on_a_card(half, cut, R):
  """As in the simulator, and equal bits in two runs."""
  products, parts = products_of(R, *HALVES[half]), parts_of(half)
  first = compare(products, parts, cut, 1e-4)
  second = gradients.by_kernels(products, parts, cut, biases=True)
  for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(x, y)
