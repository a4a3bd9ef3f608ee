"""Layers and models that choose their blocks, as `learned` measures them: memory, steps, decoding.

A process for each program: the peak of what an allocator held is that of its process.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array

from experiments import cli
from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import drawn
from sparse_flax import LearnedSelfAttention
from sparse_flax import sample
from sparse_flax import train
from sparse_flax.model import learned
from sparse_flax.model import transformer

OURS = "mosaic"  # part of the names of our kernels, as in steps.ours
SECONDS = 0.25  # of calls whose kernels are timed: long ones are fewer
CALLS = 20  # at most
LONG = 1_048_576  # tokens of a layer, and of a step
WIDTH, HEADS, HEAD_SIZE = 512, 8, 64
RECIPES = {
  "moba": learned.Moba(query_block=128),
  "nsa": learned.Nsa(block_size=256, query_block=128),  # T / 256 keys are pooled
  "indexer": learned.Indexer(query_block=128),
}
WITH_LOSS = "indexer, with its loss"
STEP_LAYERS = 4
DECODED, BATCH, DECODE_LAYERS = 32_768, 8, 8
DECODE_STEPS = 128  # of a call
DENSE_STEPS = ("cluster", "triton", "xla")  # implementations of a step with dense caches


# ------------------------------------------------------------------------------------------ clocks


def clock_kernels(program: jax.stages.Compiled, *arrays: Any) -> dict[str, Any]:
  """A clock of `timing.Job`: ms of all kernels of a call, and of ours among them."""
  call = lambda: program(*arrays)
  jax.block_until_ready(call())
  begin = time.perf_counter()
  jax.block_until_ready(call())
  times = max(1, min(CALLS, int(SECONDS / (time.perf_counter() - begin))))
  calls = timing.calls_of(call, times)
  median = lambda chosen: statistics.median(
    sum(ms for name, ms in kernels if chosen(name)) for kernels in calls
  )
  return dict(
    ms=median(lambda name: True),
    attention_ms=median(lambda name: OURS in name),
    num_kernels=len(calls[0]),
    kernels=list(dict.fromkeys(name[:80] for name, _ in calls[0])),
  )


def clock(program: jax.stages.Compiled, *arrays: Any) -> dict[str, Any]:
  """And from the beginning of a call to its end, with what the host does between kernels."""
  figures, seconds = clock_kernels(program, *arrays), []
  while not seconds or (sum(seconds) < SECONDS and len(seconds) < CALLS):
    begin = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    seconds.append(time.perf_counter() - begin)
  return figures | dict(wall_ms=round(1e3 * statistics.median(seconds), 5))


def clock_and_peak(program: jax.stages.Compiled, *arrays: Any) -> dict[str, Any]:
  """And the most bytes that were in use, which only one program of a process can tell."""
  before = peak_bytes()
  results = jax.block_until_ready(program(*arrays))
  peak = peak_bytes()
  if peak <= before:
    raise RuntimeError(f"its arrays alone had a peak of {before:,} bytes, and it has no higher one")
  losses = [x for x in jax.tree.leaves(results) if _is_loss(x)]
  told = dict(losses_are_finite=all(map(jnp.isfinite, losses))) if losses else {}
  del results, losses
  return clock(program, *arrays) | dict(peak_bytes=peak) | told


def _is_loss(x: Array) -> bool:
  return x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)


def peak_bytes() -> int:
  """Of the first device, since this process began."""
  stats = jax.local_devices()[0].memory_stats()
  if not stats:
    raise RuntimeError("the allocator of this device counts no bytes")
  return stats["peak_bytes_in_use"]


def _spread(x: jax.ShapeDtypeStruct, seed: int) -> Array:
  """Numbers in [-1, 1) that look random, made one by one: random bits would need room."""
  n = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    n = (n + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)) * jnp.uint32(2_654_435_761)
    n = n ^ (n >> 15) ^ jnp.uint32(seed)
  n = (n * jnp.uint32(2_246_822_519)) >> 8
  return (n.astype(jnp.float32) * 2.0**-23 - 1.0).astype(x.dtype)


# ------------------------------------------------------------------------------------------ layers


def layer_of(name: str) -> LearnedSelfAttention:
  return LearnedSelfAttention(
    width=WIDTH, num_heads=HEADS, recipe=RECIPES[name], dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )


def projected(name: str) -> Any:
  """The shapes of what a layer projects; where keys are scored as they are, they stand once."""
  x = jax.ShapeDtypeStruct((1, LONG, WIDTH), jnp.bfloat16)
  given = jax.eval_shape(layer_of(name)._given, x)
  return given if name == "indexer" else given._replace(query=None, key=None)


def build_layer(name: str, with_loss: bool) -> tuple[Callable, Callable]:
  """(parameters, projections, dout) -> the result and all gradients."""
  shapes = projected(name)
  graphdef, params = nnx.split(layer_of(name), nnx.Param)
  params = nnx.to_pure_dict(params)

  def attend(params, given):
    if given.query is None:
      given = given._replace(query=given.q, key=given.k)
    layer = nnx.merge(graphdef, params)
    return layer._attended(given, None, RECIPES[name].top, with_loss)

  def both(params, given, dout):
    (out, losses), vjp = jax.vjp(attend, params, given)
    return out, losses, vjp((dout, jax.tree.map(jnp.ones_like, losses)))

  def make():
    leaves, tree = jax.tree.flatten((shapes, shapes.q))
    return params, *tree.unflatten(_spread(x, n) for n, x in enumerate(leaves))

  return both, make


def counted(name: str) -> dict[str, int]:
  """Bytes that a layer's forward and backward pass cannot do without.

  `counted_bytes`: q, k, v, out, their gradients, log-sum-exp, indices and lists of tiles, by
  queries and by keys; of `nsa` an out and its gradient for each branch. `projected_bytes`: what is
  projected beside q, k and v, and its gradient.
  """
  given, recipe = projected(name), RECIPES[name]
  size = lambda x: 0 if x is None else x.size * x.dtype.itemsize
  branches = 3 if isinstance(recipe, learned.Nsa) else 1
  arrays = size(given.q) + size(given.k) + (1 + branches) * size(given.v)
  num_lists = recipe.num_lists(HEADS, HEADS)
  indices = num_lists * -(-LONG // recipe.query_block) * recipe.top
  tiles = HEADS * -(-LONG // drawn.TILE) * recipe.top * -(-recipe.block_size // drawn.TILE)
  lse = HEADS * LONG
  others = sum(map(size, (given.query, given.key, given.mix, given.gates)))
  return dict(
    counted_bytes=2 * arrays + 4 * (lse + indices + 2 * tiles), projected_bytes=2 * others
  )


# ------------------------------------------------------------------------------------------ models


def config_of(name: str, layers: tuple[str, ...], T: int, num: int) -> ml_collections.ConfigDict:
  """enwik8's recipe with other layers, so many of them, and sequences of another length."""
  config = cli.recipe("enwik8:dense" if name == "dense" else f"enwik8:{name}")
  config.model.update(
    attention_layers=layers, seq_len=T, num_layers=num, position_shape=(T // 128, 128)
  )
  config.model.update(width=WIDTH, num_heads=HEADS, learned_stages=())
  config.model.learned.update(dataclasses.asdict(RECIPES[name]) if name in RECIPES else {})
  return config


def build_step(name: str) -> tuple[Callable, Callable]:
  """The training step of one sequence; the state is not given up."""
  config = config_of(name, ("local", name), LONG, STEP_LAYERS)
  init, step = train.make_step(config)

  def make():
    tokens = jax.lax.broadcasted_iota(jnp.uint32, (1, LONG), 1) * jnp.uint32(2_654_435_761)
    return init(jax.random.key(0)), (tokens >> 24).astype(jnp.uint8), jax.random.key(1)

  return step, make


def build_decode(name: str, implementation: str) -> tuple[Callable, Callable]:
  """Steps from the middle on, with caches that are made where they begin."""
  config = config_of(name, (name,), DECODED, DECODE_LAYERS).model
  graph, shapes = transformer.graph_and_shapes(**config)
  options = dict(temperature=1.0, top_k=None, top_p=1.0, implementation=implementation)

  def steps(params, keys, known):
    caches = nnx.merge(graph, params).init_cache(BATCH, sparse=False)
    carry, lengths = (jnp.zeros(BATCH, jnp.uint8), caches), jnp.zeros(BATCH, jnp.int32)
    return sample.run_steps(graph, params, carry, keys, DECODED // 2, known, lengths, **options)[1]

  def make():
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten(0.03 * _spread(x, n) for n, x in enumerate(leaves))
    params = sample.as_multiplied(nnx.merge(graph, shapes), params)
    keys = jax.random.split(jax.random.key(1), BATCH)
    return params, keys, jnp.zeros((BATCH, DECODE_STEPS), jnp.uint8)

  return steps, make


# -------------------------------------------------------------------------------------------- rows


def jobs_of(parts: list[str], recipes: list[str]) -> dict[tuple[str, str, str], timing.Job]:
  """By part, model and implementation."""
  jobs = {}
  for name in recipes:
    own = dict(clock=clock_and_peak, alone=True)
    if "memory" in parts:
      jobs["memory", name, ""] = timing.Job(build_layer, (name, False), 3.0, **own)
      if name == "indexer":
        jobs["memory", WITH_LOSS, ""] = timing.Job(build_layer, (name, True), 3.0, **own)
    if "step" in parts:
      jobs["step", name, ""] = timing.Job(build_step, (name,), 8.0, **own)
    if "decode" in parts:
      jobs["decode", name, "xla"] = timing.Job(build_decode, (name, "xla"), clock=clock, alone=True)
  for by in DENSE_STEPS if "decode" in parts else ():
    jobs["decode", "dense", by] = timing.Job(build_decode, ("dense", by), clock=clock, alone=True)
  return jobs


def measure(parts: list[str], recipes: list[str]) -> list[dict[str, Any]]:
  """The rows of these parts, without what compares them."""
  jobs, rows = jobs_of(parts, recipes), []
  with timing.measuring(jobs) as measured:
    progress = timing.Progress(len(jobs))
    for (part, model, by), job in jobs.items():
      result = measured((part, model, by))
      row = dict(part=part, model=model, implementation=by or None, ms=None)
      if result.error is None:
        row |= figures(part, job.args[0], result)
      elif result.error.startswith("NotImplementedError: "):
        row |= dict(unsupported=result.error.partition(": ")[2])
      else:
        row |= dict(error=result.error)
      rows.append(row)
      progress(part, model, by, result.error or f"{row['ms']} ms")
  return rows


def figures(part: str, name: str, result: timing.Measurement) -> dict[str, Any]:
  """What a row tells, of a measurement."""
  row = dict(ms=round(result.ms, 4), **result.more, **result.bytes, kernels=list(result.kernels))
  if part == "decode":
    ms = round(row["wall_ms"] / DECODE_STEPS, 5)
    of = dict(seq_len=DECODED, batch=BATCH, num_layers=DECODE_LAYERS, ms_per_step=ms)
    return row | of | dict(bytes_per_second=round(1e3 * BATCH / ms))
  row |= dict(seq_len=LONG, tokens_per_second=round(1e3 * LONG / row["wall_ms"]))
  if part == "step":
    return row | dict(num_layers=STEP_LAYERS)
  row |= counted(name)
  used = row["peak_bytes"] - row["projected_bytes"]
  return row | dict(peak_ratio=round(used / row["counted_bytes"], 4))


def compare(rows: list[dict[str, Any]]) -> None:
  """Adds how many times more bytes per second layers that choose decode than dense caches do:
  than the fastest way, and than the same, XLA."""
  decoded = [row for row in rows if row["part"] == "decode" and row["ms"]]
  dense = {row["implementation"]: row for row in decoded if row["model"] == "dense"}
  for row in decoded:
    if row["model"] == "dense" or not dense:
      continue
    best = max(each["bytes_per_second"] for each in dense.values())
    row["over_dense"] = round(row["bytes_per_second"] / best, 3)
    if "xla" in dense:
      of = dense["xla"]["bytes_per_second"]
      row["over_dense_by_xla"] = round(row["bytes_per_second"] / of, 3)


def print_tables(rows: list[dict[str, Any]]) -> None:
  """Of the rows that have figures."""
  of = lambda *parts: [row for row in rows if row["part"] in parts and row["ms"]]
  if long := of("memory", "step"):
    gb = lambda row, name: f"{row[name] / 1e9:.2f}" if name in row else ""
    ratio = lambda row: f"{row['peak_ratio']:.3f}" if "peak_ratio" in row else ""
    table = [
      (f"{row['part']}, {row['model']}", f"{row['seq_len']:,}", f"{row['wall_ms']:,.1f}",
       f"{row['ms']:,.1f}", f"{row['attention_ms']:,.1f}", gb(row, "peak_bytes"),
       gb(row, "projected_bytes"), gb(row, "counted_bytes"), ratio(row))
      for row in long
    ]  # fmt: skip
    header = ("forward + backward", "tokens", "ms", "kernels", "of them ours", "peak, GB")
    report.print_table((*header, "projected", "counted", "peak / counted"), table)
  if decoded := of("decode"):
    times = lambda row, name: f"{row[name]:.2f}" if name in row else ""
    table = [
      (f"{row['model']}, {row['implementation']}", f"{row['ms_per_step']:.3f}",
       f"{row['num_kernels'] / DECODE_STEPS:,.0f}", f"{row['bytes_per_second']:,}",
       times(row, "over_dense"), times(row, "over_dense_by_xla"))
      for row in decoded
    ]  # fmt: skip
    header = ("decoding", "ms per step", "kernels", "bytes/s", "over dense", "over dense by XLA")
    report.print_table(header, table)
