"""Files of weights from anyone: hashed, written, and refused when hostile.

Run: pytest tests/models/weight_files_test.py
"""

import hashlib
import json
import os
import pickle
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm_jax import assembly, trees
from calm_jax.models import (
  directories,
  export,
  pretrained,
  transformer,
  weight_files,
  weights,
)
from tests import tiny, toys

PARAMS = toys.params(transformer.DecoderLM(tiny.ANCHOR))
FINAL_NORM = 'model.norm.weight'


def write(directory, **settings):
  """A Llama as Hugging Face has it, in several files."""
  settings = {
    'config': tiny.ANCHOR,
    'tensors': {
      name: weights.of_array(leaf)
      for name, leaf in trees.flatten(PARAMS).items()
    },
    'vocabulary': toys.vocabulary(tiny.VOCAB),
    'model_type': 'llama',
    'shard_bytes': 40_000,
    **settings,
  }
  export.write_hugging_face(directory, **settings)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  directory = tmp_path_factory.mktemp('models') / 'good'
  write(directory)
  return directory


@pytest.fixture
def copy(good, tmp_path):
  return shutil.copytree(good, tmp_path / 'copy')


@pytest.fixture
def one_file(tmp_path):
  write(tmp_path / 'one', shard_bytes=10**9)
  return tmp_path / 'one'


def load(directory, mesh):
  spec = pretrained.pretrained_model(directory)
  return assembly.load(spec, assembly.build_model(spec).anchor, mesh=mesh)


def snapshot(root):
  """Everything below a folder: names, links, contents."""
  return {
    path.relative_to(root).as_posix(): os.readlink(path)
    if path.is_symlink()
    else hashlib.sha256(path.read_bytes()).hexdigest()
    for path in root.rglob('*')
    if path.is_symlink() or path.is_file()
  }


def refuse(directory, message, mesh, monkeypatch):
  """It is refused, nothing is written, and nothing put on a device."""

  def place(*args, **kwargs):
    raise AssertionError('something was allocated')

  monkeypatch.setattr(assembly, 'place', place)
  before = snapshot(directory.parent)
  with pytest.raises(ValueError, match=message) as error:
    load(directory, mesh)
  assert str(directory) in str(error.value)  # it says which
  assert snapshot(directory.parent) == before


# --- What is good is read ----------------------------------------------------


def test_several_files_are_one_model(good, one_file, one_device):
  assert len(list(good.glob('*.safetensors'))) > 2
  spec = pretrained.pretrained_model(good)
  assert (spec.model_type, spec.config.embed_dim) == ('llama', 32)
  loaded = load(good, one_device)
  assert trees.digests(loaded.params) == trees.digests(PARAMS)
  assert f'from {good}' in loaded.report
  assert loaded.report.startswith('47 tensors, 0.00')
  assert loaded.fingerprint == load(one_file, one_device).fingerprint


def test_the_report_names_what_is_cast_and_left_out(one_file, one_device):
  file = one_file / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors[FINAL_NORM] = tensors[FINAL_NORM].astype(np.float16)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  inv_freq = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors[inv_freq] = np.arange(4)  # of integers, and not needed
  safetensors.numpy.save_file(tensors, file)
  loaded = load(one_file, one_device)
  assert 'cast: 1 from float16 to float32' in loaded.report
  assert f'left out: 2 (lm_head.weight, {inv_freq})' in loaded.report
  tensors['lm_head.weight'] = -tensors['lm_head.weight']
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match=r'lm_head.weight is not equal to model'):
    load(one_file, one_device)


def test_digests_are_of_the_whole_tensors(one_file, monkeypatch):
  expected = trees.digests(
    safetensors.numpy.load_file(one_file / 'model.safetensors')
  )
  tensors = weight_files.open_directory(one_file)
  assert weight_files.digests(tensors, what='x') == expected
  monkeypatch.setattr(weights, 'PIECE_BYTES', 100)
  assert weight_files.digests(tensors, what='x') == expected


def test_a_directory_is_hashed_again_when_a_file_changes(one_file, monkeypatch):
  first = weight_files.directory_digests(one_file)
  hashed = []
  digests = weight_files.digests

  def counted(*args, **kwargs):
    hashed.append(args)
    return digests(*args, **kwargs)

  monkeypatch.setattr(weight_files, 'digests', counted)
  assert weight_files.directory_digests(one_file) == first
  assert not hashed
  file = one_file / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors[FINAL_NORM][0] += 1
  safetensors.numpy.save_file(tensors, file)
  second = weight_files.directory_digests(one_file)
  assert {k for k in first if first[k] != second[k]} == {FINAL_NORM}


def test_what_is_written_the_library_reads(tmp_path):
  arrays = {
    name: np.arange(6).reshape(2, 3).astype(dtype)
    for name, dtype in weight_files.DTYPES.items()
  }
  arrays |= {'scalar': np.asarray(3.0), 'empty': np.zeros((0, 3), np.float32)}
  file = tmp_path / 'x.safetensors'
  tensors = {name: weights.of_array(one) for name, one in arrays.items()}
  weight_files.write_file(file, tensors)
  assert [path.name for path in tmp_path.iterdir()] == ['x.safetensors']
  again = safetensors.numpy.load_file(file)
  assert trees.digests(again) == trees.digests(arrays)


# --- Hostile files -----------------------------------------------------------


def entry(start, stop, dtype='F32', shape=(2,)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, stop]}


def raw(header, data=b'\0' * 8, length=None):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  length = len(header) if length is None else length
  return struct.pack('<Q', length) + header + data


A = entry(0, 8)
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2)
FILES = {
  'nothing': (b'', 'invalid header|claims|header too small|JSON'),
  'truncated header': (raw({'a': A})[:20], 'claims .* bytes'),
  'longer than the file': (raw({'a': A}, length=10**6), 'claims 1,000,000 b'),
  'as long as can be': (raw({'a': A}, length=2**64 - 1), 'claims 18,446,744'),
  'huge': (raw(b' ' * (17 << 20)), 'claims 17,825,792 bytes'),
  'no JSON': (raw(b'hello world'), 'Expecting value'),
  'no object': (raw([1, 2]), 'a list'),
  'deep': (raw(b'{"a":' + b'[' * 10**5 + b']' * 10**5 + b'}'), 'recursion'),
  'no UTF-8': (raw(b'{"\xff": 1}'), 'utf-8'),
  'twice': (raw(TWICE), "key 'a' occurs twice"),
  'overlap': (raw({'a': A, 'b': entry(4, 12)}, b'\0' * 12), 'invalid offset'),
  'the same bytes': (raw({'a': A, 'b': A}), 'invalid offset'),
  'a hole': (raw({'a': A, 'b': entry(12, 20)}, b'\0' * 20), 'invalid offset'),
  'out of range': (raw({'a': entry(0, 8)}, b'\0' * 4), 'not fully covered'),
  'more data': (raw({'a': entry(0, 8)}, b'\0' * 12), 'not fully covered'),
  'negative': (raw({'a': entry(-8, 0)}), 'expected usize'),
  'shape': (raw({'a': entry(0, 8, shape=(3,))}), 'invalid shape'),
  'overflow': (raw({'a': entry(0, 8, shape=(2**62, 8))}), 'overflow'),
  'float8': (raw({'a': entry(0, 2, 'F8_E4M3')}, b'\0\0'), 'the dtype F8_E4M3'),
  'a pickle': (pickle.dumps({'a': 1}), 'claims|JSON'),
}


@pytest.mark.parametrize('name', FILES)
def test_a_hostile_file_is_refused(name, tmp_path):
  content, message = FILES[name]
  file = tmp_path / 'x.safetensors'
  file.write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    weight_files.open_file(file)
  assert f'{file} cannot be read as safetensors' in str(error.value)


def test_the_library_lets_a_name_occur_twice(tmp_path):
  """The reason why we parse the header ourselves; drop that when this fails."""
  file = tmp_path / 'x.safetensors'
  file.write_bytes(raw(TWICE))
  assert set(safetensors.numpy.load_file(file)) == {'a'}


@pytest.mark.parametrize(
  'dtype', ['bfloat16', 'float16', 'float32', 'float64', 'int32']
)
def test_numbers_that_are_none_are_found(dtype):
  dtype = jnp.dtype(dtype)
  good = np.concatenate([np.asarray([0, -0.0, 1, -2]), np.arange(5000)]).astype(
    dtype
  )
  cases = [good]
  if dtype.kind != 'i':
    limits = jnp.finfo(dtype)
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal]
    good[:4] = np.asarray(extremes, dtype)
    cases = [good, *[good.copy() for _ in range(3)]]
    for case, bad in zip(cases[1:], (np.nan, np.inf, -np.inf), strict=True):
      case[4321] = bad
  tensors = [{'w': weights.of_array(case.reshape(2, -1))} for case in cases]
  weight_files.digests(tensors[0], what='here')
  for one in tensors[1:]:
    with pytest.raises(ValueError, match="here: the tensor 'w' holds NaN or"):
      weight_files.digests(one, what='here')


# --- Hostile directories -----------------------------------------------------


def edit_index(directory, **changes):
  file = directory / weight_files.INDEX_FILE
  index = json.loads(file.read_text())
  index['weight_map'] |= changes
  file.write_text(json.dumps(index))


def rewrite(directory, change):
  """Changes the tensors of a directory with one file."""
  file = directory / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  change(tensors)
  safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('../x.safetensors', r"names the file '\.\./x\.safetensors'"),
    ('/etc/x.safetensors', "names the file '/etc/x.safetensors'"),
    ('sub/x.safetensors', "names the file 'sub/x.safetensors'"),
    ('..\\x.safetensors', 'must lie beside it'),
    ('..', 'not safetensors'),
    ('', "names '', which is not safetensors"),
    ('x.bin', "names 'x.bin', which is not safetensors"),
    ('missing.safetensors', 'names missing.safetensors, which is not there'),
    (7, "names '7', which is not safetensors"),
  ],
)
def test_an_index_names_files_beside_it(
  name, message, copy, one_device, monkeypatch
):
  (copy.parent / 'x.safetensors').write_bytes(raw({'a': A}))
  edit_index(copy, **{FINAL_NORM: name})
  refuse(copy, message, one_device, monkeypatch)


def test_an_index_is_right(copy, one_device, monkeypatch):
  index = json.loads((copy / weight_files.INDEX_FILE).read_text())
  first, *_, last = sorted(set(index['weight_map'].values()))
  here = index['weight_map'][FINAL_NORM]
  edit_index(copy, **{FINAL_NORM: last if here == first else first})
  refuse(copy, f"'{FINAL_NORM}' in '.*', and it is in", one_device, monkeypatch)
  edit_index(copy, **{FINAL_NORM: here, 'another': here})
  refuse(copy, "'another' in .*, and it is in None", one_device, monkeypatch)
  file = copy / weight_files.INDEX_FILE
  for text, message in (
    ('{}', 'has no weight_map'),
    ('{"weight_map": {}}', 'has no weight_map'),
    ('{"weight_map": ["a"]}', 'has no weight_map'),
    ('{"weight_map": {"a": "b", "a": "c"}}', "key 'a' occurs twice"),
    ('{"weight_map"', 'must be a JSON object'),
  ):
    file.write_text(text)
    refuse(copy, message, one_device, monkeypatch)


def test_a_tensor_in_two_files(copy, one_device, monkeypatch):
  files = sorted(copy.glob('*.safetensors'))
  tensors = [safetensors.numpy.load_file(file) for file in files]
  name = next(iter(tensors[0]))
  safetensors.numpy.save_file({**tensors[1], name: tensors[0][name]}, files[1])
  message = f"'{name}' is in {files[0].name} and in {files[1].name}"
  refuse(copy, message, one_device, monkeypatch)


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', None])
def test_links_out_of_the_directory(name, copy, one_device, monkeypatch):
  name = name or sorted(copy.glob('*.safetensors'))[0].name
  shutil.move(copy / name, copy.parent / name)
  (copy / name).symlink_to(f'../{name}')
  refuse(copy, f'{name} is a link to .*, out of its', one_device, monkeypatch)


def test_a_link_inside_the_directory_is_fine(one_file, one_device):
  (one_file / 'model.safetensors').rename(one_file / 'x')
  (one_file / 'model.safetensors').symlink_to('x')
  load(one_file, one_device)


@pytest.mark.parametrize('suffix', weight_files.PICKLES)
def test_pickles_are_never_read(suffix, one_file, one_device, monkeypatch):
  (one_file / 'model.safetensors').unlink()
  trap = one_file.parent / 'trap'

  class Trap:
    def __reduce__(self):
      return (os.mkdir, (str(trap),))

  file = one_file / f'pytorch_model{suffix}'
  file.write_bytes(pickle.dumps(Trap()))
  refuse(one_file, f'It has {file.name}, and pickled', one_device, monkeypatch)
  assert not trap.exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: t.pop(FINAL_NORM), f'only in the model: {FINAL_NORM}'),
    (lambda t: t.update(extra=t[FINAL_NORM]), 'only in .*: extra'),
    (
      lambda t: t.update({FINAL_NORM: np.ones((1, 32), np.float32)}),
      rf'{FINAL_NORM}: the model has \(32,\), .* has \(1, 32\)',
    ),
    (
      lambda t: t.update({FINAL_NORM: np.ones(32, np.int32)}),
      f"'{FINAL_NORM}' is stored as int32; a floating",
    ),
    (
      lambda t: t.update({FINAL_NORM: np.full(32, np.nan, np.float32)}),
      f"'{FINAL_NORM}' holds NaN",
    ),
  ],
)
def test_wrong_tensors(change, message, one_file, one_device, monkeypatch):
  rewrite(one_file, change)
  refuse(one_file, message, one_device, monkeypatch)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('{"model_type": "llama", "model_type": "llama"}', "'model_type' occurs"),
    ('{"a": ' * 10**4 + '1' + '}' * 10**4, 'recursion'),
    ('{"a": "' + 'x' * directories.MAX_JSON + '"}', 'is longer than 4194304 b'),
    ('{"model_type": "mamba"}', "model_type = 'mamba' is not known"),
    ('{"model_type": ["llama"]}', 'is not known'),
    ('{}', 'model_type = None is not known'),
    ('[]', 'must be a JSON object'),
    ('', 'must be a JSON object'),
    (b'\xff\xfe', 'must be UTF-8'),
  ],
)
def test_a_hostile_config(content, message, copy, one_device, monkeypatch):
  content = content.encode() if isinstance(content, str) else content
  (copy / 'config.json').write_bytes(content)
  refuse(copy, message, one_device, monkeypatch)


def test_code_in_a_directory_is_refused(copy, one_device, monkeypatch):
  file = copy / 'config.json'
  fields = json.loads(file.read_text())
  fields['auto_map'] = {'AutoModelForCausalLM': 'modeling.Model'}
  file.write_text(json.dumps(fields))
  (copy / 'modeling.py').write_text('raise SystemExit')
  refuse(copy, 'auto_map', one_device, monkeypatch)


def test_an_empty_directory(tmp_path, one_device, monkeypatch):
  (tmp_path / 'empty').mkdir()
  refuse(tmp_path / 'empty', 'it has no config.json', one_device, monkeypatch)


def test_a_pipe_is_not_waited_for(copy, one_device, monkeypatch):
  (copy / 'config.json').unlink()
  os.mkfifo(copy / 'config.json')
  refuse(copy, 'it has no config.json', one_device, monkeypatch)
