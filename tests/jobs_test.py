"""Chains of commands: in order, side by side, once, and ended together.

Run: pytest tests/jobs_test.py
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from calm_jax import jobs


def job_that(product, program):
  job = jobs.Job('train', [], products=[product], name=product.parent.name)
  job.command = [sys.executable, '-c', program]
  return job


def write(file, *, after=()):
  """A program that says what it does, if others have written before it."""
  checks = '\n'.join(f'assert pathlib.Path({str(f)!r}).exists()' for f in after)
  return (
    f'import pathlib\n{checks}\nprint("Done")\n'
    f'pathlib.Path({str(file)!r}).touch()'
  )


def test_chains_run_in_order_and_once(tmp_path, capsys):
  a, b, c = (tmp_path / name / 'product' for name in 'abc')
  chains = [
    [
      job_that(a, write(a)),
      job_that(b, write(b, after=[a])),
    ],
    [job_that(c, write(c))],
  ]
  jobs.run(chains)
  assert a.exists() and b.exists() and c.exists()
  assert '[b] Done' in capsys.readouterr().out
  jobs.run(chains)
  said = capsys.readouterr().out.splitlines()
  assert said == [f'finished before: {product}' for product in (a, b, c)]


def test_a_failed_stage_ends_the_others(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs.os, 'cpu_count', lambda: 2)
  endless = job_that(tmp_path / 'a' / 'product', 'import time; time.sleep(600)')
  started = []
  start = endless.start

  def start_and_keep(**settings):
    started.append(start(**settings))
    return started[-1]

  endless.start = start_and_keep
  fails = job_that(tmp_path / 'b' / 'product', 'print(1 / 0)')
  never = job_that(tmp_path / 'c' / 'product', '')
  with pytest.raises(
    jobs.JobError, match='(?s)ZeroDivisionError.*ended with code'
  ):
    jobs.run([[endless], [fails, never]])
  assert started[0].returncode == -signal.SIGTERM
  assert not never.log.exists()


def test_sigterm_ends_the_jobs_too(tmp_path):
  program = (
    'import pathlib, sys\n'
    'from calm_jax import jobs\n'
    'product = pathlib.Path(sys.argv[1])\n'
    'job = jobs.Job("train", [], products=[product], name="x")\n'
    'job.command = [sys.executable, "-c",\n'
    '  "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]\n'
    'jobs.run([[job]])\n'
  )
  product = tmp_path / 'a' / 'product'
  log = product.parent / 'train.log'
  process = subprocess.Popen([sys.executable, '-c', program, str(product)])
  end = time.monotonic() + 60
  while not (log.exists() and log.read_text()) and time.monotonic() < end:
    time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=60) == 128 + signal.SIGTERM
  with pytest.raises(ProcessLookupError):
    os.kill(int(log.read_text()), 0)


def test_a_job_that_makes_nothing_has_failed(tmp_path):
  silent = job_that(tmp_path / 'a' / 'product', 'print("x")')
  with pytest.raises(jobs.JobError, match='product made no such file'):
    jobs.run([[silent]])


def test_any_product_shows_that_a_job_has_ended(tmp_path, capsys):
  first, second = tmp_path / 'first', tmp_path / 'second'
  job = jobs.Job('train', [], products=[first, second], name='x')
  job.command = [sys.executable, '-c', write(second)]
  jobs.run([[job]])
  assert second.exists() and not first.exists()
  jobs.run([[job]])
  assert 'finished before' in capsys.readouterr().out


def test_a_launcher_is_given_name_and_flags(tmp_path):
  there, here = (
    jobs.Job(
      'train', ['--x=1'], products=[tmp_path / 'a'], name='x', launcher=launcher
    )
    for launcher in (['bash', 'run.sh', 'slurm'], [])
  )
  assert there.command == ['bash', 'run.sh', 'slurm', 'train', '--x=1']
  assert here.command == [sys.executable, '-m', 'calm_jax.train', '--x=1']


def test_each_core_takes_one_of_several(tmp_path):
  """A job alone has all cores, and its log goes on where it was cut."""
  show = 'import os; print("Done", os.environ.get("XLA_FLAGS", ""))\n'
  for count in (1, 2):
    chains = []
    for i in range(count):
      product = tmp_path / f'{count}_{i}' / 'product'
      chains.append([job_that(product, show + write(product))])
    jobs.run(chains, at_once=2)
    for (job,) in chains:
      alone = '--xla_cpu_multi_thread_eigen=false' not in job.log.read_text()
      assert alone == (count == 1)


def test_at_least_one_runs_at_once():
  with pytest.raises(ValueError, match='at_once = 0: it must be at least 1'):
    jobs.run([], at_once=0)


def test_progress_is_shown_whoever_tells_it(tmp_path, capsys):
  lines = ['step 1', '[worker 0] step 2', ' 3: Done', '[worker 1] no', '4: no']
  for i, line in enumerate(lines):
    product = tmp_path / str(i) / 'product'
    show = f'print({line!r})\n'
    jobs.run([[job_that(product, show + write(product).replace('Done', ''))]])
  said = capsys.readouterr().out
  assert all(f'] {line}\n' in said for line in lines[:3])
  assert 'no\n' not in said
