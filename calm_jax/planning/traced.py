"""What a traced step would need on one device, by counting: no compiler.

An estimate for chips that cannot be compiled for here. What elementwise
operations make is taken to be fused into what reads it, and not to be stored;
all else lives from where it is made to where it is last read.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
import numpy as np

from calm_jax import trees

# These only rename memory.
_ALIASES = set(
  'reshape squeeze expand_dims transpose optimization_barrier'.split()
)
_ALIASES |= {
  'sharding_constraint',
  'stop_gradient',
  'copy_p',
  'bitcast_convert_type',
}
# These are computed where they are read.
_FUSED = set(
  'abs add add_any and broadcast_in_dim clamp convert_element_type copy cos div'
  ' eq erf erf_inv exp exp2 ge gt integer_pow iota is_finite le log log1p'
  ' logistic lt max min mul ne neg not or pad pow reduce_precision rem rev'
  ' round rsqrt select_n shift_left shift_right_logical sign sin slice sqrt'
  ' square sub tan tanh xor dynamic_slice concatenate'.split()
)
# These read what is fused as they go, and store their result.
_REDUCTIONS = set(
  'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax'
  ' argmin'.split()
)
# These write into their first operand.
_IN_PLACE = set('dynamic_update_slice scatter scatter-add scatter_add'.split())
_INLINED = {'jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'checkpoint'}
_INLINED |= {'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'}

Size = Callable[[Any], int]


@dataclasses.dataclass
class Usage:
  """What one execution of a program needs.

  Attributes:
    peak: the most bytes that are alive at once, arguments left out.
    moved: bytes read and written.
    flops: of matrix products.
  """

  peak: float = 0.0
  moved: float = 0.0
  flops: float = 0.0


@dataclasses.dataclass
class _Equation:
  primitive: str
  params: dict[str, Any]
  inputs: list[Any]
  outputs: list[Any]


def usage(jaxpr: core.Jaxpr, size: Size, *, keep: bool = False) -> Usage:
  """Counts a program.

  Args:
    jaxpr: the program.
    size: bytes of an abstract value.
    keep: whether its results take memory of their own; else they are written
      over its arguments.
  """
  equations: list[_Equation] = []
  results = _inline(jaxpr, equations, {})
  stored = _stored(equations, results)
  roots: dict[Any, frozenset] = {}
  reads: list[frozenset] = []
  for one in equations:
    read = frozenset().union(*(roots.get(x, {x}) for x in one.inputs))
    for out in one.outputs:
      if out not in stored:
        roots[out] = read
    reads.append(
      read if any(out in stored for out in one.outputs) else frozenset()
    )
  last = {x: i for i, read in enumerate(reads) for x in read}
  for x in results:
    last |= dict.fromkeys(roots.get(x, {x}), len(equations))
  made = {out for one in equations for out in one.outputs if out in stored}
  free = set() if keep else {x for x in results if x in stored}
  bytes_of = lambda x: 0 if x in free else size(x.aval)
  found, alive = Usage(), 0.0
  for i, (one, read) in enumerate(zip(equations, reads, strict=True)):
    outputs = [out for out in one.outputs if out in stored]
    dying = sum(bytes_of(x) for x in read & made if last[x] == i)
    new = sum(bytes_of(out) for out in outputs)
    in_place = one.primitive in _FUSED or one.primitive in _IN_PLACE
    inner = _inner(one, size)
    peak = alive + max(0.0, new - dying) if in_place else alive + new
    found.peak = max(found.peak, peak + inner.peak)
    alive += new - dying
    alive -= sum(bytes_of(out) for out in outputs if out not in last)
    found.flops += inner.flops
    found.moved += inner.moved
    if outputs and one.primitive not in ('scan', 'while', 'cond'):
      found.moved += new + sum(size(x.aval) for x in read)
  return found


def _inline(
  jaxpr: core.Jaxpr, equations: list[_Equation], names: dict[Any, Any]
) -> list[Any]:
  """Appends the equations of a program and of those it calls."""

  def find(x):
    return None if isinstance(x, core.Literal) else names.get(x, x)

  for equation in jaxpr.eqns:
    inputs = [find(x) for x in equation.invars]
    called = _called(equation) if equation.primitive.name in _INLINED else None
    if called is None:
      fresh = [_Value(x.aval) for x in equation.outvars]
      names.update(zip(equation.outvars, fresh, strict=True))
      equations.append(
        _Equation(
          equation.primitive.name,
          equation.params,
          [x for x in inputs if x is not None],
          fresh,
        )
      )
      continue
    bound = {
      inner: _Value(inner.aval) if outer is None else outer
      for inner, outer in zip(called.invars, inputs, strict=True)
    }
    results = _inline(called, equations, bound)
    names.update(zip(equation.outvars, results, strict=True))
  return [
    _Value(x.aval) if isinstance(x, core.Literal) else names.get(x, x)
    for x in jaxpr.outvars
  ]


class _Value:
  """One result; a program that is called twice has two of each."""

  def __init__(self, aval):
    self.aval = aval


def _called(equation: Any) -> core.Jaxpr | None:
  for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    if name in equation.params:
      found = equation.params[name]
      return getattr(found, 'jaxpr', found)
  return None


def _stored(equations: Sequence[_Equation], results: Sequence[Any]) -> set[Any]:
  """Returns the values that get memory of their own."""
  needed = set(results)
  stored = set()
  for one in reversed(equations):
    wanted = [out for out in one.outputs if out in needed]
    if one.primitive in _ALIASES:
      needed |= set(one.inputs) if wanted else set()
    elif one.primitive in _FUSED:
      stored |= set(wanted)
    else:
      stored |= set(one.outputs)
      if one.primitive not in _REDUCTIONS:
        needed |= set(one.inputs)
  return stored


def _inner(one: _Equation, size: Size) -> Usage:
  """Counts what one equation does inside."""
  if one.primitive == 'dot_general':
    (contracted, _), _ = one.params['dimension_numbers']
    shape = one.inputs[0].aval.shape if one.inputs else ()
    terms = math.prod(shape[axis] for axis in contracted)
    return Usage(flops=2.0 * terms * math.prod(one.outputs[0].aval.shape))
  if one.primitive == 'scan':
    body = one.params['jaxpr'].jaxpr
    found = usage(body, size, keep=True)
    first = one.params['num_consts'] + one.params['num_carry']
    slices = sum(size(x.aval) for x in body.invars[first:])
    times = one.params['length']
    moved = (found.moved + slices) * times
    return Usage(found.peak + slices, moved, found.flops * times)
  if one.primitive == 'while':
    return usage(one.params['body_jaxpr'].jaxpr, size, keep=True)
  if one.primitive == 'cond':
    each = [usage(b.jaxpr, size, keep=True) for b in one.params['branches']]
    return Usage(
      *(
        max(getattr(u, f.name) for u in each) for f in dataclasses.fields(Usage)
      )
    )
  return Usage()


def nbytes(aval: Any) -> int:
  """Returns the bytes of an abstract value; keys and tokens have none."""
  if not hasattr(aval, 'shape') or jax.dtypes.issubdtype(
    aval.dtype, jax.dtypes.extended
  ):
    return 0
  return trees.stored_bytes(aval.shape, np.dtype(aval.dtype))
