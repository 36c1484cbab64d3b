"""What a composed model remembers of the tokens so far."""

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax.array_types import Array
from calm_jax.models import attention, transformer


@flax.struct.dataclass
class ComposedCache:
  """All that decoding keeps of the tokens so far.

  Attributes:
    anchor: key-value caches of the anchor by segment.
    augmenting: the same by name of the augmenting model.
    cross: projected keys and values by connection.
    visible_from: by name of the augmenting model, int32 [B, C]: the anchor
      position from which each slot of its caches is read.
  """

  anchor: transformer.Cache
  augmenting: dict[str, transformer.Cache]
  cross: dict[str, attention.KVCache]
  visible_from: dict[str, Array]

  def take_rows(self, rows_B: Array) -> 'ComposedCache':
    """Returns the cache whose row b is this one's row `rows_B[b]`."""

    def take(leaf):  # [B, C], [B, C, K, H], or a scanned segment's [L, ...]
      return jnp.take(leaf, rows_B, axis=max(leaf.ndim - 4, 0))

    return jax.tree.map(take, self)
