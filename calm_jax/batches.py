"""From token examples to batches: prefix-LM layout and packing.

An example is `{'inputs': ids, 'targets': ids}`; `inputs` may be empty or
missing. A batch is a dict of arrays of shape [B, T] with T5X's keys:

  decoder_input_tokens   int32    what the model reads
  decoder_target_tokens  int32    what it should predict there
  decoder_positions      int32    restart at 0 in each segment
  decoder_segment_ids    int32    0 = padding, segments count from 1
  decoder_loss_weights   float32  1 where the predicted token is a target

Which slot is real follows from the segment ids, never from a token id.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import itertools
from typing import Protocol

import numpy as np

from calm_jax import vocabularies

Example = Mapping[str, Sequence[int]]
Batch = dict[str, np.ndarray]


class BatchIterator(Protocol):
  """An endless stream of global batches that can be continued exactly."""

  def __next__(self) -> Batch:
    """Returns the next global batch."""

  def state(self) -> dict:
    """Returns the JSON-serialisable position after the last batch returned."""

  def restore(self, state: dict) -> None:
    """Continues after the batch at which `state` was taken."""


class ExampleBatches:
  """Lays examples out in rows, one per row or packed, in their order.

  Packing is 'next fit': a row is closed by the first example that does not fit,
  and nothing is reordered. So the position is the number of examples consumed,
  and needs no buffers.

  Attributes:
    skipped: how many examples were too long, with `truncate='skip'`.
  """

  def __init__(
    self,
    make_examples: Callable[[int], Iterator[Example]],
    *,
    batch_size: int,
    length: int,
    pack: bool,
    bos_id: int | None,
    pad_id: int | None,
    truncate: str = 'error',
    targets_per_row: int | None = None,
  ):
    """Starts at the first example.

    Args:
      make_examples: given a number n, returns the examples of a deterministic
        stream from the n-th on (from 0).
      batch_size: B, rows in a global batch.
      length: T, slots in a row. A sequence of n tokens with BOS takes n - 1.
      pack: whether a row may hold several examples.
      bos_id: what every sequence begins with, or None.
      pad_id: what fills the slots of no segment; None is 0.
      truncate: 'error', or 'skip' to leave out and count what is too long.
      targets_per_row: how many supervised positions a row may have; None is
        all of them.
    """
    if truncate not in ('error', 'skip'):
      raise ValueError(
        f"truncate is {truncate!r}; choose 'error' or 'skip' (which counts)."
      )
    self.skipped = 0
    self._make_examples = make_examples
    self._shape = (batch_size, length)
    self._pack = pack
    self._bos = [] if bos_id is None else [bos_id]
    self._pad_id = pad_id or 0
    self._truncate = truncate
    self._targets_per_row = targets_per_row or length
    self._consumed = 0
    self._examples = make_examples(0)
    self._next = None  # An example that was read, but is not consumed.

  def __iter__(self) -> 'ExampleBatches':
    return self

  def __next__(self) -> Batch:
    """Returns the next batch; a finite stream ends with a partial one."""
    first = self._consumed
    batch = empty_batch(self._shape, pad_id=self._pad_id)
    for row in range(self._shape[0]):
      self._fill(row, batch)
    if not batch['decoder_segment_ids'].any():
      raise StopIteration
    return check_supervised(batch, f'examples {first} to {self._consumed - 1}')

  def state(self) -> dict:
    return {'examples': self._consumed, 'skipped': self.skipped}

  def restore(self, state: dict) -> None:
    self._consumed, self.skipped = state['examples'], state['skipped']
    self._examples = self._make_examples(self._consumed)
    self._next = None

  def _fill(self, row: int, batch: Batch) -> None:
    start, segment, targets = 0, 0, 0
    while self._pack or not segment:
      if self._next is None:
        self._next = self._read()
      if self._next is None:
        return
      sequence, prefix = self._next
      stop = start + len(sequence) - 1
      targets += _num_targets(sequence, prefix)
      if stop > self._shape[1] or targets > self._targets_per_row:
        return
      segment += 1
      slots = slice(start, stop)
      positions = np.arange(stop - start)
      batch['decoder_input_tokens'][row, slots] = sequence[:-1]
      batch['decoder_target_tokens'][row, slots] = sequence[1:]
      batch['decoder_positions'][row, slots] = positions
      batch['decoder_segment_ids'][row, slots] = segment
      batch['decoder_loss_weights'][row, slots] = positions + 1 >= prefix
      start, self._next = stop, None
      self._consumed += 1

  def _read(self) -> tuple[list[int], int] | None:
    """Returns the next (sequence, length of its prefix) that fits a row."""
    length = self._shape[1]
    for example in self._examples:
      prefix = [*self._bos, *example.get('inputs', ())]
      sequence = [*prefix, *example['targets']]
      if len(sequence) < 2:
        raise ValueError(
          f'Example {self._consumed} is {len(sequence)} token long, BOS '
          'included, so there is nothing to predict; end targets in EOS, or '
          'filter empty examples out.'
        )
      targets = _num_targets(sequence, len(prefix))
      if len(sequence) - 1 <= length and targets <= self._targets_per_row:
        return sequence, len(prefix)
      if self._truncate == 'error':
        raise ValueError(
          f'Example {self._consumed} needs {len(sequence) - 1} slots '
          f'({len(prefix)} tokens of BOS and inputs, {len(example["targets"])} '
          f'of targets), a row has {length} for {self._targets_per_row} '
          'targets, so its targets would be truncated; raise the feature '
          "lengths or targets_per_row, or set truncate='skip'."
        )
      self._consumed += 1
      self.skipped += 1
    return None


def _num_targets(sequence: Sequence[int], prefix: int) -> int:
  return len(sequence) - max(prefix, 1)  # the first token is never predicted


class ArrayBatches:
  """Batches of rows that are already in memory, reshuffled every epoch."""

  def __init__(
    self,
    rows: Batch,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
  ):
    """Starts at the first batch of epoch 0.

    Args:
      rows: arrays [N, T] under the keys of a batch.
      batch_size: B. The N % B last rows of an epoch's order wait for another
        epoch.
      seed: with the epoch's number, gives its order.
      shuffle: whether to permute at all.
    """
    sizes = {name: len(array) for name, array in rows.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < batch_size:
      raise ValueError(
        f'The arrays have {sizes} rows, and a batch {batch_size}; all must have'
        ' equally many, and enough for one batch.'
      )
    self._rows = rows
    self._size = min(sizes.values())
    self._batch_size = batch_size
    self._seed = seed
    self._shuffle = shuffle
    self.restore({'epoch': 0, 'index': 0})

  def __iter__(self) -> 'ArrayBatches':
    return self

  def __next__(self) -> Batch:
    if self._index + self._batch_size > self._size:
      self.restore({'epoch': self._epoch + 1, 'index': 0})
    stop = self._index + self._batch_size
    chosen = self._order[self._index : stop]
    self._index = stop
    batch = {name: array[chosen] for name, array in self._rows.items()}
    return check_supervised(batch, f'rows {chosen[:8].tolist()}...')

  def state(self) -> dict:
    """Returns the epoch, and how many rows of it were returned."""
    return {'epoch': self._epoch, 'index': self._index}

  def restore(self, state: dict) -> None:
    self._epoch, self._index = state['epoch'], state['index']
    self._order = np.arange(self._size)
    if self._shuffle:
      np.random.default_rng((self._seed, self._epoch)).shuffle(self._order)


def npz_batches(
  *,
  path: str,
  batch_size: int,
  seed: int,
  vocabulary: object = None,
  targets_per_row: int | None = None,
) -> ArrayBatches:
  """Returns the rows of an .npz file as batches: no SeqIO, no TensorFlow.

  Args:
    path: a file with one array [N, T] under each key of a batch.
    batch_size: B.
    seed: of the order.
    vocabulary: not used; every iterator factory is given it.
    targets_per_row: the most supervised positions that a row may have.
  """
  del vocabulary
  try:
    with np.load(path) as file:
      rows = dict(file)
  except (OSError, ValueError) as error:
    raise ValueError(f'{path!r} cannot be read as .npz: {error}.') from error
  wanted = set(empty_batch((1, 1), pad_id=0))
  if set(rows) != wanted:
    raise ValueError(
      f'{path!r} holds the arrays {sorted(rows)}; a batch has {sorted(wanted)}.'
    )
  most = int((rows['decoder_loss_weights'] > 0).sum(axis=1).max())
  if targets_per_row is not None and most > targets_per_row:
    raise ValueError(
      f'{path!r} has a row of {most} supervised positions, more than'
      f' targets_per_row = {targets_per_row}; raise that.'
    )
  return ArrayBatches(rows, batch_size=batch_size, seed=seed)


def tokenize(
  examples: Iterator[Mapping[str, str]], *, vocabulary: vocabularies.Vocabulary
) -> Iterator[Example]:
  """Turns texts into ids, a thousand at a time; targets end in EOS.

  Args:
    examples: {'inputs': text, 'targets': text}, without end or with one.
    vocabulary: what encodes both; without an EOS, none is appended.

  Yields:
    {'inputs': ids, 'targets': ids}, one for each example.
  """
  end = [] if vocabulary.eos_id is None else [vocabulary.eos_id]
  while chunk := list(itertools.islice(examples, 1024)):
    inputs = vocabulary.encode_batch([e['inputs'] for e in chunk])
    targets = vocabulary.encode_batch([e['targets'] for e in chunk])
    for prompt, target in zip(inputs, targets, strict=True):
      yield {'inputs': prompt, 'targets': target + end}


def empty_batch(shape: tuple[int, int], *, pad_id: int) -> Batch:
  """Returns a batch [B, T] of padding."""
  batch = {
    f'decoder_{name}': np.zeros(shape, np.int32)
    for name in ('input_tokens', 'target_tokens', 'positions', 'segment_ids')
  }
  batch['decoder_input_tokens'][:] = pad_id
  batch['decoder_target_tokens'][:] = pad_id
  batch['decoder_loss_weights'] = np.zeros(shape, np.float32)
  return batch


def check_supervised(batch: Batch, where: str) -> Batch:
  """Returns `batch`; raises a ValueError if it has no supervised token."""
  if not batch['decoder_loss_weights'].any():
    raise ValueError(
      f'The batch of {where} has no supervised token, so it has no loss; look '
      'for empty targets in the data, or raise the batch size.'
    )
  return batch


def pad_prompts(
  prompts: Sequence[Sequence[int]],
  *,
  length: int | None = None,
  pad_id: int | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right.

  Args:
    prompts: B lists of ids.
    length: T; None is the longest prompt's length.
    pad_id: what fills the rest; None is 0.

  Returns:
    tokens_BT, int32, and lengths_B, int32.

  Raises:
    ValueError: if a prompt is longer than `length`.
  """
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(lengths_B.max(initial=0))
  length = longest if length is None else length
  if longest > length:
    raise ValueError(
      f'Prompt {lengths_B.argmax()} has {longest} tokens, more than the '
      f'{length} allowed; shorten it, or raise the length.'
    )
  tokens_BT = np.full((len(prompts), length), pad_id or 0, np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  return tokens_BT, lengths_B
