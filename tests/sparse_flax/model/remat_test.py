"""What the forward pass keeps, by kernels for another device, and what "auto" takes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import cli
from pallas_kernels import hardware
from sparse_flax.model import level_in
from sparse_flax.model import remat as remat_lib
from tests.helpers import jaxprs
from tests.helpers.models import initial_model

GB = 10**9
H100 = jax.sharding.AbstractDevice(
  device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
)
# How often a step of two layers runs the kernels of the forward pass.
KERNELS = {
  "full": dict(enter=4, window_forward=4, drop_add=6, widen=4),
  "attention": dict(enter=4, window_forward=2, drop_add=6, widen=4),
  "block": dict(enter=2, window_forward=2, drop_add=4, widen=4),
  "hidden": dict(enter=2, window_forward=2, drop_add=4, widen=2),
  "none": dict(enter=2, window_forward=2, drop_add=4, widen=2),
}


def step_by_kernels(remat):
  """The program of the gradients of two layers, by the kernels for an H100."""
  sizes = dict(width=256, seq_len=256, num_layers=2, stride=32, position_shape=(8, 32))
  of_blocks = dict(
    attention_layers=("local",), dropout=0.2, compute_dtype="bfloat16", implementation=None
  )
  auto = dict(axis_types=(jax.sharding.AxisType.Auto,), abstract_device=H100)
  mesh = jax.sharding.AbstractMesh((1,), ("x",), **auto)
  with jax.sharding.use_abstract_mesh(mesh):
    graphdef, params = nnx.split(
      nnx.eval_shape(lambda: initial_model(**sizes, **of_blocks, remat=remat)), nnx.Param
    )
    tokens, key = jax.ShapeDtypeStruct((1, 256), jnp.uint8), jax.random.key(0)
    run = lambda params, tokens: nnx.merge(graphdef, params)(tokens, dropout_key=key).sum()
    return jax.make_jaxpr(jax.grad(run))(params, tokens).jaxpr


@pytest.mark.one_day_in_three(2)
@pytest.mark.smoke("block", daily=1)
@pytest.mark.parametrize("remat", KERNELS)
def test_kernels_run_again_for_what_a_level_does_not_keep(remat):
  program = step_by_kernels(remat)
  # Functions that are jitted have names, too.
  kernels = (x for x in jaxprs.equations(program) if x.primitive.name != "jit")
  names = [x.params.get("name") for x in kernels]
  assert {name: names.count(name) for name in KERNELS[remat]} == KERNELS[remat]
  assert level_in(program) == remat
  # Barriers, behind which weights are copies, are where something is computed again.
  barred = [x for x in jaxprs.equations(program) if x.params.get("prevent_cse")]
  assert bool(barred) == (remat not in ("hidden", "none"))


# Of two layers, 256 tokens, 256 columns, in bfloat16: "hidden" keeps 10 such arrays of a layer.
@pytest.mark.parametrize(("arrays", "level"), [(None, "full"), (9.9, "block"), (10.1, "hidden")])
def test_auto_is_what_fits_the_device(arrays, level, monkeypatch):
  memory = arrays and int(arrays * 2 * 256 * 256 * 2 / remat_lib.SHARE)
  monkeypatch.setattr(hardware, "memory", lambda: memory)
  assert level_in(step_by_kernels("auto")) == level


# JAX takes three quarters of a GPU's memory.
@pytest.mark.parametrize(
  ("recipe", "sequences", "memory", "level"),
  [
    ("cifar10", 16, 105 * GB, "hidden"),
    ("enwik8", 8, 105 * GB, "hidden"),
    ("imagenet64", 16, 105 * GB, "block"),
    ("imagenet64", 4, 105 * GB, "hidden"),
    ("imagenet64", 128, 105 * GB, "full"),
    ("audio", 1, 105 * GB, "hidden"),
    ("audio", 8, 105 * GB, "attention"),
    ("cifar10", 16, 60 * GB, "hidden"),
    ("enwik8", 8, 60 * GB, "block"),
  ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_auto_of_the_recipes_on_an_h200_and_an_h100(recipe, sequences, memory, level, monkeypatch):
  monkeypatch.setattr(hardware, "memory", lambda: memory)
  model = cli.recipe(recipe).model
  E = model.width
  widths = remat_lib.Widths(E=E, Q=round(model.qk_ratio * E), V=E, F=round(model.ff_mult * E))
  column_bytes = 2 * sequences * model.seq_len * model.num_layers
  assert remat_lib.most_that_fits(widths, column_bytes) == level
