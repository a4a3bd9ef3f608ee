"""Random calls of sparse_attention beside `reference`: patterns, sizes, documents, soft caps."""

import concurrent.futures
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering.plan import of_call
from pallas_kernels.scores import Scores
from pallas_kernels.xla import sizes
from tests.helpers.arrays import Case

hypothesis = pytest.importorskip("hypothesis")  # the GPU's machine may lack it
st, Phase, HealthCheck = hypothesis.strategies, hypothesis.Phase, hypothesis.HealthCheck

# Of out and of the gradients, relative to their norms. Where the terms of a gradient cancel, as in
# rows of one key, their roundings remain: they are measured by a part of the cotangent's norm.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 1e-2)}
LEAST = 0.1
KERNELS = dict(dtypes=("bfloat16",), head_sizes=(32, 64, 128))
# What draws, the examples of a part, and the parts that `make test` has time for, of about 200
# examples. On a CPU the kernels run in a simulator: seconds for an example.
SEARCHES = {
  "xla": (dict(), 4, 1),
  "xla in tiles": (dict(), 2, 1),
  "mosaic_gpu": (KERNELS | dict(heads=(1, 2)), 2, 1),
}
PARTS = [
  pytest.param(name, part, id=f"{name}-{part}", marks=[pytest.mark.slow] * (part >= quick))
  for name, (_, examples, quick) in SEARCHES.items()
  for part in range(-(-200 // examples))
]
# The type checks of the tests look at a random item of a list, also where a pattern is drawn.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
SETTINGS = dict(
  derandomize=True,
  deadline=None,
  report_multiple_bugs=False,
  suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@dataclasses.dataclass(frozen=True)
class Call(Case):
  """A case with documents of random lengths, `segments` of them in the mean."""

  soft_cap: float | None = None
  with_lse: bool = True
  seed: int = 0

  def arrays(self):
    q, k, v, _, dout, dlse = super().arrays(self.seed)
    return q, k, v, self._documents(self.segments, self.T, self.seed), dout, dlse

  def kv_ids(self):
    return self._documents(self.kv_segments, self.num_keys, self.seed + 1)

  def _documents(self, segments, length, seed):
    ends = np.random.default_rng(seed).random((self.B, length)) < segments / length
    return jnp.asarray(ends.cumsum(axis=1), jnp.int32) if segments else None


# --------------------------------------------------------------------------------------- strategy


def every(i, j, *, n, rest):
  return (i + 2 * j) % n == rest % n


def band(i, j, *, least, most):
  return (abs(i - j) >= least) & (abs(i - j) <= most)


def prefix(i, j, *, keys, queries):
  return (j < keys) | (i < queries)


def layout(block_size, *, heads, density, seed, causal):
  """Neither square nor as long as the sequence, with rows that hold nothing."""
  rng = np.random.default_rng(seed)
  shape = rng.integers(1, 300 // block_size + 2, 2)
  table = rng.random((heads, *shape)) < density
  table[:, rng.random(shape[0]) < 0.2] = False
  return patterns.BlockLayout(table if heads > 1 else table[0], block_size, causal)


def trees(*, causal: bool):
  """Patterns of all kinds, and such as are put together of a few."""
  number = functools.partial(st.integers, 1)
  flag = st.just(True) if causal else st.booleans()
  predicate = st.one_of(
    st.builds(functools.partial, st.just(every), n=number(9), rest=number(9)),
    st.builds(functools.partial, st.just(band), least=number(40), most=number(200)),
    st.builds(functools.partial, st.just(prefix), keys=number(100), queries=number(20)),
  )
  of_summary = lambda start, width, end: patterns.Summary(start + width + end, width, end)
  of_fixed = lambda rest, width, num: patterns.Fixed(rest + width * num, width, num)
  leaf = st.one_of(
    st.builds(patterns.Dense, flag),
    st.builds(patterns.Local, number(320), flag),
    st.builds(patterns.Column, number(40)),
    st.builds(patterns.Block, number(200)),
    st.builds(of_summary, st.integers(0, 64), number(32), st.integers(0, 16)),
    st.builds(of_fixed, st.integers(0, 64), number(16), number(3)),
    st.builds(patterns.Where, predicate, flag),
    st.builds(
      layout,
      st.sampled_from((16, 32, 64, 128)),
      heads=number(2),
      density=st.sampled_from((0.1, 0.4, 0.9)),
      seed=number(999),
      causal=flag,
    ),
  )
  of_two = lambda tree: st.one_of(
    st.builds(operator.or_, tree, tree),
    st.builds(operator.and_, tree, tree),
    st.builds(lambda a, b: patterns.PerHead((a, b)), tree, tree),
  )
  several = st.recursive(leaf, of_two, max_leaves=4)
  return st.booleans().flatmap(lambda put_together: several if put_together else leaf)


@st.composite
def calls(
  draw, dtypes=("float32", "bfloat16"), head_sizes=(1, 8, 20), longest=300, heads=(1, 2, 4)
):
  H = draw(st.sampled_from(heads))
  segments = draw(st.sampled_from((0, 0, 1, 4)))
  kv_segments = draw(st.sampled_from((0, 1, 4))) if segments else 0
  return Call(
    draw(trees(causal=draw(st.booleans()))),
    T=draw(st.integers(1, longest)),
    S=draw(st.one_of(st.none(), st.integers(1, longest))) if kv_segments else None,
    kv_segments=kv_segments,
    B=draw(st.integers(1, 2)),
    H=H,
    Hkv=draw(st.sampled_from([n for n in (1, 2, 4) if H % n == 0])),
    Dk=draw(st.sampled_from(head_sizes)),
    Dv=draw(st.sampled_from(head_sizes)),
    dtype=draw(st.sampled_from(dtypes)),
    segments=segments,
    soft_cap=draw(st.sampled_from((None, None, 2.0))),
    with_lse=draw(st.booleans()),
    seed=draw(st.integers(0, 999)),
  )


def is_supported(call: Call) -> bool:
  """Whether the GPU's kernels take it."""
  q, k, v, ids, _, _ = call.arrays()
  ids = dict(segment_ids=ids, kv_segment_ids=call.kv_ids())
  scores = Scores(call.Dk**-0.5, call.soft_cap)
  plan, _ = of_call(q, k, v, pattern=call.pattern, scores=scores, **ids)
  return mosaic_gpu.unsupported(plan) is None


# ------------------------------------------------------------------------------------------ check


def lowered(call: Call, implementation: str):
  """The program of the call's results and gradients, and its arguments: float32 for `reference`."""
  q, k, v, ids, dout, dlse = call.arrays()
  if implementation == "reference":
    q, k, v, dout = (x.astype(jnp.float32) for x in (q, k, v, dout))
  attend = functools.partial(
    sparse_attention,
    pattern=call.pattern,
    segment_ids=ids,
    kv_segment_ids=call.kv_ids(),
    logits_soft_cap=call.soft_cap,
    return_lse=call.with_lse,
    implementation=implementation,
  )

  @jax.jit
  def run(q, k, v, cotangents):
    results, vjp = jax.vjp(attend, q, k, v)
    return results, vjp(cotangents)

  arguments = q, k, v, (dout, dlse) if call.with_lse else dout
  return run.lower(*arguments), arguments


def run(program, arguments):
  return program.compile()(*arguments)


def check(call: Call, got, truth) -> None:
  """Compares results and gradients, and looks for what must be exactly nothing."""
  *_, ids, dout, _ = call.arrays()
  T, S, kv_ids = call.T, call.num_keys, call.kv_ids()
  mask = call.pattern.mask(T, S).reshape(-1, T, S)
  mask = np.stack([mask[h % len(mask)] for h in range(call.H)])[None]
  if ids is not None:
    kv_ids = ids if kv_ids is None else kv_ids
    mask = mask & np.equal(ids[:, None, :, None], kv_ids[:, None, None])
  mask = np.broadcast_to(mask, (call.B, call.H, T, S))
  no_keys = ~mask.any(3).swapaxes(1, 2)  # [B, T, H]
  per_kv_head = mask.reshape(call.B, call.Hkv, -1, T, S)
  no_queries = ~per_kv_head.any((2, 3)).swapaxes(1, 2)  # [B, S, Hkv]

  (results, grads), (true_results, true_grads) = got, truth
  if call.with_lse:
    (results, lse), (true_results, true_lse) = results, true_results
    np.testing.assert_array_equal(np.isneginf(lse), no_keys, err_msg="lse of rows without keys")
    np.testing.assert_allclose(lse, true_lse, rtol=0, atol=1e-4, err_msg="lse")
  names = ("out", no_keys, 0), ("dq", no_keys, 1), ("dk", no_queries, 1), ("dv", no_queries, 1)
  tensors = zip(names, (results, *grads), (true_results, *true_grads), strict=True)
  for (what, nothing, bound), x, y in tensors:
    assert x.dtype == call.dtype, what
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.isfinite(x).all(), f"{what}: not finite"
    assert not x[nothing].any(), f"{what}: not zero where nothing attends"
    size = max(np.linalg.norm(y), LEAST * np.linalg.norm(np.asarray(dout, np.float64)))
    error = np.linalg.norm(x - y) / size
    assert error <= BOUNDS[call.dtype][bound], f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("name,part", PARTS)
def test_random_calls_match_the_reference(name, part, monkeypatch):
  how, examples, _ = SEARCHES[name]
  implementation = name.partition(" ")[0]
  if name == "xla in tiles":  # as long inputs are
    for size, value in dict(WHOLE=0, TILE=48, LOGITS=1 << 14).items():
      monkeypatch.setattr(sizes, size, value)

  @hypothesis.seed(1000 * list(SEARCHES).index(name) + part)
  @hypothesis.settings(max_examples=examples, phases=[Phase.generate, Phase.shrink], **SETTINGS)
  @hypothesis.given(calls(**how))
  def one(call):
    hypothesis.assume(implementation != "mosaic_gpu" or is_supported(call))
    check(call, *(run(*lowered(call, x)) for x in (implementation, "reference")))

  one()


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(6))  # which processes may share
def test_random_calls_match_the_reference_on_a_gpu(part):
  found = {}

  @hypothesis.seed(part)
  @hypothesis.settings(max_examples=80, phases=[Phase.generate], **SETTINGS)
  @hypothesis.given(calls(**KERNELS, longest=1_000))
  def draw(call):
    hypothesis.assume(len(found) < 10 and is_supported(call))
    found.setdefault(call.T, call)  # hypothesis likes to draw the same with a small change

  draw()
  assert len(found) == 10
  names = "mosaic_gpu", "reference"
  programs = [lowered(call, name) for call in found.values() for name in names]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # XLA compiles without the interpreter
    compiled = list(pool.map(lambda program: program[0].compile(), programs))
  results = [f(*arguments) for f, (_, arguments) in zip(compiled, programs, strict=True)]
  wrong = []
  for call, got, truth in zip(found.values(), results[::2], results[1::2], strict=True):
    try:
      check(call, got, truth)
    except AssertionError as error:
      wrong.append(f"{call!r}: {error}")
  assert not wrong, "\n".join([f"{len(wrong)} of {len(found)} calls", *wrong])
