"""Breaks toy runs in every way that docs/reliability.md promises to survive.

  python -m tests.reliability            # all of it: about half an hour
  python -m tests.reliability kills bits # some

Prints a row of a table for each series, with what was found, and ends with 1 if
any failed. tests/reliability_test.py runs the same with small numbers.
"""

from collections.abc import Callable, Sequence
import contextlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from calm_jax import checkpoints, guards, run_files, sharding
from tests import checkpoints_test, toy_run

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 600  # seconds for a run that takes a few


class BrokenError(AssertionError):
  """A promise was not kept."""


def claim(holds: Any, what: str) -> None:
  if not holds:
    raise BrokenError(what)


# --- Processes ---------------------------------------------------------------


class Run:
  """Processes of one toy run, their output in files."""

  def __init__(
    self,
    directory: pathlib.Path,
    *flags: Any,
    processes: int = 1,
    devices: int = 1,
    only: dict[int, Sequence[Any]] | None = None,
    heartbeat: int = 10,
  ):
    """Starts them.

    Args:
      directory: MODEL_DIR.
      *flags: of tests/toy_run.py.
      processes: how many; each has `devices`.
      devices: simulated ones in each process.
      only: more flags for one process.
      heartbeat: seconds.
    """
    self.logs, self.processes = [], []
    directory.parent.mkdir(parents=True, exist_ok=True)
    environ = {
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
      'TF_CPP_MIN_LOG_LEVEL': '3',
    }
    if processes > 1:
      with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
      environ |= {
        'CALM_JAX_COORDINATOR': address,
        'CALM_JAX_NUM_PROCESSES': str(processes),
        'CALM_JAX_HEARTBEAT_SECONDS': str(heartbeat),
      }
    for index in range(processes):
      self.logs.append(directory.with_name(f'{directory.name}.{index}.log'))
      more = (only or {}).get(index, ())
      with self.logs[-1].open('w') as log:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, '-m', 'tests.toy_run', str(directory)]
            + [str(flag) for flag in (*flags, *more)],
            cwd=ROOT,
            env={**environ, 'CALM_JAX_PROCESS_ID': str(index)}
            if processes > 1
            else environ,
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )

  def said(self) -> str:
    return '\n'.join(log.read_text() for log in self.logs)

  def codes(self) -> list[int]:
    """Waits for all, and returns their exit codes."""
    try:
      return [process.wait(PATIENCE) for process in self.processes]
    finally:
      self.kill()

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Waits until it holds; returns False if a process has ended before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
      if any(process.poll() is not None for process in self.processes):
        return condition()
      claim(time.monotonic() < deadline, f'waited in vain: {self.said()}')
      time.sleep(0.001)
    return True


def finish(directory: pathlib.Path, *flags: Any, **settings: Any) -> str:
  """Runs to the end, and returns what was said."""
  run = Run(directory, *flags, **settings)
  codes = run.codes()
  claim(not any(codes), f'exit codes {codes}: {run.said()}')
  return run.said()


def compare(directory: pathlib.Path, expected: dict[str, Any]) -> None:
  found = toy_run.result_of(directory)
  for name, value in expected.items():
    claim(found[name] == value, f'{directory}: another {name} than expected')


def is_saving(directory: pathlib.Path) -> bool:
  """Whether a step is written and not committed yet."""
  return any('tmp' in p.name for p in (directory / 'checkpoints').glob('*'))


# --- One process -------------------------------------------------------------


def kills(folder: pathlib.Path, count: int = 50) -> str:
  """kill -9 at random moments of 200 steps; every other one inside a save."""
  steps = ('--steps', 200)
  whole = folder / 'whole'
  run = Run(whole, *steps)
  run.wait_for((whole / guards.LOCK_FILE).exists)
  begun = time.monotonic()
  claim(run.codes() == [0], run.said())
  seconds = time.monotonic() - begun
  expected = toy_run.result_of(whole)
  rng, inside, reached = random.Random(0), 0, []
  for number in range(count):
    directory = folder / f'killed{number}'
    run = Run(directory, *steps)
    run.wait_for((directory / guards.LOCK_FILE).exists)
    time.sleep(rng.uniform(0, 0.9 * seconds))
    if number % 2:
      run.wait_for(lambda directory=directory: is_saving(directory))
    run.kill()
    inside += is_saving(directory)
    reached.append(_last_step(directory))
    finish(directory, *steps)
    compare(directory, expected)
    shutil.rmtree(directory)
  return (
    f'{count}/{count} bit-identical; {inside} inside a save; killed between the'
    f' steps {min(reached)} and {max(reached)}'
  )


def _last_step(directory: pathlib.Path) -> int:
  file = directory / 'metrics.jsonl'
  rows = file.read_text().splitlines() if file.exists() else []
  return json.loads(rows[-2])['step'] if len(rows) > 1 else 0


def stops(folder: pathlib.Path, steps: Sequence[int] = range(1, 31)) -> str:
  """SIGTERM at each step of 30; two microbatches, packed rows."""
  settings = {'train_steps': 30, 'checkpoint_every': 1000}
  toy_run.run(folder / 'whole', **settings)
  expected = toy_run.result_of(folder / 'whole')
  for step in steps:
    directory = folder / f'stopped{step}'
    try:
      toy_run.run(directory, sigterm_at=step, **settings)
      claim(False, f'SIGTERM at step {step} was not heard')
    except SystemExit as stopped:
      claim(stopped.code == guards.PREEMPTED, f'exit code {stopped.code}')
    saved = _steps(directory)
    claim(saved == [step], f'{saved} saved at step {step}')
    toy_run.run(directory, **settings)
    compare(directory, expected)
  return f'{len(steps)}/{len(steps)} bit-identical'


def _steps(directory: pathlib.Path) -> list[int]:
  saved = checkpoints.Checkpoints(directory / 'checkpoints')
  try:
    return saved.steps()
  finally:
    saved.close()


def sigterm(folder: pathlib.Path, count: int = 5) -> str:
  """How long it takes from SIGTERM to the end, at random moments."""
  rng, longest = random.Random(1), 0.0
  for number in range(count):
    directory = folder / str(number)
    run = Run(directory, '--steps', 1_000_000, '--checkpoint_every', 1_000_000)
    run.wait_for((directory / 'metrics.jsonl').exists)
    time.sleep(rng.uniform(0, 2))
    begun = time.monotonic()
    run.processes[0].terminate()
    claim(run.codes() == [guards.PREEMPTED], run.said())
    longest = max(longest, time.monotonic() - begun)
    claim(len(_steps(directory)) == 1, 'nothing was saved')
  claim(longest < 10, f'{longest:.1f} s')
  return f'{count}/{count} saved, exit code 75, {longest:.1f} s at most'


def bits(folder: pathlib.Path, count: int = 200) -> str:
  """One flipped bit in a file of the newest of two steps."""
  good = folder / 'good'
  states = [checkpoints_test.make_state(step) for step in (4, 7)]
  checkpoints_test.save(good, states)
  shapes = checkpoints_test.wanted(
    states[0], sharding.make_mesh(devices=jax.devices()[:1])
  )
  rng, skipped = np.random.default_rng(0), 0
  files = checkpoints_test.files_of(good, 7)
  for number in range(count):
    directory = pathlib.Path(shutil.copytree(good, folder / f'{number}'))
    file = directory / files[number % len(files)].relative_to(good)
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    # The bits of step 7, or of step 4 and a warning that names step 7.
    skipped += checkpoints_test.check_damaged(directory, shapes) == 4
    shutil.rmtree(directory)
  return (
    f'0 of {count} loaded wrong, in {len(files)} files: {skipped} fell back to'
    f' the step before, {count - skipped} changed nothing that is read'
  )


def composition_bits(folder: pathlib.Path, count: int = 200) -> str:
  """One flipped bit in composition.safetensors."""
  toy_run.run(folder / 'run', train_steps=2)
  file = folder / 'run' / run_files.WEIGHTS_FILE
  content = file.read_bytes()
  expected = toy_run.digests_of(file.parent)
  rng, refused = np.random.default_rng(0), 0
  for _ in range(count):
    flipped = bytearray(content)
    flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
    file.write_bytes(flipped)
    try:
      found = toy_run.digests_of(file.parent)
    except ValueError:
      refused += 1
    else:
      claim(found == expected, 'other numbers were read')
  return f'0 of {count} loaded wrong: {refused} refused'


def files(folder: pathlib.Path) -> str:
  """Each file of the newest step is cut in half, or deleted."""
  good = folder / 'good'
  states = [checkpoints_test.make_state(step) for step in (4, 7)]
  checkpoints_test.save(good, states)
  shapes = checkpoints_test.wanted(
    states[0], sharding.make_mesh(devices=jax.devices()[:1])
  )
  found = checkpoints_test.files_of(good, 7)
  skipped = 0
  for damage in ('cut', 'deleted'):
    for name in found:
      directory = pathlib.Path(shutil.copytree(good, folder / 'damaged'))
      file = directory / name.relative_to(good)
      if damage == 'deleted':
        file.unlink()
      else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
      skipped += checkpoints_test.check_damaged(directory, shapes) == 4
      shutil.rmtree(directory)
  return (
    f'{skipped} of {2 * len(found)} fell back and named the step; the rest is'
    ' not read'
  )


def soak(folder: pathlib.Path, steps: int = 10_000) -> str:
  """Resident memory, from a tenth of the steps to the end."""
  directory = folder / 'run'
  run = Run(
    directory, '--steps', steps, '--checkpoint_every', 100, '--log_every', 10
  )
  status = pathlib.Path(f'/proc/{run.processes[0].pid}/status')
  measured = []
  for step in (steps // 10, steps - 20):
    run.wait_for(lambda step=step: _last_step(directory) >= step)
    (kilobytes,) = re.findall(r'VmRSS:\s+(\d+) kB', status.read_text())
    measured.append(int(kilobytes) / 1024)
  claim(run.codes() == [0], run.said())
  begin, end = measured
  claim(end - begin < max(0.01 * begin, 20), f'{begin:.0f} -> {end:.0f} MB')
  return (
    f'{begin:.0f} MB at step {steps // 10:,}, {end:.0f} MB at {steps - 20:,}'
  )


# --- Several devices and processes -------------------------------------------

TWO = {'processes': 2, 'devices': 4}


def _losses(directory: pathlib.Path) -> dict[int, float]:
  rows = (directory / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(row) for row in rows]
  return {row['step']: row['train/loss'] for row in rows if 'train/loss' in row}


def _furthest(some: dict[int, float], others: dict[int, float]) -> float:
  claim(some.keys() == others.keys(), 'other steps were logged')
  return max(abs(others[step] - loss) / loss for step, loss in some.items())


def topologies(folder: pathlib.Path, steps: int = 20) -> str:
  """One device, eight, and two processes of four: the same losses."""
  flags = ('--steps', steps)
  finish(folder / 'one', *flags)
  expected = _losses(folder / 'one')
  split = (*flags, '--mesh', 2, 2, 2)
  furthest = {}
  for name, settings in (
    ('8 devices', {'devices': 8}),
    ('2 processes x 4', TWO),
  ):
    said = finish(folder / name, *split, **settings)
    parts = re.search(r'split: (\d+) of (\d+)', said)
    claim(parts and int(parts[1]) > 0, f'nothing was split: {said}')
    furthest[name] = _furthest(expected, _losses(folder / name))
  claim(max(furthest.values()) <= 1e-5, str(furthest))
  told = ', '.join(f'{name} {x:.1e}' for name, x in furthest.items())
  return f'losses of {steps} steps, relative: {told}; {parts[0]} parameters'


MESHES = {
  '1 device': ((1, 1, 1), {'devices': 1}),
  '2 devices': ((1, 2, 1), {'devices': 2}),
  '4 devices': ((2, 1, 2), {'devices': 4}),
  '8, all split': ((1, 8, 1), {'devices': 8}),
  '8, 2x2x2': ((2, 2, 2), {'devices': 8}),
  '2 processes': ((4, 2, 1), TWO),
}


def meshes(folder: pathlib.Path, names: Sequence[str] = tuple(MESHES)) -> str:
  """A step of 8 devices (4x2) is continued on other meshes."""
  steps = ('--steps', 6, '--checkpoint_every', 5)
  whole, stopped = folder / 'whole', folder / 'stopped'
  first = (*steps, '--mesh', 4, 2, 1)
  finish(whole, *first, devices=8)
  run = Run(stopped, *first, '--sigterm_at', 5, devices=8)
  claim(run.codes() == [guards.PREEMPTED], run.said())
  furthest = 0.0
  for name in names:
    mesh, settings = MESHES[name]
    directory = pathlib.Path(shutil.copytree(stopped, folder / name))
    said = finish(directory, *steps, '--mesh', *mesh, **settings)
    # Restoring compares every array with the hash of what was saved.
    claim('trained from step 5' in said and 'damaged' not in said, said)
    furthest = max(furthest, _furthest(_losses(whole), _losses(directory)))
  claim(furthest <= 1e-6, f'{furthest}')
  return (
    f'{len(names)} meshes: arrays bit-identical, next loss within'
    f' {furthest:.1e}'
  )


def sigterm_of_one(folder: pathlib.Path) -> str:
  """SIGTERM to the second of two processes."""
  flags = ('--steps', 60, '--checkpoint_every', 1000, '--mesh', 4, 2, 1)
  finish(folder / 'whole', *flags, **TWO)
  directory = folder / 'stopped'
  run = Run(directory, *flags, **TWO, only={1: ('--sigterm_at', 7)})
  codes = run.codes()
  claim(codes == [guards.PREEMPTED] * 2, f'{codes}: {run.said()}')
  steps = _steps(directory)
  claim(len(steps) == 1 and steps[0] < 60, f'saved {steps}')
  finish(directory, *flags, **TWO)
  compare(directory, toy_run.result_of(folder / 'whole'))
  return f'both saved step {steps[0]}, exit codes {codes}; continued to equal'


def damage_seen_by_two(folder: pathlib.Path) -> str:
  """A step of which one of two processes alone reads the damaged part."""
  flags = ('--steps', 10, '--mesh', 1, 8, 1)
  finish(folder / 'whole', *flags, **TWO)
  directory = pathlib.Path(shutil.copytree(folder / 'whole', folder / 'again'))
  (directory / run_files.WEIGHTS_FILE).unlink()
  parts = (directory / 'checkpoints' / '10').rglob('d/*')
  file = max(parts, key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)
  said = finish(directory, *flags, **TWO)
  claim('checkpoints/10 is damaged and skipped' in said, said)
  claim('trained from step 5' in said, said)
  compare(directory, toy_run.result_of(folder / 'whole'))
  return 'both fell back to the step before, and ended equal'


def damage_seen_by_one(folder: pathlib.Path) -> str:
  """A step that one of two processes alone finds damaged once it is read."""
  flags = ('--steps', 10, '--mesh', 4, 2, 1)
  finish(folder / 'whole', *flags, **TWO)
  for index in (0, 1):
    directory = folder / str(index)
    shutil.copytree(folder / 'whole', directory)
    (directory / run_files.WEIGHTS_FILE).unlink()
    said = finish(directory, *flags, **TWO, only={index: ('--sees_damage',)})
    claim('checkpoints/10 is damaged and skipped' in said, said)
    claim('trained from step 5' in said, said)
    compare(directory, toy_run.result_of(folder / 'whole'))
  return 'whichever it was, both fell back, and ended equal'


def peers(folder: pathlib.Path) -> str:
  """kill -9 to one of two processes that no launcher watches."""
  heartbeat, seconds = 10, []
  for victim in (0, 1):
    directory = folder / str(victim)
    run = Run(
      directory, '--steps', 10**6, '--mesh', 4, 2, 1, **TWO, heartbeat=heartbeat
    )
    run.wait_for(lambda directory=directory: _last_step(directory) > 3)
    run.processes[victim].kill()
    begun = time.monotonic()
    try:
      code = run.processes[1 - victim].wait(PATIENCE)
    finally:
      run.kill()
    seconds.append(time.monotonic() - begun)
    claim(code, 'the other ended as if all were well')
  claim(max(seconds) < heartbeat + 10, f'{seconds}')
  told = ' and '.join(f'{one:.1f} s' for one in seconds)
  return f'the other ended after {told}, with a heartbeat of {heartbeat} s'


def divergence(folder: pathlib.Path) -> str:
  """One ulp in one number of one process's copy."""
  name = 'params/composition/code_0_into_0/source_norm/scale'
  flags = ('--steps', 20, '--mesh', 8, 1, 1)
  directory = folder / 'run'
  run = Run(directory, *flags, **TWO, only={1: ('--diverged', name)})
  codes = run.codes()
  claim(all(codes), f'{codes}: {run.said()}')
  found = re.findall(r'error: (\S+) is not equal on all devices', run.said())
  claim(found, run.said())
  claim(not _steps(directory), 'a diverged state was saved')
  return f'noticed at the first check, step 5, by {len(found)} of 2 processes'


SERIES = {
  one.__name__: one
  for one in (
    *(kills, stops, sigterm, bits, composition_bits, files, soak),
    *(topologies, meshes, sigterm_of_one, damage_seen_by_two),
    *(damage_seen_by_one, peers, divergence),
  )
}


def main(names: Sequence[str]) -> int:
  unknown = set(names) - set(SERIES)
  if unknown:
    sys.exit(f'error: no series {sorted(unknown)}; there are {list(SERIES)}')
  failed = 0
  print('| series | found | seconds |\n|---|---|---|', flush=True)
  for name in names or SERIES:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      try:
        with contextlib.redirect_stdout(io.StringIO()):  # of runs in here
          found = SERIES[name](pathlib.Path(folder))
      except BrokenError as error:
        failed, found = failed + 1, f'**FAILED**: {error}'
    seconds = time.monotonic() - begun
    what = SERIES[name].__doc__.strip().rstrip('.')
    print(f'| {name}: {what} | {found} | {seconds:.0f} |', flush=True)
  return int(failed > 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
