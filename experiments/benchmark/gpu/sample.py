"""Sampling. On a GPU a step of the paper's models of images and text, with sparse and dense caches.

A step draws one byte for every sequence. Its floor is the time to read the weights, and what it
reads of the caches, once at the rate of a copy; beside it the kernels of a step, and what a small
kernel takes in a loop like this one. "triton": a few kernels per layer, "xla": none of ours.

On a CPU: whole pictures from the quickstart's model, and the time that computing the prefix again
for every byte would take.
"""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from sparse_flax import sample
from sparse_flax.model import levels
from sparse_flax.model import transformer

BATCH = {"cifar10": 64, "imagenet64": 16, "enwik8": 16, "cifar10:quick": 16}
PARTS = ("cifar10", "imagenet64", "enwik8")
# Whether caches are sparse, and the implementation of a step.
VARIANTS = (
  (True, "cluster"),
  (True, "triton"),
  (False, "cluster"),
  (False, "triton"),
  (True, "xla"),
)
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
  times = [ms for _, ms in timing.kernels_of(lambda: copy(x), CALLS)]
  return 2e3 * COPIED / statistics.median(times)


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
  num = len(timing.kernels_of(lambda: program(x)))
  assert num >= STEPS * groups * per_group, "small kernels were joined"
  return 1e3 * seconds(lambda: program(x)) / num


class Drawing(NamedTuple):
  """Steps of sampling, compiled.

  Attributes:
    start: key -> weights, and what the first step is given: last bytes and caches.
    run: (weights, that, keys, lengths of the prompts) -> (that, bytes [B, steps]); gives it up.
    model: with shapes in the place of weights.
  """

  start: Callable[[Array], tuple]
  run: Callable[..., tuple]
  model: transformer.SparseTransformer


def compiled(
  config: ml_collections.ConfigDict,
  batch: int,
  *,
  sparse: bool = True,
  implementation: str,
  first: int,
  steps: int,
  temperature: float = 1.0,
) -> Drawing:
  """Steps `first`, `first` + 1, ... of sampling, with random weights and caches without content.

  Args:
    config: of the model.
    batch: sequences.
    sparse: whether caches are.
    implementation: of a step.
    first: the number of the first step.
    steps: of a call.
    temperature: 0 takes the likeliest byte.
  """
  graph, shapes = transformer.graph_and_shapes(**config)
  model = nnx.merge(graph, shapes)

  def start(key):
    params = sample.as_multiplied(model, _random(shapes, key))
    caches = nnx.merge(graph, params).init_cache(batch, sparse=sparse)
    return params, (jnp.zeros(batch, jnp.uint8), caches)

  def run(params, carry, keys, lengths):
    options = dict(temperature=temperature, top_k=None, top_p=1.0, implementation=implementation)
    options |= dict(phase=first % levels.group_size(model))
    known = jnp.zeros((batch, steps), jnp.uint8)
    return sample.run_steps(graph, params, carry, keys, first, known, lengths, **options)

  sample.step_kernels(implementation)  # before anything is traced
  key, lengths = jax.random.key(0), jax.ShapeDtypeStruct((batch,), jnp.int32)
  keys = jax.eval_shape(lambda: jax.random.split(key, batch))
  begin = jax.jit(start).lower(key)
  program = jax.jit(run, donate_argnums=1).lower(*begin.out_info, keys, lengths)
  return Drawing(begin.compile(), program.compile(), model)


def timed(drawing: Drawing, batch: int) -> tuple[Callable[[], Array], Callable[[], tuple]]:
  """A function that runs its steps once more, and one that returns weights, bytes and caches."""
  params, carry = drawing.start(jax.random.key(0))
  keys, lengths = jax.random.split(jax.random.key(1), batch), jnp.zeros(batch, jnp.int32)

  def steps():
    nonlocal carry
    carry, tokens = drawing.run(params, carry, keys, lengths)
    return tokens

  jax.block_until_ready(steps())
  return steps, lambda: (params, *carry)


def measure(name: str, rate: float, *, sparse: bool, implementation: str) -> dict:
  """One row of the table, but for what other measurements give."""
  config, batch = cli.recipe(name).model, BATCH[name]
  how = dict(sparse=sparse, implementation=implementation)
  drawing = compiled(config, batch, first=config.seq_len // 2, steps=STEPS, **how)
  steps, state = timed(drawing, batch)
  params, _, caches = state()
  arrays = [(part.rows, x) for cache in caches for part in cache for x in (part.key, part.value)]
  reads = sum(x.nbytes * rows.size // rows.length for rows, x in arrays)
  weights = sum(x.nbytes for group in ("groups", "logits") for x in jax.tree.leaves(params[group]))
  ms = 1e3 * seconds(steps) / STEPS
  return dict(
    name=name,
    implementation="sparse" if sparse else "dense",
    step=implementation,
    batch=batch,
    ms_per_step=ms,
    floor_ms=1e3 * (weights + reads) / rate,
    launches=len(timing.kernels_of(steps)) / STEPS,
    weight_bytes=weights,
    cache_bytes=sum(x.nbytes for _, x in arrays),
    cache_bytes_read=reads,
    bytes_per_second=1e3 * batch / ms,
  )


def on_cpu() -> dict:
  """Pictures of the quickstart's model, beside computing their prefixes again."""
  name = "cifar10:quick"
  config, batch = cli.recipe(name).model, BATCH[name]
  graph, shapes = transformer.graph_and_shapes(**config)
  params = _random(shapes, jax.random.key(0))
  T, ends = config.seq_len, []
  draw = functools.partial(sample.generate, graph, params, key=jax.random.key(1), num=batch)
  draw(on_progress=lambda done, steps: ends.append((time.perf_counter(), done)))
  (first, begun), (last, _) = ends[0], ends[-1]  # the first piece has the compilation
  forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))
  half = jnp.zeros((batch, T // 2), jnp.uint8)  # the mean length of a prefix
  jax.block_until_ready(forward(params, half))
  row = dict(
    name=name,
    implementation="sparse",
    batch=batch,
    steps=T,
    seconds=(last - first) * T / (T - begun),
    seconds_of_prefixes=T * seconds(lambda: forward(params, half)),
  )
  return row | dict(faster=row["seconds_of_prefixes"] / row["seconds"])


def _random(shapes: dict, key: Array) -> dict:
  """Weights that make no logits alike, and of which all layers change the stream."""
  keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))

  def draw(path, x):
    values = jax.random.normal(next(keys), x.shape, x.dtype)
    name = path[-1].key
    if name == "kernel":
      return values * x.shape[-2] ** -0.5
    return (1.0 if name == "scale" else 0.0) + 0.1 * values

  return jax.tree.map_with_path(draw, shapes)


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Prints the table and writes sample_DEVICE.json."""
  print(__doc__, flush=True)
  if jax.default_backend() != "gpu":
    row = on_cpu()
    print(
      f"{row['name']}: {row['batch']} x {row['steps']:,} bytes in {row['seconds']:.2f} s, "
      f"{row['faster']:,.0f} x faster than with prefixes computed again"
    )
    report.write(out / "sample_cpu.json", [row])
    return True
  rate = copy_rate()
  launch = launch_ms(groups=32)
  print(f"copy {rate / 1e12:.2f} TB/s, a small kernel {1e3 * launch:.2f} us", flush=True)
  rows = []
  for name in timing.chosen(PARTS, only):
    for sparse, step in VARIANTS:
      row = measure(name, rate, sparse=sparse, implementation=step) | dict(launch_ms=launch)
      row["bound_ms"] = row["floor_ms"] + row["launches"] * launch
      rows.append(row)
      print(f"  {row}", flush=True)
  table = [
    (
      f"{row['name']} x {row['batch']} {row['implementation']}, {row['step']}",
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
