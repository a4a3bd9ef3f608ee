"""The halves of a block on meshes of several devices, against one device, and their programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from pallas_kernels import residual
from pallas_kernels.residual import dropout
from pallas_kernels.residual import fold

AXES = ("data", "fsdp", "tensor", "sequence")
ROW_AXES = (("data", "fsdp"), ("sequence",))
H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
)


def inputs(B, T, E, V, N, F):
  """Weights and rows by name, float32."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  affine = lambda rows, columns: (normal(rows, columns) / rows**0.5, normal(columns))
  norm = lambda: dict(gain=1 + 0.3 * normal(E), shift=normal(E))
  return dict(
    x=normal(B, T, E),
    o=normal(B, T, V),
    norms=(norm(), norm()),
    projections=(affine(E, N), affine(E, N), affine(E, V)),
    out=affine(V, E),
    up=affine(E, F),
    down=affine(F, E),
  )


def blocks(given, options, dtype, rate):
  """What two blocks of the same weights give, with attention that adds o to the values."""
  x, o = given["x"].astype(dtype), given["o"].astype(dtype)
  seeds = jnp.array([[1, 2], [3, 4]], jnp.uint32)
  bits = tuple(dropout.keep_bits(seed, rate, x.shape) for seed in seeds) if rate else None
  after = lambda layer, norm: fold.after_norm(*layer, **norm, dtype=dtype)
  entering = fold.EnterWeights(*(after(w, given["norms"][0]) for w in given["projections"]))
  entering = entering._replace(joint=fold.joint(*entering[:3]))
  alone = lambda name: fold.linear(*given[name], dtype)
  up = after(given["up"], given["norms"][1])
  leaving = fold.LeaveWeights(alone("out"), up, alone("down"))
  stream, results = residual.start(x, options, drops=rate > 0), []
  for _ in range(2):
    q, k, v, through = residual.enter(stream, entering, options)
    heads = (o + v).reshape(*x.shape[:2], 2, -1)
    stream = residual.leave(heads, through, leaving, bits, options)
    results += [q, k, v]
  return *results, residual.end(stream, options)


def value_and_gradients(given, *, options, dtype, rate):
  """Every result, and the gradients of every input, of a number that depends on all results."""

  def number(given):
    results = blocks(given, options, dtype, rate)
    rng = np.random.default_rng(1)
    weigh = lambda y: (y.astype(jnp.float32) * rng.normal(size=y.shape).astype(np.float32)).sum()
    return sum(map(weigh, results)), results

  # The number itself is a sum in which most of its terms cancel.
  gradients, results = jax.grad(number, has_aux=True)(given)
  return results, gradients


@pytest.mark.smoke()
@pytest.mark.parametrize(
  ("shape", "B", "rate"),
  [((2, 2, 1, 2), 4, 0.25), ((1, 2, 1, 4), 4, 0.0), ((2, 2, 1, 2), 6, 0.25)],
  ids=["even", "no dropout", "rows that do not come out even"],
)
def test_a_mesh_gives_what_one_device_gives(shape, B, rate):
  given = inputs(B, 8, E=40, V=24, N=20, F=72)
  options = residual.Options(1e-5, "quick_gelu", rate, "xla")
  how = dict(dtype=jnp.float32, rate=rate)
  alone = jax.jit(functools.partial(value_and_gradients, options=options, **how))(given)
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
  options = residual.Options(1e-5, "quick_gelu", rate, "xla", ROW_AXES)
  run = jax.jit(functools.partial(value_and_gradients, options=options, **how))
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, jax.P(ROW_AXES[0] if B == 4 else None, "sequence"))
    cut = lambda name, x: jax.device_put(x, rows) if name in "xo" else x
    given = {name: cut(name, x) for name, x in given.items()}
    # As fsdp cuts weights: each device has the whole of it inside.
    where = jax.NamedSharding(mesh, jax.P("fsdp"))
    given["up"] = jax.device_put(given["up"], where)
    compiled = run.lower(given).compile()
    sharded = compiled(given)
  for (path, got), (_, expected) in zip(
    *map(jax.tree.leaves_with_path, (sharded, alone)), strict=True
  ):
    size = np.abs(expected).max()
    np.testing.assert_allclose(
      got, expected, rtol=0, atol=2e-5 * size, err_msg=jax.tree_util.keystr(path)
    )
  y = sharded[0][-1]
  assert len({str(shard.index) for shard in y.addressable_shards}) == (8 if B == 4 else 2)
  text = compiled.as_text()
  assert "all-reduce" in text
  # Rows stay where they are.
  for shape in re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", text):
    assert np.prod([int(n) for n in shape.split(",")]) < given["x"].size / 2 or shape == "40,72"


@pytest.mark.one_day_in_six(2)
def test_kernels_on_a_mesh_of_h100s_lower_for_the_rows_of_a_device():
  given = jax.eval_shape(lambda: inputs(4, 256, E=256, V=256, N=128, F=512))
  options = residual.Options(1e-5, "quick_gelu", 0.25, "mosaic_gpu", ROW_AXES)
  run = functools.partial(value_and_gradients, options=options, dtype=jnp.bfloat16, rate=0.25)
  mesh = jax.sharding.AbstractMesh(
    (2, 2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=H100
  )
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(run).trace(given).lower(lowering_platforms=("cuda",)).as_text()
  # Sums of parts have no rows, and nothing in bfloat16.
  kernels = [x for x in re.findall(r"custom_call @mosaic_gpu[^\n]*", text) if "xbf16>" in x]
  assert len(kernels) >= 7  # four forward, and three of four backward or more: some share a form
  for kernel in kernels:  # a device has 1 sequence of 4, and half of its 256 tokens
    assert "tensor<128x256xbf16>" in kernel or "tensor<128x512xbf16>" in kernel
    assert "tensor<1024x" not in kernel


def test_kernels_serve_on_a_mesh_if_they_are_asked_for_and_rows_alone_are_sharded():
  choose = functools.partial(residual.choose, "bfloat16", 256, 512, (128, 128, 256), "quick_gelu")
  how = dict(axis_types=(AxisType.Auto,) * 4, abstract_device=H100)
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2, 1, 2), AXES, **how)):
    assert choose(row_axes=ROW_AXES) is None
    with residual.override("mosaic_gpu"):
      assert choose(row_axes=ROW_AXES) == "mosaic_gpu"
      with pytest.raises(NotImplementedError, match="devices share rows"):
        choose()
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1, 1, 1), AXES, **how)):
    assert choose() == "mosaic_gpu"
