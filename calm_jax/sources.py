"""What an augmenting model reads, and from where on the anchor reads it.

One rule covers every pair of models: a position s of the augmenting model is
read from the anchor position `visible_from[s]` on. With one shared tokenizer
that is s itself; with two, see `calm_jax.alignment`; an encoder is read
from the last position of the prompt on.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp

from calm_jax import masks
from calm_jax.array_types import Array, Batch
from calm_jax.models import attention


class AugmentingModel(Protocol):
  """What a model must offer to be read: `DecoderLM` and `EncoderLM` do."""

  depth: int
  width: int
  reads_targets: bool  # or the prompt alone, as an encoder

  def init_params(self, rng: Array) -> Any: ...

  def hidden_states(self, tokens_BS, where, *, layers, cache=None): ...

  def whole(self, positions_BS, segment_ids_BS) -> attention.Positions: ...

  def empty_cache(self, *, batch: int, slots: int, stop: int) -> Any: ...


@flax.struct.dataclass
class AugmentingTokens:
  """Tokens of a model with a vocabulary of its own, beside the anchor's.

  Attributes:
    tokens_BS: int32 ids.
    positions_BS: int32 position, and cache slot, of each. What is no token has
      a slot that a later call fills, or one beyond the cache.
    visible_from_BS: int32, the first anchor position that reads each of them;
      `masks.NEVER` for what is no token.
  """

  tokens_BS: Array
  positions_BS: Array
  visible_from_BS: Array


@dataclasses.dataclass(frozen=True)
class View:
  """The tokens one model reads, and where they are.

  Attributes:
    tokens: int32 ids.
    where: their positions and masks.
    noise: added to the embeddings, in units of each one's root mean square.
  """

  tokens: Array
  where: attention.Positions
  noise: Array | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """What one augmenting model reads, and where the anchor reads it.

  Attributes:
    view: the new tokens; None if there are none.
    text_positions_BS: int32, where the new tokens are in the anchor's text, for
      rotary positions in the cross-attention.
    mask_BTS: bool, over the new tokens, or over all slots of a cache.
    visible_from_BC: of the cache, the new tokens included, or None.
  """

  view: View | None
  text_positions_BS: Array | None
  mask_BTS: Array
  visible_from_BC: Array | None = None


def side_of(batch: Mapping[str, Any], name: str) -> str:
  """Returns the prefix of the keys that the augmenting model `name` reads."""
  for side in (name, 'augmenting'):
    if f'{side}_input_tokens' in batch:
      return side
  return 'decoder'


def from_batch(
  batch: Batch, name: str, model: AugmentingModel, *, own_tokens: bool
) -> Source:
  """Returns what a model reads of a batch of whole sequences.

  Args:
    batch: see `composition.ComposedLM.__call__`.
    name: of the augmenting model.
    model: that model.
    own_tokens: whether it must have tokens of its own, as its vocabulary is
      another than the anchor's, or as it is an encoder, which would read ahead.

  Raises:
    ValueError: if it must, and has none.
  """
  side = side_of(batch, name)
  positions_BS = batch[f'{side}_positions']
  segment_ids_BS = batch[f'{side}_segment_ids']
  text_positions_BS = positions_BS
  if side != 'decoder':
    visible_from_BS = batch[f'{side}_visible_from']
    if model.reads_targets:
      text_positions_BS = jnp.take_along_axis(
        batch['decoder_positions'], visible_from_BS, axis=1, mode='clip'
      )
  elif own_tokens:
    raise ValueError(
      f'{name!r} reads tokens of its own: the batch needs {name}_input_tokens'
      f' and so on, and has {sorted(batch)}. An iterator makes them with the'
      ' readers that it is given; see calm_jax.alignment.'
    )
  else:
    index_T = jnp.arange(positions_BS.shape[1])
    visible_from_BS = jnp.broadcast_to(index_T, positions_BS.shape)
  return Source(
    View(
      batch[f'{side}_input_tokens'], model.whole(positions_BS, segment_ids_BS)
    ),
    text_positions_BS,
    masks.cross_mask(
      segment_ids_BT=batch['decoder_segment_ids'],
      augmenting_segment_ids_BS=segment_ids_BS,
      visible_from_BS=visible_from_BS,
    ),
  )


def from_step(
  new: AugmentingTokens | None,
  model: AugmentingModel,
  *,
  positions_BT: Array,
  visible_from_BC: Array,
) -> Source:
  """Returns what a model reads in a step of decoding.

  Args:
    new: the new tokens, or None for an encoder that has read its prompt.
    model: the augmenting model.
    positions_BT: int32 positions of the anchor's new tokens.
    visible_from_BC: of the slots of the caches so far.
  """
  if new is None:
    mask_BTC = masks.visible_mask(visible_from_BC, positions_BT)
    return Source(None, None, mask_BTC, visible_from_BC)
  rows_B1 = jnp.arange(visible_from_BC.shape[0])[:, None]
  visible_from_BC = visible_from_BC.at[rows_B1, new.positions_BS].set(
    new.visible_from_BS
  )
  if model.reads_targets:
    slots = visible_from_BC.shape[1]
    where = attention.Positions.cached(new.positions_BS, slots)
    text_positions_BS = new.visible_from_BS
  else:
    is_token_BS = (new.visible_from_BS < masks.NEVER).astype(jnp.int32)
    where = model.whole(new.positions_BS, is_token_BS)
    text_positions_BS = new.positions_BS
  return Source(
    View(new.tokens_BS, where),
    text_positions_BS,
    masks.visible_mask(visible_from_BC, positions_BT),
    visible_from_BC,
  )
