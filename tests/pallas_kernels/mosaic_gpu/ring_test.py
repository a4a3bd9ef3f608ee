"""Rings of shared memory, in Pallas's simulator, whose race detector is on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu import ring

ROWS, COLUMNS = 64, 32


def doubled(x, num_slots: int, readers: int, lanes: int | None):
  """2 x of tiles [steps, lanes or 1, ROWS, COLUMNS], sent through a ring by one producer.

  Without lanes every reader reads every step, and writes a result of its own; with lanes each
  reader has one.
  """
  steps, parts = x.shape[:2]
  per_slot = readers if lanes is None else 1
  tiles = ring.Ring(name="x", num_slots=num_slots, full=dict(x=1), readers=per_slot, lanes=lanes)
  shape = (num_slots, ROWS, COLUMNS) if lanes is None else (num_slots, lanes, ROWS, COLUMNS)
  scratch = tiles.scratch(x=gpu.smem(*shape, dtype=x.dtype))
  scratch |= dict(out_s=gpu.smem(readers, ROWS, COLUMNS, dtype=x.dtype))

  def body(refs):
    wg, slots = lax.axis_index("wg"), tiles.of(refs)

    @gpu.when(wg == readers)
    def _():
      @gpu.loop(0, steps)
      def _(n):
        for part in range(parts):
          slot = slots.slot(n, None if lanes is None else part)
          slot.wait_until_free()
          gpu.to_smem(refs["x"].at[n, part], slot["x"], slot.full())

      ring.drain(jnp.int32(steps), slots)

    @gpu.when(wg < readers)
    def _():
      @gpu.loop(0, steps)
      def _(n):
        slot = slots.slot(n, None if lanes is None else wg)
        slot.wait_full()
        value = gpu.load(slot["x"], layout=gpu.WGMMA, optimized=False)
        gpu.commit_reads()
        slot.release()
        gpu.wait_to_gmem(0, wait_read_only=True)
        refs["out_s"].at[wg][...] = value * 2
        gpu.commit_smem()
        gpu.to_gmem(refs["out_s"].at[wg], refs["out"].at[n, wg])

      gpu.wait_to_gmem(0)

  (out,) = gpu.launch(
    "ring",
    body,
    inputs=dict(x=x),
    outputs=dict(out=jax.ShapeDtypeStruct((steps, readers, ROWS, COLUMNS), x.dtype)),
    scratch=scratch,
    grid=(1,),
    grid_names=("block",),
    num_threads=readers + 1,
    thread_name="wg",
  )
  return out


@pytest.mark.smoke(daily=6)
@pytest.mark.parametrize("lanes", [None, 2])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 4])
def test_every_reader_sees_every_step(steps, num_slots, lanes):
  x = jnp.arange(steps * (lanes or 1) * ROWS * COLUMNS, dtype=jnp.float32)
  x = x.reshape(steps, lanes or 1, ROWS, COLUMNS)
  out = jax.jit(doubled, static_argnums=(1, 2, 3))(x, num_slots, 2, lanes)
  np.testing.assert_array_equal(out, np.broadcast_to(2 * x, out.shape))


def test_the_slot_of_a_known_step_is_known():
  slots = ring.Ring(name="x", num_slots=3, full={}, readers=1)
  assert [slots.slot(n).index for n in (0, 2, 4)] == [0, 2, 1]
