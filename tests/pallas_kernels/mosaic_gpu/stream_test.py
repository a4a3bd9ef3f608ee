"""The streaming GPU kernels in Pallas's simulator against the reference; lowering for an H100."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import patterns
from pallas_kernels import reference
from pallas_kernels.lowering.passes import Pass
from pallas_kernels.mosaic_gpu import stream
from pallas_kernels.scores import Scores

BlockSizes = stream.BlockSizes


@dataclasses.dataclass(frozen=True)
class Earlier(patterns.Pattern):
  """Keys of the query's column that lie at least `distance` rows of `stride` before it."""

  stride: int
  distance: int

  def allowed(self, i, j, h=0):
    return (i - j >= self.distance * self.stride) & ((i - j) % self.stride == 0)


def summaries(stride, width, *starts, **how):
  return Pass(view="summaries", stride=stride, width=width, starts=starts, **how)


finished = lambda stride, width, *starts: summaries(stride, width, *starts, finished=True)
natural = Pass(view="natural")


@dataclasses.dataclass(frozen=True)
class Case:
  """Pass and pattern of the same pairs, and a shape."""

  pass_: Pass
  pattern: patterns.Pattern
  T: int
  H: int = 1
  Hkv: int = 1
  Dk: int = 64
  Dv: int = 64
  heads: tuple[int, ...] = (0,)
  segments: bool = False
  kv_segments: bool = False
  own: bool = False
  dtype: str = "bfloat16"
  forward: BlockSizes | None = None
  dq: BlockSizes | None = None
  dkv: BlockSizes | None = None


CASES = {
  "dense": Case(natural, patterns.Dense(), T=257, H=4, Hkv=2, Dk=32, Dv=96, heads=(1, 3)),
  "one token": Case(natural, patterns.Dense(), T=1),
  "window": Case(Pass(view="natural", window=100), patterns.Local(100), T=400),
  "window with segments": Case(
    Pass(view="natural", window=100), patterns.Local(100), T=300, segments=True
  ),
  "window with segments of keys": Case(
    Pass(view="natural", window=100), patterns.Local(100), T=300, segments=True, kv_segments=True
  ),
  "column": Case(
    Pass(view="columns", stride=2),
    patterns.Column(2),
    T=402,
    forward=BlockSizes(ahead=True, stages=3, held=2),
  ),
  "earlier rows of a column": Case(
    Pass(view="columns", stride=2, distance=2), Earlier(2, 1), T=300, dq=BlockSizes()
  ),
  "block": Case(Pass(view="blocks", stride=150), patterns.Block(150), T=300, segments=True),
  "block with segments of keys": Case(
    Pass(view="blocks", stride=150), patterns.Block(150), T=300, segments=True, kv_segments=True
  ),
  "summary": Case(summaries(64, 32, 32), patterns.Summary(64, 32), T=512),
  "summary of 5": Case(
    summaries(40, 5, 30), patterns.Summary(40, 5, offset=5), T=400, dq=BlockSizes(step=64)
  ),
  "fixed": Case(
    finished(64, 16, 48, 32),
    patterns.Fixed(64, 16, 2),
    T=384,
    H=2,
    Hkv=2,
    heads=(0, 1),
    own=True,
  ),
  "fixed, odd": Case(
    finished(50, 24, 26, 2),
    patterns.Fixed(50, 24, 2),
    T=300,
    H=2,
    heads=(1, 0),
    own=True,
    forward=BlockSizes(ahead=True),
    dkv=BlockSizes(step=128),
  ),
  "wide fixed": Case(finished(150, 130, 20), patterns.Fixed(150, 130), T=450, own=True),
  "D = 256": Case(natural, patterns.Dense(), T=130, Dk=256, Dv=256),
  "float16": Case(natural, patterns.Dense(), T=130, Dk=128, Dv=96, dtype="float16"),
}


def frame_of(case):
  sizes = case.T, case.H, case.Hkv
  return stream.frame_of(case.pass_, *sizes, case.heads, case.segments, case.own)


def backward(case, q, k, v, ids, out, lse, dout, dlse=None):
  """Gradients of the heads over the pairs of the pass, and delta, by the two kernels."""
  arrays, frame = (q, k, v, *ids, lse), frame_of(case)
  how = dict(out=out, dlse=dlse, scale=0.2, blocks=case.dq)
  dq, delta = stream.dq_kernel(frame, *arrays, None, dout, **how)
  dk, dv = stream.dkv_kernel(frame, *arrays, delta, dout, scale=0.2, blocks=case.dkv)
  return dq, dk, dv, delta


def arrays(case, B=1, value=None):
  """q, k, v, dout and the segment ids of queries and of keys."""
  shapes = (case.H, case.Dk), (case.Hkv, case.Dk), (case.Hkv, case.Dv), (len(case.heads), case.Dv)
  keys = jax.random.split(jax.random.key(0), 4)
  xs = [
    jax.random.normal(key, (B, case.T, *shape)) for key, shape in zip(keys, shapes, strict=True)
  ]
  if value is not None:
    xs = [jnp.sign(x) * value for x in xs]
  of_length = lambda n: jnp.asarray(np.arange(case.T) // n, jnp.int32)[None]
  ids = of_length(37) if case.segments else None
  kv_ids = of_length(41) if case.kv_segments else None
  return *(x.astype(case.dtype) for x in xs), (ids, kv_ids)


def error(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def in_rows(case, x):
  """[B, T, Hg] in the layout of lse."""
  B, T, H = x.shape
  x, stride = np.asarray(x, np.float32), case.pass_.stride
  if case.pass_.view == "columns":
    x = x.reshape(B, T // stride, stride, H).transpose(0, 3, 2, 1)
  elif case.pass_.view == "blocks":
    x = x.reshape(B, T // stride, stride, H).transpose(0, 3, 1, 2)
  else:
    x = x.transpose(0, 2, 1)[:, :, None]
  return jnp.asarray(np.pad(x, [(0, 0)] * 3 + [(0, frame_of(case).padded - x.shape[3])]))


def expected(case, q, k, v, ids):
  """out and lse of the heads, and what pulls cotangents back to q and the heads' own k and v."""
  heads, group = np.asarray(case.heads), case.H // case.Hkv

  def attend(q, k, v):
    out, lse = reference.reference_attention(
      q,
      k,
      v,
      pattern=case.pattern,
      scores=Scores(0.2),
      segment_ids=ids[0],
      kv_segment_ids=ids[1],
    )
    return out[:, :, heads], lse[:, :, heads]

  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  (out, lse), pull = jax.vjp(attend, q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))
  return out, lse, lambda *cotangents: [x[:, :, heads] for x in pull(cotangents)]


@pytest.mark.smoke("column", "fixed, odd")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_equals_the_reference(case):
  q, k, v, _, ids = arrays(case)
  how = dict(scale=0.2, blocks=case.forward)
  out, lse = stream.forward_kernel(frame_of(case), q, k, v, *ids, **how)
  want, want_lse, _ = expected(case, q, k, v, ids)
  assert error(out, want) < 5e-3
  rows = in_rows(case, jnp.ones_like(want_lse)) == 1
  np.testing.assert_allclose(
    lse[rows], in_rows(case, want_lse * np.float32(np.log2(np.e)))[rows], atol=1e-4
  )


@pytest.mark.smoke("earlier rows of a column", "fixed")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_equal_the_reference(case):
  q, k, v, dout, ids = arrays(case)
  out, lse, pull = expected(case, q, k, v, ids)
  dlse = jnp.where(jnp.isfinite(lse), jnp.cos(jnp.arange(case.T, dtype=jnp.float32))[:, None], 0.0)
  rows = [in_rows(case, x) for x in (lse * np.float32(np.log2(np.e)), dlse)]
  of_out = out.astype(q.dtype), rows[0], dout, rows[1]
  dq, dk, dv, delta = backward(case, q, k, v, ids, *of_out)
  if case.pass_.view == "summaries":
    dk, dv = (in_place(case, x) for x in (dk, dv))
  if case.own:  # the keys of the queries' own rows are left to the pass over blocks
    blocks = Pass(view="blocks", stride=case.pass_.stride)
    own = dataclasses.replace(case, pass_=blocks, own=False)
    per_row = [in_rows(own, x[:, :, 0, : case.T].swapaxes(1, 2)) for x in (rows[0], delta)]
    how = dict(scale=0.2, blocks=case.dkv)
    own_dk, own_dv = stream.dkv_kernel(frame_of(own), q, k, v, *ids, *per_row, dout, **how)
    dk, dv = dk + own_dk.astype(jnp.float32), dv + own_dv.astype(jnp.float32)
  wants = pull(dout.astype(jnp.float32), dlse)
  for got, want in zip((dq, dk, dv), wants, strict=True):
    assert error(got, want) < 1e-2


def in_place(case, x):
  """[B, T/l, width, Hg, D] -> [B, T, Hg, D]."""
  one = case.pass_
  whole = np.zeros((1, case.T // one.stride, one.stride, *x.shape[3:]), np.float32)
  for n, head in enumerate(case.heads):
    start = one.starts[head % len(one.starts)]
    whole[:, :, start : start + one.width, n] = x[:, :, :, n]
  return jnp.asarray(whole.reshape(1, case.T, *x.shape[3:]))


def test_huge_values_stay_finite():
  case = Case(natural, patterns.Dense(), T=200)
  q, k, v, dout, _ = arrays(case, value=3e4)
  out, lse = stream.forward_kernel(frame_of(case), q, k, v, scale=0.2)
  grads = backward(case, q, k, v, (None, None), out, lse, dout)
  assert error(out, expected(case, q, k, v, (None, None))[0]) < 5e-3
  for x in (out, *grads):
    assert np.isfinite(np.asarray(x, np.float32)).all()


def test_negative_scales_are_refused():
  case = CASES["one token"]
  q, k, v, _, _ = arrays(case)
  with pytest.raises(NotImplementedError, match=r"scale=-1.0"):
    stream.forward_kernel(frame_of(case), q, k, v, scale=-1.0)


SHAPES = {  # B, T, H, D, stride, width
  "enwik8": (4, 12288, 8, 64, 128, 32),
  "imagenet64": (4, 12288, 16, 32, 128, 8),
  "cifar10": (16, 3072, 2, 128, 128, 8),
  "audio64k": (1, 65536, 8, 64, 256, 32),
  "modern32k": (1, 32768, 16, 128, 128, 32),
}


@pytest.mark.one_day_in_six(5)
@pytest.mark.parametrize("view", ["summary", "fixed", "columns"])
@pytest.mark.smoke("enwik8-fixed", "cifar10-columns")
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_lower_for_an_h100_without_copies(shape, view):
  B, T, H, D, stride, width = SHAPES[shape]
  pass_ = {
    "summary": summaries(stride, width, stride - width),
    "fixed": finished(stride, width, stride - width, stride - 2 * width),
    "columns": Pass(view="columns", stride=stride),
  }[view]
  frame, how = stream.frame_of(pass_, T, H, H, range(H), own=view == "fixed"), dict(scale=D**-0.5)

  def both(q, k, v, dout, delta):
    _, lse = stream.forward_kernel(frame, q, k, v, **how)
    arrays = frame, q, k, v, None, None, lse, delta, dout
    return stream.dq_kernel(*arrays, **how), stream.dkv_kernel(*arrays, **how)

  x = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
  rows = jax.ShapeDtypeStruct((B, H, frame.sequences, frame.padded), jnp.float32)
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(both).trace(x, x, x, x, rows)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert program.count("mosaic_gpu_v2") == 3
  for copy in ("stablehlo.transpose", "stablehlo.gather", "stablehlo.pad", "stablehlo.slice"):
    assert copy not in program
