"""Whole training runs on toy donors: files, resuming, refusals.

Run: pytest tests/train_test.py
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from calm_jax import (
  array_batches,
  assembly,
  checkpoints,
  connections,
  evaluation,
  guards,
  metrics,
  optimizers,
  sharding,
  train,
  train_step,
  trees,
  vocabularies,
)
from calm_jax.models import pretrained
from tests import tiny, toy_run, toys

pytestmark = [pytest.mark.entry, pytest.mark.slow]

VOCAB = toy_run.VOCAB
ANCHOR = dataclasses.replace(
  toy_run.ANCHOR, num_heads=2, num_kv_heads=1, mlp_dim=192
)
AUGMENTING = dataclasses.replace(
  ANCHOR, num_layers=1, embed_dim=24, mlp_dim=144, num_kv_heads=2
)
COMPOSITION = connections.CompositionConfig(
  mapping=connections.LayerMapping.explicit([tiny.connection(0, 0)])
)
STEPS = 6
RATES = ('tokens_per_second', 'seconds_per_step', 'data_wait_percent')


def toy_batches(
  *,
  batch_size,
  seed,
  vocabulary,
  readers,
  targets_per_row,
  needed_B,
  fail_at=None,
  nan_at=None,
  sigterm_at=None,
):
  assert vocabulary.size == VOCAB and needed_B.shape == (batch_size,)
  rows = np.random.default_rng(0).integers(0, VOCAB, (20, 6), np.int32)
  made = array_batches.ArrayBatches(
    tiny.batch_of(rows), batch_size=batch_size, seed=seed
  )
  return Faulty(made, fail_at=fail_at, nan_at=nan_at, sigterm_at=sigterm_at)


class Faulty:
  """Batches that end in a failure, or hold a number that is none."""

  def __init__(self, made, *, fail_at, nan_at, sigterm_at):
    self._made, self._fail_at, self._nan_at = made, fail_at, nan_at
    self._sigterm_at = sigterm_at
    self._count = 0
    self.state, self.restore = made.state, made.restore

  def __next__(self):
    self._count += 1
    if self._count == self._fail_at:
      raise KeyboardInterrupt('as if by Ctrl-C')
    batch = dict(next(self._made))
    if self._count == self._sigterm_at:
      os.kill(os.getpid(), signal.SIGTERM)
    if self._count == self._nan_at:
      batch['decoder_loss_weights'] = batch['decoder_loss_weights'] * np.nan
    return batch


def first_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def run(directory, donors, **settings):
  """Trains a composition as a user would; settings replace the defaults."""
  anchor, augmenting = donors
  return train.train(
    **{
      'model_dir': str(directory),
      'anchor': anchor,
      'augmenting': {'code': augmenting},
      'composition': COMPOSITION,
      'make_batches': toy_batches,
      'make_mesh': first_device,
      'train_steps': STEPS,
      'batch_size': 8,
      'optimizer': optimizers.OptimizerConfig(warmup_steps=2),
      'log_every': 1,
      'checkpoint_every': 2,
      **settings,
    }
  )


@pytest.fixture(scope='module')
def decoder_run(tmp_path_factory):
  """A decoder trained from scratch, and what training it returned."""
  directory = tmp_path_factory.mktemp('decoder')
  spec = pretrained.ModelSpec(config=ANCHOR, vocabulary=toys.vocabulary(VOCAB))
  measured = train.train(
    model_dir=str(directory),
    anchor=spec,
    trainable='anchor',
    make_batches=toy_batches,
    make_mesh=first_device,
    train_steps=30,
    batch_size=8,
    optimizer=optimizers.OptimizerConfig(learning_rate=0.02, warmup_steps=2),
    log_every=10,
    export_dtype='bfloat16',
  )
  return directory, measured


@pytest.fixture(scope='module')
def donors(decoder_run, tmp_path_factory):
  directory = tmp_path_factory.mktemp('augmenting')
  toys.model_directory(directory, AUGMENTING)
  return (
    pretrained.pretrained_model(decoder_run[0] / 'model'),
    pretrained.pretrained_model(directory),
  )


@pytest.fixture(scope='module')
def finished(donors, tmp_path_factory):
  """An uninterrupted run of a composition."""
  directory = tmp_path_factory.mktemp('finished')
  run(directory, donors)
  return directory


def metrics_of(directory):
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if not k.endswith(RATES)}
    for line in lines
  ]


# --- What a run leaves behind ------------------------------------------------


def test_a_decoder_is_trained_and_exported(decoder_run):
  directory, measured = decoder_run
  rows = metrics_of(directory)
  assert [row['step'] for row in rows] == [1, 10, 20, 30]
  assert rows[-1]['train/loss'] == measured['train/loss']
  assert rows[-1]['train/loss'] < 0.8 * rows[0]['train/loss']
  config = pretrained.pretrained_model(directory / 'model').config
  assert config == dataclasses.replace(ANCHOR, param_dtype='bfloat16')
  params, _ = pretrained.read_weights(directory / 'model')
  leaves = jax.tree.leaves(params)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
  assert not (directory / 'composition.safetensors').exists()


def test_a_pretrained_decoder_is_trained_on_from_its_weights(
  decoder_run, tmp_path
):
  path = decoder_run[0] / 'model'
  train.train(
    model_dir=str(tmp_path),
    anchor=pretrained.pretrained_model(path, param_dtype='float32'),
    trainable='anchor',
    make_batches=toy_batches,
    make_mesh=first_device,
    train_steps=1,
    batch_size=8,
    optimizer=optimizers.OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
  )
  before = trees.flatten(pretrained.read_weights(path)[0])
  after = trees.flatten(pretrained.read_weights(tmp_path / 'model')[0])
  assert before.keys() == after.keys()
  moved = [
    np.abs(after[name] - before[name].astype(np.float32)).max()
    for name in before
  ]
  assert 1e-5 < max(moved) < 2e-3  # AdamW's first step is the learning rate


def test_splash_on_eight_devices_trains_as_xla(donors, tmp_path):
  losses = []
  for kernel in ('xla', 'splash'):
    chosen = [dataclasses.replace(d, attention_kernel=kernel) for d in donors]
    run(
      tmp_path / kernel,
      chosen,
      make_mesh=lambda: sharding.make_mesh(data=2, fsdp=2, tensor=2),
      train_steps=3,
    )
    rows = metrics_of(tmp_path / kernel)
    losses.append([[r['train/loss'], r['train/grad_norm']] for r in rows])
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert losses[0] != losses[1]  # it is another program


def test_a_trace_holds_the_named_steps_and_changes_nothing(
  finished, donors, tmp_path
):
  run(tmp_path, donors, profile_steps=(3, 4))
  assert metrics_of(tmp_path) == metrics_of(finished)
  name = 'composition.safetensors'
  assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
  (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
  planes = jax.profiler.ProfileData.from_file(str(trace)).planes
  events = [e for plane in planes for line in plane.lines for e in line.events]
  steps = [dict(e.stats)['step_num'] for e in events if e.name == 'train']
  assert steps == [3, 4]


def test_a_run_writes_what_was_trained_and_nothing_frozen(finished, donors):
  theta = safetensors.numpy.load_file(finished / 'composition.safetensors')
  assert all(name.startswith('code_0_into_0/') for name in theta)
  assert np.any(theta['code_0_into_0/out/kernel'])
  rows = metrics_of(finished)
  assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
  assert rows[2]['train/learning_rate'] == pytest.approx(1e-3)

  config = json.loads((finished / 'calm_config.json').read_text())
  assert config['connections'] == [
    {'anchor_layer': 0, 'augmenting_layer': 0, 'augmenting': 'code'}
  ]
  assert str(finished.parent) not in json.dumps(config)
  frozen = []
  for name, spec in zip(('anchor', 'code'), donors, strict=True):
    params, fingerprint = pretrained.read_weights(spec.path)
    assert config['fingerprints'][name] == fingerprint
    frozen += [x for x in jax.tree.leaves(params) if x.size > 100]

  # Not their bytes, in the stored or the computed dtype.
  steps = sorted(path.name for path in (finished / 'checkpoints').iterdir())
  assert steps == ['2', '4', '6']
  files = [path for path in finished.rglob('*') if path.is_file()]
  contents = b''.join(path.read_bytes() for path in files)
  for leaf in frozen:
    for dtype in (leaf.dtype, jnp.float32, jnp.bfloat16):
      assert leaf.astype(dtype).tobytes()[:64] not in contents
  assert theta['code_0_into_0/out/kernel'].tobytes() in contents
  # Orbax compresses, so ask it what its arrays are.
  metadata = (
    finished / 'checkpoints' / '6' / 'state' / '_METADATA'
  ).read_text()
  arrays = json.loads(metadata)['tree_metadata'].values()
  names = [entry['key_metadata'][0]['key'] for entry in arrays]
  parts = {name.split('/')[0] for name in names}
  assert parts == {'opt_state', 'params', 'rng', 'step'}
  for name in names:
    if name.endswith(('kernel', 'scale', 'table')):
      assert '/composition/code_0_into_0/' in f'/{name}'


# --- Resuming ----------------------------------------------------------------


@pytest.mark.parametrize('fail_at', [2, 6])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
  fail_at, finished, donors, tmp_path
):
  failing = functools.partial(toy_batches, fail_at=fail_at)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, donors, make_batches=failing)
  logged = len(metrics_of(tmp_path))
  assert logged == fail_at - 1
  assert not (tmp_path / 'composition.safetensors').exists()
  run(tmp_path, donors)
  file = 'composition.safetensors'
  assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()
  assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_finished_run_is_left_as_it_is(finished, donors):
  before = (finished / 'composition.safetensors').read_bytes()
  rows = metrics_of(finished)
  run(finished, donors, make_batches=functools.partial(toy_batches, fail_at=3))
  assert (finished / 'composition.safetensors').read_bytes() == before
  assert metrics_of(finished) == rows


def test_a_bad_step_is_not_applied_and_its_batch_is_kept(
  donors, tmp_path, capsys
):
  broken = functools.partial(toy_batches, nan_at=3)
  run(tmp_path, donors, make_batches=broken)
  said = capsys.readouterr().out
  assert 'warning: step 3 has the loss nan and the gradient norm nan' in said
  kept = np.load(tmp_path / 'refused_batches' / '3.npz')
  assert np.isnan(kept['decoder_loss_weights']).all()
  assert kept['decoder_input_tokens'].shape == (8, 6)
  rows = metrics_of(tmp_path)
  assert [row['train/applied'] for row in rows] == [1, 1, 0, 1, 1, 1]
  assert [row['step'] for row in rows if 'train/loss' not in row] == [3]
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  trained = safetensors.numpy.load_file(tmp_path / 'composition.safetensors')
  assert all(np.isfinite(x).all() for x in trained.values())


def test_a_run_ends_at_the_last_bad_step_that_is_tolerated(donors, tmp_path):
  """It is noticed at the next checkpoint, even if it is not logged."""
  broken = functools.partial(toy_batches, nan_at=4)
  with pytest.raises(FloatingPointError, match='step 4 .*tolerated_steps = 1'):
    run(
      tmp_path,
      donors,
      make_batches=broken,
      log_every=50,
      guards=guards.Guards(tolerated_steps=1),
    )
  saved = checkpoints.Checkpoints(tmp_path / 'checkpoints')
  assert saved.steps() == [2]
  saved.close()
  assert not (tmp_path / 'composition.safetensors').exists()


def test_sigterm_saves_and_the_same_command_continues(
  finished, donors, tmp_path, capsys
):
  """At a step that is no checkpoint of its own."""
  before = signal.getsignal(signal.SIGTERM)
  told = functools.partial(toy_batches, sigterm_at=3)
  with pytest.raises(SystemExit) as stopped:
    run(tmp_path, donors, make_batches=told, checkpoint_every=50)
  assert stopped.value.code == guards.PREEMPTED == 75
  # Batches are made ahead, so it comes up to two steps before the third.
  step = int(
    re.search(r'Told to stop: saved step (\d)', capsys.readouterr().out)[1]
  )
  assert 1 <= step <= 3
  assert signal.getsignal(signal.SIGTERM) == before
  run(tmp_path, donors, checkpoint_every=50)
  assert f'trained from step {step}' in capsys.readouterr().out
  file = 'composition.safetensors'
  assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()
  assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_directory_that_a_run_holds_is_refused(donors, tmp_path):
  with guards.only_run(tmp_path):
    with pytest.raises(ValueError, match='belongs to a run that is going on'):
      run(tmp_path, donors)
  assert [file.name for file in tmp_path.iterdir()] == [guards.LOCK_FILE]


# --- Refusals ----------------------------------------------------------------


def test_a_directory_belongs_to_one_run(
  finished, donors, tmp_path, monkeypatch
):
  def allocate(*args, **kwargs):
    raise AssertionError('something was allocated')

  monkeypatch.setattr(assembly, 'load_all', allocate)
  anchor, augmenting = donors
  turned = dataclasses.replace(COMPOSITION, position_encoding='none')
  with pytest.raises(ValueError, match=r"position_encoding = 'rotary'; this"):
    run(finished, donors, composition=turned)
  toys.model_directory(tmp_path, AUGMENTING, seed=1)
  other = pretrained.pretrained_model(tmp_path)
  with pytest.raises(ValueError, match=r"weights or the vocabulary of 'code'"):
    run(finished, (anchor, other))
  moved = dataclasses.replace(
    COMPOSITION,
    mapping=connections.LayerMapping.explicit([tiny.connection(1, 0)]),
  )
  with pytest.raises(ValueError, match=r'code_0_into_0.*code_0_into_1'):
    run(finished, donors, composition=moved)
  with pytest.raises(ValueError, match=r"the models \['anchor', 'code'\]"):
    run(
      finished,
      donors,
      augmenting={'math': augmenting},
      composition=dataclasses.replace(
        COMPOSITION,
        mapping=connections.LayerMapping.explicit(
          [tiny.connection(0, 0, 'math')]
        ),
      ),
    )


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'train_steps': 0}, 'TRAIN_STEPS = 0: it must be at least 1'),
    (
      {'trainable': 'all'},
      r"'all' is not one of \('composition', 'lo",
    ),
    ({'trainable': 'anchor'}, 'ANCHOR keeps its weights in bfloat16'),
    (
      {'step_config': train_step.StepConfig(microbatches=3)},
      'BATCH_SIZE = 8 cannot be split into 3 microbatch',
    ),
    ({'batch_size': 6, 'make_mesh': sharding.make_mesh}, 'multiple of 8'),
    (
      {'make_mesh': lambda: sharding.make_mesh(fsdp=3)},
      'A mesh of data=2 x fsdp=3 x tensor=1 needs 6 devices, and there are 8',
    ),
    (
      {'make_mesh': lambda: sharding.make_mesh(tensor=8)},
      "axis 'vocab' of size 26 cannot be split over mesh axis 'tensor' of si",
    ),
    ({'composition': None}, 'belong together'),
    ({'augmenting': {}}, 'belong together'),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
  settings, message, donors, tmp_path
):
  directory = tmp_path / 'new'
  with pytest.raises(ValueError, match=message):
    run(directory, donors, **settings)
  assert not directory.exists()


def test_a_model_with_another_vocabulary_needs_tokens_of_its_own(
  donors, tmp_path
):
  other = dataclasses.replace(
    donors[1],
    vocabulary=vocabularies.word_vocabulary(
      [f'b{i}' for i in range(VOCAB - 3)]
    ),
  )
  with pytest.raises(ValueError, match="'code' reads tokens of its own"):
    run(tmp_path / 'new', (donors[0], other))


def test_a_target_left_out_of_the_loss_is_an_error(donors, tmp_path):
  def careless(*, targets_per_row, **rest):
    return toy_batches(targets_per_row=None, **rest)  # a loss everywhere

  two = train_step.StepConfig(targets_per_row=2)
  with pytest.raises(ValueError, match='Step 1 left .* targets_per_row'):
    run(tmp_path, donors, make_batches=careless, step_config=two)
  assert not (tmp_path / 'composition.safetensors').exists()


# --- Evaluation on the way ---------------------------------------------------


class Shout:
  """A benchmark: answers are compared in capital letters."""

  name, max_new_tokens, stop = 'shout', 3, (' a1 ',)
  splits, eval_splits = ('test', 'other'), ('test',)

  def examples(self, split):
    return [{'inputs': f'a{i} a{i}', 'targets': f'a{i}'} for i in (3, 5, 7)]

  def prediction(self, output, example):
    assert ' a1 ' not in output
    return output.upper()

  def metrics(self, examples, predictions):
    targets = [example['targets'].upper() for example in examples]
    both = zip(targets, predictions, strict=True)
    right = [[target] == said for target, said in both]
    return {'match': float(np.mean(right)), 'signature': 'upper'}


def test_evaluation_during_training(donors, finished, tmp_path):
  """At its own steps and the last; the training is as it was without."""
  evaluator = evaluation.Evaluator(tasks=[Shout()], every=4)
  run(tmp_path, donors, evaluator=evaluator)
  for step in ('4', '6'):
    place = tmp_path / 'eval' / 'shout' / 'test' / step
    lines = (place / 'predictions.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row['inputs'] for row in rows] == ['a3 a3', 'a5 a5', 'a7 a7']
    said = [[text.upper() for text in row['outputs']] for row in rows]
    assert said == [row['predictions'] for row in rows]
    measured = json.loads((place / 'metrics.json').read_text())
    assert set(measured) == {'num_examples', 'match', 'signature'}
  rows = metrics_of(tmp_path)
  trained = [row for row in rows if 'train/loss' in row]
  assert trained == metrics_of(finished)
  scored = [row for row in rows if 'train/loss' not in row]
  assert [row['step'] for row in scored] == [4, 6]
  assert 'eval/shout/test/match' in scored[0]
  theta = safetensors.numpy.load_file(tmp_path / 'composition.safetensors')
  other = safetensors.numpy.load_file(finished / 'composition.safetensors')
  for name, tensor in theta.items():
    np.testing.assert_array_equal(tensor, other[name])


class Killed(Shout):
  """Ends the process in the middle of its n-th evaluation."""

  def __init__(self, n):
    self.left = n

  def metrics(self, examples, predictions):
    self.left -= 1
    if not self.left:
      raise KeyboardInterrupt('as if by kill')
    return super().metrics(examples, predictions)


@pytest.mark.parametrize('n', [1, 2])
def test_an_evaluation_that_was_cut_short_is_made_up_for(n, donors, tmp_path):
  """In the middle of a run, and at its last step."""
  settings = {'checkpoint_every': 2}
  whole = evaluation.Evaluator(tasks=[Shout()], every=4)
  run(tmp_path / 'whole', donors, evaluator=whole, **settings)
  cut = evaluation.Evaluator(tasks=[Killed(n)], every=4)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path / 'cut', donors, evaluator=cut, **settings)
  run(tmp_path / 'cut', donors, evaluator=whole, **settings)
  assert metrics_of(tmp_path / 'cut') == metrics_of(tmp_path / 'whole')
  for step in ('4', '6'):
    place = pathlib.Path('eval', 'shout', 'test', step, 'metrics.json')
    made_up = (tmp_path / 'cut' / place).read_text()
    assert made_up == (tmp_path / 'whole' / place).read_text()
  before = metrics_of(tmp_path / 'cut')
  run(tmp_path / 'cut', donors, evaluator=whole, **settings)
  assert metrics_of(tmp_path / 'cut') == before  # once is enough


class Refusing(Shout):
  def check(self, num_samples):
    raise ValueError(f'not {num_samples} samples')


def test_a_metric_that_is_no_number_is_not_logged(tmp_path):
  log = metrics.Log(
    tmp_path, steps=(0, 2), schedule=lambda _: 0.0, step_flops=lambda _: 0.0
  )
  measured = {'exact': float('nan'), 'count': 3, 'signature': 'v1'}
  log.add(2, {'sums/test': measured}, seconds=0.0)
  (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert json.loads(line) == {'step': 2, 'eval/sums/test/count': 3}


def test_tasks_are_checked_before_anything_is_written(donors, tmp_path):
  task = Shout()
  task.eval_splits = ('dev',)
  for tasks, message in (
    ([task], "'shout' has no split 'dev'; it has"),
    ([Shout(), Shout()], "Two tasks are called 'shout'"),
    ([Refusing()], 'not 1 samples'),
  ):
    evaluator = evaluation.Evaluator(tasks=tasks)
    with pytest.raises(ValueError, match=message):
      run(tmp_path / 'new', donors, evaluator=evaluator)
  assert not (tmp_path / 'new').exists()
