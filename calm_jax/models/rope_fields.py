"""Rotary positions in a `config.json`: all spellings, read and written.

`transformers` 4 has `rope_theta` and `rope_scaling` (Gemma 3:
`rope_local_base_freq` too), version 5 has `rope_parameters`, for Gemma 3 one
object for each type of layer. We read both, and write the older, which both
read. The arithmetic is that of version 5, but that it drops Gemma 3's scaling
where the older `type` stands for `rope_type`, and we do not.
"""

import math
from typing import Any

from calm_jax.models.config_fields import Fields
from calm_jax.models.layers import RopeScaling

FULL, SLIDING = 'full_attention', 'sliding_attention'
THETA, THETA_LOCAL, THETA_GLOBAL = 10_000.0, 10_000.0, 1_000_000.0
# Names in the file to those of RopeScaling, by kind.
_NAMES = {
  'linear': {'factor': 'factor'},
  'dynamic': {'factor': 'factor'},
  'llama3': {
    'factor': 'factor',
    'original_max_position_embeddings': 'original_length',
    'low_freq_factor': 'low_freq_factor',
    'high_freq_factor': 'high_freq_factor',
  },
  'yarn': {
    'factor': 'factor',
    'original_max_position_embeddings': 'original_length',
    'attention_factor': 'attention_factor',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'truncate': 'truncate',
  },
}


def read_rope(read: Fields) -> dict[str, Any]:
  """Returns the rotary fields of a `TransformerConfig`.

  Raises:
    ValueError: if the kind is not supported, two fields contradict each
      other, or one is not known.
  """
  length = read.size('max_position_embeddings')
  theta = read.number('rope_theta', nullable=True)
  scaling = read.object('rope_scaling')
  both = read.object('rope_parameters')
  if scaling and both:
    read.refuse(
      'rope_parameters', both, 'rope_scaling is there too; leave one out'
    )
  if 'rope_local_base_freq' not in read:
    name = 'rope_parameters' if both else 'rope_scaling'
    theta, scaling = _parse(read, name, both or scaling, theta, length)
    return {'rope_theta': theta or THETA, 'rope_scaling': scaling}

  local = read.number('rope_local_base_freq', nullable=True)
  if both:
    if both.keys() - {FULL, SLIDING}:
      read.refuse(
        'rope_parameters', both, f'expected an object with {FULL} and {SLIDING}'
      )
    scaling = both.get(FULL)
    name = f'rope_parameters.{SLIDING}'
    local, local_scaling = _parse(read, name, both.get(SLIDING), local, length)
    if local_scaling is not None:
      read.refuse(name, both[SLIDING], "supported here is 'default' alone")
  name = f'rope_parameters.{FULL}' if both else 'rope_scaling'
  theta, scaling = _parse(read, name, scaling, theta, length)
  return {
    'rope_theta': theta or THETA_GLOBAL,
    'rope_theta_local': local or THETA_LOCAL,
    'rope_scaling': scaling,
  }


def _parse(
  read: Fields, name: str, fields: Any, theta: float | None, length: int
) -> tuple[float | None, RopeScaling | None]:
  """Reads one object; `theta` is what the file says beside it."""
  if not fields:
    return theta, None
  if not isinstance(fields, dict):
    read.refuse(name, fields, 'expected an object or null')
  kind = fields.get('rope_type', fields.get('type', 'default'))
  if fields.get('type', kind) != kind:
    read.refuse(name, fields, 'type and rope_type contradict each other')
  if kind not in ('default', *_NAMES):
    read.refuse(
      f'{name}.rope_type', kind, f'supported are {["default", *_NAMES]}'
    )
  names = _NAMES.get(kind, {})
  defaults = {
    'rope_theta': None,
    'partial_rotary_factor': None,
    'rope_type': None,
    'type': None,
    **dict.fromkeys(names),
  }
  if kind in ('linear', 'dynamic'):  # not read by these
    defaults['original_max_position_embeddings'] = None
  if kind == 'yarn':
    defaults |= {'mscale': None, 'mscale_all_dim': None, 'truncate': True}
  inner = Fields(fields, where=f'{read.where}: {name}', defaults=defaults)
  own = inner.number('rope_theta', nullable=True)
  if own and theta and own != theta:
    read.refuse('rope_theta', theta, f'{name} has another, {own}')
  if inner.pop('partial_rotary_factor') not in (None, 1.0):
    read.refuse(
      name, fields, 'partial_rotary_factor: supported here is 1 alone'
    )
  inner.pop('rope_type'), inner.pop('type')
  theta = own or theta
  if kind == 'default':
    inner.finish()
    return theta, None
  return theta, _scaling(inner, kind, length)


def _scaling(inner: Fields, kind: str, length: int) -> RopeScaling:
  found: dict[str, Any] = {}
  for name, ours in _NAMES[kind].items():
    if name == 'original_max_position_embeddings':
      found[ours] = inner.size(name, null=length)
    elif name == 'truncate':
      found[ours] = inner.flag(name)
    else:
      value = inner.number(name, nullable=kind == 'yarn')
      if value is not None:
        found[ours] = value
  if kind in ('linear', 'dynamic'):
    inner.pop('original_max_position_embeddings')
  if kind == 'dynamic':
    found['original_length'] = length
  if kind == 'yarn':
    found.setdefault('factor', length / found['original_length'])
    scales = [
      inner.number(name, nullable=True) for name in ('mscale', 'mscale_all_dim')
    ]
    if all(scales) and 'attention_factor' not in found:
      above, below = (_mscale(found['factor'], scale) for scale in scales)
      found['attention_factor'] = above / below
  inner.finish()
  try:
    return RopeScaling(kind, **found)
  except ValueError as error:
    raise ValueError(f'{inner.where}: {error}') from error


def _mscale(factor: float, scale: float) -> float:
  """DeepSeek's temperature of YaRN (arXiv 2309.00071, equation 22)."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def write_rope(config: Any, *, by_layer_type: bool) -> dict[str, Any]:
  """Returns the fields for a `TransformerConfig`; inverse of `read_rope`."""
  fields = {'rope_theta': config.rope_theta, 'rope_scaling': None}
  if by_layer_type:
    fields['rope_local_base_freq'] = config.rope_theta_local
  scaling = config.rope_scaling
  if scaling is not None:
    fields['rope_scaling'] = {
      'rope_type': scaling.kind,
      **{
        name: getattr(scaling, ours)
        for name, ours in _NAMES[scaling.kind].items()
        if getattr(scaling, ours) is not None
      },
    }
    if scaling.kind != 'linear':  # which says nothing about lengths
      factor = 1 if scaling.kind == 'dynamic' else scaling.factor
      length = round(scaling.original_length * factor)
      fields['max_position_embeddings'] = length
  return fields
