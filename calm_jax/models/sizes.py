"""Published models by name: `sizes.config('gemma_2b')`.

Each size is what its `config.json` says where it differs from the family's
defaults, and the number of parameters: that of the tensors in its checkpoint on
Hugging Face, a tied output matrix counted once.
"""

from collections.abc import Mapping
import dataclasses
import difflib
from typing import Any

from calm_jax.models import families
from calm_jax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Size:
  """One published model.

  Attributes:
    model_type: its family.
    parameters: how many numbers its checkpoint holds.
    fields: of its `config.json`.
  """

  model_type: str
  parameters: int
  fields: Mapping[str, Any]


def _size(
  model_type: str,
  parameters: int,
  sizes: tuple[int, int, int, int, int],
  **fields: Any,
) -> Size:
  """Sizes: width, feed-forward, layers, heads, key/value heads."""
  names = (
    'hidden_size intermediate_size num_hidden_layers num_attention_heads'
    ' num_key_value_heads'
  )
  both = {**dict(zip(names.split(), sizes, strict=True)), **fields}
  return Size(model_type, parameters, both)


_GEMMA3 = {
  'sliding_window': 1024,
  'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
}
_LLAMA2 = {'vocab_size': 32000, 'rms_norm_eps': 1e-5}
_LLAMA3 = {'vocab_size': 128256, 'rope_theta': 500_000.0, 'rms_norm_eps': 1e-5}
_LLAMA32_ROPE = {
  'rope_type': 'llama3',
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
_TINY = (32, 48, 4, 4, 2)
_TINY_WINDOW = {'vocab_size': 128, 'head_dim': 8, 'sliding_window': 8}
_TINY_T5 = {
  'vocab_size': 128,
  'd_model': 32,
  'd_kv': 8,
  'd_ff': 48,
  'num_layers': 4,
  'num_heads': 4,
}

_SIZES = {
  # huggingface.co/google/gemma-2b, gemma-7b
  'gemma_2b': _size('gemma', 2_506_172_416, (2048, 16384, 18, 8, 1)),
  'gemma_7b': _size('gemma', 8_537_680_896, (3072, 24576, 28, 16, 16)),
  # google/gemma-2-2b, gemma-2-9b, gemma-2-27b
  'gemma2_2b': _size('gemma2', 2_614_341_888, (2304, 9216, 26, 8, 4)),
  'gemma2_9b': _size('gemma2', 9_241_705_984, (3584, 14336, 42, 16, 8)),
  'gemma2_27b': _size(
    'gemma2',
    27_227_128_320,
    (4608, 36864, 46, 32, 16),
    head_dim=128,
    query_pre_attn_scalar=144,
  ),
  # google/gemma-3-1b-pt
  'gemma3_1b': _size(
    'gemma3_text',
    999_885_952,
    (1152, 6912, 26, 4, 1),
    vocab_size=262144,
    sliding_window=512,
  ),
  # google/gemma-3-4b-pt, -12b-pt, -27b-pt: 4,300,079,472, 12,187,325,040 and
  # 27,432,406,640, less the vision tower of 416,866,032 and a projector of
  # 1152 (width + 1).
  'gemma3_4b': _size(
    'gemma3_text', 3_880_263_168, (2560, 10240, 34, 8, 4), **_GEMMA3
  ),
  'gemma3_12b': _size(
    'gemma3_text', 11_766_034_176, (3840, 15360, 48, 16, 8), **_GEMMA3
  ),
  'gemma3_27b': _size(
    'gemma3_text',
    27_009_346_304,
    (5376, 21504, 62, 32, 16),
    head_dim=128,
    query_pre_attn_scalar=168,
    **_GEMMA3,
  ),
  # meta-llama/Llama-2-7b-hf, and of its form TinyLlama/TinyLlama_v1.1
  'llama2_7b': _size(
    'llama', 6_738_415_616, (4096, 11008, 32, 32, 32), **_LLAMA2
  ),
  'llama2_1.1b': _size(
    'llama', 1_100_048_384, (2048, 5632, 22, 32, 4), **_LLAMA2
  ),
  # meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B, Llama-3.2-1B
  'llama3_8b': _size(
    'llama', 8_030_261_248, (4096, 14336, 32, 32, 8), **_LLAMA3
  ),
  'llama3_70b': _size(
    'llama', 70_553_706_496, (8192, 28672, 80, 64, 8), **_LLAMA3
  ),
  'llama3.2_1b': _size(
    'llama',
    1_235_814_400,
    (2048, 8192, 16, 32, 8),
    tie_word_embeddings=True,
    rope_scaling=_LLAMA32_ROPE,
    **_LLAMA3,
  ),
  # mistralai/Mistral-7B-v0.1
  'mistral_7b': _size(
    'mistral', 7_241_732_096, (4096, 14336, 32, 32, 8), rms_norm_eps=1e-5
  ),
  # Qwen/Qwen2.5-7B
  'qwen2.5_7b': _size(
    'qwen2',
    7_615_616_512,
    (3584, 18944, 28, 28, 4),
    vocab_size=152064,
    rope_theta=1e6,
  ),
  # Qwen/Qwen3-0.6B (its checkpoint holds the tied matrix twice), Qwen3-8B
  'qwen3_0.6b': _size(
    'qwen3',
    596_049_920,
    (1024, 3072, 28, 16, 8),
    tie_word_embeddings=True,
    rope_theta=1e6,
  ),
  'qwen3_8b': _size(
    'qwen3', 8_190_735_360, (4096, 12288, 36, 32, 8), rope_theta=1e6
  ),
  # Ours, for trying things out.
  'gemma_tiny': _size('gemma', 35_104, _TINY, vocab_size=128, head_dim=8),
  'gemma2_tiny': _size('gemma2', 35_360, _TINY, **_TINY_WINDOW),
  'gemma3_tiny': _size('gemma3_text', 35_424, _TINY, **_TINY_WINDOW),
  'llama2_tiny': _size(
    'llama', 39_200, _TINY, **{**_LLAMA2, 'vocab_size': 128}
  ),
  'llama3_tiny': _size(
    'llama', 39_200, _TINY, **{**_LLAMA3, 'vocab_size': 128}
  ),
  'mistral_tiny': _size('mistral', 39_200, _TINY, **_TINY_WINDOW),
  'qwen2.5_tiny': _size('qwen2', 39_456, _TINY, vocab_size=128),
  'qwen3_tiny': _size('qwen3', 39_264, _TINY, vocab_size=128, head_dim=8),
  't5_tiny': Size('t5', 33_184, _TINY_T5),
  'mt5_tiny': Size('mt5', 39_328, _TINY_T5),
}
NAMES = tuple(_SIZES)


def parameters(name: str) -> int:
  """Returns how many parameters the model has; a tied matrix counts once."""
  return _get(name).parameters


def model_type(name: str) -> str:
  """Returns the family of a size, as Hugging Face names it."""
  return _get(name).model_type


def config(name: str) -> TransformerConfig:
  """Returns the configuration of a published model, in bfloat16.

  Raises:
    ValueError: if there is none of that name.
  """
  size = _get(name)
  fields = {
    'model_type': size.model_type,
    'torch_dtype': 'bfloat16',
    **size.fields,
  }
  return families.config_from(fields, where=name)


def check(found: TransformerConfig, *, name: str, where: str) -> None:
  """Refuses a configuration that is not that of the named size.

  Args:
    found: what a directory says.
    name: the size that is wanted.
    where: the directory, for the error.

  Raises:
    ValueError: naming the first field that differs. Dtypes may, and what
      fresh weights would begin as.
  """
  wanted = config(name)
  for field in dataclasses.fields(wanted):
    pair = getattr(found, field.name), getattr(wanted, field.name)
    free = field.name in ('dtype', 'param_dtype', 'init_stddev')
    if pair[0] != pair[1] and not free:
      raise ValueError(
        f'{where} is not a {name}: {field.name} = {pair[0]!r}, expected'
        f' {pair[1]!r}. Give the directory of that model, or another size.'
      )


def _get(name: str) -> Size:
  if name in _SIZES:
    return _SIZES[name]
  close = difflib.get_close_matches(str(name), NAMES, n=1)
  meant = f' Did you mean {close[0]!r}?' if close else ''
  raise ValueError(f'size = {name!r} is not one of {NAMES}.{meant}')
