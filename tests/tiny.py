"""Two small models of different width, depth and heads, and batches for them.

The anchor and the augmenting model differ in every size, so that a swap of the
two shows in every shape.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import assembly, composition, connections
from calm_jax.models import config, transformer

VOCAB = 37

ANCHOR = config.TransformerConfig(
  vocab_size=VOCAB,
  num_layers=5,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  init_stddev=1.0,
)
AUGMENTING = config.TransformerConfig(
  vocab_size=VOCAB,
  num_layers=4,
  embed_dim=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=12,
  mlp_dim=40,
  init_stddev=1.0,
)
# What each family does differently, at toy size.
FAMILIES = {
  'llama': {},
  'multi_query': {'num_kv_heads': 1},
  'gemma': {
    'norm_offset': 1.0,
    'activation': 'gelu_tanh',
    'embed_scale': 32**0.5,
  },
  'gemma2': {
    'norm_offset': 1.0,
    'activation': 'gelu_tanh',
    'norm_placement': 'sandwich',
    'attention_softcap': 5.0,
    'final_softcap': 3.0,
    'window_pattern': (3, None),
  },
  'gemma3': {
    'norm_offset': 1.0,
    'norm_placement': 'sandwich',
    'query_key_norm': 'rms',
    'window_pattern': (4, 4, None),
    'rope_theta': 1e6,
    'rope_theta_local': 1e4,
  },
  'mistral': {'window_pattern': (5,)},
  'qwen2': {'attention_bias': 'qkv', 'tie_embeddings': False},
  'qwen3': {'query_key_norm': 'rms', 'head_dim': 16},
  't5x': {
    'position_encoding': 'relative_bias',
    'relative_buckets': 8,
    'relative_max_distance': 6,
    'attention_scale': 1.0,
    'logits_scale': 32**-0.5,
    'mlp': 'plain',
    'activation': 'relu',
  },
}

_T5_ENCODER = {
  'attention': 'bidirectional',
  'position_encoding': 'relative_bias',
  'relative_buckets': 8,
  'relative_max_distance': 6,
  'attention_scale': 1.0,
}
ENCODERS = {
  't5': {**_T5_ENCODER, 'mlp': 'plain', 'activation': 'relu'},
  'mt5': {**_T5_ENCODER, 'activation': 'gelu_tanh'},
}


def connection(anchor_layer, augmenting_layer, augmenting='code'):
  return connections.Connection(
    anchor_layer=anchor_layer,
    augmenting_layer=augmenting_layer,
    augmenting=augmenting,
  )


MAPPING = (connection(-1, 3), connection(1, 1), connection(3, 2))


def composed(
  *,
  anchor=ANCHOR,
  augmenting=None,
  mapping=MAPPING,
  stack='loop',
  output_init='fan_in',
  remat=False,
  **settings,
):
  """A composed model; `fan_in` output, so that the composition is felt."""
  augmenting = augmenting or {'code': AUGMENTING}
  return composition.ComposedLM(
    transformer.DecoderLM(anchor, stack=stack),
    augmenting={
      name: assembly.build_tower(one, stack=stack)
      for name, one in augmenting.items()
    },
    composition=connections.CompositionConfig(
      mapping=connections.LayerMapping.explicit(mapping),
      output_init=output_init,
      **settings,
    ),
    remat=remat,
  )


def with_dtype(cfg, dtype):
  return dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)


def init(model, seed=0):
  return jax.jit(lambda key: nn.unbox(model.init_params(key)))(
    jax.random.key(seed)
  )


def tokens(shape, seed=0):
  return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)


def batch_of(tokens_BT, segment_ids_BT=None):
  """A batch that predicts each next token; positions restart by segment."""
  tokens_BT = np.asarray(tokens_BT, np.int32)
  if segment_ids_BT is None:
    segment_ids_BT = np.ones_like(tokens_BT)
  segment_ids_BT = np.asarray(segment_ids_BT, np.int32)
  positions_BT = np.zeros_like(tokens_BT)
  for b, row in enumerate(segment_ids_BT):
    for t in range(1, len(row)):
      if row[t] == row[t - 1]:
        positions_BT[b, t] = positions_BT[b, t - 1] + 1
  same = segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]
  real = segment_ids_BT[:, 1:] > 0
  weights_BT = np.pad((same & real).astype(np.float32), ((0, 0), (0, 1)))
  return {
    'decoder_input_tokens': tokens_BT,
    'decoder_target_tokens': np.roll(tokens_BT, -1, axis=1),
    'decoder_positions': positions_BT,
    'decoder_segment_ids': segment_ids_BT,
    'decoder_loss_weights': weights_BT,
  }


def logits(model, params, batch):
  return np.asarray(jax.jit(model.__call__)(params, batch))


def assert_close(actual, expected):
  """'Close' of the design: 1e-5 of the scale, and equal argmax."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  bound = 1e-5 * max(1.0, float(np.abs(expected).max()))
  assert np.abs(actual - expected).max() <= bound
  top = np.sort(expected, axis=-1)
  clear = top[..., -1] - top[..., -2] > 2 * bound
  same = actual.argmax(-1) == expected.argmax(-1)
  assert np.all(same | ~clear)


def jnp_batch(batch):
  return {name: jnp.asarray(value) for name, value in batch.items()}
