"""What attention layers take besides a pattern: grouped heads, norms, positions, masks, scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_flax
from pallas_kernels import patterns
from sparse_flax.parallel import sharding
from tests.helpers.arrays import assert_close
from tests.helpers.models import nnx_mode  # noqa: F401

H, HKV, E, T, S = 4, 2, 32, 11, 7
EVERYTHING = dict(num_kv_heads=HKV, use_bias=False, qk_norm=True, rope=sparse_flax.rope(100.0))
PATTERN = patterns.PerHead((patterns.Local(3), patterns.Column(4), patterns.Fixed(4, 1, 2)))
SLOPES = jnp.asarray([0.1, 0.2, 0.4, 0.8])
ACROSS = patterns.PerHead((patterns.Local(4, causal=False), patterns.Dense(causal=False)))


def make_layer(kind=sparse_flax.SparseSelfAttention, *, pattern=PATTERN, **overrides):
  """A layer in which every weight is random and matters."""
  options = dict(width=E, num_heads=H, qk_ratio=0.5, implementation="xla", **EVERYTHING)
  layer = kind(**options | overrides, pattern=pattern, rngs=nnx.Rngs(0))
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(
    rng.normal(size=x.shape) * (x.shape[0] ** -0.5 if x.ndim > 1 else 1), x.dtype
  )
  nnx.update(layer, jax.tree.map(fill, nnx.state(layer)))
  return layer


def inputs(length=T, seed=1):
  return jax.random.normal(jax.random.key(seed), (2, length, E))


def rotated_by_hand(x, positions, theta=100.0):
  """Pairs (d, d + D / 2) as complex numbers, float64."""
  half = x.shape[-1] // 2
  angles = np.asarray(positions)[..., None, None] * theta ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
  return np.concatenate([turned.real, turned.imag], axis=-1)


def by_hand(layer, x, x_kv, *, allowed, positions, kv_positions, score=lambda s, i, j, h: s):
  """The definition, head by head, in float64; `allowed` [B, H, T, S]."""
  array = lambda variable: np.asarray(variable[...], np.float64)

  def heads(linear, x, num):
    y = np.float64(x) @ array(linear.kernel)
    y = y if linear.bias is None else y + array(linear.bias)
    return y.reshape(*y.shape[:-1], num, -1)

  def normed(norm, x):
    if norm is None:
      return x
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * array(norm.scale)

  num = layer.num_kv_heads
  q = normed(layer.query_norm, heads(layer.query, x, H))
  k, v = normed(layer.key_norm, heads(layer.key, x_kv, num)), heads(layer.value, x_kv, num)
  if layer.rope is not None:
    q, k = rotated_by_hand(q, positions), rotated_by_hand(k, kv_positions)
  i, j = np.arange(x.shape[1])[:, None], np.arange(x_kv.shape[1])[None]
  out = []
  for h in range(H):
    g = h // (H // num)
    scores = q[:, :, h] @ k[:, :, g].swapaxes(1, 2) / np.sqrt(q.shape[-1])
    weights = np.exp(score(scores, i, j, h)) * allowed[:, h]
    total = weights.sum(-1, keepdims=True)
    out.append(weights / np.where(total == 0, 1, total) @ v[:, :, g])
  out = np.concatenate(out, axis=-1) @ array(layer.out.kernel)
  return out if layer.out.bias is None else out + array(layer.out.bias)


def mask_of(pattern, T, S):
  i, j = np.arange(T)[:, None], np.arange(S)[None]
  return np.stack([np.broadcast_to(pattern.of_head(h).allowed(i, j), (T, S)) for h in range(H)])


@pytest.mark.smoke("graph-everything", daily=2)
@pytest.mark.parametrize(
  "options",
  [
    EVERYTHING,
    dict(num_kv_heads=1, use_bias=True, qk_norm=False, rope=None),
    dict(num_kv_heads=None, use_bias=True, qk_norm=True, rope=None),
    dict(num_kv_heads=None, use_bias=False, qk_norm=False, rope=EVERYTHING["rope"]),
  ],
  ids=["everything", "one-key-head", "norms", "rope"],
)
def test_the_layer_is_its_definition(options, nnx_mode):  # noqa: F811
  layer, x = make_layer(**options), inputs()
  allowed = np.broadcast_to(mask_of(PATTERN, T, T), (2, H, T, T))
  at = np.arange(T)
  expected = by_hand(layer, x, x, allowed=allowed, positions=at, kv_positions=at)
  np.testing.assert_allclose(jax.jit(lambda m, x: m(x))(layer, x), expected, atol=2e-5)


def test_masks_scores_and_positions_of_a_call():
  layer, x = make_layer(), inputs()
  ids = np.asarray([[0] * 4 + [1] * 7, [5] * 11])
  blocks = np.random.default_rng(0).random((2, 1, 6, 6)) < 0.7
  at = np.asarray([[*range(4), *range(7)], range(3, 14)])
  bias = jnp.asarray(np.random.default_rng(1).normal(size=(H, T)), jnp.float32)
  score_fn = lambda logit, i, j, h: logit + bias[h, i - j]
  allowed = mask_of(PATTERN, T, T)[None] & (ids[:, None, :, None] == ids[:, None, None, :])
  allowed &= np.repeat(np.repeat(blocks, 2, 2), 2, 3)[:, :, :T, :T]
  score = lambda s, i, j, h: s + np.asarray(bias)[h, i - j]
  expected = by_hand(layer, x, x, allowed=allowed, positions=at, kv_positions=at, score=score)

  @jax.jit
  def call(layer, x, ids, blocks, at):
    options = dict(segment_ids=ids, block_mask=blocks, block_size=2, positions=at)
    return layer(x, **options, score_fn=score_fn)

  np.testing.assert_allclose(call(layer, x, ids, blocks, at), expected, atol=2e-5)


def test_weights_are_turned_and_scored_as_the_call_does():
  layer, x = make_layer(implementation="reference"), inputs()
  options = dict(
    positions=jnp.arange(T) * 3,
    score_fn=lambda s, i, j, h: s - SLOPES[h] * (i - j).astype("float32"),
  )
  weights = layer.weights(x, **options)
  v = np.repeat(layer.values(x), H // HKV, axis=2)
  out = jnp.einsum("BHTS,BSHD->BTHD", weights, v)
  np.testing.assert_allclose(layer.back(out), layer(x, **options), atol=1e-5)


def test_parameters_are_those_that_are_asked_for():
  shapes = lambda layer: {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(layer)))
  }
  assert shapes(make_layer()) == {
    "query/kernel": (E, 16),
    "key/kernel": (E, 8),
    "value/kernel": (E, 16),
    "out/kernel": (E, E),
    "query_norm/scale": (4,),
    "key_norm/scale": (4,),
  }
  plain = sparse_flax.SparseSelfAttention(
    width=E, num_heads=H, qk_ratio=0.5, pattern=PATTERN, rngs=nnx.Rngs(0)
  )
  norms = sparse_flax.SparseSelfAttention(
    width=E, num_heads=H, qk_ratio=0.5, pattern=PATTERN, qk_norm=True, rngs=nnx.Rngs(0)
  )
  for name in ("query", "key", "value", "out"):  # what is drawn does not depend on the norms
    np.testing.assert_array_equal(getattr(plain, name).kernel, getattr(norms, name).kernel)


@pytest.mark.parametrize("positions", [np.arange(T), np.arange(2 * T).reshape(2, T) * 7], ids=str)
def test_rope_turns_pairs_of_halves(positions):
  x = inputs().reshape(2, T, H, 8)
  got = sparse_flax.rope(100.0)(x, positions)
  np.testing.assert_allclose(got, rotated_by_hand(np.float64(x), positions), atol=1e-5)
  half = sparse_flax.rope(100.0)(x.astype(jnp.bfloat16), positions)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), got, atol=0.05)


@pytest.mark.promotes
def test_rope_is_that_of_flax(as_a_user):
  x = inputs().reshape(2, T, H, 8)
  theirs = jax.vmap(nnx.RoPE(theta=500.0), in_axes=-2, out_axes=-2)(x)
  np.testing.assert_allclose(sparse_flax.rope(500.0)(x, jnp.arange(T)), theirs, atol=1e-5)


def test_a_grid_of_nothing_is_refused(as_a_user):
  with pytest.raises(ValueError, match=r"rope\(shape=\(32, 0\)\): must be whole numbers"):
    sparse_flax.rope(shape=(32, 0))


def test_each_axis_of_a_grid_turns_planes_of_its_own():
  """Of 8 features: rows turn planes 0 and 1, columns 2, channels 3."""
  shape, x = (9, 2, 3), inputs()[:1].reshape(1, T, H, 8)
  got = np.asarray(sparse_flax.rope(100.0, shape)(x, jnp.arange(T) + 3))
  x = np.float64(x)
  row, column, channel = np.unravel_index(np.arange(T) + 3, shape)
  angles = np.stack([row, row / 10, column, channel], axis=-1)[None, :, None]
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
  np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


def test_attention_with_rope_sees_distances_alone():
  layer, x = make_layer(), inputs()
  np.testing.assert_allclose(layer(x), layer(x, positions=jnp.arange(T) + 100), atol=1e-4)


# ------------------------------------------------------------------------------- cross-attention


@pytest.mark.parametrize(
  "options", [EVERYTHING, dict(rope=None, use_bias=True)], ids=["all", "few"]
)
def test_cross_attention_is_its_definition(options):
  layer = make_layer(sparse_flax.SparseCrossAttention, pattern=ACROSS, kv_width=E, **options)
  x, x_kv = inputs(), inputs(S, seed=2)
  blocks = jnp.asarray(np.arange(S) < np.asarray([[[[5]]], [[[S]]]]))  # lengths of x_kv
  blocks = jnp.broadcast_to(blocks, (2, 1, T, S))
  allowed = mask_of(ACROSS, T, S)[None] & np.asarray(blocks)
  at = dict(positions=np.arange(T), kv_positions=np.arange(S) + 4)
  expected = by_hand(layer, x, x_kv, allowed=allowed, **at)
  given = dict(kv_positions=jnp.asarray(at["kv_positions"])) if layer.rope else {}

  @jax.jit
  def call(layer, x, x_kv, blocks):
    return layer(x, x_kv, block_mask=blocks, block_size=1, **given)

  np.testing.assert_allclose(call(layer, x, x_kv, blocks), expected, atol=2e-5)


def test_cross_attention_takes_lengths_of_both_sequences():
  layer = make_layer(sparse_flax.SparseCrossAttention, pattern=ACROSS)
  x, x_kv = inputs(), inputs(S, seed=2)
  outside = lambda lengths, size: np.arange(size) >= np.asarray(lengths)[:, None]
  ids, kv_ids = outside([T, 5], T) * -1, outside([3, S], S) * 1
  allowed = mask_of(ACROSS, T, S)[None] & (ids[:, None, :, None] == kv_ids[:, None, None])
  call = lambda layer, x, x_kv: layer(x, x_kv, segment_ids=ids, kv_segment_ids=kv_ids)
  at = dict(positions=np.arange(T), kv_positions=np.arange(S))
  expected = by_hand(layer, x, x_kv, allowed=allowed, **at)
  np.testing.assert_allclose(jax.jit(call)(layer, x, x_kv), expected, atol=2e-5)
  gradient = jax.jit(jax.grad(lambda x_kv: (call(layer, x, x_kv) ** 2).sum()))(x_kv)
  assert not gradient[0, 3:].any() and gradient[0, :3].any()


@pytest.mark.parametrize(
  "called, message",
  [
    (
      dict(kv_segment_ids=np.zeros((2, S), int)),
      "kv_segment_ids without segment_ids: must come with them, integers of shape [B, T] = "
      f"[2, {T}]",
    ),
    (
      dict(segment_ids=np.zeros((2, T), int)),
      f"segment_ids [2, {T}] for keys [B, S] = [2, {S}]: must come with kv_segment_ids",
    ),
    (
      dict(segment_ids=np.zeros((2, T), int), kv_segment_ids=np.zeros((2, 3), int)),
      f"kv_segment_ids int64[2, 3]: must be integers of shape [B, S] = [2, {S}]",
    ),
    (
      dict(segment_ids=np.zeros((2, T), int), kv_segment_ids=np.zeros((2, S))),
      f"kv_segment_ids float64[2, {S}]: must be integers",
    ),
    (
      dict(segment_ids=np.zeros((2, T), int), kv_segment_ids=[[0] * S] * 2),
      "kv_segment_ids: must be an array, not list",
    ),
  ],
  ids=["alone", "missing", "shape", "dtype", "list"],
)
def test_lengths_that_do_not_fit_are_refused(called, message, as_a_user):
  layer = make_layer(sparse_flax.SparseCrossAttention, pattern=ACROSS)
  with pytest.raises(ValueError, match=re.escape(message)):
    layer(inputs(), inputs(S, seed=2), **called)


def test_devices_have_the_lengths_of_their_own_rows():
  layer = make_layer(sparse_flax.SparseCrossAttention, pattern=ACROSS)
  x, x_kv = inputs(16), inputs(8, seed=2)
  ids = jnp.zeros((2, 16), int), jnp.asarray(np.arange(8) >= [[5], [8]], int)
  loss = lambda layer, x, x_kv, ids: (
    layer(x, x_kv, segment_ids=ids[0], kv_segment_ids=ids[1]) ** 2
  ).sum()
  expected = jax.jit(jax.value_and_grad(loss, (1, 2)))(layer, x, x_kv, ids)
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=1, sequence=1)
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    got = jax.jit(jax.value_and_grad(loss, (1, 2)))(layer, *map(place, (x, x_kv)), ids)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, tolerance=1e-5, what="loss and gradients")


def test_cross_attention_takes_another_width_and_attends_to_everything_by_default():
  layer = sparse_flax.SparseCrossAttention(width=E, num_heads=H, kv_width=5, rngs=nnx.Rngs(0))
  x, x_kv = inputs(), jax.random.normal(jax.random.key(3), (2, S, 5))
  influence = jax.jacobian(lambda x_kv: layer(x, x_kv)[0, :, 0])(x_kv)[:, 0]
  assert layer.pattern == patterns.Dense(causal=False)
  assert (jnp.abs(influence).max(axis=-1) > 0).all()


@pytest.mark.parametrize(
  "pattern", [patterns.Dense(), patterns.Strided(4), patterns.PerHead((ACROSS, PATTERN))], ids=str
)
def test_cross_attention_refuses_patterns_of_one_sequence(pattern):
  with pytest.raises(ValueError, match="must be built with causal=False"):
    make_layer(sparse_flax.SparseCrossAttention, pattern=pattern)


# --------------------------------------------------------------------------------------- devices


@pytest.mark.smoke("masks-data2-tensor2", daily=1)
@pytest.mark.parametrize(
  "axes",
  [dict(data=2, tensor=2), dict(data=1, tensor=4), dict(data=2, sequence=2)],
  ids=lambda axes: "-".join(f"{name}{n}" for name, n in axes.items()),
)
@pytest.mark.parametrize("options", [{}, dict(segment_ids=1, score_fn=1)], ids=["plain", "masks"])
def test_devices_compute_what_one_does(axes, options):
  """Heads stay whole where keys have fewer than devices; what a sequence axis lacks is refused."""
  layer, x = make_layer(pattern=patterns.Strided(4)), inputs(16)
  if options:
    ids = jnp.asarray(np.arange(16) // 5)[None].repeat(2, axis=0)
    options = dict(
      segment_ids=ids, score_fn=lambda logit, i, j, h: logit - SLOPES[h] * (i - j).astype("float32")
    )
  loss = lambda layer, x: (layer(x, **options) ** 2).sum()
  mesh = sharding.make_mesh(**dict(data=1, fsdp=1, tensor=1, sequence=1) | axes)
  expected = jax.jit(jax.value_and_grad(loss, 1))(layer, x)
  with jax.set_mesh(mesh):
    run = jax.jit(jax.value_and_grad(loss, 1))
    if options and "sequence" in axes:
      with pytest.raises(NotImplementedError, match="sequence=2: score_fn and segment_ids"):
        run(layer, x)
      return
    got = run(layer, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
  for a, b in zip(got, expected, strict=True):
    assert_close(a, b, tolerance=1e-5, what=str(axes))


def test_explicit_axes_shard_grouped_heads():
  mesh = jax.make_mesh((2, 2), ("x", "y"))  # explicit, the default of JAX
  layer, x = make_layer(pattern=patterns.Strided(4)), inputs(16)
  expected = layer(x)
  specs = {"out": jax.P("y"), "query_norm": jax.P(), "key_norm": jax.P()}
  with jax.set_mesh(mesh):
    graphdef, state = nnx.split(layer)
    place = lambda path, leaf: jax.device_put(leaf, specs.get(path[0].key, jax.P(None, "y")))
    sharded = nnx.merge(graphdef, jax.tree.map_with_path(place, state))
    got = jax.jit(lambda m, x: m(x, segment_ids=jnp.zeros((2, 16), int)))(
      sharded, jax.device_put(x, jax.P("x"))
    )
  assert_close(got, expected, tolerance=1e-5, what="out")


def test_a_sequence_axis_refuses_another_sequence():
  layer = make_layer(sparse_flax.SparseCrossAttention, pattern=ACROSS)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=2)
  refused = pytest.raises(NotImplementedError, match="sequence=2: 8 keys for 16 queries")
  with jax.set_mesh(mesh), refused:
    layer(inputs(16), inputs(8))


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
  "overrides, message",
  [
    (dict(num_kv_heads=3), "num_kv_heads=3: must be a whole number >= 1 that divides num_heads=4"),
    (dict(num_kv_heads=0), "num_kv_heads=0: must be"),
    (dict(num_kv_heads=2.0), "num_kv_heads=2.0: must be"),
    (dict(num_kv_heads=8), "num_kv_heads=8: must be"),
    (
      dict(rope=sparse_flax.rope),
      "rope=sparse_flax.rope: makes the function that is wanted here: call it",
    ),
    (dict(rope=10_000.0), "rope=10000.0: must be a function of"),
    (dict(implementation="foo"), "implementation='foo': must be None or one of"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else x[:20],
)
def test_what_a_layer_cannot_be_made_of_is_refused(overrides, message, as_a_user):
  for kind, pattern in (
    (sparse_flax.SparseSelfAttention, PATTERN),
    (sparse_flax.SparseCrossAttention, ACROSS),
  ):
    with pytest.raises(ValueError, match=re.escape(message)):
      make_layer(kind, pattern=pattern, **overrides)


def test_what_is_no_pattern_is_refused(as_a_user):
  with pytest.raises(ValueError, match="pattern=None; must be a pattern"):
    make_layer(pattern=None)


def test_prefill_checks_what_init_cache_checks(as_a_user):
  both_ways = make_layer(pattern=patterns.Dense(causal=False))
  with pytest.raises(ValueError, match="decoding needs one with causal=True"):
    both_ways.prefill(inputs(), T)
  with pytest.raises(ValueError, match=f"length=5: must be at least {T}"):
    make_layer().prefill(inputs(), 5)


@pytest.mark.parametrize(
  "made, called, message",
  [
    (dict(rope=None), dict(positions=np.arange(T)), "positions: only rope reads them"),
    ({}, dict(positions=np.arange(T - 1)), "positions int64[10]: must be an array of integers"),
    ({}, dict(positions=np.arange(T) / 2), "positions float64[11]: must be an array of integers"),
    ({}, dict(positions=[*range(T)]), "positions list[11]: must be an array of integers"),
    (dict(qk_ratio=3 / 8), {}, "rope: the head size 3 must be even"),
    (dict(rope=lambda x, at: x[:, :1]), {}, "must keep the shape"),
    (dict(rope=sparse_flax.rope(shape=(4, 4, 4, 2, 2))), {}, "must be at least 10"),
    ({}, dict(segment_ids=np.zeros((2, 3), int)), "segment_ids int64[2, 3]"),
    ({}, dict(block_mask=np.ones((2, 1, 3, 3), bool)), "block_mask bool[2, 1, 3, 3]"),
  ],
  ids=["unread", "short", "halves", "list", "odd", "shape", "axes", "segment_ids", "block_mask"],
)
def test_what_a_layer_cannot_be_called_with_is_refused(made, called, message, as_a_user):
  with pytest.raises(ValueError, match=re.escape(message)):
    make_layer(**made)(inputs(), **called)


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), "10000", True])
def test_a_theta_that_is_no_base_is_refused(theta, as_a_user):
  with pytest.raises(ValueError, match="rope\\(theta="):
    sparse_flax.rope(theta)
