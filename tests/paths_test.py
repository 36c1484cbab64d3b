"""Runs in buckets: of a server for s3://, and of one for gs://, on loopback.

Run: pytest tests/paths_test.py

The servers are moto[server] and gcp-storage-emulator, with s3fs and gcsfs; what
is not installed is skipped.
"""

import importlib.util
import json
import pathlib
import socket

import jax
import numpy as np
import pytest

from calm_jax import (
  evaluate,
  evaluation,
  guards,
  metrics,
  paths,
  profiling,
  run_files,
)
from calm_jax.models import pretrained
from tests import reliability, toy_run, toys

SETTINGS = {'train_steps': 6, 'checkpoint_every': 4}


def free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


@pytest.fixture(scope='module')
def s3():
  """A bucket of moto's server."""
  server = pytest.importorskip('moto.server')
  pytest.importorskip('s3fs')
  port = free_port()
  server = server.ThreadedMotoServer(ip_address='127.0.0.1', port=port)
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:{port}')
    for name in ('ACCESS_KEY_ID', 'SECRET_ACCESS_KEY'):
      patch.setenv(f'AWS_{name}', 'dummy')
    patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    patch.setenv('EPATH_USE_TF', '0')
    bucket = paths.of('s3://bucket')
    bucket.mkdir()
    yield bucket
  server.stop()


@pytest.fixture(scope='module')
def gs():
  """A bucket of an emulator of Google's storage."""
  server = pytest.importorskip('gcp_storage_emulator.server')
  port = free_port()
  with pytest.MonkeyPatch.context() as patch:
    for name in ('STORAGE_EMULATOR_HOST', 'TENSORSTORE_GCS_HTTP_URL'):
      patch.setenv(name, f'http://127.0.0.1:{port}')
    patch.setenv('GOOGLE_CLOUD_PROJECT', 'dummy')
    patch.setenv('EPATH_USE_TF', '0')
    # Nobody asks who this machine is, nor, on import, of what kind buckets are.
    patch.setenv('NO_GCE_CHECK', 'true')
    patch.setenv('GCE_METADATA_ROOT', '127.0.0.1:1')
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    pytest.importorskip('gcsfs')
    config = importlib.import_module('fsspec.config').conf
    patch.setitem(config, 'gcs', {'token': 'anon'})
    server = server.create_server(
      '127.0.0.1', port, in_memory=True, default_bucket='bucket'
    )
    server.start()
    yield paths.of('gs://bucket')
    server.stop()


@pytest.fixture(params=['s3', 'gs'])
def bucket(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of this machine, to its end."""
  directory = tmp_path_factory.mktemp('whole')
  toy_run.run(directory, **SETTINGS)
  return directory


def fail(*_):
  raise AssertionError('something was loaded')


@pytest.mark.parametrize('path', ['ftp://host/run', 's3://', 'S3://bucket/x'])
def test_other_schemes_are_refused_before_anything_is_loaded(path, monkeypatch):
  monkeypatch.setattr('calm_jax.assembly.build_trained', fail)
  with pytest.raises(ValueError, match=rf"'{path}' is no path .* s3://BUCKET"):
    toy_run.run(path)


@pytest.mark.parametrize('scheme, module, extra', [
  ('s3', 's3fs', 's3'),
  ('gs', 'gcsfs', 'gcs'),
])  # fmt: skip
def test_a_missing_extra_is_named(scheme, module, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setattr('calm_jax.assembly.build_trained', fail)
  with pytest.raises(
    ValueError,
    match=rf'{scheme}://b/run needs {module}.*pip install.*calm_jax\[{extra}\]',
  ):
    toy_run.run(f'{scheme}://b/run')


def test_local_paths_are_those_of_pathlib(tmp_path):
  """epath's own do not resolve links, which we look for."""
  assert type(paths.of(str(tmp_path))) is type(tmp_path)
  assert paths.of('~/x') == pathlib.Path.home() / 'x'
  assert not paths.is_remote(tmp_path)
  with paths.to_write(tmp_path / 'x') as file:
    assert file == tmp_path / 'x'


def test_several_processes_do_not_write_to_s3(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='s3://b/run: .* 2 processes .* gs://'):
    with guards.only_run(paths.epath.Path('s3://b/run')):
      pass


def test_a_trace_does_not_go_to_a_bucket():
  directory = paths.epath.Path('s3://b/run')
  with pytest.raises(ValueError, match=r'\(2, 3\): .* s3://b/run'):
    profiling.Profiler(directory, (2, 3), 5)
  profiling.Profiler(directory, None, 5)


@pytest.mark.entry
@pytest.mark.slow
def test_a_stopped_run_goes_on_in_a_bucket(bucket, whole, capfd, monkeypatch):
  directory = bucket / 'run'
  # As if it were killed once the step is saved: the log is not closed.
  with pytest.raises(SystemExit) as stopped, monkeypatch.context() as patch:
    patch.setattr(metrics.Log, 'close', lambda log: None)
    toy_run.run(directory, sigterm_at=3, **SETTINGS)
  assert stopped.value.code == guards.PREEMPTED
  begun = [json.loads(row)['step'] for row in rows_of(directory)]
  assert begun == [1, 2, 3]
  said = capfd.readouterr().out
  assert f'{directory} cannot be locked' in said
  assert f'{directory} is remote: no TensorBoard' in said
  toy_run.run(directory, **SETTINGS)
  assert 'trained from step 3' in capfd.readouterr().out
  reliability.compare(directory, toy_run.result_of(whole))
  # What it leaves is what a run of this machine leaves, but for TensorBoard.
  names = {one.name for one in directory.iterdir()}
  assert names == {one.name for one in whole.iterdir()} - {'tensorboard'}
  for name in (run_files.CONFIG_FILE, run_files.CARD_FILE):
    assert (directory / name).read_text() == (whole / name).read_text()
  assert toy_run.digests_of(directory) == toy_run.digests_of(whole)
  # Nothing went astray to a folder that is called as the scheme is.
  assert not pathlib.Path(f'{bucket.parts[1]}:').exists()


class Echo:
  """A task that counts what was answered."""

  name, splits, eval_splits = 'echo', ('test',), ('test',)
  max_new_tokens, stop = 2, ()

  def examples(self, split):
    return [{'inputs': 'ab', 'targets': 'b'}]

  def prediction(self, text, example):
    return text

  def metrics(self, examples, predictions):
    return {'answers': len(predictions)}


@pytest.mark.entry
@pytest.mark.slow
def test_a_run_in_a_bucket_is_evaluated_and_saved_again(bucket, whole):
  directory = bucket / 'shared'
  paths.copy(whole, directory)
  describe = lambda config: pretrained.ModelSpec(
    config=config, vocabulary=toys.vocabulary(toy_run.VOCAB)
  )
  specs = {
    'anchor': describe(toy_run.ANCHOR),
    'augmenting': {'code': describe(toy_run.AUGMENTING)},
  }
  found = evaluate.evaluate(
    model_dir=str(directory),
    evaluator=evaluation.Evaluator(tasks=[Echo()]),
    systems=['composed'],
    **specs,
  )
  results = json.loads((directory / 'eval' / 'results.json').read_text())
  assert results == found
  place = directory / 'eval' / 'echo' / 'test' / 'composed'
  assert json.loads((place / 'metrics.json').read_text())['answers'] == 1
  (row,) = (place / 'predictions.jsonl').read_text().splitlines()
  assert json.loads(row)['targets'] == 'b'
  systems = evaluate.load_systems(
    model_dir=str(directory), systems=['composed'], **specs
  )
  systems['composed'].save(str(bucket / 'saved'))
  assert toy_run.digests_of(bucket / 'saved') == toy_run.digests_of(whole)
  with pytest.raises(ValueError, match=f'{bucket}/x holds no calm_config.json'):
    evaluate.load_systems(
      model_dir=f'{bucket}/x', systems=['composed'], **specs
    )


def rows_of(directory):
  return (directory / 'metrics.jsonl').read_text().splitlines()


@pytest.mark.entry
@pytest.mark.slow
def test_a_step_that_was_not_copied_whole_is_not_read(s3, capfd):
  directory = s3 / 'broken'
  toy_run.run(directory, **SETTINGS)
  kept = {one.name for one in (directory / 'checkpoints').iterdir()}
  assert kept == {'4', '6'}
  (directory / 'checkpoints' / '6' / '_CHECKPOINT_METADATA').unlink()
  toy_run.run(directory, **SETTINGS, keep_checkpoints=1)
  assert 'trained from step 4' in capfd.readouterr().out
  # One is kept, and the rows after step 4 are there once.
  kept = {one.name for one in (directory / 'checkpoints').iterdir()}
  assert kept == {'6'}
  steps = [json.loads(row)['step'] for row in rows_of(directory)]
  assert steps == [1, 2, 3, 4, 5, 6]


def test_refused_batches_go_to_the_bucket(bucket, tmp_path):
  bad = {'applied': np.False_, 'loss': np.inf, 'grad_norm': 2.0}
  bad['dropped_targets'] = 0.0
  guard = guards.Guard(guards.Guards(tolerated_steps=2), bucket / 'refused')
  with guard:
    guard.after(5, {'tokens': np.arange(6).reshape(2, 3)}, bad)
    guard.look()
  paths.copy(bucket / 'refused' / 'refused_batches', tmp_path)
  found = np.load(tmp_path / '5.npz')
  assert found['tokens'].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_bucket_that_is_not_there_is_refused(s3):
  with pytest.raises(ValueError, match='s3://nobody/run cannot be written'):
    with guards.only_run(paths.of('s3://nobody/run')):
      pass


def test_a_file_is_written_whole(bucket, tmp_path):
  for folder in (bucket, tmp_path):
    for text in ('one', 'two'):
      paths.write_whole(folder / 'x.json', text)
      assert (folder / 'x.json').read_text() == text
  assert [one.name for one in tmp_path.iterdir()] == ['x.json']
