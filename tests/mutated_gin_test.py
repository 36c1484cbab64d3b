"""Sixty mistakes in the configuration of one run: each is told by its name.

All come before the run takes its directory, so before anything is loaded,
allocated or written.

Run: pytest tests/mutated_gin_test.py
"""

import re

import pytest

from calm_jax import gin_setup, guards

# What is wrong: what the message must name.
MISTAKES = {
  # Names that there are not.
  'TRAIN_STEP = 5': 'TRAIN_STEP .*Did you mean TRAIN_STEPS',
  'BATCHSIZE = 8': 'BATCHSIZE',
  'learning_rate = 1e-3': 'learning_rate',
  'train.train_step = 5': 'train_step',
  'trian.train_steps = 5': 'trian',
  'train.log_evry = 5': 'log_evry',
  'OptimizerConfig.learning_rat = 1e-3': 'learning_rat',
  'OptimizerConfg.learning_rate = 1e-3': 'OptimizerConfg',
  'CompositionConfig.gates = "none"': 'gates',
  'Connection.layer = 2': 'layer',
  'Guards.hang_second = 5.0': 'hang_second',
  'StepConfig.microbatch = 2': 'microbatch',
  'train.make_mesh = @make_mehs': 'make_mehs',
  'COMPOSITION = @CompositionConfg()': 'CompositionConfg',
  'train.composition = %COMPOSITON': 'COMPOSITON',
  'CompositionConfig.mapping = @LayerMapping.evry()': 'LayerMapping.evry',
  # Bindings that nothing reads.
  'LoraConfig.rank = 8': 'LoraConfig.rank',
  'make_mesh.fsdp = 2': 'make_mesh.fsdp',
  'Evaluator.every = 5': 'Evaluator.every',
  'LayerMapping.every.augmenting_stride = 2': 'LayerMapping.every',
  'ModelSpec.weights = "random"': 'ModelSpec.weights',
  'evaluate.model_dir = "x"': 'evaluate.model_dir',
  'infer/Connection.augmenting_layer = 1': 'infer/Connection',
  # Values of the wrong type.
  'TRAIN_STEPS = "5"': "train.train_steps = '5' .*expected int",
  'TRAIN_STEPS = 5.0': 'train.train_steps = 5.0 .*expected int',
  'TRAIN_STEPS = None': 'train.train_steps = None',
  'BATCH_SIZE = True': 'train.batch_size = True',
  'MODEL_DIR = 5': 'train.model_dir = 5 .*expected str',
  'LEARNING_RATE = "1e-3"': 'OptimizerConfig.learning_rate',
  'PACK = 1': 'seqio_batches.pack = 1 .*expected bool',
  'TASK_FEATURE_LENGTHS = 28': 'task_feature_lengths = 28',
  'TASK_FEATURE_LENGTHS = {"inputs": "12", "targets": 16}': 'lengths = .*12',
  'Connection.augmenting_layer = "2"': 'Connection.augmenting_layer',
  'Guards.tolerated_steps = 1.5': 'Guards.tolerated_steps = 1.5',
  'train.optimizer = @OptimizerConfig': 'train.optimizer .*write ..',
  'train.make_batches = @seqio_batches()': 'train.make_batches .*leave ..',
  'MODEL_DIR = %MODEL_DIR': 'MODEL_DIR.* stands for itself',
  'train.profile_steps = (10,)': 'train.profile_steps',
  'StepConfig.microbatches = "2"': 'StepConfig.microbatches',
  # Values out of their range.
  'TRAIN_STEPS = 0': 'TRAIN_STEPS = 0',
  'BATCH_SIZE = 0': 'BATCH_SIZE = 0|BATCH_SIZE',
  'BATCH_SIZE = -8': 'BATCH_SIZE',
  'BATCH_SIZE = 39': 'BATCH_SIZE = 39',
  'LEARNING_RATE = -1.0': 'learning_rate = -1',
  'WARMUP_STEPS = -1': 'warmup_steps = -1',
  'TARGETS_PER_ROW = 0': 'targets_per_row = 0',
  'OptimizerConfig.name = "sgdd"': 'sgdd',
  'CompositionConfig.gate = "sigmod"': 'sigmod',
  'seqio_batches.truncate = "cut"': "truncate = 'cut'",
  'seqio_batches.split = "trian"': 'trian',
  'train.trainable = "everything"': "trainable = 'everything'",
  'train.stack = "scanned"': "stack = 'scanned'",
  'Guards.hang_seconds = 0.0': 'hang_seconds = 0',
  'train.log_every = 0': 'log_every = 0',
  'train.checkpoint_every = 0': 'checkpoint_every = 0',
  'OptimizerConfig.b2 = 1.0': 'b2 = 1.0',
  'OptimizerConfig.clip_norm = 0.0': 'clip_norm = 0.0',
  # Layers, models and meshes that do not fit.
  'Connection.augmenting_layer = 3': 'augmenting_layer *= *3',
  'block_4/Connection.anchor_layer = 5': 'anchor_layer *= *5',
  'block_4/Connection.anchor_layer = 3': 'block_?3|anchor_layer *= *3|_into_3',
  'Connection.augmenting = "maths"': 'maths',
  'StepConfig.microbatches = 3': 'microbatches',
  'MIXTURE_OR_TASK_NAME = "kv_dc_mix"': 'kv_dc_mix',
  'TASK_FEATURE_LENGTHS = {"inputs": 12}': 'targets',
  'TASK_FEATURE_LENGTHS = {"inputs": 12, "target": 16}': 'target',
}
MESHES = {
  'make_mesh.fsdp = 3': 'fsdp = 3|fsdp=3',
  'make_mesh.tensor = 16': 'tensor',
  'make_mesh.data = 5': 'data',
  'make_mesh.fsdp = 0': 'fsdp',
}


@pytest.fixture
def start(tmp_path, monkeypatch):
  """Starts a run with one binding more, up to where it takes its folder."""

  def taken(directory):
    raise AssertionError(f'the run began in {directory}')

  monkeypatch.setattr(guards, 'only_run', taken)

  def started(*more):
    gin_setup.configure(
      'train',
      gin_files=['experiments/kv_quick_scratchpad.gin'],
      bindings=[f"MODEL_DIR = '{tmp_path / 'run'}'", *more],
    )()

  yield started
  assert not (tmp_path / 'run').exists()


def test_without_a_mistake_it_would_begin(start):
  with pytest.raises(AssertionError, match='the run began in'):
    start()


def test_there_are_sixty():
  assert len(MISTAKES) + len(MESHES) >= 60


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_named_before_anything_happens(mistake, start):
  with pytest.raises(ValueError) as error:
    start(mistake)
  assert re.search(MISTAKES[mistake], str(error.value), re.S), error.value


@pytest.mark.parametrize('mistake', MESHES)
def test_a_mesh_that_does_not_fit(mistake, start):
  with pytest.raises(ValueError) as error:
    start('train.make_mesh = @make_mesh', mistake)
  assert re.search(MESHES[mistake], str(error.value), re.S), error.value
