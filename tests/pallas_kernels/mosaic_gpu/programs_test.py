"""The GPU kernels at the paper's sizes, lowered for an H100 that is not here: no large copies."""

import functools
import logging
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import PartitionSpec

from pallas_kernels import api
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels import tuning

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
# B, T, H, D, stride, summary width.
SHAPES = {
  "enwik8": (4, 12_288, 8, 64, 128, 32),
  "imagenet64": (4, 12_288, 16, 32, 128, 8),
  "cifar10": (16, 3_072, 2, 128, 128, 8),
  "audio64k": (1, 65_536, 8, 64, 256, 32),
  "modern32k": (1, 32_768, 16, 128, 128, 32),
}
PATTERNS = {
  "dense": lambda stride, width: patterns.Dense(),
  "local": lambda stride, width: patterns.Local(stride),
  "column": lambda stride, width: patterns.Column(stride),
  "block": lambda stride, width: patterns.Block(stride),
  "summary": patterns.Summary,
  "strided": lambda stride, width: patterns.Strided(stride),
  "fixed": patterns.Fixed,
  "sub_blocks": lambda stride, width: patterns.Fixed(stride, width, 2),
  "per_head": lambda stride, width: patterns.PerHead((
    patterns.Local(stride), patterns.Column(stride),
  )),
}  # fmt: skip
MOVES = re.compile(r"stablehlo\.(transpose|gather|scatter)\b.*?->\s*tensor<([\dx]+)x\w+>", re.S)


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch):
  """The same programs wherever the tests run: where there is a GPU, cuDNN would serve Dense."""
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def mesh(shape=(1,), names=("x",)):
  how = dict(axis_types=(AxisType.Auto,) * len(shape), abstract_device=H100)
  return jax.sharding.use_abstract_mesh(AbstractMesh(shape, names, **how))


def lowered(attend, *arrays) -> str:
  """The program of forward and backward, for a GPU."""

  def run(q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)

  return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def large_moves(program: str, size: int) -> list[str]:
  """Operations that move at least so many elements to another order."""
  found = MOVES.findall(program)
  return [f"{op} {shape}" for op, shape in found if math.prod(map(int, shape.split("x"))) >= size]


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def attend_with(pattern, implementation="mosaic_gpu"):
  return functools.partial(sparse_attention, pattern=pattern, implementation=implementation)


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke("strided-enwik8")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_large_is_copied(name, shape):
  B, T, H, D, stride, width = SHAPES[shape]
  x = array(B, T, H, D)
  with mesh():
    program = lowered(attend_with(PATTERNS[name](stride, width)), x, x, x, x)
  assert program.count("mosaic_gpu") >= 2
  assert not large_moves(program, B * T * H * D // 2)  # per_head moves half the heads at once


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("local-64-1111", daily=0)
@pytest.mark.parametrize("T", [1_111, 1_024])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("name", ["dense", "local", "block"])
def test_segments(name, D, T):
  x, ids = array(2, T, 2, D), jnp.zeros((2, T), jnp.int32)
  attend = functools.partial(attend_with(PATTERNS[name](128, 32)), segment_ids=ids)
  with mesh():
    assert lowered(attend, x, x, x, x).count("mosaic_gpu") >= 2


@pytest.mark.one_day_in_three(1)
@pytest.mark.smoke("block-32-1024", daily=1)
@pytest.mark.parametrize("T", [1_111, 1_024])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("name", ["dense", "local", "block", "long_block"])
def test_segments_of_keys(name, D, T):
  """Of a traced array: a constant could be folded into that of the queries."""
  pattern = patterns.Block(512) if name == "long_block" else PATTERNS[name](128, 32)
  x, ids = array(2, T, 2, D), array(2, T, dtype=jnp.int32)

  def run(ids, kv_ids, q, k, v, dout):
    how = dict(segment_ids=ids, kv_segment_ids=kv_ids)
    return jax.vjp(functools.partial(attend_with(pattern), **how), q, k, v)[1](dout)

  with mesh():
    traced = jax.jit(run).trace(ids, ids, x, x, x, x)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2


def test_ids_of_keys_that_are_those_of_queries_change_no_program():
  x, ids = array(2, 256, 2, 64), array(2, 256, dtype=jnp.int32)

  def program(*names):
    def run(ids, *qkv):
      return attend_with(patterns.Local(64))(*qkv, **dict.fromkeys(names, ids))

    return str(jax.make_jaxpr(run)(ids, x, x, x))

  with mesh():  # before they are lowered: kernels are numbered then
    alone, given_twice = program("segment_ids"), program("segment_ids", "kv_segment_ids")
  assert "window_forward" in alone
  assert alone == given_twice


@pytest.mark.one_day_in_six(5)
@pytest.mark.smoke("fwd-512-64-3", "bwd-64-64-2", daily=0)
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("block_k", [64, 512])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_windows_as_the_tuning_table_may_have_them(direction, block_k, D, warpgroups):
  x = array(2, 2_048, 4, D)
  sizes = tuning.BlockSizes(64, block_k, 2, warpgroups)
  with mesh(), tuning.override("local", direction, sizes):
    assert lowered(attend_with(patterns.Local(128)), x, x, x, x).count("mosaic_gpu") >= 2


@pytest.mark.one_day_in_six(3)
@pytest.mark.smoke("strided", daily=0)
@pytest.mark.parametrize("name", PATTERNS)
def test_two_levels_of_vmap_copy_nothing(name):
  x = array(2, 3, 1, 1024, 4, 64)
  attend = jax.vmap(jax.vmap(attend_with(PATTERNS[name](128, 32))))
  with mesh():
    program = lowered(attend, x, x, x, x)
  assert not large_moves(program, 3 * 1024 * 64)


@pytest.mark.one_day_in_six(0)
@pytest.mark.smoke("fixed", daily=0)
@pytest.mark.parametrize("name", PATTERNS)
def test_layers_that_are_computed_again(name):
  x = array(2, 1024, 4, 64)
  attend = attend_with(PATTERNS[name](128, 32))

  def layers(policy, q, k, v):
    layer = jax.checkpoint(lambda x, _: (attend(x, k, v), None), policy=policy)
    return jax.lax.scan(layer, q, length=3)[0]

  keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
  with mesh():
    again, kept = (
      lowered(functools.partial(layers, policy), x, x, x, x).count("custom_call @mosaic_gpu")
      for policy in (None, keep)
    )
  assert 0 < kept < again


@pytest.mark.one_day_in_six(0)
@pytest.mark.smoke("strided", daily=0)
@pytest.mark.parametrize("name", PATTERNS)
def test_inside_shard_map(name):
  x = array(8, 1024, 4, 64)
  spec = PartitionSpec("data", None, "model", None)
  with mesh((4, 2), ("data", "model")):
    attend = jax.shard_map(
      attend_with(PATTERNS[name](128, 32)), in_specs=spec, out_specs=spec, check_vma=False
    )
    program = lowered(attend, x, x, x, x)
  assert "mosaic_gpu" in program
  assert not large_moves(program, 2 * 1024 * 2 * 64)


@pytest.mark.one_day_in_six(4)
@pytest.mark.smoke("fixed-128-64", daily=1)
@pytest.mark.parametrize(
  "Dk,Dv",
  [(32, 32), (64, 128), (128, 64), (96, 96), (128, 128), (192, 192), (256, 256)],
)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_head_size(name, Dk, Dv):
  arrays = (
    array(1, 1024, 4, Dk),
    array(1, 1024, 2, Dk),
    array(1, 1024, 2, Dv),
    array(1, 1024, 4, Dv),
  )
  with mesh():
    program = lowered(attend_with(PATTERNS[name](128, 32)), *arrays)
  assert not large_moves(program, 1024 * 2 * 32)


@pytest.mark.one_day_in_six(2)
@pytest.mark.smoke("per_head")
@pytest.mark.parametrize("name", PATTERNS)
def test_odd_lengths(name):
  x = array(2, 777, 4, 64)
  with mesh():
    lowered(attend_with(PATTERNS[name](96, 8)), x, x, x, x)


@pytest.mark.one_day_in_six(2)
@pytest.mark.smoke("Local(window=128, causal=True)")
@pytest.mark.parametrize(
  "pattern",
  [patterns.Dense(), patterns.Local(128), patterns.Local(600), patterns.Block(128)],
  ids=repr,
)
def test_segment_ids(pattern):
  x, kv, ids = array(2, 777, 4, 64), array(2, 777, 2, 64), array(2, 777, dtype=jnp.int32)
  with mesh():
    attend = lambda ids, *qkv: attend_with(pattern)(*qkv, segment_ids=ids)
    run = lambda ids, q, k, v: jax.vjp(functools.partial(attend, ids), q, k, v)[1](q)
    program = jax.jit(run).trace(ids, x, kv, kv).lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("mosaic_gpu") >= 2


def test_what_is_not_supported_falls_to_xla_with_one_line(caplog):
  x = array(1, 256, 2, 64, dtype=jnp.float32)
  api._say_once.cache_clear()
  with mesh(), caplog.at_level(logging.WARNING, logger="pallas_kernels.api"):
    for window in (64, 32):
      program = lowered(attend_with(patterns.Local(window), None), x, x, x, x)
      assert "mosaic_gpu" not in program
    assert [record.message for record in caplog.records] == [
      "mosaic_gpu: float32 is not supported, bfloat16 and float16 are; xla computes it"
    ]
    with pytest.raises(NotImplementedError, match="bfloat16 and float16"):
      lowered(attend_with(patterns.Local(64)), x, x, x, x)
