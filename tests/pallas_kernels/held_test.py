"""What users' functions hold: read at every call, with gradients; their results are checked."""

import functools
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice
from jax.sharding import AbstractMesh
from jax.sharding import AxisType

from pallas_kernels import api
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.mosaic_gpu.stream import formula
from pallas_kernels.scores import Scores
from pallas_kernels.xla import sizes
from tests.helpers.arrays import assert_close
from tests.helpers.arrays import EVERY_PATTERN

H = 2
number = functools.partial(jnp.asarray, dtype=jnp.float32)


def arrays(T: int, B: int = 1, D: int = 4):
  rng = np.random.default_rng(T)
  return tuple(jnp.asarray(rng.standard_normal((B, T, H, D)), jnp.float32) for _ in range(3))


@pytest.fixture
def tiles(monkeypatch):
  """Problems of xla in small tiles."""
  jax.clear_caches()
  for name, value in dict(WHOLE=16, TILE=8, LOGITS=256).items():
    monkeypatch.setattr(sizes, name, value)
  yield
  jax.clear_caches()


# -------------------------------------------------------------------------------- score functions


class Slope:
  """A callable object, whose method is a function too."""

  def __init__(self, slope):
    self.slope = slope

  def __call__(self, logit, i, j, h):
    return logit - self.slope * number(i - j)


@pytest.mark.smoke("method-xla")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("of", ["method", "object"])
def test_what_changed_in_an_object_is_seen(of, implementation):
  one = Slope(jnp.float32(0.1))
  function = one.__call__ if of == "method" else one
  attend = functools.partial(sparse_attention, *arrays(9), implementation=implementation)
  for slope in (0.1, 2.0):
    one.slope = jnp.float32(slope)
    truth = attend(score_fn=lambda s, i, j, h, slope=slope: s - slope * number(i - j))
    assert_close(attend(score_fn=function), truth, tolerance=1e-6, what=str(slope))


def with_rule(kind, w):
  """A function with a rule for its derivative, which holds an array; it has twice the slope."""
  function = lambda s: s * w[0]
  if kind == "custom_vjp":
    ruled = jax.custom_vjp(lambda s, w: s * w)
    ruled.defvjp(lambda s, w: (s * w, (s, w)), lambda kept, d: (2 * d * kept[1], 3 * d * kept[0]))
    return lambda s, i, j, h: ruled(s, w[0])
  ruled = jax.custom_jvp(function)
  ruled.defjvp(lambda primals, tangents: (ruled(*primals), 2 * w[0] * tangents[0]))
  return lambda s, i, j, h: ruled(s)


# Functions of what they hold, made at every call.
MADE = {
  "operators": lambda w: lambda s, i, j, h: jnp.where(i > j, s, 0.0) - w[h] * number(i - j),
  "relu": lambda w: lambda s, i, j, h: jax.nn.relu(s * w[h]),
  "softplus": lambda w: lambda s, i, j, h: jax.nn.softplus(s * w[h]),
  "logaddexp": lambda w: lambda s, i, j, h: jnp.logaddexp(s, w[h]),
  "custom_jvp": lambda w: with_rule("custom_jvp", w),
  "custom_vjp": lambda w: with_rule("custom_vjp", w),
}


@pytest.mark.smoke("operators", "relu")
@pytest.mark.parametrize("name", MADE)
def test_functions_that_compute_the_same_share_a_program(name):
  q, k, v = arrays(7)

  def run(slope, away=0.0):
    made = MADE[name](jnp.full(H, slope))
    kept.append(weakref.ref(made))
    function = lambda s, i, j, h: made(s, i, j, h) + away
    return sparse_attention(q, k, v, score_fn=function)

  kept = []
  run(1.0)
  size = api._attend._cache_size()
  assert (run(2.0) != run(3.0)).any()
  assert api._attend._cache_size() == size
  run(2.0, away=1.0)
  assert api._attend._cache_size() > size
  gc.collect()
  assert not any(function() for function in kept)


@pytest.mark.parametrize(("kind", "of_w"), [("custom_jvp", 0.0), ("custom_vjp", 3.0)])
def test_rules_of_derivatives_are_followed(kind, of_w):
  q, k, v = arrays(7)

  def loss(made, w, q):
    return jnp.square(sparse_attention(q, k, v, score_fn=made(w))).sum()

  plain = lambda w: lambda s, i, j, h: s * w[0]
  grad = lambda made: jax.jit(jax.grad(functools.partial(loss, made), (0, 1)))
  truth = grad(plain)(jnp.full(H, 0.5), q)
  found = grad(lambda w: with_rule(kind, w))(jnp.full(H, 0.5), q)
  assert_close(found[0], of_w * truth[0], tolerance=1e-5, what="w")
  assert_close(found[1], 2 * truth[1], tolerance=1e-5, what="q")


FUNCTIONS = {
  "heads": lambda w, s, i, j, h: s - w[h] * number(i - j),
  "bias": lambda w, s, i, j, h: s + w[(i - j) % 5],
  "of_logits": lambda w, s, i, j, h: jax.nn.softplus(s * w[0]) + w[1] * s,
  # At later keys, which do not attend, the logarithm and its derivatives are no numbers.
  "singular": lambda w, s, i, j, h: s - w[h] * jnp.log(number(i - j + 1)),
  "pairs": lambda w, s, i, j, h: s + jnp.outer(w, w)[i % 5, j % 5],
}
MASKED = {  # a view where positions do not count, heads that differ, a union
  "heads": patterns.PerHead((patterns.Local(3), patterns.Column(2))),
  "bias": patterns.Where(lambda i, j: (i + j) % 3 > 0) | patterns.Local(1),
  "of_logits": patterns.Strided(3),
  "singular": patterns.Strided(3),
  "pairs": patterns.Dense(causal=False),
}


def gradients(implementation, w, name, pattern, q, k, v, **how):
  def loss(w, q, k, v):
    function = lambda s, i, j, h: FUNCTIONS[name](w, s, i, j, h)
    out = sparse_attention(
      q, k, v, pattern=pattern, score_fn=function, implementation=implementation, **how
    )
    return jnp.square(out).sum()

  return jax.grad(loss, (0, 1, 2, 3)), (w, q, k, v)


@pytest.mark.smoke("heads", daily=0)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_held_arrays_have_gradients(name, tiles):
  w = jnp.asarray([0.3, -0.5, 0.2, 0.7, -0.1])
  grad, args = gradients("xla", w, name, MASKED[name], *arrays(21))
  truth, _ = gradients("reference", w, name, MASKED[name], *arrays(21))
  for what, a, b in zip("wqkv", jax.jit(grad)(*args), jax.jit(truth)(*args), strict=True):
    assert np.abs(b).max() > 1e-3
    assert_close(a, b, tolerance=1e-5, what=what)


def test_gradients_of_held_arrays_are_those_of_differences():
  w, (q, k, v) = jnp.asarray([0.3, -0.5]), arrays(12)
  grad, args = gradients("reference", w, "singular", patterns.Dense(), q, k, v)

  @jax.jit
  def loss(w):
    function = lambda s, i, j, h: s - w[h] * jnp.log(number(abs(i - j) + 1))
    return jnp.square(sparse_attention(q, k, v, score_fn=function)).sum()

  got, step = jax.jit(grad)(*args)[0], np.float32(1e-2)
  for n in range(2):
    slope = (loss(w.at[n].add(step)) - loss(w.at[n].add(-step))) / (2 * step)
    np.testing.assert_allclose(got[n], slope, rtol=1e-2)


@pytest.mark.slow
def test_gradients_outside_jit_and_for_other_arguments_alone():
  w, (q, k, v) = jnp.asarray([0.3, -0.5, 0.2, 0.7, -0.1]), arrays(12)
  grad, args = gradients("xla", w, "bias", patterns.Dense(), q, k, v)
  for a, b in zip(grad(*args), jax.jit(grad)(*args), strict=True):
    assert_close(a, b, tolerance=1e-6, what="eager")
  held = lambda s, i, j, h: FUNCTIONS["bias"](w, s, i, j, h)
  alone = jax.jit(jax.grad(lambda q: jnp.square(sparse_attention(q, k, v, score_fn=held)).sum()))
  assert_close(alone(q), grad(*args)[1], tolerance=1e-6, what="q")


@pytest.mark.slow
def test_held_arrays_may_be_mapped(tiles):
  q, k, v = arrays(20)
  many = jnp.asarray([[0.3, -0.5], [0.1, 0.2]])
  grad, _ = gradients("xla", many[0], "heads", patterns.Local(9), q, k, v)
  mapped = jax.vmap(grad, (0, None, None, None))(many, q, k, v)
  for n, w in enumerate(many):
    for a, b in zip(mapped, grad(w, q, k, v), strict=True):
      assert_close(a[n], b, tolerance=1e-5, what=str(n))


@pytest.mark.smoke("custom_jvp", daily=0)
@pytest.mark.parametrize("name", ["operators", "relu", "custom_jvp", "custom_vjp"])
def test_traced_arrays_do_not_stay(name):
  q, k, v = arrays(8)
  loss = lambda w: jnp.square(sparse_attention(q, k, v, score_fn=MADE[name](w))).sum()
  with jax.checking_leaks():
    jax.jit(jax.grad(loss))(jnp.ones(H))


@pytest.mark.smoke("more1", daily=0)
@pytest.mark.parametrize("more", [{}, dict(logits_soft_cap=2.0, score_fn=Slope(0.1))])
def test_a_traced_scale_has_a_gradient(more):
  def loss(scale, implementation, q, k, v):
    how = dict(pattern=EVERY_PATTERN["fixed"], implementation=implementation, **more)
    return jnp.square(sparse_attention(q, k, v, scale=scale, **how)).sum()

  grad = jax.jit(jax.grad(loss, (0, 2, 3, 4)), static_argnums=1)
  results = (grad(jnp.float32(0.7), name, *arrays(20)) for name in ("xla", "reference"))
  for what, a, b in zip(("scale", *"qkv"), *results, strict=True):
    assert_close(a, b, tolerance=1e-5, what=what)


WRONG_SCORES = {
  "integers": (lambda s, i, j, h: i - j, "must give floating point"),
  "several": (lambda s, i, j, h: (s, s), "must give one value"),
  "nothing": (lambda s, i, j, h: None, "must give one value"),
  "heads": (lambda s, i, j, h: s + jnp.ones((H, 1, 1)), "must give one value"),
}


FAILING_SCORES = {
  "branch": (lambda s, i, j, h: s if i > j else 0.0, "jax.numpy.where"),
  "numpy": (lambda s, i, j, h: s + np.ones(6, np.float32)[i], "not numpy's"),
  "three": (lambda s, i, j: s, r"\(logit, i, j, h\)"),
}


@pytest.mark.parametrize("what", FAILING_SCORES)
def test_score_functions_that_fail_are_named(what):
  function, words = FAILING_SCORES[what]
  for implementation in ("reference", "xla"):
    with pytest.raises(ValueError, match=f"score_fn=.*<lambda>.*{words}"):
      sparse_attention(*arrays(6), score_fn=function, implementation=implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("what", WRONG_SCORES)
def test_results_of_score_functions_are_checked(what, implementation):
  function, words = WRONG_SCORES[what]
  with pytest.raises(ValueError, match=f"score_fn=.*{words}"):
    sparse_attention(*arrays(6), score_fn=function, implementation=implementation)


# ------------------------------------------------------------------------------------- predicates

LENGTHS = [6, 33]  # in one piece, and in tiles that are longer than the sequence


def same_as(mask, pattern, T, **how):
  """The result of a pattern is that of a mask [T, T], in float64."""
  q, k, v = arrays(T)
  out = sparse_attention(q, k, v, pattern=pattern, **how)
  scores = np.einsum("bthd,bshd->bhts", *np.float64([q, k])) * q.shape[-1] ** -0.5
  weights = np.where(mask, np.exp(scores), 0.0)
  total = weights.sum(-1, keepdims=True)
  truth = np.einsum("bhts,bshd->bthd", weights / np.where(total == 0, 1, total), np.float64(v))
  assert_close(out, truth, tolerance=1e-5, what=f"{pattern} {T=}")


@pytest.mark.smoke("33-asarray0", daily=0)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("T", LENGTHS)
def test_predicates_may_look_up_a_table(T, kind, tiles):
  for seed in range(2):  # another table in the same program text
    ids = np.sort(np.random.default_rng(seed).integers(0, 4, T))
    table = kind(ids)
    pattern = patterns.Where(lambda i, j, table=table: table[i] == table[j])
    i = np.arange(T)
    same_as((ids[:, None] == ids) & (i <= i[:, None]), pattern, T)


def test_tables_that_are_too_short_are_refused_by_name():
  table = np.zeros(5, int)

  def in_table(i, j):
    return table[i] == table[j]

  for T in LENGTHS:
    with pytest.raises(ValueError, match=r"predicate=.*in_table"):
      sparse_attention(*arrays(T), pattern=patterns.Where(in_table))


@pytest.mark.smoke("xla-33", daily=0)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_traced_number_in_a_predicate(implementation, T, tiles):
  q, k, v = arrays(T)

  def loss(window, q):
    near = patterns.Local(2) | patterns.Where(lambda i, j: i - j < window)
    return jnp.square(sparse_attention(q, k, v, pattern=near, implementation=implementation)).sum()

  grad = jax.jit(jax.value_and_grad(loss, 1))
  for window in (3, 5):
    plain = lambda q, n=window: jnp.square(
      sparse_attention(q, k, v, pattern=patterns.Local(n))
    ).sum()
    truth = jax.value_and_grad(plain)(q)
    for a, b in zip(grad(jnp.int32(window), q), truth, strict=True):
      assert_close(a, b, tolerance=1e-5, what=str(window))


VALUES = {  # predicate, causal, what it means
  "bits": (lambda i, j: (i - j) & 2, True, lambda i, j: ((i - j) & 2) != 0),
  "true": (lambda i, j: True, False, lambda i, j: i >= 0),
  "one": (lambda i, j: 1, True, lambda i, j: i >= 0),
  "false": (lambda i, j: False, False, lambda i, j: i < 0),
  "queries": (lambda i, j: i < 3, False, lambda i, j: i < 3),
}


@pytest.mark.smoke("bits-33", "false-33")
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("what", VALUES)
def test_predicates_give_booleans_or_integers(what, T, tiles):
  predicate, causal, meant = VALUES[what]
  pattern, i, j = patterns.Where(predicate, causal=causal), np.arange(T)[:, None], np.arange(T)
  mask = np.broadcast_to(meant(i, j), (T, T)) & ((j <= i) | (not causal))
  found = pattern.mask(T)
  assert found.dtype == bool
  np.testing.assert_array_equal(found, mask)
  assert pattern.num_pairs(T) == mask.sum()
  same_as(mask, pattern, T)


WRONG_PREDICATES = {
  "floats": lambda i, j: (i - j) * 0.5,
  "nothing": lambda i, j: None,
  "several": lambda i, j: jnp.stack([i, j]) > 0,
  "branch": lambda i, j: bool(i > j),
}


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("what", WRONG_PREDICATES)
def test_results_of_predicates_are_checked(what, implementation):
  for T in LENGTHS:
    with pytest.raises(ValueError, match=r"Where\(predicate="):
      pattern = patterns.Local(2) | patterns.Where(WRONG_PREDICATES[what])
      sparse_attention(*arrays(T), pattern=pattern, implementation=implementation)


# ------------------------------------------------------------------------------ second derivatives


def slope(q, **how):
  return jax.grad(lambda q: jnp.square(sparse_attention(q, *arrays(12)[1:], **how)).sum())(q)


TWICE = {
  "reverse": lambda q, how: jax.grad(lambda q: jnp.square(slope(q, **how)).sum())(q),
  "forward": lambda q, how: jax.jvp(lambda q: slope(q, **how), (q,), (q,))[1],
  "mapped": lambda q, how: jax.vmap(lambda q: TWICE["forward"](q, how))(jnp.stack([q, q])),
}


@pytest.mark.smoke(daily=8)
@pytest.mark.parametrize("name", EVERY_PATTERN)
@pytest.mark.parametrize("twice", TWICE)
def test_second_derivatives_are_refused_by_name(name, twice):
  how = dict(pattern=EVERY_PATTERN[name], implementation="xla")
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    jax.eval_shape(lambda q: TWICE[twice](q, how), arrays(12)[0])


@pytest.mark.smoke("summary", daily=0)
@pytest.mark.parametrize("name", ["strided", "summary"])
def test_second_derivatives_of_the_reference(name):
  q, how, step = arrays(12)[0], dict(pattern=EVERY_PATTERN[name], implementation="reference"), 1e-2
  once, twice = jax.jit(lambda q: slope(q, **how)), jax.jit(lambda q: TWICE["forward"](q, how))
  up, down = (once(q * (1 + sign * step)) for sign in (1, -1))
  assert_close(twice(q), (up - down) / (2 * step), tolerance=1e-2, what=name)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_second_derivatives_of_kernels_are_refused_by_name(implementation):
  q = jnp.ones((1, 128, 1, 64), jnp.bfloat16)
  attend = functools.partial(sparse_attention, pattern=patterns.Local(9))
  loss = lambda q: attend(q, q, q, implementation=implementation).astype(jnp.float32).sum()
  with pytest.raises(NotImplementedError, match="implementation='reference'"):
    jax.eval_shape(jax.grad(lambda q: jax.grad(loss)(q).astype(jnp.float32).sum()), q)


# --------------------------------------------------------------------- numbers that would be cut


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2**31 - 1, sys.maxsize, np.uint8(200)])
def test_wide_windows_are_no_limit(window, causal, as_a_user):
  pattern, mask = patterns.Local(window, causal=causal), patterns.Dense(causal=causal).mask(20)
  np.testing.assert_array_equal(pattern.mask(20), mask)
  same_as(mask, pattern, 20, implementation="xla")


WIDE = [
  patterns.Strided(2**31 - 1),
  patterns.Block(2**31 - 1),
  patterns.Summary(2**31 - 1, 2**31 - 5),
  patterns.Fixed(2**31 - 1, 2**29, 2),
  patterns.BlockLayout(np.ones((1, 1), bool), 2**31 - 1),
]


@pytest.mark.smoke("Strided(stride=2147483647)")
@pytest.mark.parametrize("pattern", WIDE, ids=str)
def test_wide_strides_are_exact(pattern):
  same_as(pattern.of_head(0).mask(20), pattern, 20, implementation="xla")


MISTAKES = {
  "stride": (lambda: patterns.Column(2**31), "stride=2147483648.* <= 2147483647"),
  "offset": (lambda: patterns.Summary(8, 2, offset=1.5), "offset=1.5"),
  "negative": (lambda: patterns.Summary(8, 2, offset=-1), "offset=-1"),
  "causal": (lambda: patterns.Local(4, 8), "causal=8.*True or False"),
  "predicate": (lambda: patterns.Where(3), "predicate=3.*function"),
  "operand": (lambda: patterns.Local(3) | np.eye(4, dtype=bool), "BlockLayout"),
  "head": (lambda: patterns.PerHead((patterns.Local(3), "dense")), "PerHead.*'dense'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_patterns_say_what_they_do_not_take(what, as_a_user):
  make, words = MISTAKES[what]
  with pytest.raises(ValueError, match=words):
    make()


ARGUMENTS = {
  "name": (dict(pattern="strided"), "pattern='strided'.*must be a pattern"),
  "class": (dict(pattern=patterns.Dense), r"Dense\(\)"),
  "mask": (dict(pattern=np.ones((6, 6), bool)), "BlockLayout"),
  "no pattern": (dict(pattern=None), "must be a pattern"),
  "bool": (dict(block_size=True), "block_size=True"),
  "nan": (dict(scale=float("nan")), "scale=nan: must be finite"),
  "inf": (dict(scale=jnp.float32(np.inf)), "scale=inf: must be finite"),
  "huge": (dict(scale=10**400), "scale=1.*must be finite"),
  "huge cap": (dict(logits_soft_cap=10**400), "logits_soft_cap=1.*finite"),
  "blocks": (dict(block_mask=[[True]]), "block_mask: must be an array"),
  "scales": (dict(scale=jnp.ones(2)), "scale=.*one number"),
  "word": (dict(scale="1"), "scale='1'"),
  "no cap": (dict(logits_soft_cap=float("inf")), "logits_soft_cap=inf.*None for no cap"),
  "nan cap": (dict(logits_soft_cap=float("nan")), "logits_soft_cap=nan"),
  "score": (dict(score_fn=3), "score_fn=3"),
  "list": (dict(segment_ids=[[0] * 6]), "segment_ids: must be an array"),
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_would_be_cut_are_refused(what, as_a_user):
  how, words = ARGUMENTS[what]
  with pytest.raises(ValueError, match=words):
    sparse_attention(*arrays(6), **how)


def test_a_traced_cap_is_refused(as_a_user):
  attend = jax.jit(lambda cap: sparse_attention(*arrays(6), logits_soft_cap=cap))
  with pytest.raises(ValueError, match="logits_soft_cap is traced"):
    attend(jnp.float32(3))


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.uint32, np.int8])
def test_segment_ids_of_any_width(kind):
  q, k, v = arrays(8)
  high = np.iinfo(kind).max
  low = high - 2**32 if np.iinfo(kind).bits == 64 else 0  # equal in their lower half
  ids = np.asarray([[high] * 3 + [low] * 5], kind)
  out = sparse_attention(q, k, v, segment_ids=ids)
  alone = sparse_attention(q[:, 3:], k[:, 3:], v[:, 3:])
  assert_close(out[:, 3:], alone, tolerance=1e-6, what=str(kind))
  if np.iinfo(kind).bits == 64:
    with pytest.raises(ValueError, match="32 bits"):
      jax.vmap(lambda ids: sparse_attention(q, k, v, segment_ids=ids))(ids[None])


@pytest.mark.parametrize(
  "kinds", [(np.int64, np.int64), (np.uint32, np.uint64), (np.int8, np.int64)]
)
def test_ids_of_queries_and_keys_of_any_width_are_numbered_together(kinds):
  q, (_, k, v) = arrays(5)[0], arrays(8)
  values = [2, 7, 100] if np.int8 in kinds else [2, 7, 2**31 + 5]
  ids = np.asarray([[values[0]] * 2 + [values[2]] * 3], kinds[0])
  kv_ids = np.asarray([[values[1]] * 5 + [values[2]] * 3], kinds[1])
  out, lse = sparse_attention(
    q, k, v, pattern=patterns.Dense(causal=False), segment_ids=ids, kv_segment_ids=kv_ids,
    return_lse=True,
  )  # fmt: skip
  alone = sparse_attention(q[:, 2:], k[:, 5:], v[:, 5:], pattern=patterns.Dense(causal=False))
  assert_close(out[:, 2:], alone, tolerance=1e-6, what=str(kinds))
  assert not out[:, :2].any() and np.isneginf(lse[:, :2]).all()


def test_wide_ids_beside_those_of_jax_are_cut_or_refused():
  q, k, v = arrays(8)
  ids, wide = jnp.asarray([[0] * 3 + [-5] * 5]), np.asarray([[2**40] * 3 + [-5] * 5])
  with pytest.raises(ValueError, match="kv_segment_ids int64 from -5 to 1099511627776: JAX keeps"):
    sparse_attention(q, k, v, segment_ids=ids, kv_segment_ids=wide)
  wide[:, :3] = 1
  out = sparse_attention(q, k, v, segment_ids=ids, kv_segment_ids=wide)
  assert_close(
    out[:, 3:], sparse_attention(q[:, 3:], k[:, 3:], v[:, 3:]), tolerance=1e-6, what="out"
  )
  assert not out[:, :3].any()


def test_wide_ids_of_jax_are_numbered_together():
  q, k, v = arrays(8)
  with jax.enable_x64(True):
    ids, kv_ids = np.asarray([[2**40] * 3 + [2**41] * 5]), np.asarray([[5] * 3 + [2**41] * 5])
    attend = jax.jit(lambda ids, kv_ids: sparse_attention(
      q, k, v, segment_ids=ids, kv_segment_ids=kv_ids
    ))  # fmt: skip
    out = attend(ids, kv_ids)
    alone = sparse_attention(q[:, 3:], k[:, 3:], v[:, 3:])
  assert_close(out[:, 3:], alone, tolerance=1e-6, what="out")
  assert not out[:, :3].any()


@pytest.mark.smoke("union_of_any", daily=0)
@pytest.mark.parametrize("name", ["strided", "union_of_any"])
def test_exports_may_have_a_symbolic_batch(name, tiles, as_a_user):
  (b,) = export.symbolic_shape("b")
  attend = lambda q, k, v: sparse_attention(
    q, k, v, pattern=EVERY_PATTERN[name], implementation="xla"
  )
  shape = jax.ShapeDtypeStruct((b, 20, H, 4), jnp.float32)
  made = export.export(jax.jit(attend))(shape, shape, shape)
  q, k, v = arrays(20, B=3)
  assert_close(made.call(q, k, v), attend(q, k, v), tolerance=1e-6, what=name)


# ------------------------------------------------------------------------------------------ kernels


@pytest.mark.slow
def test_kernels_read_values_per_head_and_sum_their_gradients():
  """In the simulator; q, k and v have the values of bfloat16 in both."""
  q, k, v = (x.astype(jnp.bfloat16) for x in arrays(140, D=64))

  def loss(w, scale, q, k, v, implementation):
    function = lambda s, i, j, h: s - jax.nn.softplus(w)[h] * jnp.log(number(i - j + 1))
    how = dict(scale=scale, score_fn=function, implementation=implementation)
    return sparse_attention(q, k, v, **how).astype(jnp.float32).sum()

  grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=5)
  args = jnp.asarray([0.1, -0.4]), jnp.float32(0.2), q, k, v
  out, (dw, dscale) = grad(*args, "mosaic_gpu")
  wide = (*args[:2], *(x.astype(jnp.float32) for x in args[2:]))
  truth, (dw_truth, dscale_truth) = grad(*wide, "reference")
  np.testing.assert_allclose(out, truth, rtol=2e-2)
  np.testing.assert_allclose(dw, dw_truth, rtol=5e-2, atol=5e-2)
  np.testing.assert_allclose(dscale, dscale_truth, rtol=5e-2, atol=5e-2)


@pytest.mark.one_day_in_three(0)
def test_kernels_read_floats_of_16_bits():
  """Lowered for an H100, with the values that `reference` computes, rounded alike."""
  w, x = jnp.asarray([0.3, -0.7], jnp.bfloat16), jnp.ones((1, 128, H, 64), jnp.bfloat16)
  function = lambda w: lambda s, i, j, h: s - number(w[h] * (i - j).astype(w.dtype))

  def loss(w, implementation):
    how = dict(score_fn=function(w), implementation=implementation)
    return sparse_attention(x, x, x, **how).astype(jnp.float32).sum()

  device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
  one = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(one):
    traced = jax.jit(jax.grad(loss), static_argnums=1).trace(w, "mosaic_gpu")
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 2
    narrow = lambda w: loss(w.astype(jnp.int16), None)  # kernels have no such instructions
    assert api.implementations_in(jax.jit(narrow).trace(w).jaxpr) == ("xla",)

  held = []
  scores = Scores(1.0, None, function(w)).traced(held)
  products = jnp.asarray(np.random.default_rng(0).standard_normal((300, 300)), jnp.float32)
  (j, i), values = np.meshgrid(*[np.arange(300, dtype=np.int32)] * 2), formula.values
  for h in range(H):
    each = tuple(lambda x=x, h=h: x[h] for x in values(scores, H, tuple(held)))
    got, derivative = formula.logits(scores, products, lambda: i, lambda: j, each)
    np.testing.assert_array_equal(got, scores(products, i, j, h, held=tuple(held)))
    np.testing.assert_array_equal(derivative, 1)


NOT_HELD = {
  "bias": lambda w: dict(score_fn=lambda s, i, j, h: s + w[i - j]),
  "predicate": lambda w: dict(pattern=patterns.Where(lambda i, j: number(i - j) < w[0])),
}


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
@pytest.mark.parametrize("what", NOT_HELD)
def test_kernels_refuse_arrays_they_cannot_hold(what, implementation):
  q = jnp.ones((1, 40, 1, 64), jnp.bfloat16)

  @jax.jit
  def attend(w):
    return sparse_attention(q, q, q, implementation=implementation, **NOT_HELD[what](w))

  with pytest.raises(NotImplementedError, match="hold"):
    attend(jnp.ones(40))
