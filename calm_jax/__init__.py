"""calm_jax: compose frozen language models by trained cross-attention."""

import importlib

__version__ = '0.1.0'

_PUBLIC = {
  'Model': 'model',
  'attention_map': 'attention_maps',
  'compose': 'api',
  'load_composition': 'api',
  'load_lora': 'api',
  'load_pretrained': 'api',
  'ComposedLM': 'composition',
  'CompositionConfig': 'connections',
  'Connection': 'connections',
  'LayerMapping': 'connections',
  'LoraConfig': 'lora',
  'DecodingConfig': 'sampling',
  'DecoderLM': 'models.transformer',
  'QuantizationConfig': 'quantization',
  'TransformerConfig': 'models.config',
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
  """Imports a public name when it is first used; `import calm_jax` is cheap."""
  if name not in _PUBLIC:
    raise AttributeError(f'calm_jax has no {name!r}; it has {__all__}.')
  return getattr(importlib.import_module(f'calm_jax.{_PUBLIC[name]}'), name)
