"""One training step of the paper's models on a GPU: no attention, sparse attention, cuDNN's dense.

Forward, backward and AdamW with clipping, bfloat16 with float32 parameters, donated. Without
attention a layer has a = v + 0.001 (q + k) in its place, so that every matmul stays. remat: full
keeps the input of each layer only, dots also its matmuls' outputs and attention's out and lse.
Strided attention is measured in both of the paper's ways: a cycle of one pattern per layer, as the
recipes have it (interleaved), and one softmax over the union in every layer (merged).
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax

from experiments.benchmark import report
from experiments.benchmark.gpu import timing
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from sparse_flax.model.attention import apart

OURS = "mosaic_gpu"
STEPS = 6
SECONDS = 2.0  # of measuring per program, but at least 3 steps
POLICIES = {
  "full": None,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
  ),
}


@dataclasses.dataclass(frozen=True)
class Body:
  """The residual blocks of one of the paper's models, without its embeddings' details."""

  layers: int
  width: int
  heads: int
  ff_mult: int
  batch: int
  T: int
  cycles: dict[str, tuple[patterns.Pattern, ...]]  # patterns of the layers, in turn
  remat: tuple[str, ...] = ("full",)

  def modes(self) -> list[tuple[str, str]]:
    """(attention, remat), first the step without attention; dense is measured with full only."""
    modes = [(attention, remat) for remat in self.remat for attention in ("none", *self.cycles)]
    return [*modes, ("dense", "full")]


def strided(stride: int, cycle: str) -> dict[str, tuple[patterns.Pattern, ...]]:
  """Interleaved by a cycle of layers, l and c, and merged."""
  kinds = {"l": patterns.Local(stride), "c": patterns.Column(stride)}
  return dict(
    interleaved=tuple(kinds[letter] for letter in cycle), merged=(patterns.Strided(stride),)
  )


BODIES = {
  "enwik8": Body(
    30, 512, 8, 4, 4, 12_288, dict(merged=(patterns.Fixed(128, 32),)), remat=("full", "dots")
  ),
  "cifar10": Body(128, 256, 2, 2, 16, 3_072, strided(96, "clll")),
  "imagenet64": Body(48, 512, 16, 4, 4, 12_288, strided(128, "lcll")),
  "audio64k": Body(48, 512, 8, 4, 1, 65_536, strided(256, "lcll")),
}
PARTS = tuple(BODIES)


def parameters(body: Body, key: jax.Array) -> dict:
  N, d, f = body.layers, body.width, body.ff_mult * body.width
  keys = iter(jax.random.split(key, 5))
  normal = lambda *shape, scale: scale * jax.random.normal(next(keys), shape)
  into, back = (0.125 / d) ** 0.5, (0.125 / d / (2 * N)) ** 0.5
  layers = {
    "qkv": normal(N, d, 3 * d, scale=into),
    "out": normal(N, d, d, scale=back),
    "up": normal(N, d, f, scale=into),
    "down": normal(N, f, d, scale=back),
    "norm1": jnp.ones((N, d)),
    "norm2": jnp.ones((N, d)),
  }
  # The head starts at zero, as in the paper.
  return {
    "layers": layers,
    "embedding": normal(256, d, scale=0.01),
    "head": jnp.zeros((d, 256)),
  }


def instead(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  return v + 0.001 * (q + k)


dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def attentions(body: Body, attention: str) -> list[Callable[..., jax.Array]]:
  """Of the layers, in turn."""
  if attention in body.cycles:
    sparse = functools.partial(sparse_attention, implementation=OURS)
    return [functools.partial(sparse, pattern=one) for one in body.cycles[attention]]
  return [{"none": instead, "dense": dense}[attention]]


def layer(x: jax.Array, weights: dict, *, body: Body, attend: Callable) -> jax.Array:
  """A pre-norm block with the paper's GELU, x sigmoid(1.702 x)."""
  w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
  normed = _norm(x, w["norm1"])
  # Three products with three slices of the weight: slices of one product's activation would have to
  # be copied before any kernel can read them, and their gradients joined after it. Without
  # attention XLA may join them: it then reads slices where they are.
  inputs = (normed,) * 3 if attend is instead else apart(normed, 3)
  q, k, v = (
    (one @ part).reshape(body.batch, body.T, body.heads, -1)
    for one, part in zip(inputs, jnp.split(w["qkv"], 3, axis=1), strict=True)
  )
  x = x + attend(q, k, v).reshape(x.shape) @ w["out"]
  hidden = _norm(x, w["norm2"]) @ w["up"]
  return x + (hidden * jax.nn.sigmoid(1.702 * hidden)) @ w["down"]


def loss(params: dict, tokens: jax.Array, *, body: Body, attention: str, remat: str) -> jax.Array:
  x = params["embedding"].astype(jnp.bfloat16)[tokens]
  x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]  # each token is predicted from those before it
  again = functools.partial(jax.checkpoint, prevent_cse=False, policy=POLICIES[remat])
  cycle = attentions(body, attention)
  layers = [again(functools.partial(layer, body=body, attend=attend)) for attend in cycle]

  def one_cycle(x, weights):
    for n, block in enumerate(layers):
      x = block(x, jax.tree.map(lambda a, n=n: a[n], weights))
    return x, None

  in_cycles = lambda a: a.reshape(-1, len(layers), *a.shape[1:])
  x, _ = jax.lax.scan(one_cycle, x, jax.tree.map(in_cycles, params["layers"]))
  logits = _norm(x, jnp.ones(body.width)) @ params["head"].astype(jnp.bfloat16)
  logits = logits.astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def _norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  x32 = x.astype(jnp.float32)
  x32 = x32 - x32.mean(-1, keepdims=True)
  scaled = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-5)
  return (scaled * gain.astype(jnp.float32)[None, None]).astype(x.dtype)


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))


def start(body: Body, key: jax.Array) -> tuple:
  """Parameters, the optimizer's state and a batch of tokens."""
  first, second = jax.random.split(key)
  params = parameters(body, first)
  return params, optimizer.init(params), jax.random.randint(second, (body.batch, body.T), 0, 256)


def step(params: dict, state, tokens: jax.Array, *, body: Body, attention: str, remat: str):
  grads = jax.grad(loss)(params, tokens, body=body, attention=attention, remat=remat)
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def compiler(body: Body, attention: str, remat: str):
  """The job of compiling the step of one mode."""

  def job():
    arguments = jax.eval_shape(functools.partial(start, body), jax.random.key(0))
    one = functools.partial(step, body=body, attention=attention, remat=remat)
    return jax.jit(one, donate_argnums=(0, 1)).lower(*arguments).compile()

  return job


def compile_all(jobs: dict[Hashable, Callable]) -> dict[Hashable, jax.stages.Compiled | Exception]:
  """Runs the jobs, each of which compiles a program, in threads; what one raises is its result.

  In one process, unlike the other benchmarks: the matmuls of all are then tuned alike.
  """

  def attempt(job):
    try:
      return job()
    except Exception as error:  # whatever a compiler says, the other programs go on
      return error

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(jobs, pool.map(attempt, jobs.values()), strict=True))


def working(program: jax.stages.Compiled | Exception) -> jax.stages.Compiled:
  """A result of `compile_all`, raised here if it is an error."""
  if isinstance(program, Exception):
    raise program
  return program


def step_ms(start: jax.stages.Compiled, step: jax.stages.Compiled) -> float:
  """Median time of a step, the host's part included."""
  params, state, tokens = start(jax.random.key(0))
  params, state = jax.block_until_ready(step(params, state, tokens))
  seconds = []
  while len(seconds) < 3 or (sum(seconds) < SECONDS and len(seconds) < STEPS):
    begin = time.perf_counter()
    params, state = jax.block_until_ready(step(params, state, tokens))
    seconds.append(time.perf_counter() - begin)
  return 1e3 * statistics.median(seconds)


def measure(names: list[str]) -> list[dict]:
  cases = [(name, *mode) for name in names for mode in BODIES[name].modes()]
  begin = lambda name: jax.jit(functools.partial(start, BODIES[name])).lower(jax.random.key(0))
  starts = compile_all({name: lambda name=name: begin(name).compile() for name in names})
  job = lambda case: compiler(BODIES[case[0]], *case[1:])
  # The steps without attention first: the others then find their matmuls tuned, all alike.
  floors = [case for case in cases if case[1:] == ("none", "full")]
  compiled = compile_all({case: job(case) for case in floors})
  compiled |= compile_all({case: job(case) for case in cases if case not in floors})
  rows, progress = [], timing.Progress(len(cases))
  for case in cases:
    name, attention, remat = case
    body = BODIES[name]
    cycle = {"none": (), "dense": (patterns.Dense(),), **body.cycles}[attention]
    implementation = {"none": None, "dense": "cudnn"}.get(attention, OURS)
    row = dict(body=name, attention=attention, patterns=[repr(one) for one in cycle])
    row |= dict(implementation=implementation)
    row |= dict(remat=remat)
    try:
      program = working(compiled.pop(case))
      row["ms"] = round(step_ms(working(starts[name]), program), 3)
      row["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
      row["tokens_per_second"] = round(1e3 * body.batch * body.T / row["ms"])
    except Exception as error:  # one that does not fit must not take the others with it
      row |= dict(ms=None, error=timing.text(error))
    rows.append(row)
    progress(*case, row.get("error") or f"{row['ms']} ms")
  return rows


def compare(rows: list[dict]) -> None:
  """Adds what attention costs over the step without it, and how much faster than dense it is."""
  ms = {(row["body"], row["attention"], row["remat"]): row["ms"] for row in rows}
  for row in rows:
    floor = ms.get((row["body"], "none", row["remat"]))
    dense = ms.get((row["body"], "dense", "full"))
    if row["ms"] and floor:
      row["added_percent"] = round(100 * (row["ms"] / floor - 1), 1)
    if row["ms"] and dense:
      row["dense_ratio"] = round(dense / row["ms"], 3)


def run(out: pathlib.Path, only: tuple[str, ...] = ()) -> bool:
  """Measures, prints and writes step_<device>.json; whether all rows have figures."""
  print(__doc__, flush=True)
  rows = measure(timing.chosen(BODIES, only))
  compare(rows)
  show = lambda value, form: "" if value is None else form.format(value)
  table = [
    (row["body"], row["attention"], row["remat"], show(row["ms"], "{:,.1f}") or "failed",
     show(row.get("added_percent"), "{:+.1f} %"), show(row.get("dense_ratio"), "{:.2f}"),
     show(row.get("temp_bytes") and row["temp_bytes"] / 1e9, "{:.2f}"))
    for row in rows
  ]  # fmt: skip
  header = ("body", "attention", "remat", "ms", "over none", "dense / it", "temporaries, GB")
  report.print_table(header, table)
  for row in rows:
    if "error" in row:
      print("FAILED", row["body"], row["attention"], row["remat"])
      print(f"  {row['error']}")
  bodies = {name: dataclasses.asdict(body) for name, body in BODIES.items()}
  for name, body in BODIES.items():
    names = lambda cycle: [repr(one) for one in cycle]
    bodies[name]["cycles"] = {way: names(cycle) for way, cycle in body.cycles.items()}
  path = out / f"step_{report.short_device()}.json"
  report.write(path, rows, gpu=report.gpu_state(), bodies=bodies)
  return not any("error" in row for row in rows)
