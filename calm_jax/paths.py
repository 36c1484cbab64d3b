"""Paths of this machine, and of buckets: gs://... and s3://...

Local ones are `pathlib` paths. Remote ones are those of `etils.epath`, which
behave alike, but for three things: a file appears whole when it is closed,
nothing can be appended to it, and nothing can be locked.
"""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
import pathlib
import shutil
import tempfile

from etils import epath
from etils.epath import gpath

# By scheme: what fsspec reads it with, and the extra that installs it.
_READERS = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}


def of(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path that a text means; '~' is the home folder.

  Raises:
    ValueError: if it is remote, and cannot be read with what is installed.
  """
  text = os.fspath(path)
  scheme, mark, rest = text.partition('://')
  if not mark:
    return pathlib.Path(path).expanduser()
  if scheme not in _READERS or not rest.strip('/'):
    raise ValueError(
      f'{text!r} is no path that can be read. Give one of this machine, or'
      f' {" or ".join(f"{one}://BUCKET/FOLDER" for one in _READERS)}.'
    )
  module, extra = _READERS[scheme]
  if importlib.util.find_spec(module) is None:
    raise ValueError(
      f'{text} needs {module}, which is not installed:'
      f" pip install -c constraints.txt 'calm_jax[{extra}]'."
    )
  # Else epath goes through TensorFlow if it is there: slow, and not for s3.
  os.environ['EPATH_USE_TF'] = '0'
  gpath._is_tf_installed.cache_clear()
  return epath.Path(text)


def is_remote(path: pathlib.Path) -> bool:
  """Whether it is of a bucket; `pathlib` makes one slash of two."""
  return '://' in str(path)


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a file, or what is in a folder, from anywhere to anywhere."""
  if source.is_dir():
    for one in source.iterdir():
      copy(one, target / one.name)
    return
  if not is_remote(target):
    target.parent.mkdir(parents=True, exist_ok=True)
  with source.open('rb') as read, target.open('wb') as written:
    shutil.copyfileobj(read, written, 1 << 24)


@contextlib.contextmanager
def to_read(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a local path to the same file; what is opened in time stays open."""
  with _beside(path) as here:
    if here != path:
      copy(path, here)
    yield here


@contextlib.contextmanager
def to_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a local path for a file or folder, copied when all is written."""
  with _beside(path) as here:
    yield here
    if here != path:
      copy(here, path)


@contextlib.contextmanager
def _beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  if not is_remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='calm_jax_') as folder:
    yield pathlib.Path(folder) / path.name


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file at once: nobody ever sees a part of it."""
  if is_remote(path):
    path.write_text(text, encoding='utf-8')
    return
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)
