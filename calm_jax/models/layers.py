"""Layers without attention: dense, norms, rotary positions, MLP, embedding."""

import dataclasses
import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import quantization
from calm_jax.array_types import Array, DType

ACTIVATIONS = {
  'silu': nn.silu,
  'gelu': lambda x: nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: nn.gelu(x, approximate=True),
  'relu': nn.relu,
}


def fan_in_init(scale: float = 1.0) -> nn.initializers.Initializer:
  """Draws weights [in, out] with variance `scale / in`."""
  return nn.initializers.variance_scaling(scale, 'fan_in', 'normal')


def round_to(x: Array, dtype: DType) -> Array:
  """Rounds to `dtype` for good.

  Under jit XLA may keep more precision than bfloat16 has between fused
  operations, and then two equal computations differ by how they were fused.
  """
  if jnp.dtype(dtype) == jnp.bfloat16:
    x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return x.astype(dtype)


class Dense(nn.Module):
  """A linear map of the last axis, stored as one matrix [in, out].

  Attributes:
    features: output width.
    axes: logical names of the two axes of the kernel.
    bias: whether there is one; it takes the kernel's second logical name.
    kernel_init: initialiser of the kernel.
    bias_init: initialiser of the bias.
    dtype: dtype of the computation.
    param_dtype: dtype of storage.
  """

  features: int
  axes: tuple[str | None, str | None]
  bias: bool = False
  kernel_init: nn.initializers.Initializer = fan_in_init()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(self.kernel_init, self.axes),
      (x.shape[-1], self.features),
      self.param_dtype,
    )
    # One contracted axis: XLA:CPU is three times slower at the weight
    # gradient of [B, T, in] than at that of [B * T, in].
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    out = flat @ quantization.dequantize(
      kernel, self.dtype, logical_axes=self.axes
    )
    if self.has_variable('lora', 'a'):  # see calm_jax.lora
      down, up = (self.get_variable('lora', name) for name in 'ab')
      out = out + flat @ down.astype(self.dtype) @ up.astype(self.dtype)
    if self.bias:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(self.bias_init, self.axes[1:]),
        (self.features,),
        self.param_dtype,
      )
      out = out + bias.astype(self.dtype)[None, :]
    return out.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
  """Divides by the root mean square of the last axis (arXiv 1910.07467).

  Attributes:
    offset: the scale is `offset + weight`: 0 for Llama, 1 for Gemma, whose
      stored weights start at 0.
    axis: logical name of the normalised axis.
    epsilon: added to the mean square.
    dtype: dtype of the result; the computation is in float32.
    param_dtype: dtype of storage.
  """

  offset: float = 0.0
  axis: str | None = 'embed'
  epsilon: float = 1e-6
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    weight = self.param(
      'scale',
      nn.with_logical_partitioning(
        nn.initializers.constant(1.0 - self.offset), (self.axis,)
      ),
      (x.shape[-1],),
      self.param_dtype,
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(
      jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon
    )
    scale = self.offset + weight.astype(jnp.float32)
    return (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(self.dtype)


class MLP(nn.Module):
  """The feed-forward part of a block.

  Attributes:
    mlp_dim: F.
    activation: a key of `ACTIVATIONS`.
    kind: 'gated' is down(activation(gate(x)) * up(x)) (GLU variants, arXiv
      2002.05202); 'plain' is down(activation(up(x))).
    bias: whether the dense layers have biases.
    dtype: dtype of the computation.
    param_dtype: dtype of storage.
  """

  mlp_dim: int
  activation: str
  kind: Literal['gated', 'plain'] = 'gated'
  bias: bool = False
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    def dense(name, features, axes):
      return Dense(
        features,
        axes=axes,
        bias=self.bias,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    activation = ACTIVATIONS[self.activation]
    hidden_BTF = dense('up', self.mlp_dim, ('embed', 'mlp'))(x_BTD)
    if self.kind == 'gated':
      gate_BTF = dense('gate', self.mlp_dim, ('embed', 'mlp'))(x_BTD)
      hidden_BTF = activation(gate_BTF) * hidden_BTF
    else:
      hidden_BTF = activation(hidden_BTF)
    return dense('down', x_BTD.shape[-1], ('mlp', 'embed'))(hidden_BTF)


class Embedder(nn.Module):
  """Token embeddings and, where they are tied, the output matrix."""

  vocab_size: int
  embed_dim: int
  scale: float = 1.0
  init_stddev: float = 0.02
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  def setup(self):
    self.table_VD = self.param(
      'table',
      nn.with_logical_partitioning(
        nn.initializers.normal(self.init_stddev), ('vocab', 'embed')
      ),
      (self.vocab_size, self.embed_dim),
      self.param_dtype,
    )

  def encode(self, tokens_BT: Array) -> Array:
    """Looks up tokens; Gemma multiplies by sqrt(D), rounded to `dtype`."""
    rows = jax.tree.map(lambda x: jnp.take(x, tokens_BT, axis=0), self.table_VD)
    x_BTD = quantization.dequantize(rows, self.dtype, axis=-1)
    # A product that something is added to may be fused with the sum, and is
    # then not rounded. A composed model may add its own before the first block.
    return jax.lax.optimization_barrier(
      x_BTD * jnp.asarray(self.scale, self.dtype)
    )

  def decode(self, x_BTD: Array) -> Array:
    """Multiplies by the transposed table."""
    flat = x_BTD.reshape(-1, x_BTD.shape[-1])
    table_VD = quantization.dequantize(self.table_VD, self.dtype, axis=-1)
    logits = flat @ table_VD.T
    return logits.reshape(*x_BTD.shape[:-1], self.vocab_size)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained length.

  Attributes:
    kind: 'linear' divides all frequencies by `factor`; 'llama3' divides the
      long wavelengths only, with a smooth ramp (Llama 3.1); 'yarn' does so with
      a ramp over dimensions, and sharpens attention (arXiv 2309.00071);
      'dynamic' is none at all up to the trained length. Beyond it every angle
      would depend on the length of the whole text, which no cache can follow:
      longer inputs are refused.
    factor: how many times longer.
    original_length: trained length; not used by 'linear'.
    low_freq_factor: 'llama3': wavelengths above original_length / this are
      divided.
    high_freq_factor: 'llama3': wavelengths below original_length / this are
      kept.
    beta_fast: 'yarn': dimensions that turn more often than this over the
      trained length are kept.
    beta_slow: 'yarn': dimensions that turn less often are divided.
    attention_factor: 'yarn': multiplies queries and keys; 0.1 ln(factor) + 1 if
      None.
    truncate: 'yarn': whether the ramp begins and ends at whole dimensions.
  """

  kind: Literal['linear', 'llama3', 'yarn', 'dynamic']
  factor: float
  original_length: int = 8192
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3', 'yarn', 'dynamic'):
      raise ValueError(
        f"kind = {self.kind!r} is not one of ('linear', 'llama3', 'yarn',"
        " 'dynamic')."
      )
    for name in ('factor', 'original_length', 'beta_fast', 'beta_slow'):
      if not getattr(self, name) > 0:
        raise ValueError(
          f'rope_scaling: {name} = {getattr(self, name)!r} must be above 0.'
        )
    if self.kind == 'llama3' and not (
      0 < self.low_freq_factor < self.high_freq_factor
    ):
      raise ValueError(
        f'rope_scaling: low_freq_factor = {self.low_freq_factor} must be above'
        f' 0, and below high_freq_factor = {self.high_freq_factor}.'
      )

  @property
  def rotary_scale(self) -> float:
    """What rotated queries and keys are multiplied by."""
    if self.kind != 'yarn':
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Any:
  """Returns the angular frequencies, float32 [H // 2], in radians a position.

  Rotary positions: arXiv 2104.09864.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = theta**-exponent
  if scaling is None or scaling.kind == 'dynamic':
    return frequencies
  if scaling.kind == 'linear':
    return frequencies / scaling.factor
  if scaling.kind == 'yarn':
    kept = _yarn_ramp(head_dim, theta, scaling)
  else:
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (scaling.original_length / wavelength - low) / (high - low)
    kept = jnp.clip(kept, 0.0, 1.0)
  return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> Array:
  """Returns 1 for each pair of dimensions that is kept, 0 if divided."""

  def turning(times):  # the dimension that turns so often in the length
    wavelength = scaling.original_length / (times * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(theta))

  first, last = turning(scaling.beta_fast), turning(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  width = last - first or 0.001
  index = jnp.arange(head_dim // 2, dtype=jnp.float32)
  return 1.0 - jnp.clip((index - first) / width, 0.0, 1.0)


def apply_rope(
  x_BTNH: Array,
  positions_BT: Array,
  frequencies: Array,
  scale: float | Array = 1.0,
) -> Array:
  """Rotates the halves of each head by position x frequency.

  Args:
    x_BTNH: queries or keys.
    positions_BT: int32 positions within each segment.
    frequencies: float32 [H // 2], from `rope_frequencies`.
    scale: multiplies the result.
  """
  angle = jnp.einsum('BT,h->BTh', positions_BT.astype(jnp.float32), frequencies)
  sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
  sin, cos = sin * scale, cos * scale
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


class RelativeBias(nn.Module):
  """T5's learned attention bias by distance (arXiv 1910.10683).

  Attributes:
    num_heads: N.
    buckets: distances are sorted into so many; half of them hold one distance
      each, the others grow with its logarithm.
    max_distance: from here on all distances share a bucket.
    bidirectional: whether keys behind and keys ahead have buckets of their own.
    dtype: dtype of the result.
    param_dtype: dtype of storage.
  """

  num_heads: int
  buckets: int
  max_distance: int
  bidirectional: bool = False
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, distance_BTS: Array) -> Array:
    """Returns the bias [B, N, T, S] of query position - key position."""
    table = self.param(
      'table',
      nn.with_logical_partitioning(
        nn.initializers.normal(1.0), (None, 'heads')
      ),
      (self.buckets, self.num_heads),
      self.param_dtype,
    )
    count = self.buckets // 2 if self.bidirectional else self.buckets
    bucket_of = jnp.asarray(_distance_buckets(count, self.max_distance))
    ahead = jnp.minimum(distance_BTS, 0) if self.bidirectional else 0
    behind = jnp.maximum(distance_BTS, 0)
    bucket = jnp.take(bucket_of, jnp.minimum(behind - ahead, self.max_distance))
    if self.bidirectional:
      bucket += count * (distance_BTS < 0)
    return jnp.moveaxis(jnp.take(table.astype(self.dtype), bucket, 0), -1, 1)


def _distance_buckets(count: int, max_distance: int) -> np.ndarray:
  """Returns the bucket of each distance 0, ..., max_distance, int32."""
  exact = count // 2
  distance = np.arange(max_distance + 1)
  # A hair is added, as T5 does, so that whole logarithms round to themselves.
  ratio = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
  large = exact + (ratio * (count - exact) + 1e-6).astype(np.int32)
  bucket = np.where(distance < exact, distance, np.minimum(large, count - 1))
  return bucket.astype(np.int32)
