"""Ids of segments, of queries and of keys: checked, and as int32, which kernels compare."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checked(
  segment_ids: Any, kv_segment_ids: Any, queries: tuple[Any, ...], keys: tuple[Any, ...]
) -> tuple[Any, Any]:
  """Both as int32, equal where those given are; None for keys whose ids are those of the queries.

  Args:
    segment_ids, kv_segment_ids: as `sparse_attention` has them.
    queries, keys: [B, T] and [B, S].

  Raises:
    ValueError: they are no integers of these shapes, or such as JAX would change.
  """
  if kv_segment_ids is segment_ids and queries == keys:
    kv_segment_ids = None
  if segment_ids is None:
    if kv_segment_ids is not None:
      raise ValueError(
        "kv_segment_ids without segment_ids: must come with them, integers of shape [B, T] = "
        f"{list(queries)}, since a query attends to the keys whose ids equal its own"
      )
    return None, None
  _check("segment_ids", segment_ids, "[B, T]", queries)
  if kv_segment_ids is None:
    if queries != keys:
      raise ValueError(
        f"segment_ids {list(queries)} for keys [B, S] = {list(keys)}: must come with "
        "kv_segment_ids, integers of shape [B, S], where S is not T"
      )
    return _int32(segment_ids), None
  _check("kv_segment_ids", kv_segment_ids, "[B, S]", keys)
  dtypes = segment_ids.dtype, kv_segment_ids.dtype
  wide = any(x.kind == "u" and x.itemsize > 2 for x in dtypes)
  if wide and dtypes[0].kind != dtypes[1].kind:
    raise ValueError(
      f"segment_ids {dtypes[0]}, kv_segment_ids {dtypes[1]}: must both be signed, or both "
      "unsigned, for negative ids would equal large ones"
    )
  return _int32_of_both(segment_ids, kv_segment_ids)


def _check(name: str, ids: Any, axes: str, shape: tuple[Any, ...]) -> None:
  if not (hasattr(ids, "shape") and hasattr(ids, "dtype")):
    raise ValueError(f"{name}: must be an array, not {type(ids).__name__}")
  if ids.shape != tuple(shape) or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"{name} {ids.dtype}{list(ids.shape)}: must be integers of shape {axes} = {list(shape)}"
    )


def _int32(ids: Any) -> Any:
  if ids.dtype.itemsize <= 4:
    return _narrowed("segment_ids", ids)
  if isinstance(ids, np.ndarray):
    return _ranks_of_all((ids,))[0]
  rank = lambda row: jnp.searchsorted(jnp.sort(row), row).astype(jnp.int32)
  return jax.vmap(rank)(ids)


def _int32_of_both(segment_ids: Any, kv_segment_ids: Any) -> tuple[Any, Any]:
  given = segment_ids, kv_segment_ids
  wide = [x for x in given if x.dtype.itemsize > 4]
  if wide and all(isinstance(x, np.ndarray) for x in given):
    return _ranks_of_all(given)
  if all(isinstance(x, np.ndarray) for x in wide):  # beside an array of JAX's, which has 32 bits
    names = "segment_ids", "kv_segment_ids"
    return tuple(_narrowed(name, x) for name, x in zip(names, given, strict=True))

  def ranks(*rows: Any) -> tuple[Any, ...]:
    every = jnp.sort(jnp.concatenate(rows))
    return tuple(jnp.searchsorted(every, row).astype(jnp.int32) for row in rows)

  return jax.vmap(ranks)(*given)


def _ranks_of_all(given: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
  """The numbers of their values among those of all, in order."""
  ranks = np.unique(np.concatenate([x.ravel() for x in given]), return_inverse=True)[1]
  parts = np.split(ranks, np.cumsum([x.size for x in given])[:-1])
  return tuple(part.reshape(x.shape).astype(np.int32) for part, x in zip(parts, given, strict=True))


def _narrowed(name: str, ids: Any) -> Any:
  """The same as int32; for arrays of JAX, and for what will be one."""
  inner = ids
  while isinstance(inner, jax.core.Tracer) and hasattr(inner, "val"):
    inner = inner.val  # under vmap an array of numpy keeps its 64 bits, and loses them later
  if isinstance(inner, np.ndarray) and inner.dtype.itemsize > 4:
    low, high = inner.min(), inner.max()
    if low < -(1 << 31) or high >= 1 << 31:
      raise ValueError(
        f"{name} {inner.dtype} from {low} to {high}: JAX keeps 32 bits of them; number the "
        f"segments, by np.unique({name}, return_inverse=True)[1] for example, those of queries "
        "and of keys together"
      )
  return ids.astype(jnp.int32)
