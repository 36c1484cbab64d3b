"""CodeXGLUE code-to-text: parsing, prompts, errors, and its smoothed BLEU.

Run: pytest tests/tasks/codexglue_test.py
"""

from fractions import Fraction
import json
import math
import pathlib
import random

import pytest
import sacrebleu

from calm_jax.tasks import codexglue, text_scores

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tasks'


def task(**settings):
  return codexglue.CodeToText(
    **{'directory': str(FIXTURES / 'codexglue'), 'language': 'python'}
    | settings
  )


# --- Prompts -----------------------------------------------------------------


def test_a_prompt_is_exactly_this():
  first = task(shots=2).examples('test')[0]
  assert first == {
    'inputs': (
      'Code: def add ( a , b ) : return a + b\n'
      'Summary: Add two numbers .\n'
      '\n'
      'Code: def last ( xs ) : return xs [ - 1 ]\n'
      'Summary: Return the last item of a list .\n'
      '\n'
      'Code: def first ( xs ) : return xs [ 0 ]\n'
      'Summary:'
    ),
    'targets': ' Return the first item of a list .',
    'reference': 'Return the first item of a list .',
  }
  assert task().name == 'code_to_text_python'


def test_a_summary_is_one_line_and_code_is_cut():
  one = task(shots=1, max_code_tokens=4).examples('test')[1]
  assert one['inputs'] == (
    'Code: def add ( a\nSummary: Add two numbers .\n\n'
    'Code: def greet ( name\nSummary:'
  )
  assert one['reference'] == 'Greet a person by name .'


def test_line_feeds_within_tokens_are_read_as_officially(tmp_path):
  """Code: as spaces; a docstring: as nothing, so that words join."""
  folder = tmp_path / 'python'
  folder.mkdir()
  row = {'code_tokens': ['a\nb', 'c'], 'docstring_tokens': ['x\ny', 'z']}
  (folder / 'test.jsonl').write_text(json.dumps(row) + '\n')
  (one,) = task(directory=str(tmp_path), shots=0).examples('test')
  assert one == {
    'inputs': 'Code: a b c\nSummary:',
    'targets': ' xy z',
    'reference': 'xy z',
  }


def test_the_tested_function_is_never_among_the_examples():
  rows = task(shots=4).examples('train')
  for i, row in enumerate(rows):
    shown = row['inputs'].split('\n\n')[:-1]
    others = [r for j, r in enumerate(rows) if j != i]
    assert [text.split('Summary:')[1] for text in shown] == [
      other['targets'] for other in others
    ]
  with pytest.raises(ValueError, match='shots = 5, and there are only 4'):
    task(shots=5).examples('train')
  assert len(task(shots=0).examples('valid')) == 2


def test_an_example_that_is_there_twice_is_one_example(tmp_path):
  folder = tmp_path / 'python'
  folder.mkdir()
  rows = [
    {'code_tokens': ['f', str(n)], 'docstring_tokens': ['says', str(n)]}
    for n in (1, 1, 1, 2, 3)
  ]
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'train.jsonl').write_text(''.join(lines))
  (folder / 'test.jsonl').write_text(lines[0])
  (one,) = task(directory=str(tmp_path), shots=2).examples('test')
  assert one['inputs'].count('Code: f 1') == 1
  assert [f'Code: f {n}' in one['inputs'] for n in (2, 3)] == [True, True]


# --- Scores ------------------------------------------------------------------


def by_hand(precisions, *, words, wanted):
  """exp(min(0, 1 - (r + 1) / (c + 1))) and the fourth root of a product."""
  penalty = min(0, 1 - Fraction(wanted + 1, words + 1))
  return math.exp(penalty) * math.prod(precisions) ** 0.25


WORKED = [
  # All of 4 words match: 4/4, (3+1)/(3+1), (2+1)/(2+1), (1+1)/(1+1).
  ('a b c d', 'a b c d', by_hand([Fraction(1)] * 4, words=4, wanted=4)),
  # 'the first item .' against 'the first thing .': words the, first, . are 3 of
  # 4; of the pairs, 'the first' is 1 of 3; no threes of 2; no four of 1.
  (
    'The first item.',
    'the first thing .',
    by_hand(
      [Fraction(3, 4), Fraction(2, 4), Fraction(1, 3), Fraction(1, 2)],
      words=4,
      wanted=4,
    ),
  ),
  # Too short, 2 words for 5: 2/2, (1+1)/(1+1), (0+1)/(0+1), (0+1)/(0+1), and
  # the penalty exp(1 - 6/3).
  ('a b', 'a b c d e', by_hand([Fraction(1)] * 4, words=2, wanted=5)),
  # Words are counted at most as often as in the reference: 'a a a' has 1 of 3,
  # 0 of 2 pairs, 0 of 1 threes, no fours. It is the longer: no penalty.
  (
    'a a a',
    'a b',
    by_hand(
      [Fraction(1, 3), Fraction(1, 3), Fraction(1, 2), Fraction(1)],
      words=3,
      wanted=2,
    ),
  ),
  # Split and in lower case: get _ x ( 2 . 5 ) are 8 words, all but the first
  # there; pairs 6 of 7, threes 5 of 6, fours 4 of 5.
  (
    'GET_x(2.5)',
    'set _ X ( 2 . 5 )',
    by_hand(
      [Fraction(7, 8), Fraction(7, 8), Fraction(6, 7), Fraction(5, 6)],
      words=8,
      wanted=8,
    ),
  ),
  ('x y', 'a b', 0.0),
  # Nothing was said: exp(1 - (2 + 1) / (0 + 1)).
  ('', 'a b', math.exp(-2)),
]


@pytest.mark.parametrize('output, reference, expected', WORKED)
def test_smoothed_bleu_on_examples_worked_by_hand(output, reference, expected):
  score = text_scores.smoothed_bleu4(output, reference)
  assert score == pytest.approx(expected, rel=1e-12)


def test_smoothed_bleu_is_sacrebleus_where_both_are_defined_alike():
  """Add-1 for 2 to 4 words: equal if no shorter, and 4 words or more."""
  metric = sacrebleu.BLEU(
    smooth_method='add-k',
    smooth_value=1,
    tokenize='none',
    effective_order=False,
  )
  rng = random.Random(0)
  scores = []
  for _ in range(300):
    wanted = [rng.choice('abcdef') for _ in range(rng.randint(1, 9))]
    words = [rng.choice('abcdef') for _ in range(rng.randint(4, 12))]
    if len(words) < len(wanted) or not set(words) & set(wanted):
      continue
    output, reference = ' '.join(words), ' '.join(wanted)
    expected = metric.sentence_score(output, [reference]).score / 100
    scores.append(text_scores.smoothed_bleu4(output, reference))
    assert scores[-1] == pytest.approx(expected, rel=1e-9)
  assert len(scores) > 100 and len(set(scores)) > 50


def test_scores_are_means_over_first_lines():
  made = task(shots=0)
  examples = made.examples('test')
  outputs = [' Return the first item of a list .\nCode: def', ' Greet .']
  predictions = [
    [made.prediction(output, example)]
    for output, example in zip(outputs, examples, strict=True)
  ]
  measured = made.metrics(examples, predictions)
  assert list(measured) == ['smoothed_bleu4', 'chrF1', 'chrF1_signature']
  # 'greet .' is 2 of 2 words, 0 + 1 of 1 + 1 pairs, and has no longer ones.
  second = by_hand(
    [Fraction(1), Fraction(1, 2), Fraction(1), Fraction(1)], words=2, wanted=6
  )
  expected = 100 * (1 + second) / 2
  assert measured['smoothed_bleu4'] == pytest.approx(expected)
  chrf = sacrebleu.CHRF(char_order=6, word_order=0, beta=1)
  references = [[example['reference'] for example in examples]]
  texts = ['Return the first item of a list .', 'Greet .']
  assert measured['chrF1'] == chrf.corpus_score(texts, references).score
  assert measured['chrF1_signature'].startswith('chrF1|nrefs:1|case:mixed')


# --- Errors ------------------------------------------------------------------


@pytest.mark.parametrize(
  'row, message',
  [
    ({'code_tokens': ['a']}, "no 'docstring_tokens'; the fields are"),
    (
      {'code_tokens': 'a b', 'docstring_tokens': ['x']},
      "'code_tokens' is 'a b'",
    ),
    (
      {'code_tokens': [1], 'docstring_tokens': ['x']},
      "'code_tokens' holds what is no text",
    ),
    (
      {'code_tokens': ['a'], 'docstring_tokens': [' ']},
      "'docstring_tokens' is empty",
    ),
  ],
)
def test_a_malformed_line(tmp_path, row, message):
  (tmp_path / 'go').mkdir()
  good = {'code_tokens': ['a'], 'docstring_tokens': ['b']}
  (tmp_path / 'go' / 'test.jsonl').write_text(
    f'{json.dumps(good)}\n{json.dumps(row)}\n'
  )
  with pytest.raises(
    ValueError, match=rf'test.jsonl, line 2: {message}.*Expected: CodeXGLUE'
  ):
    task(directory=str(tmp_path), language='go', shots=0).examples('test')


def test_a_missing_language():
  with pytest.raises(
    ValueError, match=r'cobol/train.jsonl .*not a directory.*preprocess.py'
  ):
    task(language='cobol').examples('test')
  with pytest.raises(ValueError, match="no split 'dev'.*'valid'"):
    task().examples('dev')
  with pytest.raises(ValueError, match=r'must end with \{summary\}'):
    task(template='{summary}: {code}')
