"""All residual blocks of a decoding step in one kernel, for NVIDIA GPUs with clusters."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Integer

from pallas_kernels import api
from pallas_kernels.decode import cluster as kernels
from sparse_flax import model as model_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["matrices"],
  meta_fields=["C", "E", "H", "Dk", "Dv", "F", "epsilon"],
)
@dataclasses.dataclass(frozen=True)
class Weights:
  """Of layers like each other, stacked, as the kernel reads them.

  Attributes:
    matrices: queries, keys and values; out; up; down: [L, C, 16-bit words] each.
    C: thread blocks of a cluster, which share them.
    E: width of the residual stream.
    H: heads.
    Dk: width of a head's queries and keys.
    Dv: width of its values.
    F: width between up and down.
    epsilon: of the norms.
  """

  matrices: tuple[Array, ...]
  C: int
  E: int
  H: int
  Dk: int
  Dv: int
  F: int
  epsilon: float


def supported(
  groups: Sequence[model_lib.Block], caches: Sequence[model_lib.cache.Cache], batch_size: int
) -> str | None:
  """Why the kernel cannot compute the steps of a model; None where it can.

  Args:
    groups: the model's; their weights may be shapes only.
    caches: of each entry of the groups; they may be shapes only.
    batch_size: sequences.
  """
  C, R = kernels.cluster_shape(batch_size)
  up = groups[0].feed_forward.up
  model = dict(groups=up.kernel.shape[0], epsilon=_epsilon(groups), **_widths(groups[0]))
  sizes = _sizes(caches, B=batch_size, C=C, R=R, **model)
  return _unsupported(caches) or kernels.supported(sizes, up.dtype)


def run_blocks_of(groups: Sequence[model_lib.Block], batch_size: int) -> Callable:
  """`run_blocks` of `SparseTransformer.decode_step`; weights are made ready here, once.

  Args:
    groups: the model's.
    batch_size: sequences.

  Raises:
    NotImplementedError: the kernel does not take such a model.
  """
  weights = weights_of(groups, C=kernels.cluster_shape(batch_size)[0])

  def run_blocks(x, step, caches):
    with api.computed_by("cluster"):
      return decode_steps(x, weights, step, caches)

  return run_blocks


def weights_of(groups: Sequence[model_lib.Block], *, C: int) -> Weights:
  """The weights of all layers, of which each entry has those at one place of the groups, stacked.

  Args:
    groups: blocks.
    C: thread blocks of a cluster, of `kernels.cluster_shape`.

  Raises:
    NotImplementedError: sizes or a dtype that the kernel does not take.
  """
  widths = _widths(groups[0])
  kernels.check(**widths, C=C, dtype=groups[0].feed_forward.up.dtype)
  each = [_matrices(layer, C) for layer in groups]
  in_order = lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:])
  return Weights(jax.tree.map(in_order, *each), C=C, epsilon=_epsilon(groups), **widths)


def _epsilon(groups: Sequence[model_lib.Block]) -> float:
  return groups[0].attention_norm.epsilon  # all norms of a model's blocks have the same


def _widths(layers: model_lib.Block) -> dict[str, int]:
  attention, feed = layers.attention, layers.feed_forward
  H = attention.num_heads
  E, F = feed.up.kernel.shape[1:]
  Dk, Dv = (part.kernel.shape[2] // H for part in (attention.key, attention.value))
  return dict(E=E, H=H, Dk=Dk, Dv=Dv, F=F)


def _matrices(layers: model_lib.Block, C: int) -> tuple[Array, ...]:
  attention, feed = layers.attention, layers.feed_forward
  narrow = lambda x: x[...].astype(feed.up.dtype)
  norm = lambda layer: (layer.scale[...], layer.bias[...])

  def by_heads(name):
    parts = (getattr(part, name) for part in (attention.query, attention.key, attention.value))
    return kernels.join_heads(*map(narrow, parts), num_heads=attention.num_heads)

  pair = lambda layer: (narrow(layer.kernel), narrow(layer.bias))
  matrices = (
    (by_heads("kernel"), by_heads("bias"), norm(layers.attention_norm)),
    (*pair(attention.out), None),
    (*pair(feed.up), norm(layers.feed_forward_norm)),
    (*pair(feed.down), None),
  )
  return tuple(kernels.pack(*matrix, C=C) for matrix in matrices)


def decode_steps(
  x: Float[Array, "B E"],
  weights: Weights,
  step: Integer[Array, ""],
  caches: Sequence[model_lib.cache.Cache],
  *,
  rows: int | None = None,
  run: Callable = kernels.launch,
) -> tuple[Float[Array, "B E"], tuple[model_lib.cache.Cache, ...]]:
  """`Block.decode_step` of all layers.

  Args:
    x: what the layers begin with.
    weights: of all layers.
    step: t.
    caches: of each layer of a group.
    rows: sequences of a cluster; None is a good number.
    run: `launch` or `simulated` of the kernel.

  Raises:
    NotImplementedError: caches that the kernel does not take.
  """
  if reason := _unsupported(caches):
    raise NotImplementedError(reason)
  model = {name: getattr(weights, name) for name in ("C", "E", "H", "Dk", "Dv", "F", "epsilon")}
  R = rows or kernels.cluster_shape(len(x))[1]
  num_groups = len(weights.matrices[0]) // len(caches)
  sizes = _sizes(caches, B=len(x), groups=num_groups, R=R, **model)
  rows = []
  for cache in caches:
    of_sets = [_places_and_seen(parts, step) for parts in model_lib.cache.by_heads(cache)]
    rows += of_sets + of_sets[:1] * (sizes.num_sets - len(of_sets))  # as many rows for each layer
  places, seen = zip(*rows, strict=True)
  together = lambda xs, fill: jnp.stack(
    [jnp.pad(x, (0, max(map(len, xs)) - len(x)), constant_values=fill) for x in xs]
  )
  tables = [x for cache in caches for part in cache for x in (part.key, part.value)]
  x, *tables = kernels.run_layers(
    sizes, x, together(places, 0), together(seen, False), weights.matrices, tables, run=run
  )
  tables = iter(tables)
  refill = lambda part: dataclasses.replace(part, key=next(tables), value=next(tables))
  return x, tuple(tuple(refill(part) for part in cache) for cache in caches)


def _unsupported(caches: Sequence[model_lib.cache.Cache]) -> str | None:
  """Heads may differ in their pattern, if as many have each of the patterns."""
  for cache in caches:
    sets = model_lib.cache.by_heads(cache)
    if len({(len(parts[0].heads), _pieces(parts)) for parts in sets}) != 1:
      return "heads that differ in how many rows they keep, or of which some patterns have more"
  return None


def _pieces(parts: Sequence[model_lib.cache.Part]) -> tuple[kernels.Piece, ...]:
  return tuple(kernels.Piece(size=part.rows.size, length=part.rows.length) for part in parts)


def _sizes(caches: Sequence[model_lib.cache.Cache], **sizes: Any) -> kernels.Sizes:
  layers = []
  for cache in caches:
    sets = model_lib.cache.by_heads(cache)
    number = {h: n for n, parts in enumerate(sets) for h in parts[0].heads}
    layers.append(kernels.Layer(_pieces(sets[0]), tuple(number[h] for h in sorted(number))))
  return kernels.Sizes(layers=tuple(layers), slope=model_lib.GELU_SLOPE, **sizes)


def _places_and_seen(
  parts: Sequence[model_lib.cache.Part], step: Integer[Array, ""]
) -> tuple[Integer[Array, "P"], Bool[Array, "S"]]:
  """Whether the step's row is seen, then the first row and the slot of each part; and which rows of
  all parts are seen, but for the step's own, which is not taken from memory."""
  shown, places, cached = jnp.zeros((), bool), [], []
  for n, part in enumerate(parts):
    # Beyond the end means the last slot.
    slot = jnp.minimum(part.rows.slot(step), part.rows.length - 1)
    first = part.rows.first(step)
    at = first + jnp.arange(part.rows.size)
    seen = model_lib.cache.seen(list(parts), n, at, step)
    shown |= jnp.any(seen & (at == slot))
    places += [first, slot]
    # Each part has words of bits of its own.
    cached.append(jnp.pad(seen & (at != slot), (0, -part.rows.size % kernels.WORD_BITS)))
  places = jnp.stack([jnp.asarray(x, jnp.int32) for x in (shown, *places)])
  return places, jnp.concatenate(cached)
