"""Small random models of `transformers`, and ours with their weights.

All parameters are random: norms at one and biases at zero, as they are
initialised, would hide what is wrong with them.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from calm_jax import trees
from calm_jax.models import attention, encoder, families, transformer

VOCAB = 61
DECODER = {
  'vocab_size': VOCAB,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
}
ENCODER = {
  'vocab_size': VOCAB,
  'd_model': 32,
  'd_kv': 12,
  'd_ff': 40,
  'num_layers': 2,
  'num_heads': 4,
}
EYES = {
  'vision_config': {
    'hidden_size': 16,
    'intermediate_size': 16,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'image_size': 28,
    'patch_size': 14,
  },
  'mm_tokens_per_image': 4,
  'image_token_index': VOCAB - 1,
}


def make(model_type, *, seed=0, **fields):
  """A model of `transformers` in float32, all of it random."""
  import torch

  sizes = ENCODER if model_type in ('t5', 'mt5') else DECODER
  if model_type == 'gemma3':
    fields = {'text_config': {**sizes, **fields}, **EYES}
    sizes = {}
  model = build({'model_type': model_type, **sizes, **fields})
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, one in model.named_parameters():
      one.copy_(_random(name, torch.randn(one.shape), model_type))
  return model.eval()


def build(fields):
  """A model of `transformers` by the fields of a `config.json`."""
  import transformers

  model_type = fields['model_type']
  config = transformers.CONFIG_MAPPING[model_type].from_dict(fields)
  config._attn_implementation = 'eager'
  name = {
    't5': 'T5EncoderModel',
    'mt5': 'MT5EncoderModel',
    'gemma3': 'Gemma3ForConditionalGeneration',
  }.get(model_type)
  if name:
    return getattr(transformers, name)(config).eval()
  return transformers.AutoModelForCausalLM.from_config(config).eval()


def _random(name, noise, model_type):
  if 'norm' in name:
    return 0.3 * noise + (0.0 if model_type.startswith('gemma') else 1.0)
  if noise.ndim == 1:
    return 0.5 * noise
  if 'embed' in name or 'shared' in name:
    return 0.5 * noise
  if 'relative' in name:
    return noise
  return noise / noise.shape[1] ** 0.5


def save(model, directory):
  """Writes it as users get it; returns config fields and tensors."""
  model.save_pretrained(directory)
  fields = json.loads((directory / 'config.json').read_text())
  tensors = {}
  for file in directory.glob('*.safetensors'):
    tensors |= safetensors_numpy.load_file(file)
  return fields, tensors


def read(fields, tensors, **changes):
  """Returns our module and its parameters; checks that all names fit."""
  config = families.config_from(fields, where='config.json')
  model_type = fields['model_type']
  stored = families.sources(config, model_type=model_type, available=tensors)
  used = {source.name for source in stored.values()}
  for name in tensors.keys() - used:
    assert families.left_out(model_type, name, config), name
  params = {
    name: tensors[source.name].T if source.transposed else tensors[source.name]
    for name, source in stored.items()
  }
  config = dataclasses.replace(config, **changes)
  module = transformer.DecoderLM
  if config.attention == 'bidirectional':
    module = encoder.EncoderLM
  return module(config), trees.unflatten(params)


def positions_of(mask_BT):
  """Positions that count real tokens only."""
  return np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0).astype(np.int32)


@functools.partial(jax.jit, static_argnames='model')
def _apply(model, params, tokens_BT, positions_BT, segment_ids_BT):
  if isinstance(model, encoder.EncoderLM):
    where = attention.Positions.bidirectional(positions_BT, segment_ids_BT)
    states, _ = model.apply(
      {'params': params},
      tokens_BT,
      where,
      layers=tuple(range(model.depth)),
      method='hidden_states',
    )
    return [states[layer] for layer in range(model.depth)]
  where = attention.Positions.full(positions_BT, segment_ids_BT)
  return model.apply({'params': params}, tokens_BT, where)


def ours(model, params, tokens_BT, mask_BT):
  """Logits, or an encoder's hidden states after each block."""
  out = _apply(
    model,
    params,
    jnp.asarray(tokens_BT),
    jnp.asarray(positions_of(mask_BT)),
    jnp.asarray(mask_BT, jnp.int32),
  )
  return jax.tree.map(lambda x: np.asarray(x, np.float32), out)


def theirs(model, tokens_BT, mask_BT):
  """The same of `transformers`."""
  import torch

  tokens_BT = torch.from_numpy(np.asarray(tokens_BT, np.int64))
  mask = torch.from_numpy(np.asarray(mask_BT, np.int64))
  with torch.no_grad():
    if model.config.model_type in ('t5', 'mt5'):
      # The last hidden state that transformers gives is behind its norm.
      seen = []
      hooks = [
        block.register_forward_hook(lambda module, x, y: seen.append(y[0]))
        for block in model.encoder.block
      ]
      model(input_ids=tokens_BT, attention_mask=mask)
      for hook in hooks:
        hook.remove()
      return [one.float().numpy() for one in seen]
    positions_BT = torch.from_numpy(positions_of(mask_BT).astype(np.int64))
    out = model(
      input_ids=tokens_BT, attention_mask=mask, position_ids=positions_BT
    )
  return out.logits.float().numpy()
