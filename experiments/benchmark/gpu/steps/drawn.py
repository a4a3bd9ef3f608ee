"""Lists of blocks as a model might choose them, drawn at random, equal in every process that asks.

Imports nothing but numpy, for a peer may run where there is no JAX.
"""

import numpy as np

TILE = 128  # queries of a tile of the kernels, and keys
APART = 0.1  # how far the scores of lists of a tile differ, over those of tiles


def count(T: int, block_size: int, query_block: int, top: int) -> int:
  """Entries of all lists of a head: `top`, or all blocks up to the last own one."""
  last = np.minimum(np.arange(query_block, T + query_block, query_block), T) - 1
  return int(np.minimum(last // block_size + 1, top).sum())


def lists(T: int, block_size: int, query_block: int, top: int, num_heads: int) -> np.ndarray:
  """int32 [num_heads, lists, top], ascending, -1 for none at the end, as of `select_blocks`.

  The blocks of a list's own queries, block 0, and others before them. Lists of the same tile are
  alike, as those of neighbouring queries of a trained model.
  """
  nq, nk, rng = -(-T // query_block), -(-T // block_size), np.random.default_rng(0)
  rows, blocks = np.arange(nq)[:, None], np.arange(nk)[None]
  start = rows * query_block // block_size
  last = (np.minimum((rows + 1) * query_block, T) - 1) // block_size
  forced = (blocks == 0) | ((blocks >= start) & (blocks <= last))
  tile = np.arange(nq) * query_block // TILE
  result = np.empty((num_heads, nq, top), np.int32)
  for chosen in result:
    scores = rng.random((tile[-1] + 1, nk), np.float32)[tile]
    if query_block < TILE:
      scores += APART * rng.random((nq, nk), np.float32)
    scores = np.where(forced, np.float32(2), scores)
    scores = np.where(blocks <= last, scores, np.float32(-1))
    best = np.argpartition(-scores, min(top, nk) - 1, axis=1)[:, :top]
    there = np.take_along_axis(scores, best, axis=1) >= 0
    ordered = np.sort(np.where(there, best, nk), axis=1)
    chosen[:] = -1
    chosen[:, : ordered.shape[1]] = np.where(ordered < nk, ordered, -1)
  return result


def num_tiles(T: int, block_size: int, query_block: int, top: int, num_heads: int) -> float:
  """Tiles of TILE x TILE that the lists of all heads make a kernel visit: the union of those of a
  tile of queries, each block as the share of a tile that it is."""
  if query_block % TILE == 0:
    entries = num_heads * count(T, block_size, query_block, top)
    return entries * (query_block / TILE) * (block_size / TILE)
  nk, per_tile = -(-T // block_size), TILE // query_block
  total = 0
  for of_head in lists(T, block_size, query_block, top, num_heads):
    listed = np.zeros((-(-len(of_head) // per_tile), nk + 1), bool)
    listed[np.arange(len(of_head))[:, None] // per_tile, of_head] = True
    total += int(listed[:, :nk].sum())  # the last column is of -1
  return total * block_size / TILE
