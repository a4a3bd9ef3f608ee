"""Ancestral sampling: one byte after the other, with the keys and values of earlier steps kept."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Key
from jaxtyping import UInt8

_PIECES = 16  # in which a run that reports its progress is cut


def generate(
  graphdef: nnx.GraphDef,
  params: dict,
  *,
  key: Key[Array, ""],
  num: int,
  temperature: int | float = 1.0,
  prompt: UInt8[np.ndarray, "num P"] | None = None,
  on_progress: Callable[[int, int], None] | None = None,
) -> UInt8[np.ndarray, "num T"]:
  """Samples whole sequences from softmax(logits / temperature).

  Row r is a function of the weights, `key`, r and its prompt: it is the same among 16 rows as
  alone.

  Args:
    graphdef: of the SparseTransformer, `nnx.graphdef(model)`.
    params: its weights, as a state or as a plain dict.
    key: a typed key, `jax.random.key(seed)`.
    num: number of sequences.
    temperature: 1.0 samples what the model predicts, 0 takes the likeliest byte.
    prompt: the first P bytes of every row, P < T; they come back unchanged.
    on_progress: called with (steps done, steps in all) now and then.

  Returns:
    Bytes, T = seq_len of the model.

  Raises:
    ValueError: num, temperature or the prompt's shape make no sense.
  """
  T = nnx.merge(graphdef, params).seq_len
  if num < 1:
    raise ValueError(f"{num=}: must be a whole number >= 1")
  if not 0.0 <= temperature < float("inf"):
    raise ValueError(f"{temperature=}: must be a number >= 0")
  prompt = np.zeros((num, 0), np.uint8) if prompt is None else np.asarray(prompt)
  P = prompt.shape[1]
  if prompt.shape[0] != num or P >= T:
    raise ValueError(
      f"prompt has shape {list(prompt.shape)}: must have {num=} rows, each shorter than seq_len={T}"
    )
  # One compilation serves all pieces: the last may run past the end, and that part is cut off.
  size = T if on_progress is None else -(-T // _PIECES)
  forced = jnp.asarray(np.pad(prompt, ((0, 0), (0, size * -(-T // size) - P))))
  run = jax.jit(functools.partial(_run, graphdef, temperature=temperature, P=P), donate_argnums=1)
  model = nnx.merge(graphdef, params)
  carry, pieces = (jnp.zeros(num, jnp.uint8), model.init_cache(num)), []
  for start in range(0, T, size):
    piece = jax.lax.dynamic_slice_in_dim(forced, start, size, axis=1)
    carry, tokens = run(params, carry, key, start, piece)
    pieces.append(np.asarray(tokens))
    if on_progress is not None:
      on_progress(min(start + size, T), T)
  return np.concatenate(pieces, axis=1)[:, :T]


def _run(graphdef, params, carry, key, start, forced, *, temperature: int | float, P: int):
  """Steps start, start + 1, ... for as many columns as `forced` has."""
  model = nnx.merge(graphdef, params)

  def draw(logits, step):  # by row, so that a row does not depend on how many there are
    if temperature == 0.0:
      return jnp.argmax(logits, axis=-1)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))
    rows = jnp.arange(logits.shape[0])
    return jax.vmap(jax.random.categorical)(keys(rows), logits / temperature)

  def one_step(carry, step_and_forced):
    (token, cache), (step, forced) = carry, step_and_forced
    logits, cache = model.decode_step(token, step, cache)
    token = jnp.where(step < P, forced, draw(logits, step).astype(jnp.uint8))
    return (token, cache), token

  steps = start + jnp.arange(forced.shape[1])
  carry, tokens = jax.lax.scan(one_step, carry, (steps, forced.T))
  return carry, tokens.T
