"""A trace of some steps of a run, for XProf, TensorBoard or Perfetto."""

from collections.abc import Callable
import pathlib
from typing import Any

import jax

from calm_jax import paths


class Profiler:
  """Stands beside the loop of one run, and traces the steps that are named.

  It waits before the first and after the last of them, and changes nothing
  else. A run that continues after the first of them traces nothing.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    steps: tuple[int, int] | None,
    train_steps: int,
  ):
    """Does nothing yet.

    Args:
      directory: MODEL_DIR; each process writes a file in its folder `profile`.
      steps: the first and the last that are traced; None traces nothing.
      train_steps: of the whole run.

    Raises:
      ValueError: if there are no such steps, or it would go to a bucket.
    """
    self._directory, self._is_on = directory / 'profile', False
    self._first, self._last = steps or (0, 0)
    if steps and not 1 <= self._first <= self._last <= train_steps:
      raise ValueError(
        f'profile_steps = {tuple(steps)}: the first and the last step that are'
        f' traced, of 1 to TRAIN_STEPS = {train_steps}. The first of all'
        ' compiles; (10, 13) is a good choice.'
      )
    if steps and paths.is_remote(directory):
      raise ValueError(
        f'profile_steps = {tuple(steps)}: a trace cannot be written to'
        f' {directory}. Trace a short run with a MODEL_DIR of this machine.'
      )

  def run(self, step: int, function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args), which is what the step of this number does."""
    if step == self._first:
      jax.block_until_ready(args)
      jax.profiler.start_trace(self._directory)
      self._is_on = True
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      result = function(*args)
    if self._is_on and step == self._last:
      jax.block_until_ready(result)
      self.close()
    return result

  def close(self) -> None:
    """Ends a trace that is going on."""
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()
