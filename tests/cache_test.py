"""Tests of calm_jax.cache.

Run: pytest tests/cache_test.py; with Beam: bash tests/cached_tasks.sh
"""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import gin
import pytest
import seqio
import tensorflow as tf

from calm_jax import cache, gin_setup
import calm_jax.tasks.key_value  # noqa: F401, so that its tasks are left alone

ROOT = pathlib.Path(__file__).parent.parent
CACHED = ROOT / 'tests' / 'fixtures' / 'cache' / 'cached'
FILES = (
  'experiments/kv_quick_direct.gin',
  'tests/fixtures/cache/toy.gin',
  'runs/cache.gin',
)
BEAM = 'CALM_JAX_BEAM_PYTHON'


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  """Where the paths of toy.gin begin; the registries are left as they were."""
  monkeypatch.chdir(ROOT)
  registries = seqio.MixtureRegistry, seqio.TaskRegistry
  before = [set(registry.names()) for registry in registries]
  yield
  for registry, names in zip(registries, before, strict=True):
    for name in set(registry.names()) - names:
      registry.remove(name)


def configured(*bindings, gin_files=FILES):
  return gin_setup.configure(
    'cache', gin_files=gin_files, bindings=["MODEL_DIR = 'x'", *bindings]
  )


def test_what_is_missing_is_said_before_beam_is_started(monkeypatch):
  monkeypatch.setattr(cache.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='apache-beam is not installed here'):
    configured()(config='')
  with pytest.raises(ValueError, match='CACHE_DIR is not set'):
    configured('CACHE_DIR = None')(config='')
  with pytest.raises(ValueError, match='There is no file .*none.txt'):
    configured("Mixture.name = 'b'", "lines/TextFile.path = 'none.txt'")(
      config=''
    )
  with pytest.raises(ValueError, match="'kv_.*' cannot be cached: .*Placehol"):
    configured("CACHE_DIR = 'x'", gin_files=FILES[::2])(config='')


def test_the_flags_of_the_run_are_checked_as_the_run_does():
  with pytest.raises(ValueError, match='macro TRAIN_STEP is set, and nothing'):
    configured('TRAIN_STEP = 3')
  with pytest.raises(ValueError, match='seqio_batches.truncate = .*wrong type'):
    configured("seqio_batches.truncate = 'cut'")


def test_processes_of_beam_know_the_tasks_by_the_configuration(monkeypatch):
  configured("Mixture.name = 'toy_beam'")
  text = gin.config_str()
  gin.clear_config()
  with pytest.raises(ValueError, match=f'{cache.CONFIG} is not set'):
    importlib.import_module('calm_jax.tasks.cached')
  monkeypatch.setenv(cache.CONFIG, text)
  importlib.import_module('calm_jax.tasks.cached')
  sys.modules.pop('calm_jax.tasks.cached')
  names = [n for n in seqio.TaskRegistry.names() if n.startswith('toy_beam')]
  assert len(names) == 2
  assert all(seqio.TaskRegistry.get(name).supports_caching for name in names)
  first = seqio.TaskRegistry.get(min(names))
  assert first.source.list_shards('train') == ['0:sums-0', '1:sums-1']
  one = first.source.get_dataset(
    'train', shuffle=False, shard_info=seqio.ShardInfo(1, 2)
  )
  assert len(list(one)) == 20


def examples_of(folder):
  """The examples of each task, sorted: Beam leaves their order to chance."""
  return {
    task.name: sorted(
      repr(sorted((name, str(one)) for name, one in fields.items()))
      for file in task.glob('*.tfrecord*')
      for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
      for fields in [tf.train.Example.FromString(record).features.feature]
    )
    for task in folder.iterdir()
  }


@pytest.mark.slow
@pytest.mark.beam
@pytest.mark.skipif(BEAM not in os.environ, reason='bash tests/cached_tasks.sh')
@pytest.mark.parametrize(
  'runner',
  [
    '--runner=DirectRunner',
    '--runner=DirectRunner,--direct_running_mode=multi_processing'
    ',--direct_num_workers=2',
  ],
)
def test_the_tool_caches_what_the_fixture_holds(runner, tmp_path):
  """In one process, and in two of Beam's that know nothing else of the run."""
  options = f"('--min_shards=4', '--pipeline_options={runner}')"
  command = [
    *(os.environ[BEAM], '-m', 'calm_jax.cache'),
    *(f'--gin_file={file}' for file in FILES),
    *("--gin.MODEL_DIR=''", f"--gin.CACHE_DIR='{tmp_path}/cache'"),
    f'--gin.cache.options={options}',
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert re.search('cached: toy_dc.part0.*: 40 examples', done.stdout)
  assert examples_of(tmp_path / 'cache') == examples_of(CACHED)
  for file in CACHED.glob('*/*.json'):
    made = tmp_path / 'cache' / file.relative_to(CACHED)
    assert made.read_text() == file.read_text()
  again = subprocess.run(command, capture_output=True, text=True)
  assert again.returncode == 0 and 'Renamed' not in again.stderr
