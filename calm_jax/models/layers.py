"""Layers without attention: dense, norms, rotary positions, MLP, embedding."""

import dataclasses
import math
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

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
    out = flat @ quantization.dequantize(kernel, self.dtype)
    if self.bias:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(self.bias_init, self.axes[1:]),
        (self.features,),
        self.param_dtype,
      )
      out = out + bias.astype(self.dtype)[None, :]
    return out.reshape(*x.shape[:-1], self.features)


def disturb(x: Array, noise: Array) -> Array:
  """Adds noise in units of each vector's root mean square."""
  mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
  return x + (noise * jnp.sqrt(mean_square + 1e-12)).astype(x.dtype)


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


class GatedMLP(nn.Module):
  """down(activation(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202)."""

  mlp_dim: int
  activation: str
  dtype: DType = jnp.float32
  param_dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    def dense(name, features, axes):
      return Dense(
        features,
        axes=axes,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    gate_BTF = dense('gate', self.mlp_dim, ('embed', 'mlp'))(x_BTD)
    up_BTF = dense('up', self.mlp_dim, ('embed', 'mlp'))(x_BTD)
    hidden_BTF = ACTIVATIONS[self.activation](gate_BTF) * up_BTF
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
    return x_BTD * jnp.asarray(self.scale, self.dtype)

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
      long wavelengths only, with a smooth ramp (Llama 3.1).
    factor: how many times longer.
    original_length: trained length, for 'llama3'.
    low_freq_factor: wavelengths above original_length / this are divided.
    high_freq_factor: wavelengths below original_length / this are kept.
  """

  kind: Literal['linear', 'llama3']
  factor: float
  original_length: int = 8192
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3'):
      raise ValueError(
        f"kind = {self.kind!r} is not one of ('linear', 'llama3')."
      )


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Any:
  """Returns the angular frequencies, float32 [H // 2], in radians a position.

  Rotary positions: arXiv 2104.09864.
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = theta**-exponent
  if scaling is None:
    return frequencies
  if scaling.kind == 'linear':
    return frequencies / scaling.factor
  wavelength = 2 * math.pi / frequencies
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  ramp = (scaling.original_length / wavelength - low) / (high - low)
  ramp = jnp.clip(ramp, 0.0, 1.0)
  return frequencies * (ramp + (1 - ramp) / scaling.factor)


def apply_rope(x_BTNH: Array, positions_BT: Array, frequencies: Array) -> Array:
  """Rotates the halves of each head by position x frequency.

  Args:
    x_BTNH: queries or keys.
    positions_BT: int32 positions within each segment.
    frequencies: float32 [H // 2], from `rope_frequencies`.
  """
  angle = jnp.einsum('BT,h->BTh', positions_BT.astype(jnp.float32), frequencies)
  sin, cos = jnp.sin(angle)[:, :, None, :], jnp.cos(angle)[:, :, None, :]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
