"""Models out: the format they came in, byte by byte, and other formats.

Run: pytest tests/convert_test.py
"""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

import calm_jax
from calm_jax import convert, gin_setup, trees
from calm_jax.models import export, pretrained, weights
from tests import foreign, tiny, toys

KV_ANCHOR = 'calm_jax://tasks/donors/kv_quick/anchor'


def stored(directory):
  """Every tensor of a directory: dtype, shape and bytes, by name."""
  tensors = {}
  for file in directory.glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(file)
  return trees.digests(tensors)


def hugging_face(directory, model_type, *, shard='1GB', half=False, **fields):
  """A directory as `transformers` writes it, with a tokenizer."""
  model = foreign.make(model_type, **fields)
  if half:
    model.bfloat16()
  model.save_pretrained(directory, max_shard_size=shard)
  toys.vocabulary(foreign.VOCAB - 3).save(directory)
  (directory / 'chat_template.jinja').write_text('{{ messages }}')
  # Of weights that are not taken over, so neither is this.
  (directory / 'pytorch_model.bin.index.json').write_text('{}')
  return model


# --- Round trip --------------------------------------------------------------


@pytest.mark.convert
@pytest.mark.parametrize(
  ('model_type', 'settings'),
  [
    ('llama', {'tie_word_embeddings': False, 'shard': '10KB'}),
    ('gemma2', {'half': True}),
    ('qwen2', {'tie_word_embeddings': True}),
    ('t5', {}),
  ],
)
def test_unchanged_models_come_out_as_they_were(model_type, settings, tmp_path):
  hugging_face(tmp_path / 'in', model_type, **settings)
  file = tmp_path / 'in' / 'model.safetensors'
  if model_type == 'qwen2':  # some checkpoints store the table twice
    tensors = safetensors.numpy.load_file(file)
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  spec = pretrained.pretrained_model(tmp_path / 'in')
  convert.convert(
    model=spec, output_dir=str(tmp_path / 'out'), shard_bytes=20_000
  )
  assert stored(tmp_path / 'out') == stored(tmp_path / 'in')
  assert len(list((tmp_path / 'out').glob('model-*'))) > 2
  assert not list((tmp_path / 'out').glob('*.bin.index.json'))
  names = 'config.json tokenizer.json tokenizer_config.json chat_template.jinja'
  for name in names.split():
    one, two = ((tmp_path / where / name) for where in ('in', 'out'))
    assert json_or_text(one) == json_or_text(two)
  again = pretrained.pretrained_model(tmp_path / 'out')
  assert again.config == spec.config
  assert pretrained.fingerprint(again) == pretrained.fingerprint(spec)


def test_another_dtype_is_named_wherever_the_source_names_it():
  """Gemma 3 with eyes says it twice, and two answers would be refused."""
  fields = {'dtype': 'bfloat16', 'text_config': {'torch_dtype': 'bfloat16'}}
  tensors = {'a': weights.of_array(np.zeros(2, np.float32))}
  export._set_dtype(fields, tensors)
  assert fields == {
    'dtype': 'float32',
    'text_config': {'torch_dtype': 'float32'},
  }


def json_or_text(file):
  text = file.read_text()
  return json.loads(text) if file.suffix == '.json' else text


@pytest.mark.convert
def test_the_repository_s_own_anchor_becomes_a_llama(tmp_path, one_device):
  import torch
  import transformers

  convert.convert(
    model=pretrained.pretrained_model(KV_ANCHOR),
    output_dir=str(tmp_path / 'llama'),
    model_type='llama',
    dtype='float32',
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'llama', dtype='float32'
  ).eval()
  settings = {'dtype': 'float32', 'param_dtype': 'float32', 'mesh': one_device}
  ours = calm_jax.load_pretrained(KV_ANCHOR, **settings)
  tokens_BT = np.random.default_rng(0).integers(0, 3000, (2, 12))
  with torch.no_grad():
    expected_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(ours.logits(tokens_BT), expected_BTV, atol=1e-4)
  again = calm_jax.load_pretrained(tmp_path / 'llama', **settings)
  np.testing.assert_array_equal(again.logits(tokens_BT), ours.logits(tokens_BT))
  assert theirs.config.eos_token_id == ours.vocabulary.eos_id
  assert again.vocabulary.fingerprint() == ours.vocabulary.fingerprint()


@pytest.mark.convert
@pytest.mark.slow
def test_a_fine_tuned_anchor_comes_out_in_the_format_it_came_in(
  tmp_path, one_device
):
  import torch
  import transformers

  hugging_face(
    tmp_path / 'in', 'qwen3', tie_word_embeddings=True, num_hidden_layers=2
  )
  rows = tmp_path / 'rows.npz'
  np.savez(rows, **tiny.batch_of(tiny.tokens((8, 8))))
  entry = gin_setup.configure(
    'train',
    gin_files=[],
    bindings=[
      f"train.model_dir = '{tmp_path / 'run'}'",
      'train.anchor = @pretrained_model()',
      "train.trainable = 'anchor'",
      'train.make_batches = @npz_batches',
      'train.train_steps = 2',
      'train.batch_size = 8',
      "train.stack = 'scan'",
      f"pretrained_model.path = '{tmp_path / 'in'}'",
      f"npz_batches.path = '{rows}'",
    ],
  )
  entry()
  entry()  # a finished run writes it once more
  out = tmp_path / 'run' / 'model'
  before, after = stored(tmp_path / 'in'), stored(out)
  assert before.keys() == after.keys()
  assert all(before[name] != after[name] for name in before)
  assert json_or_text(out / 'config.json') == json_or_text(
    tmp_path / 'in' / 'config.json'
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
  tokens_BT = tiny.tokens((2, 9)).astype(np.int64)
  with torch.no_grad():
    expected_BTV = theirs(torch.from_numpy(tokens_BT)).logits.numpy()
  ours = calm_jax.load_pretrained(out, mesh=one_device)
  np.testing.assert_allclose(ours.logits(tokens_BT), expected_BTV, atol=1e-4)


# --- Other ways --------------------------------------------------------------


@pytest.fixture
def native(tmp_path):
  toys.model_directory(tmp_path / 'native', tiny.ANCHOR)
  return tmp_path / 'native'


def test_the_command(native, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'calm_jax.convert'),
      '--gin_file=runs/convert.gin',
      f"--gin.MODEL_PATH='{native}'",
      f"--gin.OUTPUT_DIR='{tmp_path / 'out'}'",
      "--gin.MODEL_TYPE='llama'",
      "--gin.DTYPE='bfloat16'",
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  first, second = done.stdout.splitlines()
  assert first.startswith('47 tensors, 0.000') and f'from {native}' in first
  assert f'{tmp_path / "out"}: llama, fingerprint' in second
  spec = pretrained.pretrained_model(tmp_path / 'out')
  assert (spec.config.param_dtype, spec.config.dtype) == ('bfloat16',) * 2
  expected = pretrained.pretrained_model(native).config
  same = {'dtype': 'float32', 'param_dtype': 'float32'}
  assert dataclasses.replace(spec.config, **same) == expected


def test_a_model_in_our_format_takes_over_its_source(native, tmp_path):
  """As after training by an older version, which wrote `native` only."""
  convert.convert(
    model=pretrained.pretrained_model(native),
    output_dir=str(tmp_path / 'source'),
    model_type='mistral',
  )
  fields = json_or_text(tmp_path / 'source' / 'config.json')
  fields |= {'max_position_embeddings': 77, '_name_or_path': 'x'}
  (tmp_path / 'source' / 'config.json').write_text(json.dumps(fields))
  file = tmp_path / 'source' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  table, copy = 'model.embed_tokens.weight', 'lm_head.weight'
  tensors[copy] = tensors[table]  # tied, and stored twice
  buffer = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors[buffer] = np.ones(4, np.float32)
  safetensors.numpy.save_file(tensors, file)
  toys.model_directory(tmp_path / 'tuned', tiny.ANCHOR, seed=1)
  convert.convert(
    model=pretrained.pretrained_model(tmp_path / 'tuned'),
    output_dir=str(tmp_path / 'out'),
    source=str(tmp_path / 'source'),
  )
  assert json_or_text(tmp_path / 'out' / 'config.json') == fields
  source, out = stored(tmp_path / 'source'), stored(tmp_path / 'out')
  assert source.keys() == out.keys()
  assert [name for name in source if source[name] == out[name]] == [buffer]
  assert out[table] == out[copy]


@pytest.mark.parametrize(
  ('changes', 'settings', 'message'),
  [
    ({}, {}, 'model_type = None is not one of'),
    ({}, {'model_type': 'gpt2'}, "model_type = 'gpt2' is not one of"),
    (
      {'final_softcap': 3.0, 'query_key_norm': 'rms'},
      {'model_type': 'llama'},
      'llama model cannot have .*query_key_norm = .*final_softcap = 3.0',
    ),
    ({}, {'source': 'other', 'model_type': 'llama'}, 'already says the model'),
    ({}, {'source': 'other'}, 'is another model: its num_layers is 4, that'),
    ({}, {'source': 'native'}, 'is a calm_jax directory; as source'),
  ],
)
def test_what_cannot_be_written(changes, settings, message, tmp_path):
  config = dataclasses.replace(tiny.ANCHOR, **changes)
  toys.model_directory(tmp_path / 'native', config)
  if settings.get('source') == 'other':
    toys.model_directory(tmp_path / 'small', tiny.AUGMENTING)
    convert.convert(
      model=pretrained.pretrained_model(tmp_path / 'small'),
      output_dir=str(tmp_path / 'other'),
      model_type='llama',
    )
  settings = dict(settings)
  if 'source' in settings:
    settings['source'] = str(tmp_path / settings['source'])
  with pytest.raises(ValueError, match=message):
    convert.convert(
      model=pretrained.pretrained_model(tmp_path / 'native'),
      output_dir=str(tmp_path / 'out'),
      **settings,
    )
  assert not (tmp_path / 'out').exists()


def test_nothing_is_overwritten(native):
  spec = pretrained.pretrained_model(native)
  with pytest.raises(ValueError, match='is there already, and not empty'):
    convert.convert(model=spec, output_dir=str(native), model_type='llama')
  random = pretrained.pretrained_model(native, weights='random')
  with pytest.raises(ValueError, match="Only a model with weights = 'pretr"):
    convert.convert(model=random, output_dir='x', model_type='llama')


def test_damaged_weights_are_not_passed_on(native, tmp_path):
  file = native / 'model.safetensors'
  tensors = safetensors.numpy.load_file(file)
  tensors['final_norm/scale'][3] = np.inf
  safetensors.numpy.save_file(tensors, file)
  with pytest.raises(ValueError, match="'final_norm/scale' holds NaN or inf"):
    convert.convert(
      model=pretrained.pretrained_model(native),
      output_dir=str(tmp_path / 'out'),
      model_type='llama',
    )
  assert not (tmp_path / 'out').exists()
