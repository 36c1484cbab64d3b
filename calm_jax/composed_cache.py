"""What a composed model remembers of the tokens so far."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax import masks
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

  @classmethod
  def empty(
    cls,
    composed: Any,
    batch: int,
    *,
    slots: int,
    slots_of: Mapping[str, int],
  ) -> 'ComposedCache':
    """Returns empty caches for all models and connections.

    Args:
      composed: the `ComposedLM`.
      batch: B.
      slots: positions of the anchor.
      slots_of: positions of each augmenting model.
    """
    anchor = composed.anchor
    return cls(
      anchor=anchor.empty_cache(batch=batch, slots=slots, stop=anchor.depth),
      augmenting={
        name: model.empty_cache(
          batch=batch,
          slots=slots_of[name],
          stop=composed.tapped_layers(name)[-1] + 1,
        )
        for name, model in composed.augmenting.items()
        if name not in composed.prompt_only  # read at once, not remembered
      },
      cross={
        c.key: attention.KVCache.empty(
          batch=batch,
          slots=slots_of[c.augmenting],
          heads=composed.num_heads,
          head_dim=anchor.width // composed.num_heads,
          dtype=anchor.config.dtype,
        )
        for c in composed.connections
      },
      visible_from={
        name: jnp.full((batch, slots_of[name]), masks.NEVER, jnp.int32)
        for name in composed.augmenting
      },
    )

  def take_rows(self, rows_B: Array) -> 'ComposedCache':
    """Returns the cache whose row b is this one's row `rows_B[b]`."""

    def take(leaf):  # [B, C], [B, C, K, H], or a scanned segment's [L, ...]
      return jnp.take(leaf, rows_B, axis=max(leaf.ndim - 4, 0))

    return jax.tree.map(take, self)
