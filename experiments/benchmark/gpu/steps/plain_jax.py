"""The same body as a user of JAX would write it today, after MaxText: dense attention by cuDNN.

Plain functions, one scan over the layers, a checkpoint per block, bfloat16 products of float32
weights, and dropout by XLA's own generator.
"""

import functools
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark import report
from experiments.benchmark.gpu.steps import child


def init(key: jax.Array, model: dict[str, Any]) -> dict[str, Any]:
  """float32 weights; those of all layers along a leading axis."""
  L, E = model["num_layers"], model["width"]
  Q, F = round(model["qk_ratio"] * E), round(model["ff_mult"] * E)
  keys = iter(jax.random.split(key, 16))

  def normal(shape, std):
    return std * jax.random.normal(next(keys), shape)

  def linear(inputs, outputs, share=1.0):
    std = math.sqrt(share * 0.125 / inputs)
    return dict(kernel=normal((L, inputs, outputs), std), bias=jnp.zeros((L, outputs)))

  gains = lambda *shape: dict(scale=jnp.ones(shape), bias=jnp.zeros(shape))
  end = 1 / (2 * L)  # of a residual branch
  layers = dict(
    attention_norm=gains(L, E),
    query=linear(E, Q),
    key=linear(E, Q),
    value=linear(E, E),
    out=linear(E, E, end),
    feed_forward_norm=gains(L, E),
    up=linear(E, F),
    down=linear(F, E, end),
  )
  std = 0.125 / math.sqrt(E)
  return dict(
    tokens=normal((256, E), std),
    positions=[normal((rows, E), std) for rows in model["position_shape"]],
    start=normal((E,), std),
    layers=layers,
    final_norm=gains(E),
    logits=jnp.zeros((E, 256)),
  )


def norm(x: jax.Array, weights: dict, epsilon: float = 1e-5) -> jax.Array:
  """In float32, rounded to the dtype of x."""
  wide = x.astype(jnp.float32)
  mean, variance = wide.mean(-1, keepdims=True), wide.var(-1, keepdims=True)
  y = (wide - mean) * jax.lax.rsqrt(variance + epsilon)
  return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def linear(x: jax.Array, weights: dict) -> jax.Array:
  return x @ weights["kernel"].astype(x.dtype) + weights["bias"].astype(x.dtype)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  if not rate or key is None:
    return x
  alive = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(alive, x / (1.0 - rate), 0.0).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Dense and causal. The function wants heads of one size: zeros fill up smaller q and k."""
  scale, room = q.shape[-1] ** -0.5, [(0, 0)] * 3 + [(0, v.shape[-1] - q.shape[-1])]
  q, k = jnp.pad(q, room), jnp.pad(k, room)
  by = "cudnn" if jax.default_backend() == "gpu" else "xla"
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=scale, implementation=by)


def block(x: jax.Array, weights: dict, key: jax.Array | None, model: dict[str, Any]) -> jax.Array:
  """x [B, T, E]; see `sparse_flax.model.block`."""
  keys = (None, None) if key is None else jax.random.split(key)
  heads = lambda y: y.reshape(*y.shape[:2], model["num_heads"], -1)
  h = norm(x, weights["attention_norm"])
  out = attend(*(heads(linear(h, weights[name])) for name in ("query", "key", "value")))
  x = x + drop(linear(out.reshape(x.shape), weights["out"]), model["dropout"], keys[0])
  u = linear(norm(x, weights["feed_forward_norm"]), weights["up"])
  out = linear(u * jax.nn.sigmoid(1.702 * u), weights["down"])
  return x + drop(out, model["dropout"], keys[1])


def embed(params: dict, tokens: jax.Array, model: dict[str, Any]) -> jax.Array:
  """Slot t has the byte and the position of t - 1, slot 0 the start vector."""
  before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
  at = jnp.maximum(jnp.arange(tokens.shape[1]) - 1, 0)
  digits = jnp.unravel_index(at, model["position_shape"])
  places = sum(table[digit] for table, digit in zip(params["positions"], digits, strict=True))
  x = (params["tokens"][before] + places[None]).at[:, 0].set(params["start"])
  return x.astype(model["compute_dtype"])


def loss(
  params: dict, tokens: jax.Array, key: jax.Array | None, model: dict[str, Any]
) -> jax.Array:
  """Mean nats per byte; no key means no dropout."""
  x = drop(embed(params, tokens, model), model["embed_dropout"], key)
  # MaxText's too: the generator that is the default costs more than it is worth for dropout.
  keys = None if key is None else jax.random.split(key, model["num_layers"])
  run = functools.partial(block, model=model)
  run = run if model["remat"] == "none" else jax.checkpoint(run, prevent_cse=False)
  x, _ = jax.lax.scan(lambda x, given: (run(x, *given), None), x, (params["layers"], keys))
  logits = norm(x.astype(jnp.float32), params["final_norm"], 1e-6) @ params["logits"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens.astype(jnp.int32)).mean()


def optimizer(optim: dict[str, Any]) -> optax.GradientTransformation:
  """AdamW behind clipping; biases and gains do not decay."""
  decays = lambda params: jax.tree.map_with_path(
    lambda path, _: getattr(path[-1], "key", None) not in ("bias", "scale"), params
  )
  rate = lambda n: optim["learning_rate"] * jnp.minimum((n + 1) / optim["warmup_steps"], 1.0)
  adam = {name: optim[name] for name in ("b1", "b2", "eps", "weight_decay")}
  return optax.chain(
    optax.clip_by_global_norm(optim["clip_norm"]), optax.adamw(rate, **adam, mask=decays)
  )


def make_step(job: dict[str, Any]):
  """init(key) -> state, and step(state, tokens, key) -> (state, loss)."""
  model, decay, tx = job["model"], job["ema_decay"], optimizer(job["optim"])

  def first(key):
    params = init(key, model)
    return dict(
      params=params,
      ema=jax.tree.map(jnp.copy, params),
      opt=tx.init(params),
      step=jnp.zeros((), jnp.int32),
    )

  def step(state, tokens, key):
    params, key = state["params"], jax.random.fold_in(key, state["step"])
    nats, grads = jax.value_and_grad(loss)(params, tokens, key, model)
    updates, opt = tx.update(grads, state["opt"], params)
    params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, state["ema"], params)
    return dict(params=params, ema=ema, opt=opt, step=state["step"] + 1), nats

  return first, step


def measure(job: dict[str, Any]) -> None:
  """Tells the figures of a step.

  Args:
    job: `model` and `optim` of a config, `ema_decay`, and `batch` sequences.
  """
  model = job["model"]
  model["position_shape"] = tuple(model["position_shape"])
  begin = time.perf_counter()
  first, step = make_step(job)
  key = jax.random.key(1, impl="unsafe_rbg")
  size = (job["batch"], model["seq_len"])
  tokens = jnp.asarray(np.random.RandomState(0).randint(0, 256, size).astype(np.uint8))
  state = jax.jit(first)(jax.random.key(0))
  program = jax.jit(step, donate_argnums=0).lower(state, tokens, key).compile()
  child.tell(
    compile_s=round(time.perf_counter() - begin, 1),
    remat=model["remat"],
    peak_gb=round(report.num_bytes(program) / 1e9, 6),
    library=f"JAX {jax.__version__}",
  )

  def start() -> jax.Array:
    nonlocal state
    state, nats = program(state, tokens, key)
    return nats

  child.tell(ms=child.median_ms(start, jax.block_until_ready))
  child.tell(loss=float(start()))


if __name__ == "__main__":
  sys.exit(child.main(measure))
