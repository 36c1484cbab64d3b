"""What differs between model families, as data.

Names of fields and the values of absent ones are those of the configuration
classes of `transformers` (versions 4 and 5).
"""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What the models of one `model_type` have in common.

  Attributes:
    architecture: name of the class in `transformers`.
    defaults: the fields that are read, with the values of absent ones.
    constants: what no field says.
    scaled_embeddings: embeddings are multiplied by the root of the width.
    window_every: this layer of each so many has no window, where no field
      says which.
    activation_field: the field that names the activation.
  """

  architecture: str
  defaults: Mapping[str, Any]
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scaled_embeddings: bool = False
  window_every: int | None = None
  activation_field: str = 'hidden_act'


def _decoder(
  architecture: str,
  sizes: tuple[int, int, int, int, int, int | None],
  *,
  constants: Mapping[str, Any] | None = None,
  scaled_embeddings: bool = False,
  window_every: int | None = None,
  activation_field: str = 'hidden_act',
  **defaults: Any,
) -> Family:
  """Sizes: V, width, feed-forward, layers, heads, key/value heads."""
  names = (
    'vocab_size hidden_size intermediate_size num_hidden_layers'
    ' num_attention_heads num_key_value_heads'
  )
  return Family(
    architecture,
    {
      **dict(zip(names.split(), sizes, strict=True)),
      'head_dim': None,
      'hidden_act': 'silu',
      'rms_norm_eps': 1e-6,
      'initializer_range': 0.02,
      'tie_word_embeddings': False,
      'max_position_embeddings': 32768,
      'rope_theta': None,
      'rope_scaling': None,
      'rope_parameters': None,
      'dtype': None,
      'torch_dtype': None,
      **defaults,
    },
    constants or {},
    scaled_embeddings,
    window_every,
    activation_field,
  )


_QWEN_WINDOWS = {
  'sliding_window': 4096,
  'use_sliding_window': False,
  'max_window_layers': 28,
  'layer_types': None,
}
_GEMMA = {
  'head_dim': 256,
  'hidden_act': None,
  'hidden_activation': None,
  'tie_word_embeddings': True,
  'attention_bias': False,
}
_GEMMA_2 = {
  'query_pre_attn_scalar': 256,
  'sliding_window_size': None,
  'sliding_window': 4096,
  'layer_types': None,
}
_T5 = {
  'd_kv': 64,
  'd_model': 512,
  'layer_norm_epsilon': 1e-6,
  'initializer_factor': 1.0,
  'relative_attention_num_buckets': 32,
  'relative_attention_max_distance': 128,
  'dense_act_fn': None,
  'is_gated_act': None,
  'dtype': None,
  'torch_dtype': None,
}
FAMILIES = {
  'gemma': _decoder(
    'GemmaForCausalLM',
    (256000, 3072, 24576, 28, 16, 16),
    constants={'norm_offset': 1.0},
    scaled_embeddings=True,
    **_GEMMA,
    max_position_embeddings=8192,
  ),
  'gemma2': _decoder(
    'Gemma2ForCausalLM',
    (256000, 2304, 9216, 26, 8, 4),
    constants={'norm_offset': 1.0, 'norm_placement': 'sandwich'},
    scaled_embeddings=True,
    window_every=2,
    activation_field='hidden_activation',
    **_GEMMA,
    **_GEMMA_2,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    max_position_embeddings=8192,
  ),
  'gemma3_text': _decoder(
    'Gemma3ForCausalLM',
    (262208, 2304, 9216, 26, 8, 4),
    constants={
      'norm_offset': 1.0,
      'norm_placement': 'sandwich',
      'query_key_norm': 'rms',
    },
    scaled_embeddings=True,
    activation_field='hidden_activation',
    **_GEMMA,
    **_GEMMA_2,
    sliding_window_pattern=6,
    final_logit_softcapping=None,
    max_position_embeddings=131072,
    rope_local_base_freq=None,
  ),
  'llama': _decoder(
    'LlamaForCausalLM',
    (32000, 4096, 11008, 32, 32, None),
    attention_bias=False,
    mlp_bias=False,
    max_position_embeddings=2048,
  ),
  'mistral': _decoder(
    'MistralForCausalLM',
    (32000, 4096, 14336, 32, 32, 8),
    sliding_window=4096,
    max_position_embeddings=131072,
  ),
  'qwen2': _decoder(
    'Qwen2ForCausalLM',
    (151936, 4096, 22016, 32, 32, 32),
    constants={'attention_bias': 'qkv'},
    **_QWEN_WINDOWS,
  ),
  'qwen3': _decoder(
    'Qwen3ForCausalLM',
    (151936, 4096, 22016, 32, 32, 32),
    constants={'query_key_norm': 'rms'},
    head_dim=128,
    attention_bias=False,
    **_QWEN_WINDOWS,
  ),
  't5': Family(
    'T5EncoderModel',
    {
      'vocab_size': 32128,
      'd_ff': 2048,
      'num_layers': 6,
      'num_heads': 8,
      'feed_forward_proj': 'relu',
      **_T5,
    },
  ),
  'mt5': Family(
    'MT5EncoderModel',
    {
      'vocab_size': 250112,
      'd_ff': 1024,
      'num_layers': 8,
      'num_heads': 6,
      'feed_forward_proj': 'gated-gelu',
      **_T5,
    },
  ),
}
ENCODERS = ('t5', 'mt5')
# Gemma 3 with eyes is Gemma 3's text model once the eyes are left out.
MODEL_TYPES = (*FAMILIES, 'gemma3')
T5_HARMLESS = frozenset(
  """
  is_encoder_decoder num_decoder_layers scale_decoder_outputs
  tie_word_embeddings
  """.split()
)
GEMMA3_EYES = frozenset(
  """
  boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id
  image_token_index initializer_range mm_tokens_per_image vision_config
  """.split()
)
