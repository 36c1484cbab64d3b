"""`TransformerConfig`: what fixes the computation of a decoder."""

import dataclasses
import math
import numbers
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from calm_jax.array_types import Array
from calm_jax.models import layers

NO_WINDOW = 2**30  # positions; further back than any sequence is long
SIZES = (
  'vocab_size num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim'
  ' relative_buckets relative_max_distance'
).split()
FLAGS = 'mlp_bias', 'tie_embeddings'
# The least value of each number; None is anything above 0.
NUMBERS = {
  'norm_offset': -math.inf,
  'norm_epsilon': 0.0,
  'attention_scale': None,
  'attention_softcap': None,
  'final_softcap': None,
  'rope_theta': None,
  'rope_theta_local': None,
  'embed_scale': None,
  'logits_scale': None,
  'init_stddev': 0.0,
}
NULLABLE = (
  'attention_scale',
  'attention_softcap',
  'final_softcap',
  'rope_theta_local',
)
DTYPES = 'float32', 'bfloat16', 'float16'


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Everything that fixes the computation of a model, as plain data.

  Attributes:
    vocab_size: V.
    num_layers: L.
    embed_dim: D.
    num_heads: N.
    num_kv_heads: K; N for full heads, 1 for multi-query.
    head_dim: H.
    mlp_dim: F.
    activation: of the MLP.
    mlp: 'gated', or 'plain' (T5 1.0).
    mlp_bias: whether the dense layers of the MLP have biases.
    norm_offset: added to stored norm weights (1 in Gemma).
    norm_epsilon: of every RMSNorm.
    norm_placement: 'pre' normalises what enters attention and MLP; 'sandwich'
      (Gemma 2 and 3) also what leaves them.
    query_key_norm: 'rms' normalises each query and key head (Qwen 3, Gemma 3).
    attention_bias: 'qkv' (Qwen 2) or 'all' four projections.
    attention_scale: multiplies q k^T; H ** -0.5 if None is given.
    attention_softcap: cap of the attention logits (Gemma 2).
    final_softcap: cap of the output logits (Gemma 2).
    window_pattern: window of layer i is pattern[i % len]; None means no window.
    attention: 'causal', or 'bidirectional' for an encoder.
    position_encoding: 'rotary', or T5's 'relative_bias', shared by all layers.
    relative_buckets: of the relative bias.
    relative_max_distance: of the relative bias.
    rope_theta: rotary base of layers without a window, and of all layers
      if `rope_theta_local` is None.
    rope_theta_local: rotary base of layers with a window (Gemma 3).
    rope_scaling: applies to `rope_theta` only.
    tie_embeddings: whether the embedding table is the output matrix.
    embed_scale: multiplies the embeddings (sqrt(D) in Gemma).
    logits_scale: multiplies what enters the output matrix (T5, tied).
    init_stddev: of a freshly initialised embedding table.
    dtype: dtype of the computation.
    param_dtype: dtype of storage.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  activation: Literal['silu', 'gelu', 'gelu_tanh', 'relu'] = 'silu'
  mlp: Literal['gated', 'plain'] = 'gated'
  mlp_bias: bool = False
  norm_offset: float = 0.0
  norm_epsilon: float = 1e-6
  norm_placement: Literal['pre', 'sandwich'] = 'pre'
  query_key_norm: Literal['none', 'rms'] = 'none'
  attention_bias: Literal['none', 'qkv', 'all'] = 'none'
  attention_scale: float | None = None
  attention_softcap: float | None = None
  final_softcap: float | None = None
  window_pattern: tuple[int | None, ...] = (None,)
  attention: Literal['causal', 'bidirectional'] = 'causal'
  position_encoding: Literal['rotary', 'relative_bias'] = 'rotary'
  relative_buckets: int = 32
  relative_max_distance: int = 128
  rope_theta: float = 10_000.0
  rope_theta_local: float | None = None
  rope_scaling: layers.RopeScaling | None = None
  tie_embeddings: bool = True
  embed_scale: float = 1.0
  logits_scale: float = 1.0
  init_stddev: float = 0.02
  dtype: str = 'float32'
  param_dtype: str = 'float32'

  def __post_init__(self):
    object.__setattr__(self, 'window_pattern', tuple(self.window_pattern))
    self._check_values()
    if self.attention_scale is None:
      object.__setattr__(self, 'attention_scale', self.head_dim**-0.5)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'num_heads = {self.num_heads} must be a multiple of num_kv_heads ='
        f' {self.num_kv_heads}.'
      )
    if self.head_dim % 2 and self.position_encoding == 'rotary':
      raise ValueError(
        f'head_dim = {self.head_dim} must be even: rotary positions turn'
        ' pairs of numbers.'
      )
    for field, allowed in (
      ('activation', tuple(layers.ACTIVATIONS)),
      ('mlp', ('gated', 'plain')),
      ('attention', ('causal', 'bidirectional')),
      ('position_encoding', ('rotary', 'relative_bias')),
      ('norm_placement', ('pre', 'sandwich')),
      ('query_key_norm', ('none', 'rms')),
      ('attention_bias', ('none', 'qkv', 'all')),
    ):
      if getattr(self, field) not in allowed:
        raise ValueError(
          f'{field} = {getattr(self, field)!r} is not one of {allowed}.'
        )
    if self.position_encoding == 'relative_bias':
      halves = 2 if self.attention == 'bidirectional' else 1
      exact = self.relative_buckets // halves // 2
      if exact < 1 or self.relative_max_distance <= exact:
        raise ValueError(
          f'relative_buckets = {self.relative_buckets} (in config.json'
          ' relative_attention_num_buckets) and relative_max_distance ='
          f' {self.relative_max_distance} (relative_attention_max_distance) do'
          f' not fit: {exact} distances would have a bucket of their own; that'
          ' must be at least 1, and fewer than the largest distance.'
        )

  def _check_values(self) -> None:
    """Raises ValueError for a value of the wrong type or sign."""

    def check(name, is_fine, allowed):
      if not is_fine:
        raise ValueError(
          f'{name} = {getattr(self, name)!r}: it must be {allowed}.'
        )

    for name in SIZES:
      check(name, _is_size(getattr(self, name)), 'a whole number, at least 1')
    for name in FLAGS:
      check(name, isinstance(getattr(self, name), bool), 'true or false')
    for name, least in NUMBERS.items():
      value = getattr(self, name)
      if value is None and name in NULLABLE:
        continue
      is_number = isinstance(value, numbers.Real) and math.isfinite(value)
      is_fine = is_number and (value > 0 if least is None else value >= least)
      check(name, is_fine, 'a number' + (' above 0' if least is None else ''))
    for name in ('dtype', 'param_dtype'):
      check(
        name, _dtype_name(getattr(self, name)) in DTYPES, f'one of {DTYPES}'
      )
    windows = [one for one in self.window_pattern if one is not None]
    check(
      'window_pattern',
      self.window_pattern and all(map(_is_size, windows)),
      'windows of at least 1, and None where there is no window',
    )

  @property
  def windows(self) -> tuple[int | None, ...]:
    """The attention window of each layer."""
    pattern = self.window_pattern
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

  @property
  def has_windows(self) -> bool:
    return any(window is not None for window in self.windows)

  @property
  def longest(self) -> int | None:
    """The most positions that are defined; None if there is no limit."""
    scaling = self.rope_scaling
    is_dynamic = scaling is not None and scaling.kind == 'dynamic'
    return scaling.original_length if is_dynamic else None

  def check_length(self, length: int) -> None:
    """Raises ValueError if rotary positions are not defined so far."""
    if self.longest is not None and length > self.longest:
      raise ValueError(
        f'A sequence of {length} positions is longer than the'
        f' {self.longest} that rope_scaling of kind'
        " 'dynamic' allows here: beyond, every angle would depend on the length"
        ' of the whole text. Give shorter inputs, or a checkpoint with linear,'
        ' yarn or llama3 scaling.'
      )

  def layer_inputs(self, start: int, stop: int) -> dict[str, Array]:
    """Returns what differs between layers start..stop, stacked on axis L.

    Returns:
      `window`: int32 [L], a host array, so that a kernel knows it;
      `frequencies`: float32 [L, H // 2]; `rotary_scale`: float32 [L].
    """
    windows = self.windows[start:stop]
    frequencies, scales = [], []
    for window in windows:
      if window is None or self.rope_theta_local is None:
        theta, scaling = self.rope_theta, self.rope_scaling
      else:
        theta, scaling = self.rope_theta_local, None
      frequencies.append(layers.rope_frequencies(self.head_dim, theta, scaling))
      scales.append(1.0 if scaling is None else scaling.rotary_scale)
    return {
      'window': np.asarray(
        [NO_WINDOW if w is None else w for w in windows], np.int32
      ),
      'frequencies': jnp.stack(frequencies),
      'rotary_scale': jnp.asarray(scales, jnp.float32),
    }


def _is_size(value: Any) -> bool:
  is_whole = isinstance(value, numbers.Integral) and value is not True
  return is_whole and value >= 1


def _dtype_name(dtype: Any) -> str:
  try:
    return jnp.dtype(dtype).name
  except TypeError:
    return ''
