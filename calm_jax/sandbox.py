"""Runs programs that nobody has read: the answers of code models.

Each program gets namespaces of its own (mounts, processes, network, IPC, host
name; for an ordinary user also a user namespace, for root a user id that
nobody has). It sees the Python of this process with its standard library,
read-only, an empty /tmp in memory, and nothing else: no other file, no /proc,
no network, no environment, no capability. Processes, memory, file size and CPU
time are limited, output is drained and capped, and when the time is over all
that runs in the namespace is killed with its first process.

How a program is found to have passed
-------------------------------------
Neither its exit code nor anything it prints counts. The program, its tests at
the end, comes through a socket together with the first half of a random proof;
the second half waits in the socket, unread. When the last statement has
returned and its threads have ended, the code around the program reads the
second half and sends both back. There is no file, argument or environment
variable that holds the proof, and before the end no memory holds all of it.

The limit: program and tests share one interpreter, as these benchmarks demand.
A program written against this very file could find the first half in a frame,
read the second from the socket, and answer; one written against its tests can
answer with an object that equals everything. Both still cannot leave the
sandbox. Other limits: memory is limited for each process, not for all of them
together, and the kernel is the one of the machine.
"""

from collections.abc import Iterable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Literal

Isolation = Literal['auto', 'bubblewrap', 'unshare', 'none']

_MIB = 2**20
_START_SECONDS = 60  # For the namespaces, on a busy machine.
_MAX_OUTPUT = 16 * _MIB
_TAIL = 2000  # Bytes of output that are kept.
_HALF = 16  # Bytes of each half of the proof.
# What Python needs besides its own directory; shown where it exists.
_SYSTEM = ('/usr', '/bin', '/lib', '/lib64', '/etc/ld.so.cache', '/nix/store')
_DEVICES = ('/dev/null', '/dev/urandom')
_PATH = '/usr/bin:/bin:/usr/sbin:/sbin'
# Ids for passing users, as systemd's DynamicUser= has them.
_PASSING_USERS = range(61184, 65520)

# Runs inside, as `python -c`. Its arguments are limits, its input the socket.
_HARNESS = """
def run():
  import os, resource, sys

  kinds = 'AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE', 'CORE'
  for kind, value in zip(kinds, map(int, sys.argv[1:])):
    kind = getattr(resource, 'RLIMIT_' + kind)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
  sys.argv[:] = ['program']
  os.environ.clear()
  os.chdir('/tmp')
  channel = os.dup(0)
  os.dup2(os.open('/dev/null', os.O_RDONLY), 0)

  def receive(count):
    data = b''
    while len(data) < count:
      part = os.read(channel, count - len(data))
      if not part:
        break
      data += part
    return data

  half = receive(16)
  program = receive(int.from_bytes(receive(8), 'big')).decode()
  os.write(channel, b'+')
  exec(compile(program, '<program>', 'exec'), {})
  threading = sys.modules.get('threading')
  for thread in threading.enumerate() if threading else ():
    if thread is not threading.main_thread() and not thread.daemon:
      thread.join()
  other_half = receive(16)
  if len(other_half) == 16:
    os.write(channel, half + other_half)
  os._exit(0)

run()
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandbox:
  """Settings of the sandbox.

  Attributes:
    seconds: wall-clock time of one program, once it has started.
    memory: bytes of address space of each of its processes.
    processes: processes and threads it may have at once.
    file_size: bytes of one file, and of all files together.
    isolation: 'auto' is bubblewrap for an ordinary user who has it, else
      unshare. 'none' keeps limits, time and kill, and leaves files, network and
      your other processes open to the programs: a risk that has to be
      typed out.
  """

  seconds: float = 3.0
  memory: int = 512 * _MIB
  processes: int = 8
  file_size: int = 32 * _MIB
  isolation: Isolation = 'auto'

  def __post_init__(self):
    known = ('auto', 'bubblewrap', 'unshare', 'none')
    if self.isolation not in known:
      raise ValueError(
        f'Sandbox.isolation is {self.isolation!r}; it can be {known}.'
      )
    for name in ('seconds', 'memory', 'processes', 'file_size'):
      if getattr(self, name) <= 0:
        raise ValueError(
          f'Sandbox.{name} is {getattr(self, name)}; it must be positive.'
        )


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a program.

  Attributes:
    passed: whether its last statement returned, in time.
    reason: why not, in a line; 'passed' if it did.
    output: the end of what it wrote to stdout and stderr.
  """

  passed: bool
  reason: str
  output: str


def run(program: str, settings: Sandbox | None = None) -> Result:
  """Runs one Python program, tests at its end, in a sandbox.

  Args:
    program: Python source; only the standard library can be imported.
    settings: limits and isolation.

  Raises:
    ValueError: if this machine cannot isolate programs as `settings` say.
    RuntimeError: if the sandbox broke before the program began.
  """
  settings = settings or Sandbox()
  return _run(program, settings, _isolation(settings.isolation))


def run_all(
  programs: Iterable[str],
  settings: Sandbox | None = None,
  *,
  workers: int | None = None,
) -> list[Result]:
  """Runs programs, several at a time.

  Args:
    programs: Python sources.
    settings: limits and isolation.
    workers: how many at a time; as many as CPUs if None.

  Returns:
    A result for each program, in their order.

  Raises:
    ValueError: as `run` does, before any program has run.
  """
  settings = settings or Sandbox()
  isolation = _isolation(settings.isolation)
  with futures.ThreadPoolExecutor(
    workers or len(os.sched_getaffinity(0))
  ) as pool:
    return list(pool.map(lambda p: _run(p, settings, isolation), programs))


# --- One program -------------------------------------------------------------


def _run(program: str, settings: Sandbox, isolation: str) -> Result:
  halves = [secrets.token_bytes(_HALF) for _ in range(2)]
  source = program.encode(errors='replace')
  ours, theirs = socket.socketpair()
  with (
    ours,
    theirs,
    subprocess.Popen(
      _command(settings, isolation),
      stdin=theirs,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      bufsize=0,
      env={'PATH': _PATH},  # For the tools; the harness clears it.
      start_new_session=True,
    ) as process,
  ):
    try:
      theirs.close()  # Else the socket never ends.
      ours.settimeout(_START_SECONDS)
      with contextlib.suppress(OSError):  # Its output says why it is gone.
        size = len(source).to_bytes(8, 'big')
        ours.sendall(halves[0] + size + source + halves[1])
      return _watch(process, ours, b'+' + b''.join(halves), settings)
    finally:
      # Not reaped yet, so the number is still its own. With its first process
      # a PID namespace loses all the others.
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _watch(
  process: subprocess.Popen,
  channel: socket.socket,
  proof: bytes,
  settings: Sandbox,
) -> Result:
  """Drains output and answers until the program ends or its time does."""
  answer, output, written = b'', b'', 0
  deadline = time.monotonic() + _START_SECONDS
  reason = ''
  with selectors.DefaultSelector() as selector:
    selector.register(channel, selectors.EVENT_READ)
    selector.register(process.stdout, selectors.EVENT_READ)
    while selector.get_map() and not reason:
      left = deadline - time.monotonic()
      ready = selector.select(left) if left > 0 else []
      if not ready:
        reason = f'ran longer than {settings.seconds:g} s'
      for key, _ in ready:
        data = _read(key.fd)
        if not data:
          selector.unregister(key.fileobj)
        elif key.fileobj is process.stdout:
          written += len(data)
          output = (output + data)[-_TAIL:]
        else:
          if not answer:
            deadline = time.monotonic() + settings.seconds
          answer = (answer + data)[: len(proof) + 1]
      if answer == proof:
        reason = 'passed'
      elif written > _MAX_OUTPUT:
        reason = f'wrote more than {_MAX_OUTPUT} bytes'
  text = output.decode(errors='replace')
  if not answer:
    raise RuntimeError(
      'The sandbox broke before the program began:'
      f' {text.strip() or "it ended without a word"}. Check memory and'
      ' processes of the machine.'
    )
  if not reason:
    last = text.strip().rpartition('\n')[2]
    reason = f'ended before its last line: {last or "without output"}'
  return Result(reason == 'passed', reason, text)


def _read(descriptor: int) -> bytes:
  try:
    return os.read(descriptor, 65536)
  except ConnectionResetError:  # It left something in the socket unread.
    return b''


# --- The namespaces ----------------------------------------------------------


@functools.cache
def _isolation(asked: str) -> str:
  """Returns a kind of isolation that has just been seen to work here."""
  candidates = [asked]
  if asked == 'auto':
    # Root needs no help to make namespaces, and unshare is always there.
    candidates = ['unshare'] if os.geteuid() == 0 else ['bubblewrap', 'unshare']
  problems = []
  for candidate in candidates:
    try:
      result = _run('pass', Sandbox(seconds=_START_SECONDS), candidate)
    except (OSError, RuntimeError) as error:
      problems.append(f'{candidate}: {error}')
    else:
      if result.passed:
        return candidate
      problems.append(f'{candidate}: {result.reason}')
  raise ValueError(
    'Programs written by a model cannot be isolated on this machine with'
    f' Sandbox.isolation={asked!r} ({"; ".join(problems)}). Install bubblewrap'
    ' (its command is bwrap), or util-linux, and allow user namespaces'
    ' (user.max_user_namespaces, in a container its security profile). On a'
    " machine that nothing depends on, Sandbox.isolation='none' runs them with"
    ' your rights.'
  )


def _command(settings: Sandbox, isolation: str) -> Sequence[str]:
  """Returns the command that starts the harness in its isolation."""
  limits = (
    settings.memory,
    int(settings.seconds) + 2,
    settings.file_size,
    settings.processes,
    64,  # Open files.
    0,  # Core dumps.
  )
  python = os.path.realpath(sys.executable)
  options = ('-I', '-S', '-B', '-X', 'utf8', '-c', _HARNESS)
  harness = (python, *options, *map(str, limits))
  if isolation == 'none':
    return harness
  # Inside a chroot no user namespace can be made, so lost capabilities cannot
  # be had again; and nothing of the machine lies outside of it.
  drop = ['--no-new-privs']
  drop += [f'--{kind}=-all' for kind in ('bounding-set', 'inh-caps')]
  drop += ['--ambient-caps=-all']
  if os.geteuid() == 0:
    user = secrets.choice(_PASSING_USERS)
    drop += [f'--reuid={user}', f'--regid={user}', '--clear-groups']
  # The shell goes on as the first process of the namespace. It keeps its
  # capabilities: what has none may neither trace nor kill it.
  inner = shlex.join(['chroot', '/jail', 'setpriv', *drop, *harness])
  inner += '\nexit $?'
  make = _bubblewrap if isolation == 'bubblewrap' else _unshare
  return make(inner, size=settings.file_size)


def _tool(name: str) -> str:
  path = shutil.which(name, path=_PATH)
  path = path or shutil.which(name)
  if path is None:
    raise FileNotFoundError(f'there is no {name} on this machine')
  return path


@functools.cache
def _shown() -> dict[str, str | None]:
  """Maps what programs may see to where it points, if it is a link."""
  paths = [*_SYSTEM, sys.base_prefix, sys.base_exec_prefix]
  paths.append(os.path.realpath(sys.executable))
  shown: dict[str, str | None] = {}
  for path in map(os.path.abspath, paths):
    inside = any(path.startswith(f'{other}/') for other in shown)
    if os.path.exists(path) and not inside:
      shown[path] = os.readlink(path) if os.path.islink(path) else None
  return shown


def _bubblewrap(inner: str, *, size: int) -> Sequence[str]:
  command = [_tool('bwrap'), '--die-with-parent', '--as-pid-1']
  command += ['--cap-add', 'ALL']
  command += [f'--unshare-{what}' for what in ('pid', 'net', 'ipc', 'uts')]
  for path, link in _shown().items():
    for folder in reversed(pathlib.Path(f'/jail{path}').parents):
      command += ['--dir', str(folder)]  # Readable by all, unlike by default.
    if link:
      command += ['--symlink', link, f'/jail{path}']
    else:
      command += ['--ro-bind', path, f'/jail{path}']
  for top in _tops():
    command += ['--symlink', f'jail/{top}', f'/{top}']
  command += ['--dir', '/jail/dev']
  for device in _DEVICES:
    command += ['--dev-bind', device, f'/jail{device}']
  command += ['--perms', '1777', '--size', str(size), '--tmpfs', '/jail/tmp']
  return [*command, '--remount-ro', '/', '--', 'sh', '-euc', inner]


def _unshare(inner: str, *, size: int) -> Sequence[str]:
  # setpriv: should this very process be killed, they go with it.
  command = [_tool('setpriv'), '--pdeathsig=KILL', _tool('unshare')]
  command += ['--mount', '--pid', '--net', '--ipc', '--uts', '--fork']
  command += ['--kill-child']
  if os.geteuid() != 0:
    command += ['--user', '--map-root-user']
  return [*command, _tool('sh'), '-euc', f'{_script(size)}\n{inner}']


def _script(size: int) -> str:
  """Returns shell commands that build and enter the file system.

  It is built over /sys: a directory of every machine, of which nothing is
  shown.
  """
  root, jail = '/sys', '/sys/jail'
  folders = [f'{root}/old', f'{jail}/dev', f'{jail}/tmp']
  files, commands = [f'{jail}{device}' for device in _DEVICES], []
  quiet = 'nosuid,nodev'
  for path, link in _shown().items():
    at = shlex.quote(jail + path)
    if link:
      commands.append(f'ln -s {shlex.quote(link)} {at}')
      continue
    if os.path.isdir(path):
      folders.append(jail + path)
    else:
      folders.append(os.path.dirname(jail + path))
      files.append(jail + path)
    commands.append(f'mount -o rbind,ro,{quiet} {shlex.quote(path)} {at}')
  for mount in _mounts_below(path for path, link in _shown().items()):
    at = shlex.quote(jail + mount)
    commands.append(f'mount -o remount,bind,ro,{quiet} {at}')
  return '\n'.join(
    [
      f'mount -t tmpfs -o mode=755,{quiet},size=1m none {root}',
      f'mkdir -p {shlex.join(folders)}',
      f'touch {shlex.join(files)}',
      *commands,
      *(f'ln -s jail/{top} {root}/{top}' for top in _tops()),
      *(f'mount --bind {name} {jail}{name}' for name in _DEVICES),
      f'mount -t tmpfs -o mode=1777,{quiet},size={size} none {jail}/tmp',
      f'mount -o remount,bind,ro {root}',
      f'cd {root}',
      'pivot_root . old',
      'cd /',
      'chroot /old umount -l /',
    ]
  )


def _tops() -> list[str]:
  """Lists what the tools need outside the chroot, and find in it by links."""
  return sorted({path.split('/')[1] for path in _shown()})


def _mounts_below(paths: Iterable[str]) -> list[str]:
  """Lists the mounts inside directories: ro does not reach them by itself."""
  folders = tuple(f'{path}/' for path in paths)
  lines = pathlib.Path('/proc/self/mountinfo').read_bytes().splitlines()
  escaped = (line.split(b' ')[4] for line in lines)
  mounts = {
    os.fsdecode(one.decode('unicode_escape').encode('latin1'))
    for one in escaped
  }
  return sorted(one for one in mounts if one.startswith(folders))
