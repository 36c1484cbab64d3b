"""Who may attend to whom. Masks are bool; True means "may attend"."""

import jax.numpy as jnp

from calm_jax.array_types import Array

NEVER = 2**30  # a position that no anchor reaches: what is seen from there on


def causal_mask(segment_ids_BT: Array) -> Array:
  """Returns the mask of causal self-attention within segments.

  Args:
    segment_ids_BT: int32; 0 is padding, real segments start at 1.

  Returns:
    bool [B, T, T]: query t may attend to key s <= t of its own segment. A
    padding query attends to padding, so that no softmax is empty.
  """
  length = segment_ids_BT.shape[1]
  index = jnp.arange(length)
  causal_TT = index[:, None] >= index[None, :]
  same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  return same_BTT & causal_TT[None]


def cache_mask(positions_BT: Array, num_slots: int) -> Array:
  """Returns the mask of queries at `positions` over the slots of a cache.

  Slot c holds position c, so a query may read the slots up to its own. Slots
  further on hold nothing yet, or padding of the prompt.

  Args:
    positions_BT: int32 positions of the queries.
    num_slots: length C of the cache.

  Returns:
    bool [B, T, C].
  """
  slots = jnp.arange(num_slots)
  return slots[None, None, :] <= positions_BT[:, :, None]


def cross_mask(
  *,
  segment_ids_BT: Array,
  augmenting_segment_ids_BS: Array,
  visible_from_BS: Array,
) -> Array:
  """Returns the mask of anchor positions over augmenting positions.

  One rule for every pair of models: position s is read from the anchor
  position `visible_from[s]` on, within its own segment.

  Args:
    segment_ids_BT: int32 segments of the anchor, 0 is padding.
    augmenting_segment_ids_BS: int32 segments of the augmenting model.
    visible_from_BS: int32, the first anchor index that may read s. With one
      shared tokenizer it is s itself; see `calm_jax.alignment` for two.

  Returns:
    bool [B, T, S]. Rows of padding queries are False throughout.
  """
  index_T = jnp.arange(segment_ids_BT.shape[1])
  same_BTS = segment_ids_BT[:, :, None] == augmenting_segment_ids_BS[:, None, :]
  real_BS = augmenting_segment_ids_BS > 0
  return (
    same_BTS
    & real_BS[:, None, :]
    & visible_mask(visible_from_BS, index_T[None])
  )


def visible_mask(visible_from_BS: Array, index_BT: Array) -> Array:
  """Returns where visible_from[s] <= index[t], bool [B, T, S]."""
  return visible_from_BS[:, None, :] <= index_BT[:, :, None]


def window_mask(mask_BTS: Array, distance_BTS: Array, window: Array) -> Array:
  """Narrows a mask to keys fewer than `window` positions back.

  Args:
    mask_BTS: bool.
    distance_BTS: int32, query position - key position.
    window: int32 scalar; a value above every distance leaves the mask as is.
  """
  return mask_BTS & (distance_BTS < window)
