"""Backward kernel of very short sequences, up to two tiles: one warpgroup has one, in all its rows.

Rows are cut into slices of 64, the last of 32 where that is enough: 96 rows are 64 and 32, 24 rows
are 32. Each tensor comes in one copy, and each slice of keys meets the queries from its own on:

    keys 0:   queries 0 (masked), then queries 1     --> dv 0, dk 0, dq 0, and dq 1 begun
    keys 1:   queries 1 (masked)                     --> dv 1, dk 1, dq 1

dS^T of a pair goes through shared memory for dq, and its room serves the next pair: 5 products.
Results leave from where tensors were that nothing reads any more (`room`):

    k_q      [k 0][k 1][q 0][q 1]          dk 0 for k 0, dq 0 for q 0
    v_dout   [v 0][v 1][dout 0][dout 1]    dv 0 for v 0, dq 1 from v 1 on, dv 1 at the end
    out      [out 0][out 1]                dk 1

Without dq (`key_gradients`) there is neither out nor dS^T in memory, and dk 1 leaves from q 1.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import Ref
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.softmax import safe_lse
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View

MOST_ROWS = 2 * TILE
GRADIENTS = ("dq", "dk", "dv")


def takes(view: View, band: Band, Dk: int, Dv: int) -> bool:
  """Whether the kernel is for such sequences: also none whose nearest key is far away."""
  # Above 64 features dk and dv go where k and v were before a second slice has read these.
  num_rows = MOST_ROWS if Dk <= 64 else TILE
  short = view.kind != "natural" and Dk == Dv <= 128 and num_rows >= view.M
  return short and band.far is None and band.near <= 1


def padded_rows(M: int) -> int:
  """Rows of a sequence in memory: a half tile at the end is enough where no more are left."""
  return -(-M // 32) * 32


def backward(
  view: View,
  band: Band,
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T Hkv D"],
  v: Float[Array, "B T Hkv D"],
  out: Float[Array, "B T Hg D"] | None,
  lse: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg D"],
  dlse: Float[Array, "B Hg R Mp"] | None,
  delta: Float[Array, "B Hg R Mp"] | None,
  prev: Sequence[Array] | None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
) -> tuple[Array, Array, Array, Float[Array, "B Hg R Mp"]]:
  """As `resident.backward`, without segment ids."""
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse, dlse=dlse, delta=delta)
  inputs |= dict(out=None if out is None else view(out))
  if prev is not None:
    inputs |= {f"prev_{name}": view(x) for name, x in zip(GRADIENTS, prev, strict=True)}
  dq, dk, dv, new_delta = _launch(view, band, GRADIENTS, inputs, scale=scale, heads=heads)
  return dq, dk, dv, new_delta if delta is None else delta


def key_gradients(
  view: View,
  band: Band,
  q: Float[Array, "B T H D"],
  k: Float[Array, "B T Hkv D"],
  v: Float[Array, "B T Hkv D"],
  lse: Float[Array, "B Hg R Mp"],
  dout: Float[Array, "B T Hg D"],
  delta: Float[Array, "B Hg R Mp"],
  *,
  scale: float,
  heads: range | tuple[int, ...],
) -> tuple[Float[Array, "B T Hg D"], Float[Array, "B T Hg D"]]:
  """dk and dv of `backward` alone."""
  # XLA cancels this sign and that of the streaming kernel which makes delta.
  inputs = dict(q=view(q), k=view(k), v=view(v), dout=view(dout), lse=lse, minus_delta=-delta)
  dk, dv = _launch(view, band, ("dk", "dv"), inputs, scale=scale, heads=heads)
  return dk, dv


def _launch(
  view: View,
  band: Band,
  wanted: Sequence[str],
  inputs: dict[str, Array | None],
  *,
  scale: float,
  heads: range | tuple[int, ...],
) -> list[Array]:
  """The gradients that are wanted, [B, T, Hg, D]; after all three a new delta."""
  inputs = {name: x for name, x in inputs.items() if x is not None}
  q, lse, Hg = inputs["q"], inputs["lse"], len(heads)
  B, H, D = q.shape[0], *q.shape[-2:]
  like = jax.ShapeDtypeStruct((*q.shape[:-2], Hg, D), q.dtype)
  outputs = dict.fromkeys(wanted, like)
  if "dq" in wanted:
    outputs |= dict(new_delta=jax.ShapeDtypeStruct(lse.shape, lse.dtype))
  group = H // inputs["k"].shape[-2]
  sizes = Sizes(view, band, tuple(heads), group, D, scale, "dq" in wanted)
  grads = gpu.launch(
    "short_backward",
    lambda refs: Gradients(sizes, refs).run(),
    inputs=inputs,
    outputs=outputs,
    scratch=_scratch(sizes, q.dtype, set(inputs)),
    grid=(B, view.R, Hg),
    grid_names=("b", "r", "h"),
  )
  num = len(wanted)
  return [*(x.reshape(B, view.T, Hg, D) for x in grads[:num]), *grads[num:]]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is known before the kernel runs; `group` query heads share a key head.

  Without `makes_dq`, only dk and dv are made.
  """

  view: View
  band: Band
  heads: tuple[int, ...]
  group: int
  D: int
  scale: float
  makes_dq: bool

  @property
  def rows(self) -> int:
    return padded_rows(self.view.M)

  @property
  def slices(self) -> list[tuple[int, int]]:
    """First row and rows of each."""
    return [(start, min(TILE, self.rows - start)) for start in range(0, self.rows, TILE)]

  @property
  def span(self) -> int:
    """Columns that memory is laid out by: products over the rows of a slice take whole spans."""
    return math.gcd(self.D, self.slices[-1][1])

  @property
  def before(self) -> int:
    """Rows before the first one where rows are read by whole tiles, counted from the last."""
    return max(self.rows, TILE) - self.rows

  @property
  def windows(self) -> list[int]:
    """First rows of tiles that have all rows, the last ones twice if need be."""
    return sorted({min(start, self.rows - TILE) for start, _ in self.slices})


def _scratch(sizes: Sizes, dtype: jax.typing.DTypeLike, inputs: set[str]) -> dict:
  D, all_rows = sizes.D, sizes.before + sizes.rows
  tiles = lambda rows: gpu.smem(rows, D, dtype=dtype, beside=sizes.span)
  barrier = lambda arrivals=1: gpu.Barrier(num_arrivals=arrivals)
  scratch = dict(
    k_q_s=tiles(2 * sizes.rows),
    v_dout_s=tiles(2 * sizes.rows),
    lse_s=gpu.vector(all_rows),
    delta_s=gpu.vector(all_rows),
    dout_full=barrier(2),  # dout, lse
    out_full=barrier(2 if "dlse" in inputs else 1),  # out and dlse, or delta
    k_q_full=barrier(3),  # q, k, v
    delta_full=barrier(),
  )
  if sizes.makes_dq:
    scratch |= dict(out_s=tiles(all_rows))
    scratch |= dict(ds_s=gpu.smem(TILE, TILE, dtype=dtype, beside=sizes.span))
  if "dlse" in inputs:
    scratch |= dict(dlse_s=gpu.vector(all_rows))
  if "prev_dq" in inputs:
    scratch |= dict(prev_full=barrier())
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(TILE, TILE, dtype=dtype))
  return dict(sorted(scratch.items()))  # a place in memory does not depend on the order above


class Gradients:
  """One sequence of one head."""

  def __init__(self, sizes: Sizes, refs: dict):
    self.sizes, self.refs = sizes, refs
    self.b, self.r, self.h = (lax.axis_index(name) for name in ("b", "r", "h"))
    self.full = {name: ref for name, ref in refs.items() if name.endswith("_full")}
    self.c = sizes.scale * gpu.LOG2E
    self.makes_delta = "out" in refs

  def run(self) -> None:
    self.load()
    gpu.barrier_wait(self.full["dout_full"])
    gpu.barrier_wait(self.full["out_full"])
    if self.sizes.before:  # delta is made of some of the rows of v besides, for nothing
      gpu.barrier_wait(self.full["k_q_full"])
    if self.makes_delta:
      self.make_delta()
    if not self.sizes.before:
      gpu.barrier_wait(self.full["k_q_full"])
    dq = None
    for j in range(len(self.sizes.slices)):
      dq = self.key_slice(j, dq)
    gpu.wait_to_gmem(0)

  # --------------------------------------------------------------------------- loads and delta

  def box(self, name: str, head: Traced, start: int = 0, rows: int | None = None) -> Ref:
    # Not a constant: rows past the end of a sequence are read as zeros, and not written.
    start = self.h * 0 + start
    ref = self.refs[name]
    return self.sizes.view.box(ref, self.b, self.r, head, start, rows or self.sizes.rows)

  def rows(self, name: str, start: int, size: int) -> Ref:
    return self.refs[name].at[self.b, self.h, self.r, gpu.ds(start, size)]

  def pool(self, name: str, start: int, size: int) -> Ref:
    return self.refs[f"{name}_s"].at[gpu.ds(start, size)]

  def load(self) -> None:
    """Starts all copies, in the order in which they are waited for."""
    full, rows, before = self.full, self.sizes.rows, self.sizes.before
    head = head_of(self.sizes.heads, self.h)
    kv_head = lax.div(head, jnp.int32(self.sizes.group))
    gpu.to_smem(self.box("dout", self.h), self.pool("v_dout", rows, rows), full["dout_full"])
    gpu.to_smem(self.rows("lse", 0, rows), self.pool("lse", before, rows), full["dout_full"])
    if self.makes_delta:
      gpu.to_smem(self.box("out", self.h), self.pool("out", before, rows), full["out_full"])
      if "dlse" in self.refs:
        gpu.to_smem(self.rows("dlse", 0, rows), self.pool("dlse", before, rows), full["out_full"])
    else:
      name = "delta" if "delta" in self.refs else "minus_delta"
      gpu.to_smem(self.rows(name, 0, rows), self.pool("delta", before, rows), full["out_full"])
    gpu.to_smem(self.box("q", head), self.pool("k_q", rows, rows), full["k_q_full"])
    gpu.to_smem(self.box("k", kv_head), self.pool("k_q", 0, rows), full["k_q_full"])
    gpu.to_smem(self.box("v", kv_head), self.pool("v_dout", 0, rows), full["k_q_full"])

  def make_delta(self) -> None:
    """delta of all queries, and their lse as weights need it, in shared memory."""
    (rows, before), made = (self.sizes.rows, self.sizes.before), []
    for start in self.sizes.windows:  # before the first row what lies there is read, for nothing
      dout = pairs.load(self.pool("v_dout", rows + start, TILE))
      delta = (dout * pairs.load(self.pool("out", before + start, TILE))).sum(axis=1)
      lse = gpu.load(self.pool("lse", before + start, TILE), layout=ROW, optimized=False)
      if "dlse" in self.refs:
        dlse = self.pool("dlse", before + start, TILE)
        delta = delta - gpu.load(dlse, layout=ROW, optimized=False)
      made.append((start, jnp.where(lse > -jnp.inf, delta, 0.0), safe_lse(lse)))
    for start, delta, lse in made:  # only now: rows of two tiles are changed once
      self.pool("delta", before + start, TILE)[...] = delta
      self.pool("lse", before + start, TILE)[...] = lse
    gpu.commit_smem()
    gpu.barrier_arrive(self.full["delta_full"])
    gpu.barrier_wait(self.full["delta_full"])
    gpu.to_gmem(self.pool("delta", before, rows), self.rows("new_delta", 0, rows))

  # ------------------------------------------------------------------------------ gradients

  def key_slice(self, j: int, dq_begun: Traced | None) -> Traced | None:
    """Stores dk and dv of key slice j and dq of query slice j; dq of the next one, begun.

    Args:
      dq_begun: dq of query slice j by the keys before.
    """
    sizes, D = self.sizes, self.sizes.D
    num, zeros = len(sizes.slices), lambda: gpu.zeros((TILE, D))
    (start, size), rows = sizes.slices[j], sizes.rows
    k, dk, dv, dqs = self.pool("k_q", start, size), zeros(), zeros(), {j: dq_begun}
    for i in range(j, num):
      p, ds = self.weights(j, i)
      of_queries = sizes.slices[i]
      q, dout = (self.pool(x, rows + of_queries[0], of_queries[1]) for x in ("k_q", "v_dout"))
      of_dq = []
      if sizes.makes_dq:
        ds_by_query = pairs.transposed(self.refs["ds_s"].at[gpu.ds(0, size)])
        of_dq = [(zeros() if dqs.get(i) is None else dqs[i], (ds_by_query, k))]
      p_s = self.p_s(of_queries[1])
      if D <= 64:
        terms = (dv, (p, dout)), (dk, (ds, q)), *of_dq
        dv, dk, *dq = gpu.add_matmul(*terms, scratch=p_s)
      else:  # of one slice, one sum at a time: each leaves before the next
        (dv,) = gpu.add_matmul((dv, (p, dout)), scratch=p_s)
        self.store("dv", dv, j)
        (dk,) = gpu.add_matmul((dk, (ds, q)), scratch=p_s)
        self.store("dk", dk * sizes.scale, j)
        dq = gpu.add_matmul(*of_dq) if of_dq else []
      if sizes.makes_dq:
        (dqs[i],) = dq
        if i == j:  # it has met all of its keys
          self.store("dq", dqs.pop(j) * sizes.scale, j)
    if D <= 64:
      self.store("dv", dv, j)
      self.store("dk", dk * sizes.scale, j)
    return dqs.get(j + 1)

  def weights(self, j: int, i: int) -> tuple[Traced, Traced]:
    """P^T and dS^T of key slice j and query slice i, as operands; dS^T in memory too, for dq."""
    sizes, rows = self.sizes, self.sizes.rows
    (k_start, k_size), (q_start, q_size) = sizes.slices[j], sizes.slices[i]
    q, dout = (self.pool(x, rows + q_start, q_size) for x in ("k_q", "v_dout"))
    # Matrix instructions take 64 rows. Those after a slice are others', and their products too.
    k, v = (self.pool(x, k_start, TILE) for x in ("k_q", "v_dout"))
    x, dp = gpu.matmul((k, pairs.transposed(q)), (v, pairs.transposed(dout)))
    column = lambda name: gpu.load(
      self.pool(name, sizes.before + q_start, q_size), layout=COLUMN, optimized=False
    )
    lse = column("lse") if self.makes_delta else safe_lse(column("lse"))
    mask = None
    if q_start - (k_start + k_size - 1) < sizes.band.near:
      queries = gpu.over_rows(gpu.iota((q_size,), layout=COLUMN), TILE)
      keys = gpu.over_columns(gpu.iota((TILE,), layout=ROW), q_size)
      mask = sizes.band.mask(queries - keys + (q_start - k_start))
    p = pairs.weights_by_key(x, lse, self.c, mask)
    dtype = self.refs["q"].dtype
    delta = -column("delta") if "minus_delta" in self.refs else column("delta")
    ds = pairs.derivatives_by_key(p, dp, delta, dtype)
    if sizes.makes_dq:
      # Columns after a slice are what was there before: rows of dq that are not stored.
      self.refs["ds_s"].at[gpu.ds(0, TILE), gpu.ds(0, q_size)][...] = ds
      gpu.commit_smem()
    return p.astype(dtype), ds

  def p_s(self, size: int) -> Ref | None:
    """For weights in the simulator."""
    return self.refs["p_s"].at[:, gpu.ds(0, size)] if gpu.simulated() else None

  # -------------------------------------------------------------------------------- results

  def room(self, name: str, j: int) -> Ref:
    """Where a gradient of slice j leaves from, 64 rows that nothing reads any more."""
    rows = self.sizes.rows
    if len(self.sizes.slices) == 1:
      where = dict(dv=("v_dout", 0), dk=("out", 0), dq=("k_q", 0))
    elif j == 0:
      where = dict(dv=("v_dout", 0), dk=("k_q", 0), dq=("k_q", rows))
    else:
      where = dict(dv=("v_dout", 2 * rows - TILE), dk=("out", 0), dq=("v_dout", TILE))
    if name == "dk" and not self.sizes.makes_dq:  # no room for out
      where = dict(dk=("k_q", 0 if j == 0 else 2 * rows - TILE))
    return self.pool(*where[name], TILE)

  def store(self, name: str, value: Traced, j: int) -> None:
    """Sends a slice of a gradient on its way, with what `prev` has of it added."""
    (start, size), room = self.sizes.slices[j], self.room(name, j)
    valid = room.at[gpu.ds(0, size)]
    gpu.commit_reads()
    if "prev_full" in self.full:
      box = self.box(f"prev_{name}", self.h, start, size)
      gpu.to_smem(box, valid, self.full["prev_full"])
      gpu.barrier_wait(self.full["prev_full"])
      value = value + pairs.load(room)
    room[...] = value.astype(room.dtype)
    gpu.commit_smem()
    gpu.to_gmem(valid, self.box(name, self.h, start, size))
