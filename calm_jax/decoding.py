"""Greedy decoding through the caches: prefill once, then a step a token."""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import batches, masks
from calm_jax.alignment import Reader, Reading
from calm_jax.array_types import Array, Params
from calm_jax.composition import ComposedCache, ComposedLM
from calm_jax.sources import AugmentingTokens

BUCKET = 16  # prompts are padded to multiples, so that few lengths compile


def predict_batch(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  augmenting: Mapping[str, AugmentingTokens] | None = None,
  transcripts: Mapping[str, tuple[Array, Array]] | None = None,
  *,
  model: ComposedLM,
  max_new_tokens: int,
  eos_ids: Sequence[int],
) -> Array:
  """Continues a batch of prompts with the likeliest token, again and again.

  Every generated token is given to all models (the paper, section 3.1). A row
  that has ended repeats EOS; the loop ends when all rows have.

  Args:
    params: of `model`.
    tokens_BT: int32 prompts of unequal length, padded on the right.
    lengths_B: int32, at least 1.
    augmenting: the prompts of models with a vocabulary of their own, padded on
      the right.
    transcripts: tokens_VR and counts_V of an `alignment.Transcript` for each of
      these that also reads what is generated.
    model: composed, or an anchor alone.
    max_new_tokens: M.
    eos_ids: each ends a row; with none, M tokens are decoded.

  Returns:
    int32 [B, M].
  """
  stop_id = eos_ids[0] if eos_ids else -1
  augmenting, transcripts = augmenting or {}, transcripts or {}
  logits_B1V, cache, used_B = _prefill(
    params,
    tokens_BT,
    lengths_B,
    augmenting,
    model=model,
    max_new_tokens=max_new_tokens,
    widths={name: one[0].shape[1] for name, one in transcripts.items()},
  )

  def choose(logits_B1V, ended_B):
    likeliest_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
    return jnp.where(ended_B, stop_id, likeliest_B)

  def unfinished(carry):
    step, _, _, ended_B, _, _ = carry
    return (step < max_new_tokens) & ~jnp.all(ended_B)

  def advance(carry):
    step, chosen_B, out_BM, ended_B, used_B, cache = carry
    out_BM = out_BM.at[:, step].set(chosen_B)
    for eos_id in eos_ids:
      ended_B |= chosen_B == eos_id
    given_B, positions_B1 = (
      jnp.maximum(chosen_B, 0),
      (lengths_B + step)[:, None],
    )
    new = dict.fromkeys(augmenting)  # nothing, to an encoder
    for name, transcript in transcripts.items():
      new[name] = _next_tokens(transcript, given_B, used_B[name], positions_B1)
      used_B = {**used_B, name: used_B[name] + transcript[1][given_B]}
    logits_B1V, cache = model.extend(
      params, given_B[:, None], positions_B1, cache, augmenting=new
    )
    chosen_B = choose(logits_B1V, ended_B)
    return step + 1, chosen_B, out_BM, ended_B, used_B, cache

  ended_B = jnp.zeros(lengths_B.shape, bool)
  out_BM = jnp.full((*lengths_B.shape, max_new_tokens), stop_id, jnp.int32)
  carry = (0, choose(logits_B1V, ended_B), out_BM, ended_B, used_B, cache)
  return jax.lax.while_loop(unfinished, advance, carry)[2]


def _prefill(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  augmenting: Mapping[str, AugmentingTokens],
  *,
  model: ComposedLM,
  max_new_tokens: int,
  widths: Mapping[str, int],
) -> tuple[Array, ComposedCache, dict[str, Array]]:
  """Gives all models their prompts.

  Returns:
    The logits [B, 1, V] after each prompt; the caches, with room for
    `max_new_tokens`, times R = `widths[name]` for a model of that name; and how
    many slots [B] of that model are taken.
  """
  B, T = tokens_BT.shape
  slots = {name: new.tokens_BS.shape[1] for name, new in augmenting.items()}
  used_B = {}
  for name, width in widths.items():
    slots[name] += max_new_tokens * width
    is_token_BS = augmenting[name].visible_from_BS < masks.NEVER
    used_B[name] = jnp.sum(is_token_BS, axis=1, dtype=jnp.int32)
  cache = model.empty_cache(
    batch=B, slots=T + max_new_tokens, augmenting_slots=slots
  )
  logits_B1V, cache = model.extend(
    params,
    tokens_BT,
    jnp.broadcast_to(jnp.arange(T), (B, T)),
    cache,
    augmenting=augmenting,
    logits_at_BM=lengths_B[:, None] - 1,
  )
  return logits_B1V, cache, used_B


def _next_tokens(
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


def make_generate(
  model: ComposedLM,
  *,
  max_new_tokens: int,
  eos_ids: Sequence[int],
  readers: Mapping[str, Reader] | None = None,
) -> Callable[..., list[list[int]]]:
  """Returns a compiled generate(params, prompts, readings=, batch_size=, ...).

  The result takes lists of ids and returns lists of new ids, cut before EOS.
  `readings` holds, by name of each reader, the same prompts as it reads them.
  """
  predict = jax.jit(
    functools.partial(
      predict_batch, model=model, max_new_tokens=max_new_tokens, eos_ids=eos_ids
    )
  )
  transcripts = {
    name: (reader.transcript.tokens_VR, reader.transcript.counts_V)
    for name, reader in (readers or {}).items()
    if reader.transcript is not None
  }
  transcripts = jax.tree.map(jnp.asarray, transcripts)

  def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    readings: Mapping[str, Sequence[Reading]] | None = None,
    batch_size: int = 64,
    pad_id: int | None = None,
  ) -> list[list[int]]:
    if any(not prompt for prompt in prompts):
      raise ValueError(
        'A prompt is empty: with nothing to read there is nothing to continue.'
        ' Give at least one token.'
      )
    # Rows of like length share a batch; results go back to their places.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    new_ids: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
      rows = order[start : start + batch_size]
      filled = rows + rows[:1] * (batch_size - len(rows))
      tokens_BT, lengths_B = _pad([prompts[i] for i in filled], pad_id)
      augmenting = {
        name: _pad_readings([of_prompts[i] for i in filled])
        for name, of_prompts in (readings or {}).items()
      }
      out_BM = np.asarray(
        predict(params, tokens_BT, lengths_B, augmenting, transcripts)
      )
      for i, row in zip(rows, out_BM, strict=False):
        new_ids[i] = _before(row.tolist(), eos_ids)
    return new_ids

  return generate


def _pad(
  prompts: Sequence[Sequence[int]], pad_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right, to a length of few."""
  longest = max(1, *map(len, prompts))  # a model without BOS may read nothing
  return batches.pad_prompts(
    prompts, length=-(-longest // BUCKET) * BUCKET, pad_id=pad_id
  )


def _pad_readings(readings: Sequence[Reading]) -> AugmentingTokens:
  tokens_BS, _ = _pad([ids for ids, _ in readings], None)
  visible_from_BS, _ = _pad([visible for _, visible in readings], masks.NEVER)
  positions_BS = np.broadcast_to(
    np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape
  )
  return AugmentingTokens(tokens_BS, positions_BS, visible_from_BS)


def _before(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
  return list(itertools.takewhile(lambda i: i not in eos_ids, ids))
