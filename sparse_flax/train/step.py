"""One training step, a pure function, and the state that it takes and gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx
from jaxtyping import Array
from jaxtyping import Key
from jaxtyping import UInt8

from sparse_flax import evaluate
from sparse_flax import model as model_lib
from sparse_flax.model import learned
from sparse_flax.parallel import sharding
from sparse_flax.train import optim

# By default each process times what can compute a product and takes the fastest. Times depend on
# what else the GPU does, so two processes may choose differently, and their last bits then differ.
GPU_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, int | bool]:
  """For `jax.jit` of a training step, so that every process computes the same bits."""
  return GPU_COMPILER_OPTIONS if mesh.devices.flat[0].platform == "gpu" else {}


def init_state(
  key: Key[Array, ""],
  *,
  build: Callable,
  tx: optax.GradientTransformation,
  loss_scale: str,
  ema_decay: float | None = None,
) -> dict:
  """The state before the first step, with random weights; see `state_of`."""
  params = nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))
  return state_of(params, tx=tx, loss_scale=loss_scale, ema_decay=ema_decay)


def state_of(
  params: dict,
  *,
  tx: optax.GradientTransformation,
  loss_scale: str,
  ema_decay: float | None = None,
) -> dict:
  """A plain dict: step 0, params, ema unless `ema_decay` is 0, opt, and a dynamic loss_scale.

  Averages are float32, whatever the dtype of the weights, and so is what the optimizer is given.
  """
  weights = optim.in_float32(params)
  state = {
    "step": jnp.zeros((), jnp.int32),
    "params": params,
    **({} if ema_decay == 0 else {"ema": jax.tree.map(jnp.copy, weights)}),
    "opt": tx.init(weights),
  }
  if loss_scale == "dynamic":
    state["loss_scale"] = jnp.asarray(optim.FIRST_LOSS_SCALE, jnp.float32)
  return state


def train_step(
  state: dict,
  tokens: UInt8[Array, "B T"],
  key: Key[Array, ""],
  *,
  graphdef: nnx.GraphDef,
  tx: optax.GradientTransformation,
  schedule: Callable,
  accumulation: int,
  ema_decay: float,
  stage: learned.Stage = None,
  index_loss: float = 1.0,
  answers: Callable | None = None,
) -> tuple[dict, dict]:
  """One update: the new state, and fp32 scalars. The model shifts the tokens by itself.

  Where the loss or a gradient is not finite, nothing changes but the step, so that the data move
  on, and a dynamic loss scale.

  Args:
    state: of `init_state`.
    tokens: the whole batch; `accumulation` divides B.
    key: of dropout; the step is folded in here.
    graphdef: of the model.
    tx: of `optim.make_optimizer`; it gets gradients and weights in float32.
    schedule: of `optim.make_schedule`; for the record only.
    accumulation: micro-batches, run one after the other and averaged.
    ema_decay: of the averaged weights; read where the state has them.
    stage: of layers that choose the blocks that they read; None is the last one.
    index_loss: factor of the losses of their indexers. The record has them as they are, and the
      norm of the indexers' gradient, which has no part in `grad_norm`.
    answers: tokens -> those that the loss is of; None: all.
  """
  scale = state.get("loss_scale", jnp.ones((), jnp.float32))
  key = jax.random.fold_in(key, state["step"])
  # Gradients have the dtype of what they are of, and an embedding's is a sum over all tokens.
  weights = optim.in_float32(state["params"])

  def loss_fn(params, tokens, key):
    model = nnx.merge(graphdef, params)
    nats, losses = evaluate.nats_of(model, tokens, dropout_key=key, stage=stage, losses=True)
    if answers is None:
      # Rows first: one sum over all tokens loses digits where it is taken one by one, as on CPUs.
      nats = nats.mean(axis=1).mean()
    else:
      shown = answers(tokens)
      nats = jnp.where(shown, nats, 0.0).sum() / jnp.maximum(shown.sum(dtype=jnp.float32), 1.0)
    total = nats + index_loss * losses["index"] if losses else nats
    return scale * total, (nats, losses)

  def micro_step(total, inputs):
    tokens, index = inputs
    (_, (nats, losses)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      weights, tokens, jax.random.fold_in(key, index)
    )
    return jax.tree.map(jnp.add, total, (nats, losses, grads)), None

  # Neighbouring rows go to different micro-batches, so that each is spread over all devices.
  micro = tokens.reshape(-1, accumulation, tokens.shape[1]).swapaxes(0, 1)
  zero = jnp.zeros((), jnp.float32)
  index = optim.split_apart(weights)[0]  # weights that learn from a loss of their own
  zeros = (zero, {"index": zero} if index else {}, jax.tree.map(jnp.zeros_like, weights))
  (nats, losses, grads), _ = jax.lax.scan(micro_step, zeros, (micro, jnp.arange(accumulation)))
  nats = nats / accumulation
  grads = jax.tree.map(lambda g: g / (accumulation * scale), grads)

  of_index, others = optim.split_apart(grads)
  norm = optax.tree.norm(others if index else grads)
  updates, opt = tx.update(grads, state["opt"], weights)
  moved = optax.apply_updates(weights, updates)
  params = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, state["params"])
  new = {"params": params, "opt": opt}
  if "ema" in state:
    new["ema"] = optim.average(state["ema"], params, decay=ema_decay)
  record = {
    "loss": nats,
    "grad_norm": norm,
    "learning_rate": schedule(optim.updates_done(state["opt"])),
  }
  loss_ok, grads_ok = jnp.isfinite(nats), jnp.isfinite(norm)
  if index:
    record["index_loss"] = losses["index"] / accumulation
    record["index_grad_norm"] = optax.tree.norm(of_index)
    grads_ok &= jnp.isfinite(record["index_grad_norm"])
  ok = loss_ok & grads_ok
  new = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, {k: state[k] for k in new})
  record["skipped"] = 1.0 - ok.astype(jnp.float32)
  if "loss_scale" in state:
    new["loss_scale"] = optim.next_loss_scale(scale, loss_ok=loss_ok, grads_ok=grads_ok)
    record["loss_scale"] = scale
  return new | {"step": state["step"] + 1}, record


def optimizer_of(
  config: ml_collections.ConfigDict,
) -> tuple[optax.GradientTransformation, Callable]:
  """The optimizer that a config describes, and its learning rate as a function of the update."""
  rates = ("learning_rate", "warmup_steps", "final_lr_ratio", "schedule")
  rates = {name: config.optim[name] for name in rates}
  schedule = optim.make_schedule(**rates, steps=config.train.steps)
  elsewhere = (*rates, "loss_scale", "index_loss")
  others = {name: x for name, x in config.optim.items() if name not in elsewhere}
  return optim.make_optimizer(schedule=schedule, **others), schedule


def scored(state: dict) -> dict:
  """The weights of a state that are evaluated: the averages, or where there are none its own.

  In float32 in either case, as `checkpoint.restore_params` gives them.
  """
  return state["ema"] if "ema" in state else optim.in_float32(state["params"])


def make_step(config: ml_collections.ConfigDict) -> tuple[Callable, Callable]:
  """What a config trains: init(key) -> state, and step(state, tokens, key) -> (state, record).

  A keyword argument `stage` of step, which is known when it is traced, is that of `train_step`.
  """
  build = lambda rngs: model_lib.SparseTransformer(**config.model, rngs=rngs)
  graphdef, _ = model_lib.graph_and_shapes(**config.model)
  tx, schedule = optimizer_of(config)

  def init(key):
    options = dict(loss_scale=config.optim.loss_scale, ema_decay=config.train.ema_decay)
    return init_state(key, build=build, tx=tx, **options)

  def step(state, tokens, key, *, stage=None):
    options: dict[str, Any] = dict(
      accumulation=config.train.accumulation,
      ema_decay=config.train.ema_decay,
      index_loss=config.optim.index_loss,
      answers=evaluate.answers_of(config),
      stage=stage,
    )
    return train_step(state, tokens, key, graphdef=graphdef, tx=tx, schedule=schedule, **options)

  return init, step


def jit_step(step: Callable, layout: Any, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
  """A step of `make_step` as every run jits it: it gives up its state, and `stage` is static.

  Args:
    step: (state, tokens, key, *, stage) -> (state, record).
    layout: the state with a sharding in the place of each array, `sharding.by_rules` for one.
    mesh: of devices.
  """
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(layout, sharding.replicated(mesh)),
    compiler_options=compiler_options(mesh),
    static_argnames="stage",
  )
