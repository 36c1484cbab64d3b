"""What a run tells: connections, parameters, progress, metrics files."""

from collections.abc import Callable, Mapping
import contextlib
import json
import pathlib
import tempfile
import time
from typing import Any, TextIO

import jax
import numpy as np

from calm_jax import paths, trees
from calm_jax.array_types import Batch, Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import EMBEDDING

# Dense bfloat16 peak of one device in FLOP/s, by the start of its kind's name,
# from the makers' data sheets.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA L4': 121e12,
  'NVIDIA GeForce RTX 4090': 165e12,
}


def peak_flops() -> float | None:
  """Returns the peak of all devices together, or None if it is not known."""
  kind = jax.devices()[0].device_kind
  for name, peak in PEAK_FLOPS.items():
    if kind.startswith(name):
      return peak * jax.device_count()
  return None


def describe(model: ComposedLM, params: Params, *, trainable: str) -> str:
  """Tells the connections, and how much is trained of how much."""
  report = parameter_report(params, trainable=trainable)
  return f'{connection_table(model)}\n{report}'


def connection_table(model: ComposedLM) -> str:
  """Lists the connections, one a line."""
  if not model.connections:
    return 'No connections: the anchor alone.'
  lines = ['Connections (0-based, read and added after the block):']
  for c in model.connections:
    place = f'after block {c.anchor_layer:>3} of {model.anchor.depth}'
    if c.anchor_layer == EMBEDDING:
      place = 'before block 0'
    depth = model.augmenting[c.augmenting].depth
    lines.append(
      f'  {c.augmenting}: after block {c.augmenting_layer:>3} of {depth}'
      f'  ->  anchor: {place}'
    )
  return '\n'.join(lines)


def parameter_report(params: Params, *, trainable: str) -> str:
  """Returns the line with total, trainable and percent.

  Args:
    params: nested parameters, arrays or shapes.
    trainable: name of the subtree that is trained.
  """
  total = trees.num_params(params)
  trained = trees.num_params(params[trainable])
  return (
    f'trainable params: {trained:,} || all params: {total:,} || trainable%:'
    f' {100 * trained / total:.2f}'
  )


def memory_report(*, frozen: Any, trained: Any) -> str:
  """Returns the line with the bytes that one device holds."""
  return (
    f'bytes per device: {bytes_per_device(frozen):,} frozen,'
    f' {bytes_per_device(trained):,} trained + optimizer'
  )


def bytes_per_device(tree: Any) -> int:
  """Adds up the bytes of the shards that the first local device holds."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += trees.stored_bytes(shape, leaf.dtype)
  return total


class Log:
  """Progress lines, `metrics.jsonl` and TensorBoard; writes on process 0 only.

  Attributes:
    last: the metrics of the last call of `write`.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    steps: tuple[int, int],
    schedule: Callable[[int], Any],
    step_flops: Callable[[Batch], float],
  ):
    """Opens the files; drops what was logged after the restored step.

    To a bucket nothing can be appended: there the rows are kept in a temporary
    file until `flush` copies it, and TensorBoard has none.

    Args:
      directory: MODEL_DIR.
      steps: those already made, and those in the whole run.
      schedule: learning rate by step.
      step_flops: F_min of a batch.
    """
    self.last: dict[str, float] = {}
    self._failed: set[str] = set()
    self._steps = steps
    self._schedule, self._step_flops = schedule, step_flops
    self._peak = peak_flops()
    self._start = self._then = 0.0  # see `start`
    self._file: TextIO | None = None
    self._board: Any = None
    if jax.process_index():
      return
    self._place = directory / 'metrics.jsonl'
    kept = _rows_until(self._place, steps[0])
    if paths.is_remote(directory):
      print(f'{directory} is remote: no TensorBoard events.', flush=True)
      self._file = tempfile.NamedTemporaryFile('w+', prefix='calm_jax_')
      self._file.write(kept)
      return
    import tensorboardX  # imports torch, where that is installed

    directory.mkdir(parents=True, exist_ok=True)
    paths.write_whole(self._place, kept)
    self._file = self._place.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(directory / 'tensorboard'), purge_step=steps[0] + 1
    )

  def start(
    self, batch: Batch, wait_seconds: float, *, after: Any = None
  ) -> None:
    """Starts the clock, once the step has compiled.

    Args:
      batch: as every batch of this run is shaped.
      wait_seconds: time spent waiting for data until now.
      after: what the step returns, to be waited for.
    """
    jax.block_until_ready(after)
    self._tokens = batch['decoder_input_tokens'].size
    self._flops = self._step_flops(batch)
    self._start = self._then = time.perf_counter()
    self._step, self._wait = self._steps[0] + 1, wait_seconds

  def write(
    self,
    step: int,
    measured: Mapping[str, Any],
    *,
    wait_seconds: float,
    skipped_examples: int = 0,
  ) -> None:
    """Logs one step, and rates since the last one logged.

    Args:
      step: steps made by now.
      measured: scalars of the train step.
      wait_seconds: total time spent waiting for data so far.
      skipped_examples: how many were left out of the data so far.
    """
    # JSON has no NaN: of a refused step there is no loss, and `applied` is 0.
    values = {
      f'train/{k}': float(v) for k, v in measured.items() if np.isfinite(v)
    }
    values['train/learning_rate'] = float(self._schedule(step - 1))
    values['train/flops_per_step'] = self._flops
    values |= self._rates(step, wait_seconds)
    if skipped_examples:
      values['train/skipped_examples'] = float(skipped_examples)
    self.last = values
    if self._file is not None:
      self._store(step, values)
      print(self._line(step, values), flush=True)

  def add(
    self,
    step: int,
    evaluated: Mapping[str, Mapping[str, Any]],
    *,
    seconds: float,
  ) -> None:
    """Logs the numbers of an evaluation, as 'eval/<task>/<split>/<metric>'.

    Args:
      step: steps made by now.
      evaluated: metrics by 'task/split'; texts among them are left out.
      seconds: what it took, which is no time of training.
    """
    self._then, self._start = self._then + seconds, self._start + seconds
    if self._file is None:
      return
    values = {
      f'eval/{task}/{name}': value
      for task, measured in evaluated.items()
      for name, value in measured.items()
      if not isinstance(value, str) and np.isfinite(value)
    }
    self._store(step, values)
    self.flush()

  def flush(self) -> None:
    """Copies the rows to a remote directory; elsewhere they are there."""
    if self._file is not None and paths.is_remote(self._place):

      def copy():
        self._file.flush()
        paths.copy(pathlib.Path(self._file.name), self._place)

      self._attempt(copy, 'metrics.jsonl')

  def _store(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes a row, wherever rows go."""

    def write_row():
      self._file.write(json.dumps({'step': step, **values}) + '\n')
      self._file.flush()

    def write_scalars():
      for name, value in values.items():
        self._board.add_scalar(name, value, step)

    self._attempt(write_row, 'metrics.jsonl')
    if self._board is not None:
      self._attempt(write_scalars, 'TensorBoard')

  def _attempt(self, write: Callable[[], None], what: str) -> None:
    """Lets something be written; a failure is told once, and stops no run."""
    try:
      write()
    # Whatever a logger dies of, the training is worth more.
    except Exception as error:
      if what not in self._failed:
        print(f'warning: {what} cannot be written: {error}', flush=True)
      self._failed.add(what)

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      with contextlib.suppress(Exception):  # it could not be written before
        self._file.close()
      with contextlib.suppress(Exception):
        self._board.close()

  def _rates(self, step: int, wait_seconds: float) -> dict[str, float]:
    now = time.perf_counter()
    seconds, steps = now - self._then, step - self._step
    if not steps:
      return {}
    rates = {
      'train/tokens_per_second': steps * self._tokens / seconds,
      'train/seconds_per_step': seconds / steps,
      'train/data_wait_percent': 100 * (wait_seconds - self._wait) / seconds,
    }
    if self._peak:
      rates['train/mfu'] = self._flops * steps / seconds / self._peak
    self._then, self._step, self._wait = now, step, wait_seconds
    return rates

  def _line(self, step: int, values: Mapping[str, float]) -> str:
    first, last = self._steps
    parts = [
      f'step {step:>6}/{last}',
      f'loss {values.get("train/loss", np.nan):.4f}',
      f'acc {values.get("train/accuracy", np.nan):.3f}',
    ]
    if 'train/tokens_per_second' in values:
      spent = time.perf_counter() - self._start
      eta = spent / (step - first - 1) * (last - step)
      parts += [
        f'{values["train/tokens_per_second"]:,.0f} tok/s',
        f'data wait {values["train/data_wait_percent"]:.1f}%',
      ]
      if 'train/mfu' in values:
        parts.append(f'MFU {100 * values["train/mfu"]:.1f}%')
      parts.append(f'ETA {_clock(eta)}')
    return ' | '.join(parts)


def _rows_until(path: pathlib.Path, last_step: int) -> str:
  """Returns the rows of a JSONL file up to `last_step`."""
  kept = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:  # cut off by a kill
      continue
    if row['step'] <= last_step:
      kept.append(line + '\n')
  return ''.join(kept)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
