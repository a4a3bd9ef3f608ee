"""Gradients of the whole models of the recipes on a GPU, by the kernels, against float32.

Every weight is random and matters: as a model begins, its logits' kernel is zero, and so is every
other gradient. Kernels, and their products with the gains of norms, are numbers of bfloat16, so
that all programs have the same function to differentiate, and errors are those of arithmetic.

Rounding adds up along a stream in bfloat16: the same model by its modules, in bfloat16 too, tells
how much of an error is that of the dtype. `pytest -rP` prints the tables.
"""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import api
from pallas_kernels import residual
from sparse_flax import evaluate
from sparse_flax import model as model_lib

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
# Tokens of the one sequence; audio's are a quarter of its recipe's: float32 takes memory and time.
LENGTHS = {"cifar10": 3_072, "enwik8": 12_288, "imagenet64": 12_288, "audio": 16_384}
# Relative, Frobenius, of each leaf, and how much above the modules' where these have more.
BOUND, OVER_MODULES = 1e-2, 1.1
GAINS = (7 / 8, 1.0, 9 / 8)  # of 4 binary digits, as kernels are: products have 8, as bfloat16 has


def with_digits(x: np.ndarray, count: int) -> np.ndarray:
  """Rounded to `count` binary digits."""
  mantissa, exponent = np.frexp(x)
  return np.ldexp(np.round(mantissa * 2**count) / 2**count, exponent)


def weights_like(shapes: dict, num_layers: int) -> dict:
  """Kernels twice as large as the first ones, biases of an eighth of what they are added to."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    noise = rng.standard_normal(leaf.shape, np.float32)
    part, kind = name.split("/")[-2:]
    end = part in ("out", "down")  # of a branch: the stream is the sum of all
    std = 0.7 / math.sqrt(2 * num_layers) if end else 0.7
    if part == "logits":
      value = with_digits(0.02 * noise, 8)
    elif kind == "kernel":
      value = with_digits(std / math.sqrt(leaf.shape[-2]) * noise, 4)
    elif kind == "scale":
      value = rng.choice(GAINS, leaf.shape)
    elif "norm" in part:
      value = 0.05 * noise
    elif kind == "bias":
      value = with_digits(std / 8 * noise, 8)
    else:  # tables of bytes and positions
      value = with_digits(0.125 * noise, 8)
    return jnp.asarray(value, leaf.dtype)

  return jax.tree.map_with_path(fill, shapes)


def gradients(model: dict, params: dict, tokens, *, by: str) -> tuple[float, dict]:
  """Loss in nats per byte, and gradients, with dropout, by an implementation of the blocks."""
  graph, _ = model_lib.graph_and_shapes(**model)

  def loss(params):
    logits = nnx.merge(graph, params)(tokens, dropout_key=jax.random.key(3))
    return evaluate.token_nats(logits, tokens).mean()

  # Of all programs, for the logits: GPUs round operands of float32 to TF32 unless they are told.
  with residual.override(by), jax.default_matmul_precision("highest"):
    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    nats, grads = traced.lower().compile()(params)
  assert api.implementations_in(traced.jaxpr, "blocks") == (() if by == "modules" else (by,))
  return float(nats), grads


def errors(got: dict, expected: dict) -> dict[str, np.ndarray]:
  """Relative errors by leaf: that of the whole, and of leaves of layers that of each layer."""

  def norms(tree):
    def squares(path, x):
      of_layers = path[0].key == "groups"
      return jnp.square(x).sum(axis=tuple(range(1, x.ndim))) if of_layers else jnp.square(x).sum()

    sums = jax.tree.leaves_with_path(jax.device_get(jax.tree.map_with_path(squares, tree)))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): np.atleast_1d(np.asarray(x, np.float64)) for path, x in sums}

  off, sizes, result = norms(jax.tree.map(jnp.subtract, got, expected)), norms(expected), {}
  for name, squares in off.items():
    # A shift of all keys changes no softmax: what there is of it is rounding.
    of = sizes[name.replace("key/bias", "query/bias")]
    result[name] = np.sqrt([squares.sum() / of.sum(), *(squares / of)])
  return result


def table_of(kernels: dict[str, np.ndarray], modules: dict[str, np.ndarray]) -> str:
  width = max(map(len, kernels))
  lines = [f"{'leaf':<{width}}  kernels  modules  worst layer: kernels  modules"]
  for name, own in kernels.items():
    others = modules[name]
    worst = f"{own[1:].max():20.5f}  {others[1:].max():7.5f}" if len(own) > 2 else ""
    lines.append(f"{name:<{width}}  {own[0]:.5f}  {others[0]:.5f}  {worst}".rstrip())
  return "\n".join(lines)


@pytest.mark.promotes
@pytest.mark.parametrize("name", LENGTHS)
def test_gradients_of_a_whole_model(name):
  model = importlib.import_module(f"configs.{name}").get_config().model.to_dict()
  compare(name, model, LENGTHS[name])


def compare(name: str, model: dict, length: int, *, kernels: str = "mosaic_gpu") -> None:
  _, shapes = model_lib.graph_and_shapes(**model)
  params = weights_like(shapes, model["num_layers"])
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 256, (1, length)), jnp.uint8)
  assert model["dropout"] > 0
  exact = model | dict(compute_dtype="float32", implementation="xla")
  nats, expected = gradients(exact, params, tokens, by="modules")
  for key, x in jax.tree.leaves_with_path(expected):
    assert jnp.all(jnp.isfinite(x)) and jnp.any(x), jax.tree_util.keystr(key)
  off = {}
  for by in ("modules", kernels):
    loss, grads = gradients(model, params, tokens, by=by)
    print(f"{name} by {by}: {loss:.6f} nats, float32 {nats:.6f}")
    off[by] = errors(grads, expected)
    del grads
  own, modules = off[kernels], off["modules"]
  print(table_of(own, modules))
  over = {key: x[0] for key, x in own.items() if x[0] > max(BOUND, OVER_MODULES * modules[key][0])}
  assert not over, over
