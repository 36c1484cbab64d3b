"""Tests of calm_jax.text.files."""

import os

import pytest

from calm_jax.text import files


def test_reads_what_is_there(tmp_path):
  file = tmp_path / 'a.json'
  assert files.read_json(file) == {}
  file.write_text('{"a": [1]}')
  assert files.read_json(file) == {'a': [1]}
  assert files.read_bytes(file, limit=10) == b'{"a": [1]}'


def test_refuses_what_is_too_long(tmp_path):
  file = tmp_path / 'a.json'
  file.write_text('{"a": [1]}')
  with pytest.raises(ValueError, match=r'a\.json is longer than 9 bytes'):
    files.read_bytes(file, limit=9)


def test_refuses_what_is_no_ordinary_file(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'zero').symlink_to('/dev/zero')
  for name in ('pipe', 'zero'):
    with pytest.raises(ValueError, match=f'{name} is no ordinary file'):
      files.read_bytes(tmp_path / name)
  (tmp_path / 'broken').symlink_to('nowhere')
  for name in ('broken', '.'):
    with pytest.raises(ValueError, match='cannot be read'):
      files.read_json(tmp_path / name)


@pytest.mark.parametrize(
  'text, error',
  [
    (b'[1]', 'holds a list'),
    (b'"a"', 'holds a str'),
    (b'null', 'holds a NoneType'),
    (b'{"a": 1, "a": 1}', "the key 'a' occurs twice"),
    (b'{"b": {"a": 1, "a": 1}}', "the key 'a' occurs twice"),
    (b'{"a": 1', 'must be a JSON object'),
    (b'[' * 10**5, 'must be a JSON object'),
    (b'{"a": ' * 10**5, 'must be a JSON object'),
    (b'{"a": "\xff"}', 'must be UTF-8'),
  ],
)
def test_refuses_what_is_no_object(text, error, tmp_path):
  file = tmp_path / 'a.json'
  file.write_bytes(text)
  with pytest.raises(ValueError, match=error):
    files.read_json(file)
