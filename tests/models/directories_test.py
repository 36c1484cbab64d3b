"""Paths, hub ids and links.

Run: pytest tests/models/directories_test.py
"""

import hashlib
import sys

import pytest

from calm_jax.models import directories, pretrained
from tests import tiny, toys

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A hub's cache as the library lays it out, without any network."""
  constants = pytest.importorskip('huggingface_hub.constants')
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  cache = tmp_path / 'hub'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(cache))
  model = cache / 'models--owner--name'
  snapshot = model / 'snapshots' / COMMIT
  toys.model_directory(tmp_path / 'plain', tiny.ANCHOR)
  for folder in (snapshot, model / 'blobs', model / 'refs'):
    folder.mkdir(parents=True)
  (model / 'refs' / 'main').write_text(COMMIT)
  for file in (tmp_path / 'plain').iterdir():
    blob = hashlib.sha256(file.read_bytes()).hexdigest()
    (model / 'blobs' / blob).write_bytes(file.read_bytes())
    (snapshot / file.name).symlink_to(f'../../blobs/{blob}')
  return model


@pytest.mark.parametrize('revision', [None, 'main', COMMIT])
def test_a_cached_hub_id_needs_no_network(revision, hub, tmp_path):
  spec = pretrained.pretrained_model('owner/name', revision=revision)
  assert spec.path == hub / 'snapshots' / COMMIT
  assert directories.label(spec.path) == 'owner/name@0123456789ab'
  plain = pretrained.pretrained_model(tmp_path / 'plain')
  assert pretrained.fingerprint(spec) == pretrained.fingerprint(plain)
  assert directories.label(plain.path) == 'plain'


@pytest.mark.parametrize(
  ('name', 'revision'),
  [('owner/other', None), ('owner/name', 'v2'), ('owner/name', 40 * '1')],
)
def test_what_is_not_cached_says_what_to_check(name, revision, hub):
  with pytest.raises(ValueError, match=f"'{name}' .revision '") as error:
    pretrained.pretrained_model(name, revision=revision)
  assert 'nor in the local cache of the Hugging Face' in str(error.value)
  assert 'Check the name, the revision, the network' in str(error.value)


@pytest.mark.parametrize('name', [None, 'config.json', 'model.safetensors'])
def test_a_part_of_a_snapshot_is_completed(name, hub, monkeypatch):
  """As another program may have fetched the configuration alone."""
  import huggingface_hub

  asked, download = [], huggingface_hub.snapshot_download

  def recorded(*args, **settings):
    asked.append(settings['local_files_only'])
    return download(*args, **settings)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', recorded)
  if name is None:
    pretrained.pretrained_model('owner/name')
    assert asked == [True]
    return
  (hub / 'snapshots' / COMMIT / name).unlink()
  with pytest.raises(ValueError, match=f'has no {name}|has neither {name}'):
    pretrained.pretrained_model('owner/name')
  assert asked == [True, False]


def test_a_snapshot_links_to_its_own_blobs_only(hub, tmp_path):
  link = hub / 'snapshots' / COMMIT / 'config.json'
  content = link.read_bytes()
  link.unlink()
  for target in (
    tmp_path / 'config.json',
    hub / 'config.json',
    hub.parent / 'models--owner--other' / 'blobs' / 'x',
    hub / 'blobs' / 'deep' / 'x',
  ):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    link.symlink_to(target)
    with pytest.raises(ValueError, match='config.json is a link to .*, out of'):
      pretrained.pretrained_model('owner/name')
    link.unlink()


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match=r"pip install 'calm_jax\[hub\]'"):
    pretrained.pretrained_model('owner/name')


def test_a_directory_comes_before_a_hub_id(hub, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  toys.model_directory(tmp_path / 'owner' / 'name', tiny.AUGMENTING)
  spec = pretrained.pretrained_model('owner/name')
  assert spec.config.embed_dim == tiny.AUGMENTING.embed_dim
  with pytest.raises(ValueError, match="revision = 'main' is of a hub id"):
    pretrained.pretrained_model('owner/name', revision='main')


@pytest.mark.parametrize('path', ['../x', '/no/where', 'one', 'a/b/c', '~/x/y'])
def test_what_is_no_hub_id_is_a_path(path, hub):
  with pytest.raises(ValueError, match='is not a model directory'):
    pretrained.pretrained_model(path)


def test_paths_of_our_own_files():
  path = directories.resolve('calm_jax://tasks/key_value.py')
  assert path.is_file()
