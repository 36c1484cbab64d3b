"""Families against `transformers`. Run: pytest tests/models/parity_test.py

Small random models, saved as users get them and read by our names.
"""

import numpy as np
import pytest

import calm_jax
from calm_jax.models import families
from tests import foreign, toys

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
pytestmark = pytest.mark.convert
torch.set_num_threads(1)  # for so little, more cost more

LENGTH = 40
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'rope_theta': 500.0,
}
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 16,
  'rope_theta': 10_000.0,
}
FULL, SLIDING = 'full_attention', 'sliding_attention'
GEMMA3_ROPE = {
  FULL: {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  SLIDING: {'rope_type': 'default', 'rope_theta': 1e4},
}
SMALL_HEADS = {'head_dim': 12}
# Each holds one thing or more that the others of its family do not.
VARIANTS = {
  'gemma-multi_query': ('gemma', {**SMALL_HEADS, 'num_key_value_heads': 1}),
  'gemma-full': ('gemma', {'head_dim': 8, 'num_key_value_heads': 4}),
  'gemma-untied_biased': (
    'gemma',
    {'head_dim': 16, 'tie_word_embeddings': False, 'attention_bias': True},
  ),
  'gemma2-grouped_window': ('gemma2', {'sliding_window': 7, **SMALL_HEADS}),
  'gemma2-multi_query_capped': (
    'gemma2',
    {
      'num_key_value_heads': 1,
      'query_pre_attn_scalar': 4,
      'attn_logit_softcapping': 2.0,
      'final_logit_softcapping': 3.0,
      'sliding_window': 5,
      **SMALL_HEADS,
    },
  ),
  'gemma2-full_uncapped_biased': (
    'gemma2',
    {
      'num_key_value_heads': 4,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': None,
      'attention_bias': True,
      'num_hidden_layers': 3,
      'layer_types': [FULL, FULL, SLIDING],
      'sliding_window': 9,
      **SMALL_HEADS,
    },
  ),
  'gemma3_text-local_global': (
    'gemma3_text',
    {
      'sliding_window': 6,
      'num_hidden_layers': 3,
      'layer_types': [SLIDING, FULL, SLIDING],
      'query_pre_attn_scalar': 8,
      **SMALL_HEADS,
    },
  ),
  'gemma3_text-scaled': (
    'gemma3_text',
    {
      'num_key_value_heads': 1,
      'sliding_window': 11,
      'sliding_window_pattern': 2,
      'rope_parameters': GEMMA3_ROPE,
      'final_logit_softcapping': 4.0,
      **SMALL_HEADS,
    },
  ),
  'gemma3_text-full_biased': (
    'gemma3_text',
    {
      'num_key_value_heads': 4,
      'attention_bias': True,
      'tie_word_embeddings': False,
      'sliding_window': 3,
      **SMALL_HEADS,
    },
  ),
  'gemma3-with_eyes': (
    'gemma3',
    {'sliding_window': 5, 'sliding_window_pattern': 2, **SMALL_HEADS},
  ),
  'llama-grouped_llama3': ('llama', {'rope_parameters': LLAMA3}),
  'llama-multi_query_tied_biased': (
    'llama',
    {
      'num_key_value_heads': 1,
      'tie_word_embeddings': True,
      'attention_bias': True,
      'mlp_bias': True,
    },
  ),
  'llama-full_linear': (
    'llama',
    {
      'num_key_value_heads': 4,
      'max_position_embeddings': 16,
      'rope_parameters': {'rope_type': 'linear', 'factor': 4.0},
    },
  ),
  'llama-dynamic': (
    'llama',
    {
      'max_position_embeddings': LENGTH,
      'rope_parameters': {'rope_type': 'dynamic', 'factor': 4.0},
    },
  ),
  'llama-yarn': ('llama', {'rope_parameters': YARN}),
  'mistral-window': ('mistral', {'sliding_window': 5}),
  'mistral-multi_query_wide_heads': (
    'mistral',
    {'num_key_value_heads': 1, 'head_dim': 12, 'sliding_window': None},
  ),
  'mistral-full_tied': (
    'mistral',
    {
      'num_key_value_heads': 4,
      'tie_word_embeddings': True,
      'sliding_window': 17,
      'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    },
  ),
  'qwen2-upper_windows': (
    'qwen2',
    {'use_sliding_window': True, 'sliding_window': 4, 'max_window_layers': 1},
  ),
  'qwen2-multi_query_tied': (
    'qwen2',
    {'num_key_value_heads': 1, 'tie_word_embeddings': True},
  ),
  'qwen2-full_yarn': (
    'qwen2',
    {
      'num_key_value_heads': 4,
      'head_dim': 16,
      'rope_parameters': {
        **YARN,
        'rope_theta': 20.0,
        'beta_fast': 2.0,
        'beta_slow': 0.5,
        'truncate': False,
      },
    },
  ),
  'qwen3-grouped': ('qwen3', {'head_dim': 16}),
  'qwen3-multi_query_biased_tied': (
    'qwen3',
    {
      'num_key_value_heads': 1,
      'attention_bias': True,
      'tie_word_embeddings': True,
      'head_dim': 16,
    },
  ),
  'qwen3-full_yarn_windows': (
    'qwen3',
    {
      'num_key_value_heads': 4,
      'use_sliding_window': True,
      'sliding_window': 6,
      'num_hidden_layers': 3,
      'layer_types': [SLIDING, FULL, SLIDING],
      'rope_parameters': {
        **YARN,
        'beta_fast': 4.0,
        'beta_slow': 0.5,
        'attention_factor': 0.8,
      },
      'head_dim': 16,
    },
  ),
  't5-plain': ('t5', {}),
  't5-gated': ('t5', {'feed_forward_proj': 'gated-gelu', 'num_heads': 3}),
  't5-few_buckets': (
    't5',
    {
      'relative_attention_num_buckets': 8,
      'relative_attention_max_distance': 20,
      'feed_forward_proj': 'gated-silu',
    },
  ),
  'mt5': ('mt5', {}),
  'mt5-one_head': ('mt5', {'num_heads': 1, 'd_kv': 7}),
  # ByT5 is a T5 v1.1 with a vocabulary of bytes.
  't5-bytes': (
    't5',
    {
      'vocab_size': 384,
      'feed_forward_proj': 'gated-gelu',
      'tie_word_embeddings': False,
    },
  ),
}


def padded_batch(vocab=foreign.VOCAB, length=LENGTH):
  """A whole row, one padded right, one padded left."""
  tokens_BT = np.random.default_rng(1).integers(0, vocab, (3, length))
  mask_BT = np.ones((3, length), np.int32)
  mask_BT[1, length // 2 :] = 0
  mask_BT[2, : length // 3] = 0
  return tokens_BT, mask_BT


def difference(one, two, mask_BT):
  """Largest difference at real positions."""
  real = mask_BT.astype(bool)
  pairs = zip(one, two, strict=True) if isinstance(one, list) else [(one, two)]
  return max(float(np.abs(a[real] - b[real]).max()) for a, b in pairs)


@pytest.mark.parametrize('name', VARIANTS)
def test_float32(name, tmp_path):
  model_type, fields = VARIANTS[name]
  reference = foreign.make(model_type, **fields)
  saved, tensors = foreign.save(reference, tmp_path)
  model, params = foreign.read(saved, tensors)
  tokens_BT, mask_BT = padded_batch()
  expected = foreign.theirs(reference, tokens_BT, mask_BT)
  actual = foreign.ours(model, params, tokens_BT, mask_BT)
  size = max(float(np.abs(one).max()) for one in expected)
  assert size > 2  # so that the bound means something
  largest = difference(actual, expected, mask_BT)
  print(f'{name}: {largest:.1e}, values up to {size:.1f}')
  assert largest <= 1e-4

  # What we write is the same model to transformers.
  fields = families.config_to(model.config, model_type=model_type)
  assert families.config_from(fields, where='') == model.config
  if model_type == 'gemma3':
    return
  again = foreign.build(fields)
  again.load_state_dict(reference.state_dict())
  np.testing.assert_array_equal(
    foreign.theirs(again, tokens_BT, mask_BT), expected
  )


BFLOAT16 = {
  'gemma': 'gemma-full',
  'gemma2': 'gemma2-grouped_window',
  'gemma3_text': 'gemma3_text-local_global',
  'llama': 'llama-grouped_llama3',
  'mistral': 'mistral-window',
  'qwen2': 'qwen2-upper_windows',
  'qwen3': 'qwen3-grouped',
  't5': 't5-plain',
  'mt5': 'mt5',
}


@pytest.mark.parametrize('family', BFLOAT16)
def test_bfloat16_is_as_near_as_theirs(family, tmp_path):
  """Both against the float32 logits of the same weights.

  The largest error of one text is the larger of many draws: it is compared as
  its mean over 24 texts, as one draw alone may be a third off either way.
  """
  model_type, fields = VARIANTS[BFLOAT16[family]]
  reference = foreign.make(model_type, **fields).to(torch.bfloat16)
  saved, tensors = foreign.save(reference, tmp_path)
  assert saved['dtype'] == 'bfloat16'
  model, params = foreign.read(saved, tensors)
  assert model.config.dtype == model.config.param_dtype == 'bfloat16'
  tokens_BT = np.random.default_rng(0).integers(0, foreign.VOCAB, (24, 24))
  mask_BT = np.ones_like(tokens_BT)
  actual = np.stack(foreign.ours(model, params, tokens_BT, mask_BT))
  other = np.stack(foreign.theirs(reference, tokens_BT, mask_BT))
  exact = np.stack(foreign.theirs(reference.float(), tokens_BT, mask_BT))
  ours, theirs = (np.abs(one - exact) for one in (actual, other))
  mean = ours.mean() / theirs.mean()
  axes = (-2, -1)
  largest = ours.max(axes).mean() / theirs.max(axes).mean()
  print(f'{family}: largest {largest:.2f}, mean {mean:.2f} of theirs')
  assert max(mean, largest) <= 1.2


@pytest.mark.parametrize('name', ['gemma3-with_eyes', 'qwen2-upper_windows'])
def test_from_a_directory_to_logits(name, tmp_path):
  """As a user goes, with several files of weights."""
  model_type, fields = VARIANTS[name]
  reference = foreign.make(model_type, **fields)
  reference.save_pretrained(tmp_path, max_shard_size='10KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  toys.vocabulary(foreign.VOCAB).save(tmp_path)
  tokens_BT = np.random.default_rng(0).integers(0, foreign.VOCAB, (2, 20))
  mask_BT = np.ones_like(tokens_BT)
  actual = calm_jax.load_pretrained(tmp_path).logits(tokens_BT)
  expected = foreign.theirs(reference, tokens_BT, mask_BT)
  assert difference(np.asarray(actual), expected, mask_BT) <= 1e-4
