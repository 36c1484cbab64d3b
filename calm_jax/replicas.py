"""Whether devices that hold the same part of an array hold the same bits.

SPMD programs trust that they do. A faulty chip, or a process that has read
something else, makes them differ, and nothing else would tell.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from calm_jax import trees
from calm_jax.array_types import Array


class DivergenceError(RuntimeError):
  """Copies of one array are not equal."""


def check(tree: Any) -> None:
  """Compares all copies of each array, over all processes.

  Each device sums up the bits it holds, and only the sums leave it.

  Args:
    tree: arrays that are all on one mesh; what is on no mesh is passed over.

  Raises:
    DivergenceError: on every process alike, with the array and the device.
  """
  arrays = {
    name: leaf
    for name, leaf in trees.flatten(tree).items()
    if isinstance(getattr(leaf, 'sharding', None), NamedSharding)
  }
  if not arrays:
    return
  specs = tuple(array.sharding.spec for array in arrays.values())
  mesh = next(iter(arrays.values())).sharding.mesh
  if mesh.size == 1:
    return
  sums = _sums_by_device(list(arrays.values()), specs=specs, mesh=mesh)
  sums = np.asarray(multihost_utils.process_allgather(sums, tiled=True))
  sums = sums.reshape(*mesh.devices.shape, len(arrays))
  for i, (name, spec) in enumerate(zip(arrays, specs, strict=True)):
    unlike = mesh.devices[sums[..., i] != sums[..., i][_first(spec, mesh)]]
    if unlike.size:
      raise DivergenceError(
        f'{name} is not equal on all devices that hold a copy: {unlike[0]}'
        f' of process {unlike[0].process_index} has other bits than the first'
        f' ({unlike.size} of {mesh.size} devices have). This state was not'
        ' saved. Look at that device and its memory; the same command continues'
        ' at the last checkpoint.'
      )


@functools.partial(jax.jit, static_argnames=('specs', 'mesh'))
def _sums_by_device(
  arrays: list[Array], *, specs: Sequence[PartitionSpec], mesh: Mesh
) -> Array:
  """Returns uint32 [devices, arrays]; each row is on the device it is of."""

  def local(parts):
    return jnp.stack([_sum_of_bits(part) for part in parts])[None]

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(list(specs),),
    out_specs=PartitionSpec(mesh.axis_names),
    check_vma=False,  # whether copies are equal is the question
  )(arrays)


def _sum_of_bits(part: Array) -> Array:
  """Returns a uint32 that changes if any one number does."""
  if part.dtype == bool:
    part = part.astype(jnp.uint8)
  size = min(4, part.dtype.itemsize)  # wider numbers become two words
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
  words = jax.lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32)
  # By an odd factor, no change of a word is lost modulo 2^32.
  factors = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
  return jnp.sum(words.ravel() * factors, dtype=jnp.uint32)


def _first(spec: PartitionSpec, mesh: Mesh) -> tuple[np.ndarray, ...]:
  """Returns an index: for each device, the first that holds the same part."""
  splits = {name for entry in spec for name in np.atleast_1d(entry)}
  grid = np.indices(mesh.devices.shape)
  return tuple(
    grid[axis] if name in splits else np.zeros_like(grid[axis])
    for axis, name in enumerate(mesh.axis_names)
  )
