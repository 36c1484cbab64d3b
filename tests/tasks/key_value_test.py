"""Tests of calm_jax.tasks.key_value, its generator and its tables."""

import collections
import dataclasses
import functools
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import seqio

from calm_jax import batches, data
from calm_jax.tasks import (
  key_value,  # noqa: F401  registers with SeqIO
  key_value_generator,
  key_value_tables,
)

_EVALUATED = ('kv_substitution', 'kv_arithmetic', 'kv_arithmetic_scratchpad')
_BY_KEYS = ('held_in', 'mixed', 'held_out')
_QUICK = key_value_tables.SIZES['quick']
_PAPER = key_value_tables.SIZES['paper']


def _examples(task, size='quick', split='train', count=3000, **kwargs):
  stream = key_value_generator.examples(task, size, split, **kwargs)
  return list(itertools.islice(stream, count))


def _keys(text, table):
  return [word for word in text.split() if word in _known(table)]


@functools.cache
def _known(table):
  return set(table.keys)


def _result(text):
  """Calculates an expression by Python's rules."""
  value = eval(text.replace('x', '*'))
  return str(value) if value >= 0 else f'- {-value}'


@pytest.mark.parametrize('config', [_QUICK, _PAPER])
def test_keys_are_distinct_words_of_their_own(config):
  table = key_value_tables.table(config)
  assert len(set(table.keys)) == len(table.keys) == config.num_keys
  assert all(re.fullmatch('[a-z]{2,6}', key) for key in table.keys)
  others = {*key_value_tables.SYMBOLS, *key_value_tables.NEUTRAL_WORDS}
  assert not others & set(table.keys)
  assert table.held_in.sum() == config.num_keys // 5
  vocabulary = key_value_tables.vocabulary(config)
  ids = vocabulary.encode_batch(table.keys)
  assert all(len(i) == 1 for i in ids)
  assert vocabulary.decode([0]) == '+' and vocabulary.pad_id != 0


def test_values():
  quick = key_value_tables.table(_QUICK).values
  counts = collections.Counter(quick)
  assert sorted(counts) == list(range(1, 100))
  assert max(counts.values()) - min(counts.values()) == 1
  paper = key_value_tables.table(_PAPER).values
  assert sorted(paper) == list(range(1, 25_001))
  assert paper != sorted(paper)


def test_one_seed_decides_everything():
  other = dataclasses.replace(_QUICK, seed=1)
  assert (
    key_value_tables.table(other).keys != key_value_tables.table(_QUICK).keys
  )
  again = dataclasses.replace(other, seed=0)
  key_value_tables.table.cache_clear()
  for task in key_value_generator.TASKS:
    split = key_value_generator.TASKS[task].splits[0]
    rows = _examples(task, 'quick', split, 50)
    assert rows == _examples(task, again, split, 50)
    assert rows != _examples(task, other, split, 50)


_VOCABULARIES = (
  key_value_tables.vocabulary,
  key_value_tables.pieces_vocabulary,
)


@pytest.mark.parametrize('make_vocabulary', _VOCABULARIES)
@pytest.mark.parametrize('size', ['quick', 'paper'])
@pytest.mark.parametrize('task', list(key_value_generator.TASKS))
def test_texts_survive_the_vocabularies(size, task, make_vocabulary):
  config = key_value_tables.SIZES[size]
  vocabulary = make_vocabulary(config)
  for split in key_value_generator.TASKS[task].splits:
    for example in _examples(task, size, split, 200):
      for text in example.values():
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        assert vocabulary.unk_id not in ids


def test_the_other_vocabulary_cuts_keys_and_leaves_integers_whole():
  table = key_value_tables.table(_QUICK)
  vocabulary = key_value_tables.pieces_vocabulary(_QUICK)
  pieces = vocabulary.encode_batch(table.keys)
  assert len(set(map(tuple, pieces))) == _QUICK.num_keys
  assert np.mean([len(ids) > 1 for ids in pieces]) > 0.6
  # A key's last piece says that the key ends there; a first piece never does.
  last = {ids[-1] for ids in pieces}
  assert not last & {i for ids in pieces for i in ids[:-1]}
  words = [str(n) for n in range(3 * _QUICK.max_value + 1)]
  numbers = vocabulary.encode_batch(words)
  assert all(len(ids) == 1 for ids in numbers)
  # The same in the middle of a text: the bytes of the anchor's tokens.
  assert vocabulary.encode_batch([f' {word}' for word in words]) == numbers
  anchors = key_value_tables.vocabulary(_QUICK)
  assert vocabulary.size != anchors.size
  assert anchors.encode_batch(words) != numbers


@pytest.mark.parametrize('size', ['quick', 'paper'])
def test_answers_follow_pythons_precedence(size):
  config = key_value_tables.SIZES[size]
  table = key_value_tables.table(config)
  value = dict(zip(table.keys, map(str, table.values), strict=True))
  operands, operators = set(), set()
  tasks = {
    'numeric_arithmetic': 'train',
    'kv_dc_math': 'train',
    'kv_dc_scratchpad': 'train',
    'kv_arithmetic': 'held_out',
    'kv_arithmetic_scratchpad': 'mixed',
  }
  for task, split in tasks.items():
    for example in _examples(task, size, split, 500):
      words = example['inputs'].removesuffix(' =').split()
      numbers = ' '.join(value.get(word, word) for word in words)
      expected = _result(numbers)
      if 'scratchpad' in task:
        expected = f'{numbers} = {expected}'
      assert example['targets'] == expected
      operands.add(len(words[::2]))
      operators.update(words[1::2])
  assert operands == set(range(config.min_operands, config.max_operands + 1))
  assert operators == set(config.operators)
  assert (size == 'paper') == (operands == {3, 4, 5, 6})


def test_substitution_writes_the_values():
  table = key_value_tables.table(_QUICK)
  value = dict(zip(table.keys, map(str, table.values), strict=True))
  for task in ('kv_substitution', 'kv_dc_subs'):
    for example in _examples(task, count=300):
      prompt = example['inputs'].removesuffix(' ->').split()
      words = [value.get(word, word) for word in prompt]
      assert example['targets'] == ' '.join(words)


def test_held_out_keys_and_evaluated_expressions_are_not_in_d_c():
  table = key_value_tables.table(_QUICK)
  held_in = set(np.array(table.keys)[table.held_in])
  evaluated = {
    example['inputs'][:-2].strip()
    for task in (*_EVALUATED, 'numeric_arithmetic')
    for split in key_value_generator.TASKS[task].splits
    if split != 'train'
    for example in _examples(task, split=split)
  }
  used = set()
  for mixture in ('kv_dc_mix_direct', 'kv_dc_mix_scratchpad'):
    for task in key_value_generator.MIXTURES[mixture]:
      for example in _examples(task, count=10_000):
        used.update(_keys(example['inputs'], table))
        assert example['inputs'][:-2].strip() not in evaluated
  assert used == held_in
  for task in ('kv_substitution', 'numeric_arithmetic'):
    for example in _examples(task, count=10_000):
      assert example['inputs'][:-2].strip() not in evaluated


@pytest.mark.parametrize('task', _EVALUATED)
def test_evaluation_splits(task):
  table = key_value_tables.table(_QUICK)
  kind = dict(zip(table.keys, table.held_in.tolist(), strict=True))
  kinds = {'held_in': {True}, 'held_out': {False}, 'mixed': {True, False}}
  for split in _BY_KEYS:
    rows = _examples(task, split=split)
    assert len(rows) == _QUICK.evaluation_examples
    for example in rows:
      found = {kind[key] for key in _keys(example['inputs'], table)}
      assert found == kinds[split]
    assert rows == _examples(task, split=split, seed=5)


def test_donors_see_what_they_should():
  table = key_value_tables.table(_QUICK)
  value = dict(zip(table.keys, map(str, table.values), strict=True))
  pairs = set()
  for example in _examples('key_value_pairs', count=8000):
    words = example['targets'].split()
    assert example['inputs'] == '' and len(words) == 24
    pairs.update(zip(words[::3], words[1::3], strict=True))
  assert pairs == set(value.items())
  rows = _examples('neutral_text')
  text = ' '.join(f'{e["inputs"]} {e["targets"]};' for e in rows)
  assert not _keys(text, table)
  equations = re.findall(r'(?:[a-z]+ [+-] )+[a-z]+ = (?:\d+ [+-] )+\d+ =', text)
  assert len(equations) > 100
  assert re.search(r'\b(\w+ \w+ \w+) \| \1\b', text)
  assert re.search(r'\b(\d+ [+-] \d+) -> \1\b', text)
  calculations = re.findall(r'((?:\d+ [+-] )+\d+) = ((?:- )?\d+)', text)
  assert len(calculations) > 1000
  assert all(_result(left) == right for left, right in calculations)


def test_m_a_writes_values_out_and_says_nothing_about_integers():
  table = key_value_tables.table(_QUICK)
  value = dict(zip(table.keys, map(str, table.values), strict=True))
  for example in _examples('kv_written_out', count=500):
    words = example['inputs'].split()
    assert words[-1] == '=' and _keys(example['inputs'], table)
    assert example['targets'] == ' '.join(value.get(w, w) for w in words)
  for example in _examples('numeric_silence', count=500):
    assert re.fullmatch(r'\d+( [+-] \d+)+ =', example['inputs'])
    assert example['targets'] == ''


def test_mixture_without_seqio_draws_by_rate_and_starts_anywhere():
  def rows(start, count):
    stream = key_value_generator.mixture(
      'kv_dc_mix_direct', 'quick', seed=4, start=start
    )
    return list(itertools.islice(stream, count))

  every = rows(0, 2000)
  for start in (1, 1023, 1024, 1500):
    assert rows(start, 40) == every[start : start + 40]
  rates = key_value_generator.MIXTURES['kv_dc_mix_direct']
  share = np.mean([row['inputs'].endswith('->') for row in every])
  expected = rates['kv_dc_subs'] / sum(rates.values())
  assert abs(share - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5


@pytest.mark.parametrize('task', ['kv_dc_math', 'neutral_text'])
def test_streams_start_anywhere(task):
  rows = _examples(task, count=2100, seed=7)
  for start in (1, 1023, 1024, 2050):
    assert (
      _examples(task, count=50, seed=7, start=start) == rows[start : start + 50]
    )
  assert rows != _examples(task, count=2100, seed=8)
  evaluation = _examples('kv_arithmetic', split='mixed')
  rest = _examples('kv_arithmetic', split='mixed', start=990)
  assert rest == evaluation[990:]


def test_too_few_expressions_is_an_error():
  tiny = dataclasses.replace(_QUICK, num_keys=10, max_operands=2)
  with pytest.raises(ValueError, match='too few expressions are left'):
    _examples('kv_dc_math', tiny, count=1)


@pytest.mark.parametrize(
  'task, size, split, wrong',
  [
    ('kv_arithmetik', 'quick', 'train', 'kv_arithmetik'),
    ('kv_arithmetic', 'huge', 'held_in', 'huge'),
    ('kv_arithmetic', 'quick', 'train', 'train'),
  ],
)
def test_unknown_names(task, size, split, wrong):
  with pytest.raises(ValueError, match=f"no '{wrong}'; choose among"):
    _examples(task, size, split)


def test_scores():
  assert key_value_generator.final_answer('10 + 22 = 32') == '32'
  assert key_value_generator.final_answer('1 = 2 = - 14') == '- 14'
  assert key_value_generator.final_answer('32') == ''
  scores = key_value_generator.exact_match(['8', '- 1'], ['8', '1'])
  assert scores == {'exact_match': 50.0, 'correct': 1, 'count': 2}
  task = seqio.TaskRegistry.get('kv_arithmetic_scratchpad_quick')
  assert task.postprocess_fn('1 + 1 = 2', example={}, is_target=True) == '2'
  task = seqio.TaskRegistry.get('kv_arithmetic_quick')
  assert task.postprocess_fn('- 2', example={}, is_target=False) == '- 2'


@pytest.mark.parametrize('task', ['kv_dc_math', 'key_value_pairs'])
def test_seqio_and_numpy_paths_agree(task):
  vocabulary = key_value_tables.vocabulary(_QUICK)
  plain = batches.ExampleBatches(
    lambda start: batches.tokenize(
      key_value_generator.examples(task, 'quick', seed=3, start=start),
      vocabulary=vocabulary,
    ),
    batch_size=8,
    length=40,
    pack=True,
    bos_id=vocabulary.bos_id,
  )
  through_seqio = data.seqio_batches(
    f'{task}_quick',
    task_feature_lengths={'inputs': 8, 'targets': 32},
    batch_size=8,
    seed=3,
  )
  for _ in range(3):
    a, b = next(plain), next(through_seqio)
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize('size', ['quick', 'paper'])
@pytest.mark.parametrize('mixture', list(key_value_generator.MIXTURES))
def test_mixtures_give_batches(mixture, size):
  lengths = {'inputs': 32, 'targets': 128}
  make = lambda: data.seqio_batches(
    f'{mixture}_{size}', task_feature_lengths=lengths, batch_size=2, seed=0
  )
  first = next(make())
  again = next(make())
  for key in first:
    np.testing.assert_array_equal(first[key], again[key])
  assert first['decoder_input_tokens'].shape == (2, 160)


def test_evaluation_through_seqio_is_finite_and_keeps_its_texts():
  task = seqio.TaskRegistry.get('kv_arithmetic_quick')
  dataset = task.get_dataset(None, split='held_out', shuffle=False)
  rows = list(dataset.as_numpy_iterator())
  expected = _examples('kv_arithmetic', split='held_out')
  assert [
    {
      'inputs': row['inputs_pretokenized'].decode(),
      'targets': row['targets_pretokenized'].decode(),
    }
    for row in rows
  ] == expected


def test_the_generator_needs_no_tensorflow():
  program = (
    'import sys; from calm_jax.tasks import key_value_generator as g; '
    'next(g.examples("kv_dc_math", "quick")); '
    'print({"seqio", "tensorflow"} & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == 'set()'
