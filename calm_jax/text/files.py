"""The one place where the files of a tokenizer are opened.

A directory may come from anywhere. A file is opened only if it is an ordinary
one of reasonable size, and JSON must be an object in which no key occurs twice.
"""

import json
import os
import pathlib
import stat
from typing import Any

# Far above what is published: 33 MB for Gemma 3, 1 MB for its configuration.
MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_SETTINGS_BYTES = 16 * 2**20


def read_bytes(
  file: pathlib.Path, *, limit: int = MAX_TOKENIZER_BYTES
) -> bytes:
  """Returns what is in an ordinary file.

  Args:
    file: where it is.
    limit: how many bytes it may have.

  Raises:
    ValueError: if it is missing, unreadable, a device or a pipe, or too long.
  """
  try:
    # A pipe would be waited for; so it is not opened as one.
    handle = os.open(file, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0))
    with os.fdopen(handle, 'rb') as stream:
      ordinary = stat.S_ISREG(os.fstat(handle).st_mode)
      content = stream.read(limit + 1) if ordinary else b''
  except OSError as error:
    raise ValueError(
      f'{file} cannot be read ({error}). Name the directory of the model, or '
      'copy the file again from where it came from.'
    ) from error
  if not ordinary or len(content) > limit:
    what = f'longer than {limit} bytes' if ordinary else 'no ordinary file'
    raise ValueError(
      f'{file} is {what}, so it is not read; a tokenizer needs neither. Copy '
      'the file again from the model.'
    )
  return content


def read_text(file: pathlib.Path, *, limit: int = MAX_TOKENIZER_BYTES) -> str:
  """Returns the text of a UTF-8 file; ValueError as `read_bytes`."""
  try:
    return read_bytes(file, limit=limit).decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{file} cannot be read ({error}); it must be UTF-8 text. Copy it again '
      'from the model.'
    ) from error


def parse_json(text: str, file: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in `text`; ValueError names `file`."""

  def unique(pairs):
    keys = {}
    for name, value in pairs:
      if name in keys:
        raise ValueError(f'the key {name!r} occurs twice')
      keys[name] = value
    return keys

  try:
    content = json.loads(text, object_pairs_hook=unique)
    if not isinstance(content, dict):
      raise ValueError(f'it holds a {type(content).__name__}')
    return content
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{file} must be a JSON object in which no key occurs twice ({error}). '
      'Copy it again from the model, or correct it.'
    ) from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Returns the object in a JSON file of settings; {} if there is no file."""
  if not exists(file):
    return {}
  return parse_json(read_text(file, limit=MAX_SETTINGS_BYTES), file)


def exists(file: pathlib.Path) -> bool:
  """Whether there is something by that name, be it a broken link."""
  return os.path.lexists(file)
