"""Models of several scales: layers on rows, and between them layers on groups of rows.

A level is layers before, an inner level, and layers behind it; the innermost has layers alone. A
model without an inner level is one level. See docs/multiscale.md.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Integer
from jaxtyping import Key

from pallas_kernels import patterns
from sparse_flax.model import layer_patterns
from sparse_flax.model import shorten as shorten_lib

# Fields of a level that are those of the level around it where they are not given.
INHERITED = (
  "width", "num_heads", "ff_mult", "qk_ratio", "attention_layers", "stride", "summary_width",
  "sub_blocks", "dropout",
)  # fmt: skip
FACTORS, POOLS, UPS = shorten_lib.FACTORS, shorten_lib.POOLS, shorten_lib.UPS
REQUIRED = ("num_layers", "shorten")
OPTIONAL = {
  "num_layers_after": 0,
  "pool": "linear",
  "up": "linear",
  "positions": False,
  "inner": {},
}
FIELDS = (*REQUIRED, *INHERITED, *OPTIONAL)


@dataclasses.dataclass(frozen=True)
class Spec:
  """What one level of a model is.

  Attributes:
    name: where its fields stand in `config.model`: "", "inner", "inner.inner".
    length: rows of the longest sequence, G.
    factor: tokens of a row: the product of `shorten` of this level and those around it.
    shorten: rows of the level around it that are a row of this one; 1 of the outermost.
    num_layers: before the inner level; of the innermost all.
    num_layers_after: behind the inner level.
    attention_layers: their cycle of patterns.
    patterns: the same, as patterns.
    pool, up, positions: how its rows are made of those of the level around it, and back.
    The others are those of SparseTransformer.
  """

  name: str
  length: int
  factor: int
  shorten: int
  num_layers: int
  num_layers_after: int
  attention_layers: tuple
  patterns: tuple[patterns.Pattern, ...]
  width: int
  num_heads: int
  ff_mult: int | float
  qk_ratio: int | float
  stride: int
  dropout: int | float
  pool: str
  up: str
  positions: bool

  @property
  def depth(self) -> int:
    """Layers of this level alone."""
    return self.num_layers + self.num_layers_after

  @property
  def title(self) -> str:
    """For messages and pictures."""
    return self.name or "the outermost level"


def specs_of(
  *,
  seq_len: int,
  num_layers: int,
  num_layers_after: int = 0,
  inner: Any = None,
  summary_width: int = 0,
  sub_blocks: int = 1,
  ff_mult: int | float = 4,
  qk_ratio: int | float = 1.0,
  dropout: int | float = 0.0,
  **others: Any,
) -> tuple[Spec, ...]:
  """The levels of a model, the outermost first.

  Args:
    seq_len, num_layers, ...: arguments of SparseTransformer; those that are not of a level do not
      matter.

  Raises:
    ValueError: naming the level, the field, its value and what would be right.
  """
  fields = {name: x for name, x in others.items() if name in INHERITED}
  fields |= dict(summary_width=summary_width, sub_blocks=sub_blocks, ff_mult=ff_mult)
  fields |= dict(qk_ratio=qk_ratio, dropout=dropout, num_layers=num_layers)
  fields |= OPTIONAL | dict(num_layers_after=num_layers_after)
  name, length, factor, shorten, found = "", seq_len, 1, 1, []
  while True:
    inside = dict((inner or {}).items())
    found.append(_spec(fields, name, length, factor, shorten, innermost=not inside))
    if not inside:
      break
    name = f"{name}.inner" if name else "inner"
    _check_names(inside, name)
    inner, shorten = inside.pop("inner", None), inside["shorten"]
    length, factor = shorten_lib.num_groups(length, shorten), factor * shorten
    outer = {field: fields[field] for field in INHERITED}
    if length < 1 or factor > seq_len:
      raise ValueError(f"{name}.{shorten=}: its groups have {factor} of {seq_len=} tokens")
    fields = outer | OPTIONAL | inside
  _check_reach(found)
  return tuple(found)


def _check_names(inside: dict, name: str) -> None:
  for field in inside:
    if field not in FIELDS:
      raise ValueError(f"{name}.{field}={inside[field]!r}: there is no such field of a level")
  for field in REQUIRED:
    if field not in inside:
      raise ValueError(f"{name}.{field} is missing: a level needs {' and '.join(REQUIRED)}")
  factor = inside["shorten"]
  if not isinstance(factor, int) or factor not in FACTORS:
    least, most = FACTORS[0], FACTORS[-1]
    raise ValueError(f"{name}.shorten={factor!r}: must be a whole number from {least} to {most}")


def _spec(fields: dict, name: str, length: int, factor: int, shorten: int, *, innermost: bool):
  at = f"{name}." if name else ""
  least = dict(num_layers=1 if innermost else 0, num_layers_after=0, width=1, num_heads=1)
  for field, smallest in least.items():
    if not isinstance(fields[field], int) or fields[field] < smallest:
      raise ValueError(f"{at}{field}={fields[field]!r}: must be a whole number >= {smallest}")
  if innermost and fields["num_layers_after"]:
    raise ValueError(
      f"{at}num_layers_after={fields['num_layers_after']}: must be 0 where there is no inner level"
    )
  layers = fields["attention_layers"]
  if isinstance(layers, str) or not layers:
    known = layer_patterns.PATTERN_NAMES
    raise ValueError(f"{at}attention_layers={layers!r}: must be a tuple of names from {known}")
  for field in ("num_layers", "num_layers_after"):
    if fields[field] % len(layers):
      raise ValueError(
        f"{at}{field}={fields[field]}: must be a multiple of {len(layers)}, the length of "
        f"{at}attention_layers={layers}"
      )
  width, num_heads = fields["width"], fields["num_heads"]
  if width % num_heads:
    raise ValueError(f"{at}{num_heads=} must divide {width=}")
  qk_width = fields["qk_ratio"] * width
  if qk_width < 1 or qk_width % num_heads:
    raise ValueError(
      f"{at}qk_ratio={fields['qk_ratio']}: qk_ratio * {width=} must be a multiple of {num_heads=}"
    )
  hidden = fields["ff_mult"] * width
  if hidden <= 0 or hidden != round(hidden):
    raise ValueError(
      f"{at}ff_mult={fields['ff_mult']}: ff_mult * {width=} must be a whole number >= 1"
    )
  if not 0.0 <= fields["dropout"] < 1.0:
    raise ValueError(f"{at}dropout={fields['dropout']}: must be in [0, 1)")
  for field, choices in (("pool", POOLS), ("up", UPS)):
    if fields[field] not in choices:
      raise ValueError(f"{at}{field}={fields[field]!r}: must be one of {choices}")
  named = {field.name for field in dataclasses.fields(Spec)} & fields.keys()
  own = {field: fields[field] for field in named} | dict(attention_layers=tuple(layers))
  try:
    found = layer_patterns.patterns_of(**fields)
  except ValueError as error:
    raise ValueError(f"{at}{error}") from error
  own |= dict(name=name, length=length, factor=factor, shorten=shorten, patterns=found)
  return Spec(**own)


# ------------------------------------------------------------------------------ the rule of reach


def reach(spec: Spec, factor: int) -> int:
  """How many rows back the layers of a level surely carry, one after the other, without a gap.

  Local(w) carries w - 1 rows, a pattern of blocks that end where groups of `factor` rows do
  factor - 1, whatever else there is.
  """
  window, block = 0, 0
  per_layer = spec.depth // len(spec.patterns)
  for pattern in spec.patterns:
    members = [pattern.of_head(h) for h in range(pattern.period)]
    parts = [part for member in members for part in _parts(member)]
    window += per_layer * max((_window(part, spec.length) for part in parts), default=0)
    if per_layer and any(isinstance(x, patterns.Block) and x.stride % factor == 0 for x in parts):
      block = factor - 1
  return window + block


def _parts(pattern: patterns.Pattern) -> list[patterns.Pattern]:
  match pattern:
    case patterns.Union(members):
      return [part for member in members for part in _parts(member)]
    case patterns.Strided():
      return _parts(pattern.union)
  return [pattern]


def _window(pattern: patterns.Pattern, length: int) -> int:
  match pattern:
    case patterns.Dense():
      return length - 1
    case patterns.Local(window=window):
      return window - 1
    case patterns.Column(stride=1):
      return length - 1
  return 0


def _check_reach(levels: list[Spec]) -> None:
  """A group tells its rows of all complete groups; what lies between, other layers must carry.

  Of the group that is being predicted its last row lacks k - 2 bytes, which the residual does not
  bring.
  """
  around = 0  # tokens that the levels outside carry
  for level, inner in itertools.pairwise(levels):
    there = reach(level, inner.shorten)
    if there < inner.shorten - 2 and around < inner.factor - 2:
      fields = f"{level.name}." if level.name else ""
      outside = ""
      if level.name:
        outside = f", or those outside of it {inner.factor - 2} bytes and not {around}"
      raise ValueError(
        f"{inner.name}.shorten={inner.shorten}: the layers around it must reach at least "
        f"{inner.shorten - 2} rows back and reach {there}{outside}; raise {fields}num_layers, or "
        f"{fields}stride with 'local' in {fields}attention_layers"
      )
    around += there * level.factor


# ------------------------------------------------------------------------------ layers of a level


class Level(nnx.Module):
  """An inner level: `shorten`, its layers, `lengthen`.

  The layers are `groups` of the innermost level, or `before`, `inner` and `after`; None stands for
  no layers. What holds layers has `seq_len`, their rows at most.
  """

  inner: "Level | None" = None
  before: Any = None
  after: Any = None
  groups: Any = None

  def __init__(
    self,
    specs: tuple[Spec, ...],
    outer: Spec,
    *,
    make_stack: Callable,
    kernel_init: nnx.Initializer,
    out_init: nnx.Initializer,
    position_init: nnx.Initializer,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    """Args:
    specs: of this level and those inside it.
    outer: of the level around it.
    make_stack: (spec, number of layers, rngs) -> groups of blocks.
    kernel_init, out_init, position_init: of `shorten` and `lengthen`.
    rngs: source of the initial values.
    options: epsilon, dtype and param_dtype of `shorten` and `lengthen`.
    """
    own = specs[0]
    sizes = dict(factor=own.shorten, width=outer.width, inner_width=own.width, **options)
    positions = dict(num_positions=own.length if own.positions else 0, position_init=position_init)
    try:
      self.shorten = shorten_lib.Shorten(
        pool=own.pool, kernel_init=kernel_init, **positions, **sizes, rngs=rngs
      )
      inits = dict(kernel_init=kernel_init, out_init=out_init, position_init=position_init)
      add_layers(self, specs, make_stack=make_stack, **inits, **options, rngs=rngs)
      self.lengthen = shorten_lib.Lengthen(up=own.up, out_init=out_init, **sizes, rngs=rngs)
    except ValueError as error:
      if not str(error).startswith(("pool=", "up=")):
        raise
      raise ValueError(f"{own.name}.{error}") from error


def add_layers(
  level: Any, specs: tuple[Spec, ...], *, make_stack: Callable, rngs: nnx.Rngs, **options: Any
) -> None:
  """Gives a level, or a model, the layers of the first of `specs` and what lies inside."""
  own = specs[0]
  level.seq_len = own.length
  if len(specs) == 1:
    level.groups = make_stack(own, own.num_layers, rngs)
    return
  stack = lambda num_layers: make_stack(own, num_layers, rngs) if num_layers else None
  level.before = stack(own.num_layers)
  level.inner = Level(specs[1:], own, make_stack=make_stack, rngs=rngs, **options)
  level.after = stack(own.num_layers_after)


def stacks(level: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """The stacks of a level with their names, in the order in which they run."""
  if level.inner is None:
    yield f"{name}groups", level.groups
    return
  if level.before is not None:
    yield f"{name}before", level.before
  yield from stacks(level.inner, f"{name}inner.")
  if level.after is not None:
    yield f"{name}after", level.after


def first_block(model: Any) -> Any:
  """A block of a model, whose options all blocks share."""
  return next(iter(stacks(model)))[1][0]


def num_groups(groups: Any) -> int:
  """The groups of a stack."""
  return groups[0].attention.query.kernel.shape[0]


def run(
  level: Any,
  x: Float[Array, "B T E"],
  key: Key[Array, ""] | None,
  *,
  run_stack: Callable,
  keep: bool,
) -> Float[Array, "B T E"]:
  """The rows behind the layers of a level.

  Args:
    level: a Level, or a model.
    x: its rows.
    key: of dropout; None turns it off.
    run_stack: (level, groups, x, key) -> x.
    keep: whether the forward pass keeps what is computed between levels, beside their inputs.
  """
  if level.inner is None:
    return run_stack(level, level.groups, x, key)
  inner, keys = level.inner, [None] * 3 if key is None else jax.random.split(key, 3)
  again = (lambda f: f) if keep else jax.checkpoint
  if level.before is not None:
    x = run_stack(level, level.before, x, keys[0])
  z = again(lambda module, x: module(x))(inner.shorten, x)
  z = run(inner, z, keys[1], run_stack=run_stack, keep=keep)
  x = x + again(lambda module, z: module(z, x.shape[1]))(inner.lengthen, z)
  return x if level.after is None else run_stack(level, level.after, x, keys[2])


def run_looking(
  level: Any,
  x: Float[Array, "B T E"],
  rows: Integer[np.ndarray, "Q"],
  *,
  run_stack: Callable,
  factor: int = 1,
) -> tuple[Float[Array, "B T E"], list]:
  """As `run`, and what each stack says of its attention.

  Args:
    level: a Level, or a model.
    x: its rows.
    rows: numbers of tokens whose queries are looked at.
    run_stack: (groups, x, rows, factor) -> (x, what it says).
    factor: tokens of a row of the level.
  """
  if level.inner is None:
    x, said = run_stack(level.groups, x, rows // factor, factor)
    return x, [said]
  results, inner = [], level.inner
  for stack in (level.before, inner, level.after):
    if stack is None:
      continue
    if stack is not inner:
      x, said = run_stack(stack, x, rows // factor, factor)
      results.append(said)
      continue
    further = dict(run_stack=run_stack, factor=factor * inner.shorten.factor)
    z, said = run_looking(inner, inner.shorten(x), rows, **further)
    x = x + inner.lengthen(z, x.shape[1])
    results += said
  return x, results


def on_slots(
  weights: Float[Array, "B H Q G"], factor: int, T: int, num_heads: int
) -> Float[Array, "B heads Q T"]:
  """Weights on groups as weights on the T slots that they pool, in equal parts.

  Group g pools slots (g - 1) factor + 1 ... g factor, group 0 the start vector alone. Slots behind
  the last group get none, and so do heads that there are not.

  Args:
    weights: of a layer.
    factor: tokens of a group.
    T: slots.
    num_heads: of the result.
  """
  if factor > 1:
    slots = np.arange(T)
    group = -(-slots // factor)
    share = np.where(slots == 0, 1.0, 1.0 / factor) * (group < weights.shape[-1])
    held = weights[..., np.minimum(group, weights.shape[-1] - 1)]
    weights = held * jnp.asarray(share, weights.dtype)[None, None, None]
  return jnp.pad(weights, ((0, 0), (0, num_heads - weights.shape[1]), (0, 0), (0, 0)))


# ------------------------------------------------------------------------------- one byte a step


class Caches(NamedTuple):
  """What a level that holds another keeps between steps. Arrays have an axis in front of B.

  Attributes:
    before, after: caches of its layers; () where there are none.
    inner: what the inner level keeps.
    ring: [1, B, k, E], the last k rows as they are pooled, that of slot t at t % k.
    held: [1, B, k, E], the rows of the current group.
  """

  before: tuple
  after: tuple
  inner: Any
  ring: Float[Array, "1 B k E"]
  held: Float[Array, "1 B k E"]


def group_size(model: Any) -> int:
  """Tokens of a row of the innermost level: after so many steps all levels begin a group."""
  return math.prod(factors(model))


def factors(model: Any) -> tuple[int, ...]:
  """`shorten` of each inner level, the outermost first."""
  found, level = [], model
  while level.inner is not None:
    level = level.inner
    found.append(level.shorten.factor)
  return tuple(found)


def beginning_at(step: int, factors: tuple[int, ...]) -> int:
  """How many inner levels begin a group with this step, and so take a step themselves."""
  return sum(step % math.prod(factors[: n + 1]) == 0 for n in range(len(factors)))


def by_stack(level: Any, caches: Any, name: str = "") -> dict[str, Any]:
  """The caches of each of `stacks`, by its name."""
  if level.inner is None:
    return {f"{name}groups": caches}
  around = {f"{name}before": caches.before, f"{name}after": caches.after}
  return around | by_stack(level.inner, caches.inner, f"{name}inner.")


def init_caches(
  level: Any, batch_size: int, *, width: int, dtype: jax.typing.DTypeLike, of_stack: Callable
) -> Any:
  """Before the first step.

  Args:
    level: a Level, or a model.
    batch_size: B.
    width: of the level's rows.
    dtype: of the rows.
    of_stack: (groups, rows at most) -> caches.
  """
  if level.inner is None:
    return of_stack(level.groups, level.seq_len)
  before, after = (
    () if groups is None else of_stack(groups, level.seq_len)
    for groups in (level.before, level.after)
  )
  inner = level.inner
  sizes = dict(width=inner.shorten.inner_width, dtype=dtype, of_stack=of_stack)
  rows = jnp.zeros((1, batch_size, inner.shorten.factor, width), dtype)
  return Caches(before, after, init_caches(inner, batch_size, **sizes), rows, jnp.copy(rows))


def prefill(level: Any, x: Float[Array, "B P E"], *, of_stack: Callable) -> tuple[Array, Any]:
  """The rows behind the layers of a level, and the caches as P >= 1 steps leave them.

  Args:
    level: a Level, or a model.
    x: its rows.
    of_stack: (groups, x, rows at most) -> (x, caches).
  """
  if level.inner is None:
    return of_stack(level.groups, x, level.seq_len)
  before, after, inner = (), (), level.inner
  if level.before is not None:
    x, before = of_stack(level.before, x, level.seq_len)
  P, k = x.shape[1], inner.shorten.factor
  last = jnp.pad(inner.shorten.rows(x), ((0, 0), (k, 0), (0, 0)))[:, P : P + k]
  ring = jnp.roll(last, P % k, axis=1)  # its first row is that of slot P - k
  z, caches = prefill(inner, inner.shorten(x), of_stack=of_stack)
  held = inner.lengthen.rows(z[:, -1])
  x = x + inner.lengthen(z, P)
  if level.after is not None:
    x, after = of_stack(level.after, x, level.seq_len)
  return x, Caches(before, after, caches, ring[None], held[None])


def decode_step(
  level: Any,
  x: Float[Array, "B E"],
  step: Integer[Array, ""],
  caches: Any,
  *,
  beginning: int,
  of_stack: Callable,
  name: str = "",
) -> tuple[Float[Array, "B E"], Any]:
  """Row `step` behind the layers of a level, and the caches with it.

  An inner level takes its step at the first slot of a group, and what comes of it serves the group.

  Args:
    level: a Level, or a model.
    x: the row.
    step: 0, 1, 2, ...
    caches: of `init_caches`, or of the step before.
    beginning: how many inner levels begin a group with this step; never traced, for a branch over
      caches may copy them.
    of_stack: (name, groups, x, step, caches) -> (x, caches).
    name: in front of the names of stacks.
  """
  if level.inner is None:
    return of_stack(f"{name}groups", level.groups, x, step, caches)
  before, after, within, ring, held = caches
  inner, k = level.inner, level.inner.shorten.factor
  if level.before is not None:
    x, before = of_stack(f"{name}before", level.before, x, step, before)
  row = inner.shorten.rows(x).astype(ring.dtype)
  ring = jax.lax.dynamic_update_index_in_dim(ring, row[None], step % k, axis=2)
  if beginning:
    # This slot, whose row is at 0, is the last of the group.
    z = inner.shorten.pooled(jnp.roll(ring[0], -1, axis=1), step // k)
    further = dict(beginning=beginning - 1, of_stack=of_stack, name=f"{name}inner.")
    z, within = decode_step(inner, z, step // k, within, **further)
    held = inner.lengthen.rows(z)[None].astype(held.dtype)
  x = x + jax.lax.dynamic_index_in_dim(held[0], step % k, axis=1, keepdims=False)
  if level.after is not None:
    x, after = of_stack(f"{name}after", level.after, x, step, after)
  return x, Caches(before, after, within, ring, held)


def scan_steps(
  one_step: Callable, carry: Any, steps: Any, *, count: int, phase: int, factors: tuple[int, ...]
) -> tuple[Any, Any]:
  """As `lax.scan` of (beginning, carry, step) -> (carry, result) over steps of a model of levels.

  Steps that begin a group are not among the others: a scan over groups has one step of the inner
  level, and a scan over the rest of the group.

  Args:
    one_step: of (how many inner levels begin a group, carry, what the step is given).
    carry: before the first step.
    steps: trees of arrays with `count` in front.
    count: steps.
    phase: number of the first step, modulo the product of `factors`.
    factors: of the inner levels.

  Returns:
    The carry behind the last step, and the results of all, stacked.
  """
  if not factors:
    return jax.lax.scan(functools.partial(one_step, 0), carry, steps)
  sizes = [math.prod(factors[:n]) for n in range(len(factors) + 1)]

  def span(level, beginning, carry, xs):
    """Steps of one group of a level, of which the first begins `beginning` levels."""
    if level == 0:
      carry, result = one_step(beginning, carry, jax.tree.map(lambda x: x[0], xs))
      return carry, jax.tree.map(lambda x: x[None], result)
    size = sizes[level - 1]
    carry, first = span(level - 1, beginning, carry, jax.tree.map(lambda x: x[:size], xs))
    rest = jax.tree.map(lambda x: x[size:], xs)
    carry, others = spans(level - 1, level - 1, carry, rest)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), first, others)

  def spans(level, beginning, carry, xs):
    """As many groups of a level as there are steps for."""
    size = sizes[level]
    cut = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), xs)
    carry, results = jax.lax.scan(lambda c, x: span(level, beginning, c, x), carry, cut)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

  done, results = 0, []
  # First to the end of a group of each level, then whole groups, then what is left of one.
  while done < count:
    at = phase + done
    whole = max(n for n, size in enumerate(sizes) if at % size == 0)
    while sizes[whole] > count - done:
      whole -= 1
    beginning = max(n for n, size in enumerate(sizes) if at % size == 0)
    if whole == len(factors):
      number = (count - done) // sizes[whole]
    elif beginning > whole:  # the first of a group that is not whole
      number = 1
    else:
      ahead = sizes[whole + 1] - at % sizes[whole + 1]
      number = min(ahead, count - done) // sizes[whole]
    taken = slice(done, done + number * sizes[whole])
    xs = jax.tree.map(lambda x, taken=taken: x[taken], steps)
    carry, result = spans(whole, min(beginning, len(factors)), carry, xs)
    results.append(result)
    done = taken.stop
  return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *results)
