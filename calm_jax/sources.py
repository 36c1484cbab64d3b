"""What an augmenting model reads, and from where on the anchor reads it.

One rule covers every pair of models: a position s of the augmenting model is
read from the anchor position `visible_from[s]` on. With one shared tokenizer
that is s itself; with two, see `calm_jax.alignment`; a model that reads the
prompt alone, as encoders do, is read from the last position of the prompt on.
"""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp

from calm_jax import masks
from calm_jax.array_types import Array, Batch
from calm_jax.models import attention, kernels


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
    pattern: what the mask is made of, where both read the same tokens.
  """

  view: View | None
  text_positions_BS: Array | None
  mask_BTS: Array
  visible_from_BC: Array | None = None
  pattern: kernels.Pattern | None = None


class Composed(Protocol):
  """What a `ComposedLM` knows of its augmenting models."""

  augmenting: Mapping[str, AugmentingModel]
  own_tokens: Collection[str]
  prompt_only: Collection[str]


def side_of(batch: Mapping[str, Any], name: str, composed: Composed) -> str:
  """Returns the prefix of the keys that the augmenting model `name` reads.

  Its own name; or 'augmenting', if no model has that name, and this one has a
  vocabulary of its own, or none is said to have; or 'decoder'.
  """
  sides = [name]
  shares = bool(composed.own_tokens) and name not in composed.own_tokens
  if 'augmenting' not in composed.augmenting and not shares:
    sides.append('augmenting')
  for side in sides:
    if f'{side}_input_tokens' in batch:
      return side
  return 'decoder'


def from_batch(batch: Batch, name: str, composed: Composed) -> Source:
  """Returns what a model reads of a batch of whole sequences.

  Args:
    batch: see `composition.ComposedLM.__call__`.
    name: of the augmenting model.
    composed: what it is a part of.

  Raises:
    ValueError: if the model must have tokens of its own, as its vocabulary is
      another than the anchor's, or as it is an encoder, which would read ahead;
      and has none.
  """
  side, model = side_of(batch, name, composed), composed.augmenting[name]
  positions_BS = batch[f'{side}_positions']
  segment_ids_BS = batch[f'{side}_segment_ids']
  text_positions_BS, pattern = positions_BS, None
  if side != 'decoder':
    visible_from_BS = batch[f'{side}_visible_from']
    if name not in composed.prompt_only:
      text_positions_BS = jnp.take_along_axis(
        batch['decoder_positions'], visible_from_BS, axis=1, mode='clip'
      )
  elif name in composed.own_tokens:
    raise ValueError(
      f'{name!r} reads tokens of its own: the batch needs {name}_input_tokens'
      f' and so on, and has {sorted(batch)}. An iterator makes them with the'
      ' readers that it is given; see calm_jax.alignment.'
    )
  else:
    index_T = jnp.arange(positions_BS.shape[1])
    visible_from_BS = jnp.broadcast_to(index_T, positions_BS.shape)
    pattern = kernels.Pattern(segment_ids_BS, segment_ids_BS)
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
    pattern=pattern,
  )


def from_step(
  new: AugmentingTokens | None,
  name: str,
  composed: Composed,
  *,
  positions_BT: Array,
  visible_from_BC: Array,
) -> Source:
  """Returns what a model reads in a step of decoding.

  Args:
    new: the new tokens, or None for a model that has read all it will.
    name: of the augmenting model.
    composed: what it is a part of.
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
  if name not in composed.prompt_only:
    slots = visible_from_BC.shape[1]
    where = attention.Positions.cached(new.positions_BS, slots)
    text_positions_BS = new.visible_from_BS
  else:
    is_token_BS = (new.visible_from_BS < masks.NEVER).astype(jnp.int32)
    model = composed.augmenting[name]
    where = model.whole(new.positions_BS, is_token_BS)
    text_positions_BS = new.positions_BS
  return Source(
    View(new.tokens_BS, where),
    text_positions_BS,
    masks.visible_mask(visible_from_BC, positions_BT),
    visible_from_BC,
  )
