"""Tensors that are read slice by slice, and what loading them costs.

Run: pytest tests/models/weights_test.py
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm_jax import assembly, sharding
from calm_jax.models import weight_files, weights

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  """Pieces of 64 bytes, so that toys are read in several."""
  monkeypatch.setattr(weights, 'PIECE_BYTES', 64)
  monkeypatch.setattr(weight_files, 'STRIP', 2)


def numbers(*shape, dtype=jnp.bfloat16):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture
def stored(tmp_path):
  """A file of arrays, and the tensors of that file."""
  arrays = {
    'matrix': numbers(13, 17),
    'long': numbers(1, 90, dtype=np.float32),
    'scalar': numbers(dtype=np.float32),
    'vector': numbers(40, dtype=np.float16),
    'empty': numbers(0, 3),
    **{f'layer{i}': numbers(3, 4) + i for i in range(4)},
  }
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  safetensors.numpy.save_file(arrays, tmp_path / 'x.safetensors')
  return arrays, weight_files.open_file(tmp_path / 'x.safetensors')


SLICES = (slice(None), slice(2, 7), slice(12, 13), slice(0, 0))


def test_any_slice_of_any_view(stored):
  arrays, tensors = stored
  for name, tensor in tensors.items():
    read = tensor.read()
    assert (read.shape, read.dtype) == (tensor.shape, tensor.dtype)
    np.testing.assert_array_equal(read, arrays[name])
  for index in itertools.product(SLICES, SLICES):
    for dtype in (None, np.float32):
      for view, array in (
        (tensors['matrix'], arrays['matrix']),
        (tensors['matrix'].transposed(), arrays['matrix'].T),
        (weights.of_array(arrays['matrix']), arrays['matrix']),
      ):
        read = view.read(index, dtype)
        assert read.dtype == (dtype or array.dtype)
        np.testing.assert_array_equal(read, array[index])


def test_stacks_and_layers(stored):
  arrays, tensors = stored
  layers = [f'layer{i}' for i in range(4)]
  stack = weights.stack([tensors[name].transposed() for name in layers])
  expected = np.stack([arrays[name].T for name in layers])
  assert (stack.shape, stack.dtype) == ((4, 4, 3), expected.dtype)
  for index in ((slice(1, 3),), (slice(None), slice(2), slice(1, 2))):
    np.testing.assert_array_equal(stack.read(index), expected[index])
  np.testing.assert_array_equal(stack[2].read(), expected[2])
  np.testing.assert_array_equal(stack[2].transposed().read(), expected[2].T)
  assert stack.astype(np.float32).read().dtype == np.float32
  with pytest.raises(ValueError, match=r'\(3, 4\).*do not stack'):
    weights.stack([tensors['layer0'], tensors['matrix']])


def test_pieces_are_small_and_in_order(stored):
  arrays, tensors = stored
  for name, tensor in tensors.items():
    pieces = list(tensor.pieces())
    assert all(piece.nbytes <= 64 for piece in pieces)
    joined = b''.join(piece.tobytes() for piece in pieces)
    assert joined == arrays[name].tobytes()


def test_each_device_takes_only_its_part(stored):
  arrays, _ = stored
  array = numbers(16, 8)
  asked = []

  def fill(out, index):
    asked.append(index)
    out[...] = array[index]

  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  place = jax.NamedSharding(mesh, jax.P('tensor', 'fsdp'))
  placed = assembly.place(
    {'a': weights.Tensor(array.shape, array.dtype, fill)},
    {'a': place},
    dtype='float32',
  )['a']
  assert (placed.dtype, placed.sharding) == (jnp.float32, place)
  np.testing.assert_array_equal(placed, array.astype(np.float32))
  # Four parts, though eight devices: the same part is read once.
  assert len(asked) == 4
  assert {(a.start, b.start) for a, b in asked} == {
    (a, b) for a in (0, 8) for b in (0, 4)
  }


# --- Memory ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_loading_holds_the_weights_once(stack, tmp_path):
  """60 MB of them, against the memory before: nothing is held twice.

  The allowance: two of the largest leaf, the table of 20 MB, as where JAX does
  not take over its memory, and 10 MB for all else. (Measured: 33 MB in all.)
  """
  sys.path.insert(0, str(ROOT / 'benchmarks'))
  import load_pretrained

  directory = tmp_path / 'model'
  nbytes = load_pretrained.write(directory, '0.03')
  settings = {
    'path': str(directory),
    'stack': stack,
    'param_dtype': None,
    'fsdp': 1,
  }
  done = subprocess.run(
    [
      sys.executable,
      ROOT / 'benchmarks' / 'load_pretrained.py',
      '--load',
      json.dumps(settings),
    ],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  got = json.loads(done.stdout.splitlines()[-1])
  assert got['params'] == nbytes
  assert got['peak'] - got['before'] < nbytes + 2 * 20e6 + 10e6
