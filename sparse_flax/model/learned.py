"""How layers choose the blocks of keys that they read: recipes, their fields, stages of training.

`learned_attention.LearnedSelfAttention` is the layer, docs/learned.md has formulas and rules.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import patterns

LISTS = ("group", "all", "head")
KEY_CONVS = (0, 3, 5)
MOST_DENSE = 65_536  # tokens of an indexer that learns from all blocks: it holds T^2 / block_size

# Axes of `sharding.AXES` over which a layer that chooses its blocks cannot be sharded, and why.
WHY_NOT_SHARDED = {
  "tensor": "the heads that share a list of learned attention have to be on one device",
  "sequence": "a list of learned attention may have blocks of the whole sequence",
}

# What a call chooses: "dense" every block, a number so many, None what the layer was built with.
Stage = Literal["dense"] | int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """What all recipes share.

  Attributes:
    block_size: b, keys of a block.
    top: blocks of a list, those of its own queries and the forced ones included.
    query_block: Q, neighbouring queries that share a list; divides b, or b divides it.
    first: so many blocks from the beginning are always read.
    local: a query's own block, and the `local` - 1 before it, are always read.
    lists: who has a list for itself: each "group" of query heads with a key head, "all" heads
      together, or each "head".
  """

  block_size: int = 128
  top: int = 16
  query_block: int = 16
  first: int = 1
  local: int = 1
  lists: str = "group"

  def __post_init__(self):
    least = dict(block_size=1, top=1, query_block=1, first=0, local=1)
    for name, x in least.items():
      _check_whole(name, getattr(self, name), x)
    if self.lists not in LISTS:
      raise ValueError(f"learned.lists={self.lists!r}: must be one of {LISTS}")
    if self.block_size % self.query_block and self.query_block % self.block_size:
      raise ValueError(
        f"learned.query_block={self.query_block}: must divide learned.block_size="
        f"{self.block_size}, or must be a multiple of it"
      )
    self.check_top(self.top, "learned.top")

  @property
  def forced(self) -> int:
    """Blocks that are in a list whatever their scores."""
    return max(1, self.query_block // self.block_size) + self.first + self.local - 1

  def check_top(self, top: int, name: str) -> None:
    """Raises ValueError where `top` has no room for the blocks that are always read."""
    if isinstance(top, bool) or not isinstance(top, int) or top < self.forced:
      raise ValueError(
        f"{name}={top!r}: must be a whole number >= {self.forced}, the blocks that are always "
        f"read with query_block={self.query_block}, block_size={self.block_size}, "
        f"first={self.first} and local={self.local}"
      )

  def num_lists(self, num_heads: int, num_kv_heads: int) -> int:
    """Lists of a token."""
    return {"group": num_kv_heads, "all": 1, "head": num_heads}[self.lists]

  def num_pairs(self, T: int) -> float:
    """Pairs of a query and a key that a head computes products of, about."""
    return T * min(float(self.top * self.block_size), (T + 1) / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moba(Recipe):
  """Blocks by the products of queries and the mean keys of blocks (arXiv:2502.13189).

  Attributes:
    key_conv: taps of a causal convolution over the keys of a head, by feature, that is added to
      them: 0 for none, 3 or 5 (arXiv:2511.11571). It is zero at first.
  """

  key_conv: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.key_conv not in KEY_CONVS:
      raise ValueError(f"learned.key_conv={self.key_conv!r}: must be one of {KEY_CONVS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nsa(Recipe):
  """Attention to pooled keys, to blocks chosen by its weights, and to a window, each with a gate
  (arXiv:2502.11089). The three share queries, keys and values.

  Attributes:
    window: keys of the third, the query's own included.
  """

  local: int = 2
  window: int = 512

  def __post_init__(self):
    super().__post_init__()
    _check_whole("window", self.window, 1)

  def num_pairs(self, T: int) -> float:
    coarse = T * T / (2 * self.block_size)
    return super().num_pairs(T) + coarse + patterns.Local(self.window).num_pairs(T)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Indexer(Recipe):
  """Blocks by queries and keys of their own, which learn from where attention lies
  (arXiv:2512.02556, arXiv:2606.13392).

  Attributes:
    index_size: features of these queries and keys.
    index_heads: of these queries; 0: as many as there are lists.
  """

  index_size: int = 64
  index_heads: int = 0

  def __post_init__(self):
    super().__post_init__()
    _check_whole("index_size", self.index_size, 1)
    _check_whole("index_heads", self.index_heads, 0)


RECIPES: dict[str, type[Recipe]] = {"moba": Moba, "nsa": Nsa, "indexer": Indexer}
FIELDS = tuple(dict.fromkeys(x.name for r in RECIPES.values() for x in dataclasses.fields(r)))


def recipes_of(
  *, attention_layers: Sequence[Any], learned: Any = None, **others: Any
) -> tuple[Recipe | None, ...]:
  """Those of a SparseTransformer's cycle, None where a layer has a pattern; see its arguments.

  Raises:
    ValueError: a field that no recipe has, or one that makes no sense.
  """
  del others
  given = dict(learned or {})
  for name in given:
    if name not in FIELDS:
      raise ValueError(f"learned.{name}={given[name]!r}: must be one of {', '.join(FIELDS)}")

  def of_entry(entry: Any) -> Recipe | None:
    if not isinstance(entry, str) or entry not in RECIPES:
      return None
    recipe = RECIPES[entry]
    own = {field.name for field in dataclasses.fields(recipe)}
    return recipe(**{name: x for name, x in given.items() if name in own})

  return tuple(of_entry(entry) for entry in attention_layers)


def in_levels(levels: Sequence[tuple[str, Sequence[Recipe | None]]]) -> tuple[Recipe | None, ...]:
  """The recipes of a model's cycle, given those of its levels by name, the outermost first.

  Raises:
    ValueError: a model with inner levels has layers that choose.
  """
  if len(levels) > 1:
    for name, recipes in levels:
      if names := sorted({x for x, kind in RECIPES.items() for y in recipes if type(y) is kind}):
        raise ValueError(
          f"attention_layers of {name} with {names[0]!r}: must be patterns in a model with inner "
          "levels, whose lists of blocks are not built yet"
        )
  return tuple(levels[0][1])


def stage_at(stages: Sequence[Any], step: int) -> Stage:
  """That of `learned_stages` in which the update after `step` others is; None without stages."""
  return next((stage for start, stage in reversed(stages) if start <= step), None)


def check_stages(stages: Any, recipes: Sequence[Recipe | None], seq_len: int) -> None:
  """Raises ValueError for `learned_stages` that cannot be those of a model."""
  given, there = f"learned_stages={stages!r}", [x for x in recipes if x is not None]
  if not stages:
    return
  if not there:
    raise ValueError(f"{given}: must be () without one of {', '.join(RECIPES)} in attention_layers")
  pairs = all(isinstance(x, tuple | list) and len(x) == 2 for x in stages)
  starts = [x[0] for x in stages] if pairs else []
  whole = all(isinstance(x, int) and not isinstance(x, bool) for x in starts)
  if not pairs or not whole or starts[0] != 0 or starts != sorted(set(starts)):
    raise ValueError(
      f"{given}: must be pairs (step, 'dense' or a number of blocks), from step 0 on, ascending"
    )
  for _, stage in stages:
    for recipe in there:
      if stage != "dense":
        recipe.check_top(stage, f"{given}, of which {stage!r}")
      elif isinstance(recipe, Indexer) and seq_len > MOST_DENSE:
        raise ValueError(
          f"{given}: a stage of an indexer must not be 'dense' beyond {MOST_DENSE:,} tokens, and "
          f"seq_len={seq_len}"
        )


def with_losses(
  recipes: Sequence[Recipe | None], x: Float[Array, "B T E"], *, stage: Stage, losses: bool
) -> tuple[tuple, Callable]:
  """What goes through a model whose layers choose, and what takes it through a `Block`.

  Returns:
    (x, sums of losses by their names), and (that, block, bits) -> that.
  """
  learns = losses and any(isinstance(recipe, Indexer) for recipe in recipes)
  sums = {"index": jnp.zeros((), jnp.float32)} if learns else {}

  def run(stream: tuple, layer: Any, bits: Any) -> tuple:
    x, sums = stream
    x, found = layer.in_stage(x, bits, stage=stage, losses=losses)
    return x, {
      name: total + found[name] if name in found else total for name, total in sums.items()
    }

  return (x, sums), run


def _check_whole(name: str, value: Any, least: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(f"learned.{name}={value!r}: must be a whole number >= {least}")
