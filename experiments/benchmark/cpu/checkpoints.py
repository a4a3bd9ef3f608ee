"""How long a save with digests holds the training loop, and how long a restore takes.

The state is that of ImageNet-64's 152 M model: weights, two moments and averages, 2.4 GB of random
numbers. Each is done twice; the first one compiles the digests.
"""

import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp

from experiments import cli
from experiments.benchmark import report
from sparse_flax import train
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint


def run(out: pathlib.Path) -> None:
  """Prints the table and writes checkpoints_BACKEND.json."""
  print(__doc__, flush=True)
  config = cli.recipe("imagenet64")
  init, _ = train.make_step(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1)
  shapes = checkpoint.laid_out(shapes, sharding.by_rules(shapes, mesh))
  leaves, treedef = jax.tree.flatten(shapes)
  size = sum(x.size * x.dtype.itemsize for x in leaves)

  @jax.jit
  def random(key):
    keys = jax.random.split(key, len(leaves))
    return [
      jax.random.normal(k, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else
      jnp.zeros(x.shape, x.dtype)
      for k, x in zip(keys, leaves, strict=True)
    ]  # fmt: skip

  state = jax.block_until_ready(jax.tree.unflatten(treedef, random(jax.random.key(0))))
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    with checkpoint.Checkpoints(folder) as checkpoints:
      for step in (1, 2):
        state["step"] = jnp.int32(step)
        start = time.perf_counter()
        train.stop_if_not_finite(state, saved=0)  # as training does
        checkpoints.save(state)
        held = time.perf_counter() - start
        checkpoints.wait()
        written = time.perf_counter() - start
        rows.append(dict(what="save", turn=step, held_seconds=held, seconds=written))
    del state
    for turn in (1, 2):
      with checkpoint.Checkpoints(folder) as checkpoints:
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore_newest(shapes)[0])
        rows.append(dict(what="restore", turn=turn, seconds=time.perf_counter() - start))
  table = [
    (f"{row['what']} {row['turn']}", f"{row.get('held_seconds', 0):.1f}", f"{row['seconds']:.1f}")
    for row in rows
  ]
  report.print_table((f"{size / 1e9:.2f} GB", "loop held, s", "done after, s"), table)
  report.write(out / f"checkpoints_{jax.default_backend()}.json", rows, state_bytes=size)
