"""Compiled programs as text: instructions, and how often each is executed.

XLA's own cost analysis counts the body of a loop once, so we read its text
(`compiled.as_text()`) ourselves, from the CPU's backend and from the TPU's.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(
  r'^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = '
  r'(?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$'
)
_CALLED = re.compile(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r'\b(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,]*)\](?P<layout>\S*)')
_BITS = re.compile(r'^[a-z]+?(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's type.

  Attributes:
    dims: its shape.
    bits: of one element.
    off_hbm: whether it lies in a TPU's vector memory, not in its HBM.
  """

  dims: tuple[int, ...]
  bits: int
  off_hbm: bool = False

  @property
  def nbytes(self) -> int:
    """Bytes of all elements, without the padding of tiles."""
    return -(-math.prod(self.dims) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program.

  Attributes:
    name: unique in its computation.
    op: 'dot', 'fusion', 'while' and so on.
    type: of its result, as written.
    rest: operands and attributes, as written.
    is_root: whether it is the result of its computation.
  """

  name: str
  op: str
  type: str
  rest: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    """The arrays of the result; tokens and opaque values are left out."""
    return tuple(
      Array(
        tuple(int(n) for n in found['dims'].split(',') if n),
        _bits(found['dtype']),
        'S(1)' in found['layout'],
      )
      for found in _ARRAY.finditer(self.type)
    )

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the operands, in order."""
    depth, end = 1, 0
    for end, letter in enumerate(self.rest):  # noqa: B007
      depth += (letter in '({') - (letter in ')}')
      if not depth:
        break
    listed = re.sub(r'/\*.*?\*/', '', self.rest[:end])
    words = re.findall(r'(?:^|[ ,])%?([\w.\-]+)(?=,|$)', listed)
    return tuple(words)

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    names = _CALLED.findall(self.rest)
    for branches in _BRANCHES.findall(self.rest):
      names += [name.strip().lstrip('%') for name in branches.split(',')]
    return names

  def attribute(self, name: str) -> str | None:
    """Returns what stands after `name=`, up to the next comma or brace."""
    found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', self.rest)
    return found[1].strip('{}') if found else None


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module.

  Attributes:
    computations: instructions by name, by name of the computation.
    entry: where it begins.
  """

  computations: Mapping[str, Computation]
  entry: str

  def executions(self) -> Iterator[tuple[Computation, float, bool]]:
    """Yields each computation that is reached, and how often it is executed.

    The third says whether it is inside a fusion, whose instructions touch no
    memory. How often is NaN within a loop of which it is not known.
    """
    times: dict[str, float] = {self.entry: 1.0}
    fused: dict[str, bool] = {self.entry: False}
    for name in self._callers_first():
      computation = self.computations[name]
      for one in computation.values():
        count = times[name]
        if one.op == 'while':
          count *= self.trips(one)
        for called in one.called:
          times[called] = times.get(called, 0.0) + count
          inside = fused[name] or one.op not in ('while', 'conditional', 'call')
          fused[called] = fused.get(called, True) and inside
      yield computation, times[name], fused[name]

  def trips(self, loop: Instruction) -> float:
    """Returns how often a loop's body is executed; NaN if it is not known."""
    known = _TRIPS.search(loop.rest)
    if known:
      return float(known[1])
    # The TPU's backend drops that note: read `i < limit` and `i += step`.
    condition = self._of(loop, 'condition')
    last = _root(condition)
    if last.op != 'compare' or last.attribute('direction') != 'LT':
      return math.nan
    counter, limit = (condition.get(name) for name in last.operands)
    if counter is None or counter.op != 'get-tuple-element':
      return math.nan
    body = self._of(loop, 'body')
    place = int(counter.attribute('index'))
    step = body.get(_root(body).operands[place])
    limit = _constant(limit, condition)
    if limit is None or step is None or step.op != 'add':
      return math.nan
    steps = [_constant(body.get(name), body) for name in step.operands]
    steps = [one for one in steps if one]
    # JAX and XLA begin their loops at 0.
    return math.ceil(limit / steps[0]) if len(steps) == 1 else math.nan

  def _of(self, one: Instruction, attribute: str) -> Computation:
    return self.computations[one.attribute(attribute).lstrip('%')]

  def _callers_first(self) -> list[str]:
    done: dict[str, None] = {}

    def visit(name):
      if name not in done:
        for one in self.computations[name].values():
          for called in one.called:
            visit(called)
        done[name] = None

    visit(self.entry)
    return list(reversed(done))


def parse(text: str) -> Program:
  """Reads `jax.jit(f).lower(...).compile().as_text()`.

  Raises:
    ValueError: if it is no compiled module.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header['name'], {})
      if line.startswith('ENTRY'):
        entry = header['name']
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current[found['name']] = Instruction(
        found['name'],
        found['op'],
        found['type'],
        found['rest'],
        bool(found['root']),
      )
  if entry is None:
    raise ValueError('The text is not a compiled HLO module: it has no ENTRY.')
  return Program(computations, entry)


def _root(computation: Computation) -> Instruction:
  return next(one for one in computation.values() if one.is_root)


def _constant(
  one: Instruction | None, computation: Computation
) -> float | None:
  """Returns the integer that an instruction is, through copies; or None."""
  while one is not None and one.op in ('copy', 'bitcast'):
    one = computation.get(one.operands[0])
  if one is None or one.op != 'constant':
    return None
  return float(one.operands[0])


# --- FLOPs -------------------------------------------------------------------


def flops(text: str) -> float:
  """Adds up the FLOPs of a program's matrix products, times loop trip counts.

  Args:
    text: of a compiled program.

  Returns:
    2 x output elements x contracted elements of every dot, and of every
    convolution, as which the TPU's backend writes most of them.

  Raises:
    ValueError: for a loop whose trip count is not known, if it holds a product,
      or a product hidden in a library call.
  """
  total = 0.0
  for computation, times, _ in parse(text).executions():
    for one in computation.values():
      if one.op == 'custom-call' and re.search('gemm|matmul', one.rest):
        raise ValueError(
          f'A product hidden in a library call: {one.rest[:120]}'
        )
      if one.op in ('dot', 'convolution'):
        if math.isnan(times):
          raise ValueError(
            f'{one.name} is in a loop without a known trip count.'
          )
        product = _dot if one.op == 'dot' else _convolution
        total += times * product(one, computation)
  return total


def _dot(one: Instruction, computation: Computation) -> float:
  left = computation[one.operands[0]].arrays[0].dims
  axes = one.attribute('lhs_contracting_dims') or ''
  contracted = math.prod(left[int(a)] for a in axes.split(',') if a)
  return 2.0 * math.prod(one.arrays[0].dims) * contracted


def _convolution(one: Instruction, computation: Computation) -> float:
  """2 x batch x features in x features out x pairs of window and input.

  Of a window that reaches over the edge, only what is inside counts: that is
  how the TPU's backend writes batched and strided products.
  """
  left, right = (computation[name].arrays[0].dims for name in one.operands[:2])
  source, kernel, result = re.split(r'_|->', one.attribute('dim_labels'))
  sizes = {
    **{f'in {label}': n for label, n in zip(source, left, strict=True)},
    **{f'by {label}': n for label, n in zip(kernel, right, strict=True)},
    **{
      f'to {label}': n
      for label, n in zip(result, one.arrays[0].dims, strict=True)
    },
  }
  total = 2.0 * sizes['to b'] * sizes['to f'] * sizes['by i']
  window = re.search(r'window=\{([^}]*)\}', one.rest)
  fields = dict(f.split('=') for f in window[1].split()) if window else {}
  for axis in range(len(source) - 2):
    part = lambda name, default: (
      fields[name].split('x')[axis] if name in fields else default  # noqa: B023
    )
    total *= _window_pairs(
      sizes[f'in {axis}'],
      sizes[f'by {axis}'],
      sizes[f'to {axis}'],
      stride=int(part('stride', '1')),
      low=int(part('pad', '0_0').split('_')[0]),
      spread_in=int(part('lhs_dilate', '1')),
      spread_by=int(part('rhs_dilate', '1')),
    )
  return total


def _window_pairs(
  size: int,
  window: int,
  places: int,
  *,
  stride: int,
  low: int,
  spread_in: int,
  spread_by: int,
) -> int:
  """Counts (place, window element) that meet an element of the input."""
  count = 0
  for place in range(places):
    for k in range(window):
      at = place * stride + k * spread_by - low
      count += 0 <= at < (size - 1) * spread_in + 1 and at % spread_in == 0
  return count


def _bits(dtype: str) -> int:
  if dtype == 'pred':
    return 8
  found = _BITS.match(dtype)
  return int(found[1]) if found else 0
