"""A composition trained inside T5X: what it does there, and what it leaves be.

Run: PYTHONPATH=<T5X checkout> pytest tests/contrib_t5x_test.py
"""

import dataclasses
import functools
import importlib.util
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calm_jax
from calm_jax import (
  checkpoints,
  composition,
  connections,
  decoding,
  gin_setup,
  import_t5x,
  quantization,
  sharding,
  trees,
)
from calm_jax.models import layers, pretrained, transformer
from tests import tiny, toys

needs_t5x = pytest.mark.skipif(
  importlib.util.find_spec('t5x') is None,
  reason='T5X is not importable: calm_jax.contrib.t5x is NOT tested. Put a'
  ' checkout of github.com/google-research/t5x on PYTHONPATH (docs/t5x.md).',
)
ROOT = pathlib.Path(__file__).parent.parent
GIN_FILES = sorted((ROOT / 'gin' / 'contrib' / 't5x').glob('*.gin'))
STEPS = 20
MAPPING = connections.LayerMapping.explicit(tiny.MAPPING)
# On CPUs T5X splits parameters over all devices, here 8.
VOCAB = 40
ANCHOR = dataclasses.replace(tiny.ANCHOR, vocab_size=VOCAB)
AUGMENTING = dataclasses.replace(
  tiny.AUGMENTING, vocab_size=VOCAB, num_kv_heads=2
)


@pytest.mark.skipif(
  importlib.util.find_spec('t5x') is not None, reason='T5X is importable'
)
def test_without_t5x_the_import_says_what_to_do():
  message = r'not on PyPI.*docs/t5x.md.*calm_jax.train'
  with pytest.raises(ImportError, match=message):
    from calm_jax.contrib import t5x  # noqa: F401
  # gin/contrib is for other programs, so these are not among the experiments
  # that gin_setup_test builds.
  for file in GIN_FILES:
    with pytest.raises(ValueError, match=message):
      gin_setup.configure('train', gin_files=[str(file)])


@pytest.fixture(scope='module')
def donors(tmp_path_factory):
  """Directories of an anchor and an augmenting model."""
  folder = tmp_path_factory.mktemp('donors')
  for name, config in (('anchor', ANCHOR), ('code', AUGMENTING)):
    toys.model_directory(folder / name, config, seed=len(name))
  return folder


@pytest.fixture(scope='module')
def t5x_rules():
  """T5X and clu add arrays of different ranks, which our tests forbid."""
  with jax.numpy_rank_promotion('allow'):
    yield


def donor_params(donors):
  read = lambda name: pretrained.read_weights(donors / name)[0]
  return {'anchor': read('anchor'), 'augmenting': {'code': read('code')}}


def make_model(donors, *, code=None, **settings):
  from t5x import adafactor

  from calm_jax.contrib import t5x as calm_t5x

  return calm_t5x.ComposedDecoderModel(
    anchor=pretrained.pretrained_model(donors / 'anchor'),
    augmenting={'code': code or pretrained.pretrained_model(donors / 'code')},
    composition=connections.CompositionConfig(mapping=MAPPING),
    optimizer_def=adafactor.Adafactor(
      logical_factor_rules=adafactor.standard_logical_factor_rules()
    ),
    **settings,
  )


def train(donors, directory, *, steps, microbatches=None):
  """Runs t5x.train; returns its last train state."""
  from t5x import partitioning, trainer, utils
  from t5x import train as t5x_train

  from calm_jax.contrib import t5x as calm_t5x
  from tests import t5x_task

  dataset = functools.partial(
    utils.DatasetConfig,
    mixture_or_task_name=t5x_task.NAME,
    task_feature_lengths=t5x_task.LENGTHS,
    batch_size=8,
    shuffle=False,
    seed=0,
  )
  return t5x_train.train(
    model=make_model(donors),
    train_dataset_cfg=dataset(split='train', pack=True),
    train_eval_dataset_cfg=dataset(split='validation', pack=False),
    infer_eval_dataset_cfg=None,
    checkpoint_cfg=utils.CheckpointConfig(
      save=utils.SaveCheckpointConfig(period=STEPS),
      restore=utils.RestoreCheckpointConfig(path=[]),
    ),
    partitioner=partitioning.PjitPartitioner(num_partitions=2),
    trainer_cls=functools.partial(
      trainer.Trainer,
      num_microbatches=microbatches,
      learning_rate_fn=lambda step: 0.3,
    ),
    model_dir=str(directory),
    total_steps=steps,
    eval_steps=1,
    eval_period=STEPS,
    random_seed=0,
    summarize_config_fn=lambda *args: None,
    train_state_initializer_cls=calm_t5x.DonorInitializer,
  )[1]


@pytest.fixture(scope='module')
def run(donors, tmp_path_factory, t5x_rules):
  """A finished run of t5x.train: its folder and its last state."""
  folder = tmp_path_factory.mktemp('run')
  return folder, train(donors, folder, steps=STEPS)


def state_of(run, step, entry):
  folder = run[0] / f'checkpoint_{step}' / 'state'
  return checkpoints.read_tree(folder, entry)


def copy_batch(seed=0, size=4):
  """What T5X's converter makes of `size` unpacked examples of the task."""
  rng = np.random.default_rng(seed)
  words_BT = rng.integers(1, 9, (size, 4))
  ends_B1 = np.full((size, 1), toys.vocabulary(VOCAB).eos_id)
  targets_BT = np.concatenate([words_BT, words_BT, ends_B1], axis=1)
  targets_BT = np.pad(targets_BT, ((0, 0), (0, 2))).astype(np.int32)
  place_T = np.arange(targets_BT.shape[1])
  column = lambda real_T: np.tile(real_T, (size, 1)).astype(np.int32)
  return {
    'decoder_input_tokens': np.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets_BT,
    'decoder_loss_weights': column((place_T >= 4) & (place_T < 9)),
    'decoder_causal_attention': column(place_T < 5),
  }


def loss_on(model, theta, donors):
  """Mean loss of a target token, in nats."""
  batch = copy_batch(seed=1, size=32)
  loss, _ = jax.jit(model.eval_fn)(
    theta, batch, {'frozen': donor_params(donors)}
  )
  return float(loss) / batch['decoder_loss_weights'].sum()


@needs_t5x
def test_frozen_weights_are_the_donors_to_the_bit(run, donors):
  expected = trees.digests(donor_params(donors))
  for step in (0, STEPS):
    frozen = state_of(run, step, 'flax_mutables')['frozen']
    assert trees.digests(frozen) == expected
  assert trees.digests(run[1].flax_mutables['frozen']) == expected


@needs_t5x
def test_only_the_composition_has_slots_and_changes(run):
  before, after = (
    trees.flatten(state_of(run, step, 'target')) for step in (0, STEPS)
  )
  keys = {name.split('/')[0] for name in after}
  assert keys == {'code_3_into_embed', 'code_1_into_1', 'code_2_into_3'}
  assert all((before[name] != after[name]).any() for name in after)
  slots = state_of(run, STEPS, 'state')['param_states']
  assert {name.rpartition('/')[0] for name in trees.flatten(slots)} == set(
    after
  )


@needs_t5x
def test_the_loss_falls(run, donors):
  model = make_model(donors)
  first, last = (
    loss_on(model, state_of(run, step, 'target'), donors) for step in (0, STEPS)
  )
  print(f'loss {first:.3f} -> {last:.3f}')
  assert last < 0.8 * first


@needs_t5x
def test_at_step_0_it_is_the_anchor(run, donors):
  model = make_model(donors)
  batch, frozen = copy_batch(), donor_params(donors)
  anchor = composition.ComposedLM(transformer.DecoderLM(ANCHOR))
  alone_BTV = jax.jit(anchor.__call__)(
    {'anchor': frozen['anchor']},
    {
      'decoder_input_tokens': batch['decoder_input_tokens'],
      'decoder_segment_ids': np.int32(batch['decoder_target_tokens'] > 0),
      'decoder_positions': np.tile(np.arange(11, dtype=np.int32), (4, 1)),
    },
  )
  logits = jax.jit(model._compute_logits)
  for step, same in ((0, True), (STEPS, False)):
    variables = {
      'params': state_of(run, step, 'target'),
      'frozen': frozen,
    }
    assert np.array_equal(logits(variables, batch), alone_BTV) == same


@needs_t5x
@pytest.mark.parametrize('variant', ['gated_tied', 'plain_head'])
def test_a_donor_from_t5x_is_itself_again(variant, tmp_path, one_device):
  """A T5X checkpoint, imported, composed with itself, back inside T5X."""
  from calm_jax.contrib import t5x as calm_t5x

  fixture = ROOT / 'tests' / 'fixtures' / 't5x_decoder_only' / variant
  import_t5x.import_t5x(
    checkpoint=str(fixture / 'checkpoint_7'),
    output_dir=str(tmp_path),
    vocabulary=toys.vocabulary(40),
    bos_id=None,
  )
  spec = pretrained.pretrained_model(tmp_path)
  model = calm_t5x.ComposedDecoderModel(
    anchor=spec,
    augmenting={'code': spec},
    composition=connections.CompositionConfig(
      mapping=connections.LayerMapping.middle(1), num_heads=2
    ),
    optimizer_def=None,
  )
  variables = model.get_initial_variables(jax.random.key(0), {}).unfreeze()
  variables['frozen'] = calm_t5x.load_donors(
    model,
    jax.tree.map(lambda _: sharding.replicated(one_device), variables)[
      'frozen'
    ],
  )
  expected = dict(np.load(fixture / 'expected.npz'))
  real_BT = expected['decoder_target_tokens'] > 0
  logits_BTV = jax.jit(model._compute_logits)(variables, expected)
  difference = np.abs(np.asarray(logits_BTV) - expected['logits'])[real_BT]
  assert difference.max() < 1e-4


@needs_t5x
@pytest.mark.parametrize('kind', ['sampled', 'beams'])
def test_what_t5x_decodes_has_the_scores_we_give_it(kind, donors, t5x_rules):
  """So each decode of each row keeps its own caches, at its own positions."""
  from t5x import decoding as t5x_decoding

  decode_fn = {
    'sampled': functools.partial(t5x_decoding.temperature_sample, topk=0),
    'beams': functools.partial(t5x_decoding.beam_search, alpha=0.0),
  }[kind]
  model = make_model(donors, decode_fn=decode_fn)
  theta = toys.params(model.composed)['composition']
  frozen = {'frozen': donor_params(donors)}
  batch = copy_batch()
  if kind == 'sampled':  # T5X scores beams before it cuts them to the length
    batch['decoder_causal_attention'][1, 3:] = 0  # BOS and two words
  prompt_B = batch['decoder_causal_attention'].sum(axis=1) - 1
  found_BNT, aux = jax.jit(
    functools.partial(
      model.predict_batch_with_aux, num_decodes=3, return_all_decodes=True
    )
  )(theta, batch, jax.random.PRNGKey(0), flax_mutables=frozen)
  assert len(np.unique(found_BNT)) > 6
  score = jax.jit(
    lambda targets_BT, weights_BT: model.score_batch(
      theta,
      {
        'decoder_target_tokens': targets_BT,
        'decoder_input_tokens': jnp.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1],
        'decoder_loss_weights': weights_BT,
      },
      flax_mutables=frozen,
    )
  )
  eos_id = toys.vocabulary(VOCAB).eos_id
  compared = 0
  for decode in range(3):
    found_BT = np.asarray(found_BNT[:, decode])
    scores_B = np.asarray(aux['scores'][:, decode])
    targets_BT = batch['decoder_target_tokens'].copy()
    weights_BT = np.zeros(targets_BT.shape, np.float32)
    chosen_B = scores_B > -1e6  # a beam that never ended has none
    for row, found_T in enumerate(found_BT):
      words = found_T[: 11 - prompt_B[row]].tolist()
      if eos_id in words:
        words = words[: words.index(eos_id) + 1]
      chosen_B[row] &= 0 not in words  # padding to T5X, a word to this donor
      slots = slice(prompt_B[row], prompt_B[row] + len(words))
      targets_BT[row, prompt_B[row] :] = 0
      targets_BT[row, slots] = words
      weights_BT[row, slots] = 1
    ours_B = np.asarray(score(targets_BT, weights_BT))
    compared += chosen_B.sum()
    np.testing.assert_allclose(scores_B[chosen_B], ours_B[chosen_B], rtol=1e-4)
  print(f'{kind}: {compared} decodes compared')
  assert compared >= 4


@needs_t5x
def test_scores_are_ours(run, donors):
  model, batch = make_model(donors), copy_batch()
  frozen, theta = donor_params(donors), state_of(run, STEPS, 'target')
  scores_B = model.score_batch(theta, batch, flax_mutables={'frozen': frozen})
  real_BT = np.int32(batch['decoder_target_tokens'] > 0)
  ours = decoding.score_batch(
    {**frozen, 'composition': theta},
    {
      **batch,
      'decoder_segment_ids': real_BT,
      'decoder_positions': np.cumsum(real_BT, axis=1) - 1,
    },
    model=model.composed,
  )
  np.testing.assert_allclose(scores_B, ours.log_likelihood_B, rtol=1e-5)


@needs_t5x
def test_frozen_weights_are_split_over_the_model_axis(run):
  frozen = run[1].flax_mutables['frozen']
  up = frozen['anchor']['block_0']['mlp']['up']['kernel']
  assert up.sharding.spec == jax.sharding.PartitionSpec(None, 'model')
  assert up.addressable_shards[0].data.shape == (32, 48 // jax.device_count())


@needs_t5x
def test_a_run_continues_from_its_own_checkpoint(
  run, donors, tmp_path, monkeypatch
):
  """In microbatches this time, and without a look at the donors' weights."""
  from calm_jax.contrib import t5x as calm_t5x

  shutil.copytree(run[0], tmp_path / 'run')
  monkeypatch.setattr(calm_t5x, 'load_donors', None)
  state = train(donors, tmp_path / 'run', steps=STEPS + 2, microbatches=2)
  assert int(state.step) == STEPS + 2
  expected = trees.digests(donor_params(donors))
  assert trees.digests(state.flax_mutables['frozen']) == expected
  before = trees.flatten(run[1].params)
  after = trees.flatten(state.params)
  assert all((before[name] != after[name]).any() for name in before)


@needs_t5x
def test_the_composition_leaves_t5x(run, donors, tmp_path):
  """For `load_composition`, with the fingerprints of its donors."""
  anchor = calm_jax.load_pretrained(donors / 'anchor')
  augmenting = {'code': calm_jax.load_pretrained(donors / 'code')}
  model = calm_jax.compose(
    anchor=anchor, augmenting=augmenting, mapping=MAPPING
  )
  checkpoint = run[0] / f'checkpoint_{STEPS}'
  import_t5x.export_composition(checkpoint, tmp_path / 'out', model=model)
  loaded = calm_jax.load_composition(
    tmp_path / 'out', anchor=anchor, augmenting=augmenting
  )
  digests = trees.digests(jax.device_get(loaded.params['composition']))
  assert digests == trees.digests(state_of(run, STEPS, 'target'))
  other = calm_jax.compose(
    anchor=anchor,
    augmenting=augmenting,
    mapping=connections.LayerMapping.middle(1),
  )
  with pytest.raises(ValueError, match='only in .*checkpoint_20'):
    import_t5x.export_composition(checkpoint, tmp_path / 'no', model=other)


@needs_t5x
def test_without_the_initializer_everything_is_nan(donors):
  model = make_model(donors)
  variables = jax.jit(
    lambda rng: model.get_initial_variables(rng, {})['frozen']
  )(jax.random.key(0))
  assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(variables))


@needs_t5x
def test_bidirectional_inputs_are_refused(donors):
  with pytest.raises(ValueError, match='attends to the past only'):
    make_model(donors, inputs_bidirectional_attention=True)


@needs_t5x
def test_a_model_that_t5x_cannot_feed_or_hold_is_refused(donors, tmp_path):
  words = toys.vocabulary(VOCAB, bos_token='<s>')
  toys.model_directory(tmp_path, AUGMENTING, words=words)
  code = pretrained.pretrained_model(tmp_path)
  with pytest.raises(ValueError, match=r"\['code'\] read tokens of their own"):
    make_model(donors, code=code)
  code = pretrained.pretrained_model(
    donors / 'code',
    quantization=quantization.QuantizationConfig(),
  )
  with pytest.raises(ValueError, match=r"\['code'\] have a quantization"):
    make_model(donors, code=code)


@needs_t5x
def test_buckets_of_distances_are_those_of_t5x():
  from t5x.examples.decoder_only import layers as t5x_layers

  distance = np.arange(129)
  expected = t5x_layers.RelativePositionBiases._relative_position_bucket(
    -distance, bidirectional=False, num_buckets=32, max_distance=128
  )
  assert layers._distance_buckets(32, 128).tolist() == expected.tolist()


@needs_t5x
@pytest.mark.entry
@pytest.mark.slow
def test_the_gin_files_train_and_decode(donors, tmp_path):
  """The command of docs/t5x.md."""
  settings = {
    'MODEL_DIR': tmp_path / 'run',
    'MIXTURE_OR_TASK_NAME': 't5x_copy',
    'MIXTURE_OR_TASK_MODULE': 'tests.t5x_task',
    'ANCHOR_PATH': donors / 'anchor',
    'AUGMENTING_PATH': donors / 'code',
  }
  bindings = {
    **{name: f"'{value}'" for name, value in settings.items()},
    'TASK_FEATURE_LENGTHS': "{'inputs': 5, 'targets': 6}",
    'TRAIN_STEPS': 4,
    'BATCH_SIZE': 8,
    'WARMUP_STEPS': 2,
    'connections.LayerMapping.every.augmenting_stride': 2,
    'EVAL_PERIOD': 2,
    'EVAL_STEPS': 1,
    'utils.SaveCheckpointConfig.period': 4,
  }
  done = subprocess.run(
    [
      *(sys.executable, '-m', 't5x.train'),
      f'--gin_search_paths={ROOT / "gin"}',
      '--gin_file=contrib/t5x/composed.gin',
      '--gin_file=contrib/t5x/train.gin',
      *(f'--gin.{name}={value}' for name, value in bindings.items()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert 'anchor: pretrained, anchor; ' in done.stdout
  files = tmp_path / 'run' / 'inference_eval'
  assert 'exact_match' in (files / 't5x_copy-metrics.jsonl').read_text()
  state = checkpoints.read_tree(
    tmp_path / 'run' / 'checkpoint_4' / 'state', 'flax_mutables'
  )
  frozen = donor_params(donors)
  frozen['augmenting'] = {'augmenting': frozen['augmenting']['code']}
  assert trees.digests(state['frozen']) == trees.digests(frozen)
