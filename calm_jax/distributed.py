"""Several processes of one run find each other, and compare themselves.

`launch/run.sh` sets these variables; a program started without them is alone:

  CALM_JAX_COORDINATOR    host:port of process 0, or 'auto' where JAX knows the
                          cluster by itself (TPU slices, Slurm)
  CALM_JAX_NUM_PROCESSES  with host:port
  CALM_JAX_PROCESS_ID     with host:port; 0, 1, ...
  CALM_JAX_NUM_DEVICES    optional: how many devices all have together
  CALM_JAX_DIRECTORY      optional: a directory that all must share and write
  CALM_JAX_HEARTBEAT_SECONDS  optional: after so long without a sign of life of
                          one process, all end (100)
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
from importlib import metadata
import json
import os
import pathlib
import platform
import socket
import sys
from typing import Any
import uuid

import jax

COORDINATOR = 'CALM_JAX_COORDINATOR'
NUM_PROCESSES = 'CALM_JAX_NUM_PROCESSES'
PROCESS_ID = 'CALM_JAX_PROCESS_ID'
NUM_DEVICES = 'CALM_JAX_NUM_DEVICES'
DIRECTORY = 'CALM_JAX_DIRECTORY'
HEARTBEAT_SECONDS = 'CALM_JAX_HEARTBEAT_SECONDS'

_COMPARED = ('jax', 'jaxlib', 'flax', 'numpy', 'optax', 'orbax-checkpoint')
_PATIENCE_MS = 120_000


def initialize(environ: Mapping[str, str], *, several: bool = True) -> None:
  """Joins the other processes if told to; call it before devices are used.

  Args:
    environ: has the variables above.
    several: whether the program can work in more than one process.

  Raises:
    ValueError: if the variables do not fit together, or, on every process, if
      the hosts differ in versions or devices, or do not share the directory.
  """
  settings = _settings(environ)
  if settings is None:
    return
  jax.distributed.initialize(**settings)
  if jax.process_count() > 1 and not several:
    raise ValueError(
      f'Only training works in several processes, and there are'
      f' {jax.process_count()}. Start this on one host, by launch/run.sh local.'
    )
  directory = environ.get(DIRECTORY)
  mark = pathlib.Path(directory or '.').expanduser() / (
    f'.preflight_{jax.process_index()}_{uuid.uuid4().hex}'
  )
  mine = {**_facts(), 'mark': mark.name if directory else None}
  if directory:
    mine['unwritable'] = _write(mark)
  try:
    hosts = _exchange(mine, 'facts')
    if directory:
      marks = [mark.with_name(host['mark']) for host in hosts]
      mine['unseen'] = [one.name for one in marks if not os.path.exists(one)]
      hosts = _exchange(mine, 'unseen')
  finally:
    if directory and not mine['unwritable']:
      mark.unlink(missing_ok=True)
  wanted = environ.get(NUM_DEVICES)
  check_hosts(
    hosts, num_devices=int(wanted) if wanted else None, directory=directory
  )


def _settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns the arguments of `jax.distributed.initialize`; None if alone."""
  coordinator = environ.get(COORDINATOR)
  numbers = {name: environ.get(name) for name in (NUM_PROCESSES, PROCESS_ID)}
  if not coordinator:
    given = [name for name, value in numbers.items() if value]
    if given:
      raise ValueError(
        f'{given[0]} is set and {COORDINATOR} is not. Set it to host:port of'
        " process 0, or to 'auto'; or start through launch/run.sh."
      )
    return None
  heartbeat = environ.get(HEARTBEAT_SECONDS, '100')
  if not heartbeat.isdigit() or int(heartbeat) < 1:
    raise ValueError(
      f'{HEARTBEAT_SECONDS} = {heartbeat!r} is no number of seconds; 100 is'
      ' usual.'
    )
  patience = {'heartbeat_timeout_seconds': int(heartbeat)}
  if coordinator == 'auto':
    return patience
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit():
    raise ValueError(
      f"{COORDINATOR} = {coordinator!r} is neither host:port nor 'auto'."
    )
  for name, value in numbers.items():
    if not (value or '').isdigit():
      raise ValueError(
        f'{name} = {value!r} must be a number, as {COORDINATOR} is host:port.'
      )
  count, index = (int(value) for value in numbers.values())
  if index >= count:
    raise ValueError(
      f'{PROCESS_ID} = {index} must be less than {NUM_PROCESSES} = {count}.'
    )
  return {
    'coordinator_address': coordinator,
    'num_processes': count,
    'process_id': index,
    **patience,
  }


def check_hosts(
  hosts: Sequence[Mapping[str, Any]],
  *,
  num_devices: int | None = None,
  directory: str | None = None,
) -> None:
  """Raises ValueError unless the processes can make one run.

  Args:
    hosts: what each process has told of itself, by process.
    num_devices: how many devices all must have together.
    directory: that they must share.
  """
  for key in hosts[0]['versions']:
    found = _by_value(hosts, lambda host, key=key: host['versions'][key])
    if len(found) > 1:
      raise ValueError(
        f'The hosts have different versions of {key}: {_told(found)}. Install'
        ' the same on all, from the same checkout and constraints.txt.'
      )
  found = _by_value(hosts, lambda host: host['devices'])
  if len(found) > 1:
    raise ValueError(
      f'The processes have different devices: {_told(found)}. Look at the'
      ' odd ones: a chip that another program holds, or a missing driver.'
    )
  total = sum(host['count'] for host in hosts)
  if num_devices is not None and total != num_devices:
    raise ValueError(
      f'{num_devices} devices are expected and {len(hosts)} processes have'
      f' {total}: {_told(found)}. Correct --num_devices, or look for hosts'
      ' that have not joined.'
    )
  if directory is None:
    return
  for host in hosts:
    if host.get('unwritable'):
      raise ValueError(
        f'{host["host"]} cannot write to {directory}: {host["unwritable"]}.'
        ' Give a MODEL_DIR that every host can write.'
      )
  for host in hosts:
    if host.get('unseen'):
      raise ValueError(
        f'{host["host"]} does not see in {directory} what other hosts write'
        ' there: it is not shared. Give a MODEL_DIR on a shared file system.'
      )


def _by_value(
  hosts: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], str]
) -> dict[str, list[str]]:
  """Returns the names of the hosts by what they have."""
  found: dict[str, list[str]] = {}
  for index, host in enumerate(hosts):
    name = f'{host["host"]} (process {index})'
    found.setdefault(str(value(host)), []).append(name)
  return found


def _told(found: Mapping[str, Sequence[str]]) -> str:
  return '; '.join(
    f'{value} on {", ".join(names[:3])}'
    + (f' and {len(names) - 3} more' if len(names) > 3 else '')
    for value, names in found.items()
  )


def _facts() -> dict[str, Any]:
  """Returns what must be equal on all hosts, and how this one is called."""
  local = jax.local_devices()
  return {
    'host': socket.gethostname(),
    'versions': {
      'Python': '.'.join(map(str, sys.version_info[:2])),
      **{name: metadata.version(name) for name in _COMPARED},
      'calm_jax (its source)': _source_digest(),
      'machine': platform.machine(),
    },
    'devices': f'{len(local)} x {local[0].device_kind}',
    'count': len(local),
  }


def _source_digest() -> str:
  root = pathlib.Path(__file__).parent
  sha = hashlib.sha256()
  for file in sorted(root.rglob('*.py')):
    sha.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
  return sha.hexdigest()[:12]


def _write(mark: pathlib.Path) -> str | None:
  """Writes the file; returns why it could not, if so."""
  try:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text('')
  except OSError as error:
    return error.strerror or str(error)
  return None


def _exchange(mine: Mapping[str, Any], subject: str) -> list[dict[str, Any]]:
  """Returns what all processes tell, by process.

  It goes through the coordinator, not through the devices: unequal devices and
  versions are what is looked for.
  """
  # JAX has no public name for it; Orbax takes it from here too.
  from jax._src import distributed as jax_distributed

  client = jax_distributed.global_state.client
  key = f'calm_jax/{subject}'
  client.key_value_set(f'{key}/{jax.process_index()}', json.dumps(mine))
  return [
    json.loads(client.blocking_key_value_get(f'{key}/{i}', _PATIENCE_MS))
    for i in range(jax.process_count())
  ]
