"""Commands that make files: chains of them, side by side, each run once.

A job whose product exists is finished and not run again. What a job prints goes
to a file of its own; the lines that tell how far it is are shown as they come.
"""

from collections.abc import Iterable, Sequence
import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

# Lines that tell how far a job is begin so, after the name of a worker as
# launch/run.sh ('[worker 0] ') and srun ('0: ') write it.
_PROGRESS = re.compile(
  r'(?:\[worker \d+\] | *\d+: )?(step |Done|composed |lora |finetuned )'
)


class JobError(ValueError):
  """A job has failed; the others were ended, and what they had made stays."""


class Job:
  """One command, its log, and the file that shows it has ended."""

  def __init__(
    self,
    module: str,
    flags: Sequence[str],
    *,
    products: Sequence[pathlib.Path],
    name: str,
    launcher: Sequence[str] = (),
  ):
    """Runs nothing yet.

    Args:
      module: an entry point of calm_jax, such as 'train'.
      flags: its flags.
      products: any of these shows that it has ended; the log goes beside the
        first.
      name: as it is called in what is shown.
      launcher: what runs an entry point elsewhere, given its name and flags,
        such as ('bash', 'launch/run.sh', 'slurm'); here if empty.
    """
    self.products = products
    self.name = name
    here = [sys.executable, '-m', f'calm_jax.{module}']
    self.command = [*([*launcher, module] if launcher else here), *flags]
    self.log = products[0].parent / f'{module}.log'
    self._old_lines = 0
    self._shown = ''

  def is_finished(self) -> bool:
    return any(product.exists() for product in self.products)

  def start(self, *, threads: int) -> subprocess.Popen:
    """Starts the command; with `threads` = 1 it computes on one core."""
    shown = shlex.join(
      ['python' if a == sys.executable else a for a in self.command]
    )
    print(f'\n$ {shown}\n  (log: {self.log})', flush=True)
    self.log.parent.mkdir(parents=True, exist_ok=True)
    self.log.touch()
    self._old_lines = len(self.lines())  # of an earlier, interrupted start
    environment = dict(os.environ)
    if threads == 1:  # two small programs share two cores best one each
      flags = environment.get('XLA_FLAGS', '')
      environment['XLA_FLAGS'] = (
        f'{flags} --xla_cpu_multi_thread_eigen=false'.strip()
      )
    with self.log.open('a') as log:
      return subprocess.Popen(
        self.command, stdout=log, stderr=subprocess.STDOUT, env=environment
      )

  def lines(self) -> list[str]:
    """Returns what this start has printed so far."""
    lines = self.log.read_text(errors='replace').splitlines()
    return lines[self._old_lines :]

  def has_ended(self, process: subprocess.Popen) -> bool:
    """Shows the last line of the log that tells how far it is.

    Raises:
      JobError: if the process has failed, or has not made its product.
    """
    code = process.poll()
    lines = [line for line in self.lines() if _PROGRESS.match(line)]
    if lines and self._shown != lines[-1]:
      self._shown = lines[-1]
      print(f'[{self.name}] {self._shown}', flush=True)
    if code is None:
      return False
    if code or not self.is_finished():
      tail = '\n'.join(self.lines()[-15:])
      problem = f'ended with code {code}' if code else 'made no such file'
      raise JobError(
        f'{tail}\nThe job that makes {self.products[0]} {problem}; the lines'
        f' above are the end of {self.log}. Run the same command again to'
        ' continue.'
      )
    return True


def run(chains: Iterable[Sequence[Job]], *, at_once: int | None = None) -> None:
  """Runs the jobs that are not finished; ended early, it ends those running.

  Args:
    chains: jobs that follow one another. Chains run side by side, and begin in
      this order.
    at_once: how many chains, one on each core if None. Programs that use an
      accelerator want it alone: 1.

  Raises:
    ValueError: if `at_once` is no such number.
    JobError: as soon as one has failed.
  """
  if at_once is not None and at_once < 1:
    raise ValueError(f'at_once = {at_once}: it must be at least 1.')
  waiting = []
  for chain in chains:
    for job in chain:
      if job.is_finished():
        print(f'finished before: {job.products[0]}')
    left = [job for job in chain if not job.is_finished()]
    if left:
      waiting.append(left)
  at_once = min(len(waiting), at_once or os.cpu_count() or 1)
  with _sigterm_as_exit():
    _run_waiting(waiting, at_once)


@contextlib.contextmanager
def _sigterm_as_exit():
  """Lets SIGTERM unwind the stack, as Ctrl-C does, so that no job is left."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(
    signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
  )
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _run_waiting(waiting: list[list[Job]], at_once: int) -> None:
  running: dict[subprocess.Popen, list[Job]] = {}
  try:
    while waiting or running:
      while waiting and len(running) < at_once:
        chain = waiting.pop(0)
        process = chain[0].start(threads=1 if at_once > 1 else 0)
        running[process] = chain
      for process, (job, *next_ones) in list(running.items()):
        if job.has_ended(process):
          del running[process]
          if next_ones:
            waiting.insert(0, next_ones)
      time.sleep(0.5)
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()
