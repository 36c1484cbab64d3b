"""Model directories: round trip, fingerprints, and what a bad one says.

Run: pytest tests/models/pretrained_test.py
"""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm_jax import assembly, trees
from calm_jax.models import directories, layers, pretrained, transformer
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


def test_a_wrong_source_of_weights_is_refused(good):
  with pytest.raises(ValueError, match=r"'trained' is not one of"):
    pretrained.pretrained_model(good, weights='trained')


def test_paths_of_our_own_files():
  path = directories.resolve('calm_jax://tasks/key_value.py')
  assert path.is_file()
