"""Weights that are read slice by slice.

A `Tensor` is an array on disk with a shape and a dtype. It can be transposed,
stacked and taken apart before a byte is read; then any slice of it is filled
into an array of any dtype. So a model of any size passes through a process
that never holds more than one of its leaves.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

PIECE_BYTES = 4 << 20  # read at once; what fits a cache is read fastest

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array that is not read yet.

  Attributes:
    shape: of the whole array.
    dtype: as it is stored.
    fill: writes the slice `index` (start and stop given, step 1, one for each
      axis) into an array of that shape, of any dtype and memory order.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  fill: Callable[[np.ndarray, Index], None]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self, index: Any = (), dtype: Any = None) -> np.ndarray:
    """Reads a slice, the whole by default, as `dtype`.

    Args:
      index: slices with step 1, at most one for each axis.
      dtype: of the result; as stored if None.
    """
    index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
    bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
    shape = [stop - start for start, stop in bounds]
    out = _aligned(shape, np.dtype(dtype or self.dtype))
    self.fill(out, tuple(slice(*one) for one in bounds))
    return out

  def pieces(self) -> Iterator[np.ndarray]:
    """Reads everything in order, a few megabytes at a time."""
    for part in parts(self.shape, self.dtype.itemsize):
      yield self.read(part)

  def transposed(self) -> 'Tensor':
    """Swaps the two axes, of [out, in] and [in, out]."""
    return Tensor(
      self.shape[::-1],
      self.dtype,
      lambda out, index: self.fill(out.T, index[::-1]),
    )

  def astype(self, dtype: Any) -> 'Tensor':
    """Gives it another dtype; `fill` converts anyway."""
    return dataclasses.replace(self, dtype=np.dtype(dtype))

  def __getitem__(self, i: int) -> 'Tensor':
    """Takes one entry of the first axis."""
    one = slice(i, i + 1)
    return Tensor(
      self.shape[1:],
      self.dtype,
      lambda out, index: self.fill(out[None], (one, *index)),
    )


def stack(tensors: Sequence[Tensor]) -> Tensor:
  """Stacks equal shapes along a new first axis.

  The dtype is that of the first; where others differ, `fill` converts them.
  """

  def fill(out, index):
    layers, *rest = index
    for row, one in zip(out, tensors[layers], strict=True):
      one.fill(row, tuple(rest))

  shapes = {one.shape for one in tensors}
  if len(shapes) != 1:
    raise ValueError(f'Blocks of the shapes {sorted(shapes)} do not stack.')
  return Tensor((len(tensors), *tensors[0].shape), tensors[0].dtype, fill)


def of_array(array: Any) -> Tensor:
  """Wraps an array that is there already, on the host or on devices."""
  if isinstance(array, Tensor):
    return array

  def fill(out, index):
    out[...] = np.asarray(array)[index]

  return Tensor(tuple(array.shape), np.dtype(array.dtype), fill)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Allocates where JAX on a CPU can take the memory over without a copy."""
  nbytes = math.prod(shape) * dtype.itemsize
  buffer = np.empty(nbytes + 64, np.uint8)
  start = -buffer.ctypes.data % 64
  return buffer[start : start + nbytes].view(dtype).reshape(shape)


def parts(shape: Sequence[int], itemsize: int) -> Iterator[Index]:
  """Yields slices, in memory order, of at most PIECE_BYTES where possible."""
  if not shape or math.prod(shape) == 0:
    if not shape:
      yield ()
    return
  row = math.prod(shape[1:]) * itemsize
  if row > PIECE_BYTES:
    for i in range(shape[0]):
      for rest in parts(shape[1:], itemsize):
        yield (slice(i, i + 1), *rest)
    return
  step = max(1, PIECE_BYTES // row)
  for i in range(0, shape[0], step):
    rest = (slice(0, n) for n in shape[1:])
    yield (slice(i, min(i + step, shape[0])), *rest)
