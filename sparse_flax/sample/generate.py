"""Ancestral sampling: one byte after the other, with the keys and values of earlier steps kept."""

import functools
import itertools
import logging
import numbers
import types
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Key
from jaxtyping import UInt8

from pallas_kernels import api
from pallas_kernels import hardware
from sparse_flax import model as model_lib
from sparse_flax.model import levels
from sparse_flax.parallel import sharding

IMPLEMENTATIONS = ("xla", "triton", "cluster")
_EARLIER_NAMES = {"mosaic_gpu": "cluster"}  # that of the attention kernels as well
Prompt = bytes | Integer[np.ndarray, "_"] | Sequence[int]
_PIECES = 16  # in which a run that reports its progress is cut
_COLDEST = 1e-6  # logits over less than this may be beyond float32

logger = logging.getLogger(__name__)


def generate(
  model: model_lib.SparseTransformer | nnx.GraphDef,
  params: dict | None = None,
  *,
  key: Key[Array, ""],
  num: int,
  length: int | None = None,
  temperature: int | float = 1.0,
  top_k: int | None = None,
  top_p: int | float = 1.0,
  prompts: Sequence[Prompt] | Integer[np.ndarray, "num P"] | None = None,
  sparse: bool = True,
  implementation: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  on_progress: Callable[[int, int], None] | None = None,
  on_programs: Callable[[str, str], None] = lambda prompts, steps: None,
) -> UInt8[np.ndarray, "num T"]:
  """Samples whole sequences from softmax(logits / temperature), or from its likeliest bytes.

  Row r is a function of the weights, `key`, r and its prompt: it is the same among 16 rows as
  alone. What all prompts have in length is read in one pass; the rest is one compiled loop.

  Args:
    model: a SparseTransformer; or its graph, `nnx.graphdef(model)`, with `params`.
    params: the weights of a graph, as a plain dict.
    key: a typed key, `jax.random.key(seed)`.
    num: number of sequences.
    length: T, the bytes of each with its prompt; None is seq_len of the model.
    temperature: 1.0 samples what the model predicts, 0 takes the likeliest byte.
    top_k: draw from the k likeliest bytes only; None is all 256.
    top_p: draw from the fewest likeliest bytes that have this share of the probability.
    prompts: the first bytes of each row, 0 to T - 1 of them; they come back unchanged. Numbers have
      to be in [0, 255], whatever their integer dtype.
    sparse: False keeps and reads all keys and values at every step: for comparisons.
    implementation: of a step. "cluster": one kernel for NVIDIA GPUs of compute capability 9;
      "triton": a few per layer for NVIDIA GPUs (elsewhere simulated); "xla": none of ours. None is
      the best one here.
    mesh: devices over whose "data" and "fsdp" the rows are sharded; None is one device.
    on_progress: called with (steps done, steps in all) now and then.
    on_programs: called once with the implementations that compute the attention of the prompts
      and of the steps, as the programs contain them; "" where all prompts are empty.

  Returns:
    Bytes.

  Raises:
    ValueError: num, length, temperature, top_k, top_p, implementation or the prompts make no sense.
    NotImplementedError: the implementation that is named does not take this model, or does not
      run here; the message says why.
  """
  graphdef, params = _graph_and_weights(model, params)
  merged = nnx.merge(graphdef, params)
  api.load_backend(levels.first_block(merged).attention.implementation)  # of the pass over prompts
  if length is not None and not 1 <= length <= merged.seq_len:
    raise ValueError(f"{length=}: must be None or a whole number from 1 to {merged.seq_len}")
  T = length or merged.seq_len
  check_options(num=num, temperature=temperature, top_k=top_k, top_p=top_p)
  implementation = _EARLIER_NAMES.get(implementation or "", implementation)
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(f"{implementation=}: must be None or one of {IMPLEMENTATIONS}")
  prompts = _checked_prompts(prompts, num=num, length=T)
  lengths = [len(prompt) for prompt in prompts]
  mesh = mesh or sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1)
  shares = mesh.shape["data"] * mesh.shape["fsdp"]
  rows = -(-num // shares) * shares  # those beyond num are drawn for nothing
  P = min(lengths)
  starts = _pieces(P, T, levels.group_size(merged), in_pieces=on_progress is not None)
  known = np.zeros((rows, starts[-1]), np.uint8)
  for row, prompt in enumerate(prompts):
    known[row, : len(prompt)] = prompt
  lengths = np.pad(lengths, (0, rows - num), constant_values=P)

  place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(sharding.BATCH)))
  params = jax.device_put(as_multiplied(merged, params), sharding.replicated(mesh))
  implementation = implementation or best(merged, rows // shares, sparse=sparse)
  step_kernels(implementation)  # before anything is traced
  start_up, run_from = _programs(
    graphdef, mesh, sparse, temperature, top_k, top_p, implementation=implementation
  )
  with jax.set_mesh(mesh):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(place(np.arange(rows)))
    before = params, place(known[:, :P])
    carry, pieces = start_up(*before), [known[:, :P]]
    for start, end in itertools.pairwise(starts):
      run = run_from(start % levels.group_size(merged))
      piece = place(known[:, start:end])
      steps = params, carry, keys, start, piece, place(lengths)
      if start == P:
        programs = start_up.trace(*before), run.trace(*steps)
        on_programs(*(", ".join(api.implementations_in(x.jaxpr)) for x in programs))
      carry, tokens = run(*steps)
      pieces.append(np.asarray(tokens))
      if on_progress is not None:
        on_progress(min(end, T), T)
  return np.concatenate(pieces, axis=1)[:num, :T]


def _pieces(P: int, T: int, group: int, *, in_pieces: bool) -> list[int]:
  """Where pieces of the steps from P to T begin, and where the last ends.

  One compilation serves all, but for the steps to the end of a group that P lies in. The last may
  run past T, and that part is cut off.
  """
  first = min(-(-P // group) * group, T)
  if first == T:
    return [P, T]
  groups = -(-(T - first) // group)
  size = group * (-(-groups // _PIECES) if in_pieces else groups)
  return [P] * (first > P) + [first + n * size for n in range(-(-(T - first) // size) + 1)]


def row_mesh(num: int) -> jax.sharding.Mesh:
  """A mesh of devices that share `num` rows. One of a CPU's, which would share its cores."""
  devices = 1 if hardware.platform() == "cpu" else min(num, jax.device_count())
  return sharding.make_mesh(data=devices, fsdp=1, tensor=1, sequence=1)


@functools.lru_cache(maxsize=4, typed=True)
def _programs(
  graphdef: nnx.GraphDef,
  mesh: jax.sharding.Mesh,
  sparse: bool,
  temperature: int | float,
  top_k: int | None,
  top_p: int | float,
  *,
  implementation: str,
) -> tuple[jax.stages.Wrapped, Callable[[int], jax.stages.Wrapped]]:
  """`_start`, and of a phase `run_steps`, jitted: who samples again compiles them once."""
  by_row, of_caches = jax.P(sharding.BATCH), jax.P(None, sharding.BATCH)
  named = functools.partial(jax.NamedSharding, mesh)
  start_up = functools.partial(_start, graphdef, sparse=sparse)
  start_up = jax.jit(start_up, out_shardings=(named(by_row), named(of_caches)))
  options = dict(temperature=temperature, top_k=top_k, top_p=top_p, implementation=implementation)

  @functools.cache
  def run_from(phase: int) -> jax.stages.Wrapped:
    run = jax.shard_map(  # rows know nothing of each other
      functools.partial(run_steps, graphdef, **options, phase=phase),
      mesh=mesh,
      in_specs=(jax.P(), (by_row, of_caches), by_row, jax.P(), by_row, by_row),
      out_specs=((by_row, of_caches), by_row),
      check_vma=False,
    )
    return jax.jit(run, donate_argnums=1)

  return start_up, run_from


def _graph_and_weights(
  model: model_lib.SparseTransformer | nnx.GraphDef, params: dict | None
) -> tuple[nnx.GraphDef, dict]:
  if isinstance(model, nnx.Module):
    if params is not None:
      raise ValueError("params: must be None where model is a module, which has its own weights")
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)
  if params is None:
    raise ValueError("params=None: must be the weights where model is a graph")
  return model, params


def _checked_prompts(
  prompts: Sequence[Prompt] | Integer[np.ndarray, "num P"] | None, *, num: int, length: int
) -> list[UInt8[np.ndarray, "_"]]:
  """The bytes of each row's prompt."""
  prompts = [b""] * num if prompts is None else prompts
  in_bytes = [_as_bytes(prompt, f"prompts[{n}]") for n, prompt in enumerate(prompts)]
  lengths = [len(prompt) for prompt in in_bytes]
  if len(in_bytes) != num or max(lengths) >= length:
    raise ValueError(
      f"prompts have lengths {lengths}: must be {num=} of them, each shorter than the samples' "
      f"{length}"
    )
  return in_bytes


def check_options(
  *, num: int, temperature: int | float, top_k: int | None, top_p: int | float, prefix: str = ""
) -> None:
  """Raises ValueError for one of the arguments of `generate`, called by `prefix` and its name."""
  whole = lambda x, least, most: isinstance(x, numbers.Integral) and least <= x <= most
  if not whole(num, 1, float("inf")):
    raise ValueError(f"{prefix}{num=}: must be a whole number >= 1")
  if temperature != 0 and not _COLDEST <= temperature < float("inf"):
    raise ValueError(f"{prefix}{temperature=}: must be 0, or a number >= {_COLDEST}")
  if top_k is not None and not whole(top_k, 1, model_lib.VOCABULARY):
    raise ValueError(f"{prefix}{top_k=}: must be a whole number from 1 to {model_lib.VOCABULARY}")
  if not 0.0 < top_p <= 1.0:
    raise ValueError(f"{prefix}{top_p=}: must be in (0, 1]")


def _as_bytes(prompt: Prompt, name: str) -> UInt8[np.ndarray, "P"]:
  """The bytes of a prompt, exactly; ValueError if it is not made of bytes."""
  if isinstance(prompt, str):
    raise ValueError(f"{name}={prompt!r} is text: must be bytes, as {name}.encode() gives")
  if isinstance(prompt, bytes | bytearray | memoryview):
    return np.frombuffer(prompt, np.uint8)
  values = np.asarray(prompt)
  if values.ndim != 1:
    raise ValueError(f"{name} has shape {values.shape}: must be bytes or numbers in one dimension")
  if not values.size:
    return np.zeros(0, np.uint8)
  model_lib.check_bytes(values, name)
  return values.astype(np.uint8)


def best(model: model_lib.SparseTransformer, batch_size: int, *, sparse: bool = True) -> str:
  """The implementation of a step of the model for the devices here.

  Args:
    model: its weights may be shapes only.
    batch_size: sequences of one device.
    sparse: as in `generate`: caches of everything may be more than one kernel takes.
  """
  if hardware.platform() != "gpu" or "nvidia" not in hardware.device_kind().lower():
    return "xla"
  if reason := _why_xla_alone(model):
    _say_once(f"no decoding step by kernels: {reason}")
    return "xla"
  caches = levels.by_stack(
    model, jax.eval_shape(lambda: model.init_cache(batch_size, sparse=sparse))
  )
  for name in ("cluster", "triton"):
    reason = _why_not_here(name)
    if reason is None:
      kernels = step_kernels(name)
      assert kernels is not None  # as only "xla" has none
      reasons = (
        kernels.supported(groups, caches[stack], batch_size)
        for stack, groups in levels.stacks(model)
      )
      reason = next(filter(None, reasons), None)
    if reason is None:
      return name
    _say_once(f"no decoding step by {name}: {reason}")
  return "xla"


def _why_xla_alone(model: model_lib.SparseTransformer) -> str | None:
  """Why no kernels compute the steps of a model; None where they may."""
  if model.chooses:
    return "layers that choose the blocks that they read, which kernels of a step do not have"
  first = levels.first_block(model)
  activation = first.feed_forward.activation
  if activation != "quick_gelu":
    return f"{activation=}, which kernels of a step do not have"
  placing = first.attention.placing
  return placing and f"{placing}, which kernels of a step do not have"


def step_kernels(implementation: str) -> types.ModuleType | None:
  """Of a step: the module with `run_blocks_of` and `supported`, imported only where it is used.

  None for "xla".

  The import may add options to JAX's configuration: it must come before what uses it is traced.

  Raises:
    NotImplementedError: these kernels do not run here; the message says why.
  """
  if implementation == "xla":
    return None
  if reason := _why_not_here(implementation):
    raise NotImplementedError(reason)
  if _is_one_kernel(implementation):
    from sparse_flax.sample import cluster

    return cluster
  from sparse_flax.sample import triton

  return triton


def _is_one_kernel(implementation: str) -> bool:
  return _EARLIER_NAMES.get(implementation, implementation) == "cluster"


def _why_not_here(implementation: str) -> str | None:
  """Why kernels of a step do not run on these devices, whatever the model; None where they do."""
  one_kernel = _is_one_kernel(implementation)
  if one_kernel and (platform := hardware.platform()) != "gpu":
    return f"{implementation}: a step's kernel runs on NVIDIA GPUs only, not on {platform}"
  reason = hardware.why_not_hopper() if one_kernel else hardware.why_not_nvidia()
  return reason and f"{implementation}: {reason}"


@functools.cache
def _say_once(line: str) -> None:
  logger.warning(line)


def likely(
  logits: Float[Array, "B V"], *, top_k: int | None = None, top_p: int | float = 1.0
) -> Float[Array, "B V"]:
  """The logits of the k likeliest, and of the fewest that have `top_p` of what is left; else -inf.

  Values equal to the last that is kept are kept too.
  """
  if top_k is not None:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  if top_p < 1.0:
    ordered = -jnp.sort(-logits, axis=-1)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    least = jnp.where(before < top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    logits = jnp.where(logits >= least, logits, -jnp.inf)
  return logits


def as_multiplied(model, params: dict) -> dict:
  """The layers' weights in the dtype of their products: a step mostly reads weights."""
  dtype = levels.first_block(model).feed_forward.up.dtype
  names = ("attention", "feed_forward", "pool", "spread")
  of_product = lambda path: any(getattr(entry, "key", None) in names for entry in path)
  narrow = lambda path, x: jnp.asarray(x, dtype) if of_product(path) else x
  return jax.tree.map_with_path(narrow, params)


def _start(graphdef, params, known, *, sparse: bool):
  """The last known byte of each row, and the caches after all that is known."""
  model, (rows, P) = nnx.merge(graphdef, params), known.shape
  if P == 0:
    return jnp.zeros(rows, jnp.uint8), model.init_cache(rows, sparse=sparse)
  _, caches = model.prefill(known, sparse=sparse)
  return known[:, -1], caches


def run_steps(
  graphdef,
  params,
  carry,
  keys,
  start,
  known,
  lengths,
  *,
  temperature,
  top_k,
  top_p,
  implementation,
  phase=0,
):
  """Steps start, start + 1, ... for as many columns as `known` has; `phase` is that of `start`.

  Of a model of several levels it says at which steps groups begin: start modulo their size.
  """
  model = nnx.merge(graphdef, params)
  kernels = step_kernels(implementation)
  if kernels and (reason := _why_xla_alone(model)):
    raise NotImplementedError(f"{implementation}: {reason}")
  run_blocks = kernels and {
    stack: kernels.run_blocks_of(groups, known.shape[0]) for stack, groups in levels.stacks(model)
  }

  def draw(logits, step):  # by row, so that a row does not depend on how many there are
    if temperature == 0.0:
      return jnp.argmax(logits, axis=-1)
    logits = likely(logits / temperature, top_k=top_k, top_p=top_p)
    keys_now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys_now, logits)

  def one_step(beginning, carry, step_and_known):
    (token, caches), (step, known) = carry, step_and_known
    options = dict(run_blocks=run_blocks, beginning=beginning)
    logits, caches = model.decode_step(token, step, caches, **options)
    token = jnp.where(step < lengths, known, draw(logits, step).astype(jnp.uint8))
    return (token, caches), token

  steps = start + jnp.arange(known.shape[1])
  options = dict(count=known.shape[1], phase=phase, factors=model.factors)
  carry, tokens = levels.scan_steps(one_step, carry, (steps, known.T), **options)
  return carry, tokens.T
