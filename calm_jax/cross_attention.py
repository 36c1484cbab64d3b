"""f_proj and f_cross of one connection: all that is trained."""

from flax import linen as nn
import jax.numpy as jnp

from calm_jax.array_types import Array, DType
from calm_jax.connections import CompositionConfig
from calm_jax.models import attention, kernels, layers


class CrossAttention(nn.Module):
  """f_cross(f_proj(source), query) of one connection (section 3.1).

  Attributes:
    embed_dim: D, the anchor's width.
    num_heads: N; the head size H is D // N.
    config: norms, initialisation and position encoding.
    dtype: dtype of the computation.
    kernel: what computes `attend`; see `models.kernels`.
  """

  embed_dim: int
  num_heads: int
  config: CompositionConfig
  dtype: DType = jnp.float32
  kernel: kernels.Kernel = 'xla'

  def setup(self):
    fan_in, zeros = layers.fan_in_init(), nn.initializers.zeros
    dtypes = {'dtype': self.dtype, 'param_dtype': self.config.param_dtype}

    def dense(axes, kernel_init=fan_in):
      return layers.Dense(
        self.embed_dim, axes=axes, kernel_init=kernel_init, **dtypes
      )

    self.projection = dense(('augmenting_embed', 'embed'))  # f_proj
    self.query = dense(('embed', 'heads'))  # W_Q
    self.key = dense(('embed', 'heads'))  # W_K
    self.value = dense(('embed', 'heads'))  # W_V
    self.out = dense(  # W_O
      ('heads', 'embed'),
      zeros if self.config.output_init == 'zeros' else fan_in,
    )
    if self.config.gate == 'sigmoid':
      self.gate = layers.Dense(
        self.num_heads,
        axes=('embed', 'heads'),
        bias=True,
        bias_init=nn.initializers.constant(self.config.gate_bias),
        **dtypes,
      )
    if self.config.norm == 'rms':
      self.query_norm = layers.RMSNorm(**dtypes)
      self.source_norm = layers.RMSNorm(**dtypes)

  def read(self, source_BSE: Array, positions_BS: Array) -> attention.KVCache:
    """Returns keys and values [B, S, N, H] of augmenting hidden states."""
    source_BSD = self.projection(source_BSE)
    if self.config.norm == 'rms':
      source_BSD = self.source_norm(source_BSD)
    return attention.KVCache(
      key=self._turn(self._heads(self.key(source_BSD)), positions_BS),
      value=self._heads(self.value(source_BSD)),
    )

  def attend(
    self,
    query_BTD: Array,
    source: attention.KVCache,
    *,
    positions_BT: Array,
    mask_BTS: Array,
    pattern: kernels.Pattern | None = None,
  ) -> Array:
    """Returns what is added to the anchor's residual stream, [B, T, D]."""
    query_BTD = self.norm_query(query_BTD)
    out_BTNH = self.read_by(
      query_BTD,
      source,
      positions_BT=positions_BT,
      mask_BTS=mask_BTS,
      pattern=pattern,
    )
    if self.config.gate == 'sigmoid':
      out_BTNH *= nn.sigmoid(self.gate(query_BTD))[..., None]
    return self.out(out_BTNH.reshape(query_BTD.shape))

  def __call__(self, query_BTD: Array, source_BSE: Array) -> Array:
    """Attends without mask at positions 0; touches every parameter."""
    B, T, S = *query_BTD.shape[:2], source_BSE.shape[1]
    source = self.read(source_BSE, jnp.zeros((B, S), jnp.int32))
    return self.attend(
      query_BTD,
      source,
      positions_BT=jnp.zeros((B, T), jnp.int32),
      mask_BTS=jnp.ones((B, T, S), bool),
    )

  def norm_query(self, query_BTD: Array) -> Array:
    """Returns the normalised queries, if there is a norm."""
    rms = self.config.norm == 'rms'
    return self.query_norm(query_BTD) if rms else query_BTD

  def read_by(
    self,
    query_BTD: Array,
    source: attention.KVCache,
    *,
    positions_BT: Array,
    mask_BTS: Array,
    pattern: kernels.Pattern | None = None,
  ) -> Array:
    """Returns what each head reads for normalised queries, [B, T, N, H]."""
    query_BTNH = self._turn(self._heads(self.query(query_BTD)), positions_BT)
    return attention.attend(
      query_BTNH,
      source.key,
      source.value,
      mask_BTS,
      scale=query_BTNH.shape[-1] ** -0.5,
      kernel=self.kernel,
      pattern=pattern,
    )

  def _heads(self, x_BTD: Array) -> Array:
    head_dim = self.embed_dim // self.num_heads
    return x_BTD.reshape(*x_BTD.shape[:2], self.num_heads, head_dim)

  def _turn(self, x_BTNH: Array, positions_BT: Array) -> Array:
    if self.config.position_encoding == 'none':
      return x_BTNH
    frequencies = layers.rope_frequencies(x_BTNH.shape[-1], 10_000.0)
    return layers.apply_rope(x_BTNH, positions_BT, frequencies)
