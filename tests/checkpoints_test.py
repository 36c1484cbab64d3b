"""Checkpoints are restored bit by bit, or passed over with a warning.

Run: pytest tests/checkpoints_test.py
"""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import (
  assembly,
  checkpoints,
  metrics,
  optimizers,
  sharding,
  train_state,
  trees,
)

UPDATE = optimizers.OptimizerConfig(warmup_steps=0).make(10)
NAME = 'composition/code_1_into_1/key/kernel'


def make_state(step, *, width=16, name=NAME):
  """A state with numbers that no other step has."""
  rng = np.random.default_rng(step)
  params = trees.unflatten(
    {
      name: rng.normal(size=(8, width)).astype(np.float32),
      'composition/code_1_into_1/norm/scale': jnp.asarray(
        rng.normal(size=8), jnp.bfloat16
      ),
    }
  )
  state = train_state.create(params, UPDATE, seed=step)
  noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  slots = jax.tree.map(lambda x: noise(x) if x.ndim else x, state.opt_state)
  return state.replace(step=jnp.asarray(step, jnp.int32), opt_state=slots)


def places(state, mesh, spec=None):
  """Sharding of each leaf: matrices by `spec`, all else on every device."""
  split = jax.sharding.NamedSharding(mesh, spec or jax.sharding.PartitionSpec())
  whole = sharding.replicated(mesh)
  return jax.tree.map(lambda x: split if x.ndim == 2 else whole, state)


def wanted(state, mesh, spec=None):
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    places(state, mesh, spec),
  )


def save(directory, states):
  saved = checkpoints.Checkpoints(directory)
  for state in states:
    saved.save(state, data_state={'examples': 10 * int(state.step)})
  saved.close()


def restore(directory, shapes):
  """Returns what a new process would restore, and the warnings."""
  warnings = []
  saved = checkpoints.Checkpoints(directory)
  try:
    return saved.restore(shapes, warn=warnings.append), warnings
  finally:
    saved.close()


def assert_equal_bits(actual, expected):
  assert trees.digests(jax.device_get(actual)) == trees.digests(
    jax.device_get(expected)
  )


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  """A directory with the good steps 4 and 7; tests damage copies of it."""
  directory = tmp_path_factory.mktemp('checkpoints')
  save(directory, [make_state(4), make_state(7)])
  return directory


@pytest.fixture
def shapes(one_device):
  return wanted(make_state(0), one_device)


# --- Good checkpoints --------------------------------------------------------


def test_restored_are_the_bits_of_the_newest_step(two_steps, shapes):
  (state, data_state), warnings = restore(two_steps, shapes)
  assert_equal_bits(state, make_state(7))
  assert data_state == {'examples': 70}
  assert not warnings


def test_an_empty_directory_restores_nothing(tmp_path, shapes):
  assert restore(tmp_path / 'new', shapes) == (None, [])


def test_a_step_moves_between_meshes(tmp_path, one_device):
  eight = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  spec = jax.sharding.PartitionSpec('fsdp', 'tensor')
  state = make_state(3)
  split = assembly.place(state, places(state, eight, spec))
  save(tmp_path, [split])
  other = sharding.make_mesh(fsdp=4, tensor=2)
  for mesh, new_spec in ((one_device, None), (other, spec)):
    (restored, _), warnings = restore(tmp_path, wanted(state, mesh, new_spec))
    assert not warnings
    assert_equal_bits(restored, state)
    kernel = trees.flatten(restored.params)[NAME]
    assert kernel.sharding.mesh == mesh
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 8)


def test_only_the_newest_steps_are_kept(tmp_path):
  saved = checkpoints.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 5):
    saved.save(make_state(step), data_state={})
  saved.wait()
  assert saved.steps() == [2, 5]
  saved.save(make_state(5), data_state={})  # is there already
  saved.close()


def test_one_step_is_the_least_to_keep(tmp_path):
  with pytest.raises(ValueError, match='keep_checkpoints = 0: .* at least 1'):
    checkpoints.Checkpoints(tmp_path / 'new', keep=0)
  assert not (tmp_path / 'new').exists()


# --- Damage ------------------------------------------------------------------


def files_of(directory, step):
  files = sorted((directory / str(step)).rglob('*'))
  return [file for file in files if file.is_file() and file.stat().st_size]


def check_damaged(directory, shapes):
  """Equal bits, or the step before with a warning; never a wrong number."""
  (state, data_state), warnings = restore(directory, shapes)
  step = int(state.step)
  assert_equal_bits(state, make_state(step))
  assert data_state == {'examples': 10 * step}
  if step == 4:
    assert len(warnings) == 1
    assert str(directory / '7') in warnings[0]
    assert 'damaged and skipped' in warnings[0]
  else:
    assert step == 7
    assert not warnings
  return step


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(18))
def test_a_flipped_bit_is_never_restored(seed, two_steps, shapes, tmp_path):
  directory = pathlib.Path(shutil.copytree(two_steps, tmp_path / 'checkpoints'))
  rng = np.random.default_rng(seed)
  files = files_of(directory, 7)
  file = files[seed % len(files)]
  content = bytearray(file.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  file.write_bytes(content)
  check_damaged(directory, shapes)


@pytest.mark.parametrize(
  ('name', 'old', 'new'),
  [
    ('manifest/metadata', b'"examples": 70', b'"examples": 71'),
    # Orbax stumbles over this one with an AttributeError.
    ('state/array_metadatas/process_0', b'"array_meta', b'"arraz_meta'),
  ],
)
def test_valid_json_may_be_damaged_too(
  name, old, new, two_steps, shapes, tmp_path
):
  directory = shutil.copytree(two_steps, tmp_path / 'checkpoints')
  file = directory / '7' / name
  content = file.read_bytes()
  at = content.rindex(old)
  file.write_bytes(content[:at] + new + content[at + len(old) :])
  assert check_damaged(directory, shapes) == 4


def test_arrays_of_another_step_are_not_restored(two_steps, shapes, tmp_path):
  """Whole in themselves, and noticed by their hashes alone."""
  directory = shutil.copytree(two_steps, tmp_path / 'checkpoints')
  shutil.rmtree(directory / '7' / 'state')
  shutil.copytree(directory / '4' / 'state', directory / '7' / 'state')
  assert check_damaged(directory, shapes) == 4


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['truncate', 'delete'])
def test_every_file_of_a_step_may_be_cut_or_lost(
  damage, two_steps, shapes, tmp_path
):
  steps = []
  for number, name in enumerate(files_of(two_steps, 7)):
    directory = tmp_path / str(number)
    shutil.copytree(two_steps, directory)
    file = directory / name.relative_to(two_steps)
    if damage == 'delete':
      file.unlink()
    else:
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    steps.append(check_damaged(directory, shapes))
  assert 4 in steps  # some of the files do matter


def test_after_a_damaged_step_steps_are_saved_again(
  two_steps, shapes, tmp_path
):
  """Before it and at it; the damaged one is kept under another name."""
  directory = shutil.copytree(two_steps, tmp_path / 'checkpoints')
  saved = checkpoints.Checkpoints(directory)
  for file in files_of(directory, 7):
    file.write_bytes(b'')
  state, _ = saved.restore(shapes, warn=lambda text: None)
  assert int(state.step) == 4
  assert saved.steps() == [4]
  for step in (5, 7):
    saved.save(make_state(step), data_state={'examples': 10 * step})
  saved.close()
  assert (directory / '7.damaged').is_dir()
  assert check_damaged(directory, shapes) == 7


def test_what_orbax_does_not_save_is_an_error(tmp_path, monkeypatch):
  saved = checkpoints.Checkpoints(tmp_path)
  monkeypatch.setattr(saved._manager, 'save', lambda *a, **k: False)
  with pytest.raises(OSError, match='Orbax would not save the step 3'):
    saved.save(make_state(3), data_state={})
  saved.close()


def test_a_failing_device_is_no_damage(
  two_steps, shapes, tmp_path, monkeypatch
):
  directory = shutil.copytree(two_steps, tmp_path / 'checkpoints')

  def full(*arguments, **settings):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  saved = checkpoints.Checkpoints(directory)
  monkeypatch.setattr(saved._manager, 'restore', full)
  with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
    saved.restore(shapes)
  assert saved.steps() == [4, 7]
  saved.close()


def test_no_good_step_is_an_error(two_steps, shapes, tmp_path):
  directory = shutil.copytree(two_steps, tmp_path / 'checkpoints')
  for step in (4, 7):
    for file in files_of(directory, step):
      file.write_bytes(b'')
  with pytest.raises(ValueError, match=r'None of the steps \[4, 7\]'):
    restore(directory, shapes)


@pytest.mark.parametrize(
  ('other', 'named'),
  [
    ({'name': 'composition/math_1_into_1/key/kernel'}, 'math_1_into_1'),
    (
      {'width': 24},
      r'has .* float32\(8, 16\) .* this run .* float32\(8, 24\)',
    ),
  ],
)
def test_a_checkpoint_of_another_model_is_refused(
  other, named, two_steps, one_device
):
  with pytest.raises(ValueError, match=named):
    restore(two_steps, wanted(make_state(0, **other), one_device))


FULL = """
import pathlib, resource, signal, sys
import jax.numpy as jnp
import numpy as np
from calm_jax import checkpoints, optimizers, train_state
noise = np.random.default_rng(0).normal(size=(300, 1000))
update = optimizers.OptimizerConfig().make(10)
state = train_state.create({'x': {'a': jnp.float32(noise)}}, update, seed=0)
saved = checkpoints.Checkpoints(pathlib.Path(sys.argv[1]))
saved.save(state.replace(step=jnp.int32(1)), data_state={})
saved.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  saved.save(state.replace(step=jnp.int32(2)), data_state={})
  saved.wait()
except OSError as error:
  print('told:', error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', FULL, str(tmp_path)], capture_output=True, text=True
  )
  assert 'told: A checkpoint could not be written to' in done.stdout
  assert 'The steps [1] are there. Make room' in done.stdout
  saved = checkpoints.Checkpoints(tmp_path)
  assert saved.steps() == [1]
  saved.close()


# --- Metrics of the steps that were lost -------------------------------------


def open_log(directory, first=0):
  return metrics.Log(
    directory,
    steps=(first, 9),
    schedule=lambda step: 0.5,
    step_flops=lambda batch: 1.0,
  )


def test_metrics_are_cut_to_the_restored_step(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  rows = [json.dumps({'step': step, 'train/loss': 1.0}) for step in (1, 2, 3)]
  file.write_text('\n'.join(rows) + '\n{"step": 4, "train/lo')
  log = open_log(tmp_path, first=2)
  log.start({'decoder_input_tokens': np.zeros((2, 3))}, 0.0)
  measured = {'loss': 2.0, 'accuracy': 0.0, 'dropped_targets': 0.0}
  log.write(5, measured, wait_seconds=0.0, skipped_examples=7)
  log.write(6, {**measured, 'loss': float('nan')}, wait_seconds=0.0)
  log.close()
  read = [json.loads(line) for line in file.read_text().splitlines()]
  assert [row['step'] for row in read] == [1, 2, 5, 6]
  assert 'train/loss' not in read[3]  # JSON has no NaN
  assert read[2]['train/loss'] == 2.0
  assert read[2]['train/skipped_examples'] == 7
  assert read[2]['train/learning_rate'] == 0.5
  # Two steps after the clock started, of six tokens each.
  assert read[2]['train/tokens_per_second'] == pytest.approx(
    6 / read[2]['train/seconds_per_step']
  )


@pytest.mark.parametrize('broken', ['metrics.jsonl', 'TensorBoard'])
def test_a_logger_that_fails_stops_no_run(broken, tmp_path, capsys):
  log = open_log(tmp_path)

  class Broken:
    def fail(self, *args):
      raise OSError('no space left')

    write = flush = add_scalar = close = fail

  setattr(log, '_file' if broken == 'metrics.jsonl' else '_board', Broken())
  log.start({'decoder_input_tokens': np.zeros((2, 3))}, 0.0)
  measured = {'loss': 2.0, 'accuracy': 0.0, 'dropped_targets': 0.0}
  for step in (2, 3):
    log.write(step, measured, wait_seconds=0.0)
  log.add(3, {'task/test': {'match': 0.5}}, seconds=0.0)
  log.close()
  said = capsys.readouterr().out
  assert said.count(f'{broken} cannot be written: no space left') == 1
  assert 'step      3/9' in said
  rows = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert len(rows) == (0 if broken == 'metrics.jsonl' else 3)


def test_evaluation_is_no_time_of_training(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now[0])
  log = open_log(tmp_path)
  log.start({'decoder_input_tokens': np.zeros((2, 3))}, 0.0)
  now[0] += 50 + 2
  log.add(2, {'task/test': {'match': 0.5, 'signature': 'x'}}, seconds=50)
  measured = {'loss': 2.0, 'accuracy': 0.0, 'dropped_targets': 0.0}
  log.write(5, measured, wait_seconds=0.5)
  log.close()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  scored, trained = map(json.loads, lines)
  assert scored == {'step': 2, 'eval/task/test/match': 0.5}
  assert trained['train/seconds_per_step'] == 0.5
  assert trained['train/tokens_per_second'] == 12
  assert trained['train/data_wait_percent'] == 25
