"""Model families as Hugging Face stores them: configuration and names.

`config_from` reads the fields of a `config.json`, `config_to` writes them,
and `sources` says under which name each of our parameters is stored.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import re
from typing import Any

from calm_jax.models import family_tables, rope_fields, tensor_names
from calm_jax.models.config import TransformerConfig
from calm_jax.models.config_fields import Fields
from calm_jax.models.family_tables import Family

MODEL_TYPES = family_tables.MODEL_TYPES
Source = tensor_names.Source
sources = tensor_names.sources
left_out = tensor_names.left_out
ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'gelu_new': 'gelu_tanh',
  'relu': 'relu',
}
FEED_FORWARDS = {
  **{name: ('plain', ours) for name, ours in ACTIVATIONS.items()},
  **{f'gated-{name}': ('gated', ours) for name, ours in ACTIVATIONS.items()},
  'gated-gelu': ('gated', 'gelu_tanh'),
}
MOST_LAYERS = 10_000
DTYPES = ('float32', 'bfloat16', 'float16')
SOFTCAPS = {
  'attn_logit_softcapping': 'attention_softcap',
  'final_logit_softcapping': 'final_softcap',
}


# --- Reading -----------------------------------------------------------------


def config_from(fields: Mapping[str, Any], *, where: str) -> TransformerConfig:
  """Reads a parsed `config.json` of Hugging Face.

  Args:
    fields: the JSON object.
    where: the file, for errors.

  Returns:
    The configuration; `dtype` and `param_dtype` are those of the weights.

  Raises:
    ValueError: if a field has the wrong type or a value that is not
      supported, or is not known and might change the computation.
  """
  if not isinstance(fields, Mapping):
    raise ValueError(f'{where} holds {fields!r}; expected a JSON object.')
  family = _known(fields.get('model_type'), where)
  if fields['model_type'] == 'gemma3':
    fields, where = _text_part(fields, where), f'{where}: text_config'
  read = Fields(fields, where=where, defaults=family.defaults)
  is_encoder = fields['model_type'] in family_tables.ENCODERS
  values = (_read_encoder if is_encoder else _read_decoder)(read, family)
  names = [read.pop(name) for name in ('dtype', 'torch_dtype')]
  dtype = names[0] or names[1] or 'float32'
  if dtype not in DTYPES:
    read.refuse('dtype', dtype, f'supported are {DTYPES}')
  read.finish(harmless=family_tables.T5_HARMLESS if is_encoder else ())
  # float16 overflows where bfloat16 does not: it is for storage only.
  compute = 'float32' if dtype == 'float16' else dtype
  try:
    return TransformerConfig(**values, dtype=compute, param_dtype=dtype)
  except ValueError as error:
    raise ValueError(f'{where}: {error}') from error


def _known(model_type: Any, where: str) -> Family:
  """Returns the family of a `model_type`, or raises a ValueError."""
  if model_type == 'gemma3':
    return family_tables.FAMILIES['gemma3_text']
  if isinstance(model_type, str) and model_type in family_tables.FAMILIES:
    return family_tables.FAMILIES[model_type]
  text = (
    f'{where}: model_type = {model_type!r} is not known; expected one of'
    f" {MODEL_TYPES}, or 'calm_jax', our own."
  )
  if model_type == 'umt5':
    text += ' umT5 has a relative-position bias in each layer, others one.'
  # Models of like names are other models: mixtral, mistral3, qwen2_moe.
  name = str(model_type).lower()
  for close in difflib.get_close_matches(name, MODEL_TYPES, n=1, cutoff=0.87):
    if re.sub(r'\D', '', close) == re.sub(r'\D', '', name):
      text += f' Did you mean {close!r}?'
  raise ValueError(text)


def _text_part(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
  """Returns the fields of Gemma 3's language model, without its eyes."""
  top = Fields(
    fields,
    where=where,
    defaults={
      'text_config': None,
      **dict.fromkeys(('tie_word_embeddings', 'dtype', 'torch_dtype')),
    },
  )
  inner = top.object('text_config')
  if inner is None:
    top.refuse('text_config', None, 'expected an object')
  tied = top.pop('tie_word_embeddings')  # of the whole model, whatever the part
  inner['tie_word_embeddings'] = True if tied is None else tied
  for name in ('dtype', 'torch_dtype'):
    value = top.pop(name)
    if value is not None and inner.setdefault(name, value) != value:
      top.refuse(name, value, f'text_config has another, {inner[name]!r}')
  top.finish(harmless=family_tables.GEMMA3_EYES)
  if inner.get('model_type', 'gemma3_text') != 'gemma3_text':
    top.refuse(
      'text_config.model_type', inner['model_type'], "expected 'gemma3_text'"
    )
  return {**inner, 'model_type': 'gemma3_text'}


def _read_decoder(read: Fields, family: Family) -> dict[str, Any]:
  width = read.size('hidden_size')
  heads = read.size('num_attention_heads')
  depth = read.size('num_hidden_layers', most=MOST_LAYERS)
  head_dim = read.size('head_dim', null=None)
  if head_dim is None:
    if width % heads:
      read.refuse(
        'hidden_size', width, f'not a multiple of num_attention_heads = {heads}'
      )
    head_dim = width // heads
  values = {
    'vocab_size': read.size('vocab_size'),
    'num_layers': depth,
    'embed_dim': width,
    'num_heads': heads,
    'num_kv_heads': read.size('num_key_value_heads', null=heads),
    'head_dim': head_dim,
    'mlp_dim': read.size('intermediate_size'),
    'activation': _read_activation(read, family),
    'norm_epsilon': read.number('rms_norm_eps'),
    'tie_embeddings': read.flag('tie_word_embeddings'),
    'init_stddev': read.number('initializer_range'),
    'window_pattern': _read_windows(read, family, depth),
    'embed_scale': width**0.5 if family.scaled_embeddings else 1.0,
    **family.constants,
    **rope_fields.read_rope(read),
  }
  if 'attention_bias' in read and read.flag('attention_bias'):
    values['attention_bias'] = 'all'
  if 'mlp_bias' in read:
    values['mlp_bias'] = read.flag('mlp_bias')
  if 'query_pre_attn_scalar' in read:
    values['attention_scale'] = read.number('query_pre_attn_scalar') ** -0.5
  for name, ours in SOFTCAPS.items():
    if name in read:
      values[ours] = read.number(name, nullable=True)
  return values


def _read_activation(read: Fields, family: Family) -> str:
  if 'hidden_activation' not in read:
    return read.choice('hidden_act', ACTIVATIONS)
  # Gemma: in hidden_act, 'gelu' is an old slip for the tanh form.
  older = {**ACTIVATIONS, 'gelu': 'gelu_tanh'}
  one = read.choice('hidden_act', older, nullable=True)
  two = read.choice('hidden_activation', ACTIVATIONS, nullable=True)
  if one and two and one != two:
    read.refuse('hidden_activation', two, f'hidden_act says {one}')
  found = {'hidden_act': one, 'hidden_activation': two}
  said = found.pop(family.activation_field)
  ((other, ignored),) = found.items()
  if said is None and ignored not in (None, 'gelu_tanh'):
    read.refuse(
      other,
      ignored,
      f'models of this kind read {family.activation_field}, which is not given',
    )
  return said or 'gelu_tanh'


def _read_windows(
  read: Fields, family: Family, depth: int
) -> tuple[int | None, ...]:
  """Returns the shortest pattern of windows that repeats."""
  if 'sliding_window' not in read:
    return (None,)
  window = read.size('sliding_window', null=None)
  if 'sliding_window_size' in read:  # Gemma 2 9B says it twice
    again = read.size('sliding_window_size', null=None)
    if again not in (None, window):
      read.refuse('sliding_window_size', again, f'sliding_window is {window}')
  if 'use_sliding_window' in read and not read.flag('use_sliding_window'):
    window = None
  slides = [True] * depth if window else [False] * depth
  if 'max_window_layers' in read:
    first = read.size('max_window_layers', null=0, least=0)
    slides = [window is not None and i >= first for i in range(depth)]
  every = family.window_every
  if 'sliding_window_pattern' in read:
    every = read.size('sliding_window_pattern')
  if every:
    slides = [bool((i + 1) % every) for i in range(depth)]
  if 'layer_types' in read:
    types = read.words(
      'layer_types',
      count=depth,
      allowed=(rope_fields.FULL, rope_fields.SLIDING),
    )
    slides = (
      [kind == rope_fields.SLIDING for kind in types] if types else slides
    )
  if any(slides) and window is None:
    read.refuse('sliding_window', None, 'some layers need a window')
  windows = [window if one else None for one in slides]
  for period in range(1, depth + 1):
    if all(windows[i] == windows[i % period] for i in range(depth)):
      break
  return tuple(windows[:period])


def _read_encoder(read: Fields, family: Family) -> dict[str, Any]:
  del family
  heads = read.size('num_heads')
  mlp, activation = read.choice('feed_forward_proj', FEED_FORWARDS)
  act = read.choice('dense_act_fn', ACTIVATIONS, nullable=True)
  if act not in (None, activation):
    read.refuse('dense_act_fn', act, f'feed_forward_proj says {activation}')
  gated = read.pop('is_gated_act')
  if gated not in (None, mlp == 'gated'):
    read.refuse('is_gated_act', gated, f'feed_forward_proj says {mlp}')
  return {
    'vocab_size': read.size('vocab_size'),
    'num_layers': read.size('num_layers', most=MOST_LAYERS),
    'embed_dim': read.size('d_model'),
    'num_heads': heads,
    'num_kv_heads': heads,
    'head_dim': read.size('d_kv'),
    'mlp_dim': read.size('d_ff'),
    'mlp': mlp,
    'activation': activation,
    'norm_epsilon': read.number('layer_norm_epsilon'),
    'init_stddev': read.number('initializer_factor'),
    'attention': 'bidirectional',
    'attention_scale': 1.0,  # it is in the weights (arXiv 1910.10683)
    'position_encoding': 'relative_bias',
    'relative_buckets': read.size('relative_attention_num_buckets'),
    'relative_max_distance': read.size('relative_attention_max_distance'),
  }


# --- Writing -----------------------------------------------------------------


def config_to(config: TransformerConfig, *, model_type: str) -> dict[str, Any]:
  """Writes the fields of a `config.json`; inverse of `config_from`.

  Args:
    config: what to write; its dtype of computation is not stored.
    model_type: the family; of 'gemma3' the text part, 'gemma3_text'.

  Raises:
    ValueError: if the family has no fields for something in `config`.
  """
  family = _known(model_type, 'export')
  model_type = 'gemma3_text' if model_type == 'gemma3' else model_type
  encoder = model_type in family_tables.ENCODERS
  values = _encoder_fields(config) if encoder else _decoder_fields(config)
  fields = {
    'architectures': [family.architecture],
    'model_type': model_type,
    **{name: values[name] for name in family.defaults if name in values},
    'torch_dtype': config.param_dtype,
  }
  if family.activation_field == 'hidden_activation':  # Gemma 2 and 3
    fields.pop('hidden_act', None)  # theirs is named otherwise
    # Where no layer slides, transformers wants a size all the same.
    fields['sliding_window'] = fields['sliding_window'] or 4096
  again = config_from(fields, where=f'export as {model_type}')
  wrong = [
    f'{field.name} = {getattr(config, field.name)!r}'
    for field in dataclasses.fields(config)
    if field.name != 'dtype'
    and getattr(config, field.name) != getattr(again, field.name)
  ]
  if wrong:
    raise ValueError(
      f'A {model_type} model cannot have {", ".join(wrong)}. Export it as'
      f' another of {MODEL_TYPES}, or in our own format.'
    )
  return fields


def _activation_name(ours: str) -> str:
  return 'gelu_pytorch_tanh' if ours == 'gelu_tanh' else ours


def _decoder_fields(config: TransformerConfig) -> dict[str, Any]:
  """Returns all fields that some family of decoders has."""
  activation = _activation_name(config.activation)
  windows = config.windows
  sizes = {window for window in windows if window is not None}
  slides = [window is not None for window in windows]
  first = slides.index(True) if sizes else config.num_layers
  local = config.rope_theta_local
  return {
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'intermediate_size': config.mlp_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'hidden_act': activation,
    'hidden_activation': activation,
    'rms_norm_eps': config.norm_epsilon,
    'initializer_range': config.init_stddev,
    'tie_word_embeddings': config.tie_embeddings,
    'attention_bias': config.attention_bias == 'all',
    'mlp_bias': config.mlp_bias,
    'query_pre_attn_scalar': round(config.attention_scale**-2),
    'attn_logit_softcapping': config.attention_softcap,
    'final_logit_softcapping': config.final_softcap,
    'sliding_window': max(sizes, default=None),
    'use_sliding_window': bool(sizes),
    'max_window_layers': first,
    'layer_types': [
      rope_fields.SLIDING if one else rope_fields.FULL for one in slides
    ],
    **rope_fields.write_rope(config, by_layer_type=local is not None),
  }


def _encoder_fields(config: TransformerConfig) -> dict[str, Any]:
  gated = 'gated-' if config.mlp == 'gated' else ''
  activation = _activation_name(config.activation)
  # This one name is read by all versions.
  if gated and config.activation == 'gelu_tanh':
    activation = 'gelu'
  return {
    'vocab_size': config.vocab_size,
    'num_layers': config.num_layers,
    'd_model': config.embed_dim,
    'num_heads': config.num_heads,
    'd_kv': config.head_dim,
    'd_ff': config.mlp_dim,
    'feed_forward_proj': gated + activation,
    'layer_norm_epsilon': config.norm_epsilon,
    'initializer_factor': config.init_stddev,
    'relative_attention_num_buckets': config.relative_buckets,
    'relative_attention_max_distance': config.relative_max_distance,
  }
