"""Locks, preemption, hangs: of whole processes, ended from outside.

Run: pytest tests/guards_test.py
"""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from calm_jax import guards

HOLD = """
import pathlib, sys, time
from calm_jax import guards
with guards.only_run(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""
HANG = """
import pathlib, sys, time
from calm_jax import guards
with guards.Guard(
  guards.Guards(hang_seconds=0.5), pathlib.Path(sys.argv[1])
) as guard:
  time.sleep(1)  # the first step may take any time
  guard.after(1, {}, {'applied': True, 'dropped_targets': 0})
  guard.rest()
  time.sleep(1)  # and so may an evaluation
  guard.after(2, {}, {'applied': True, 'dropped_targets': 0})
  print('begins to hang', flush=True)
  def the_step_that_hangs():
    time.sleep(600)
  the_step_that_hangs()
"""


def start(program, directory):
  return subprocess.Popen(
    [sys.executable, '-c', program, str(directory)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_runs_share_no_directory_and_a_kill_leaves_no_lock(tmp_path):
  with start(HOLD, tmp_path) as process:
    try:
      assert process.stdout.readline() == 'held\n'
      with pytest.raises(ValueError, match=f'process {process.pid} on '):
        with guards.only_run(tmp_path):
          pass
    finally:
      process.send_signal(signal.SIGKILL)
  with guards.only_run(tmp_path):
    found = (tmp_path / guards.LOCK_FILE).read_text()
  assert found.startswith(f'process {os.getpid()} on ')
  with guards.only_run(tmp_path):
    pass


def test_where_nothing_can_be_locked_a_run_goes_on(
  tmp_path, monkeypatch, capsys
):
  def no_locks(*args):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(guards.fcntl, 'flock', no_locks)
  with guards.only_run(tmp_path):
    pass
  assert 'cannot be locked ([Errno 37] No locks' in capsys.readouterr().out


def test_a_hang_ends_the_process_and_shows_where_it_was(tmp_path):
  with start(HANG, tmp_path) as process:
    out, err = process.communicate(timeout=60)
  assert process.returncode == 1
  assert out == 'begins to hang\n'
  assert 'the_step_that_hangs' in err and 'Timeout' in err


def test_sigterm_is_told_once_and_handed_back():
  before = signal.getsignal(signal.SIGTERM)
  with guards.Preemption() as preemption:
    assert not preemption.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.reached()
  assert signal.getsignal(signal.SIGTERM) == before


SERVICE = """
import os, pathlib, signal, socket, sys, time
import jax
from calm_jax import guards
with socket.socket() as free:
  free.bind(('127.0.0.1', 0))
  port = free.getsockname()[1]
jax.distributed.initialize(f'127.0.0.1:{port}', 1, 0)
with guards.Guard(guards.Guards(), pathlib.Path(sys.argv[1])) as guard:
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(3)  # the service is told now, before any step
  good = {'applied': True, 'dropped_targets': 0}
  print([guard.after(step, {}, good) for step in range(1001, 1004)])
"""


@pytest.mark.slow
def test_a_run_that_continues_hears_sigterm_before_its_first_step(tmp_path):
  """By JAX's service, which several processes agree through."""
  with start(SERVICE, tmp_path) as process:
    out, err = process.communicate(timeout=120)
  assert 'True' in out, err


def test_bad_steps_are_counted_until_it_is_enough(tmp_path, capsys):
  bad = {'applied': np.False_, 'loss': np.inf, 'grad_norm': 2.0}
  bad['dropped_targets'] = 0.0
  good = {'applied': np.True_, 'dropped_targets': 0.0}
  batch = {'decoder_input_tokens': np.arange(6).reshape(2, 3)}
  guard = guards.Guard(guards.Guards(tolerated_steps=2), tmp_path)
  with guard:
    for step, measured in ((5, good), (6, bad), (7, good), (8, bad)):
      guard.after(step, batch, measured)
    assert guard.refused == 1
    with pytest.raises(FloatingPointError, match='step 8 has the loss inf'):
      guard.look()
    guard.look()  # nothing is looked at twice
  assert 'step 6 has the loss inf' in capsys.readouterr().out
  found = sorted(tmp_path.glob('refused_batches/*.npz'))
  assert [file.stem for file in found] == ['6', '8']
  np.testing.assert_array_equal(
    np.load(found[0])['decoder_input_tokens'], batch['decoder_input_tokens']
  )


def test_what_no_guard_does():
  with pytest.raises(ValueError, match='hang_seconds = 0: it must be positive'):
    guards.Guards(hang_seconds=0)
  with pytest.raises(ValueError, match='tolerated_steps = -1'):
    guards.Guards(tolerated_steps=-1)
