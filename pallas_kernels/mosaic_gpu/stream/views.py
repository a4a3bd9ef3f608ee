"""Frames whose keys lie as their queries do: one sequence, columns, blocks."""

from typing import Any

from jaxtyping import Array

from pallas_kernels.mosaic_gpu import gpu
from pallas_kernels.mosaic_gpu.stream.arrays import cut
from pallas_kernels.mosaic_gpu.stream.arrays import in_rows
from pallas_kernels.mosaic_gpu.stream.arrays import padded
from pallas_kernels.mosaic_gpu.stream.frame import Frame
from pallas_kernels.mosaic_gpu.stream.scalars import Scalar


class Natural(Frame):
  """One sequence, [B, T, H, D] as it is."""

  def shape(self, T: int, stride: int) -> tuple[int, int]:
    del stride
    return 1, T

  def folded(self, x: Array) -> Array:
    return padded(x, 1, self.spare)

  def unfolded(self, x: Array) -> Array:
    return cut(x, 1, self.length).reshape(x.shape[0], self.T, *x.shape[-2:])

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return batch, self.length + self.spare, len(self.heads), D

  def tile(self, ref: Any, b: Scalar, r: Scalar, start: Scalar, size: int, h: Scalar) -> Any:
    del r
    return ref.at[b, gpu.ds(start, size), h]


class Columns(Frame):
  """[B, T/l, l, H, D]: row m of sequence r is token m l + r."""

  # Ids of a column would be a copy in another order; such calls take lists.

  takes_segments = False

  def shape(self, T: int, stride: int) -> tuple[int, int]:
    return stride, T // stride

  def folded(self, x: Array) -> Array:
    return padded(in_rows(x, self.pass_.stride), 1, self.spare)

  def unfolded(self, x: Array) -> Array:
    return cut(x, 1, self.length).reshape(x.shape[0], self.T, *x.shape[-2:])

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return batch, self.length + self.spare, self.sequences, len(self.heads), D

  def tile(self, ref: Any, b: Scalar, r: Scalar, start: Scalar, size: int, h: Scalar) -> Any:
    # Strided in memory, dense in a copy: columns need no gather and no transposed array.
    return ref.at[b, gpu.ds(start, size), r, h]


class Blocks(Frame):
  """[B, T/l, l, H, D]: row m of sequence r is token r l + m."""

  def shape(self, T: int, stride: int) -> tuple[int, int]:
    return T // stride, stride

  def folded(self, x: Array) -> Array:
    return padded(in_rows(x, self.pass_.stride), 2, self.spare)

  def unfolded(self, x: Array) -> Array:
    return cut(x, 2, self.length).reshape(x.shape[0], self.T, *x.shape[-2:])

  def key_shape(self, batch: int, D: int) -> tuple[int, ...]:
    return batch, self.sequences, self.length + self.spare, len(self.heads), D

  def tile(self, ref: Any, b: Scalar, r: Scalar, start: Scalar, size: int, h: Scalar) -> Any:
    return ref.at[b, r, gpu.ds(start, size), h]
