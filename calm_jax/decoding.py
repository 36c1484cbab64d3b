"""Greedy decoding through the caches: prefill once, then a step a token."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import batches
from calm_jax.array_types import Array, Params
from calm_jax.composition import ComposedLM

BUCKET = 16  # prompts are padded to multiples, so that few lengths compile


def predict_batch(
  params: Params,
  tokens_BT: Array,
  lengths_B: Array,
  *,
  model: ComposedLM,
  max_new_tokens: int,
  eos_id: int | None,
) -> Array:
  """Continues a batch of prompts with the likeliest token, again and again.

  Every generated token is given to all models (the paper, section 3.1). A row
  that has ended repeats EOS; the loop ends when all rows have.

  Args:
    params: of `model`.
    tokens_BT: int32 prompts of unequal length, padded on the right.
    lengths_B: int32, at least 1.
    model: composed, or an anchor alone.
    max_new_tokens: M.
    eos_id: ends a row; None decodes M tokens.

  Returns:
    int32 [B, M].
  """
  B, T = tokens_BT.shape
  stop_id = -1 if eos_id is None else eos_id
  cache = model.empty_cache(batch=B, slots=T + max_new_tokens)
  positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
  logits_B1V, cache = model.extend(
    params, tokens_BT, positions_BT, cache, logits_at_BM=lengths_B[:, None] - 1
  )

  def choose(logits_B1V, ended_B):
    likeliest_B = jnp.argmax(logits_B1V[:, 0], axis=-1).astype(jnp.int32)
    return jnp.where(ended_B, stop_id, likeliest_B)

  def unfinished(carry):
    step, _, _, ended_B, _ = carry
    return (step < max_new_tokens) & ~jnp.all(ended_B)

  def advance(carry):
    step, chosen_B, out_BM, ended_B, cache = carry
    out_BM = out_BM.at[:, step].set(chosen_B)
    ended_B = ended_B | (chosen_B == stop_id)
    positions_B1 = (lengths_B + step)[:, None]
    logits_B1V, cache = model.extend(
      params, jnp.maximum(chosen_B, 0)[:, None], positions_B1, cache
    )
    return step + 1, choose(logits_B1V, ended_B), out_BM, ended_B, cache

  ended_B = jnp.zeros((B,), bool)
  out_BM = jnp.full((B, max_new_tokens), stop_id, jnp.int32)
  carry = (0, choose(logits_B1V, ended_B), out_BM, ended_B, cache)
  return jax.lax.while_loop(unfinished, advance, carry)[2]


def make_generate(
  model: ComposedLM, *, max_new_tokens: int, eos_id: int | None
) -> Callable[..., list[list[int]]]:
  """Returns a compiled generate(params, prompts, batch_size=, pad_id=).

  The result takes lists of ids and returns lists of new ids, cut before EOS.
  """
  predict = jax.jit(
    functools.partial(
      predict_batch, model=model, max_new_tokens=max_new_tokens, eos_id=eos_id
    )
  )

  def generate(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
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
      chosen = [prompts[i] for i in rows]
      chosen += [chosen[0]] * (batch_size - len(rows))
      longest = max(len(prompt) for prompt in chosen)
      tokens_BT, lengths_B = batches.pad_prompts(
        chosen, length=-(-longest // BUCKET) * BUCKET, pad_id=pad_id
      )
      out_BM = np.asarray(predict(params, tokens_BT, lengths_B))
      for i, row in zip(rows, out_BM, strict=False):
        new_ids[i] = _before(row.tolist(), eos_id)
    return new_ids

  return generate


def _before(ids: list[int], eos_id: int | None) -> list[int]:
  return ids[: ids.index(eos_id)] if eos_id in ids else ids
