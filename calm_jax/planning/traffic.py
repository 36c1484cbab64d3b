"""What a compiled step moves, over its chips' links and in their memory."""

import collections
from collections.abc import Mapping
import dataclasses
import math
import re

from calm_jax import hlo

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# What moves no bytes itself.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'custom-call',
}


@dataclasses.dataclass(frozen=True)
class Moved:
  """The collectives of one kind in one step.

  Attributes:
    count: how many each device takes part in.
    nbytes: that one device sends in all of them.
  """

  count: float
  nbytes: float


def collectives(program: hlo.Program, *, num_devices: int) -> dict[str, Moved]:
  """Returns the collectives of a step by kind, loops multiplied.

  Bytes are those of a ring: of n devices each sends its part n - 1 times to
  gather, (n - 1) / n of its input to scatter, and both to reduce.

  Args:
    program: compiled for one of `num_devices` devices.
    num_devices: in a group, where the program does not say.

  Raises:
    ValueError: for one in a loop whose trip count is not known.
  """
  found: dict[str, tuple[str, float, float]] = {}
  for computation, times, _ in program.executions():
    for one in computation.values():
      kind = one.op.removesuffix('-start')
      if kind not in KINDS:
        continue
      if math.isnan(times):
        raise ValueError(f'{one.name} is in a loop without a known trip count.')
      size = _group_size(one.rest, num_devices)
      if size == 1:
        continue
      nbytes = sum(
        array.nbytes
        for name in one.operands
        for array in computation[name].arrays
      )
      sent = nbytes * _times_sent(kind, size)
      # The TPU's backend spreads one over several fusions, under one number.
      key = one.attribute('channel_id') or f'{one.name} {len(found)}'
      if key not in found or found[key][1:] < (times, sent):
        found[key] = kind, times, sent
  totals = collections.defaultdict(lambda: (0.0, 0.0))
  for kind, times, sent in found.values():
    count, nbytes = totals[kind]
    totals[kind] = count + times, nbytes + times * sent
  return {kind: Moved(*totals[kind]) for kind in KINDS if kind in totals}


def _times_sent(kind: str, size: int) -> float:
  ring = (size - 1) / size
  return {
    'all-gather': size - 1,
    'all-reduce': 2 * ring,
    'collective-permute': 1.0,
  }.get(kind, ring)


def _group_size(rest: str, num_devices: int) -> int:
  """Returns how many devices take part, of the three ways to write it."""
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return len(listed[1].split(','))
  if tiled := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(tiled[1])
  if named := re.search(r'replica_groups=mesh\[(.*?)\] ?\{(.*?)\}', rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
    used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[axis]) for axis, part in used)
  return num_devices


def hbm_bytes(program: hlo.Program) -> float:
  """Adds up what the instructions of a step read from memory and write to it.

  What stays within a fusion, or in a TPU's vector memory, moves nothing. Of an
  array that is sliced, the slice counts.
  """
  total = 0.0
  for computation, times, fused in program.executions():
    if fused or math.isnan(times):
      continue
    for one in computation.values():
      total += times * _moved(one, computation, program)
  return total


def _moved(
  one: hlo.Instruction, computation: hlo.Computation, program: hlo.Program
) -> float:
  if one.op in _FREE or one.op.endswith('-done'):
    return 0.0
  operands = [computation.get(name) for name in one.operands]
  if one.op in ('dynamic-slice', 'slice', 'gather'):
    return 2 * _nbytes(one)
  if one.op == 'dynamic-update-slice':
    return 2 * _nbytes(operands[1])
  if one.op == 'fusion':
    inner = program.computations[one.called[0]]
    read = sum(_read(inner, i, program) for i in range(len(operands)))
    return read + _written(inner, program)
  read = sum(_nbytes(operand) for operand in operands)
  if one.op.endswith('-start'):  # its result names the operands again
    return read + max(0.0, _nbytes(one) - read)
  return read + _nbytes(one)


def _read(
  computation: hlo.Computation, index: int, program: hlo.Program
) -> float:
  """Returns the bytes that a fusion reads of one of its operands."""
  parameter = next(
    one
    for one in computation.values()
    if one.op == 'parameter' and one.operands == (str(index),)
  )
  return min(_nbytes(parameter), _uses(computation, parameter.name, program))


def _uses(
  computation: Mapping[str, hlo.Instruction], name: str, program: hlo.Program
) -> float:
  total = 0.0
  for user in computation.values():
    if name not in user.operands:
      continue
    place = user.operands.index(name)
    if user.op in ('dynamic-slice', 'slice', 'gather') and place == 0:
      total += _nbytes(user)
    elif user.op == 'dynamic-update-slice' and place == 0:
      total += 0.0  # written in place
    elif user.op == 'bitcast':
      total += _uses(computation, user.name, program)
    elif user.op == 'fusion':
      total += _read(program.computations[user.called[0]], place, program)
    else:
      return math.inf
  return total


def _written(computation: hlo.Computation, program: hlo.Program) -> float:
  """Returns the bytes that a fusion writes."""
  root = next(one for one in computation.values() if one.is_root)
  roots = [root]
  if root.op == 'tuple':
    roots = [computation[name] for name in root.operands]
  total = 0.0
  for one in roots:
    while one.op == 'bitcast':
      one = computation[one.operands[0]]
    if one.op == 'dynamic-update-slice':
      total += _nbytes(computation[one.operands[1]])
    elif one.op == 'fusion':
      total += _written(program.computations[one.called[0]], program)
    else:
      total += _nbytes(one)
  return total


def _nbytes(one: hlo.Instruction | None) -> float:
  if one is None:
    return 0.0
  return sum(array.nbytes for array in one.arrays if not array.off_hbm)
