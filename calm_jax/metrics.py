"""What a run tells: parameter report, progress line, metrics files, FLOPs."""

from collections.abc import Mapping
import json
import pathlib
import time
from typing import Any, TextIO

import jax
import numpy as np
import tensorboardX

from calm_jax import trees
from calm_jax.array_types import Params
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
}


def peak_flops() -> float | None:
  """Returns the peak of all devices together, or None if it is not known."""
  kind = jax.devices()[0].device_kind
  for name, peak in PEAK_FLOPS.items():
    if kind.startswith(name):
      return peak * jax.device_count()
  return None


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


def bytes_per_device(tree: Any) -> int:
  """Adds up the bytes of the shards that the first local device holds."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape)
    total += int(np.prod(shape)) * leaf.dtype.itemsize
  return total


class MetricWriter:
  """Writes `metrics.jsonl` and TensorBoard events; on process 0 only."""

  def __init__(self, directory: pathlib.Path, *, resume_step: int = 0):
    """Opens the files; drops what was logged after the restored step."""
    self._file: TextIO | None = None
    if jax.process_index():
      return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / 'metrics.jsonl'
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          row = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
          continue
        if row['step'] <= resume_step:
          kept.append(line + '\n')
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(kept))
    temporary.replace(path)
    self._file = path.open('a')
    self._board = tensorboardX.SummaryWriter(
      str(directory / 'tensorboard'), purge_step=resume_step + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    self._file.flush()
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


class Progress:
  """Turns counts into rates, and rates into one line."""

  def __init__(
    self,
    *,
    first_step: int,
    last_step: int,
    flops: float,
    tokens: int,
    wait_seconds: float,
  ):
    """Starts the clock.

    Args:
      first_step: steps already made.
      last_step: steps in the whole run.
      flops: F_min of one step, for MFU.
      tokens: positions in one step, padding included.
      wait_seconds: time spent waiting for data until now.
    """
    self._first, self._last = first_step, last_step
    self._flops, self._tokens = flops, tokens
    self._start = self._then = time.perf_counter()
    self._step, self._wait = first_step, wait_seconds
    self._peak = peak_flops()

  def rates(self, step: int, *, wait_seconds: float) -> dict[str, float]:
    """Returns the rates since the last call; none right after the start.

    Args:
      step: steps made by now.
      wait_seconds: total time spent waiting for data so far.
    """
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

  def line(self, step: int, metrics: Mapping[str, float]) -> str:
    """Returns the progress line."""
    parts = [
      f'step {step:>6}/{self._last}',
      f'loss {metrics["train/loss"]:.4f}',
      f'acc {metrics["train/accuracy"]:.3f}',
    ]
    if step > self._first:
      spent = time.perf_counter() - self._start
      eta = spent / (step - self._first) * (self._last - step)
      parts += [
        f'{metrics["train/tokens_per_second"]:,.0f} tok/s',
        f'data wait {metrics["train/data_wait_percent"]:.1f}%',
      ]
      if 'train/mfu' in metrics:
        parts.append(f'MFU {100 * metrics["train/mfu"]:.1f}%')
      parts.append(f'ETA {_clock(eta)}')
    return ' | '.join(parts)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
