"""Batches of arrays that are already in memory: no SeqIO, no TensorFlow."""

from collections.abc import Mapping

import numpy as np

from calm_jax import batches
from calm_jax.alignment import Reader


class ArrayBatches:
  """Batches of rows that are already in memory, reshuffled every epoch."""

  def __init__(
    self,
    rows: batches.Batch,
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

  def __next__(self) -> batches.Batch:
    if self._index + self._batch_size > self._size:
      self.restore({'epoch': self._epoch + 1, 'index': 0})
    stop = self._index + self._batch_size
    chosen = self._order[self._index : stop]
    self._index = stop
    batch = {name: array[chosen] for name, array in self._rows.items()}
    return batches.check_supervised(batch, f'rows {chosen[:8].tolist()}...')

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
  readers: Mapping[str, Reader] | None = None,
  needed_B: object = None,
) -> ArrayBatches:
  """Returns the rows of an .npz file as batches: no SeqIO, no TensorFlow.

  Args:
    path: a file with one array [N, T] under each key of a batch.
    batch_size: B.
    seed: of the order.
    vocabulary: not used; every iterator factory is given it.
    targets_per_row: the most supervised positions that a row may have.
    readers: by name of each augmenting model whose arrays the file must hold.
    needed_B: bool, the rows that this process needs; here it makes all.
  """
  del vocabulary, needed_B
  try:
    with np.load(path) as file:
      rows = dict(file)
  except (OSError, ValueError) as error:
    raise ValueError(f'{path!r} cannot be read as .npz: {error}.') from error
  lengths = dict.fromkeys(readers or {}, 1)
  wanted = set(batches.empty_batch((1, 1), augmenting_lengths=lengths))
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
