"""Makes batches in a thread, and measures how long the step waits for them."""

import queue
import threading
import time

from calm_jax.batches import Batch, BatchIterator


class Prefetcher:
  """Makes batches in a daemon thread, so that a step need not wait for them.

  Attributes:
    wait_seconds: how long `next` has waited for the thread, in total.
  """

  def __init__(self, iterator: BatchIterator, *, depth: int = 2):
    """Starts making `depth` batches ahead.

    Args:
      iterator: what to read. It belongs to the thread until `close`.
      depth: how many batches are kept ready.
    """
    self.wait_seconds = 0.0
    self._iterator = iterator
    self._depth = depth
    self._start()

  def __iter__(self) -> 'Prefetcher':
    return self

  def __next__(self) -> Batch:
    """Returns the next batch, or raises what the thread has raised."""
    if self._thread is None:
      raise ValueError('The Prefetcher is closed; restore() starts it again.')
    started = time.perf_counter()
    item = self._ready.get()
    self.wait_seconds += time.perf_counter() - started
    if isinstance(item, BaseException):
      self.close()
      raise item
    self._requests.put(True)
    batch, self._state = item
    return batch

  def report(self) -> dict:
    """Returns the seconds waited, and how many examples were skipped so far.

    Of several streams, those are counted that this process reads.
    """
    skipped = self._state.get('skipped', 0)
    skipped = sum(skipped) if isinstance(skipped, list) else skipped
    return {'wait_seconds': self.wait_seconds, 'skipped_examples': skipped}

  def state(self) -> dict:
    """Returns the position after the last batch that `next` has returned."""
    return self._state

  def restore(self, state: dict) -> None:
    self.close()
    self._iterator.restore(state)
    self._start()

  def close(self) -> None:
    """Stops the thread and waits for it, at most for the batch it is making."""
    if self._thread is not None:
      self._requests.put(False)
      self._thread.join()
      self._thread = None

  def _start(self) -> None:
    self._state = self._iterator.state()
    # Last in, first out: a request to stop overtakes those for batches.
    self._requests = queue.LifoQueue()
    self._ready = queue.SimpleQueue()
    for _ in range(self._depth):
      self._requests.put(True)
    self._thread = threading.Thread(
      target=_produce,
      args=(self._iterator, self._requests, self._ready),
      name='calm_jax.Prefetcher',
      daemon=True,
    )
    self._thread.start()


def _produce(
  iterator: BatchIterator, requests: queue.LifoQueue, ready: queue.SimpleQueue
) -> None:
  """Answers each request with (batch, state), or ends with an exception."""
  while requests.get():
    try:
      ready.put((next(iterator), iterator.state()))
    # Whatever it is, the consumer must not wait for ever.
    except BaseException as error:
      ready.put(error)
      return
