"""T5X's own checkpoints, read without T5X: the same logits, clear errors.

Run: pytest tests/import_t5x_test.py
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import calm_jax
from calm_jax import checkpoints, gin_setup, import_t5x, vocabularies
from tests import toys

FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 't5x_decoder_only'
STEP = 'checkpoint_7'


@pytest.fixture
def vocabulary(tmp_path):
  """Fewer words than the table has rows; the first begins a text, as in T5X."""
  toys.vocabulary(38).save(tmp_path / 'words')
  file = tmp_path / 'words' / vocabularies.CONFIG_FILE
  names = json.loads(file.read_text())
  names |= {'bos_token': 'a0', 'add_bos_token': True}
  file.write_text(json.dumps(names))
  return vocabularies.load_vocabulary(file.parent)


def target_of(variant):
  return checkpoints.read_tree(FIXTURES / variant / STEP / 'state', 'target')


def run(checkpoint, output_dir, vocabulary, **settings):
  return import_t5x.import_t5x(
    checkpoint=str(checkpoint),
    output_dir=str(output_dir),
    vocabulary=vocabulary,
    **settings,
  )


@pytest.mark.parametrize('variant', ['gated_tied', 'plain_head'])
def test_logits_are_those_of_t5x(variant, vocabulary, tmp_path):
  """For a full row, a padded one and one that packs three examples."""
  fingerprint = run(FIXTURES / variant / STEP, tmp_path / 'ours', vocabulary)
  model = calm_jax.load_pretrained(tmp_path / 'ours')
  assert model.fingerprint == fingerprint
  expected = dict(np.load(FIXTURES / variant / 'expected.npz'))
  real_BT = expected['decoder_segment_ids'] > 0
  assert real_BT.sum(axis=1).tolist() == [40, 13, 34]
  logits_BTV = jax.jit(model.composed.__call__)(model.params, expected)
  difference = np.abs(np.asarray(logits_BTV) - expected['logits'])[real_BT]
  largest = np.abs(expected['logits']).max()
  print(f'{variant}: {largest:.1f} at most, apart {difference.max():.1e}')
  assert difference.max() < 1e-4


def test_the_command(vocabulary, tmp_path):
  """Activations and storage may be given; there is no config.gin here."""
  shutil.copytree(FIXTURES / 'gated_tied' / STEP, tmp_path / STEP)
  bindings = {
    'CHECKPOINT': f"'{tmp_path / STEP}'",
    'OUTPUT_DIR': f"'{tmp_path / 'ours'}'",
    'VOCABULARY': f"'{tmp_path / 'words'}'",
    'import_t5x.storage_dtype': "'bfloat16'",
  }

  def command():
    return gin_setup.configure(
      'import_t5x',
      gin_files=['runs/import_t5x.gin'],
      bindings=[f'{name} = {value}' for name, value in bindings.items()],
    )(summarize_config=lambda directory: None)

  with pytest.raises(ValueError, match=r'config.gin is missing mlp_activation'):
    command()
  bindings['MLP_ACTIVATIONS'] = "('relu', 'linear')"
  command()
  config = calm_jax.load_pretrained(tmp_path / 'ours').config
  assert (config.activation, config.param_dtype) == ('relu', 'bfloat16')
  assert (config.num_heads, config.head_dim) == (3, 6)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (('gelu',), r"allow \('gelu', 'linear'\), \('relu', 'linear'\)"),
    (('linear', 'gelu'), r"\('linear', 'gelu'\) cannot be imported"),
    (('tanh', 'linear'), 'cannot be imported'),
  ],
)
def test_other_activations_are_refused(names, message):
  with pytest.raises(ValueError, match=message):
    import_t5x.convert(
      target_of('gated_tied'), mlp_activations=names, where='here'
    )


def test_another_network_is_refused():
  convert = lambda target: import_t5x.convert(
    target, mlp_activations=('relu',), where='here'
  )
  target = target_of('plain_head')
  with pytest.raises(ValueError, match='Encoder-decoder models cannot be im'):
    convert({**target, 'encoder': {}})
  decoder = target['decoder']
  with pytest.raises(ValueError, match='its layers stacked'):
    convert({'decoder': {'layers': decoder['layers_0']}})
  with pytest.raises(ValueError, match='decoder/position_embedder/embedding'):
    convert({'decoder': {**decoder, 'position_embedder': {'embedding': 0}}})
  with pytest.raises(ValueError, match=r'no parameter for our.*final_norm/sc'):
    convert({'decoder': {**decoder, 'decoder_norm': {}}})
  layer = {**decoder['layers_0'], 'pre_mlp_layer_norm': {}}
  with pytest.raises(ValueError, match=r'only in the model: block_0/mlp_norm'):
    convert({'decoder': {**decoder, 'layers_0': layer}})


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'bos_token': None}, r'bos_id = None, .* begin with id 0.*bos_token'),
    ({'size': 41}, r'The vocabulary has 41 words, .* 40 rows'),
  ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(settings, message, tmp_path):
  words = toys.vocabulary(settings.pop('size', 40), **settings)
  with pytest.raises(ValueError, match=message):
    run(FIXTURES / 'plain_head' / STEP, tmp_path / 'ours', words)
  assert not (tmp_path / 'ours').exists()


def test_a_folder_that_is_no_checkpoint_is_refused(vocabulary, tmp_path):
  def load(folder):
    run(folder, tmp_path / 'ours', vocabulary)

  with pytest.raises(ValueError, match=f'It holds {STEP}: name one of these'):
    load(FIXTURES / 'plain_head')
  (tmp_path / 'checkpoint').write_bytes(b'')
  with pytest.raises(ValueError, match='legacy format.*use_orbax=True'):
    load(tmp_path)
  with pytest.raises(ValueError, match='Name a folder checkpoint_<step>'):
    load(tmp_path / 'nothing')
  (tmp_path / STEP / 'state').mkdir(parents=True)
  with pytest.raises(ValueError, match="cannot be read as an Orbax .*'target'"):
    load(tmp_path / STEP)
