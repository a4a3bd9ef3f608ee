"""Forward kernel of narrow windows: a producer fills rings of tiles for a few consumers.

    producer --- k, v ---> ring of `stages` steps --- full ---> consumer w: query tile w of a step,
         |                  ^          |                         all key tiles of its window, and
         |                  '-- free --'  once every consumer    the result, by way of `out_s`
         |                                has read them
         '------ q ------> ring of two steps, likewise

A step takes W query tiles, one for each consumer, and the key tiles that these see; schedule.py
says which. When thread blocks walk along the sequence, a step brings W new key tiles and finds the
others in memory, where the step before left them. With W = 2, reach = 3:

    step n            a  b  c  d  e             sees five key tiles, d and e are new
    step n + 1              c  d  e  f  g       f and g are new, a and b are seen no more

Places of keys are one ring of stages * W + reach tiles, and what step n brings goes where the tiles
lie that step n - stages saw last. So a slot of the barriers is a step, free once the consumers have
left it, as usual. The first step of a walk finds nothing: what it should find is loaded besides
("lead").
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import pairs
from pallas_kernels.mosaic_gpu import ring
from pallas_kernels.mosaic_gpu import softmax
from pallas_kernels.mosaic_gpu.gpu import COLUMN
from pallas_kernels.mosaic_gpu.gpu import ROW
from pallas_kernels.mosaic_gpu.gpu import TILE
from pallas_kernels.mosaic_gpu.gpu import Traced
from pallas_kernels.mosaic_gpu.views import Band
from pallas_kernels.mosaic_gpu.views import head_of
from pallas_kernels.mosaic_gpu.views import View
from pallas_kernels.mosaic_gpu.window import schedule
from pallas_kernels.mosaic_gpu.window import share
from pallas_kernels.mosaic_gpu.window import tile

# Of a thread, by consumers: with the producer's no more than what a thread block is launched with
# (share.py), 24 + 2 * 232 of 504, 24 + 3 * 160 of 512, 24 + 4 * 112 of 480. One consumer starts
# with all it can have.
CONSUMER_REGISTERS = {2: 232, 3: 160, 4: 112}


def forward(
  view: View,
  band: Band,
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B T Hkv Dk"],
  v: Float[Array, "B T Hkv Dv"],
  ids: Int[Array, "B R Mp"] | None,
  kv_ids: Int[Array, "B R Mp"] | None,
  prev: tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]] | None,
  *,
  scale: float,
  heads: range | tuple[int, ...],
  warpgroups: int,
  stages: int,
  walks: bool,
  at_once: int,
) -> tuple[Float[Array, "B T Hg Dv"], Float[Array, "B Hg R Mp"]]:
  """Attention to a window of the keys before each query.

  Args:
    view: one natural sequence (R = 1).
    band: the window.
    q, k, v: all heads.
    ids: segment ids, in rows of the view; queries see keys of equal ids.
    kv_ids: those of keys; None: keys have those of the queries.
    prev: out and lse over other keys, which share the softmax.
    scale: of the logits, positive.
    heads: the query heads to work on, Hg of them.
    warpgroups: consumers of a thread block.
    stages: steps whose new keys fit in memory together.
    walks: whether a thread block walks along a share of a sequence, or takes steps in turn.
    at_once: tiles of logits that a consumer has in registers.

  Returns:
    out, and lse of base 2 in rows of the view, float32.
  """
  (B, _, H, Dk), Dv, Hg = q.shape, v.shape[3], len(heads)
  sizes = schedule.Sizes(
    view, band, B, heads, H // k.shape[2], warpgroups, stages, walks, Dv, scale, at_once
  )
  inputs = dict(q=q, k=k, v=v, ids=ids, kv_ids=kv_ids)
  if prev is not None:
    inputs |= dict(prev=prev[0], prev_lse=prev[1])
  return tuple(
    gpu.launch(
      "window_forward",
      lambda refs: _kernel(sizes, refs),
      inputs={name: x for name, x in inputs.items() if x is not None},
      outputs=dict(
        out=jax.ShapeDtypeStruct((*q.shape[:-2], Hg, Dv), q.dtype),
        lse=jax.ShapeDtypeStruct((B, Hg, 1, view.num_tiles * TILE), jnp.float32),
      ),
      scratch=_scratch(sizes, Dk, q.dtype, resumes=prev is not None),
      grid=tuple(sizes.grid.values()),
      grid_names=tuple(sizes.grid),
      num_threads=warpgroups + 1,
      thread_name="wg",
    )
  )


def _rings(sizes: schedule.Sizes) -> tuple[ring.Ring, ring.Ring]:
  """Of queries, a step in a slot; of the keys and values that steps bring."""
  W = sizes.warpgroups
  queries = ring.Ring(name="q", num_slots=schedule.QUERY_STEPS, full=dict(q=W), readers=W)
  loads = 2 * sizes.num_new  # keys and values
  return queries, ring.Ring(name="k", num_slots=sizes.stages, full=dict(k=loads), readers=W)


def _scratch(sizes: schedule.Sizes, Dk: int, dtype: jax.typing.DTypeLike, resumes: bool) -> dict:
  W, Dv, (queries, keys) = sizes.warpgroups, sizes.Dv, _rings(sizes)
  scratch = queries.scratch(q=gpu.smem(queries.num_slots * W, TILE, Dk, dtype=dtype))
  scratch |= keys.scratch(
    k=gpu.smem(sizes.num_key_tiles, TILE, Dk, dtype=dtype),
    v=gpu.smem(sizes.num_key_tiles, TILE, Dv, dtype=dtype),
  )
  scratch |= dict(out_s=gpu.smem(W, TILE, Dv, dtype=dtype))  # before it holds `prev`
  if sizes.num_overlap:
    scratch |= dict(lead_full=gpu.Barrier(num_arrivals=2 * sizes.num_overlap))
  if resumes:
    scratch |= dict(prev_full=gpu.Barrier(num_barriers=W))
  if gpu.simulated():
    scratch |= dict(p_s=gpu.smem(W, TILE, TILE, dtype=dtype))
  return dict(sorted(scratch.items()))  # a place in memory does not depend on the order above


def _kernel(sizes: schedule.Sizes, refs: dict) -> None:
  """A thread block: the last warpgroup loads, the others compute."""
  wg, W = lax.axis_index("wg"), sizes.warpgroups
  steps = schedule.Walk(sizes) if sizes.walks else schedule.Dealt(sizes)

  @gpu.when(wg == W)
  def _() -> None:
    if W > 1:
      gpu.set_max_registers(share.PRODUCER_REGISTERS, action="decrease")
    _Producer(sizes, refs, steps).run()

  @gpu.when(wg < W)
  def _() -> None:
    if W > 1:
      gpu.set_max_registers(CONSUMER_REGISTERS[W], action="increase")
    _Consumer(sizes, refs, steps, wg).run()


class _Producer:
  """Loads the tiles of every step, as far ahead as the rings go."""

  def __init__(self, sizes: schedule.Sizes, refs: dict, steps: schedule.Walk | schedule.Dealt):
    self.sizes, self.refs, self.steps = sizes, refs, steps
    self.queries, self.keys = (x.of(refs) for x in _rings(sizes))

  def run(self) -> None:
    # What the first step would find in memory, had there been one before it. It has a barrier of
    # its own: at that of step 0 as many tiles arrive as at every step's.
    for m in range(self.sizes.num_overlap):
      self.load_keys(jnp.int32(0), m, self.refs["lead_full"])
    gpu.loop(0, self.steps.count)(self.load)
    # Consumers have left all steps when the producer ends.
    ring.drain(self.steps.count, self.keys)
    ring.drain(self.steps.count, self.queries)

  def load(self, n: Traced) -> None:
    """The new keys of step n, then its queries."""
    sizes, W = self.sizes, self.sizes.warpgroups
    # One barrier for all keys of a step, and one that frees them: a barrier for every tile and
    # consumer cost a quarter of the time of a tile, in loops of waits and arrivals.
    slot = self.keys.slot(n)
    slot.wait_until_free()
    for m in range(sizes.num_overlap, W + sizes.reach):
      self.load_keys(n, m, slot.full())
    # Then queries: in the order in which consumers wait.
    slot = self.queries.slot(n)
    slot.wait_until_free()
    b, h = self.steps.sequence(n)
    for w in range(W):
      row = schedule.first_row(sizes, self.steps.query_tile(n, w))
      box = sizes.view.box(self.refs["q"], b, 0, head_of(sizes.heads, h), row)
      gpu.to_smem(box, self.refs["q_s"].at[slot.index * W + w], slot.full())

  def load_keys(self, n: Traced, m: Traced, full: Any) -> None:
    """The m-th key tile of step n, and its values."""
    sizes, refs = self.sizes, self.refs
    b, h = self.steps.sequence(n)
    h = head_of(sizes.heads, h) // sizes.group
    t, place = self.steps.key_tile(n, m), self.steps.place(n, m)
    row = schedule.first_row(sizes, t)
    gpu.to_smem(sizes.view.box(refs["k"], b, 0, h, row), refs["k_s"].at[place], full)
    gpu.to_smem(sizes.view.box(refs["v"], b, 0, h, row), refs["v_s"].at[place], full)


class _Consumer:
  """A warpgroup that takes one query tile of each step."""

  def __init__(
    self, sizes: schedule.Sizes, refs: dict, steps: schedule.Walk | schedule.Dealt, wg: Traced
  ):
    self.sizes, self.refs, self.steps, self.wg = sizes, refs, steps, wg
    self.queries, self.keys = (x.of(refs) for x in _rings(sizes))
    self.stage = refs["out_s"].at[wg]
    self.p_s = refs["p_s"].at[wg] if gpu.simulated() else None
    # Segments have masks of their own for each tile, which a folded one would have to combine.
    folds = sizes.band.folds(sizes.reach + 1) and "ids" not in refs
    self.near = tile.lower_triangle() if folds else None

  def run(self) -> None:
    if self.sizes.num_overlap:
      gpu.barrier_wait(self.refs["lead_full"])
    gpu.loop(0, self.steps.count)(self.attend)
    # Shared memory is another's when the thread block ends.
    gpu.wait_to_gmem(0)

  def attend(self, n: Traced) -> None:
    """The window of this warpgroup's query tile of step n."""
    sizes, refs = self.sizes, self.refs
    b, h = self.steps.sequence(n)
    t = self.steps.query_tile(n, self.wg)
    # Before the wait for keys, which come meanwhile.
    state = self.resume(b, h, t) if "prev" in refs else None
    key_slot, query_slot = self.keys.slot(n), self.queries.slot(n)
    key_slot.wait_full()
    query_slot.wait_full()
    same = self.segments(b, t) if "ids" in refs else [None] * (sizes.reach + 1)
    number = lambda distance: self.steps.number(self.wg, distance)
    places = [self.steps.place(n, number(distance)) for distance in range(sizes.reach + 1)]
    q = refs["q_s"].at[query_slot.index * sizes.warpgroups + self.wg]
    keys, values = ([refs[name].at[x] for x in places] for name in ("k_s", "v_s"))
    options = dict(scale=sizes.scale, at_once=sizes.at_once, scratch=self.p_s)
    window = tile.Window(sizes.band, t, q, keys, values, same, self.near, **options)
    state = window.attend(state)
    # As soon as the products are done, before the result is stored: the producer waits for this.
    query_slot.release()
    key_slot.release()
    self.store(b, h, t, state)

  def resume(self, b: Traced, h: Traced, t: Traced) -> softmax.State:
    """The state in which the softmax over other keys ended."""
    sizes, refs = self.sizes, self.refs
    gpu.wait_to_gmem(0, wait_read_only=True)  # the result of the step before has left
    row = schedule.first_row(sizes, t)
    full = refs["prev_full"].at[self.wg]
    gpu.to_smem(sizes.view.box(refs["prev"], b, 0, h, row), self.stage, full)
    lse = refs["prev_lse"].at[b, h, 0, gpu.ds(row, TILE)]
    lse = gpu.load(lse, layout=ROW, optimized=False)  # while the copy is under way
    gpu.barrier_wait(full)
    return softmax.resume(self.stage, lse, sizes.scale)

  def segments(self, b: Traced, t: Traced) -> list:
    """By distance, which pairs of query tile t and a key tile share a segment."""
    sizes = self.sizes
    ids = lambda ref, row, layout: pairs.segments(ref, b, 0, row, TILE, layout)
    distances = range(sizes.reach + 1)
    starts = [schedule.first_row(sizes, t - distance) for distance in distances]
    # From a row computed otherwise than that of the nearest keys, which is the same: two loads of
    # one place are merged, and one load cannot be in two layouts.
    query_ids = ids(self.refs["ids"], jnp.minimum(t, sizes.num_tiles - 1) * TILE, ROW)
    key_ids = functools.partial(ids, pairs.key_ids(self.refs), layout=COLUMN)
    return [pairs.share_segment(query_ids, key_ids(start)) for start in starts]

  def store(self, b: Traced, h: Traced, t: Traced, state: softmax.State) -> None:
    """Sends out and lse of query tile t on their way; the last group may have tiles too many."""
    sizes, refs = self.sizes, self.refs
    gpu.wait_to_gmem(0, wait_read_only=True)  # the result of the step before has left
    lse = softmax.store(state, self.stage, sizes.scale)
    # What threads wrote, before the copy engine reads it.
    gpu.commit_smem()

    def send() -> None:
      gpu.to_gmem(self.stage, sizes.view.box(refs["out"], b, 0, h, t * TILE))
      # Last: the fence above would wait for it.
      refs["lse"].at[b, h, 0, gpu.ds(t * TILE, TILE)][...] = lse

    # Copies of tiles are clipped where a sequence ends, rows of lse are not: they would go to the
    # next head.
    send() if sizes.num_tiles % sizes.warpgroups == 0 else gpu.when(t < sizes.num_tiles)(send)
