"""Runs programs that nobody has read: the answers of code models.

Each program gets namespaces of its own (mounts, processes, network, IPC, host
name; for an ordinary user also a user namespace, for root a user id that
nobody has). It sees the Python of this process and the programs of the machine
(/usr), read-only, an empty /tmp in memory, and nothing else: no other file, no
/proc, no network, no environment, no capability. Processes, memory, file size
and CPU time are limited, output is drained and capped, and when the time is
over all that runs in the namespace is killed with its first process.

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
together (`Sandbox.memory` times `Sandbox.processes` is what a program can
take); the kernel is the one of the machine, no system call is filtered, and the
session's keyring is inherited.
"""

from collections.abc import Iterable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Literal

from calm_jax import namespaces

Isolation = Literal['auto', 'bubblewrap', 'unshare', 'none']

_MIB = 2**20
_START_SECONDS = 60  # For the namespaces, on a busy machine.
_MAX_OUTPUT = 16 * _MIB
_TAIL = 2000  # Bytes of output that are kept.
_HALF = 16  # Bytes of each half of the proof.

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
    for name in ('memory', 'processes', 'file_size'):
      if not isinstance(getattr(self, name), int):
        raise ValueError(
          f'Sandbox.{name} is {getattr(self, name)!r}; it must be a whole'
          ' number.'
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
      env={'PATH': namespaces.PATH},  # For the tools; the harness clears it.
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


# --- Isolation ----------------------------------------------------------------


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
    ' (sysctl user.max_user_namespaces above 0; on Ubuntu also'
    ' kernel.apparmor_restrict_unprivileged_userns=0; in a container its'
    ' security profile). On a machine that nothing depends on,'
    " Sandbox.isolation='none' runs them with your rights."
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
  return namespaces.command(harness, tool=isolation, size=settings.file_size)
