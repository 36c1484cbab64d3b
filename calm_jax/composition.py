"""The idea: frozen models that one trained cross-attention composes.

CALM (arXiv 2401.02412), section 3.1. With H_B,j the anchor's hidden states
after block j and H_A,i those of an augmenting model after block i,

  H_{A+B},j = H_B,j + f_cross(f_proj(H_A,i), H_B,j)

is what the anchor's block j + 1 reads. f_proj and f_cross are all that is
trained (Theta_C, the subtree `composition`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax import masks
from calm_jax.array_types import Array, Batch, Params
from calm_jax.connections import CompositionConfig, Connection
from calm_jax.cross_attention import CrossAttention
from calm_jax.models import attention, layers, transformer


class AugmentingModel(Protocol):
  """What a model must offer to be read: `DecoderLM` does."""

  depth: int
  width: int

  def init_params(self, rng: Array) -> Any: ...

  def hidden_states(self, tokens_BS, where, *, layers, cache=None): ...

  def empty_cache(self, *, batch: int, slots: int, stop: int) -> Any: ...


@flax.struct.dataclass
class ComposedCache:
  """All that decoding keeps of the tokens so far.

  Attributes:
    anchor: key-value caches of the anchor by segment.
    augmenting: the same by name of the augmenting model.
    cross: projected keys and values by connection.
  """

  anchor: transformer.Cache
  augmenting: dict[str, transformer.Cache]
  cross: dict[str, attention.KVCache]


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


class ComposedLM:
  """An anchor that reads augmenting models; or, without any, the anchor alone.

  Plain Python over Linen modules. Parameters are the nested dict
  {'anchor': ..., 'augmenting': {name: ...}, 'composition': {connection: ...}}.
  """

  def __init__(
    self,
    anchor: transformer.DecoderLM,
    *,
    augmenting: Mapping[str, AugmentingModel] | None = None,
    composition: CompositionConfig | None = None,
  ):
    """Places the connections; raises ValueError if they do not fit.

    Args:
      anchor: the model that is extended and that speaks.
      augmenting: the models that are read, by name.
      composition: required if, and only if, there are augmenting models.
    """
    self.augmenting = dict(augmenting or {})
    self.composition = composition
    if bool(self.augmenting) != (composition is not None):
      raise ValueError(
        'augmenting models and a composition belong together; got'
        f' augmenting={sorted(self.augmenting)}, composition={composition}.'
      )
    self.connections: tuple[Connection, ...] = ()
    if composition is not None:
      self.connections = composition.mapping.resolve(
        anchor_depth=anchor.depth,
        augmenting_depths={k: m.depth for k, m in self.augmenting.items()},
      )
      self.num_heads = composition.split_heads(anchor.config)
    self.anchor = anchor.clone(cuts=_cuts(self.composed_layers, anchor.depth))
    self.augmenting = {
      name: model.clone(cuts=_cuts(self.tapped_layers(name), model.depth))
      for name, model in self.augmenting.items()
    }

  @property
  def composed_layers(self) -> tuple[int, ...]:
    """Anchor layers at which connections end, ascending."""
    return tuple(sorted({c.anchor_layer for c in self.connections}))

  def tapped_layers(self, name: str) -> tuple[int, ...]:
    """Layers of an augmenting model that are read, ascending."""
    read = {
      c.augmenting_layer for c in self.connections if c.augmenting == name
    }
    return tuple(sorted(read))

  def cross_attention(self) -> CrossAttention:
    """Returns the module each connection applies to its own parameters."""
    return CrossAttention(
      embed_dim=self.anchor.width,
      num_heads=self.num_heads,
      config=self.composition,
      dtype=self.anchor.config.dtype,
    )

  def init_composition(self, rng: Array) -> dict[str, Any]:
    """Initialises Theta_C, boxed with logical axes, keyed by connection."""
    params = {}
    for c in self.connections:
      # By name, not by index: the order of listing must not matter.
      number = int(hashlib.sha256(c.key.encode()).hexdigest()[:8], 16)
      query = jnp.zeros((1, 1, self.anchor.width))
      source = jnp.zeros((1, 1, self.augmenting[c.augmenting].width))
      variables = self.cross_attention().init(
        jax.random.fold_in(rng, number), query, source
      )
      params[c.key] = variables['params']
    return params

  def init_params(self, rng: Array) -> dict[str, Any]:
    """Initialises every parameter, boxed with logical axes."""
    params = {'anchor': self.anchor.init_params(jax.random.fold_in(rng, 0))}
    if self.connections:
      params['augmenting'] = {
        name: model.init_params(jax.random.fold_in(rng, 1 + i))
        for i, (name, model) in enumerate(sorted(self.augmenting.items()))
      }
      params['composition'] = self.init_composition(rng)
    return params

  def __call__(
    self, params: Params, batch: Batch, *, logits_at_BM: Array | None = None
  ) -> Array:
    """Returns the logits [B, T, V] of whole, possibly packed, sequences.

    Args:
      params: the three subtrees.
      batch: `decoder_input_tokens`, `decoder_positions`,
        `decoder_segment_ids`, all int32 [B, T]; and, where the augmenting
        models have tokens of their own, `augmenting_input_tokens`,
        `augmenting_positions`, `augmenting_segment_ids` and
        `augmenting_visible_from`, all int32 [B, S]. Optional:
        `decoder_embedding_noise` [B, T, D], added to the anchor's embeddings
        in units of each one's root mean square.
      logits_at_BM: int32 indices into T; if given, only the logits of these
        positions are computed, [B, M, V].
    """
    segment_ids_BT = batch['decoder_segment_ids']
    anchor = _view(batch, 'decoder')
    own = 'augmenting_input_tokens' in batch
    side = 'augmenting' if own else 'decoder'
    if own:
      visible_from_BS = batch['augmenting_visible_from']
    else:
      index_T = jnp.arange(segment_ids_BT.shape[1])
      visible_from_BS = jnp.broadcast_to(index_T, segment_ids_BT.shape)
    mask_BTS = masks.cross_mask(
      segment_ids_BT=segment_ids_BT,
      augmenting_segment_ids_BS=batch[f'{side}_segment_ids'],
      visible_from_BS=visible_from_BS,
    )
    x_BTD, _ = self._stream(
      params, anchor, _view(batch, side), mask_BTS, cache=None
    )
    return self._logits(params, x_BTD, logits_at_BM)

  def extend(
    self,
    params: Params,
    tokens_BT: Array,
    positions_BT: Array,
    cache: ComposedCache,
    *,
    logits_at_BM: Array | None = None,
  ) -> tuple[Array, ComposedCache]:
    """Feeds tokens to all models through their caches: prefill or decode step.

    Args:
      params: the three subtrees.
      tokens_BT: int32; prompts are padded on the right, and what they are
        padded with is never read by a real position.
      positions_BT: int32 position, and cache slot, of each token.
      cache: from `empty_cache` or the last call.
      logits_at_BM: as in `__call__`.

    Returns:
      Logits [B, T, V], or [B, M, V] with `logits_at_BM`, and the cache.
    """
    slots = jax.tree.leaves(cache.anchor)[0].shape[-3]
    view = View(tokens_BT, attention.Positions.cached(positions_BT, slots))
    x_BTD, cache = self._stream(
      params, view, view, view.where.mask_BTS, cache=cache
    )
    return self._logits(params, x_BTD, logits_at_BM), cache

  def empty_cache(self, *, batch: int, slots: int) -> ComposedCache:
    """Returns caches of `slots` positions for all models and connections."""
    cross = {
      c.key: attention.KVCache.empty(
        batch=batch,
        slots=slots,
        heads=self.num_heads,
        head_dim=self.anchor.width // self.num_heads,
        dtype=self.anchor.config.dtype,
      )
      for c in self.connections
    }
    size = {'batch': batch, 'slots': slots}
    return ComposedCache(
      anchor=self.anchor.empty_cache(stop=self.anchor.depth, **size),
      augmenting={
        name: model.empty_cache(stop=self.tapped_layers(name)[-1] + 1, **size)
        for name, model in self.augmenting.items()
      },
      cross=cross,
    )

  def _stream(
    self,
    params: Params,
    anchor: View,
    augmenting: View,
    mask_BTS: Array,
    *,
    cache: ComposedCache | None,
  ) -> tuple[Array, ComposedCache | None]:
    """Interleaves the models; returns the anchor's last residual stream."""
    states, written = {}, ComposedCache({}, {}, {})
    for name, model in self.augmenting.items():
      states[name], written.augmenting[name] = model.apply(
        {'params': params['augmenting'][name]},
        augmenting.tokens,
        augmenting.where,
        layers=self.tapped_layers(name),
        cache=None if cache is None else cache.augmenting[name],
        method='hidden_states',
      )

    def run(x_BTD, start, stop):
      x_BTD, new = self._apply_anchor(
        params,
        'run',
        x_BTD,
        anchor.where,
        start=start,
        stop=stop,
        cache=None if cache is None else cache.anchor,
      )
      written.anchor.update(new)
      return x_BTD

    def cross(x_BTD, c):
      apply = self.cross_attention().apply
      theta = {'params': params['composition'][c.key]}
      source = apply(
        theta,
        states[c.augmenting][c.augmenting_layer],
        augmenting.where.positions_BT,
        method='read',
      )
      if cache is not None:
        source = cache.cross[c.key].write(
          source.key, source.value, augmenting.where.positions_BT
        )
        written.cross[c.key] = source
      return apply(
        theta,
        x_BTD,
        source,
        positions_BT=anchor.where.positions_BT,
        mask_BTS=mask_BTS,
        method='attend',
      )

    x_BTD, done = self._embed(params, anchor), 0
    for layer in self.composed_layers:
      x_BTD, done = run(x_BTD, done, layer + 1), layer + 1
      ending_here = [c for c in self.connections if c.anchor_layer == layer]
      update_BTD = sum(cross(x_BTD, c) for c in ending_here)
      x_BTD = layers.round_to(x_BTD + update_BTD, x_BTD.dtype)
    x_BTD = run(x_BTD, done, self.anchor.depth)
    return x_BTD, None if cache is None else written

  def _embed(self, params: Params, view: View) -> Array:
    x_BTD = self._apply_anchor(params, 'embed', view.tokens)
    if view.noise is not None:
      x_BTD = layers.disturb(x_BTD, view.noise)
    return x_BTD

  def _logits(
    self, params: Params, x_BTD: Array, logits_at_BM: Array | None
  ) -> Array:
    if logits_at_BM is not None:
      x_BTD = jnp.take_along_axis(x_BTD, logits_at_BM[..., None], axis=1)
    return self._apply_anchor(params, 'logits', x_BTD)

  def _apply_anchor(self, params: Params, method: str, *args, **kwargs) -> Any:
    return self.anchor.apply(
      {'params': params['anchor']}, *args, method=method, **kwargs
    )


def _cuts(layers_: Sequence[int], depth: int) -> tuple[int, ...]:
  """Returns where a stack must be cut so that each layer ends a segment."""
  return tuple(layer + 1 for layer in layers_ if 0 < layer + 1 < depth)


def _view(batch: Batch, side: str) -> View:
  where = attention.Positions.full(
    batch[f'{side}_positions'], batch[f'{side}_segment_ids']
  )
  noise = batch.get(f'{side}_embedding_noise')
  return View(batch[f'{side}_input_tokens'], where, noise)
