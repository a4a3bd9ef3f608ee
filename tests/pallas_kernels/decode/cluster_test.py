"""The one kernel of a decoding step: on a GPU as it is, elsewhere carried out in numpy."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType

from pallas_kernels import hardware
from pallas_kernels.decode import cluster as kernels
from pallas_kernels.decode.cluster import machine
from pallas_kernels.decode.cluster import ptx
from pallas_kernels.decode.cluster import simulator
from pallas_kernels.decode.cluster import sizes
from sparse_flax import sample
from sparse_flax.sample import cluster
from sparse_flax.sample import triton
from tests.helpers.models import random_tokens
from tests.helpers.models import small_model
from tests.sparse_flax.model.cache_test import assert_equal_logits
from tests.sparse_flax.model.cache_test import at_once
from tests.sparse_flax.model.cache_test import decoded_logits

ON_GPU = jax.default_backend() == "gpu"
CIFAR = dict(width=256, num_heads=2, qk_ratio=0.5, ff_mult=2.0)
LONG = dict(seq_len=300, stride=20, position_shape=(15, 20), step=250)


def h100():
  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  how = dict(axis_types=(AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), **how))


def model_of(layers, **more):
  sizes = dict(num_layers=2 * len(layers), sub_blocks=1, compute_dtype="bfloat16")
  sizes |= dict(seq_len=60, stride=12, position_shape=(5, 12)) | more
  return small_model(attention_layers=layers, **sizes)


def random_state(model, B):
  rng = np.random.default_rng(B)
  caches = model.init_cache(B)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return jnp.asarray(
    rng.normal(size=(B, model.final_norm.num_features)), jnp.bfloat16
  ), jax.tree.map(fill, caches)


@jax.jit
def block_by_block(model, x, caches, step):
  for n in range(model.num_groups):
    group, after = jax.tree.map(lambda w, n=n: w[n], model.groups), []
    for layer, cache in zip(group, caches, strict=True):
      x, cache = layer.decode_step(x, step, cache, layer=jnp.int32(n))
      after.append(cache)
    caches = tuple(after)
  return x, caches


CASES = {
  "strided": (("local", "column"), 5, 3, 2, CIFAR),
  "fixed": (("fixed",), 3, 2, 4, CIFAR | dict(num_heads=8, qk_ratio=1.0, ff_mult=4.0)),
  "more rows than a tile": (("local",), 12, 12, 16, CIFAR),
  "many rows, some blocks without a job": (
    ("dense",),
    2,
    1,
    8,
    dict(width=512, num_heads=4, ff_mult=1.0) | LONG,
  ),
  "several jobs": (("local", "column"), 7, 3, 8, dict(width=512, num_heads=16, ff_mult=1.0) | LONG),
  "union": (("strided",), 2, 2, 2, CIFAR | dict(step=0)),
  "heads that differ": (
    ("fixed", "local"),
    3,
    3,
    4,
    CIFAR | dict(num_heads=8, qk_ratio=1.0, sub_blocks=4, stride=12, summary_width=2),
  ),
  # Some chunks of 40 rows are taken by a loop, a last one has less.
  "a loop over rows": (
    ("fixed",),
    2,
    2,
    2,
    CIFAR
    | dict(sub_blocks=2, summary_width=10, stride=20, seq_len=2_000, step=1_930)
    | dict(position_shape=(100, 20)),
  ),
}


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_blocks(case):
  layers, B, rows, C, more = CASES[case]
  more = dict(more)
  step = jnp.int32(more.pop("step", 37))
  model = model_of(layers, **more)
  x, caches = random_state(model, B)
  expected, stored = block_by_block(model, x, caches, step)
  weights = cluster.weights_of(model.groups, C=C)
  run = kernels.launch if ON_GPU else kernels.simulated
  how = functools.partial(cluster.decode_steps, rows=rows, run=run)
  got, kept = (jax.jit(how) if ON_GPU else how)(x, weights, step, caches)
  close = lambda a, b: np.testing.assert_allclose(
    np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.02 * float(jnp.abs(b).max())
  )
  close(got, expected)
  for before, a, b in zip(*map(jax.tree.leaves, (caches, kept, stored)), strict=True):
    close(a, b)
    # Only the step's own rows are written.
    written = np.asarray(a != before).any(axis=-1)
    np.testing.assert_array_equal(written, np.asarray(b != before).any(axis=-1))


def test_weights_without_the_gain_or_the_shift_are_other_weights():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weight, bias = normal(1, 256, 32).astype(jnp.bfloat16), normal(1, 32)
  gain, shift = normal(1, 256), normal(1, 256)
  whole = kernels.pack(weight, bias, (gain, shift), C=2)
  for norm in ((gain + 1, shift), (gain, shift + 1)):
    assert (whole != kernels.pack(weight, bias, norm, C=2)).any()
  assert whole.shape == (1, 2, 2 * 32 + 256 * 16)


@pytest.mark.parametrize("K, N, C", [(256, 32, 2), (512, 256, 16), (768, 128, 1)])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_packed_weights_are_taken_out_again(K, N, C, norm):
  rng = np.random.default_rng(N)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weight, bias = normal(3, K, N).astype(jnp.bfloat16), normal(3, N)
  gain, shift = normal(3, K), normal(3, K)
  words = kernels.pack(weight, bias, (gain, shift) if norm else None, C=C)
  got, got_bias, sums = kernels.unpack(words, K=K, N=N)
  if norm:
    wide = weight.astype(jnp.float32)
    bias = bias + jnp.einsum("LK,LKN->LN", shift, wide, precision="highest")
    weight = (wide * gain[:, :, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(sums, weight.astype(jnp.float32).sum(axis=1))
  else:
    assert sums is None
  np.testing.assert_array_equal(got.astype(jnp.float32), weight.astype(jnp.float32))
  np.testing.assert_array_equal(got_bias, bias)
  with pytest.raises(ValueError, match="header"):
    kernels.unpack(words, K=K, N=2 * N)


def test_heads_are_joined_one_after_the_other():
  query, key, value = (jnp.arange(2 * n) + start for n, start in ((4, 0), (4, 10), (3, 20)))
  expected = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 4, 5, 6, 7, 14, 15, 16, 17, 23, 24, 25]
  parts = (x[None].astype(jnp.float32) for x in (query, key, value))
  np.testing.assert_array_equal(kernels.join_heads(*parts, num_heads=2)[0], expected)


@pytest.mark.parametrize("implementation", [ptx.Gpu, simulator.Simulated])
def test_both_machines_have_the_methods_of_the_protocol_and_no_others(implementation):
  public = lambda cls: {name for name in dir(cls) if not name.startswith("_")}
  assert issubclass(implementation, machine.Machine)
  assert not implementation.__abstractmethods__
  fields = set(machine.Machine.__annotations__)
  assert public(implementation) | fields == public(machine.Machine) | fields
  for name in machine.Machine.__abstractmethods__:
    there, here = (inspect.signature(getattr(x, name)) for x in (machine.Machine, implementation))
    assert list(there.parameters.values()) == list(here.parameters.values()), name


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(compute_dtype="float32"), "takes bfloat16"),
    (dict(width=128, num_heads=2), "E=128: must be a multiple of 256"),
    (dict(attention_layers=(("local", "column"),)), "heads that differ in how many rows"),
  ],
)
def test_what_the_kernel_does_not_take_is_said(overrides, message):
  overrides = CIFAR | overrides
  model = model_of(overrides.pop("attention_layers", ("local",)), **overrides)
  with pytest.raises(NotImplementedError, match=message):
    run_blocks = cluster.run_blocks_of(model.groups, 3)
    model.decode_step(jnp.zeros(3, jnp.int32), 0, model.init_cache(3), run_blocks=run_blocks)
  # Asked before, it says the same.
  reason = cluster.supported(model.groups, model.init_cache(3), 3)
  with pytest.raises(NotImplementedError, match=message):
    raise NotImplementedError(reason)


def test_what_the_kernel_takes_is_asked_of_shapes():
  model = nnx.eval_shape(lambda: model_of(("local", "column"), **CIFAR))
  caches = jax.eval_shape(lambda: model.init_cache(3))
  assert cluster.supported(model.groups, caches, 3) is None
  assert triton.supported(model.groups, caches, 3) is None


def test_the_best_for_a_gpu_is_what_takes_the_model(caplog):
  best = lambda layers, B=3, sparse=True, **more: sample.best(
    nnx.eval_shape(lambda: model_of(layers, **more)), B, sparse=sparse
  )
  long = dict(seq_len=3_000, stride=50, position_shape=(60, 50))
  with h100():
    assert best(("local", "column"), **CIFAR) == "cluster"
    assert best(("local",), **CIFAR, **long) == "cluster"
    assert best(("local",), **CIFAR, **long, sparse=False) == "cluster"
    assert best((("local", "column"),), **CIFAR) == "triton"
    assert best(("local",), **CIFAR | dict(width=1_280, compute_dtype="float32")) == "xla"
  reasons = [record.message for record in caplog.records]
  for part in ("cluster: heads that differ", "cluster: dtype=", "triton: norm over E="):
    assert any(re.match(f"no decoding step by {part}", reason) for reason in reasons), reasons


@pytest.mark.parametrize("B, blocks, rows", [(1, 16, 1), (16, 16, 3), (64, 8, 5), (1_000, 8, 8)])
def test_sequences_are_shared_by_clusters(B, blocks, rows):
  with h100():
    assert kernels.cluster_shape(B) == (blocks, rows)


@pytest.mark.parametrize("clusters", [{16: 4, 8: 9}, {16: 0, 8: 1}, {16: 0, 8: 0}], ids=str)
def test_clusters_are_as_many_as_the_device_runs_at_once(clusters, monkeypatch):
  asked = lambda *, blocks, threads, smem: clusters[blocks]
  monkeypatch.setattr(hardware, "max_active_clusters", asked)
  for B in (1, 8, 30, 200):
    blocks, rows = kernels.cluster_shape(B)
    fits = -(-B // rows) <= clusters[blocks]
    assert fits or (blocks, rows) == (8, 8)
    better = clusters[16] * sizes.MOST_SEQUENCES >= B
    assert (blocks == 16) == better


@pytest.mark.gpu
def test_the_driver_says_how_many_clusters_run_at_once():
  for blocks in sizes.CLUSTERS:
    ask = dict(blocks=blocks, threads=sizes.THREADS + machine.WARPGROUP, smem=sizes.SMEM)
    clusters = hardware.max_active_clusters(**ask)
    assert 0 < clusters <= hardware.num_cores() // blocks


def test_a_step_lowers_for_a_gpu_to_one_kernel():
  model = model_of(("local", "column"), **CIFAR)
  step = lambda model, token, caches: model.decode_step(
    token, 7, caches, run_blocks=cluster.run_blocks_of(model.groups, 3)
  )
  with h100():
    traced = jax.jit(step).trace(model, jnp.zeros(3, jnp.int32), model.init_cache(3))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("custom_call @mosaic_gpu") == 1


@pytest.mark.gpu  # the simulation is not for tracing
@pytest.mark.parametrize("layers", [("local", "column"), ("fixed",), ("strided",)], ids=str)
def test_teacher_forced_decoding_gives_the_logits_of_the_whole_sequence(layers):
  model = model_of(layers, **CIFAR)
  tokens = random_tokens(batch_size=3, length=model.seq_len)
  got = decoded_logits(model, tokens, P=5, kernels=cluster)
  assert_equal_logits(got, at_once(model, tokens), 3e-2)


@pytest.mark.gpu  # the simulation is not for tracing
def test_it_is_what_samples_are_drawn_with():
  model = model_of(("local", "column"), **CIFAR)
  graphdef, params = nnx.split(model, nnx.Param)
  assert sample.best(model, 3) == "cluster"
  assert sample.best(model_of((("local", "column"),), **CIFAR), 3) == "triton"
  params = nnx.to_pure_dict(params)
  how = dict(key=jax.random.key(0), num=3, temperature=0.0)
  names = (None, "cluster", "mosaic_gpu")  # the last is what it was called before
  first, *others = (sample.generate(graphdef, params, **how, implementation=name) for name in names)
  for tokens in others:
    np.testing.assert_array_equal(first, tokens)
