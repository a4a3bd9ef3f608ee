"""Batch and heads sharded over 8 devices: no collective, and results where q, k and v lie.

`python -m tests.pallas_kernels.partitioning_test` prints the whole table.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType

from pallas_kernels import api
from pallas_kernels import mosaic_gpu
from pallas_kernels import partitioning
from pallas_kernels import patterns
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import sparse_attention
from pallas_kernels.lowering.plan import of_call
from pallas_kernels.scores import Scores
from sparse_flax import SparseSelfAttention
from tests.helpers.arrays import assert_close

B, T, H, D = 4, 24, 8, 8
_RANDOM = np.random.default_rng(7)
_LISTS = _RANDOM.permuted(np.tile(np.arange(3, dtype=np.int32), (B, 4, 6, 1)), axis=3)
# Every row of the patterns' table, and what is added to one; 4 heads of a device are 2 periods.
CASES = {
  "dense": dict(pattern=patterns.Dense()),
  "local": dict(pattern=patterns.Local(7)),
  "column": dict(pattern=patterns.Column(5)),
  "strided": dict(pattern=patterns.Strided(6)),
  "block": dict(pattern=patterns.Block(5)),
  "summary": dict(pattern=patterns.Summary(5, 2, 1)),
  "fixed": dict(pattern=patterns.Fixed(6, 2, 2)),
  "per_head": dict(pattern=patterns.PerHead((patterns.Local(4), patterns.Column(3)))),
  "layout": dict(pattern=patterns.BlockLayout(_RANDOM.random((2, 6, 6)) < 0.5, block_size=4)),
  "where": dict(pattern=patterns.Where(lambda i, j: (i * j) % 3 == 0)),
  "union": dict(pattern=patterns.Local(3) | patterns.Where(lambda i, j: j < 3)),
  "intersection": dict(pattern=patterns.Local(9) & patterns.Column(2)),
  "segments": dict(
    pattern=patterns.Strided(6), segment_ids=np.sort(_RANDOM.integers(0, 3, (B, T)), axis=1)
  ),
  "segments_of_keys": dict(
    pattern=patterns.Dense(causal=False),
    S=19,
    segment_ids=np.sort(_RANDOM.integers(0, 3, (B, T)), axis=1),
    kv_segment_ids=np.sort(_RANDOM.integers(1, 4, (B, 19)), axis=1),
  ),
  "block_mask": dict(
    pattern=patterns.Dense(), block_mask=_RANDOM.random((1, H, 3, 3)) < 0.7, block_size=8
  ),
  "block_mask_of_rows": dict(
    pattern=patterns.Local(9), block_mask=_RANDOM.random((B, 1, 3, 3)) < 0.7, block_size=8
  ),
  "block_indices": dict(
    pattern=patterns.Local(15),
    block_indices=_LISTS[..., :2],
    block_size=8,
    query_block=4,
    Hkv=4,
    return_mass=True,
  ),
  "score_fn": dict(
    pattern=patterns.Fixed(6, 2, 2),
    score_fn=lambda x, i, j, h: x - (h + 1).astype(jnp.float32) * (i - j).astype(jnp.float32) / 8,
  ),
  "grouped": dict(pattern=patterns.PerHead((patterns.Local(4), patterns.Column(3))), Hkv=2),
  "lse": dict(pattern=patterns.Summary(5, 2), return_lse=True),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
QUICK = [
  ("union", "auto", "reference"),
  ("score_fn", "explicit", "xla"),
  ("grouped", "auto", "xla"),
  ("segments_of_keys", "auto", "xla"),
  ("segments_of_keys", "explicit", "reference"),
]
ALL = [(name, kind, to) for name in CASES for kind in KINDS for to in ("xla", "reference")]
SPEC = jax.P("x", None, "y")
COLLECTIVES = (
  r"(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast)"
)
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")


def make_mesh(kind: str) -> jax.sharding.Mesh:
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(KINDS[kind],) * 2)


def normal(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def arrays(Hkv=H, *, T=T, S=None):
  """q, k, v and the cotangent of the result, on the host."""
  shapes = (T, H), (S or T, Hkv), (S or T, Hkv), (T, H)
  return [normal(B, *shape, D, seed=seed) for seed, shape in enumerate(shapes)]


def laid(mesh, xs, *specs):
  """Arrays over a mesh, by one PartitionSpec for all or one each."""
  specs = specs if len(specs) > 1 else specs * len(xs)
  return [
    jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(xs, specs, strict=True)
  ]


def both(attend, q, k, v, dout):
  """The result and its gradients."""
  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def compiled(attend, *xs):
  return jax.jit(functools.partial(both, attend)).lower(*xs).compile()


def collectives(program) -> list[str]:
  return re.findall(rf" {COLLECTIVES}(?:-start)?\(", program.as_text())


def attend_with(implementation, *, Hkv=H, S=None, return_lse=False, return_mass=False, **how):
  how["implementation"] = implementation

  def attend(q, k, v):
    names = "segment_ids", "kv_segment_ids", "block_mask", "block_indices"
    masks = {name: jnp.asarray(how[name]) for name in names if name in how}
    if return_mass:
      out, lse, mass = sparse_attention(q, k, v, return_mass=True, **how | masks)
      return out * mass[..., :1] + jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]
    out = sparse_attention(q, k, v, return_lse=return_lse, **how | masks)
    if not return_lse:
      return out
    out, lse = out
    return out * jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None]

  return attend


def row_of_table(name: str, kind: str, implementation: str):
  """Collectives, shardings and the largest error of a case."""
  case = CASES[name]
  host = arrays(case.get("Hkv", H), S=case.get("S"))
  placed = laid(make_mesh(kind), host, SPEC)
  program = compiled(attend_with(implementation, **case), *placed)
  expected = jax.jit(functools.partial(both, attend_with("reference", **case)))(*host)
  for what, a, b in zip(("out", "dq", "dk", "dv"), program(*placed), expected, strict=True):
    assert_close(a, b, tolerance=1e-5, what=what)
  shardings = program.output_shardings
  same = all(x.sharding.is_equivalent_to(y, 4) for x, y in zip(placed, shardings, strict=True))
  return collectives(program), same


@pytest.mark.parametrize(
  ("name", "kind", "implementation"),
  [*QUICK, *(pytest.param(*x, marks=pytest.mark.slow) for x in ALL if x not in QUICK)],
)
def test_nothing_moves(name, kind, implementation):
  assert row_of_table(name, kind, implementation) == ([], True)


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_nothing_moves_where_blocks_are_chosen(kind):
  def attend(q, k):
    how = dict(block_size=4, query_block=2)
    lists = select_blocks(q, pool_blocks(k, 4), top=3, **how)
    return lists, sparse_attention(q, k, k, block_indices=lists, implementation="xla", **how)

  q, k, *_ = arrays(Hkv=4)
  placed = laid(make_mesh(kind), [q, k], SPEC)
  program = jax.jit(attend).lower(*placed).compile()
  assert not collectives(program)
  (lists, out), (expected, truth) = program(*placed), jax.jit(attend)(q, k)
  np.testing.assert_array_equal(lists, expected)
  assert_close(out, truth, tolerance=1e-5, what="out")


# ------------------------------------------------------------------------------- ways to call it


@pytest.mark.parametrize(
  ("kind", "spec"),
  [
    ("auto", jax.P(None, "x", None, "y")),
    pytest.param("explicit", jax.P("x", None, None, "y"), marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_with_a_mesh_in_the_context_remat_and_vmap(kind, spec):
  """The axis that vmap takes may be sharded too."""
  attend = attend_with("xla", pattern=patterns.Block(5))
  host, mesh = [np.stack([x, 2 * x, 3 * x, x]) for x in arrays()], make_mesh(kind)
  keep = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
  mapped = jax.vmap(jax.checkpoint(attend, policy=keep))
  with jax.set_mesh(mesh):
    placed = laid(mesh, host, spec)
    program = compiled(mapped, *placed)
    got = program(*placed)
  assert not collectives(program)
  assert all(x.sharding.is_equivalent_to(placed[0].sharding, 5) for x in got)
  expected = jax.jit(jax.vmap(functools.partial(both, attend)))(*host)
  for a, b in zip(got, expected, strict=True):
    assert_close(a, b, tolerance=1e-5, what=str(spec))


def test_arrays_that_are_placed_by_the_program_alone():
  """No argument of the program names the mesh."""
  attend, host, mesh = attend_with("xla", pattern=patterns.Local(5)), arrays(), make_mesh("auto")
  there = lambda *xs: both(attend, *(jax.lax.with_sharding_constraint(x, SPEC) for x in xs))
  with jax.set_mesh(mesh):
    program = jax.jit(there).lower(*host).compile()
    got = program(*host)
  assert not collectives(program)
  assert all(x.sharding.is_equivalent_to(jax.NamedSharding(mesh, SPEC), 4) for x in got)
  for a, b in zip(got, both(attend, *host), strict=True):
    assert_close(a, b, tolerance=1e-5, what="placed inside")


def test_forward_mode_of_the_reference():
  host, attend = arrays()[:3], attend_with("reference", pattern=patterns.Local(5))
  pushed = jax.jit(lambda *x: jax.jvp(attend, x, x)[1])
  got = pushed(*laid(make_mesh("auto"), host, SPEC))
  assert_close(got, pushed(*host), tolerance=1e-5, what="tangent")


@pytest.mark.parametrize("kind", [pytest.param("auto", marks=pytest.mark.slow), "explicit"])
def test_without_jit(kind):
  attend, host = attend_with("xla", pattern=patterns.Local(5)), arrays()[:3]
  placed = laid(make_mesh(kind), host, SPEC)
  out = attend(*placed)
  assert out.sharding.is_equivalent_to(placed[0].sharding, 4)
  assert_close(out, jax.jit(attend)(*host), tolerance=1e-6, what="out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_the_reference(kind):
  q, k, v, _ = arrays()
  attend = attend_with("reference", pattern=patterns.Local(5))
  first = lambda *x: jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum())(*x)
  second = jax.jit(jax.grad(lambda *x: (first(*x) ** 2).sum(), (0, 1, 2)))
  got, expected = second(*laid(make_mesh(kind), (q, k, v), SPEC)), second(q, k, v)
  for a, b in zip(got, expected, strict=True):
    assert_close(a, b, tolerance=1e-4, what=kind)


def test_arrays_that_lie_elsewhere_are_brought_there():
  """k and v on every device, and their gradients."""
  host, mesh = arrays(), make_mesh("explicit")
  placed = laid(mesh, host, SPEC, jax.P(), jax.P(), SPEC)
  attend = attend_with("xla", pattern=patterns.Local(5))
  got = jax.jit(functools.partial(both, attend))(*placed)
  for a, b in zip(got[:3], (placed[0], *placed[:2]), strict=True):  # out, dq, dk
    assert a.sharding.is_equivalent_to(b.sharding, 4)
  for a, b in zip(got, both(attend, *host), strict=True):
    assert_close(a, b, tolerance=1e-5, what="k on every device")


def test_one_device_has_the_program_that_it_has_without_a_mesh():
  host = arrays()
  mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
  attend = attend_with("xla", pattern=patterns.Local(5))
  traced = lambda *xs: str(jax.jit(functools.partial(both, attend)).trace(*xs).jaxpr)
  assert "custom_partitioning" not in traced(*laid(mesh, host, jax.P("x")))
  assert "custom_partitioning" in traced(*laid(make_mesh("auto"), host, SPEC))


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
  ("pattern", "Hkv", "kind", "message"),
  [
    (
      patterns.Fixed(6, 2, 3),
      H,
      "auto",
      r"H=8 heads over 2 devices \(mesh axes \('y',\)\) are 4 heads each, which must be a multiple "
      r"of 3, the heads after which pattern=Fixed\(.*\) repeats",
    ),
    (
      patterns.Dense(),
      1,
      "explicit",
      r"H=8 query heads .* 2 devices .* must divide the Hkv=1 heads of k",
    ),
  ],
  ids=["period", "key_heads"],
)
def test_heads_that_a_device_cannot_compute_alone(pattern, Hkv, kind, message):
  kv = jax.P("x") if Hkv == 1 else SPEC
  placed = laid(make_mesh(kind), arrays(Hkv), SPEC, kv, kv, SPEC)
  with pytest.raises(ValueError, match=message):
    jax.jit(attend_with("xla", pattern=pattern))(*placed[:3])


def test_query_heads_that_share_key_heads_with_other_devices_are_gathered(caplog):
  """2 key heads, which lie whole on every device, and 8 of queries over 4 devices."""
  partitioning._say_once.cache_clear()
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  host, kv = arrays(2), jax.P("x")
  attend = jax.jit(attend_with("xla", pattern=patterns.Local(5)))
  with caplog.at_level(logging.WARNING, logger="pallas_kernels.partitioning"):
    out = attend(*laid(mesh, host, SPEC, kv, kv, SPEC)[:3])
  (record,) = caplog.records
  assert "q [4, 24, 8, 8] along H" in record.message
  assert_close(out, attend(*host[:3]), tolerance=1e-6, what="gathered")


def test_heads_of_the_result_alone_are_no_error():
  """Each device computes all heads: a part of them is no whole period of the pattern."""
  mesh = make_mesh("auto")
  attend = attend_with("xla", pattern=patterns.Fixed(6, 2, 3))
  (*placed, _), where = laid(mesh, arrays(), jax.P("x")), jax.NamedSharding(mesh, SPEC)
  pinned = lambda *xs: jax.lax.with_sharding_constraint(attend(*xs), where)
  loss = lambda attend, *xs: (attend(*xs) ** 2).sum()
  grads = lambda attend, *xs: jax.jit(jax.value_and_grad(functools.partial(loss, attend)))(*xs)
  (got, dq), (expected, expected_dq) = grads(pinned, *placed), grads(attend, *arrays()[:3])
  assert_close(got, expected, tolerance=1e-6, what="loss")
  assert_close(dq, expected_dq, tolerance=1e-5, what="dq")


def test_axes_of_several_types_that_shard_attention_are_refused():
  mixed = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
  attend = attend_with("xla", pattern=patterns.Local(5))
  with pytest.raises(NotImplementedError, match=r"automatic axes \('y',\) may too"):
    jax.eval_shape(attend, *laid(mixed, arrays()[:3], jax.P("x")))
  inside = jax.shard_map(
    attend, mesh=make_mesh("explicit"), in_specs=jax.P("x"), out_specs=jax.P("x"), axis_names={"x"}
  )
  with pytest.raises(NotImplementedError, match=r"explicit axes \('y',\) shard q, k or v there"):
    jax.eval_shape(inside, *laid(make_mesh("explicit"), arrays()[:3], SPEC))


def test_kernels_for_tpus_leave_numbers_of_heads_that_may_be_sharded_to_xla():
  device = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
  mesh = AbstractMesh(
    (4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device
  )
  x = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16, sharding=jax.NamedSharding(mesh, SPEC))
  with jax.sharding.use_abstract_mesh(mesh):
    program = jax.jit(attend_with(None, **GPU_CASES["score_fn"])).trace(x, x, x).jaxpr
  assert api.implementations_in(program) == ("xla",)


def test_a_sharded_sequence_is_an_error_where_types_say_so():
  placed = laid(make_mesh("explicit"), arrays()[:3], jax.P("x", "y"))
  message = (
    r"mesh axes \('y',\) shard q \[4, 24, 8, 8\] along T, k .* along S, v .*: attention needs"
  )
  with pytest.raises(ValueError, match=message):
    jax.jit(attend_with("xla", pattern=patterns.Dense()))(*placed)


def test_a_sharded_sequence_is_gathered_with_one_line(caplog):
  partitioning._say_once.cache_clear()
  host = arrays()
  placed = laid(make_mesh("auto"), host, jax.P("x", "y"))
  attend = attend_with("xla", pattern=patterns.Dense())
  with caplog.at_level(logging.WARNING, logger="pallas_kernels.partitioning"):
    got = jax.jit(functools.partial(both, attend))(*placed)
  (record,) = caplog.records
  assert "q [4, 24, 8, 8] along T" in record.message
  assert "every device gathers them" in record.message
  for a, b in zip(got, both(attend, *host), strict=True):
    assert_close(a, b, tolerance=1e-5, what="gathered")


# ------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("kind", ["auto", pytest.param("explicit", marks=pytest.mark.slow)])
def test_the_layer_under_names_of_others(kind):
  """Heads by the columns of the weights: the projection back sums over them, and nothing else."""
  layer = SparseSelfAttention(
    width=32, num_heads=4, pattern=patterns.Fixed(6, 2, 2), rngs=nnx.Rngs(0)
  )
  graphdef, params = nnx.split(layer)
  x, mesh = normal(B, T, 32), make_mesh(kind)

  def where(path, weight):
    name = jax.tree_util.keystr(path)
    spec = jax.P("y", None) if "out" in name else jax.P(None, "y")
    spec = spec if weight.ndim == 2 else jax.P() if "out" in name else jax.P("y")
    return jax.device_put(weight, jax.NamedSharding(mesh, spec))

  def loss(params, x):
    y = nnx.merge(graphdef, params)(x)
    return (y**2).sum(), y

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  with jax.set_mesh(mesh):
    placed = jax.tree_util.tree_map_with_path(where, params), *laid(mesh, [x], jax.P("x"))
    forward = jax.jit(lambda *x: loss(*x)[1]).lower(*placed).compile()
    (_, y), grads = step(*placed)
  assert collectives(forward) == ["all-reduce"]
  assert y.sharding.is_equivalent_to(placed[1].sharding, 3)
  (_, expected_y), expected = step(params, x)
  assert_close(y, expected_y, tolerance=1e-5, what="layer")
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, tolerance=1e-4, what="gradient of a weight")


def test_the_layer_where_nothing_is_placed():
  layer = SparseSelfAttention(width=16, num_heads=2, pattern=patterns.Local(4), rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(layer)
  forward, x = lambda params, x: nnx.merge(graphdef, params)(x), normal(B, T, 16)
  expected = jax.jit(forward)(params, x)
  with jax.set_mesh(make_mesh("auto")):
    got = jax.jit(forward)(params, x)
  assert_close(got, expected, tolerance=1e-6, what="layer")


# ---------------------------------------------------------------------------- kernels for GPUs

GPU_PATTERNS = {
  "local": patterns.Local(128),
  "fixed": patterns.Fixed(128, 32, 2),
  "per_head": patterns.PerHead((patterns.Local(128), patterns.Column(128))),
  "union": patterns.Local(128) | patterns.Where(lambda i, j: j < 4),
}


GPU_CASES = {name: dict(pattern=pattern) for name, pattern in GPU_PATTERNS.items()}
GPU_CASES["score_fn"] = dict(
  pattern=patterns.Local(128), score_fn=lambda x, i, j, h: x - h.astype(jnp.float32)
)


@pytest.fixture
def asked_as_by_a_compiler(monkeypatch):
  """Automatic axes, lowered for devices that are not here: what the compiler would ask for."""

  def compiled(call, traced, *arrays):
    mesh, where = make_mesh("auto"), {"B": ("x",), "H": ("y",)}
    shaped = lambda x, names: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.NamedSharding(mesh, partitioning._spec(names, where))
    )
    results = jax.eval_shape(call.local, *arrays)
    _, local, out, into = call._partition(
      traced,
      mesh,
      tuple(map(shaped, arrays, call.operands)),
      tuple(map(shaped, results, call.results)),
    )
    specs = (tuple(x.spec for x in xs) for xs in (into, out))
    how = dict(zip(("in_specs", "out_specs"), specs, strict=True), check_vma=False)
    return jax.shard_map(local, **how)(*arrays)

  monkeypatch.setattr(partitioning._Call, "_compiled", compiled)


@pytest.mark.one_day_in_six(3)
@pytest.mark.parametrize(
  ("name", "kind"),
  [
    ("local", "auto"),
    pytest.param("score_fn", "explicit", marks=pytest.mark.slow),
    pytest.param("fixed", "explicit", marks=pytest.mark.slow),
    pytest.param("per_head", "auto", marks=pytest.mark.slow),
    pytest.param("per_head", "explicit", marks=pytest.mark.slow),
    pytest.param("union", "auto", marks=pytest.mark.slow),
    pytest.param("union", "explicit", marks=pytest.mark.slow),
  ],
)
def test_kernels_for_gpus_get_the_arrays_of_a_device(name, kind, asked_as_by_a_compiler):
  how = dict(axis_types=(KINDS[kind],) * 2, abstract_device=H100)
  mesh = AbstractMesh((4, 2), ("x", "y"), **how)
  sharding = jax.NamedSharding(mesh, SPEC)
  x = jax.ShapeDtypeStruct((4, 1000, 4, 64), jnp.bfloat16, sharding=sharding)
  attend = attend_with("mosaic_gpu", **GPU_CASES[name])
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(functools.partial(both, attend)).trace(x, x, x, x)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
  kernels = re.findall(r"custom_call @mosaic_gpu[^\n]*", program)
  assert len(kernels) >= 2
  assert not any("4x1000x4x64" in line for line in kernels)
  assert not re.search(r"stablehlo\.(all_|collective|reduce_scatter)", program)


@pytest.mark.parametrize(
  ("implementation", "kind"),
  [
    ("xla", "auto"),
    ("reference", "explicit"),
    pytest.param("xla", "explicit", marks=pytest.mark.slow),
    pytest.param("reference", "auto", marks=pytest.mark.slow),
  ],
)
def test_gradients_of_what_a_score_fn_holds_are_summed_over_devices(implementation, kind):
  """Slopes, one per head, by the heads' numbers; they lie whole on every device."""
  q, k, v, _ = host = arrays()
  slopes, scale = np.linspace(0.1, 0.8, H, dtype=np.float32), np.float32(0.3)

  def loss(slopes, scale, q, k, v):
    score_fn = lambda x, i, j, h: x - slopes[h] * (i - j).astype(jnp.float32)
    how = dict(score_fn=score_fn, scale=scale, pattern=patterns.Fixed(6, 2, 2))
    return (sparse_attention(q, k, v, implementation=implementation, **how) ** 2).sum()

  grad = jax.jit(jax.grad(loss, range(5)))
  mesh = make_mesh(kind)
  small = laid(mesh, (slopes, scale), jax.P())
  got = grad(*small, *laid(mesh, (q, k, v), SPEC))
  for a, b in zip(got, grad(slopes, scale, *host[:3]), strict=True):
    assert_close(a, b, tolerance=1e-4, what=f"{implementation}, {kind}")


@pytest.mark.parametrize("length", [pytest.param(256, marks=pytest.mark.slow), 200])
@pytest.mark.parametrize("name", GPU_PATTERNS)
def test_kernels_for_gpus_take_their_own_lse_from_the_natural_one(name, length):
  x = jnp.zeros((2, length, 4, 64), jnp.bfloat16)
  lse = jnp.asarray(normal(2, length, 4)).at[:, 0].set(-jnp.inf)
  plan, arrays = of_call(x, x, x, pattern=GPU_PATTERNS[name], scores=Scores(0.125))
  plan = mosaic_gpu.planned(plan)
  own = mosaic_gpu.lse_of_natural(plan, lse)
  _, expected = jax.eval_shape(lambda: mosaic_gpu.forward(plan, arrays))
  assert [x.shape for x in own] == [x.shape for x in expected]
  back = mosaic_gpu.natural_lse(plan, own)
  np.testing.assert_allclose(back, lse, rtol=1e-6)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  for case in ALL:
    moved, same = row_of_table(*case)
    print(f"{' '.join(case):40} collectives {moved or 'none':6} shardings {'kept' * same}")
