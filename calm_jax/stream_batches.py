"""Global batches out of several streams, so that no process reads all data."""

from collections.abc import Callable
from typing import Any

import numpy as np

from calm_jax import batches


class StreamBatches:
  """Batches whose rows come from R streams, in blocks of B / R rows.

  Stream r fills the rows from r B / R on. A process makes the streams of the
  rows that it needs: what a stream holds does not depend on who makes it. All
  other rows are zeros.
  """

  def __init__(
    self,
    make_stream: Callable[[int], batches.ExampleBatches],
    *,
    streams: int,
    batch_size: int,
    needed_B: np.ndarray | None = None,
  ):
    """Starts at the first example of each stream.

    Args:
      make_stream: given r, returns batches of B / R rows, without end.
      streams: R.
      batch_size: B, a multiple of R.
      needed_B: bool, the rows that are needed; None is all.
    """
    self._num_streams, self._batch_size = streams, batch_size
    self._rows = batch_size // streams
    needed_B = np.ones(batch_size, bool) if needed_B is None else needed_B
    wanted = needed_B.reshape(streams, self._rows).any(axis=1)
    self._streams = {r: make_stream(r) for r in range(streams) if wanted[r]}

  def __iter__(self) -> 'StreamBatches':
    return self

  def __next__(self) -> batches.Batch:
    """Returns the next batch; ValueError if a stream has ended."""
    batch: batches.Batch = {}
    for index, stream in self._streams.items():
      block = slice(index * self._rows, (index + 1) * self._rows)
      rows = stream.next_rows()
      if not rows['decoder_segment_ids'].any():
        raise ValueError(
          f'Stream {index} of {self._num_streams} has no more examples: its'
          ' shards are empty. Choose fewer streams, or fewer shards.'
        )
      for key, values in rows.items():
        if key not in batch:
          shape = self._batch_size, *values.shape[1:]
          batch[key] = np.zeros(shape, values.dtype)
        batch[key][block] = values
    if len(self._streams) == self._num_streams:
      batches.check_supervised(batch, f'examples {self.state()["examples"]}')
    return batch

  def state(self) -> dict[str, Any]:
    """Returns the position of each stream; 0 where another process makes it.

    So what all streams have reached is the largest that any process tells.
    """
    states = {r: stream.state() for r, stream in self._streams.items()}
    return {
      name: [
        states[r][name] if r in states else 0 for r in range(self._num_streams)
      ]
      for name in ('examples', 'skipped')
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Continues; ValueError if the state is of another number of streams."""
    batches.check_streams(state, self._num_streams)
    for index, stream in self._streams.items():
      stream.restore({name: values[index] for name, values in state.items()})
