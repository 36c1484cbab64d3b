"""What keeps a run from harm: a lock, preemption, hangs, and bad steps.

Exit codes of a training: 0 when it has ended, `PREEMPTED` (75, EX_TEMPFAIL of
sysexits.h) when it was told to stop, saved, and can be run again, 1 else.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import faulthandler
import fcntl
import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from calm_jax import paths

PREEMPTED = 75
LOCK_FILE = 'run.lock'


@contextlib.contextmanager
def only_run(directory: pathlib.Path):
  """Holds a directory for this process; the kernel lets go when it ends.

  Nothing holds a folder in a bucket; there it only says who has it.

  Raises:
    ValueError: if another process holds it, or nothing can be written there.
  """
  if jax.process_count() > 1 and str(directory).startswith('s3://'):
    raise ValueError(
      f'{directory}: Orbax writes no arrays to s3://, and a run of'
      f' {jax.process_count()} processes cannot do it for them. Take gs://, or'
      ' a file system that all of them mount.'
    )
  if jax.process_index():
    yield
    return
  me = f'process {os.getpid()} on {socket.gethostname()}\n'
  if paths.is_remote(directory):
    print(f'warning: {directory} cannot be locked: it is remote.', flush=True)
    try:
      (directory / LOCK_FILE).write_text(me)
    except Exception as error:  # each service has its own kinds
      raise ValueError(
        f'{directory} cannot be written ({error or type(error).__name__}). Look'
        ' whether there is such a bucket, and whose credentials are used.'
      ) from error
    yield
    return
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / LOCK_FILE).open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise ValueError(
        f'{directory} belongs to a run that is going on:'
        f' {file.read().strip() or "of another process"}. Wait for it, end it,'
        ' or choose another MODEL_DIR.'
      ) from None
    except OSError as error:  # a file system without locks
      print(f'warning: {directory} cannot be locked ({error}).', flush=True)
    file.truncate(0)
    file.write(me)
    file.flush()
    yield


class Preemption:
  """Whether the run has been told to stop by SIGTERM.

  One process learns it by a handler of its own; several agree on the step by
  JAX's preemption service, which any of them may have told.
  """

  def __init__(self):
    self._is_told = False
    self._steps = 0
    self._before: Any = None
    self._is_ours = False

  def __enter__(self) -> 'Preemption':
    in_main_thread = threading.current_thread() is threading.main_thread()
    self._is_ours = in_main_thread and not jax.distributed.is_initialized()
    if self._is_ours:
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_: Any) -> None:
    if self._is_ours:
      signal.signal(signal.SIGTERM, self._before)

  def _tell(self, *_: Any) -> None:
    self._is_told = True

  def reached(self) -> bool:
    """Whether to save and stop after this step; the same in all processes.

    To be asked once at each step: the service agrees on a number of steps, and
    begins at 0 in a run that continues, too.
    """
    self._steps += 1
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(self._steps)
    return self._is_told


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guards:
  """What a run does about hangs and bad steps.

  Attributes:
    hang_seconds: if a step takes longer, the process prints the stack of each
      thread and ends. The first one, which compiles, and evaluations may take
      any time. None waits for ever.
    tolerated_steps: the run ends at so many steps whose update was not applied
      (see `train_step.make_train_step`); their batches are written to
      MODEL_DIR/refused_batches.
  """

  hang_seconds: float | None = 1800.0
  tolerated_steps: int = 3

  def __post_init__(self):
    for name in ('hang_seconds', 'tolerated_steps'):
      value = getattr(self, name)
      if value is not None and value <= 0:
        raise ValueError(f'Guards.{name} = {value}: it must be positive.')


DEFAULT = Guards()


class Guard:
  """Stands beside the loop of one run; used as a context manager."""

  def __init__(self, guards: Guards, directory: pathlib.Path):
    """Does nothing yet.

    Args:
      guards: settings.
      directory: MODEL_DIR.
    """
    self.refused = 0
    self._guards = guards
    self._folder = directory / 'refused_batches'
    self._last: tuple[int, Mapping[str, np.ndarray], Mapping] | None = None
    self._preemption = Preemption()

  def __enter__(self) -> 'Guard':
    self._preemption.__enter__()
    return self

  def __exit__(self, *error: Any) -> None:
    self.rest()
    self._preemption.__exit__(*error)

  def after(
    self,
    step: int,
    batch: Mapping[str, np.ndarray],
    measured: Mapping[str, Any],
  ) -> bool:
    """Takes a step that has been started, and looks at the one before.

    Args:
      step: its number.
      batch: what it was given, on the host.
      measured: what it returns, maybe not computed yet.

    Returns:
      Whether to save and stop now; the same in all processes.

    Raises:
      FloatingPointError: if too many steps were refused.
      ValueError: if targets were left out of a loss.
    """
    self.look()
    self._last = step, batch, measured
    if self._guards.hang_seconds is not None:
      faulthandler.dump_traceback_later(
        self._guards.hang_seconds, exit=True, file=sys.__stderr__
      )
    return self._preemption.reached()

  def rest(self) -> None:
    """Lets anything take any time, until `after` is called again."""
    faulthandler.cancel_dump_traceback_later()

  def look(self) -> None:
    """Waits for the last step; raises as `after` does."""
    if self._last is None:
      return
    (step, batch, measured), self._last = self._last, None
    dropped = float(measured['dropped_targets'])
    if dropped > 0.5:
      raise ValueError(
        f'Step {step} left {dropped:g} targets out of the loss: a row has more'
        ' than targets_per_row. Raise that, or let make_batches keep to it.'
      )
    if bool(measured['applied']):
      return
    self.refused += 1
    file = self._folder / f'{step}.npz'
    found = (
      f'step {step} has the loss {float(measured["loss"]):g} and the gradient'
      f' norm {float(measured["grad_norm"]):g}; its update was not applied, and'
      f' its batch is in {file}'
    )
    if jax.process_index() == 0:
      self._folder.mkdir(parents=True, exist_ok=True)
      with paths.to_write(file) as here:
        np.savez(here, **batch)
      print(f'warning: {found}', flush=True)
    if self.refused >= self._guards.tolerated_steps:
      raise FloatingPointError(
        f'{found}. Guards.tolerated_steps = {self._guards.tolerated_steps} are'
        ' reached. Look at the batch, or lower the learning rate; the same'
        ' command continues at the last checkpoint.'
      )
