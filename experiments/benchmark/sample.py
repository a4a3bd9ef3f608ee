"""Sampling from the paper's image models on a GPU: a step with sparse and with dense caches.

A step draws one byte for every sequence. Its floor is the time to read the weights and what it
reads of the caches once, at the rate of a copy; beside it the kernels of a step, and what a small
kernel takes in a loop like this one.
"""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from experiments import cli
from experiments.benchmark import gpu
from experiments.benchmark import report
from sparse_flax import sample
from sparse_flax import transformer

BATCH = {"cifar10": 64, "imagenet64": 16}
PARTS = tuple(BATCH)
STEPS = 128  # of a call that is timed
CALLS = 7
COPIED = 2**30  # bytes


def seconds(call: Callable[[], Array]) -> float:
  """Median time of a call, until its result is there."""
  times = []
  for _ in range(CALLS):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def copy_rate() -> float:
  """Bytes read and written per second by a large copy."""
  x = jnp.zeros(COPIED // 4, jnp.float32)
  copy = jax.jit(lambda x: -x)
  jax.block_until_ready(copy(x))
  return 2 * COPIED / seconds(lambda: copy(x))


def launch_ms(groups: int) -> float:
  """Time of a small kernel that needs the one before it, in the two loops of sampling."""
  per_group = 64

  def body(x, _):
    for _ in range(per_group):
      x = jax.lax.optimization_barrier(x + 1.0)
    return x, None

  def loops(x):
    step = lambda x, _: (jax.lax.scan(body, x, length=groups)[0], None)
    return jax.lax.scan(step, x, length=STEPS)[0]

  x = jnp.zeros((64, 256))
  program = jax.jit(loops).lower(x).compile()
  num = len(gpu.kernels_of(lambda: program(x)))
  assert num >= STEPS * groups * per_group, "small kernels were joined"
  return 1e3 * seconds(lambda: program(x)) / num


def measure(name: str, *, sparse: bool, rate: float) -> dict:
  """One row of the table, but for what other measurements give."""
  config, batch = cli.recipe(name).model, BATCH[name]
  graph, shapes = transformer.graph_and_shapes(**config)
  model = nnx.merge(graph, shapes)

  @jax.jit
  def start(key):
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))
    draw = lambda x: 0.02 * jax.random.normal(next(keys), x.shape, x.dtype)
    params = sample.as_multiplied(model, jax.tree.map(draw, shapes))
    model_ = nnx.merge(graph, params)
    return params, (jnp.zeros(batch, jnp.uint8), model_.init_cache(batch, sparse=sparse))

  how = dict(temperature=1.0, top_k=None, top_p=1.0, implementation=sample.best())
  run = jax.jit(functools.partial(sample.run_steps, graph, **how), donate_argnums=1)
  params, carry = start(jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), batch)
  known, lengths = jnp.zeros((batch, STEPS), jnp.uint8), jnp.zeros(batch, jnp.int32)

  def steps():
    nonlocal carry
    carry, tokens = run(params, carry, keys, model.seq_len // 2, known, lengths)
    return tokens

  jax.block_until_ready(steps())
  parts = [part for cache in carry[1] for part in cache]
  reads = sum(
    x.nbytes * part.rows.size // part.rows.length for part in parts for x in (part.key, part.value)
  )
  weights = sum(x.nbytes for group in ("groups", "logits") for x in jax.tree.leaves(params[group]))
  ms = 1e3 * seconds(steps) / STEPS
  return dict(
    name=name,
    implementation="sparse" if sparse else "dense",
    batch=batch,
    ms_per_step=ms,
    floor_ms=1e3 * (weights + reads) / rate,
    launches=len(gpu.kernels_of(steps)) / STEPS,
    weight_bytes=weights,
    cache_bytes=sum(x.nbytes for x in jax.tree.leaves(carry[1])),
    cache_bytes_read=reads,
    bytes_per_second=batch / ms * 1e3,
  )


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Prints the table and writes sample_DEVICE.json."""
  print(__doc__, flush=True)
  rate = copy_rate()
  launch = launch_ms(groups=32)
  print(f"copy {rate / 1e12:.2f} TB/s, a small kernel {1e3 * launch:.2f} us", flush=True)
  rows = []
  for name in gpu.chosen(PARTS, only):
    for sparse in (True, False):
      row = measure(name, sparse=sparse, rate=rate) | dict(launch_ms=launch)
      row["bound_ms"] = row["floor_ms"] + row["launches"] * launch
      rows.append(row)
      print(f"  {row}", flush=True)
  table = [
    (
      f"{row['name']} x {row['batch']} {row['implementation']}",
      f"{row['ms_per_step']:.3f}",
      f"{row['floor_ms']:.3f}",
      f"{row['ms_per_step'] / row['floor_ms']:.1f}",
      f"{row['launches']:,.0f}",
      f"{row['ms_per_step'] / row['bound_ms']:.2f}",
      f"{row['bytes_per_second']:,.0f}",
      f"{row['cache_bytes'] / 2**30:.2f}",
    )
    for row in rows
  ]
  header = ("sampling", "ms", "floor", "x floor", "kernels", "x both", "bytes/s", "cache GiB")
  report.print_table(header, table)
  report.write(out / f"sample_{report.short_device()}.json", rows, copy_bytes_per_second=rate)
  return True
