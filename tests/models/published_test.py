"""Configurations with the fields and values of published models.

A strict reader is of use only if it reads these, the fields that change nothing
included. Written down from public model pages as we know them, not fetched.

Run: pytest tests/models/published_test.py
"""

import json

import pytest

from calm_jax.models import families, sizes

COMMON = """
"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": true,
"bos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.42.3"
"""
PUBLISHED = {
  'gemma_7b': """
"architectures": ["GemmaForCausalLM"], "attention_bias": false,
"eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu",
"hidden_size": 3072, "intermediate_size": 24576,
"max_position_embeddings": 8192, "model_type": "gemma",
"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000.0,
"torch_dtype": "bfloat16", "vocab_size": 256000
""",
  'gemma2_9b': """
"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
"eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
"hidden_size": 3584, "intermediate_size": 14336,
"max_position_embeddings": 8192, "model_type": "gemma2",
"num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
"sliding_window": 4096, "sliding_window_size": 4096, "torch_dtype": "float32",
"vocab_size": 256000
""",
  'gemma3_1b': """
"architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
"attn_logit_softcapping": null, "cache_implementation": "hybrid",
"eos_token_id": [1, 106], "final_logit_softcapping": null, "head_dim": 256,
"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
"intermediate_size": 6912, "max_position_embeddings": 32768,
"model_type": "gemma3_text", "num_attention_heads": 4,
"num_hidden_layers": 26, "num_key_value_heads": 1,
"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
"rope_local_base_freq": 10000, "rope_scaling": null, "rope_theta": 1000000,
"sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16",
"vocab_size": 262144
""",
  # With eyes, and with most of the language model left to its defaults.
  'gemma3_4b': """
"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
"eoi_token_index": 256000, "eos_token_id": [1, 106],
"image_token_index": 262144, "mm_tokens_per_image": 256,
"model_type": "gemma3", "text_config": {"hidden_size": 2560,
  "intermediate_size": 10240, "model_type": "gemma3_text",
  "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0,
  "rope_type": "linear"}, "sliding_window": 1024},
"torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152,
  "image_size": 896, "intermediate_size": 4304,
  "model_type": "siglip_vision_model", "num_attention_heads": 16,
  "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}
""",
  'gemma3_27b': """
"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
"eoi_token_index": 256000, "eos_token_id": [1, 106],
"image_token_index": 262144, "mm_tokens_per_image": 256,
"model_type": "gemma3", "text_config": {"head_dim": 128, "hidden_size": 5376,
  "intermediate_size": 21504, "model_type": "gemma3_text",
  "num_attention_heads": 32, "num_hidden_layers": 62,
  "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
  "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
  "sliding_window": 1024},
"torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152,
  "image_size": 896, "intermediate_size": 4304,
  "model_type": "siglip_vision_model", "num_attention_heads": 16,
  "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}
""",
  'llama3.2_1b': """
"architectures": ["LlamaForCausalLM"], "attention_bias": false,
"eos_token_id": [128001, 128008, 128009], "head_dim": 64,
"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
"max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
  "high_freq_factor": 4.0, "low_freq_factor": 1.0,
  "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "vocab_size": 128256
""",
  'mistral_7b': """
"architectures": ["MistralForCausalLM"], "eos_token_id": 2,
"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
"max_position_embeddings": 32768, "model_type": "mistral",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000
""",
  'qwen2.5_7b': """
"architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643,
"hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
"max_position_embeddings": 131072, "max_window_layers": 28,
"model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
"num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"sliding_window": 131072, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "use_mrope": false, "use_sliding_window": false,
"vocab_size": 152064
""",
  'qwen3_8b': """
"architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
"eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 4096, "intermediate_size": 12288,
"max_position_embeddings": 40960, "max_window_layers": 36,
"model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
"rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936
""",
}
LLAMA_2 = """
"_name_or_path": "meta-llama/Llama-2-7b-hf",
"architectures": ["LlamaForCausalLM"], "eos_token_id": 2,
"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
"max_position_embeddings": 4096, "model_type": "llama",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
"tie_word_embeddings": false, "torch_dtype": "float16", "vocab_size": 32000
"""
ENCODERS = {
  't5': """
"architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64,
"d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
"eos_token_id": 1, "initializer_factor": 1.0, "is_encoder_decoder": true,
"layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512,
"num_heads": 8, "num_layers": 6, "output_past": true, "pad_token_id": 0,
"relative_attention_num_buckets": 32, "task_specific_params": {
  "summarization": {"early_stopping": true, "length_penalty": 2.0}},
"vocab_size": 32128
""",
  'mt5': """
"architectures": ["MT5ForConditionalGeneration"], "d_ff": 1024, "d_kv": 64,
"d_model": 512, "decoder_start_token_id": 0, "dropout_rate": 0.1,
"eos_token_id": 1, "feed_forward_proj": "gated-gelu",
"initializer_factor": 1.0, "is_encoder_decoder": true,
"layer_norm_epsilon": 1e-06, "model_type": "mt5", "num_decoder_layers": 8,
"num_heads": 6, "num_layers": 8, "pad_token_id": 0,
"relative_attention_num_buckets": 32, "tie_word_embeddings": false,
"tokenizer_class": "T5Tokenizer", "vocab_size": 250112
""",
  'byt5': """
"architectures": ["T5ForConditionalGeneration"], "d_ff": 3584, "d_kv": 64,
"d_model": 1472, "decoder_start_token_id": 0, "dropout_rate": 0.1,
"eos_token_id": 1, "feed_forward_proj": "gated-gelu",
"gradient_checkpointing": false, "initializer_factor": 1.0,
"is_encoder_decoder": true, "layer_norm_epsilon": 1e-06, "model_type": "t5",
"num_decoder_layers": 4, "num_heads": 6, "num_layers": 12, "pad_token_id": 0,
"relative_attention_num_buckets": 32, "tie_word_embeddings": false,
"tokenizer_class": "ByT5Tokenizer", "use_cache": true, "vocab_size": 384
""",
}


def read(text, common=COMMON):
  fields = json.loads('{' + ', '.join(filter(None, (common, text))) + '}')
  return families.config_from(fields, where='config.json')


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_model_has_its_size(name):
  common = '' if 'Conditional' in PUBLISHED[name] else COMMON
  sizes.check(read(PUBLISHED[name], common), name=name, where='config.json')


def test_there_is_one_of_every_family_of_decoders():
  kinds = {
    json.loads('{' + text + '}')['model_type'] for text in PUBLISHED.values()
  }
  encoders = {'t5', 'mt5'}
  assert kinds == set(families.MODEL_TYPES) - encoders
  assert set(PUBLISHED) <= set(sizes.NAMES)


def test_llama_2_is_kept_in_float16_and_computed_in_float32():
  config = read(LLAMA_2)
  assert (config.param_dtype, config.dtype) == ('float16', 'float32')
  assert (config.rope_theta, config.num_kv_heads) == (10_000.0, 32)


@pytest.mark.parametrize(
  ('name', 'width', 'depth', 'mlp'),
  [
    ('t5', 512, 6, 'plain'),
    ('mt5', 512, 8, 'gated'),
    ('byt5', 1472, 12, 'gated'),
  ],
)
def test_published_encoders(name, width, depth, mlp):
  config = read(ENCODERS[name], '')
  assert (config.embed_dim, config.num_layers, config.mlp) == (
    width,
    depth,
    mlp,
  )
  assert config.attention == 'bidirectional'
