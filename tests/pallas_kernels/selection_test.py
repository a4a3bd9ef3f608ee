"""`pool_blocks` and `select_blocks`: the lists that the rules say, and what they never hold."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import selection
from pallas_kernels import sparse_attention
from tests.helpers.arrays import assert_close

b = 8  # tokens of a block
IMPLEMENTATIONS = selection.IMPLEMENTATIONS
SIZES = list(
  itertools.product((1, b - 1, b, b + 1, 5 * b + 3), (1, b // 2, b, 2 * b), (0, 2), (1, 3))
)


def select(q, p, b, Q, top, first, local, scale, ids=None):
  """The lists of one head of lists: q [T, G, D], p [T // b, D], ids [T]."""
  T = len(q)
  ids = np.zeros(T) if ids is None else ids
  lists = np.full((-(-T // Q), top), -1)
  for n in range(len(lists)):
    a, own = n * Q, range(n * Q // b, (min(T, n * Q + Q) - 1) // b + 1)
    forced = {*own, *range(min(first, own.stop)), *range(max(0, own.start - local + 1), own.start)}
    others = (j for j in range(own.start) if j not in forced and ids[j * b + b - 1] == ids[a])
    score = {j: sum(scale * q[a, g] @ p[j] for g in range(q.shape[1])) for j in others}
    score = {j: x for j, x in score.items() if x > -np.inf}  # nor NaN
    chosen = sorted(score, key=lambda j: (-score[j], j))[: top - len(forced)]
    chosen = sorted({*forced, *chosen})
    lists[n, : len(chosen)] = chosen
  return lists


def whole_numbers(rng, *shape):
  """Small ones, whose sums are exact and often equal."""
  return rng.integers(-2, 3, shape).astype(np.float32)


def documents(rng, B, T, num):
  return np.sort(rng.integers(0, num, (B, T)), axis=1).astype(np.int32)


def normal(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# ------------------------------------------------------------------------------ lists by the rules


@pytest.mark.smoke("43-1-2-3", "43-16-0-1", daily=2)
@pytest.mark.parametrize("T,Q,first,local", SIZES)
def test_lists_are_those_of_the_rules(T, Q, first, local):
  rng, H, groups = np.random.default_rng([T, Q, first, local]), 4, 2
  q, p = whole_numbers(rng, 2, T, H, 4), whole_numbers(rng, 2, T // b, groups, 4)
  p[1, rng.random(T // b) < 0.1] = np.inf  # times 0 it is NaN as well
  p[1, :1] = np.nan
  ids = documents(rng, 2, T, 3) if local > 1 else None
  how = dict(block_size=b, query_block=Q, first=first, local=local, scale=-0.5, segment_ids=ids)
  top = max(1, Q // b) + first + local
  for implementation in IMPLEMENTATIONS:
    got = select_blocks(
      jnp.asarray(q), jnp.asarray(p), top=top, implementation=implementation, **how
    )
    assert got.shape == (2, groups, -(-T // Q), top) and got.dtype == jnp.int32
    for row, group in itertools.product(range(2), range(groups)):
      heads = q[row, :, group * 2 : group * 2 + 2]
      own = None if ids is None else ids[row]
      with np.errstate(invalid="ignore"):
        expected = select(heads, p[row, :, group], b, Q, top, first, local, -0.5, own)
      np.testing.assert_array_equal(got[row, group], expected, err_msg=implementation)


@pytest.fixture
def small_pieces(monkeypatch):
  jax.clear_caches()
  monkeypatch.setattr(selection, "_CHUNK", 5)
  monkeypatch.setattr(selection, "_ROWS", 24)
  yield
  jax.clear_caches()


def test_lists_do_not_depend_on_the_sweep(small_pieces):
  """Chunks of 5 blocks, which divide nothing, 6 rows at a time, whose scores are often equal."""
  T, Q, top = 37 * b + 3, 4, 6
  rng = np.random.default_rng(0)
  q, p = whole_numbers(rng, 1, T, 4, 2), whole_numbers(rng, 1, T // b, 4, 2)
  xla, reference = (
    select_blocks(
      *map(jnp.asarray, (q, p)), block_size=b, query_block=Q, top=top, scale=1.0, implementation=x
    )
    for x in ("xla", "reference")
  )
  np.testing.assert_array_equal(xla, reference)
  for h in range(4):
    expected = select(q[0, :, h : h + 1], p[0, :, h], b, Q, top, 1, 1, 1.0)
    np.testing.assert_array_equal(xla[0, h], expected)


@pytest.mark.one_day_in_three(1)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zeros_of_both_signs_are_equal(implementation):
  """Sorts and `top_k` put 0.0 before -0.0; here lower blocks come first."""
  T = 6 * b
  signs = np.float32([-1, 1, -1, 1, -1])
  p = (1e-30 * np.pad(signs, (0, 1)))[None, :, None, None].astype(np.float32)
  q = jnp.ones((1, T, 1, 1), jnp.float32)
  how = dict(block_size=b, top=3, first=0, scale=1e-30, implementation=implementation)
  assert np.signbit(np.float32(1e-30) * np.float32(-1e-30))  # products vanish, and keep the sign
  got = select_blocks(q, jnp.asarray(p), **how)
  assert got[0, 0, -1].tolist() == [0, 1, 5]


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("lists", [1, 2, 4])
def test_heads_that_share_a_list_add_up(lists):
  rng, T = np.random.default_rng(3), 9 * b
  q, p = whole_numbers(rng, 1, T, 4, 3), whole_numbers(rng, 1, T // b, 2, 3)
  w = whole_numbers(rng, 1, T, 4)
  got = select_blocks(
    *map(jnp.asarray, (q, p)), block_size=b, top=4, lists=lists, scale=1.0, weights=jnp.asarray(w)
  )
  scores = np.einsum("thd,jhd->htj", q[0], np.repeat(p[0], 2, axis=1)) * w[0].T[..., None]
  sums = scores.reshape(lists, 4 // lists, T, -1).sum(axis=1)
  assert got.shape[1] == lists
  for x, of_list in enumerate(sums):  # each block's score as its only feature
    expected = select(of_list[:, None], np.eye(T // b), b, b, 4, 1, 1, 1.0)
    np.testing.assert_array_equal(got[0, x], expected)


def test_an_indexer_has_weights_of_every_head_for_every_list():
  rng, T, HI, Hl = np.random.default_rng(4), 9 * b, 3, 2
  q, p = whole_numbers(rng, 1, T, HI, 3), whole_numbers(rng, 1, T // b, 1, 3)
  w = whole_numbers(rng, 1, T, HI, Hl)
  got = select_blocks(
    *map(jnp.asarray, (q, p)), block_size=b, top=4, scale=1.0, activation="relu",
    weights=jnp.asarray(w),
  )  # fmt: skip
  scores = np.maximum(np.einsum("thd,jd->thj", q[0], p[0, :, 0]), 0)
  sums = np.einsum("thj,thl->ltj", scores, w[0])
  for x in range(Hl):
    expected = select(sums[x][:, None], np.eye(T // b), b, b, 4, 1, 1, 1.0)
    np.testing.assert_array_equal(got[0, x], expected)


def test_exp_is_the_softmax_over_blocks():
  """A head that is sure of a block outweighs one whose scores are larger, and all alike."""
  T = 5 * b
  p = np.eye(5, dtype=np.float32)[None, :, None]  # feature j is block j: q has the logits
  logits = np.float32([[0, 8, 0, 0, 0], [0, 10, 20, 20, 0]])
  q = np.broadcast_to(logits, (1, T, 2, 5)).copy()
  lse = np.log(np.exp(q[..., :4]).sum(axis=-1))
  lse[:, :b] = -np.inf  # where nothing was visible
  q, p, lse = map(jnp.asarray, (q, p, lse))
  how = dict(block_size=b, top=2, first=0, scale=1.0)
  assert select_blocks(q, p, **how, activation="exp", lse=lse)[0, 0, -1].tolist() == [1, 4]
  assert select_blocks(q, p, **how)[0, 0, -1].tolist() == [2, 4]


@pytest.mark.one_day_in_three(0)
def test_more_entries_are_more_blocks():
  """Lists of top are parts of those of top + 1, the log-sum-exp never falls, all is `Dense()`."""
  rng, T, Q = np.random.default_rng(5), 6 * b + 5, 4
  q, k, v = (normal(rng, 1, T, 2, 4) for _ in range(3))

  @jax.jit
  def program(q, k, v):
    results, pooled = [], pool_blocks(k, b)
    for top in (3, 4, 9):
      lists = select_blocks(q, pooled, block_size=b, top=top, query_block=Q)
      how = dict(block_indices=lists, block_size=b, query_block=Q, return_lse=True)
      results.append((lists, *sparse_attention(q, k, v, **how)))
    return results, sparse_attention(q, k, v, return_lse=True)

  results, whole = program(q, k, v)
  sets = [
    [set(x.tolist()) - {-1} for x in np.asarray(lists).reshape(-1, lists.shape[3])]
    for lists, *_ in results
  ]
  for fewer, more in itertools.pairwise(sets):
    assert all(a <= c for a, c in zip(fewer, more, strict=True)) and fewer != more
  for (_, _, fewer), (_, _, more) in itertools.pairwise(results):
    assert (np.asarray(more) >= np.asarray(fewer) - 1e-6).all()
  for what, a, c in zip(("out", "lse"), results[-1][1:], whole, strict=True):
    assert_close(a, c, tolerance=1e-6, what=what)


# -------------------------------------------------------------------------------- who knows what


def attend(q, k, v, *, Q, top, of_list):
  """The program that causality is looked for in; `of_list` gives the queries that are scored."""
  pooled = pool_blocks(k, b)
  lists = select_blocks(of_list(q, Q), pooled, block_size=b, top=top, query_block=Q)
  return sparse_attention(q, k, v, block_indices=lists, block_size=b, query_block=Q)


def mean_of_queries(q, Q):
  """What rule 1 forbids: every query of a list has a say, later ones too."""
  B, T, H, D = q.shape
  padded = jnp.pad(q, [(0, 0), (0, -T % Q), (0, 0), (0, 0)]).reshape(B, -1, Q, H, D)
  return jnp.repeat(padded.mean(axis=2), Q, axis=1)[:, :T]


def earlier_changes(Q, of_list, T=9 * b + 5):
  """How many tokens change an output before them; all are changed, one in each row of the batch."""
  rng = np.random.default_rng(6)
  arrays = [np.asarray(normal(rng, 1, T, 2, 4)) for _ in range(3)]
  rows = [np.repeat(x, T + 1, axis=0) for x in arrays]
  for x in rows:
    x[np.arange(T), np.arange(T)] = 3 * rng.standard_normal((T, 2, 4))
  program = jax.jit(lambda q, k, v: attend(q, k, v, Q=Q, top=3 + max(1, Q // b), of_list=of_list))
  out = np.asarray(program(*map(jnp.asarray, rows)))
  assert (out[np.arange(T), np.arange(T)] != out[T]).all()  # each token changes its own output
  return sum(not np.array_equal(out[u, :u], out[T, :u]) for u in range(T))


@pytest.mark.smoke(daily=1)
@pytest.mark.parametrize("Q", [1, 4, 8, 16])
def test_no_output_depends_on_a_later_token(Q):
  assert earlier_changes(Q, lambda q, Q: q) == 0


def test_a_mean_over_the_queries_of_a_list_is_found_out():
  assert earlier_changes(4, mean_of_queries) > 10


@pytest.mark.one_day_in_three(2)
def test_choices_have_a_name_for_policies():
  """So that a backward pass reads the lists of the forward pass."""
  q = jnp.ones((1, 4 * b, 1, 4))

  def loss(q):
    lists = select_blocks(q, pool_blocks(q, b), block_size=b, top=3)
    return sparse_attention(q, q, q, block_indices=lists, block_size=b).sum()

  def times(**how):
    program = str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, **how)))(q))
    return program.count(f"name={selection._in_chunks.__name__}")

  policy = jax.checkpoint_policies.save_only_these_names("attention_blocks")
  assert times(policy=policy) == 1 and times() == 2


@pytest.mark.one_day_in_three(1)
@pytest.mark.parametrize("Q", [4, 16])
def test_documents_stay_apart(Q):
  """In bits: what changes in one document changes no output of another, and all have keys."""
  rng, T = np.random.default_rng(10), 9 * b + 5
  q, k, v = (np.asarray(normal(rng, 1, T, 2, 4)) for _ in range(3))
  ids = np.searchsorted([5, 21, 50], np.arange(T), side="right")[None]

  @jax.jit
  def program(q, k, v):
    pooled = pool_blocks(k, b, segment_ids=ids)
    how = dict(block_size=b, query_block=Q, segment_ids=ids)
    lists = select_blocks(q, pooled, top=2 + max(1, Q // b), **how)
    return sparse_attention(q, k, v, block_indices=lists, return_lse=True, **how)

  out, lse = program(q, k, v)
  assert np.isfinite(lse).all()
  for document in range(4):
    own = ids == document
    others = (np.where(own[..., None, None], x * 9, x) for x in (q, k, v))
    changed, _ = program(*others)
    np.testing.assert_array_equal(changed[~own], out[~own])
    assert not np.array_equal(changed[own], out[own])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_lists_of_any_numbers_where_scores_are_not_near(seed):
  """As by hand in float64, where the last chosen block is ahead of the next one by 1e-5."""
  T, Q, top, rng = 40 * b + 3, 4, 7, np.random.default_rng(seed)
  q, k = (normal(rng, 1, T, 2, 16) for _ in range(2))
  pooled = pool_blocks(k, b)
  lists = [
    select_blocks(q, pooled, block_size=b, query_block=Q, top=top, implementation=x)
    for x in IMPLEMENTATIONS
  ]
  compared = 0
  for h in range(2):
    heads, keys = (np.asarray(x, np.float64)[0, :, h] for x in (q, pooled))
    expected = select(heads[:, None], keys, b, Q, top, 1, 1, 0.25)
    for n, row in enumerate(expected):
      scores = 0.25 * keys[1 : n * Q // b] @ heads[n * Q]
      ordered = np.sort(scores)[::-1]
      room = top - 2
      near = len(ordered) > room and ordered[room - 1] - ordered[room] < 1e-5 * np.ptp(ordered)
      for got in lists:
        assert near or got[0, h, n].tolist() == row.tolist()
      compared += not near
  assert compared > 0.9 * lists[0].shape[2] * 2


# ------------------------------------------------------------------------------------ pooled keys


def test_pooled_keys_are_means_of_complete_blocks():
  x = normal(np.random.default_rng(8), 2, 3 * b + 5, 2, 4)
  expected = np.asarray(x)[:, : 3 * b].reshape(2, 3, b, 2, 4).mean(axis=2)
  np.testing.assert_allclose(pool_blocks(x, b), expected, rtol=1e-6, atol=1e-7)
  zeros = jnp.zeros((2, b), jnp.float32)
  np.testing.assert_allclose(pool_blocks(x, b, weights=zeros), expected, rtol=1e-6, atol=1e-7)
  # The sum of eight bfloat16 in bfloat16 would lose the ones.
  halves = jnp.asarray([256.0] + [1.0] * 7, jnp.bfloat16)[None, :, None, None]
  assert pool_blocks(halves, b).astype(jnp.float32).item() == np.float32(32.875).astype(
    halves.dtype
  )
  assert pool_blocks(x[:, : b - 1], b).shape == (2, 0, 2, 4)


@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("weighted", [False, True])
def test_pooled_keys_are_of_the_document_of_the_last_token(weighted):
  rng, T = np.random.default_rng(9), 6 * b + 1
  x, ids = np.asarray(normal(rng, 2, T, 2, 4)), documents(rng, 2, T, 4)
  w = np.asarray(normal(rng, 2, b)) if weighted else None
  got = pool_blocks(
    jnp.asarray(x), b, segment_ids=ids, weights=None if w is None else jnp.asarray(w)
  )
  for row, j, h in itertools.product(range(2), range(6), range(2)):
    of_block = slice(j * b, j * b + b)
    same = ids[row, of_block] == ids[row, j * b + b - 1]
    share = same * (np.exp(w[h]) if weighted else 1.0)
    expected = (share[:, None] * x[row, of_block, h]).sum(axis=0) / share.sum()
    np.testing.assert_allclose(got[row, j, h], expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- what is not there


@pytest.mark.one_day_in_three(1)
def test_a_long_program_holds_no_scores_of_all_pairs():
  """Compiled at 65,536 tokens: nothing of T x T, nor an entry for every list and block."""
  T, size = 1 << 16, 128
  shape = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)

  def loss(q, k, v, c):
    pooled = pool_blocks(k[:, :, :1], size)
    lists = select_blocks(q, pooled, block_size=size, query_block=1, top=4)
    how = dict(block_indices=lists, block_size=size, query_block=1, return_mass=True)
    out, lse, mass = sparse_attention(q, k[:, :, :1], v[:, :, :1], **how, implementation="xla")
    return (out * c).sum() + lse.sum() + mass[..., 0].sum()

  program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, shape).compile()
  found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
  largest = max(math.prod(map(int, dims.split(","))) for dims in set(found))
  assert T * 2 * 8 <= largest < T * (T // size) // 4


# ---------------------------------------------------------------------------------------- mistakes

T = 4 * b
q = jnp.ones((1, T, 4, 8))
pooled = jnp.ones((1, 4, 2, 8))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(top=2, local=3), "top=2: must be at least 4, the blocks that are always in a list: 1 of"),
    (dict(query_block=3), "query_block=3 and block_size=8: one must divide the other"),
    (dict(query_block=0), "query_block=0: must be a whole number >= 1"),
    (dict(first=-1), "first=-1: must be a whole number >= 0"),
    (dict(local=0), "local=0: must be a whole number >= 1"),
    (dict(top=2.0), "top=2.0: must be a whole number >= 1"),
    (dict(lists=3), "lists=3: must be 1, Hp=2 or Hq=4 lists per query"),
    (dict(activation="gelu"), "activation='gelu': must be one of none, relu, exp"),
    (dict(activation="exp"), "activation='exp' without lse: 'exp' must come with lse"),
    (dict(lse=jnp.zeros((1, T, 4))), "activation='none' with lse: 'exp' must come with lse"),
    (dict(weights=jnp.ones((1, T, 3))), "weights float32[1, 32, 3]: must have shape"),
    (dict(weights=jnp.ones((1, T, 4, 2)), lists=4), "lists=4: must be None or 2, as weights"),
    (dict(block_size=16), "pooled float32[1, 4, 2, 8]: must have T // block_size = 2 blocks"),
    (dict(pooled=pooled[..., :4]), "must agree in B, D and dtype"),
    (dict(pooled=pooled.astype(jnp.bfloat16)), "must agree in B, D and dtype"),
    (dict(pooled=jnp.ones((1, 4, 3, 8))), "Hp=3 must divide Hq=4"),
    (dict(segment_ids=np.zeros((1, 3), np.int32)), "segment_ids int32[1, 3]: must be integers"),
    (dict(implementation="triton"), "implementation='triton': must be None or one of reference"),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_mistakes_are_named(change, message, as_a_user):
  given = dict(q=q, pooled=pooled, block_size=b, top=3) | change
  with pytest.raises(ValueError, match=re.escape(message)):
    select_blocks(given.pop("q"), given.pop("pooled"), **given)


def test_mistakes_of_pooling_are_named(as_a_user):
  with pytest.raises(ValueError, match=r"block_size=0: must be a whole number >= 1"):
    pool_blocks(q, 0)
  with pytest.raises(ValueError, match=r"weights float32\[4, 7\]: must have shape .*\[4, 8\]"):
    pool_blocks(q, b, weights=jnp.ones((4, 7)))
  with pytest.raises(ValueError, match=r"x float32\[4\]: must be an array of shape"):
    pool_blocks(jnp.ones(4), b)


def test_kernels_that_are_not_there_are_refused(as_a_user):
  with pytest.raises(NotImplementedError, match="mosaic_gpu is not supported, reference and xla"):
    select_blocks(q, pooled, block_size=b, top=3, implementation="mosaic_gpu")
