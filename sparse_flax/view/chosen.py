"""Which blocks of keys layers choose: the share of lists that read a block, by its distance."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import UInt8


def shares(
  graphdef: nnx.GraphDef, params: dict, inputs: UInt8[np.ndarray, "N T"]
) -> dict[int, Float32[np.ndarray, " nk"]]:
  """Of each layer that chooses, by its number: the share of lists that read a block so many before.

  Distance 0 is the last block that holds a query of the list. The mean is over inputs and over all
  lists with a block at this distance.
  """
  run, total = _program(graphdef), {}
  for tokens in inputs:
    for layer, counts in run(params, jnp.asarray(tokens[None])).items():
      total[layer] = total.get(layer, 0) + np.stack(counts)
  return {n: (read / there).astype(np.float32) for n, (read, there) in total.items()}


@functools.lru_cache(maxsize=4)
def _program(graphdef: nnx.GraphDef) -> Callable:
  def run(params, tokens):
    model = nnx.merge(graphdef, params)
    recipe = next(x for x in model.recipes if x is not None)  # all have the same sizes of blocks
    sizes = recipe.query_block, recipe.block_size
    return model.chosen_blocks(tokens, reduce=lambda chosen: _by_distance(chosen, *sizes))

  return jax.jit(run)


def _by_distance(
  chosen: Bool[Array, "B Hl nq nk"], query_block: int, block_size: int
) -> tuple[Int[Array, " nk"], Int[Array, " nk"]]:
  """Lists that read a block at each distance, and those that could."""
  B, Hl, nq, nk = chosen.shape
  last = np.minimum(((np.arange(nq) + 1) * query_block - 1) // block_size, nk - 1)
  distance = last[:, None] - np.arange(nk)
  read = chosen.sum(axis=(0, 1), dtype=jnp.int32)
  where = np.where(distance >= 0, distance, nk)
  there = np.bincount(where.ravel(), minlength=nk + 1)[:nk] * B * Hl
  found = jnp.zeros(nk, jnp.int32).at[where].add(read, mode="drop")
  return found, jnp.asarray(there, jnp.int32)


def draw(found: dict[int, Float32[np.ndarray, " nk"]], block_size: int) -> matplotlib.figure.Figure:
  """A line for each layer.

  Args:
    found: of `shares`.
    block_size: keys of a block.
  """
  figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  for layer, share in found.items():
    axes.plot(np.arange(len(share)) * block_size, share, ".-", lw=0.8, label=f"layer {layer}")
  axes.set(xlabel="distance back, tokens", ylabel="share of lists that read it", ylim=(0, 1.05))
  axes.set_title(f"blocks of {block_size} keys that layers choose")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7)
  return figure
