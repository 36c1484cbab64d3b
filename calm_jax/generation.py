"""Texts from texts: batches of like length, decoded chunk by chunk.

Shapes are rounded up, so that few of them compile. Between chunks of steps the
new tokens come to the host, which looks for stop strings in their bytes.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from calm_jax import batches, beam_search, decoding, masks
from calm_jax.alignment import Reader, Reading
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.sampling import DecodingConfig
from calm_jax.sources import AugmentingTokens
from calm_jax.vocabularies import Vocabulary

CHUNK = 32  # steps between two looks at what was chosen
BATCH = 64  # rows decoded at once, if nobody says


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What a model made of a prompt.

  Attributes:
    text: as it follows the prompt: a space at its beginning is its own. Ends
      before the first stop string.
    tokens: ids without EOS, up to the one in which the text ends.
    ended: whether EOS or a stop string came before the limit.
  """

  text: str
  tokens: list[int]
  ended: bool


class Generator:
  """Decodes with one model; remembers what it has compiled."""

  def __init__(
    self,
    model: ComposedLM,
    *,
    vocabulary: Vocabulary,
    readers: Mapping[str, Reader] | None = None,
  ):
    """Compiles nothing yet.

    Args:
      model: composed, or an anchor alone.
      vocabulary: of the anchor.
      readers: how models with tokens of their own read.
    """
    self._model = model
    self._vocabulary = vocabulary
    self._transcripts = {
      name: jax.tree.map(
        jnp.asarray, (reader.transcript.tokens_VR, reader.transcript.counts_V)
      )
      for name, reader in (readers or {}).items()
      if reader.transcript is not None
    }
    self._compiled = functools.cache(self._compile)

  def _compile(self, config: DecodingConfig) -> tuple[Callable, Callable]:
    search = beam_search if config.num_beams > 1 else decoding
    settings = {
      'model': self._model,
      'config': config,
      'eos_ids': tuple(self._vocabulary.eos_ids),
    }
    return (
      jax.jit(
        functools.partial(search.start, **settings), static_argnames='room'
      ),
      jax.jit(
        functools.partial(search.advance, **settings), donate_argnames='state'
      ),
    )

  def __call__(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    readings: Mapping[str, Sequence[Reading]] | None = None,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    config: DecodingConfig = DecodingConfig(),
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
  ) -> list[list[Continuation]]:
    """Continues prompts.

    Args:
      params: of the model.
      prompts: ids, at least one each.
      readings: by name of each reader, the same prompts as it reads them.
      max_new_tokens: at most so many tokens each.
      stop: texts before the first of which a continuation ends; sought in the
        tokens' bytes, in which a vocabulary that marks the ends of words has no
        spaces.
      config: how tokens are chosen.
      batch_size: prompts decoded at once; at most `BATCH` if None.
      seeds: of each prompt; their numbers if None.

    Returns:
      For each prompt `config.num_samples` continuations.
    """
    if any(not prompt for prompt in prompts):
      raise ValueError(
        'A prompt is empty: with nothing to read there is nothing to continue.'
        ' Give at least one token.'
      )
    check_count('max_new_tokens', max_new_tokens)
    if batch_size is not None:
      check_count('batch_size', batch_size)
    if stop is None or isinstance(stop, str) or not all(stop):
      raise ValueError(
        f'stop = {stop!r}: give a list of texts, none of them empty.'
      )
    seeds = range(len(prompts)) if seeds is None else seeds
    if batch_size is None:
      batch_size = min(BATCH, round_up(len(prompts), smallest=1))
    each = max(config.num_samples, config.num_beams)
    # Rows of like length share a batch; results go back to their places.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[Continuation]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
      rows = order[first : first + batch_size]
      filled = rows + rows[:1] * (batch_size - len(rows))
      found = self._decode(
        params,
        [prompts[i] for i in filled],
        {
          name: [of_prompts[i] for i in filled]
          for name, of_prompts in (readings or {}).items()
        },
        seeds_BN=_seeds(config.seed, [seeds[i] for i in filled], each),
        max_new_tokens=max_new_tokens,
        stop=stop,
        config=config,
      )
      for i, continuations in zip(rows, found, strict=False):
        results[i] = continuations
    return results

  def _decode(
    self,
    params: Params,
    prompts: Sequence[Sequence[int]],
    readings: Mapping[str, Sequence[Reading]],
    *,
    seeds_BN: np.ndarray,
    max_new_tokens: int,
    stop: Sequence[str],
    config: DecodingConfig,
  ) -> list[list[Continuation]]:
    """Decodes one batch."""
    # `seeds_BN` has the seed: another one needs no other program.
    start, advance = self._compiled(dataclasses.replace(config, seed=0))
    limit = decoding.longest_text(self._model)  # the last token is not read
    before = None if limit is None else limit + 1 - max_new_tokens
    tokens_BT, lengths_B = pad(prompts, limit=before)
    after = None if limit is None else limit + 1 - tokens_BT.shape[1]
    state = start(
      params,
      tokens_BT,
      lengths_B,
      seeds_BN,
      np.int32(max_new_tokens),
      {name: pad_readings(rows) for name, rows in readings.items()},
      self._transcripts,
      room=round_up(max_new_tokens, limit=after),
    )
    each = seeds_BN.shape[1]
    written = [Text(self._vocabulary, stop) for _ in range(seeds_BN.size)]
    done, read = 0, np.zeros(len(written), bool)
    while True:
      step, ended_B = int(state.step), np.array(state.ended_B)
      is_over = step == max_new_tokens or bool(ended_B.all())
      if is_over or config.num_beams == 1:  # the best beam changes to the end
        new_BM = np.asarray(state.tokens_BM)[:, done:step]
        for text, row in zip(written, new_BM.tolist(), strict=True):
          text.extend(row)
        read = np.array([text.ended for text in written])
        done = step
      if is_over or bool((ended_B | read).all()):
        break
      if (read & ~ended_B).any():
        state = state.replace(ended_B=jnp.asarray(ended_B | read))
      until = np.int32(step + CHUNK)
      state = advance(params, state, until, self._transcripts)
    rows = [text.result() for text in written]
    return [rows[i : i + config.num_samples] for i in range(0, len(rows), each)]


class Text:
  """One continuation, as it grows."""

  def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]):
    self.ended = self._is_cut = False
    self._vocabulary = vocabulary
    self._stop = [text.encode() for text in stop]
    self._tokens: list[int] = []
    self._bytes = b''

  def extend(self, tokens: Sequence[int]) -> None:
    """Takes the next tokens, up to EOS or what completes a stop string."""
    for token in tokens:
      if self.ended:
        return
      if token in self._vocabulary.eos_ids:
        self.ended = True
        return
      piece = token_text(self._vocabulary, token)
      self._tokens.append(token)
      self._bytes += piece
      if piece:
        self._cut(len(piece))

  def _cut(self, new: int) -> None:
    """Ends before the first stop string, if the last bytes complete one."""
    starts = [
      self._bytes.find(one, max(0, len(self._bytes) - new - len(one) + 1))
      for one in self._stop
    ]
    found = [start for start in starts if start >= 0]
    if found:
      self._bytes = self._bytes[: min(found)]
      self.ended = self._is_cut = True

  def result(self) -> Continuation:
    text = self._bytes.decode('utf-8', errors='replace')
    if not self._is_cut:
      # A vocabulary may write more than its tokens' bytes, such as the spaces
      # between words of which it marks the ends; what it leaves out at the
      # beginning is a space that is the text's own.
      whole = self._vocabulary.decode(self._tokens)
      text = text if text.lstrip(' ') == whole.lstrip(' ') else whole
    return Continuation(text, self._tokens, self.ended)


def check_count(name: str, value: int) -> None:
  """Raises ValueError unless a setting is a whole number, and at least 1."""
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(
      f'{name} = {value!r}: it must be a whole number, at least 1.'
    )


def token_text(vocabulary: Vocabulary, token: int) -> bytes:
  """Returns the bytes of a generated token: none for special tokens.

  An unknown token shows as a word, as the vocabulary writes it: what was not
  said must not read as if nothing was.
  """
  if token == vocabulary.unk_id:
    return f' {vocabulary.decode([token])}'.encode()
  return vocabulary.token_bytes(token) or b''


def round_up(
  length: int, *, smallest: int = 16, limit: int | None = None
) -> int:
  """Returns the next of 1, 2, 3, 4, 6, 8, 12, 16 ... times `smallest`.

  Or the length itself, if that would be above a limit.
  """
  size = smallest
  while size < length:
    if size * 3 // 2 >= length and size > 1:
      size = size * 3 // 2
    else:
      size *= 2
  return size if limit is None or size <= limit else length


def pad(
  prompts: Sequence[Sequence[int]],
  *,
  fill: int = 0,
  limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right, to a length of few; see `round_up`."""
  longest = max(1, *map(len, prompts))  # a model without BOS may read nothing
  length = round_up(longest, limit=limit)
  return batches.pad_prompts(prompts, length=length, fill=fill)


def pad_readings(readings: Sequence[Reading]) -> AugmentingTokens:
  """Pads what one augmenting model reads of prompts."""
  tokens_BS, _ = pad([ids for ids, _ in readings])
  visible_from_BS, _ = pad(
    [visible for _, visible in readings], fill=masks.NEVER
  )
  positions_BS = np.broadcast_to(
    np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape
  )
  return AugmentingTokens(tokens_BS, positions_BS, visible_from_BS)


def _seeds(seed: int, of_prompts: Sequence[int], samples: int) -> np.ndarray:
  """Returns a seed for each sample of each prompt, uint32 [B, N]."""

  def mixed(*parts):
    whole = [part % 2**64 for part in parts]  # a seed may be negative
    return np.random.SeedSequence(whole).generate_state(1)[0]

  return np.array(
    [[mixed(seed, one, n) for n in range(samples)] for one in of_prompts],
    np.uint32,
  )
