"""Model directories: round trip, fingerprints, and what a bad one says.

Run: pytest tests/models/pretrained_test.py
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm_jax import assembly, sharding, trees
from calm_jax.models import (
  export,
  layers,
  pretrained,
  stacking,
  transformer,
  weights,
)
from tests import tiny, toys

CONFIG = dataclasses.replace(
  tiny.ANCHOR,
  num_layers=2,
  window_pattern=(4, None),
  rope_scaling=layers.RopeScaling('llama3', 8.0, original_length=64),
  final_softcap=30.0,
)
PARAMS = toys.params(transformer.DecoderLM(CONFIG))


def write(directory, **settings):
  settings = {
    'config': CONFIG,
    'params': PARAMS,
    'vocabulary': toys.vocabulary(tiny.VOCAB),
    **settings,
  }
  return pretrained.write_model(directory, **settings)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  directory = tmp_path_factory.mktemp('model')
  write(directory)
  return directory


@pytest.fixture
def copy(good, tmp_path):
  return shutil.copytree(good, tmp_path / 'copy')


def edit_config(directory, **changes):
  file = directory / 'config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- Round trip --------------------------------------------------------------


def test_what_was_written_is_read(good, one_device):
  spec = pretrained.pretrained_model(good)
  assert spec.config == CONFIG
  assert spec.vocabulary.encode('a3 a0') == [3, 0]
  params, fingerprint = pretrained.read_weights(good)
  assert trees.digests(params) == trees.digests(PARAMS)
  model = transformer.DecoderLM(CONFIG)
  loaded = assembly.load(spec, model, mesh=one_device)
  assert loaded.fingerprint == fingerprint
  assert trees.digests(loaded.params) == trees.digests(PARAMS)


def test_weights_are_written_last(tmp_path):
  """A job is taken for finished when its weights are there."""

  class Full:
    def save(self, directory):
      raise OSError('no space left')

  with pytest.raises(OSError, match='no space left'):
    write(tmp_path, vocabulary=Full())
  assert not list(tmp_path.glob('*.safetensors*'))


def test_storage_and_parameter_dtypes(tmp_path, one_device):
  write(tmp_path, storage_dtype='bfloat16')
  params, _ = pretrained.read_weights(tmp_path)
  kernel = params['block_0']['mlp']['up']['kernel']
  exact = PARAMS['block_0']['mlp']['up']['kernel']
  assert kernel.dtype == jnp.bfloat16
  np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))
  size = (tmp_path / 'model.safetensors').stat().st_size
  assert size < 2.2 * trees.num_params(PARAMS)

  assert pretrained.pretrained_model(tmp_path).config.param_dtype == 'bfloat16'
  spec = pretrained.pretrained_model(
    tmp_path, param_dtype='float32', dtype='bfloat16'
  )
  assert (spec.config.dtype, spec.config.param_dtype) == ('bfloat16', 'float32')
  model = transformer.DecoderLM(spec.config)
  loaded = assembly.load(spec, model, mesh=one_device)
  placed = loaded.params['block_0']['mlp']['up']['kernel']
  assert placed.dtype == jnp.float32
  np.testing.assert_array_equal(placed, kernel.astype(np.float32))


def test_random_weights_of_a_directory(good, one_device):
  spec = pretrained.pretrained_model(good, weights='random')
  model = transformer.DecoderLM(CONFIG)
  one, same, other = (
    assembly.load(spec, model, mesh=one_device, seed=seed) for seed in (1, 1, 2)
  )
  assert one.fingerprint == same.fingerprint != other.fingerprint
  assert one.fingerprint != pretrained.read_weights(good)[1]
  assert 'random, seed 1' in one.origin
  table = np.asarray(one.params['embedder']['table'])
  assert np.any(table != PARAMS['embedder']['table'])


def hugging_face(directory, *, dtype=None, **settings):
  export.write_hugging_face(
    directory,
    config=tiny.ANCHOR,
    tensors={
      name: weights.of_array(leaf)
      for name, leaf in trees.flatten(
        toys.params(transformer.DecoderLM(tiny.ANCHOR))
      ).items()
    },
    vocabulary=toys.vocabulary(tiny.VOCAB - 3),  # the table is padded
    model_type='llama',
    dtype=dtype,
    **settings,
  )
  return directory


@pytest.mark.parametrize(
  ('stored', 'computed'),
  [('float32', 'float32'), ('bfloat16', 'bfloat16'), ('float16', 'float32')],
)
def test_dtypes_of_a_hugging_face_directory(stored, computed, tmp_path):
  hugging_face(tmp_path / 'x', dtype=stored)
  spec = pretrained.pretrained_model(tmp_path / 'x')
  assert (spec.config.param_dtype, spec.config.dtype) == (stored, computed)
  spec = pretrained.pretrained_model(
    tmp_path / 'x', dtype='float16', param_dtype='float32'
  )
  assert (spec.config.param_dtype, spec.config.dtype) == ('float32', 'float16')
  fields = json.loads((tmp_path / 'x' / 'config.json').read_text())
  fields['torch_dtype'] = 'bfloat16'  # whatever it says: as they are stored
  (tmp_path / 'x' / 'config.json').write_text(json.dumps(fields))
  spec = pretrained.pretrained_model(tmp_path / 'x')
  assert (spec.config.param_dtype, spec.config.dtype) == (stored, 'bfloat16')


@pytest.mark.parametrize('stack', ['loop', 'scan'])
def test_sharded_and_stacked_weights_are_the_same(stack, tmp_path):
  """Over 8 devices, from several files, with one tensor of another dtype."""
  hugging_face(tmp_path / 'x', shard_bytes=40_000)
  spec = pretrained.pretrained_model(tmp_path / 'x', param_dtype='bfloat16')
  model = assembly.build_model(spec, stack=stack).anchor.clone(cuts=(2,))
  mesh = sharding.make_mesh(data=2, fsdp=4)
  loaded = assembly.load(spec, model, mesh=mesh)
  one = sharding.make_mesh(devices=jax.devices()[:1])
  whole = assembly.load(
    spec, model.clone(stack='loop', cuts=()), mesh=one
  ).params
  expected = stacking.restack(
    whole, source=model.clone(stack='loop'), target=model
  )
  assert trees.digests(loaded.params) == trees.digests(expected)
  split = [
    name
    for name, leaf in trees.flatten(loaded.params).items()
    if not leaf.sharding.is_fully_replicated
  ]
  assert len(split) == len(trees.flatten(loaded.params))
  assert 'cast: 47 from float32 to bfloat16' in loaded.report


# --- Fingerprints ------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_alone(good, copy):
  fingerprint = pretrained.read_weights(good)[1]
  tensors = safetensors.numpy.load_file(good / 'model.safetensors')
  backwards = dict(reversed(tensors.items()))
  file = copy / 'model.safetensors'
  safetensors.numpy.save_file(backwards, file, metadata={'format': 'np'})
  assert file.read_bytes() != (good / 'model.safetensors').read_bytes()
  assert pretrained.read_weights(copy)[1] == fingerprint
  digests = trees.digests(tensors)
  backwards = dict(reversed(digests.items()))
  assert trees.fingerprint(backwards) == trees.fingerprint(digests)


@pytest.mark.parametrize('what', ['bit', 'name', 'dtype', 'shape', 'words'])
def test_a_fingerprint_changes_with(what, good, copy):
  tensors = safetensors.numpy.load_file(good / 'model.safetensors')
  name = 'final_norm/scale'
  if what == 'bit':
    tensors[name].view(np.uint8)[3] ^= 1
  elif what == 'name':
    tensors['another'] = tensors.pop(name)
  elif what == 'dtype':
    tensors[name] = tensors[name].view(np.int32)
  elif what == 'shape':
    tensors[name] = tensors[name].reshape(2, -1)
  else:
    toys.vocabulary(tiny.VOCAB, unk_token='<other>').save(copy)
  safetensors.numpy.save_file(tensors, copy / 'model.safetensors')
  assert pretrained.read_weights(copy)[1] != pretrained.read_weights(good)[1]


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('config.json', 'it has no config.json. It needs'),
    ('model.safetensors', 'has neither model.safetensors nor model.safetens'),
    ('tokenizer.json', 'has no tokenizer'),
  ],
)
def test_a_missing_file_is_named(name, message, copy):
  (copy / name).unlink()
  with pytest.raises(ValueError, match=message):
    pretrained.pretrained_model(copy)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type = 'gpt2' is not known; expected"),
    ({'depth': 3}, r"config.json: unknown fields \['depth'\]; .*'num_layers'"),
    ({'activation': 'swish'}, "activation = 'swish' is not one of"),
    ({'vocab_size': 9}, 'vocab_size = 9, and its vocabulary has 37 words'),
    ({'vocab_size': 33}, 'vocab_size = 33, and its vocabulary has 37 words'),
  ],
)
def test_a_wrong_config_is_refused(changes, message, copy):
  edit_config(copy, **changes)
  with pytest.raises(ValueError, match=message):
    pretrained.pretrained_model(copy)


@pytest.mark.parametrize('keep', [0, 7, 300, -5])
def test_a_truncated_file_is_refused(keep, copy):
  file = copy / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match='model.safetensors cannot be read'):
    pretrained.read_weights(copy)


def test_weights_of_another_model_show_both_differences(copy, one_device):
  edit_config(copy, num_layers=3, mlp_dim=50, query_key_norm='none')
  tensors = safetensors.numpy.load_file(copy / 'model.safetensors')
  tensors['extra/kernel'] = np.zeros((1, 1), np.float32)
  safetensors.numpy.save_file(tensors, copy / 'model.safetensors')
  spec = pretrained.pretrained_model(copy)
  with pytest.raises(ValueError, match='does not fit the model') as error:
    assembly.load(spec, transformer.DecoderLM(spec.config), mesh=one_device)
  message = str(error.value)
  assert 'only in the model: block_2/attention/key/kernel' in message
  assert f'only in {copy}: extra/kernel' in message
  assert 'block_0/mlp/up/kernel: the model has (32, 50)' in message


def test_a_table_may_be_longer_or_lack_special_tokens(tmp_path):
  for size in (tiny.VOCAB + 9, tiny.VOCAB - 2):  # the last are special
    config = dataclasses.replace(CONFIG, vocab_size=size)
    words = toys.vocabulary(tiny.VOCAB)
    spec = pretrained.ModelSpec(config=config, vocabulary=words)
    assert spec.config.vocab_size == size


def test_a_size_is_checked(tmp_path):
  path = hugging_face(tmp_path / 'x')
  with pytest.raises(ValueError, match='is not a llama3.2_1b: vocab_size = 3'):
    pretrained.pretrained_model(path, size='llama3.2_1b')
  with pytest.raises(ValueError, match="size = 'llama9' is not one of"):
    pretrained.pretrained_model(path, size='llama9')


def test_a_wrong_source_of_weights_is_refused(good):
  with pytest.raises(ValueError, match=r"'trained' is not one of"):
    pretrained.pretrained_model(good, weights='trained')
