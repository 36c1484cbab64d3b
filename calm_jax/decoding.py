"""Decoding on the device: a prompt at once, then a token a step.

`generation` calls the two functions here, and looks at what was chosen between
chunks of steps. Every generated token is given to all models (the paper,
section 3.1); models with a vocabulary of their own read its bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax import masks, sampling
from calm_jax.array_types import Array, Batch, Params
from calm_jax.composed_cache import ComposedCache
from calm_jax.composition import ComposedLM
from calm_jax.sampling import DecodingConfig
from calm_jax.sources import AugmentingTokens

# For each model that reads generated tokens by a table of its own, the arrays
# tokens_VR and counts_V of its `alignment.Transcript`.
Transcripts = Mapping[str, tuple[Array, Array]]


@flax.struct.dataclass
class DecodeState:
  """All that is known after some steps.

  Attributes:
    cache: of all models; holds the prompt and all chosen tokens but the last.
    used_B: by name of each model with a transcript, int32, the slots it fills.
    lengths_B: int32, of the prompts.
    seeds_B: uint32, see `sampling.choose`.
    step: int32 scalar, tokens chosen so far, at least 1.
    tokens_BM: int32, these tokens; a row that has ended repeats EOS.
    last_step: int32 scalar, how many will be chosen at most.
    ended_B: bool, whether a row has chosen EOS.
  """

  cache: ComposedCache
  used_B: dict[str, Array]
  lengths_B: Array
  seeds_B: Array
  step: Array
  last_step: Array
  tokens_BM: Array
  ended_B: Array


def prefill(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  augmenting: Mapping[str, AugmentingTokens],
  transcripts: Transcripts,
  *,
  model: ComposedLM,
  room: int,
) -> tuple[Array, ComposedCache, dict[str, Array]]:
  """Gives all models their prompts.

  Args:
    params: of `model`.
    tokens_BT: int32 prompts of unequal length, padded on the right.
    lengths_B: int32, at least 1.
    augmenting: the prompts of models with tokens of their own, padded on the
      right.
    transcripts: of those that also read what is generated.
    model: composed, or an anchor alone.
    room: M, how many tokens can follow.

  Returns:
    The logits [B, V] after each prompt, the caches, and `DecodeState.used_B`.
  """
  B, T = tokens_BT.shape
  slots = {name: new.tokens_BS.shape[1] for name, new in augmenting.items()}
  used_B = {}
  for name, (tokens_VR, _) in transcripts.items():
    slots[name] += room * tokens_VR.shape[1]
    is_token_BS = augmenting[name].visible_from_BS < masks.NEVER
    used_B[name] = jnp.sum(is_token_BS, axis=1, dtype=jnp.int32)
  length, limit = T + room, longest_text(model)
  if limit is not None and length > limit:
    length -= 1  # the last token is not read
  cache = model.empty_cache(batch=B, slots=length, augmenting_slots=slots)
  logits_B1V, cache = model.extend(
    params,
    tokens_BT,
    jnp.broadcast_to(jnp.arange(T), (B, T)),
    cache,
    augmenting=augmenting,
    logits_at_BM=lengths_B[:, None] - 1,
  )
  return _readable(logits_B1V, model), cache, used_B


def begin(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  seeds_BN: Array,
  last_step: Array,
  augmenting: Mapping[str, AugmentingTokens],
  transcripts: Transcripts,
  *,
  model: ComposedLM,
  room: int,
  eos_ids: Sequence[int],
) -> tuple[Array, DecodeState]:
  """Reads the prompts, each for N rows; nothing is chosen yet.

  Args:
    params: as in `prefill`, and so the other arguments that it has.
    tokens_BT: as there.
    lengths_B: as there.
    seeds_BN: uint32, of each row.
    last_step: int32 scalar, how many tokens will be chosen at most.
    augmenting: as in `prefill`.
    transcripts: as in `prefill`.
    model: as in `prefill`.
    room: as in `prefill`.
    eos_ids: each ends a row.

  Returns:
    The logits [B N, V], and the state at step 0, rows of a prompt side by side.
  """
  logits_BV, cache, used_B = prefill(
    params,
    tokens_BT,
    lengths_B,
    augmenting,
    transcripts,
    model=model,
    room=room,
  )
  B, N = seeds_BN.shape
  rows = jnp.repeat(jnp.arange(B), N)
  state = DecodeState(
    cache=cache.take_rows(rows) if N > 1 else cache,
    used_B=jax.tree.map(lambda x: x[rows], used_B),
    lengths_B=lengths_B[rows],
    seeds_B=seeds_BN.reshape(B * N),
    step=jnp.int32(0),
    last_step=jnp.int32(last_step),
    tokens_BM=jnp.full((B * N, room), filler(eos_ids), jnp.int32),
    ended_B=jnp.zeros(B * N, bool),
  )
  return logits_BV[rows], state


def start(
  *prompts: Any, config: DecodingConfig, eos_ids: Sequence[int], **settings: Any
) -> DecodeState:
  """Reads the prompts, and chooses a first token for each of N samples.

  Args:
    *prompts: as in `begin`.
    config: how tokens are chosen.
    eos_ids: each ends a row.
    **settings: as in `begin`.
  """
  logits_BV, state = begin(*prompts, eos_ids=eos_ids, **settings)
  return _choose(state, logits_BV, config, eos_ids)


def advance(
  params: Params,
  state: DecodeState,
  until: Array,
  transcripts: Transcripts,
  *,
  model: ComposedLM,
  config: DecodingConfig,
  eos_ids: Sequence[int],
) -> DecodeState:
  """Chooses tokens up to step `until`, or until all rows have ended."""
  until = jnp.minimum(until, state.last_step)

  def unfinished(state):
    return (state.step < until) & ~jnp.all(state.ended_B)

  def step(state):
    logits_BV, state = feed(params, state, transcripts, model=model)
    return _choose(state, logits_BV, config, eos_ids)

  return jax.lax.while_loop(unfinished, step, state)


def feed(
  params: Params,
  state: DecodeState,
  transcripts: Transcripts,
  *,
  model: ComposedLM,
) -> tuple[Array, DecodeState]:
  """Gives the last chosen token to all models; returns the logits [B, V]."""
  last_B = jax.lax.dynamic_index_in_dim(
    state.tokens_BM, state.step - 1, axis=1, keepdims=False
  )
  positions_B1 = (state.lengths_B + state.step - 1)[:, None]
  new: dict[str, AugmentingTokens | None] = dict.fromkeys(model.own_tokens)
  used_B = dict(state.used_B)
  for name, transcript in transcripts.items():
    new[name] = _transcribed(transcript, last_B, used_B[name], positions_B1)
    used_B[name] += transcript[1][last_B]
  logits_B1V, cache = model.extend(
    params, last_B[:, None], positions_B1, state.cache, augmenting=new
  )
  return _readable(logits_B1V, model), state.replace(cache=cache, used_B=used_B)


def _readable(logits_B1V: Array, model: ComposedLM) -> Array:
  """Returns the logits of tokens that all models can be given next, [B, v].

  Tables are padded to different sizes even where the vocabulary is one.
  """
  return logits_B1V[:, 0, : readable_size(model)]


def readable_size(model: ComposedLM) -> int:
  """Returns how many ids all that read the anchor's tokens have rows for."""
  return min(tower.config.vocab_size for tower in model.token_readers)


def longest_text(model: ComposedLM) -> int | None:
  """Returns how many of the anchor's tokens a model can read; None is all."""
  limits = [tower.config.longest for tower in model.token_readers]
  return min((one for one in limits if one is not None), default=None)


def _choose(
  state: DecodeState,
  logits_BV: Array,
  config: DecodingConfig,
  eos_ids: Sequence[int],
) -> DecodeState:
  """Writes the next token of each row."""
  chosen_B = sampling.choose(logits_BV, state.seeds_B, state.step, config)
  chosen_B = jnp.where(state.ended_B, filler(eos_ids), chosen_B)
  return state.replace(
    step=state.step + 1,
    tokens_BM=state.tokens_BM.at[:, state.step].set(chosen_B),
    ended_B=state.ended_B | is_any_of(chosen_B, eos_ids),
  )


def filler(eos_ids: Sequence[int]) -> int:
  """Returns what stands after the end of a row."""
  return eos_ids[0] if eos_ids else 0


def is_any_of(tokens: Array, ids: Sequence[int]) -> Array:
  """Returns whether each token is one of `ids`, bool of the same shape."""
  return jnp.isin(tokens, jnp.asarray(ids, jnp.int32))


def _transcribed(
  transcript: tuple[Array, Array],
  given_B: Array,
  used_B: Array,
  positions_B1: Array,
) -> AugmentingTokens:
  """Returns what the anchor's new tokens are to an augmenting model.

  A token that is less than R tokens is padded. The padding lies beyond the
  tokens of its row, where the next step writes: the cache has no holes.
  """
  tokens_VR, counts_V = transcript
  index_R = jnp.arange(tokens_VR.shape[1])[None]
  return AugmentingTokens(
    tokens_BS=tokens_VR[given_B],
    positions_BS=used_B[:, None] + index_R,
    visible_from_BS=jnp.where(
      index_R < counts_V[given_B][:, None], positions_B1, masks.NEVER
    ),
  )


def predict_batch(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  augmenting: Mapping[str, AugmentingTokens] | None = None,
  transcripts: Transcripts | None = None,
  *,
  model: ComposedLM,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  config: DecodingConfig = DecodingConfig(),
) -> Array:
  """Continues a batch of prompts in one go, as T5X's function of this name.

  Returns:
    int32 [B, max_new_tokens]; a row that has ended repeats EOS.
  """
  augmenting, transcripts = augmenting or {}, transcripts or {}
  settings = {'model': model, 'config': config, 'eos_ids': eos_ids}
  seeds_B1 = jnp.arange(len(tokens_BT), dtype=jnp.uint32)[:, None]
  state = start(
    params,
    tokens_BT,
    lengths_B,
    seeds_B1,
    max_new_tokens,
    augmenting,
    transcripts,
    room=max_new_tokens,
    **settings,
  )
  state = advance(params, state, max_new_tokens, transcripts, **settings)
  return state.tokens_BM


@flax.struct.dataclass
class Scores:
  """How likely the targets of each row are.

  Attributes:
    log_likelihood_B: float32, in nats, summed over the row's targets; a
      distribution is over the tokens that can be said, see `readable_size`.
    count_B: int32, how many targets a row has.
    is_greedy_B: bool, whether each target is the likeliest token.
  """

  log_likelihood_B: Array
  count_B: Array
  is_greedy_B: Array


def score_batch(params: Params, batch: Batch, *, model: ComposedLM) -> Scores:
  """Scores the targets of unpacked rows; see `calm_jax.batches` for the keys.

  The target of a position counts where `decoder_loss_weights` is not 0.
  """
  logits_BTV = model(params, batch)[..., : readable_size(model)]
  logits_BTV = logits_BTV.astype(jnp.float32)
  targets_BT = batch['decoder_target_tokens']
  is_target_BT = batch['decoder_loss_weights'] > 0
  logit_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
  chance_BT = logit_BT1[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1)
  is_likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
  return Scores(
    log_likelihood_B=jnp.sum(chance_BT, axis=1, where=is_target_BT),
    count_B=jnp.sum(is_target_BT, axis=1, dtype=jnp.int32),
    is_greedy_B=jnp.all(is_likeliest_BT | ~is_target_BT, axis=1),
  )
