"""From token examples to batches: prefix-LM layout and packing.

An example is `{'inputs': ids, 'targets': ids}`; `inputs` may be empty or
missing. A batch is a dict of arrays of shape [B, T] with T5X's keys:

  decoder_input_tokens   int32    what the model reads
  decoder_target_tokens  int32    what it should predict there
  decoder_positions      int32    restart at 0 in each segment
  decoder_segment_ids    int32    0 = padding, segments count from 1
  decoder_loss_weights   float32  1 where the predicted token is a target

Which slot is real follows from the segment ids, never from a token id; the rest
is 0, which every table has, whatever a vocabulary pads with. An
augmenting model called x that has a vocabulary of its own adds [B, S] arrays:

  x_input_tokens, x_positions, x_segment_ids   int32    as above
  x_visible_from  int32    the first slot of the anchor's row that reads it
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import itertools
from typing import Any, Protocol

import numpy as np

from calm_jax import vocabularies
from calm_jax.alignment import Reading

Example = Mapping[str, Any]
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
    truncate: str = 'error',
    targets_per_row: int | None = None,
    augmenting_lengths: Mapping[str, int] | None = None,
  ):
    """Starts at the first example.

    Args:
      make_examples: given a number n, returns the examples of a deterministic
        stream from the n-th on (from 0).
      batch_size: B, rows in a global batch.
      length: T, slots in a row. A sequence of n tokens with BOS takes n - 1.
      pack: whether a row may hold several examples.
      bos_id: what every sequence begins with, or None.
      truncate: 'error', or 'skip' to leave out and count what is too long.
      targets_per_row: how many supervised positions a row may have; None is
        all of them.
      augmenting_lengths: S by name of each augmenting model that has a
        vocabulary of its own. Examples then are as those of
        `alignment.read_examples`.
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
    self._truncate = truncate
    self._targets_per_row = targets_per_row or length
    self._augmenting_lengths = dict(augmenting_lengths or {})
    self._consumed = 0
    self._examples = make_examples(0)
    self._next = None  # An example that was read, but is not consumed.

  def __iter__(self) -> 'ExampleBatches':
    return self

  def __next__(self) -> Batch:
    """Returns the next batch; a finite stream ends with a partial one."""
    first = self._consumed
    batch = self.next_rows()
    if not batch['decoder_segment_ids'].any():
      raise StopIteration
    return check_supervised(batch, f'examples {first} to {self._consumed - 1}')

  def next_rows(self) -> Batch:
    """Returns the next batch, be it of padding alone, or without a target."""
    batch = empty_batch(
      self._shape, augmenting_lengths=self._augmenting_lengths
    )
    for row in range(self._shape[0]):
      self._fill(row, batch)
    return batch

  def state(self) -> dict:
    return {'examples': self._consumed, 'skipped': self.skipped}

  def restore(self, state: dict) -> None:
    check_streams(state, 1)
    self._consumed, self.skipped = state['examples'], state['skipped']
    self._examples = self._make_examples(self._consumed)
    self._next = None

  def _fill(self, row: int, batch: Batch) -> None:
    segment, targets, start = 0, 0, 0
    starts = dict.fromkeys(self._augmenting_lengths, 0)
    while self._pack or not segment:
      if self._next is None:
        self._next = self._read()
      if self._next is None:
        return
      sequence, prefix, readings = self._next
      stop = start + len(sequence) - 1
      targets += _num_targets(sequence, prefix)
      stops = {name: starts[name] + len(readings[name][0]) for name in starts}
      if (
        stop > self._shape[1]
        or targets > self._targets_per_row
        or any(stops[name] > self._augmenting_lengths[name] for name in stops)
      ):
        return
      segment += 1
      slots = slice(start, stop)
      positions = np.arange(stop - start)
      batch['decoder_input_tokens'][row, slots] = sequence[:-1]
      batch['decoder_target_tokens'][row, slots] = sequence[1:]
      batch['decoder_positions'][row, slots] = positions
      batch['decoder_segment_ids'][row, slots] = segment
      batch['decoder_loss_weights'][row, slots] = positions + 1 >= prefix
      for name, reading in readings.items():
        slots = row, slice(starts[name], stops[name])
        _place_reading(batch, name, slots, reading, segment, offset=start)
      start, starts, self._next = stop, stops, None
      self._consumed += 1

  def _read(self) -> tuple[list[int], int, dict[str, Reading]] | None:
    """Returns the next sequence that fits a row, and the length of its prefix.

    The third is what augmenting models with a vocabulary of their own read.
    """
    for example in self._examples:
      prefix = list(example.get('inputs', ()))
      if prefix[:1] != self._bos:  # a chat template writes BOS itself
        prefix = self._bos + prefix
      sequence = [*prefix, *example['targets']]
      if len(sequence) < 2:
        raise ValueError(
          f'Example {self._consumed} is {len(sequence)} token long, BOS '
          'included, so there is nothing to predict; end targets in EOS, or '
          'filter empty examples out.'
        )
      problem = self._too_long(sequence, len(prefix), example)
      if not problem:
        return sequence, len(prefix), example.get('readings', {})
      if self._truncate == 'error':
        raise ValueError(
          f"Example {self._consumed} {problem}, or set truncate='skip'."
        )
      self._consumed += 1
      self.skipped += 1
    return None

  def _too_long(
    self, sequence: Sequence[int], prefix: int, example: Example
  ) -> str:
    """Says why an example fits no row; '' if it does."""
    length = self._shape[1]
    targets = _num_targets(sequence, prefix)
    if len(sequence) - 1 > length or targets > self._targets_per_row:
      return (
        f'needs {len(sequence) - 1} slots ({prefix} tokens of BOS and inputs,'
        f' {len(example["targets"])} of targets), a row has {length} for'
        f' {self._targets_per_row} targets, so its targets would be truncated;'
        ' raise the feature lengths or targets_per_row'
      )
    for name, slots in self._augmenting_lengths.items():
      wanted = len(example['readings'][name][0])
      if wanted > slots:
        return (
          f'is {wanted} tokens to {name!r}, and a row has {slots}; raise the'
          f' feature length of {name!r}'
        )
    if example.get('too_long'):
      return (
        f'has {example["too_long"]} target tokens that stand for more tokens of'
        ' an augmenting model than CompositionConfig.tokens_per_anchor_token'
        ' allows; raise it'
      )
    return ''


def _num_targets(sequence: Sequence[int], prefix: int) -> int:
  return len(sequence) - max(prefix, 1)  # the first token is never predicted


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


def empty_batch(
  shape: tuple[int, int],
  *,
  augmenting_lengths: Mapping[str, int] | None = None,
) -> Batch:
  """Returns a batch [B, T] of padding, and [B, S] by name."""
  batch = {
    f'decoder_{name}': np.zeros(shape, np.int32)
    for name in ('input_tokens', 'target_tokens', 'positions', 'segment_ids')
  }
  batch['decoder_loss_weights'] = np.zeros(shape, np.float32)
  for name, length in (augmenting_lengths or {}).items():
    for field in ('input_tokens', 'positions', 'segment_ids', 'visible_from'):
      batch[f'{name}_{field}'] = np.zeros((shape[0], length), np.int32)
  return batch


def row_lengths(
  task_feature_lengths: Mapping[str, int], readers: Iterable[str]
) -> tuple[int, dict[str, int]]:
  """Returns T, the slots of a row, and S by name of `readers`.

  Args:
    task_feature_lengths: of 'inputs' and 'targets', whose sum T is; and of
      those models with tokens of their own for which S is not T.
    readers: names of the models with tokens of their own.
  """
  length = sum(task_feature_lengths.get(f, 0) for f in ('inputs', 'targets'))
  return length, {
    name: task_feature_lengths.get(name, length) for name in readers
  }


def blank(
  task_feature_lengths: Mapping[str, int],
  *,
  batch_size: int,
  readers: Iterable[str] = (),
  **run: Any,
) -> Batch:
  """Returns a batch of padding, shaped as those of a run.

  Args:
    task_feature_lengths: as in `row_lengths`.
    batch_size: B.
    readers: as in `row_lengths`.
    **run: what else iterators are given, which shapes do not depend on.
  """
  del run
  length, augmenting = row_lengths(task_feature_lengths, readers)
  return empty_batch((batch_size, length), augmenting_lengths=augmenting)


def augmenting_arrays(name: str, readings: Sequence[Reading]) -> Batch:
  """Returns the arrays [B, S] of what one model reads of B unpacked rows."""
  length = max(1, *(len(ids) for ids, _ in readings))
  shape = len(readings), 1
  batch = empty_batch(shape, augmenting_lengths={name: length})
  batch = {
    key: rows for key, rows in batch.items() if key.startswith(f'{name}_')
  }
  for row, reading in enumerate(readings):
    slots = row, slice(0, len(reading[0]))
    _place_reading(batch, name, slots, reading, 1, offset=0)
  return batch


def _place_reading(
  batch: Batch,
  name: str,
  slots: tuple[int, slice],
  reading: Reading,
  segment: int,
  *,
  offset: int,
) -> None:
  ids, visible_from = reading
  batch[f'{name}_input_tokens'][slots] = ids
  batch[f'{name}_positions'][slots] = np.arange(len(ids))
  batch[f'{name}_segment_ids'][slots] = segment
  batch[f'{name}_visible_from'][slots] = np.add(visible_from, offset)


def num_streams(state: dict) -> int:
  """Returns of how many streams a position is."""
  examples = state.get('examples')
  return len(examples) if isinstance(examples, list) else 1


def check_streams(state: dict, streams: int) -> None:
  """Raises ValueError unless a position is of so many streams."""
  saved = num_streams(state)
  if saved != streams:
    raise ValueError(
      f'The checkpoint was written with streams = {saved} of data, and this run'
      f' has {streams}. Set seqio_batches.streams = {saved}, or begin another'
      ' MODEL_DIR.'
    )


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
  fill: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts on the right.

  Args:
    prompts: B lists of ids.
    length: T; None is the longest prompt's length.
    fill: what fills the rest.

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
  tokens_BT = np.full((len(prompts), length), fill, np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[: len(prompt)] = prompt
  return tokens_BT, lengths_B
