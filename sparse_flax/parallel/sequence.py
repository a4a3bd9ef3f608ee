"""Attention over a sequence that is sharded over devices: each pattern's own exchange.

Device s of the axis has tokens s T / n ... (s + 1) T / n - 1. What a pattern reads there it
computes as if there were nothing else; what it reads elsewhere is fetched, and the two parts merge
into one softmax through their log-sum-exp. Nothing ever gathers a whole sequence:

    Local(window)        one window of k and v, from the neighbour before
    Column(stride)       q, k and v turn, by one all-to-all, from some rows of all columns into all
                         rows of some, which are `Column(stride / n)` there; the result turns back
    Strided(stride)      both
    Block(stride)        nothing
    Summary, Fixed       the summary columns of k and v, from all devices

docs/sharding.md has the bytes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import heads

Part = tuple[Float[Array, "B T H D"], Float[Array, "B T H"]]

# Query i of the first window of a device sees key j of the window before where j - window > i -
# window; one object, so that it is compiled once.
_WINDOW_BEFORE = patterns.Where(lambda i, j: j > i, causal=False)


def problem(pattern: patterns.Pattern, length: int, n: int) -> str | None:
  """Why sequences of `length` tokens cannot be sharded over n devices; None where they can.

  The text completes "must ...".
  """
  if n == 1:
    return None
  if length % n:
    return f"divide the {length} tokens of a sequence"
  own = length // n
  for member in dict.fromkeys(pattern.of_head(h) for h in range(pattern.period)):
    match member:
      case patterns.Local(window=window, causal=True):
        if window > own:
          return f"leave every device a window of {window} tokens, not {own}"
      case patterns.Column(stride=stride) | patterns.Strided(stride=stride):
        if own % stride or stride % n:
          return f"divide stride={stride} and the {length / stride:g} rows of that length"
      case patterns.Block(stride=stride) | patterns.Summary(stride=stride):
        if own % stride:
          return f"divide the {length / stride:g} rows of {stride} tokens"
      case patterns.Union() if summary := patterns.summary_of(member):
        if own % summary.stride:
          return f"divide the {length / summary.stride:g} rows of {summary.stride} tokens"
      case _:
        return f"be 1 for {member}, which would gather the whole sequence"
  return None


def attend(
  q: Float[Array, "B t H Dk"],
  k: Float[Array, "B t H Dk"],
  v: Float[Array, "B t H Dv"],
  *,
  pattern: patterns.Pattern,
  axis: str,
  implementation: str | None = None,
) -> Float[Array, "B t H Dv"]:
  """`sparse_attention` of this device's t = T / n tokens; for use inside `jax.shard_map`.

  Args:
    q, k, v: of the tokens of this device.
    pattern: of positions in the whole sequence.
    axis: of the mesh, over which sequences are sharded.
    implementation: of `sparse_attention`.

  Raises:
    ValueError: the pattern cannot be sharded so; see `problem`.
  """
  n = jax.lax.axis_size(axis)
  if text := problem(pattern, n * q.shape[1], n):
    raise ValueError(f"sequence={n} devices must {text}")
  call = functools.partial(sparse_attention, implementation=implementation, return_lse=True)
  split_fixed = q.shape[2] % pattern.period != 0
  groups = heads.by_pattern(pattern, q.shape[2], split_fixed=split_fixed)
  results = []
  for of_group, shared in groups:
    rows = (heads.take(x, of_group) for x in (q, k, v))
    results.append(_attend(*rows, pattern=shared, axis=axis, call=call)[0].astype(q.dtype))
  return heads.join(results, [of_group for of_group, _ in groups])


def _attend(q, k, v, *, pattern, axis, call) -> Part:
  """Of heads that share a pattern (of `Fixed`, whose summaries shift)."""
  match pattern:
    case patterns.Local(window=window):
      near = call(q, k, v, pattern=pattern)
      return heads.merge(*near, *_window_before(q, k, v, window=window, axis=axis, call=call))
    case patterns.Column(stride=stride):
      return _columns(q, k, v, stride=stride, axis=axis, call=call, skip=0)
    case patterns.Strided(stride=stride):
      local = patterns.Local(stride)
      near = _attend(q, k, v, pattern=local, axis=axis, call=call)
      # Of a token's own column the window has the token itself.
      return heads.merge(*near, *_columns(q, k, v, stride=stride, axis=axis, call=call, skip=1))
    case patterns.Block():
      return call(q, k, v, pattern=pattern)
    case patterns.Summary():
      summaries = (pattern,)
    case patterns.Fixed(summaries=summaries):
      pass
    case patterns.Union() if summary := patterns.summary_of(pattern):
      summaries = (summary,)
    case _:
      raise ValueError(f"{pattern}: cannot be sharded over a sequence axis")
  near = call(q, k, v, pattern=pattern)
  return heads.merge(*near, *_summaries_before(q, k, v, summaries=summaries, axis=axis, call=call))


def _window_before(q, k, v, *, window, axis, call) -> Part:
  """The first queries against the last keys of the device before; the first device has none."""
  n = jax.lax.axis_size(axis)
  last = jnp.concatenate([k, v], axis=-1)[:, -window:]
  last = jax.lax.ppermute(last, axis, [(s, s + 1) for s in range(n - 1)])
  k, v = jnp.split(last, [k.shape[-1]], axis=-1)
  out, lse = call(q[:, :window], k, v, pattern=_WINDOW_BEFORE)
  lse = jnp.where(jax.lax.axis_index(axis) > 0, lse, -jnp.inf)
  padding = [(0, 0), (0, q.shape[1] - window), (0, 0)]
  return jnp.pad(out, [*padding, (0, 0)]), jnp.pad(lse, padding, constant_values=-jnp.inf)


def _columns(q, k, v, *, stride, axis, call, skip) -> Part:
  """Whole columns, every device a share of them; queries leave out their newest `skip` keys."""
  n = jax.lax.axis_size(axis)
  share = stride // n
  rows = lambda x, width: x.reshape(x.shape[0], -1, width, *x.shape[2:])
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
  turn = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
  joint = rows(jnp.concatenate([q, k, v], axis=-1), stride)
  joint = flat(turn(joint, split_axis=2, concat_axis=1))
  q, k, v = jnp.split(joint, [q.shape[-1], q.shape[-1] + k.shape[-1]], axis=-1)
  # The keys of a row before stand `share` tokens before.
  left_out = skip * share
  stay = slice(None, q.shape[1] - left_out)
  out, lse = call(q[:, left_out:], k[:, stay], v[:, stay], pattern=patterns.Column(share))
  first = [(0, 0), (left_out, 0), (0, 0)]
  out, lse = jnp.pad(out, [*first, (0, 0)]), jnp.pad(lse, first, constant_values=-jnp.inf)
  back = lambda x: flat(turn(rows(x, share), split_axis=1, concat_axis=2))
  return back(out), back(lse)


def _summaries_before(q, k, v, *, summaries, axis, call) -> Part:
  """All queries against the summaries of the devices before; heads take turns at `summaries`."""
  n, stride, width = jax.lax.axis_size(axis), summaries[0].stride, summaries[0].width
  starts = [summary.start for summary in summaries]
  num, (B, own, H, _) = len(starts), q.shape

  def of_blocks(x):
    x = x.reshape(B, own // stride, stride, H // num, num, -1)
    x = jnp.stack([x[:, :, a : a + width, :, c] for c, a in enumerate(starts)], axis=4)
    return x.reshape(B, own // stride * width, H, -1)

  joint = of_blocks(jnp.concatenate([k, v], axis=-1))
  keys = joint.shape[1]
  k, v = jnp.split(jax.lax.all_gather(joint, axis, axis=1, tiled=True), [k.shape[-1]], axis=-1)
  # Blocks of keys of one device each, of a size that kernels have.
  size = math.gcd(keys, 512) if keys % 128 == 0 else keys
  before = jnp.repeat(jnp.arange(n) < jax.lax.axis_index(axis), keys // size)
  mask = jnp.broadcast_to(before, (1, 1, -(-own // size), before.size))
  dense = patterns.Dense(causal=False)
  return call(q, k, v, pattern=dense, block_mask=mask, block_size=size)
