"""The idea: frozen models that one trained cross-attention composes.

CALM (arXiv 2401.02412), section 3.1. With H_B,j the anchor's hidden states
after block j and H_A,i those of an augmenting model after block i,

  H_{A+B},j = H_B,j + f_cross(f_proj(H_A,i), H_B,j)

is what the anchor's block j + 1 reads. f_proj and f_cross are all that is
trained (Theta_C, the subtree `composition`).
"""

from collections.abc import Collection, Mapping, Sequence
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax import embedding_noise, sources
from calm_jax import lora as lora_lib
from calm_jax.array_types import Array, Batch, Params
from calm_jax.composed_cache import ComposedCache
from calm_jax.connections import CompositionConfig, Connection
from calm_jax.cross_attention import CrossAttention
from calm_jax.lora import LoraConfig
from calm_jax.models import attention, kernels, layers, transformer
from calm_jax.sources import AugmentingModel, AugmentingTokens, Source, View


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
    own_tokens: Collection[str] = (),
    lora: LoraConfig | None = None,
    remat: bool = False,
  ):
    """Places the connections; raises ValueError if they do not fit.

    Args:
      anchor: the model that is extended and that speaks.
      augmenting: the models that are read, by name.
      composition: required if, and only if, there are augmenting models.
      own_tokens: names of those with a vocabulary of their own; those that read
        prompts alone always have tokens of their own.
      lora: if given, the anchor's matrices are updated by params['lora'].
      remat: whether what is differentiated, and only that, is computed again in
        the backward pass instead of being kept.
    """
    self.augmenting = dict(augmenting or {})
    self.composition = composition
    self.lora = lora
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
    self.prompt_only = {
      name
      for name, model in self.augmenting.items()
      if not model.reads_targets or composition.augmenting_context == 'prompt'
    }
    self.own_tokens = self.prompt_only | set(own_tokens)
    self.remat = remat
    lowest = self.composed_layers[0] + 1 if self.connections else 0
    self.anchor = anchor.clone(
      cuts=_cuts(self.composed_layers, anchor.depth),
      remat_from=lowest if remat else None,
    )
    self.augmenting = {
      name: model.clone(cuts=_cuts(self.tapped_layers(name), model.depth))
      for name, model in self.augmenting.items()
    }

  def tower(self, name: str) -> AugmentingModel:
    """Returns the model called so; the anchor is called 'anchor'."""
    return self.anchor if name == 'anchor' else self.augmenting[name]

  @property
  def token_readers(self) -> list[AugmentingModel]:
    """The anchor, and the models that read its tokens."""
    shared = self.augmenting.keys() - self.own_tokens
    return [self.anchor, *(self.augmenting[name] for name in shared)]

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

  def cross_attention(self, kernel: kernels.Kernel = 'xla') -> CrossAttention:
    """Returns the module each connection applies to its own parameters."""
    return CrossAttention(
      embed_dim=self.anchor.width,
      num_heads=self.num_heads,
      config=self.composition,
      dtype=self.anchor.config.dtype,
      kernel=kernel,
      parent=None,  # not a part of a module that calls us
    )

  def init_composition(self, rng: Array) -> dict[str, Any]:
    """Initialises Theta_C, boxed with logical axes, keyed by connection."""
    params = {}
    for c in self.connections:
      # By name, not by index: the order of listing must not matter.
      number = int(hashlib.sha256(c.key.encode()).hexdigest()[:8], 16)
      query = jnp.zeros((1, 1, self.anchor.width))
      source = jnp.zeros((1, 1, self.augmenting[c.augmenting].width))
      key = jax.random.fold_in(rng, number)
      variables = self.cross_attention().init(key, query, source)
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
    if self.lora is not None:
      params['lora'] = lora_lib.init(rng, self.anchor, self.lora)
    return params

  def __call__(self, params: Params, batch: Batch) -> Array:
    """Returns the logits [B, T, V] of `hidden`."""
    return self.logits(params, self.hidden(params, batch))

  def hidden(
    self, params: Params, batch: Batch, *, states_at_BM: Array | None = None
  ) -> Array:
    """Returns the anchor's last states [B, T, D] of whole sequences.

    Sequences may be packed.

    Args:
      params: the three subtrees.
      batch: `decoder_input_tokens`, `decoder_positions`,
        `decoder_segment_ids`, all int32 [B, T]; and, where an augmenting model
        called x has tokens of its own, `x_input_tokens`, `x_positions`,
        `x_segment_ids` and `x_visible_from`, all int32 [B, S] (x may also be
        'augmenting', for all that have no others). Optional:
        `decoder_embedding_noise` [B, T, D], added to the anchor's embeddings
        in units of each one's root mean square.
      states_at_BM: int32 indices into T; if given, only the states of these
        positions are returned, [B, M, D].
    """
    where = attention.Positions.full(
      batch['decoder_positions'], batch['decoder_segment_ids']
    )
    noise = batch.get('decoder_embedding_noise')
    read = {
      name: sources.from_batch(batch, name, self) for name in self.augmenting
    }
    anchor = View(batch['decoder_input_tokens'], where, noise)
    x_BTD, _ = self._stream(params, anchor, read, cache=None)
    return _take(x_BTD, states_at_BM)

  def logits(self, params: Params, x_BTD: Array) -> Array:
    """Returns the logits [B, T, V] of states after the last block."""
    frozen = {'params': params['anchor']}  # LoRA leaves the head as it is
    return self.anchor.apply(frozen, x_BTD, method='logits')

  def extend(
    self,
    params: Params,
    tokens_BT: Array,
    positions_BT: Array,
    cache: ComposedCache,
    *,
    augmenting: Mapping[str, AugmentingTokens | None] | None = None,
    logits_at_BM: Array | None = None,
  ) -> tuple[Array, ComposedCache]:
    """Feeds tokens to all models through their caches: prefill or decode step.

    Args:
      params: the three subtrees.
      tokens_BT: int32; prompts are padded on the right, and what they are
        padded with is never read by a real position.
      positions_BT: int32 position, and cache slot, of each token.
      cache: from `empty_cache` or the last call.
      augmenting: the same text for each model that has tokens of its own; None
        for one that has read the prompt and reads no more. Models that are not
        named read the anchor's tokens.
      logits_at_BM: as `states_at_BM` in `hidden`.

    Returns:
      Logits [B, T, V], or [B, M, V] with `logits_at_BM`, and the cache.
    """
    slots = jax.tree.leaves(cache.anchor)[0].shape[-3]
    anchor = View(tokens_BT, attention.Positions.cached(positions_BT, slots))
    shared = AugmentingTokens(tokens_BT, positions_BT, positions_BT)
    augmenting = augmenting or {}
    if self.own_tokens - augmenting.keys():
      raise ValueError(
        f'{sorted(self.own_tokens)} read tokens of their own; given are those'
        f' of {sorted(augmenting)}.'
      )
    read = {
      name: sources.from_step(
        augmenting.get(name, shared),
        name,
        self,
        positions_BT=positions_BT,
        visible_from_BC=cache.visible_from[name],
      )
      for name in self.augmenting
    }
    x_BTD, cache = self._stream(params, anchor, read, cache=cache)
    return self.logits(params, _take(x_BTD, logits_at_BM)), cache

  def empty_cache(
    self,
    *,
    batch: int,
    slots: int,
    augmenting_slots: Mapping[str, int] | None = None,
  ) -> ComposedCache:
    """Returns empty caches; see `ComposedCache.empty`."""
    slots_of = dict.fromkeys(self.augmenting, slots) | (augmenting_slots or {})
    return ComposedCache.empty(self, batch, slots=slots, slots_of=slots_of)

  def _stream(
    self,
    params: Params,
    anchor: View,
    read: Mapping[str, Source],
    *,
    cache: ComposedCache | None,
  ) -> tuple[Array, ComposedCache | None]:
    """Interleaves the models; returns the anchor's last residual stream."""
    states, written = {}, ComposedCache({}, {}, {}, {})
    for name, source in read.items():
      written.visible_from[name] = source.visible_from_BC
      if source.view is None:
        continue
      old = None if cache is None else cache.augmenting.get(name)
      states[name], new = self.augmenting[name].apply(
        {'params': params['augmenting'][name]},
        source.view.tokens,
        source.view.where,
        layers=self.tapped_layers(name),
        cache=old,
        method='hidden_states',
      )
      if old is not None:
        written.augmenting[name] = new

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
      kernel = self.anchor.kernel if cache is None else 'xla'
      apply = self.cross_attention(kernel).apply
      theta = {'params': params['composition'][c.key]}
      source = read[c.augmenting]
      memory = None if cache is None else cache.cross[c.key]
      if source.view is not None:
        new = apply(
          theta,
          states[c.augmenting][c.augmenting_layer],
          source.text_positions_BS,
          method='read',
        )
        if memory is not None:
          slots_BS = source.view.where.positions_BT
          new = memory.write(new.key, new.value, slots_BS)
        memory = new
      written.cross[c.key] = memory
      attend = functools.partial(apply, method='attend')
      return (jax.checkpoint(attend) if self.remat else attend)(
        theta,
        x_BTD,
        memory,
        positions_BT=anchor.where.positions_BT,
        mask_BTS=source.mask_BTS,
        pattern=source.pattern,
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
      x_BTD = embedding_noise.add(x_BTD, view.noise)
    return x_BTD

  def _apply_anchor(self, params: Params, method: str, *args, **kwargs) -> Any:
    variables = {'params': params['anchor']}
    if self.lora is not None:
      variables['lora'] = lora_lib.scaled(params['lora'], self.lora)
    return self.anchor.apply(variables, *args, method=method, **kwargs)


def _take(x_BTD: Array, at_BM: Array | None) -> Array:
  if at_BM is None:
    return x_BTD
  return jnp.take_along_axis(x_BTD, at_BM[..., None], axis=1)


def _cuts(layers_: Sequence[int], depth: int) -> tuple[int, ...]:
  """Returns where a stack must be cut so that each layer ends a segment."""
  return tuple(layer + 1 for layer in layers_ if 0 < layer + 1 < depth)
