"""Beam search: the likeliest continuations as wholes, K of them at a time.

Like `decoding.start` and `decoding.advance`, over rows of which K belong to
each prompt. A hypothesis that ends is set aside with its score, which is its
log-likelihood over length ** length_penalty. The search of a prompt is over
when it has K hypotheses aside and no live one is better than the worst of them.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from calm_jax import decoding
from calm_jax.array_types import Array, Params
from calm_jax.composition import ComposedLM
from calm_jax.decoding import DecodeState, Transcripts
from calm_jax.sampling import DecodingConfig

_WORST = -1e9  # the score of a hypothesis that is none


@flax.struct.dataclass
class BeamState:
  """All that is known after some steps.

  Attributes:
    live: of B K rows. A prompt that is done has ended in all its rows.
    scores_BK: float32, log-likelihoods of the live hypotheses.
    aside_BKM: int32, the best hypotheses that have ended.
    aside_scores_BK: float32, theirs, best first.
  """

  live: DecodeState
  scores_BK: Array
  aside_BKM: Array
  aside_scores_BK: Array

  @property
  def step(self) -> Array:
    """Tokens chosen so far."""
    return self.live.step

  @property
  def ended_B(self) -> Array:
    """Whether each row's prompt is done, bool [B K]."""
    return self.live.ended_B

  @property
  def tokens_BM(self) -> Array:
    """The hypotheses, best first for each prompt, int32 [B K, M]."""
    B, K, M = self.aside_BKM.shape
    return self.aside_BKM.reshape(B * K, M)


def start(
  *prompts: Any, config: DecodingConfig, eos_ids: Sequence[int], **settings: Any
) -> BeamState:
  """Reads the prompts; the likeliest K first tokens begin the hypotheses.

  The arguments are those of `decoding.start`, with seeds for K rows of each
  prompt, which are not used.
  """
  logits_RV, live = decoding.begin(*prompts, eos_ids=eos_ids, **settings)
  K, (R, M) = config.num_beams, live.tokens_BM.shape
  # All hypotheses are empty, and one of them is enough.
  first_K = jnp.where(jnp.arange(K) == 0, 0.0, _WORST)
  state = BeamState(
    live=live,
    scores_BK=jnp.broadcast_to(first_K, (R // K, K)),
    aside_BKM=live.tokens_BM.reshape(R // K, K, M),
    aside_scores_BK=jnp.full((R // K, K), _WORST),
  )
  return _choose(state, logits_RV, config, eos_ids)


def advance(
  params: Params,
  state: BeamState,
  until: Array,
  transcripts: Transcripts,
  *,
  model: ComposedLM,
  config: DecodingConfig,
  eos_ids: Sequence[int],
) -> BeamState:
  """Searches up to step `until`, or until all prompts are done."""
  until = jnp.minimum(until, state.live.last_step)

  def unfinished(state):
    return (state.step < until) & ~jnp.all(state.ended_B)

  def step(state):
    logits_RV, live = decoding.feed(
      params, state.live, transcripts, model=model
    )
    return _choose(state.replace(live=live), logits_RV, config, eos_ids)

  return jax.lax.while_loop(unfinished, step, state)


def _choose(
  state: BeamState,
  logits_RV: Array,
  config: DecodingConfig,
  eos_ids: Sequence[int],
) -> BeamState:
  """Extends each hypothesis by each token, and keeps the best of all.

  At the last step every hypothesis ends.
  """
  (B, K), V = state.scores_BK.shape, logits_RV.shape[-1]
  M, length = state.aside_BKM.shape[-1], state.step + 1
  is_last = length >= state.live.last_step
  chances_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
  scores_BKV = state.scores_BK[..., None] + chances_RV.reshape(B, K, V)
  # Each live hypothesis may end in one way for each EOS; K others must remain.
  C = min((1 + max(1, len(eos_ids))) * K, K * V)
  scores_BC, flat_BC = jax.lax.top_k(scores_BKV.reshape(B, K * V), C)
  beam_BC, token_BC = flat_BC // V, flat_BC % V
  rows_BC = jnp.arange(B)[:, None] * K + beam_BC
  tokens_BCM = state.live.tokens_BM[rows_BC].at[:, :, state.step].set(token_BC)
  ends_BC = decoding.is_any_of(token_BC, eos_ids) | is_last

  # Those that end are set aside, if they are among the best K of all.
  is_done_B1 = state.ended_B.reshape(B, K)[:, :1]
  counts_BC = ends_BC & (jnp.arange(C) < K)[None] & ~is_done_B1
  divisor = length.astype(jnp.float32) ** float(config.length_penalty)
  final_BC = scores_BC / divisor
  aside_scores_BX = jnp.concatenate(
    [state.aside_scores_BK, jnp.where(counts_BC, final_BC, _WORST)], axis=1
  )
  aside_scores_BK, best_BK = jax.lax.top_k(aside_scores_BX, K)
  aside_BXM = jnp.concatenate([state.aside_BKM, tokens_BCM], axis=1)
  aside_BKM = jnp.take_along_axis(aside_BXM, best_BK[..., None], axis=1)

  # The best K others live on.
  scores_BK, on_BK = jax.lax.top_k(jnp.where(ends_BC, _WORST, scores_BC), K)
  rows_R = jnp.take_along_axis(rows_BC, on_BK, axis=1).reshape(B * K)
  tokens_BKM = jnp.take_along_axis(tokens_BCM, on_BK[..., None], axis=1)
  best_B1 = scores_BK[:, :1] / divisor
  is_full_B1 = aside_scores_BK[:, -1:] > _WORST
  is_done_B1 |= is_full_B1 & (best_B1 <= aside_scores_BK[:, -1:]) | is_last
  live = state.live
  live = live.replace(
    cache=live.cache.take_rows(rows_R),
    used_B=jax.tree.map(lambda x: x[rows_R], live.used_B),
    step=length,
    tokens_BM=tokens_BKM.reshape(B * K, M),
    ended_B=jnp.broadcast_to(is_done_B1, (B, K)).reshape(B * K),
  )
  return BeamState(live, scores_BK, aside_BKM, aside_scores_BK)
