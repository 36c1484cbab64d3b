"""Two vocabularies over one text: which tokens a model of its own reads, when.

A prompt is tokenized by each model's own tokenizer, and a position of the
augmenting model is read from the first anchor position whose consumed bytes
cover it. A target, or what is being generated, exists as the anchor's tokens
only: the bytes of each stand for tokens of the augmenting model by a table that
is made once, so that training and decoding see the same tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses

import numpy as np

from calm_jax import vocabularies
from calm_jax.vocabularies import Vocabulary

# An augmenting model's tokens, and for each the index of the first of the
# anchor's tokens that reads it.
Reading = tuple[list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Transcript:
  """What each token of the anchor is to the augmenting model.

  Attributes:
    tokens_VR: int32, the augmenting tokens of each anchor token, padded.
    counts_V: int32, how many there are.
    too_long_V: bool, where there would be more than R; the first R are kept.
  """

  tokens_VR: np.ndarray
  counts_V: np.ndarray
  too_long_V: np.ndarray

  def of(self, token: int) -> list[int]:
    """Returns the augmenting tokens of one anchor token."""
    return self.tokens_VR[token, : self.counts_V[token]].tolist()


def transcribe(
  anchor: Vocabulary, augmenting: Vocabulary, *, size: int, most: int
) -> Transcript:
  """Writes every token of the anchor in the augmenting model's tokens.

  Text is given to the augmenting tokenizer; where that adds or loses bytes (a
  space before the first word, a part of a character), the bytes are cut into
  the longest tokens there are. Special tokens stand for their like, or for
  nothing.

  Args:
    anchor: what is transcribed.
    augmenting: what it is transcribed to.
    size: V, rows of the anchor's embedding table; rows without a token stand
      for nothing.
    most: R is as small as it can be, and at most this.
  """
  spelling = _Spelling(augmenting)
  pieces = [anchor.token_bytes(i) for i in range(anchor.size)]
  rows = spelling.spell([piece or b'' for piece in pieces])
  likes = {anchor.bos_id: augmenting.bos_id, anchor.unk_id: augmenting.unk_id}
  likes |= dict.fromkeys(anchor.eos_ids, augmenting.eos_id)
  likes.pop(None, None)
  for special, like in likes.items():
    rows[special] = [] if like is None else [like]
  rows = rows[:size]  # special tokens may have no embedding
  longest = max(map(len, rows), default=0)
  width = max(1, min(most, longest))
  tokens_VR = np.zeros((size, width), np.int32)
  counts_V = np.zeros(size, np.int32)
  for token, row in enumerate(rows):
    kept = row[:width]
    tokens_VR[token, : len(kept)] = kept
    counts_V[token] = len(kept)
  too_long_V = np.zeros(size, bool)
  too_long_V[: len(rows)] = [len(row) > width for row in rows]
  return Transcript(tokens_VR, counts_V, too_long_V)


class _Spelling:
  """Cuts bytes into tokens of a vocabulary."""

  def __init__(self, vocabulary: Vocabulary):
    self._vocabulary = vocabulary
    self._bytes = [vocabulary.token_bytes(i) for i in range(vocabulary.size)]
    self._token_of: dict[bytes, int] = {}
    for token, piece in enumerate(self._bytes):
      if piece:
        self._token_of.setdefault(piece, token)
    self._longest = max(map(len, self._token_of), default=0)

  def spell(self, pieces: Sequence[bytes]) -> list[list[int]]:
    """Returns the tokens of each piece of text."""
    texts = [piece.decode('utf-8', errors='replace') for piece in pieces]
    own = self._vocabulary.encode_batch(texts)
    return [
      ids if self._is(ids, piece) else self._longest_first(piece)
      for piece, ids in zip(pieces, own, strict=True)
    ]

  def _is(self, ids: Sequence[int], piece: bytes) -> bool:
    # A vocabulary that marks where words end has no space before them.
    return self._join(ids) in (piece, piece.removeprefix(b' '))

  def _join(self, ids: Iterable[int]) -> bytes | None:
    pieces = [self._bytes[i] for i in ids]
    return None if None in pieces else b''.join(pieces)

  def _longest_first(self, piece: bytes) -> list[int]:
    ids: list[int] = []
    unknown = self._vocabulary.unk_id
    start = 0
    while start < len(piece):
      for stop in range(min(len(piece), start + self._longest), start, -1):
        if piece[start:stop] in self._token_of:
          ids.append(self._token_of[piece[start:stop]])
          start = stop
          break
      else:
        # One unknown token for a run of bytes that no token holds.
        if unknown is not None and (not ids or ids[-1] != unknown):
          ids.append(unknown)
        start += 1
    return ids


def begin(vocabulary: Vocabulary, text: str) -> tuple[list[int], list[int]]:
  """Returns the ids of a prompt, and the bytes of it read after each.

  BOS, where a vocabulary has one and the text does not spell it, comes first
  and reads no byte.
  """
  ids, ends = vocabulary.encode_with_ends(text)
  begun = vocabularies.with_bos(vocabulary, ids)
  return begun, [0] * (len(begun) - len(ids)) + ends


class Reader:
  """How one augmenting model reads the anchor's examples.

  Attributes:
    vocabulary: of the augmenting model.
    transcript: of the anchor's tokens; None for an encoder, which never sees
      them.
  """

  def __init__(
    self,
    anchor: Vocabulary,
    augmenting: Vocabulary,
    *,
    anchor_size: int,
    reads_targets: bool = True,
    most: int = 8,
  ):
    """Makes the table.

    Args:
      anchor: vocabulary of the anchor.
      augmenting: vocabulary of the augmenting model.
      anchor_size: rows of the anchor's embedding table.
      reads_targets: whether it also reads targets and generated tokens, or the
        prompt alone, as an encoder.
      most: how many of its tokens one token of the anchor may be.
    """
    self.vocabulary = augmenting
    self.transcript = None
    if reads_targets:
      self.transcript = transcribe(
        anchor, augmenting, size=anchor_size, most=most
      )

  def read_prompt(self, text: str, *, anchor_ends: Sequence[int]) -> Reading:
    """Returns the tokens of a prompt.

    Args:
      text: the prompt.
      anchor_ends: how many bytes of it the anchor has read after each of its
        tokens, as `begin` gives them.
    """
    last = max(len(anchor_ends) - 1, 0)
    ids, ends = begin(self.vocabulary, text)
    if self.transcript is None:  # an encoder knows nothing before it knows all
      if self.vocabulary.ends_with_eos:
        ids = [*ids, self.vocabulary.eos_id]
      return ids, [last] * len(ids)
    covered = np.searchsorted(anchor_ends, ends)
    return ids, np.minimum(covered, last).tolist()

  def read_targets(self, targets: Sequence[int], *, start: int) -> Reading:
    """Returns the tokens of targets, the first of which has index `start`."""
    ids: list[int] = []
    visible_from: list[int] = []
    if self.transcript is not None:
      for index, target in enumerate(targets, start=start):
        row = self.transcript.of(target)
        ids += row
        visible_from += [index] * len(row)
    return ids, visible_from

  def read_tokens(self, tokens: Sequence[int]) -> Reading:
    """Returns a whole sequence of which only the anchor's tokens are known.

    Raises:
      ValueError: for an encoder, which reads prompts alone.
    """
    if self.transcript is None:
      raise ValueError(
        'An encoder reads the text of a prompt, and here are only tokens of the'
        ' anchor. Use generate, or a batch with its tokens.'
      )
    ids, visible_from = self.read_targets(tokens, start=0)
    bos = self.vocabulary.bos_id
    if bos is not None and ids[:1] != [bos]:
      return [bos, *ids], [0, *visible_from]
    return ids, visible_from

  def count_too_long(self, targets: Sequence[int]) -> int:
    """Counts the targets that stand for more tokens than are kept."""
    if self.transcript is None:
      return 0
    return int(self.transcript.too_long_V[list(targets)].sum())


def read_examples(
  examples: Iterable[Mapping],
  readers: Mapping[str, Reader],
  *,
  anchor: Vocabulary,
) -> Iterator[dict]:
  """Adds what each augmenting model reads to the anchor's examples.

  Args:
    examples: {'inputs': ids, 'targets': ids, 'text': of the inputs}. Where the
      text is None, inputs are read token by token, as targets are.
    readers: by name of the augmenting model.
    anchor: vocabulary of the anchor.

  Yields:
    Each example with 'readings', a `Reading` by name, and 'too_long', how many
    targets stand for more tokens than are kept.

  Raises:
    ValueError: if the inputs are not the tokens of their text.
  """
  for example in examples:
    text, targets = example['text'], example['targets']
    if text is None:
      yield _read_tokens(example, readers, anchor=anchor)
      continue
    ids, anchor_ends = begin(anchor, text)
    if ids != vocabularies.with_bos(anchor, example['inputs']):
      raise ValueError(
        f'The inputs of an example are not the tokens of their text,'
        f' {text[:60]!r}, so they cannot be aligned with those of another'
        ' vocabulary. Let the task keep inputs_pretokenized as it is'
        ' tokenized, with the vocabulary of the anchor.'
      )
    readings, too_long = {}, 0
    for name, reader in readers.items():
      tokens, visible_from = reader.read_prompt(text, anchor_ends=anchor_ends)
      # The last target is predicted, and never read.
      more = reader.read_targets(targets[:-1], start=len(ids))
      readings[name] = tokens + more[0], visible_from + more[1]
      too_long += reader.count_too_long(targets[:-1])
    yield {**example, 'readings': readings, 'too_long': too_long}


def _read_tokens(
  example: Mapping, readers: Mapping[str, Reader], *, anchor: Vocabulary
) -> dict:
  """Does as `read_examples` with one example whose text is not known."""
  tokens = vocabularies.with_bos(anchor, example['inputs'])
  tokens += example['targets'][:-1]
  return {
    **example,
    'readings': {
      name: one.read_tokens(tokens) for name, one in readers.items()
    },
    'too_long': sum(one.count_too_long(tokens) for one in readers.values()),
  }
