"""The halves on a mesh: each device computes those of its own rows.

A row needs no other row: what devices share are the weights, which each of them has whole, and the
gradients of weights and biases, which are summed over the devices that have other rows.

Forward and backward pass are wrapped one by one, and nothing derives one from the other: gradients
of a shard_map would be summed over every axis that its specs do not name.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import UInt32

from pallas_kernels.residual import fold
from pallas_kernels.residual import options as options_lib

Options = options_lib.Options
Bits = options_lib.Bits
Rows = Float[Array, "*B E"]
Local = Float[Array, "n ..."]  # of each device what only it reads, behind an axis of devices

WHOLE = jax.P()


@dataclasses.dataclass(frozen=True)
class Sharded:
  """The functions of an implementation, with its arguments and results.

  But for what an implementation hands from one of its functions to another, row sums and what is
  kept: a device has its own, of any layout.

  Attributes:
    inner: `xla` or `mosaic_gpu`.
    axes: of the mesh, over which each of the leading axes of rows may be sharded.
  """

  inner: Any
  axes: tuple[tuple[str, ...], ...]

  def row_sums(self, x: Rows) -> Local:
    rows, own, _ = self._places(x)
    return _each(lambda x: _given(self.inner.row_sums(x)), (rows,), own)(x)

  def enter(
    self, x: Rows, stats: Local, weights: fold.EnterWeights, options: Options
  ) -> tuple[Float[Array, "*B _"], ...]:
    rows, own, _ = self._places(x)

    def local(x, stats, weights):
      return self.inner.enter(x, _taken(stats), weights, options)

    return _each(local, (rows, own, WHOLE), rows)(x, stats, fold.without_masters(weights))

  def enter_back(
    self,
    x: Rows,
    stats: Local,
    bits: UInt32[Array, "*B W"] | None,
    weights: fold.EnterWeights,
    cotangents: tuple[Float[Array, "*B _"], ...],
    dx: Rows,
    options: Options,
  ) -> tuple[Rows, Rows, Float[Array, " E"], tuple[tuple[Array, Array], ...]]:
    rows, own, over = self._places(x)

    def local(x, stats, bits, weights, cotangents, dx):
      given = (x, _taken(stats), bits, weights, cotangents, dx)
      dx, dm, dbias, dweights = self.inner.enter_back(*given, options)
      return dx, dm, *_summed((dbias, dweights), over)

    places = (rows, own, rows, WHOLE, rows, rows)
    run = _each(local, places, (rows, rows, WHOLE, WHOLE))
    return run(x, stats, bits, weights, cotangents, dx)

  def leave(
    self,
    o: Float[Array, "*B V"],
    x: Rows,
    weights: fold.LeaveWeights,
    bits: Bits | None,
    options: Options,
  ) -> tuple[Rows, Local, tuple[Local, ...]]:
    rows, own, _ = self._places(x)

    def local(o, x, weights, bits):
      y, stats, kept = self.inner.leave(o, x, weights, bits, options)
      return y, _given(stats), _given(kept)

    run = _each(local, (rows, rows, WHOLE, rows), (rows, own, own))
    return run(o, x, fold.without_masters(weights), bits)

  def leave_back(
    self,
    o: Float[Array, "*B V"],
    kept: tuple[Local, ...],
    weights: fold.LeaveWeights,
    bits: Bits | None,
    dy: Rows,
    dm: Rows,
    options: Options,
  ) -> tuple[Float[Array, "*B V"], Rows, tuple]:
    rows, own, over = self._places(dy)

    def local(o, kept, weights, bits, dy, dm):
      do, dx, dweights = self.inner.leave_back(o, _taken(kept), weights, bits, dy, dm, options)
      return do, dx, _summed(dweights, over)

    run = _each(local, (rows, own, WHOLE, rows, rows, rows), (rows, rows, WHOLE))
    return run(o, kept, weights, bits, dy, dm)

  def _places(self, x: Rows) -> tuple[jax.P, jax.P, tuple[str, ...]]:
    """Where rows lie, where each device's own arrays do, and the axes to sum over.

    An axis of rows that does not come out even is not sharded: devices compute it more than once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = lambda names: math.prod(mesh.shape[name] for name in names)
    axes = self.axes if x.ndim == len(self.axes) + 1 else ((),) * (x.ndim - 1)
    pairs = zip(axes, x.shape[:-1], strict=True)
    axes = [names if length % size(names) == 0 else () for names, length in pairs]
    over = tuple(name for names in axes for name in names)
    return jax.P(*(names or None for names in axes)), jax.P(over or None), over


def _each(run: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """On each device, over all axes of the mesh that is set."""
  return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _given(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[None], tree)


def _taken(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[0], tree)


def _summed(tree: Any, over: tuple[str, ...]) -> Any:
  return jax.lax.psum(tree, over) if over else tree
