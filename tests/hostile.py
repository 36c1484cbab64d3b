"""Twelve hostile programs, and others that only pretend to have passed.

A program of TWELVE reaches its end only if what it tries succeeds, or it never
ends. Names in capitals and braces are filled in by `fill`.
"""

FORK_BOMB = """
import os, time
for _ in range(40):
  if not os.fork():
    time.sleep(30)
    os._exit(0)
"""

MEMORY_BOMB = """
blocks = []
for _ in range(24):
  blocks.append(bytearray(b'x') * 2**25)
"""

ENDLESS_LOOP = """
while True:
  pass
"""

FILE_WRITE = """
import os, sys
written = 0
for folder in ('{FOLDER}', os.path.dirname(os.__file__), '/', '/usr', '/dev'):
  try:
    with open(os.path.join(folder, '{MARK}'), 'w') as file:
      file.write('escaped')
    written += 1
  except OSError:
    pass
assert written
"""

NETWORK = """
import socket
for family, address in (
  (socket.AF_INET, ('127.0.0.1', {PORT})),
  (socket.AF_UNIX, chr(0) + '{MARK}'),
):
  with socket.socket(family) as client:
    client.settimeout(5)
    try:
      client.connect(address)
      break
    except OSError:
      pass
else:
  raise AssertionError
"""

ENVIRONMENT = """
import os, pathlib
found = repr(dict(os.environ))
for process in 'self', 'thread-self', '1', str(os.getppid()):
  try:
    found += repr(pathlib.Path('/proc', process, 'environ').read_bytes())
  except OSError:
    pass
assert '{MARK}' in found
"""

KILL_THE_PARENT = """
import os, signal, time
parent = os.getppid()
for kind in signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGKILL:
  try:
    os.kill(parent, kind)
  except OSError:
    pass
time.sleep(0.2)
assert os.getppid() != parent
"""

PTRACE = """
import ctypes, os
ATTACH, DETACH = 16, 17
libc = ctypes.CDLL(None)
for process in os.getppid(), 1:
  if not libc.ptrace(ATTACH, process, None, None):
    os.waitpid(process, 0x40000000)  # __WALL
    libc.ptrace(DETACH, process, None, None)
    break
else:
  raise AssertionError
"""

GIGABYTES_ON_STDOUT = """
import os
for _ in range(2**14):
  os.write(1, b'x' * 2**16)
"""

SIGNALS_MASKED = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
  try:
    signal.signal(number, signal.SIG_IGN)
  except OSError:
    pass
time.sleep(30)
"""

THREADS_AFTER_EXIT = """
import threading, time
threading.Thread(target=time.sleep, args=(30,)).start()
"""

EXIT_BEFORE_THE_TESTS = """
import sys
def answer():
  return 1
sys.exit(0)
assert answer() == 2
"""

TWELVE = {
  name.lower(): value
  for name, value in dict(globals()).items()
  if name.isupper()
}

# Each ends with a test that fails.
_PRETENDERS = {
  'os._exit': 'import os; os._exit(0)',
  'SystemExit': 'raise SystemExit(0)',
  'exit in a function': 'import sys; (lambda: sys.exit())()',
  'exit in a thread': """
import os, threading, time
threading.Thread(target=os._exit, args=(0,)).start()
time.sleep(30)""",
  'another program': "import os; os.execv('/bin/true', ['true'])",
  'killed': 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)',
  'words': "import os; os.write(1, b'+passed'); print('OK'); os._exit(0)",
  'at exit': 'import atexit, os; atexit.register(os._exit, 0)',
  'no traceback': """
import os, sys
sys.excepthook = lambda *args: os._exit(0)""",
  'all descriptors closed': 'import os; os.closerange(0, 64); os._exit(0)',
  'a child that ends well': """
import os
if not os.fork():
  os._exit(0)
os.wait()
os._exit(0)""",
  'its own source': """
import sys, os, pathlib
found = b''.join(repr(one).encode() for one in (sys.argv, sys.orig_argv))
for name in ('/proc/self/fd/0', '/proc/self/cmdline', '/proc/1/cmdline',
             '<program>', '<string>', 'program', '/dev/stdin'):
  try:
    found += pathlib.Path(name).read_bytes()
  except OSError:
    pass
for descriptor in range(64):
  try:
    os.write(descriptor, found)
  except OSError:
    pass
os._exit(0)""",
  'what frames hold': """
import os, sys
found, frame = [b''], sys._getframe()
while frame:
  held = [*frame.f_locals.values(), *frame.f_globals.values()]
  found += [one for one in held if isinstance(one, bytes)]
  frame = frame.f_back
for one in [*found, b''.join(found)]:
  for descriptor in range(3, 64):
    try:
      os.write(descriptor, one)
    except OSError:
      pass
os._exit(0)""",
  'what descriptors hold': """
import os
found = b''
for descriptor in range(64):
  try:
    os.set_blocking(descriptor, False)
    found += os.read(descriptor, 4096)
  except OSError:
    pass
for descriptor in range(64):
  try:
    os.write(descriptor, found)
  except OSError:
    pass
os._exit(0)""",
}
PRETENDERS = {
  name: f'{program}\nassert False\n' for name, program in _PRETENDERS.items()
}


def fill(program: str, **values) -> str:
  for name, value in values.items():
    program = program.replace('{' + name + '}', str(value))
  return program
