"""The training step of a recipe, as `sparse_flax.train` jits it, with random bytes for data."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from sparse_flax import sharding  # its old path: `steps` runs this with older packages too
from sparse_flax import train


class Training(NamedTuple):
  """What a config trains, jitted for its mesh and not yet compiled.

  Attributes:
    mesh: set it where the step is traced, and where it runs.
    first_state: () -> the state before the first step.
    step: (state, tokens, key) -> (state, record); gives up its state.
    tokens: () -> a batch, equal at every call.
    shapes: of the three arguments of the step.
  """

  mesh: jax.sharding.Mesh
  first_state: Callable[[], dict]
  step: Callable[..., Any]
  tokens: Callable[[], jax.Array]
  shapes: tuple[Any, ...]


def prepare(config: ml_collections.ConfigDict) -> Training:
  """Of a recipe: dropout, recomputation, the optimizer and averages are the config's."""
  init, step = train.make_step(config)
  mesh = sharding.make_mesh(**config.mesh)
  shapes = jax.eval_shape(init, jax.random.key(0))
  layout = sharding.by_rules(shapes, mesh)
  put = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  size = (config.data.batch_size, config.model.seq_len)
  batch = jax.ShapeDtypeStruct(size, jnp.uint8, sharding=sharding.by_batch(mesh))
  first_state = jax.jit(init, out_shardings=layout)
  values = np.random.RandomState(0).randint(0, 256, size).astype(np.uint8)
  return Training(
    mesh=mesh,
    first_state=lambda: first_state(jax.random.key(0)),
    step=getattr(train, "jit_step", _jit_step)(step, layout, mesh),
    tokens=lambda: sharding.place(lambda rows: values[rows], batch.sharding, size),
    shapes=(jax.tree.map(put, shapes, layout), batch, jax.eval_shape(lambda: jax.random.key(1))),
  )


def _jit_step(step: Callable, layout: Any, mesh: jax.sharding.Mesh) -> Callable:
  """What `train.jit_step` is, of packages that lack it: as their own runs jit a step."""
  options = getattr(train, "compiler_options", lambda mesh: {})(mesh)  # which the oldest lack
  outputs = (layout, sharding.replicated(mesh))
  return jax.jit(step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
