"""Nothing escapes the sandbox, nothing passes that should not, all of it ends.

Run: pytest tests/sandbox_test.py

Where Linux has namespaces these tests fail, and do not skip, if the sandbox
cannot use them.
"""

import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from calm_jax import namespaces, sandbox
from tests import hostile

ROOT = os.geteuid() == 0
MIB = 2**20
SECONDS = 0.7  # For programs that do not end by themselves.
ENOUGH = 20.0  # For all others, on a machine that does other work.
GRACE = 5.0  # Start and end of a sandbox there.
BACKENDS = ['unshare']
if shutil.which('bwrap'):
  BACKENDS.append('bubblewrap')


def machine_has_namespaces():
  limit = pathlib.Path('/proc/sys/user/max_user_namespaces')
  if not pathlib.Path('/proc/self/ns/pid').exists():
    return False
  return ROOT or (limit.exists() and int(limit.read_text()) > 0)


pytestmark = pytest.mark.skipif(
  not machine_has_namespaces(),
  reason='this machine has no Linux namespaces: neither has the sandbox',
)


@pytest.fixture(params=BACKENDS)
def settings(request):
  return sandbox.Sandbox(isolation=request.param)


@pytest.fixture
def mark():
  """A number that is found in the command of a sandbox and nowhere else."""
  return 2**30 + secrets.randbelow(2**30)


def marked_processes(mark):
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      if str(mark).encode() in (folder / 'cmdline').read_bytes():
        found.append(folder.name)
    except OSError:
      pass
  return found


def wait_until(condition, seconds=GRACE):
  end = time.monotonic() + seconds
  while not (seen := condition()) and time.monotonic() < end:
    time.sleep(0.02)
  return seen


def python(program, **options):
  """Starts a program without any protection."""
  return subprocess.Popen(
    [sys.executable, '-c', program],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
    **options,
  )


@pytest.fixture
def world(tmp_path, monkeypatch, mark):
  """What the twelve are after: a folder, a server, a secret."""
  monkeypatch.setenv('CALM_JAX_SECRET', f'secret-{mark}')
  with (
    socket.create_server(('127.0.0.1', 0)) as server,
    socket.socket(socket.AF_UNIX) as abstract,
  ):
    abstract.bind(f'\0secret-{mark}')
    abstract.listen()
    yield {
      'FOLDER': tmp_path,
      'PORT': server.getsockname()[1],
      'MARK': f'secret-{mark}',
    }


# --- The twelve --------------------------------------------------------------


# Of the other programs the reason is that their last assertion failed.
ENDLESS = 'endless_loop', 'signals_masked', 'threads_after_exit'
SHORT = [name for name in hostile.TWELVE if name not in ENDLESS]
REASONS = {
  'fork_bomb': 'BlockingIOError',
  'memory_bomb': 'MemoryError',
  'gigabytes_on_stdout': 'wrote more than 16777216 bytes',
  'exit_before_the_tests': 'ended before its last line: without output',
  **dict.fromkeys(ENDLESS, 'ran longer than 0.7 s'),
}


def test_there_are_twelve():
  assert len(hostile.TWELVE) == 12


def check_outside(world):
  places = world['FOLDER'], os.path.dirname(os.__file__), '/', '/usr', '/dev'
  for place in places:
    assert not os.path.lexists(os.path.join(place, world['MARK'])), place


@pytest.mark.parametrize('name', hostile.TWELVE)
def test_a_hostile_program_neither_passes_nor_escapes(
  name, settings, world, mark
):
  sandbox.run('pass', settings)  # finds out how to isolate, once
  settings = sandbox.Sandbox(
    isolation=settings.isolation,
    seconds=SECONDS if name in ENDLESS else ENOUGH,
    memory=256 * MIB,
    file_size=mark,
  )
  mounts = pathlib.Path('/proc/self/mountinfo').read_text()
  start = time.monotonic()
  result = sandbox.run(hostile.fill(hostile.TWELVE[name], **world), settings)
  assert time.monotonic() - start < settings.seconds + GRACE
  assert not result.passed
  # It failed at what it tried, not at something before.
  assert REASONS.get(name, 'AssertionError') in result.reason
  assert len(result.output) <= 2000
  check_outside(world)
  assert wait_until(lambda: not marked_processes(mark))
  assert pathlib.Path('/proc/self/mountinfo').read_text() == mounts


# --- What they do without it -------------------------------------------------


@pytest.mark.parametrize('name', SHORT)
def test_without_the_sandbox_it_succeeds(name, world):
  program = hostile.fill(hostile.TWELVE[name], **world)
  if name in ('kill_the_parent', 'ptrace'):  # of a parent made for it
    program = (
      'import subprocess, sys\n'
      f'sys.exit(subprocess.call([sys.executable, "-c", {program!r}]))'
    )
  process = python(program)
  try:
    process.wait(timeout=60)
  finally:
    if name == 'fork_bomb':
      os.killpg(process.pid, signal.SIGKILL)
  if name == 'kill_the_parent':
    assert process.returncode == -signal.SIGTERM
  elif name == 'ptrace' and tracing_is_forbidden():
    assert process.returncode == 1
  else:
    assert process.returncode == 0
  if name == 'file_write':
    file = world['FOLDER'] / world['MARK']
    assert file.read_text() == 'escaped'
    for place in (os.path.dirname(os.__file__), '/', '/usr', '/dev'):
      pathlib.Path(place, world['MARK']).unlink(missing_ok=True)


def tracing_is_forbidden():
  scope = pathlib.Path('/proc/sys/kernel/yama/ptrace_scope')
  return scope.exists() and int(scope.read_text()) > (2 if ROOT else 0)


@pytest.mark.parametrize('name', ENDLESS)
def test_without_the_sandbox_it_stays(name):
  process = python(hostile.TWELVE[name] + '\nprint("the end")')
  with process:
    time.sleep(0.5)
    if name == 'signals_masked':
      process.terminate()
      time.sleep(0.2)
    assert process.poll() is None
    process.kill()


# --- All of them at once -----------------------------------------------------

AS_SOMEBODY = """
import json, os
from calm_jax import sandbox
results = []
for seconds, programs in {batches!r}:
  settings = sandbox.Sandbox(
    seconds=seconds, memory=2**28, isolation={isolation!r}
  )
  results += sandbox.run_all(programs, settings, workers=4)
print(json.dumps([os.getuid(), [(r.passed, r.reason) for r in results]]))
"""


@pytest.fixture
def readable_package():
  """The two modules where every user can read them."""
  with tempfile.TemporaryDirectory() as folder:
    package = pathlib.Path(folder, 'calm_jax')
    package.mkdir()
    for module in (namespaces, sandbox):
      shutil.copy(module.__file__, package)
    for path in (folder, package, *package.iterdir()):
      os.chmod(path, 0o755)
    yield folder


def ordinary_user():
  """The beginning of a command that is run by nobody in particular."""
  if not ROOT:
    return [sys.executable]
  setpriv = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups']
  for name in (os.path.realpath(sys.executable), '/usr/bin/python3'):
    command = [*setpriv, name]
    # setpriv may start what the user could not even see.
    check = (
      'import os, sys\n'
      'seen = os.path.exists(sys.executable)\n'
      'sys.exit(not seen or sys.version_info < (3, 11))'
    )
    done = subprocess.run([*command, '-c', check], cwd='/', capture_output=True)
    if done.returncode == 0:
      return command
  pytest.skip('every Python of this machine is closed to users but root')


@pytest.mark.parametrize('isolation', BACKENDS)
def test_an_ordinary_user_is_as_safe(isolation, world, readable_package):
  def fill(names):
    return [hostile.fill(hostile.TWELVE[name], **world) for name in names]

  command = ordinary_user()
  source = AS_SOMEBODY.format(
    isolation=isolation,
    batches=[
      (SECONDS, fill(ENDLESS)),
      (ENOUGH, [*fill(SHORT), 'assert True']),
    ],
  )
  start = time.monotonic()
  done = subprocess.run(
    [*command, '-'],
    input=source,
    capture_output=True,
    text=True,
    cwd=readable_package,
  )
  assert done.returncode == 0, done.stderr
  user, results = json.loads(done.stdout)
  assert user == (65534 if ROOT else os.getuid())
  assert [passed for passed, _ in results] == [False] * 12 + [True], results
  for name, (_, reason) in zip((*ENDLESS, *SHORT), results, strict=False):
    assert REASONS.get(name, 'AssertionError') in reason
  assert time.monotonic() - start < ENOUGH + GRACE
  check_outside(world)


def test_many_at_once_and_in_order(settings, world, mark):
  programs = []
  for number, program in enumerate(hostile.TWELVE.values()):
    programs.append(hostile.fill(program, **world))
    programs += [f'assert {number} % 2', 'print("ok")']
  settings = sandbox.Sandbox(
    isolation=settings.isolation,
    seconds=5.0,
    memory=256 * MIB,
    file_size=mark,
  )
  start = time.monotonic()
  results = sandbox.run_all(programs, settings, workers=6)
  assert time.monotonic() - start < 12 * settings.seconds + GRACE
  expected = [[False, bool(number % 2), True] for number in range(12)]
  assert [result.passed for result in results] == sum(expected, [])
  assert wait_until(lambda: not marked_processes(mark))


# --- What passes -------------------------------------------------------------


def test_a_right_program_passes_and_a_wrong_one_fails(settings):
  right = 'def add(a, b):\n  return a + b\nassert add(1, 2) == 3'
  assert sandbox.run(right, settings) == sandbox.Result(True, 'passed', '')
  wrong = sandbox.run(right.replace('+', '-'), settings)
  assert not wrong.passed
  assert wrong.reason == 'ended before its last line: AssertionError'
  assert 'Traceback' in wrong.output
  syntax = sandbox.run('def add(', settings)
  assert 'SyntaxError' in syntax.reason


def test_what_a_program_may_do(settings):
  """The standard library, files in /tmp, threads, processes, any text."""
  program = """
import collections, decimal, os, random, subprocess, sys, tempfile, threading
assert not os.environ and sys.argv == ['program'] and not sys.stdin.read()
assert os.getcwd() == '/tmp' and not os.listdir('/tmp')
with tempfile.NamedTemporaryFile('w+') as file:
  file.write('\u00e9\U0001f600')
  file.seek(0)
  assert len(file.read()) == 2
done = []
threads = [threading.Thread(target=done.append, args=(i,)) for i in range(3)]
for thread in threads:
  thread.start()
for thread in threads:
  thread.join()
assert sorted(done) == [0, 1, 2]
assert subprocess.run([sys.executable, '-c', 'print(1)']).returncode == 0
print('\u00e9' * 10**5)
"""
  result = sandbox.run(program, settings)
  assert result.passed, result.output


def test_a_long_program(settings):
  program = ''.join(f'x{i} = "{"y" * 100}"\n' for i in range(10_000))
  assert len(program) > MIB
  assert sandbox.run(program + 'assert len(x9999) == 100', settings).passed


def test_no_program_that_pretends_passes(settings):
  results = sandbox.run_all(hostile.PRETENDERS.values(), settings, workers=4)
  outcomes = dict(zip(hostile.PRETENDERS, results, strict=True))
  passed = [name for name, result in outcomes.items() if result.passed]
  assert not passed
  assert len(outcomes) == 14


def test_a_thread_may_not_pass_while_another_goes_on(settings):
  """A daemon thread ends with the program; another one has to end before."""
  program = """
import threading, time
threading.Thread(target=time.sleep, args=({},), daemon={}).start()
"""
  short = sandbox.Sandbox(isolation=settings.isolation, seconds=SECONDS)
  assert sandbox.run(program.format(0.2, False), settings).passed
  assert sandbox.run(program.format(30, True), settings).passed
  assert not sandbox.run(program.format(30, False), short).passed


def test_children_do_not_outlive_their_program(settings, mark):
  """Not even those that have left its session, or never stop to fork."""
  leave = """
import os, time
if not os.fork():
  os.setsid()
  if not os.fork():
    time.sleep(60)
  os._exit(0)
os.wait()
"""
  endless = """
import os
while True:
  try:
    os.fork()
  except OSError:
    pass
"""
  settings = sandbox.Sandbox(
    isolation=settings.isolation, seconds=5.0, file_size=mark
  )
  results = sandbox.run_all([leave, endless], settings, workers=1)
  assert [result.passed for result in results] == [True, False]
  assert results[1].reason == 'ran longer than 5 s'
  assert wait_until(lambda: not marked_processes(mark))


# --- Walls -------------------------------------------------------------------


def test_what_a_program_sees(settings):
  """No right, no other process, no file of ours; and no way to get them."""
  program = """
import os, subprocess
tops = {'bin', 'dev', 'etc', 'lib', 'lib64', 'nix', 'tmp', 'usr'}
assert set(os.listdir('/')) <= tops | {'{PREFIX}'}, os.listdir('/')
assert sorted(os.listdir('/dev')) == ['null', 'urandom']
assert os.listdir('/etc') in ([], ['ld.so.cache'])
def says(*command):
  return subprocess.run(command, capture_output=True, text=True).stdout
assert 'bounding set: [none]' in says('setpriv', '--dump')
assert 'no_new_privs: 1' in says('setpriv', '--dump')
for option in '--user', '--mount', '--net':
  assert subprocess.run(['unshare', option, 'true']).returncode
assert subprocess.run(['mount', '-o', 'remount,rw', '/usr']).returncode
try:
  os.chroot('/usr')
  raise SystemExit('chroot')
except PermissionError:
  pass
assert os.getppid() == 1
for folder, _, _ in os.walk('/'):
  if folder != '/tmp':
    assert os.statvfs(folder).f_flag & os.ST_RDONLY, folder
"""
  program = hostile.fill(program, PREFIX=sys.base_prefix.split('/')[1])
  settings = sandbox.Sandbox(isolation=settings.isolation, seconds=20)
  result = sandbox.run(program, settings)
  assert result.passed, result.output


def test_a_mount_inside_what_is_shown_is_found(monkeypatch):
  """A read-only bind does not reach it: unshare has to make it so itself."""
  lines = rb"""24 1 8:1 / / rw - ext4 /dev/sda rw
25 24 0:30 / /usr/my\040games rw,relatime shared:3 - tmpfs tmpfs rw
26 24 0:31 / /usrlocal rw - tmpfs tmpfs rw
27 24 0:32 / /home rw - tmpfs tmpfs rw
"""
  monkeypatch.setattr(pathlib.Path, 'read_bytes', lambda path: lines)
  script = namespaces._script(size=1)
  remounts = [line for line in script.splitlines() if 'remount' in line]
  assert remounts == [
    "mount -o remount,bind,ro,nosuid,nodev '/sys/jail/usr/my games'",
    'mount -o remount,bind,ro /sys',
  ]


def test_files_are_limited(settings):
  program = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for number in range({FILES}):
  with open(f'/tmp/{number}', 'wb') as file:
    file.write(b'x' * {BYTES})
"""
  settings = sandbox.Sandbox(isolation=settings.isolation, file_size=MIB)
  for files, size, passed in ((1, 2**19, 1), (1, 2**21, 0), (4, 2**19, 0)):
    filled = hostile.fill(program, FILES=files, BYTES=size)
    assert sandbox.run(filled, settings).passed == passed


def test_nothing_is_left_when_python_itself_is_killed(settings, mark):
  program = (
    'from calm_jax import sandbox\n'
    f'settings = sandbox.Sandbox(isolation={settings.isolation!r},'
    f' seconds=60, file_size={mark})\n'
    "sandbox.run('import time; time.sleep(60)', settings)"
  )
  process = python(program, cwd=pathlib.Path(__file__).parent.parent)
  with process:
    # This one, the tool, the shell, the program.
    assert wait_until(lambda: len(marked_processes(mark)) >= 4)
    time.sleep(0.5)
    assert len(marked_processes(mark)) >= 4
    process.kill()
  assert wait_until(lambda: not marked_processes(mark))


# --- Settings ----------------------------------------------------------------


@pytest.fixture
def forget():
  sandbox._isolation.cache_clear()
  yield
  sandbox._isolation.cache_clear()


@pytest.mark.parametrize('isolation', ['auto', 'bubblewrap', 'unshare'])
def test_without_isolation_it_refuses(isolation, monkeypatch, tmp_path, forget):
  """Nothing runs, not even the first of many."""
  ran = tmp_path / 'ran'
  for tool in ('bwrap', 'unshare'):
    (tmp_path / tool).write_text(
      f'#!/bin/sh\necho {tool} not permitted; exit 1'
    )
    (tmp_path / tool).chmod(0o755)
  monkeypatch.setattr(namespaces, 'PATH', f'{tmp_path}:{namespaces.PATH}')
  settings = sandbox.Sandbox(isolation=isolation)
  for call in (sandbox.run, lambda p, s: sandbox.run_all([p], s)):
    with pytest.raises(ValueError, match='not permitted') as error:
      call(f'open({str(ran)!r}, "w")', settings)
    assert "isolation='none'" in str(error.value)
    assert 'Install bubblewrap' in str(error.value)
  assert not ran.exists()


def test_a_missing_tool_is_named(monkeypatch, tmp_path, forget):
  monkeypatch.setattr(namespaces, 'PATH', str(tmp_path))
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ValueError, match='there is no bwrap on this machine'):
    sandbox.run('pass', sandbox.Sandbox(isolation='bubblewrap'))


def test_auto_is_an_isolation():
  assert sandbox._isolation('auto') in BACKENDS


def test_no_isolation_when_asked_for_by_name(tmp_path):
  def settings(seconds):
    return sandbox.Sandbox(isolation='none', seconds=seconds, memory=2**28)

  file = tmp_path / 'file'
  create = f'open({str(file)!r}, "w").close()'
  assert sandbox.run(create, settings(ENOUGH)).passed
  assert file.exists()
  for name in (*ENDLESS, 'memory_bomb', 'exit_before_the_tests'):
    limit = settings(SECONDS if name in ENDLESS else ENOUGH)
    result = sandbox.run(hostile.TWELVE[name], limit)
    assert REASONS[name] in result.reason


def test_what_settings_refuse():
  with pytest.raises(ValueError, match="isolation is 'docker'; it can be"):
    sandbox.Sandbox(isolation='docker')
  with pytest.raises(
    ValueError, match='memory is 1000000000.0; it must be a w'
  ):
    sandbox.Sandbox(memory=1e9)
  with pytest.raises(ValueError, match='seconds is 0; it must be positive'):
    sandbox.Sandbox(seconds=0)
