"""Trains a composition inside T5X, as one of its decoder-only models.

For those whose data, launching and monitoring are T5X's. T5X sees a model whose
`params` are Theta_C alone. The donors are in a collection `frozen`, which T5X
carries as `flax_mutables`: no gradient, no accumulator and no optimizer slot is
made for them, but **T5X writes them into every checkpoint**, unlike
`calm_jax.train`, and reads them back from there when a run continues.

T5X's world holds here: id 0 is padding, which positions are real follows from
target ids above 0, and all models read the same tokens.

Not to be confused with `t5x.contrib.calm` (Confident Adaptive Language
Modeling, arXiv 2207.07061).
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import flax.core
from flax.linen import partitioning as flax_partitioning
import flax.serialization
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from calm_jax import assembly, trees
from calm_jax.array_types import Array, Batch, Params
from calm_jax.composition import ComposedCache, ComposedLM
from calm_jax.connections import CompositionConfig
from calm_jax.models.pretrained import ModelSpec

try:
  from t5x import decoding, models, optimizers, utils
except ImportError as error:
  raise ImportError(
    f'calm_jax.contrib.t5x runs inside T5X, which cannot be imported ({error}).'
    ' It is not on PyPI: put a checkout of github.com/google-research/t5x, and'
    ' what it needs, on PYTHONPATH; docs/t5x.md has the commands. Without T5X,'
    ' calm_jax.train trains the same composition.'
  ) from error

import seqio

from calm_jax import data

# T5X's logical axes for ours, for its tables of sharding and factorization.
T5X_AXES = {
  'vocab': 'vocab',
  'embed': 'embed',
  'augmenting_embed': 'kv',  # beside 'embed' in one kernel, so replicated
  'mlp': 'mlp',
  'heads': 'joined_kv',  # heads x head size is one axis in our kernels
  'kv_heads': 'joined_kv',
  'head_dim': 'kv',
}

_INDEX = 'cache_index'  # T5X treats a leaf of this name apart


class ComposedModule(nn.Module):
  """A `ComposedLM` with T5X's calling convention.

  Its variables are `params`, Theta_C by connection, and `frozen`, the trees
  'anchor' and 'augmenting'. They come from `ComposedDecoderModel`, not `init`.

  Attributes:
    composed: the model that computes.
  """

  composed: ComposedLM

  def __call__(
    self,
    decoder_input_tokens: Array,
    decoder_target_tokens: Array,
    *,
    decoder_segment_ids: Array | None = None,
    decoder_positions: Array | None = None,
    decoder_causal_attention: None = None,
    decode: bool = False,
    enable_dropout: bool = False,
  ) -> Array:
    """Returns the logits [B, T, V]; there is no dropout to enable."""
    del decoder_causal_attention, decode, enable_dropout
    if decoder_segment_ids is None:
      decoder_segment_ids = (decoder_target_tokens > 0).astype(jnp.int32)
    if decoder_positions is None:
      index_T = jnp.arange(decoder_input_tokens.shape[1])
      decoder_positions = jnp.broadcast_to(index_T, decoder_input_tokens.shape)
    batch = {
      'decoder_input_tokens': decoder_input_tokens,
      'decoder_segment_ids': decoder_segment_ids,
      'decoder_positions': decoder_positions,
    }
    return self.composed(self._weights(), batch)

  def extend(
    self, tokens_BT: Array, positions_BT: Array, cache: ComposedCache, **chosen
  ) -> tuple[Array, ComposedCache]:
    """Feeds tokens through the caches; see `ComposedLM.extend`."""
    return self.composed.extend(
      self._weights(), tokens_BT, positions_BT, cache, **chosen
    )

  def _weights(self) -> Params:
    variables = self.variables
    return {**variables['frozen'], 'composition': variables['params']}


class ComposedDecoderModel(models.DecoderOnlyModel):
  """An anchor that reads augmenting models, as T5X trains and asks it.

  Where T5X passes `params`, its own methods are given all variables here: their
  `params` argument is only ever handed on to `_compute_logits` and the like.
  """

  def __init__(
    self,
    *,
    anchor: ModelSpec,
    augmenting: Mapping[str, ModelSpec],
    composition: CompositionConfig,
    optimizer_def: optimizers.OptimizerDefType,
    vocabulary: seqio.Vocabulary | None = None,
    decode_fn: models.DecodeFnCallable = decoding.temperature_sample,
    bos_id: int | None = None,
    **settings: Any,
  ):
    """Builds the model; reads no weights.

    Args:
      anchor: the model that is extended, from `pretrained_model`.
      augmenting: the models that are read, by name: decoders of the anchor's
        vocabulary.
      composition: where the connections are, and what each is.
      optimizer_def: T5X's, for Theta_C alone.
      vocabulary: what T5X compares with the task's; None wraps the anchor's.
      decode_fn: T5X's `temperature_sample`, `beam_search` or alike.
      bos_id: what sequences begin with; None is the anchor's BOS, or T5X's 0.
      **settings: of T5X's model: label_smoothing, z_loss,
        loss_normalizing_factor, feature_converter_cls.

    Raises:
      ValueError: if the models and the mapping do not fit, a model needs
        tokens of its own or is quantized, or T5X's bidirectional inputs are
        asked for.
    """
    if settings.pop('inputs_bidirectional_attention', False):
      raise ValueError(
        'inputs_bidirectional_attention = True: a composed model attends to'
        ' the past only, and so do its donors. Leave it out.'
      )
    composed = assembly.build_model(
      anchor, augmenting=augmenting, composition=composition
    )
    if composed.own_tokens:
      raise ValueError(
        f'{sorted(composed.own_tokens)} read tokens of their own (another'
        " vocabulary than the anchor's, or an encoder), which T5X's batches do"
        ' not have. Use calm_jax.train for these.'
      )
    self.specs = {'anchor': anchor, **augmenting}
    quantized = [k for k, v in self.specs.items() if v.quantization]
    if quantized:
      raise ValueError(
        f'{quantized} have a quantization; T5X keeps plain arrays. Leave it'
        ' out, or use calm_jax.train.'
      )
    if bos_id is None:
      bos_id = anchor.vocabulary.bos_id or 0
    settings.setdefault(
      'feature_converter_cls',
      functools.partial(seqio.DecoderFeatureConverter, bos_id=bos_id),
    )
    super().__init__(
      ComposedModule(composed),
      vocabulary or data.SeqIOVocabulary(lambda: anchor.vocabulary),
      optimizer_def,
      decode_fn=decode_fn,
      **settings,
    )
    self.composed = composed

  def get_initial_variables(
    self,
    rng: Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> flax.core.FrozenDict:
    """Initialises Theta_C; the frozen weights are NaN until grafted.

    So a run that is started without `DonorInitializer` shows it at once.
    """
    del input_shapes, input_types
    theta = self.composed.init_composition(rng)
    frozen = jax.eval_shape(self.composed.init_params, rng)
    del frozen['composition']
    unknown = lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype)
    return flax.core.freeze(
      {
        'params': nn.unbox(theta),
        'params_axes': axes_of(theta),
        'frozen': jax.tree.map(unknown, nn.unbox(frozen)),
        'frozen_axes': axes_of(frozen),
      }
    )

  def loss_fn(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: Array | None,
    flax_mutables: Params,
  ) -> tuple[Array, tuple[models.MetricsMap, Params]]:
    """Returns T5X's loss, to be differentiated in `params`, and metrics."""
    variables = {'params': params, **flax_mutables}
    loss, metrics = super().loss_fn(variables, batch, dropout_rng)
    return loss, (metrics, flax_mutables)

  def eval_fn(
    self, params: Params, batch: Batch, flax_mutables: Params
  ) -> tuple[Array, models.MetricsMap]:
    """Returns loss and metrics."""
    loss, (metrics, _) = self.loss_fn(params, batch, None, flax_mutables)
    return loss, metrics

  def predict_batch(
    self,
    params: Params,
    batch: Batch,
    rng: Array | None = None,
    *,
    flax_mutables: Params,
  ) -> Array:
    """Decodes by `decode_fn`; see `DecoderOnlyModel.predict_batch_with_aux`."""
    return self.predict_batch_with_aux(
      params, batch, rng, flax_mutables=flax_mutables
    )[0]

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: Array | None = None,
    *,
    flax_mutables: Params,
    **settings: Any,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Decodes by `decode_fn`, through the caches of all models."""
    variables = {'params': params, **flax_mutables}
    return super().predict_batch_with_aux(variables, batch, rng, **settings)

  def score_batch(
    self,
    params: Params,
    batch: Batch,
    return_intermediates: bool = False,
    *,
    flax_mutables: Params,
  ) -> Array:
    """Returns log p(targets | inputs) of each row in nats, [B]."""
    variables = {'params': params, **flax_mutables}
    return super().score_batch(variables, batch, return_intermediates)

  # What T5X's own methods call, with all variables as `params`.

  def _compute_logits(
    self, params, batch, dropout_rng=None, mutable=False, other_variables=None
  ):
    theta, others = params['params'], dict(other_variables or {})
    others['frozen'] = params['frozen']
    return super()._compute_logits(theta, batch, dropout_rng, mutable, others)

  def _compute_kv_cache(self, params, inputs, causal_attention_mask):
    del causal_attention_mask
    B, T = inputs.shape
    lengths_B = jnp.sum(inputs[:, 1:] != 0, axis=-1)  # BOS is not counted
    _, cache = self.module.apply(
      params,
      inputs,
      jnp.broadcast_to(jnp.arange(T), (B, T)),
      self.composed.empty_cache(batch=B, slots=T),
      logits_at_BM=jnp.zeros((B, 1), jnp.int32),
      method='extend',
    )
    return _as_dict(cache, next_position=lengths_B), lengths_B

  def _compute_logits_from_slice(
    self, decoding_state, params, max_decode_length
  ):
    tokens_B1, kept = decoding_state.cur_token, dict(decoding_state.cache)
    # T5X's own index does not count the prompt in beam_search.
    next_position = kept.pop(_INDEX)
    empty = functools.partial(
      self.composed.empty_cache, batch=len(tokens_B1), slots=max_decode_length
    )
    cache = flax.serialization.from_state_dict(jax.eval_shape(empty), kept)
    logits_B1V, cache = self.module.apply(
      params,
      tokens_B1,
      next_position.reshape(-1, 1),
      cache,
      method='extend',
    )
    return logits_B1V[:, 0], _as_dict(cache, next_position=next_position + 1)


def _as_dict(cache: ComposedCache, *, next_position: Array) -> dict[str, Any]:
  """Returns nested dicts with the batch first, for T5X to spread over beams."""
  return {**flax.serialization.to_state_dict(cache), _INDEX: next_position}


class DonorInitializer(utils.TrainStateInitializer):
  """Starts a run with the donors in their place, on T5X's partitioner.

  A run that continues from a checkpoint of its own takes all from there.
  """

  def __init__(self, optimizer_def, init_fn, *args: Any, **kwargs: Any):
    super().__init__(optimizer_def, init_fn, *args, **kwargs)
    self._model = init_fn.__self__

  def from_scratch(self, init_rng: Array) -> Any:
    """Returns the train state at step 0, each part made where it belongs."""
    without_donors = lambda state: state.replace_flax_mutables(
      flax.core.FrozenDict()
    )
    init = self._partitioner.partition(
      lambda rng: without_donors(self._initialize_train_state(rng)),
      in_axis_resources=None,
      out_axis_resources=without_donors(self.train_state_axes),
    )
    places = jax.tree.map(
      lambda spec: NamedSharding(self._partitioner.mesh, spec),
      flax.core.unfreeze(self.train_state_axes.flax_mutables['frozen']),
    )
    frozen = load_donors(self._model, places)
    return init(init_rng).replace_flax_mutables(
      flax.core.freeze({'frozen': frozen})
    )


def load_donors(model: ComposedDecoderModel, places: Any) -> Params:
  """Reads (or, if so described, initialises) the donors onto `places`."""
  composed = model.composed

  def load(name, tower, places, seed):
    loaded = assembly.load(model.specs[name], tower, places=places, seed=seed)
    if jax.process_index() == 0:
      print(f'{name}: {loaded.origin}; {loaded.report}', flush=True)
    return loaded.params

  return {
    'anchor': load('anchor', composed.anchor, places['anchor'], 0),
    'augmenting': {
      name: load(name, tower, places['augmenting'][name], 1 + i)
      for i, (name, tower) in enumerate(sorted(composed.augmenting.items()))
    },
  }


def axes_of(boxed: Any) -> Params:
  """Returns our logical axes as T5X keeps them, in '<name>_axes' leaves."""

  def one(leaf):
    names = leaf.names if isinstance(leaf, nn.Partitioned) else ()
    return flax_partitioning.AxisMetadata(
      tuple(name and T5X_AXES[name] for name in names)
    )

  named = jax.tree_util.tree_flatten_with_path(
    boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
  )[0]
  return trees.unflatten(
    {f'{trees.path_name(path)}_axes': one(leaf) for path, leaf in named}
  )
