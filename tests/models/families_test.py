"""What a `config.json` may hold. Run: pytest tests/models/families_test.py"""

import dataclasses

from flax import linen as nn
import jax
import pytest
import torch
import transformers

from calm_jax import trees
from calm_jax.models import (
  encoder,
  families,
  family_tables,
  layers,
  transformer,
)
from tests import foreign, tiny, toys

DECODER = {
  'model_type': 'llama',
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
}
ENCODER = {'model_type': 't5', **foreign.ENCODER}
SLIDING, FULL = 'sliding_attention', 'full_attention'


def read(model_type='llama', **fields):
  base = ENCODER if model_type in ('t5', 'mt5') else DECODER
  fields = {**base, 'model_type': model_type, **fields}
  fields = {k: v for k, v in fields.items() if v != 'absent'}
  return families.config_from(fields, where='dir/config.json')


# --- What absent fields mean -------------------------------------------------


def test_absent_fields_take_the_values_of_the_family():
  """Gemma 3 4B says no more than this about its language model."""
  config = families.config_from(
    {
      'model_type': 'gemma3',
      'architectures': ['Gemma3ForConditionalGeneration'],
      'mm_tokens_per_image': 256,
      'vision_config': {'hidden_size': 1152},
      'torch_dtype': 'bfloat16',
      'text_config': {
        'hidden_size': 2560,
        'intermediate_size': 10240,
        'model_type': 'gemma3_text',
        'num_hidden_layers': 34,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
        'sliding_window': 1024,
      },
    },
    where='config.json',
  )
  assert config.vocab_size == 262208
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
  assert config.window_pattern == (*[1024] * 5, None)
  assert (config.rope_theta, config.rope_theta_local) == (1e6, 1e4)
  assert config.rope_scaling == layers.RopeScaling('linear', 8.0)
  assert config.attention_scale == 256**-0.5
  assert config.tie_embeddings and config.norm_offset == 1
  assert config.dtype == config.param_dtype == 'bfloat16'


@pytest.mark.parametrize(
  ('model_type', 'fields', 'expected'),
  [
    ('llama', {'num_key_value_heads': None}, {'num_kv_heads': 4}),
    ('llama', {'num_key_value_heads': 'absent'}, {'num_kv_heads': 4}),
    ('llama', {}, {'head_dim': 8, 'tie_embeddings': False}),
    ('llama', {'rope_theta': 5e5}, {'rope_theta': 5e5}),
    ('llama', {'pretraining_tp': 2}, {}),
    ('llama', {'torch_dtype': 'float16'}, {'dtype': 'float32'}),
    ('llama', {'dtype': 'bfloat16'}, {'param_dtype': 'bfloat16'}),
    ('mistral', {}, {'window_pattern': (4096,)}),
    ('mistral', {'sliding_window': None}, {'window_pattern': (None,)}),
    ('qwen2', {'sliding_window': 9}, {'window_pattern': (None,)}),
    (
      'qwen2',
      {
        'sliding_window': 9,
        'use_sliding_window': True,
        'max_window_layers': 2,
      },
      {'window_pattern': (None, None, 9, 9)},
    ),
    ('qwen3', {}, {'head_dim': 128, 'query_key_norm': 'rms'}),
    ('gemma', {'hidden_act': 'gelu'}, {'activation': 'gelu_tanh'}),
    ('gemma', {}, {'activation': 'gelu_tanh', 'tie_embeddings': True}),
    ('gemma2', {'hidden_activation': 'relu'}, {'activation': 'relu'}),
    (
      'gemma',
      {'hidden_activation': None, 'hidden_act': 'gelu_pytorch_tanh'},
      {'activation': 'gelu_tanh', 'embed_scale': 32**0.5},
    ),
    ('gemma2', {}, {'window_pattern': (4096, None), 'final_softcap': 30.0}),
    ('gemma2', {'attn_logit_softcapping': None}, {'attention_softcap': None}),
    ('gemma2', {'sliding_window_size': 4096}, {'window_pattern': (4096, None)}),
    ('gemma3_text', {'sliding_window_pattern': 2}, {'rope_theta': 1e6}),
    ('gemma3_text', {'rope_local_base_freq': 5e3}, {'rope_theta_local': 5e3}),
    ('t5', {}, {'mlp': 'plain', 'activation': 'relu', 'attention_scale': 1}),
    ('mt5', {}, {'mlp': 'gated', 'activation': 'gelu_tanh'}),
    ('t5', {'feed_forward_proj': 'gelu'}, {'activation': 'gelu'}),
  ],
  ids=str,
)
def test_fields(model_type, fields, expected):
  config = read(model_type, **fields)
  assert {name: getattr(config, name) for name in expected} == expected


# --- Rotary positions, in all spellings --------------------------------------

YARN = {'factor': 4.0, 'original_max_position_embeddings': 64}
LLAMA3 = {
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'rope_type': 'default'}, None),
    ({'type': 'linear', 'factor': 2}, layers.RopeScaling('linear', 2.0)),
    (
      {**YARN, 'type': 'linear', 'partial_rotary_factor': 1},
      layers.RopeScaling('linear', 4.0),
    ),
    (
      {'type': 'dynamic', 'factor': 2.0},
      layers.RopeScaling('dynamic', 2.0, original_length=256),
    ),
    (
      {'rope_type': 'llama3', **LLAMA3},
      layers.RopeScaling('llama3', 8.0, original_length=8192),
    ),
    (
      {'type': 'yarn', 'rope_type': 'yarn', **YARN},
      layers.RopeScaling('yarn', 4.0, original_length=64),
    ),
    (
      {'type': 'yarn', **YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
      layers.RopeScaling('yarn', 4.0, original_length=64, attention_factor=1.0),
    ),
    (
      {'type': 'yarn', 'factor': 4.0, 'truncate': False, 'beta_fast': None},
      layers.RopeScaling('yarn', 4.0, original_length=256, truncate=False),
    ),
  ],
  ids=str,
)
def test_old_and_new_spelling_of_rope_agree(fields, expected):
  length = {'max_position_embeddings': 256}
  old = read(rope_theta=5e5, rope_scaling=fields, **length)
  new = read(rope_parameters={'rope_theta': 5e5, **fields}, **length)
  assert old == new
  assert old.rope_scaling == expected
  assert old.rope_theta == 5e5


def test_rope_by_type_of_layer():
  linear = {'rope_type': 'linear', 'factor': 8.0}
  new = read(
    'gemma3_text',
    rope_parameters={
      FULL: {'rope_theta': 2e6, **linear},
      SLIDING: {'rope_theta': 2e4, 'rope_type': 'default'},
    },
  )
  old = read(
    'gemma3_text',
    rope_theta=2e6,
    rope_local_base_freq=2e4,
    rope_scaling=linear,
  )
  assert old == new
  assert new.rope_theta_local == 2e4
  assert new.rope_scaling == layers.RopeScaling('linear', 8.0)


# --- What is refused ---------------------------------------------------------


@pytest.mark.parametrize(
  ('model_type', 'fields', 'message'),
  [
    # Types and nonsense.
    ('llama', {'hidden_size': 'abc'}, "hidden_size = 'abc': expected an int"),
    ('llama', {'hidden_size': True}, 'hidden_size = True'),
    ('llama', {'hidden_size': 32.5}, 'hidden_size = 32.5'),
    ('llama', {'num_attention_heads': 0}, 'num_attention_heads = 0'),
    ('llama', {'num_hidden_layers': -2}, 'num_hidden_layers = -2'),
    ('llama', {'num_hidden_layers': [2]}, r'num_hidden_layers = \[2\]'),
    ('llama', {'vocab_size': None}, 'vocab_size = None'),
    ('llama', {'num_key_value_heads': 3}, 'must be a multiple of num_kv_heads'),
    ('llama', {'num_attention_heads': 5}, 'hidden_size = 32: not a multiple'),
    ('llama', {'head_dim': 7}, 'head_dim = 7 must be even'),
    ('llama', {'rms_norm_eps': float('nan')}, 'rms_norm_eps = nan'),
    ('llama', {'rms_norm_eps': '1e-6'}, "rms_norm_eps = '1e-6'"),
    ('llama', {'tie_word_embeddings': 1}, 'tie_word_embeddings = 1'),
    ('llama', {'hidden_act': 'relu6'}, "hidden_act = 'relu6': supported"),
    ('llama', {'hidden_act': ['silu']}, 'hidden_act = '),
    ('llama', {'dtype': 'int8'}, "dtype = 'int8': supported"),
    ('llama', {'rope_theta': 0}, 'rope_theta = 0'),
    ('qwen2', {'layer_types': [FULL]}, 'layer_types = .* a list of 4'),
    ('qwen2', {'layer_types': [['x']] * 4}, 'layer_types'),
    ('qwen2', {'layer_types': ['linear'] * 4}, "layer_types = 'linear'"),
    ('qwen2', {'layer_types': [SLIDING] * 4}, 'sliding_window = None: some'),
    ('gemma2', {'sliding_window': 0}, 'sliding_window = 0'),
    ('t5', {'feed_forward_proj': 'gated'}, "feed_forward_proj = 'gated'"),
    ('t5', {'feed_forward_proj': ['relu']}, 'feed_forward_proj'),
    ('t5', {'is_gated_act': True}, 'is_gated_act = True: feed_forward_proj'),
    ('t5', {'d_kv': 0}, 'd_kv = 0'),
    # What would change the computation.
    ('llama', {'attention_multiplier': 0.5}, 'attention_multiplier = 0.5: th'),
    ('llama', {'residual_multiplier': 0.2}, 'residual_multiplier = 0.2'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config'),
    ('llama', {'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    ('llama', {'auto_map': {'AutoModel': 'x.Y'}}, 'auto_map'),
    ('llama', {'is_decoder': 0}, 'is_decoder = 0: supported here is null or'),
    ('llama', {'sliding_window': 8}, 'sliding_window = 8'),
    ('llama', {'use_bidirectional_attention': True}, 'use_bidirectional'),
    ('gemma3_text', {'attn_logit_softcapping': 50.0}, 'attn_logit_softcap'),
    ('gemma', {'hidden_act': 'silu', 'hidden_activation': 'gelu'}, 'hidden_'),
    ('gemma', {'hidden_activation': 'relu'}, "= 'relu': .* read hidden_act,"),
    ('gemma2', {'hidden_act': 'silu'}, "= 'silu': .* read hidden_activation"),
    ('gemma3_text', {'hidden_act': 'silu'}, "hidden_act = 'silu'"),
    (
      't5',
      {'relative_attention_max_distance': 8},
      'relative_attention_max_distance.*: 8 distances would',
    ),
    ('t5', {'relative_attention_num_buckets': 3}, 'num_buckets.*: 0 distances'),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'llama3', **LLAMA3, 'low_freq_factor': 4}},
      'low_freq_factor = 4.0 must be above 0, and below high_freq_fa',
    ),
    ('qwen2', {'use_mrope': True}, 'use_mrope = True'),
    ('t5', {'is_decoder': True}, 'is_decoder = True'),
    # Rotary positions.
    ('llama', {'rope_scaling': {'type': 'longrope'}}, "rope_type = 'longrope'"),
    ('llama', {'rope_scaling': {'type': ['yarn']}}, 'rope_type = '),
    ('llama', {'rope_scaling': 'yarn'}, "rope_scaling = 'yarn'"),
    ('llama', {'rope_scaling': {'type': 'linear'}}, 'factor = None'),
    (
      'llama',
      {'rope_scaling': {'type': 'linear', 'rope_type': 'yarn', 'factor': 2.0}},
      'contradict',
    ),
    (
      'llama',
      {'rope_scaling': {'type': 'linear', 'factor': 2.0, 'alpha': 3}},
      'rope_scaling: alpha = 3: this field is not known',
    ),
    (
      'llama',
      {'rope_scaling': {'type': 'default', 'partial_rotary_factor': 0.5}},
      'partial_rotary_factor',
    ),
    (
      'llama',
      {'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 2e4}},
      'rope_theta = 10000.0: rope_parameters has another',
    ),
    (
      'llama',
      {
        'rope_scaling': {'type': 'linear', 'factor': 2.0},
        'rope_parameters': {'rope_type': 'default'},
      },
      'leave one out',
    ),
    (
      'qwen3',
      {'rope_parameters': {FULL: {'rope_theta': 1e4}}},
      'full_attention = .*not known',
    ),
    ('gemma3_text', {'rope_parameters': {'rope_theta': 1e4}}, 'rope_parameter'),
    (
      'gemma3_text',
      {'rope_parameters': {SLIDING: {'rope_type': 'linear', 'factor': 2.0}}},
      'supported here is',
    ),
    (
      'gemma2',
      {'sliding_window_size': 512},
      'sliding_window_size = 512.*sliding_window is 4096',
    ),
  ],
  ids=str,
)
def test_a_field_that_is_wrong_is_named(model_type, fields, message):
  with pytest.raises(ValueError, match='^dir/config.json.*' + message):
    read(model_type, **fields)


@pytest.mark.parametrize('model_type', family_tables.FAMILIES)
def test_no_value_of_a_field_is_another_kind_of_error(model_type):
  nonsense = (None, True, 0, -1, 1.5, 10**400, 1e308, '', 'x', [], [{}], {})
  nonsense += ({'rope_type': 'yarn'}, {'type': 'linear', 'factor': {}})
  for name in family_tables.FAMILIES[model_type].defaults:
    refused = 0
    for value in (*nonsense, float('nan'), float('-inf'), {FULL: 3}):
      try:
        read(model_type, **{name: value})
      except ValueError as error:
        assert str(error).startswith('dir/config.json')
        refused += 1
    assert refused > 8, name


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({}, 'model_type = None is not known; expected one of'),
    ({'model_type': ['llama']}, 'is not known'),
    ({'model_type': 'lama'}, "Did you mean 'llama'"),
    ({'model_type': 'Gemma-2'}, "Did you mean 'gemma2'"),
    ({'model_type': 'mixtral'}, "'calm_jax', our own.$"),
    ({'model_type': 'mistral3'}, "'calm_jax', our own.$"),
    ({'model_type': 'umt5'}, 'umT5 has a relative-position bias in each layer'),
    ({'model_type': 'gemma3'}, 'text_config = None: expected an object'),
    ({'model_type': 'gemma3', 'text_config': []}, r'text_config = \[\]'),
    (
      {'model_type': 'gemma3', 'text_config': {'model_type': 'llama'}},
      'text_config.model_type',
    ),
    ({'model_type': 'gemma3', 'text_config': {'x': 1}}, 'text_config: x = 1'),
    ({'model_type': 'gemma3', 'text_config': {}, 'y': 1}, 'y = 1'),
    (['llama'], 'expected a JSON object'),
  ],
  ids=str,
)
def test_a_model_that_is_not_ours(fields, message):
  with pytest.raises(ValueError, match=message):
    families.config_from(fields, where='config.json')


# --- Export ------------------------------------------------------------------


def test_export_refuses_what_the_family_cannot_have():
  config = dataclasses.replace(read('qwen3'), attention_softcap=5.0)
  message = 'qwen3 model cannot have attention_softcap = 5.0.'
  with pytest.raises(ValueError, match=message):
    families.config_to(config, model_type='qwen3')
  with pytest.raises(ValueError, match="llama .* query_key_norm = 'rms'"):
    families.config_to(read('qwen3'), model_type='llama')
  with pytest.raises(ValueError, match="'bert' is not known"):
    families.config_to(config, model_type='bert')


def test_export_of_gemma3_is_its_text_model():
  config = read('gemma3_text', sliding_window=7)
  fields = families.config_to(config, model_type='gemma3')
  assert fields['model_type'] == 'gemma3_text'
  assert families.config_from(fields, where='') == config


@pytest.mark.parametrize('model_type', ['gemma2', 'gemma3_text'])
def test_export_of_a_gemma_whose_layers_all_see_everything(model_type):
  """transformers makes the mask of sliding layers even if there are none."""
  config = read(
    model_type, layer_types=[FULL] * 4, hidden_activation='gelu', head_dim=8
  )
  assert config.windows == (None,) * 4 and config.activation == 'gelu'
  fields = families.config_to(config, model_type=model_type)
  assert fields['sliding_window'] == 4096 and 'hidden_act' not in fields
  theirs = transformers.AutoConfig.for_model(**fields)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(theirs)
  assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize('tied', [None, True, False])
@pytest.mark.parametrize('inner', [None, True, False])
def test_the_whole_of_gemma3_says_whether_it_is_tied(tied, inner):
  text = {**DECODER, 'model_type': 'gemma3_text', 'head_dim': 8}
  if inner is not None:
    text['tie_word_embeddings'] = inner
  fields = {'model_type': 'gemma3', 'text_config': text}
  if tied is not None:
    fields['tie_word_embeddings'] = tied
  config = families.config_from(fields, where='config.json')
  assert config.tie_embeddings == (tied is not False)


# --- Names -------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(tiny.FAMILIES.keys() - {'t5x'}))
def test_every_parameter_has_a_source(name):
  """Names and shapes of all switches, against those of the module."""
  config = dataclasses.replace(tiny.ANCHOR, **tiny.FAMILIES[name])
  sources = families.sources(config, model_type='llama')
  shapes = toys.boxed_shapes(transformer.DecoderLM(config))
  assert set(sources) == set(trees.flatten(nn.unbox(shapes)))
  stored = [source.name for source in sources.values()]
  assert len(stored) == len(set(stored))


@pytest.mark.parametrize('projection', ['relu', 'gated-gelu'])
def test_every_parameter_of_an_encoder_has_a_source(projection):
  config = read('t5', feed_forward_proj=projection)
  model = encoder.EncoderLM(config)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  sources = families.sources(config, model_type='t5')
  assert set(sources) == set(trees.flatten(nn.unbox(shapes)))


@pytest.mark.parametrize(
  'prefix', ['model.', 'language_model.model.', 'model.language_model.', '']
)
def test_prefixes(prefix):
  config = read('gemma3_text')
  available = {f'{prefix}embed_tokens.weight', f'{prefix}norm.weight'}
  sources = families.sources(config, model_type='gemma3', available=available)
  assert {sources['embedder/table'].name, sources['final_norm/scale'].name} == (
    available
  )


@pytest.mark.parametrize(
  ('model_type', 'name', 'expected'),
  [
    ('llama', 'model.layers.0.self_attn.rotary_emb.inv_freq', True),
    ('llama', 'lm_head.weight', False),
    ('llama', 'vision_tower.x', False),
    ('gemma', 'lm_head.weight', True),
    ('gemma', 'score.weight', False),
    ('gemma3', 'language_model.lm_head.weight', True),
    ('gemma3', 'vision_tower.vision_model.embeddings.bias', True),
    ('gemma3', 'model.multi_modal_projector.mm_soft_emb_norm.weight', True),
    ('gemma3', 'adapter.vision_tower.x', False),
    ('t5', 'decoder.block.0.layer.0.SelfAttention.q.weight', True),
    ('t5', 'encoder.embed_tokens.weight', True),
    ('t5', 'lm_head.weight', True),
    ('t5', 'encoder.block.9.layer.0.SelfAttention.q.weight', False),
  ],
)
def test_what_is_left_out(model_type, name, expected):
  config = read('gemma3_text' if model_type == 'gemma3' else model_type)
  assert families.left_out(model_type, name, config) == expected
