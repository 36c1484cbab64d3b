"""The command that gives a program namespaces and a file system of its own.

Made of bubblewrap, or of unshare, mount, pivot_root, chroot and setpriv, which
every Linux has (util-linux, coreutils). The program is left with:

  /        a tmpfs, read-only; no /proc, no /sys, no /home
  /usr ... what Python needs, read-only
  /dev     null and urandom
  /tmp     a tmpfs

and with no network, no other process, no capability and no way to any. For root
a user id that nobody has takes the place of the user namespace: the kernel
limits no processes of root, by whatever name a namespace calls it.
"""

from collections.abc import Iterable, Sequence
import functools
import os
import pathlib
import secrets
import shlex
import shutil
import sys
from typing import Literal

# Where the tools are.
PATH = '/usr/bin:/bin:/usr/sbin:/sbin'
# What Python needs besides its own directory; shown where it exists.
_SYSTEM = ('/usr', '/bin', '/lib', '/lib64', '/etc/ld.so.cache', '/nix/store')
_DEVICES = ('/dev/null', '/dev/urandom')
# Ids for passing users, as systemd's DynamicUser= has them.
_PASSING_USERS = range(61184, 65520)


def command(
  program: Sequence[str], *, tool: Literal['bubblewrap', 'unshare'], size: int
) -> Sequence[str]:
  """Returns the command that runs another one in namespaces.

  Args:
    program: the other one; of this Python, by its real path.
    tool: what makes the namespaces.
    size: bytes of /tmp.

  Raises:
    FileNotFoundError: if a tool is missing.
  """
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
  inner = shlex.join(['chroot', '/jail', 'setpriv', *drop, *program])
  inner += '\nexit $?'
  make = _bubblewrap if tool == 'bubblewrap' else _unshare
  return make(inner, size=size)


def _tool(name: str) -> str:
  path = shutil.which(name, path=PATH)
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
