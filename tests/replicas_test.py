"""Copies of an array that differ in a bit are noticed, wherever they are.

Run: pytest tests/replicas_test.py; between processes: tests/reliability.py
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from calm_jax import replicas, sharding

NUMBERS = np.random.default_rng(0).normal(size=(8, 4))


def placed(spec, dtype='float32'):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  return jax.device_put(NUMBERS.astype(dtype), NamedSharding(mesh, spec))


def flipped(array, device):
  """Changes the last bit of the last number that one device holds."""
  parts = []
  for shard in array.addressable_shards:
    part = np.array(shard.data)
    if shard.device.id == device:
      part.reshape(-1).view(np.uint8)[-part.dtype.itemsize] ^= 1
    parts.append(jax.device_put(part, shard.device))
  return jax.make_array_from_single_device_arrays(
    array.shape, array.sharding, parts
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool'])
@pytest.mark.parametrize(
  'spec',
  [
    PartitionSpec(),
    PartitionSpec('fsdp', 'tensor'),
    PartitionSpec(('data', 'fsdp'), None),
  ],
)
def test_one_bit_is_enough(spec, dtype):
  array = placed(spec, dtype)
  good = {'a': placed(PartitionSpec(), 'int32'), 'b': array}
  replicas.check(good)
  with pytest.raises(replicas.DivergenceError, match='^b is not .*cpu:5 '):
    replicas.check({**good, 'b': flipped(array, 5)})


def test_what_has_no_copy_has_none_that_differ():
  array = placed(PartitionSpec(('data', 'fsdp'), 'tensor'))
  replicas.check({'a': flipped(array, 5)})


def test_one_device_and_the_host_hold_no_copies(one_device):
  place = NamedSharding(one_device, PartitionSpec())
  replicas.check({'a': jax.device_put(NUMBERS, place), 'b': NUMBERS})
