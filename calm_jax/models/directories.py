"""Where model directories are, and what may be read of one.

A directory may come from anyone. Nothing in it is executed, nothing outside it
is read, and its JSON is small, flat and says each thing once.
"""

import importlib.resources
import json
import pathlib
import re
from typing import Any

from calm_jax import paths
from calm_jax.text import files

CONFIG_FILE = 'config.json'
PACKAGE_PREFIX = 'calm_jax://'
MAX_JSON = 4 << 20
# What is fetched from a hub: no code, no pickles, no second copies of weights.
HUB_FILES = ('*.json', 'model*.safetensors', '*.model', '*.jinja')
_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')


def resolve(
  path: str | pathlib.Path, *, revision: str | None = None
) -> pathlib.Path:
  """Returns a local path, of a directory, of our own files or from a hub.

  Args:
    path: a path; or `calm_jax://...`, a folder among our own files; or a
      Hugging Face hub id, 'owner/name', if no such directory exists.
    revision: of the hub id: a branch, a tag or a commit; 'main' if None.

  Raises:
    ValueError: if there is no such directory, here or on the hub.
  """
  text = str(path)
  if text.startswith(PACKAGE_PREFIX):
    inside = text.removeprefix(PACKAGE_PREFIX)
    package, _, rest = inside.partition('/')
    root = importlib.resources.files(f'calm_jax.{package}')
    local = pathlib.Path(str(root.joinpath(rest)))
  else:
    local = pathlib.Path(path).expanduser()
    if not local.exists() and _HUB_ID.fullmatch(text):
      return _from_hub(text, revision or 'main')
  if revision is not None:
    raise ValueError(
      f'{local} is a path, and revision = {revision!r} is of a hub id like'
      " 'google/gemma-2b'. Leave it out."
    )
  return local


def _from_hub(name: str, revision: str) -> pathlib.Path:
  """Returns the snapshot of a hub id: the cached one, else a download."""
  where = f'{name!r} (revision {revision!r})'
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f'There is no directory {name!r}. If it is the id of a model on the'
      " Hugging Face hub, install huggingface_hub: pip install 'calm_jax[hub]'."
    ) from error
  problem = None
  for local_files_only in (True, False):
    try:
      snapshot = pathlib.Path(
        huggingface_hub.snapshot_download(
          name,
          revision=revision,
          allow_patterns=list(HUB_FILES),
          ignore_patterns=['*/*'],
          local_files_only=local_files_only,
        )
      )
    except Exception as error:  # of the network, the hub, or a name it refuses
      problem = error
    else:
      if not local_files_only or _is_complete(snapshot):
        return snapshot
  reason = str(problem).strip().split('\n')[0]
  raise ValueError(
    f'{where} is neither a directory, nor in the local cache of the Hugging'
    f' Face hub, nor could it be fetched ({type(problem).__name__}: {reason}).'
    ' Check the name, the revision, the network, and for gated models your'
    ' token; or give a directory.'
  ) from problem


def _is_complete(snapshot: pathlib.Path) -> bool:
  """Whether a cached snapshot is whole: others may cache a part of one."""
  index = snapshot / 'model.safetensors.index.json'
  texts = ('tokenizer.json', 'tokenizer_config.json', '*.model')
  if not (snapshot / CONFIG_FILE).is_file() or not any(
    any(snapshot.glob(name)) for name in texts
  ):
    return False
  if not index.is_file():
    return (snapshot / 'model.safetensors').is_file()
  named = read_json(index, limit=1 << 24).get('weight_map', {})
  return all((snapshot / str(name)).is_file() for name in named.values())


def label(path: pathlib.Path) -> str:
  """Names a directory without saying where it is on this machine."""
  if path.parent.name == 'snapshots':
    model = path.parent.parent.name.removeprefix('models--').replace('--', '/')
    return f'{model}@{path.name[:12]}'
  return path.resolve().name


def check_links(directory: pathlib.Path) -> None:
  """Raises ValueError if what is read of the directory is a link out of it."""
  templates = directory / 'additional_chat_templates'
  for entry in (*directory.iterdir(), *templates.glob('*')):
    if entry.is_symlink():
      check_contained(entry, directory)


def check_contained(
  file: pathlib.Path, directory: pathlib.Path | None = None
) -> None:
  """Raises ValueError if a file is a link to somewhere else.

  A hub's cache is allowed: there snapshots/<commit>/x links to ../../blobs/y.

  Args:
    file: that may be a link.
    directory: of the model; that of the file if None.
  """
  if paths.is_remote(file):  # there are no links in a bucket
    return
  folder, real = (directory or file.parent).resolve(), file.resolve()
  allowed = [folder]
  model = folder.parent.parent
  if folder.parent.name == 'snapshots' and model.name.startswith('models--'):
    allowed.append(model / 'blobs')
  if real.parent not in allowed:
    raise ValueError(
      f'{file} is a link to {real}, out of its directory. Copy the file there'
      ' if you trust it.'
    )


def read_json(file: pathlib.Path, *, limit: int = MAX_JSON) -> dict[str, Any]:
  """Reads a JSON object, as `text.files` does; no links out.

  Args:
    file: must exist.
    limit: how many bytes it may have.
  """
  check_contained(file)
  with paths.to_read(file) as here:
    text = files.read_text(here, limit=limit)
  return files.parse_json(text, file)


def dump_json(content: Any, *, indent: int | None = 2) -> str:
  """Returns JSON text, as we write it."""
  return json.dumps(content, indent=indent, ensure_ascii=False)


def write_json(file: pathlib.Path, content: Any) -> None:
  """Writes JSON that a person can read."""
  file.write_text(dump_json(content) + '\n', encoding='utf-8')
