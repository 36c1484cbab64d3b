"""Several processes: who they are told to be, what they must have in common.

Run: pytest tests/distributed_test.py
"""

import copy
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from calm_jax import distributed, run_files, sharding, trees

ROOT = pathlib.Path(__file__).parent.parent
ALONE = {'CALM_JAX_DIRECTORY': '/x', 'CALM_JAX_NUM_DEVICES': '3'}


def test_a_program_that_is_told_nothing_is_alone():
  distributed.initialize({})
  distributed.initialize(ALONE, several=False)
  assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  ('environ', 'problem'),
  [
    ({'PROCESS_ID': '1'}, 'CALM_JAX_PROCESS_ID is set and .* is not'),
    ({'COORDINATOR': 'host'}, "'host' is neither host:port nor 'auto'"),
    ({'COORDINATOR': ':1'}, "':1' is neither"),
    ({'COORDINATOR': 'h:1'}, 'CALM_JAX_NUM_PROCESSES = None must be a number'),
    (
      {'COORDINATOR': 'auto', 'HEARTBEAT_SECONDS': '0'},
      "CALM_JAX_HEARTBEAT_SECONDS = '0' is no number",
    ),
    (
      {'COORDINATOR': 'h:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': 'x'},
      "CALM_JAX_PROCESS_ID = 'x' must be",
    ),
    (
      {'COORDINATOR': 'h:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': '2'},
      'CALM_JAX_PROCESS_ID = 2 must be less than CALM_JAX_NUM_PROCESSES = 2',
    ),
  ],
)
def test_variables_that_do_not_fit_together(environ, problem):
  environ = {f'CALM_JAX_{name}': value for name, value in environ.items()}
  with pytest.raises(ValueError, match=problem):
    distributed.initialize(environ)


def test_what_jax_is_told(monkeypatch):
  told = []

  def initialize(**settings):
    told.append(settings)
    raise RuntimeError('enough')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  for environ in (
    {'CALM_JAX_COORDINATOR': 'auto', 'CALM_JAX_HEARTBEAT_SECONDS': '7'},
    {
      'CALM_JAX_COORDINATOR': '[::1]:80',
      'CALM_JAX_NUM_PROCESSES': '2',
      'CALM_JAX_PROCESS_ID': '1',
    },
  ):
    with pytest.raises(RuntimeError, match='enough'):
      distributed.initialize(environ)
  assert told == [
    {'heartbeat_timeout_seconds': 7},
    {
      'coordinator_address': '[::1]:80',
      'num_processes': 2,
      'process_id': 1,
      'heartbeat_timeout_seconds': 100,
    },
  ]


def hosts(count=4):
  one = {
    'versions': {'Python': '3.11', 'jax': '1.0'},
    'devices': '4 x TPU v5e',
    'count': 4,
  }
  return [{**copy.deepcopy(one), 'host': f'h{i}'} for i in range(count)]


def test_equal_hosts_are_a_run():
  distributed.check_hosts(hosts(), num_devices=16, directory='/shared')


def test_other_versions_are_named_with_their_hosts():
  odd = hosts()
  odd[2]['versions']['jax'] = '1.1'
  with pytest.raises(
    ValueError, match=r'versions of jax: 1.0 on h0 .*1.1 on h2'
  ):
    distributed.check_hosts(odd)


def test_other_devices_are_named_with_their_hosts():
  odd = hosts(8)
  odd[1] |= {'devices': '1 x cpu', 'count': 1}
  with pytest.raises(
    ValueError, match=r'and 4 more; 1 x cpu on h1 \(process 1'
  ):
    distributed.check_hosts(odd)


def test_the_number_of_devices_is_compared():
  with pytest.raises(ValueError, match='32 devices are expected and 4 .* 16'):
    distributed.check_hosts(hosts(), num_devices=32)


def test_the_directory_must_be_writable_and_shared():
  odd = hosts()
  odd[1]['unseen'] = ['x']
  with pytest.raises(ValueError, match='h1 does not see in /d .* not shared'):
    distributed.check_hosts(odd, directory='/d')
  odd[3]['unwritable'] = 'Permission denied'
  with pytest.raises(ValueError, match='h3 cannot write to /d: Permission'):
    distributed.check_hosts(odd, directory='/d')


def test_collect_gives_whole_arrays():
  array = np.arange(16.0).reshape(8, 2)
  put = jax.device_put(array, sharding.batch_sharding(sharding.make_mesh()))
  assert np.array_equal(sharding.collect(put), array)
  assert np.array_equal(sharding.collect(array), array)


# --- Two real processes ------------------------------------------------------


def launch(*backend, run_dir, steps, devices, log=None, more=()):
  """Starts a small training; every parameter is split over all devices."""
  environ = {
    **{k: v for k, v in os.environ.items() if not k.startswith('CALM_JAX')},
    'CALM_JAX_PYTHON': sys.executable,
    'CALM_JAX_GRACE_SECONDS': '20',
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'TF_CPP_MIN_LOG_LEVEL': '3',
  }
  flags = (
    '--gin_file=experiments/kv_quick_direct.gin',
    f"--gin.MODEL_DIR='{run_dir}'",
    f'--gin.TRAIN_STEPS={steps}',
    '--gin.BATCH_SIZE=8',
    '--gin.train.log_every=1',
    '--gin.train.make_mesh=@make_mesh',
    '--gin.make_mesh.fsdp=4',
    *more,
  )
  return subprocess.Popen(
    ['bash', 'launch/run.sh', *backend, 'train', *flags],
    cwd=ROOT,
    env=environ,
    stdout=log or subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def output_of(process):
  out, _ = process.communicate(timeout=1200)
  assert process.returncode == 0, out
  return out


@pytest.mark.entry
@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
  """And continue: hashes are of whole arrays, whoever holds them."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  output_of(launch('local', run_dir=one, steps=2, devices=4))
  out = output_of(launch('local-mp', '2', run_dir=two, steps=2, devices=2))
  lines = [line for line in out.splitlines() if 'step      ' in line]
  assert [line[:10] for line in lines] == 2 * ['[worker 0]']
  first, second = (
    trees.flatten(run_files.read_trained(run_dir)) for run_dir in (one, two)
  )
  assert first.keys() == second.keys()
  for name, array in first.items():
    np.testing.assert_allclose(second[name], array, atol=1e-5, err_msg=name)
  assert not list(two.glob('.preflight*'))

  (two / run_files.WEIGHTS_FILE).unlink()
  # One process checks the hashes that two have written, on another mesh.
  out = output_of(launch('local', run_dir=two, steps=2, devices=4))
  assert 'trained from step 2' in out
  again = trees.flatten(run_files.read_trained(two))
  assert all(np.array_equal(again[name], second[name]) for name in second)
  shutil.rmtree(two / 'tensorboard', ignore_errors=True)
  (two / run_files.WEIGHTS_FILE).unlink()
  out = output_of(launch('local-mp', '2', run_dir=two, steps=2, devices=2))
  assert 'trained from step 2' in out and 'damaged' not in out
  again = trees.flatten(run_files.read_trained(two))
  assert all(np.array_equal(again[name], second[name]) for name in second)


def losses_of(run_dir):
  rows = (run_dir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(row)['train/loss'] for row in rows]


def position_of(run_dir, step):
  """Where the data stood when a checkpoint was written."""
  folder = run_dir / 'checkpoints' / str(step) / 'manifest'
  (file,) = (one for one in folder.iterdir() if 'metadata' in one.name)
  return json.loads(file.read_text())['manifest']['data']


@pytest.mark.entry
@pytest.mark.slow
def test_two_processes_read_the_streams_that_one_does(tmp_path):
  """Each its own, out of a cache; one continues where two have stopped."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  more = (
    '--gin_file=tests/fixtures/cache/toy.gin',
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 12, 'targets': 16}",
    '--gin.STREAMS=4',
  )
  output_of(launch('local', run_dir=one, steps=3, devices=4, more=more))
  output_of(launch('local-mp', '2', run_dir=two, steps=2, devices=2, more=more))
  np.testing.assert_allclose(losses_of(two), losses_of(one)[:2], rtol=1e-4)
  assert len(position_of(two, 2)['examples']) == 4
  assert all(position_of(two, 2)['examples'])
  output_of(launch('local', run_dir=two, steps=3, devices=4, more=more))
  # The schedule of two steps is another, so the third loss is too.
  assert position_of(two, 3) == position_of(one, 3)


def processes_of(run_dir):
  """Maps the process ids of a run's workers to their places in it."""
  found = {}
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      words = (folder / 'cmdline').read_bytes().split(b'\0')
      environ = (folder / 'environ').read_bytes().split(b'\0')
    except OSError:
      continue
    if f"--gin.MODEL_DIR='{run_dir}'".encode() in words:
      for entry in environ:
        if entry.startswith(b'CALM_JAX_PROCESS_ID='):
          found[int(folder.name)] = int(entry.split(b'=')[1])
  return found


@pytest.mark.entry
@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path('/proc').exists(), reason='needs /proc')
def test_a_worker_that_is_killed_ends_the_other(tmp_path):
  run_dir, log = tmp_path / 'run', tmp_path / 'log'
  with log.open('w') as file:
    process = launch(
      'local-mp', '2', run_dir=run_dir, steps=100_000, devices=2, log=file
    )
    try:
      deadline = time.monotonic() + 1200
      while 'step      1/' not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
      workers = processes_of(run_dir)
      assert sorted(workers.values()) == [0, 1]
      second = next(pid for pid, place in workers.items() if place == 1)
      os.kill(second, signal.SIGKILL)
      assert process.wait(timeout=120) == 137
      assert not processes_of(run_dir)
    finally:
      process.terminate()
