"""Where a state lies, what a step moves between devices, and the step under jax.pmap."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from configs import cifar10
from experiments.benchmark.gpu import traffic
from pallas_kernels import api
from pallas_kernels import residual
from sparse_flax import evaluate
from sparse_flax import train
from sparse_flax.model import transformer
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from tests.helpers import tiny

pytestmark = pytest.mark.promotes


def test_rules_cut_the_matrices_of_a_real_model_and_all_that_is_named_like_them():
  config = cifar10.get_config()
  init, _ = train.make_step(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, sequence=1)
  layout = sharding.by_rules(shapes, mesh)
  share = lambda tree: (
    sum(
      math.prod(where.shard_shape(x.shape))
      for x, where in zip(jax.tree.leaves(shapes[tree]), jax.tree.leaves(layout[tree]), strict=True)
    )
    / sum(x.size for x in jax.tree.leaves(shapes[tree]))
  )
  assert 1 / 8 < share("params") < 0.14
  assert share("ema") == share("params")
  assert share("opt") == pytest.approx(share("params"), rel=1e-3)
  query = layout["opt"][1].mu["groups"][0]["attention"]["query"]["kernel"].spec
  assert query == jax.P(None, "fsdp", "tensor")
  down = layout["params"]["groups"][0]["feed_forward"]["down"]["kernel"].spec
  assert down == jax.P(None, "tensor", "fsdp")
  assert layout["step"].spec == jax.P()


def test_an_axis_that_does_not_come_out_even_is_not_cut():
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, sequence=1)
  shapes = {"query": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}
  assert sharding.by_rules(shapes, mesh)["query"]["kernel"].spec == jax.P(None, "tensor")


def test_rows_are_read_once_and_dealt_out():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=1, sequence=2)
  whole, asked = np.arange(8 * 6, dtype=np.uint8).reshape(8, 6), []
  read = lambda rows: asked.append(rows) or whole[rows]
  placed = sharding.place(read, sharding.by_batch(mesh), whole.shape)
  np.testing.assert_array_equal(placed, whole)
  np.testing.assert_array_equal(asked, [range(8)])
  assert placed.addressable_shards[0].data.shape == (2, 3)


# ---------------------------------------------------------------------------- bytes between devices


def step_bytes(mesh: tuple[int, ...], layers: tuple[str, ...], **model) -> tuple:
  """The config, and {kind: bytes} that a device receives in one step."""
  model = dict(attention_layers=layers, num_layers=2 * len(layers), num_heads=4, **model)
  model |= dict(implementation="reference", compute_dtype="float32", dropout=0.0, remat="full")
  mesh = dict(zip(sharding.AXES, mesh, strict=True))
  config = tiny.config("none", model=model, mesh=mesh, data=dict(batch_size=8))
  init, step = train.make_step(config)
  mesh = sharding.make_mesh(**config.mesh)
  shapes = jax.eval_shape(init, jax.random.key(0))
  layout = sharding.by_rules(shapes, mesh)
  shape = (config.data.batch_size, config.model.seq_len)
  tokens = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding.by_batch(mesh))
  with jax.set_mesh(mesh):
    program = jax.jit(step, out_shardings=(layout, sharding.replicated(mesh)))
    lowered = program.lower(checkpoint.laid_out(shapes, layout), tokens, jax.random.key(0))
    return config, traffic.bytes_moved(lowered.compile().as_text())


ALL = ("local", "column", "strided", "fixed")


@pytest.mark.one_day_in_six(2)
@pytest.mark.parametrize(
  ("mesh", "layers"),
  [
    ((1, 2, 2, 2), ALL),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        ((2, 1, 1, 1), ("fixed",)),
        ((4, 1, 1, 1), ("fixed",)),
        ((1, 2, 1, 1), ("fixed",)),
        ((1, 4, 1, 1), ("fixed",)),
        ((2, 2, 1, 1), ("fixed",)),
        ((1, 1, 2, 1), ("local",)),
        ((1, 1, 4, 1), ("local",)),
        *(((1, 1, 1, n), (name,)) for name in ALL for n in (2, 4)),
      ]
    ),
  ],
  ids=str,
)
def test_a_step_moves_what_the_formula_says(mesh, layers):
  config, moved = step_bytes(mesh, layers)
  assert moved == traffic.formula(config)


@pytest.mark.one_day_in_six(0)
@pytest.mark.smoke("modules-(2, 2, 2, 1)", "xla-(2, 2, 1, 2)", daily=0)
@pytest.mark.parametrize("mesh", [(2, 2, 2, 1), (1, 2, 1, 4), (2, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("blocks", ["modules", "xla"])
def test_a_step_with_dropout_is_that_of_one_device(mesh, blocks):
  """Also the masks, which every device makes for its own share."""
  model = dict(num_heads=4, num_layers=2, attention_layers=("local",), dropout=0.3)
  records = []
  for axes in ((1, 1, 1, 1), mesh):
    axes = dict(zip(sharding.AXES, axes, strict=True))
    config = tiny.config("none", model=model, mesh=axes, data=dict(batch_size=8))
    init, step = train.make_step(config)
    mesh = sharding.make_mesh(**config.mesh)
    layout = sharding.by_rules(jax.eval_shape(init, jax.random.key(0)), mesh)
    tokens = np.random.RandomState(0).randint(97, 123, (8, 32)).astype(np.uint8)
    with jax.set_mesh(mesh), residual.override(blocks):
      state = jax.jit(init, out_shardings=layout)(jax.random.key(0))
      program = jax.jit(step, out_shardings=(layout, sharding.replicated(mesh)))
      tokens = jax.device_put(tokens, sharding.by_batch(mesh))
      for _ in range(3):
        state, record = program(state, tokens, jax.random.key(1))
        records.append((float(record["loss"]), float(record["grad_norm"])))
  np.testing.assert_allclose(records[3:], records[:3], rtol=2e-5)
  assert records[2][0] < records[0][0]


def test_rows_are_sharded_by_our_meshes_alone():
  rows = (("data", "fsdp"), ("sequence",))
  for shape, expected, on_a_device in (
    ((2, 2, 1, 2), rows, (8 * 6 // 8, 6 * 6 // 2, 8 * 7 // 4)),
    ((1, 1, 1, 8), rows, (8 * 6, 6 * 6, 8 * 7)),
    ((2, 2, 2, 1), (), (8 * 6, 6 * 6, 8 * 7)),
  ):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape, strict=True)))
    with jax.set_mesh(mesh):
      assert sharding.row_axes() == expected
      lengths = (8, 6), (6, 6), (8, 7)  # all even, B or T not divided by its axes
      assert tuple(sharding.rows_on_a_device(*x) for x in lengths) == on_a_device
      inside = []
      jax.shard_map(
        lambda x: inside.append(sharding.row_axes()) or x,
        in_specs=jax.P(),
        out_specs=jax.P(),
        check_vma=False,
      )(jnp.ones(1))
      assert inside == [()]
  assert sharding.row_axes() == ()
  with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))):
    assert sharding.row_axes() == ()


@pytest.mark.one_day_in_six(3)
def test_a_step_on_a_mesh_of_gpus_has_the_kernels():
  config = cifar10.get_config()
  with config.unlocked():
    config.model.update(num_layers=1, attention_layers=("local",), remat="none")
    config.data.batch_size = 4
  init, step = train.make_step(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  mesh = jax.sharding.AbstractMesh(
    (2, 2, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=device
  )
  layout = sharding.by_rules(shapes, mesh)
  tokens = jax.ShapeDtypeStruct((4, 3_072), jnp.uint8, sharding=sharding.by_batch(mesh))
  with jax.sharding.use_abstract_mesh(mesh), residual.override("mosaic_gpu"):
    program = jax.jit(step, out_shardings=(layout, sharding.replicated(mesh)))
    traced = program.trace(checkpoint.laid_out(shapes, layout), tokens, jax.random.key(0))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert api.implementations_in(traced.jaxpr, "blocks") == ("mosaic_gpu",)
  assert text.count("custom_call @mosaic_gpu") >= 9  # of the blocks seven, and of attention two
  # One sequence of 4 in a device, half of its tokens.
  assert "tensor<1536x256xbf16>" in text and "tensor<12288x256xbf16>" not in text


# ------------------------------------------------------------------------------------------- pmap


@pytest.mark.one_day_in_six(4)
def test_three_steps_under_pmap_lose_what_the_jitted_step_loses(tmp_path):
  """Who has pmap may keep it: the modules are plain functions of their arrays."""
  config = tiny.config(tmp_path / "none", model=dict(dropout=0.0), data=dict(batch_size=8))
  init, step = train.make_step(config)
  state = init(jax.random.key(0))
  batches = np.random.RandomState(0).randint(97, 123, (3, 8, 32)).astype(np.uint8)

  jitted, expected = jax.jit(step), []
  now = state
  for tokens in batches:
    now, record = jitted(now, tokens, jax.random.key(1))
    expected.append(float(record["loss"]))

  graphdef, _ = transformer.graph_and_shapes(**config.model)
  tx, _ = train.optimizer_of(config)

  def one_device(params, opt, tokens):
    def loss_fn(params):
      return evaluate.token_nats(nnx.merge(graphdef, params)(tokens), tokens).mean()

    loss, grads = jax.lax.pmean(jax.value_and_grad(loss_fn)(params), "batch")
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  devices = jax.devices()[:4]
  params, opt = jax.tree.map(lambda x: jnp.stack([x] * 4), (state["params"], state["opt"]))
  mapped, got = jax.pmap(one_device, axis_name="batch", devices=devices), []
  for tokens in batches:
    params, opt, loss = mapped(params, opt, tokens.reshape(4, 2, 32))
    got.append(float(loss[0]))
  assert got == pytest.approx(expected, rel=1e-6)
