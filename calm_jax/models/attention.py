"""Attention: one function for self- and cross-attention, and the cache."""

from flax import linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from calm_jax import masks
from calm_jax.array_types import Array, DType
from calm_jax.models import kernels, layers
from calm_jax.models.config import TransformerConfig

MASKED = -1e30  # finite: a row without any visible key must not become NaN


@flax.struct.dataclass
class KVCache:
  """Keys and values of one attention, slot c holding position c.

  Attributes:
    key: [B, C, K, H]; a scanned segment has [L, B, C, K, H].
    value: same shape.
  """

  key: Array
  value: Array

  @classmethod
  def empty(
    cls, *, batch: int, slots: int, heads: int, head_dim: int, dtype: DType
  ) -> 'KVCache':
    shape = (batch, slots, heads, head_dim)
    return cls(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))

  def write(
    self, key_BTKH: Array, value_BTKH: Array, positions_BT: Array
  ) -> 'KVCache':
    """Puts new keys and values into the slots of their positions."""
    row = jnp.arange(positions_BT.shape[0])[:, None]
    put = lambda old, new: old.at[row, positions_BT].set(new.astype(old.dtype))
    return KVCache(put(self.key, key_BTKH), put(self.value, value_BTKH))


@flax.struct.dataclass
class Positions:
  """Where the queries of a forward pass are and what they may read.

  Attributes:
    positions_BT: int32, restarting at 0 in each segment.
    mask_BTS: bool, before any window.
    distance_BTS: int32, query position - key position, for windows and biases.
    bias_BNTS: added to the attention logits, or None.
    pattern: what the mask is made of, for kernels; None with a cache.
  """

  positions_BT: Array
  mask_BTS: Array
  distance_BTS: Array
  bias_BNTS: Array | None = None
  pattern: kernels.Pattern | None = None

  @classmethod
  def full(cls, positions_BT: Array, segment_ids_BT: Array) -> 'Positions':
    """A whole sequence at once, causal within segments."""
    return cls(
      positions_BT=positions_BT,
      mask_BTS=masks.causal_mask(segment_ids_BT),
      distance_BTS=positions_BT[:, :, None] - positions_BT[:, None, :],
      pattern=kernels.Pattern(segment_ids_BT, segment_ids_BT),
    )

  @classmethod
  def bidirectional(
    cls, positions_BT: Array, segment_ids_BT: Array
  ) -> 'Positions':
    """A whole sequence at once, each position reading all of its segment."""
    return cls(
      positions_BT=positions_BT,
      mask_BTS=segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :],
      distance_BTS=positions_BT[:, :, None] - positions_BT[:, None, :],
      pattern=kernels.Pattern(segment_ids_BT, segment_ids_BT, is_causal=False),
    )

  @classmethod
  def cached(cls, positions_BT: Array, num_slots: int) -> 'Positions':
    """Some positions against a cache of `num_slots`."""
    slots = jnp.arange(num_slots)[None, None, :]
    return cls(
      positions_BT=positions_BT,
      mask_BTS=masks.cache_mask(positions_BT, num_slots),
      distance_BTS=positions_BT[:, :, None] - slots,
    )

  def within(
    self, window: Array, windows: tuple[int | None, ...]
  ) -> 'Positions':
    """Narrows all of it to one window, of those that a model has."""
    mask_BTS = masks.window_mask(self.mask_BTS, self.distance_BTS, window)
    pattern = self.pattern
    if pattern is not None:
      pattern = pattern.replace(window=window, windows=windows)
    return self.replace(mask_BTS=mask_BTS, pattern=pattern)


def attend(
  query_BTNH: Array,
  key_BSKH: Array,
  value_BSKH: Array,
  mask_BTS: Array,
  *,
  scale: float,
  softcap: float | None = None,
  bias_BNTS: Array | None = None,
  kernel: kernels.Kernel = 'xla',
  pattern: kernels.Pattern | None = None,
) -> Array:
  """Computes softmax(scale q k^T) v with grouped heads (arXiv 2305.13245).

  Args:
    query_BTNH: N query heads.
    key_BSKH: K key heads; N is a multiple of K.
    value_BSKH: as the keys, of any size.
    mask_BTS: bool; a query that sees nothing gets zeros.
    scale: multiplies the dot products.
    softcap: if given, logits become softcap * tanh(logits / softcap).
    bias_BNTS: if given, added to the logits.
    kernel: what computes it; a kernel may give anything for padding queries.
    pattern: what the mask is made of, which a kernel may read in its place.

  Returns:
    [B, T, N, H] in the dtype of the values; the softmax is in float32.
  """
  if kernel != 'xla':
    arrays = query_BTNH, key_BSKH, value_BSKH, mask_BTS, pattern
    how = {'scale': scale, 'softcap': softcap, 'bias_BNTS': bias_BNTS}
    return kernels.attend(kernel, *arrays, **how)
  B, T, N, H = query_BTNH.shape
  K = key_BSKH.shape[2]
  query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H) * scale
  logits = jnp.einsum(
    'BTKGH,BSKH->BKGTS',
    query_BTKGH,
    key_BSKH,
    preferred_element_type=jnp.float32,
  )
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if bias_BNTS is not None:
    logits += bias_BNTS.astype(jnp.float32).reshape(B, K, N // K, T, -1)
  mask = mask_BTS[:, None, None]
  weights = jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)
  weights = jnp.where(mask, weights, 0.0).astype(value_BSKH.dtype)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weights, value_BSKH)
  return out_BTKGH.reshape(B, T, N, -1)


class SelfAttention(nn.Module):
  """Self-attention of one block."""

  config: TransformerConfig
  kernel: kernels.Kernel = 'xla'

  @nn.compact
  def __call__(
    self,
    x_BTD: Array,
    where: Positions,
    *,
    window: Array,
    frequencies: Array,
    rotary_scale: Array,
    cache: KVCache | None = None,
  ) -> tuple[Array, KVCache | None]:
    """Attends, through the cache if there is one.

    Args:
      x_BTD: normalised input.
      where: positions and mask; S is T without a cache, C with one.
      window: int32 scalar, keys this far back or further are not read.
      frequencies: float32 [H // 2], rotary frequencies of this layer.
      rotary_scale: float32 scalar, multiplies rotated queries and keys.
      cache: this layer's cache, or None to attend within the sequence.

    Returns:
      The output [B, T, D] and the cache with the new positions written.
    """
    cfg = self.config
    B, T, D = x_BTD.shape

    def dense(name, features, axes, bias=False):
      return layers.Dense(
        features,
        axes=axes,
        bias=bias,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        name=name,
      )

    def heads(name, count, axis):
      bias = cfg.attention_bias in ('qkv', 'all')
      out = dense(name, count * cfg.head_dim, ('embed', axis), bias)(x_BTD)
      out = out.reshape(B, T, count, cfg.head_dim)
      if cfg.query_key_norm == 'rms' and name != 'value':
        norm = layers.RMSNorm(
          offset=cfg.norm_offset,
          axis='head_dim',
          epsilon=cfg.norm_epsilon,
          dtype=cfg.dtype,
          param_dtype=cfg.param_dtype,
          name=f'{name}_norm',
        )
        out = norm(out)
      return out

    query_BTNH = heads('query', cfg.num_heads, 'heads')
    key_BTKH = heads('key', cfg.num_kv_heads, 'kv_heads')
    value_BTKH = heads('value', cfg.num_kv_heads, 'kv_heads')
    if cfg.position_encoding == 'rotary':
      turn = where.positions_BT, frequencies, rotary_scale
      query_BTNH = layers.apply_rope(query_BTNH, *turn)
      key_BTKH = layers.apply_rope(key_BTKH, *turn)

    if cache is not None:
      cache = cache.write(key_BTKH, value_BTKH, where.positions_BT)
      key_BTKH, value_BTKH = cache.key, cache.value
    if cfg.has_windows:
      where = where.within(window, cfg.windows)
    out_BTNH = attend(
      query_BTNH,
      key_BTKH.astype(query_BTNH.dtype),
      value_BTKH.astype(query_BTNH.dtype),
      where.mask_BTS,
      scale=cfg.attention_scale,
      softcap=cfg.attention_softcap,
      bias_BNTS=where.bias_BNTS,
      kernel='xla' if where.pattern is None else self.kernel,
      pattern=where.pattern,
    )
    out_BTD = dense('out', D, ('heads', 'embed'), cfg.attention_bias == 'all')(
      out_BTNH.reshape(B, T, -1)
    )
    return out_BTD, cache
