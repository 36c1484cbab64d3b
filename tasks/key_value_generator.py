"""The texts and scores of the key-value tasks, in plain numpy.

Training streams come in chunks, each with a generator of its own, so a stream
can start anywhere at no cost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from calm_jax.tasks import key_value_tables as tables

SEPARATORS = ('+', '-', 'x', ';', ',', '.')  # Between `key value` pairs.
JOINTS = (';', ',', '.')  # Between the parts of neutral text.
_CHUNK = 1024


@functools.cache
def evaluation(
  config: tables.KeyValueConfig, split: str
) -> tuple[tables.Expression, ...]:
  """Draws the expressions of a split; no training stream has any of them.

  Args:
    config: the size of the task.
    split: 'held_in', 'held_out' or 'mixed' keys (at least one of each), or
      'test' for integers.

  Returns:
    `KeyValueConfig.evaluation_examples` expressions.
  """
  held_in = tables.table(config).held_in
  inside, outside = np.flatnonzero(held_in), np.flatnonzero(~held_in)
  pool = {
    'held_in': inside,
    'held_out': outside,
    # Both kinds equally often.
    'mixed': np.concatenate([np.resize(inside, outside.size), outside]),
    'test': np.arange(1, config.max_value + 1),
  }[split]

  def accept(e: tables.Expression) -> bool:
    if split != 'mixed':
      return True
    return 0 < held_in[list(e.operands)].sum() < len(e.operands)

  rng = tables.generator(config, f'evaluation/{split}')
  count = config.evaluation_examples
  return tuple(_expressions(config, rng, pool, count, accept))


@functools.cache
def _evaluated(
  config: tables.KeyValueConfig, operands: str
) -> frozenset[tables.Expression]:
  """Returns the expressions that training must not see."""
  integers = operands == 'integers'
  splits = ('test',) if integers else ('held_in', 'mixed', 'held_out')
  return frozenset().union(*(evaluation(config, split) for split in splits))


def examples(
  task_name: str,
  size: str | tables.KeyValueConfig,
  split: str = 'train',
  seed: int = 0,
  start: int = 0,
) -> Iterator[dict[str, str]]:
  """Yields the examples of a task as texts.

  Args:
    task_name: a key of `TASKS`, without the size.
    size: a key of `SIZES`, or a config.
    split: 'train' never ends; the others have
      `KeyValueConfig.evaluation_examples`.
    seed: of the training stream. The other splits are the same for all seeds.
    start: how many examples to leave out; costs nothing.

  Yields:
    {'inputs': text, 'targets': text}, with all words separated by one space.

  Raises:
    ValueError: if the task, its split or the size does not exist.
  """
  config = _config(size)
  task = _get(TASKS, task_name)
  _get(dict.fromkeys(task.splits), split)
  if split == 'train':
    rows = _stream(task_name, config, seed, start)
  else:
    rows = (
      task.write(task.table(config), expression)
      for expression in evaluation(config, split)[start:]
    )
  for inputs, targets in rows:
    yield {'inputs': inputs, 'targets': targets}


def mixture(
  name: str,
  size: str | tables.KeyValueConfig,
  seed: int = 0,
  start: int = 0,
) -> Iterator[dict[str, str]]:
  """Yields the endless training examples of a mixture, without SeqIO.

  Args:
    name: a key of `MIXTURES`, without the size.
    size: a key of `SIZES`, or a config.
    seed: of the stream.
    start: how many examples to leave out; costs nothing.
  """
  rates = _get(MIXTURES, name)
  names = list(rates)
  shares = np.array(list(rates.values())) / sum(rates.values())
  config = _config(size)
  first, offset = divmod(start, _CHUNK)
  for chunk in itertools.count(first):
    rng = tables.generator(config, f'mixture/{name}', seed, chunk)
    chosen = rng.choice(len(names), _CHUNK, p=shares).tolist()
    rows = [
      iter(TASKS[task].draw(config, rng, chosen.count(i)))
      for i, task in enumerate(names)
    ]
    for i in chosen[:offset]:
      next(rows[i])
    for i in chosen[offset:]:
      inputs, targets = next(rows[i])
      yield {'inputs': inputs, 'targets': targets}
    offset = 0


def final_answer(text: str) -> str:
  """Returns what follows the last '=' of a scratchpad, or nothing."""
  return text.rpartition('=')[2].strip() if '=' in text else ''


def exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns the percentage of equal texts, and the counts behind it."""
  pairs = zip(targets, predictions, strict=True)
  correct = sum(target == prediction for target, prediction in pairs)
  return {
    'exact_match': 100.0 * correct / len(targets),
    'correct': correct,
    'count': len(targets),
  }


def _stream(
  task_name: str, config: tables.KeyValueConfig, seed: int, start: int
) -> Iterator[tuple[str, str]]:
  first, offset = divmod(start, _CHUNK)
  for chunk in itertools.count(first):
    rng = tables.generator(config, f'train/{task_name}', seed, chunk)
    yield from TASKS[task_name].draw(config, rng, _CHUNK)[offset:]
    offset = 0


def _expressions(
  config: tables.KeyValueConfig,
  rng: np.random.Generator,
  pool: np.ndarray,
  count: int,
  accept: Callable[[tables.Expression], bool],
) -> list[tables.Expression]:
  """Draws `count` expressions with operands of `pool` that `accept` likes."""
  most, found = config.max_operands, []
  for _ in range(100):
    sizes = rng.integers(config.min_operands, most + 1, count).tolist()
    operands = rng.choice(pool, (count, most)).tolist()
    operators = rng.choice(config.operators, (count, most - 1)).tolist()
    drawn = (
      tables.Expression(tuple(numbers[:n]), tuple(signs[: n - 1]))
      for n, numbers, signs in zip(sizes, operands, operators, strict=True)
    )
    found += filter(accept, drawn)
    if len(found) >= count:
      return found[:count]
  raise ValueError(
    f'Of {pool.size} operands, too few expressions are left for training '
    f'beside {config.evaluation_examples} for evaluation; raise num_keys, '
    'held_in_fraction or max_operands, or lower evaluation_examples.'
  )


def _number(value: int) -> str:
  return str(value) if value >= 0 else f'- {-value}'


def _substitution(table: tables.Table, e: tables.Expression) -> tuple[str, str]:
  return f'{e.text(table.keys)} ->', e.text(table.value_words)


def _direct(table: tables.Table, e: tables.Expression) -> tuple[str, str]:
  return f'{e.text(table.keys)} =', _number(e.value(table.values))


def _scratchpad(table: tables.Table, e: tables.Expression) -> tuple[str, str]:
  inputs, answer = _direct(table, e)
  return inputs, f'{e.text(table.value_words)} = {answer}'


def _written_out(table: tables.Table, e: tables.Expression) -> tuple[str, str]:
  return f'{e.text(table.keys)} =', f'{e.text(table.value_words)} ='


def _silence(table: tables.Table, e: tables.Expression) -> tuple[str, str]:
  return f'{e.text(table.keys)} =', ''


# What the operands of training expressions may be.
_TABLES = {
  'keys': tables.table,
  'held_in': tables.table,
  'integers': tables.integer_table,
}


def _training_expressions(
  config: tables.KeyValueConfig,
  rng: np.random.Generator,
  operands: str,
  count: int,
) -> list[tables.Expression]:
  """Draws expressions whose operands are those of `_TABLES[operands]`."""
  held_in = np.flatnonzero(tables.table(config).held_in)
  integers = np.arange(1, config.max_value + 1)
  pool = {
    'keys': np.arange(config.num_keys),
    'held_in': held_in,
    'integers': integers,
  }[operands]
  evaluated = _evaluated(config, operands)
  return _expressions(config, rng, pool, count, lambda e: e not in evaluated)


def _pairs(
  config: tables.KeyValueConfig, rng: np.random.Generator, count: int
) -> list[tuple[str, str]]:
  """Writes rows of `key value`, with any word between the pairs."""
  shape = (count, config.pairs_per_row)
  keys = rng.integers(config.num_keys, size=shape).tolist()
  between = np.where(
    rng.random(shape) < 0.5,
    rng.choice(SEPARATORS, shape),
    rng.choice(tables.NEUTRAL_WORDS, shape),
  ).tolist()
  pairs = list(
    zip(
      tables.table(config).keys, tables.table(config).value_words, strict=True
    )
  )
  rows = []
  for row, words in zip(keys, between, strict=True):
    items = ((*pairs[key], word) for key, word in zip(row, words, strict=True))
    rows.append(('', ' '.join(itertools.chain.from_iterable(items))))
  return rows


def _neutral_text(
  config: tables.KeyValueConfig, rng: np.random.Generator, count: int
) -> list[tuple[str, str]]:
  """Writes words, repeated spans and calculations, to be continued.

  A row is parts in any order, and its last part is left for the targets: the
  result of a calculation, or what repeats. A calculation may stand in an
  equation with words, drawn apart, that say nothing about a number. Keys never
  occur: the anchor that learns from these texts does not know them.
  """
  integers = tables.integer_table(config)
  shape = (count, config.parts_per_row)
  kinds = ('repeat', 'copy', 'calculation', 'equation', 'equation', 'equation')
  kinds = rng.choice(kinds, shape)
  needed = np.count_nonzero(kinds != 'repeat')
  expressions = iter(_training_expressions(config, rng, 'integers', needed))
  needed = np.count_nonzero(kinds == 'equation')
  pool = np.arange(len(tables.NEUTRAL_WORDS))
  left_sides = iter(_expressions(config, rng, pool, needed, lambda e: True))
  sizes = rng.integers(1, 5, shape).tolist()
  joints = rng.choice(JOINTS, shape).tolist()
  words = rng.choice(tables.NEUTRAL_WORDS, (*shape, 4)).tolist()
  rows = []
  for row in zip(kinds.tolist(), sizes, joints, words, strict=True):
    text, inputs, targets = [], '', ''
    for kind, size, joint, span in zip(*row, strict=True):
      if kind == 'calculation':
        inputs, targets = _direct(integers, next(expressions))
      elif kind == 'equation':
        inputs, targets = _direct(integers, next(expressions))
        inputs = f'{next(left_sides).text(tables.NEUTRAL_WORDS)} = {inputs}'
      elif kind == 'copy':
        targets = next(expressions).text(integers.keys)
        inputs = f'{targets} ->'
      else:
        targets = ' '.join(span[:size])
        inputs = f'{targets} |'
      before = ' '.join(text)
      text += [inputs, targets, joint]
    rows.append((f'{before} {inputs}'.strip(), targets))
  return rows


@dataclasses.dataclass(frozen=True)
class Task:
  """How a task draws its training rows, and writes its evaluation examples.

  Attributes:
    splits: which splits it has.
    draw: given config, generator and count, returns (inputs, targets) rows.
    write: turns an expression into inputs and targets.
    table: what the operands of the expressions stand for.
  """

  splits: tuple[str, ...]
  draw: Callable[..., list[tuple[str, str]]]
  write: Callable[[tables.Table, tables.Expression], tuple[str, str]] | None = (
    None
  )
  table: Callable[[tables.KeyValueConfig], tables.Table] = tables.table


def _expression_task(
  write: Callable[[tables.Table, tables.Expression], tuple[str, str]],
  operands: str,
  *splits: str,
) -> Task:
  make_table = _TABLES[operands]

  def draw(config, rng, count):
    expressions = _training_expressions(config, rng, operands, count)
    return [write(make_table(config), e) for e in expressions]

  return Task(splits=splits, draw=draw, write=write, table=make_table)


_BY_KEYS = ('held_in', 'mixed', 'held_out')
TASKS = {
  # What the donors learn, and where they are evaluated.
  'key_value_pairs': Task(splits=('train',), draw=_pairs),
  'kv_substitution': _expression_task(
    _substitution, 'keys', 'train', *_BY_KEYS
  ),
  'numeric_arithmetic': _expression_task(_direct, 'integers', 'train', 'test'),
  'neutral_text': Task(splits=('train',), draw=_neutral_text),
  # Substitution after '=' too; about integers m_A has nothing to say.
  'kv_written_out': _expression_task(_written_out, 'keys', 'train'),
  'numeric_silence': _expression_task(_silence, 'integers', 'train'),
  # What only the composition can do.
  'kv_arithmetic': _expression_task(_direct, 'keys', *_BY_KEYS),
  'kv_arithmetic_scratchpad': _expression_task(_scratchpad, 'keys', *_BY_KEYS),
  # D_C: held-in keys only, and rows that keep what the anchor can do.
  'kv_dc_subs': _expression_task(_substitution, 'held_in', 'train'),
  'kv_dc_math': _expression_task(_direct, 'held_in', 'train'),
  'kv_dc_scratchpad': _expression_task(_scratchpad, 'held_in', 'train'),
  'kv_dc_numeric': _expression_task(_direct, 'integers', 'train'),
}


# Rates, relative within a mixture.
MIXTURES = {
  'kv_augmenting_donor': {
    'key_value_pairs': 5.0,
    'kv_substitution': 6.0,
    'kv_written_out': 6.0,
    'numeric_silence': 2.0,
  },
  'kv_anchor_donor': {'numeric_arithmetic': 3.0, 'neutral_text': 1.0},
  'kv_anchor_donor_late': {'numeric_arithmetic': 1.0, 'neutral_text': 1.0},
  'kv_dc_mix_direct': {
    'kv_dc_subs': 2.0,
    'kv_dc_math': 4.0,
    'kv_dc_numeric': 2.0,
  },
  'kv_dc_mix_scratchpad': {
    'kv_dc_subs': 1.0,
    'kv_dc_scratchpad': 2.0,
    'kv_dc_numeric': 1.0,
  },
}


def _config(size: str | tables.KeyValueConfig) -> tables.KeyValueConfig:
  if isinstance(size, tables.KeyValueConfig):
    return size
  return _get(tables.SIZES, size)


def _get(choices: Mapping[str, Any], name: str) -> Any:
  if name not in choices:
    raise ValueError(
      f'The key-value task has no {name!r}; choose among {", ".join(choices)}.'
    )
  return choices[name]
