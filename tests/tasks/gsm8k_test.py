"""GSM8K and MGSM: parsing, prompts, errors, and how answers are read.

Run: pytest tests/tasks/gsm8k_test.py
"""

import json
import pathlib
import re

import pytest

from calm_jax.tasks import final_numbers, gsm8k

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tasks'


def english(**settings):
  return gsm8k.GSM8K(**{'directory': str(FIXTURES / 'gsm8k')} | settings)


def swahili(**settings):
  folder = FIXTURES / 'gsm8k_swh'
  files = {f'{s}_file': str(folder / f'{s}.jsonl') for s in ('train', 'test')}
  return gsm8k.GSM8K(**{'language': 'swh', **files} | settings)


def mgsm(language='de', **settings):
  return gsm8k.MGSM(
    **{'directory': str(FIXTURES / 'mgsm'), 'language': language} | settings
  )


# --- Prompts -----------------------------------------------------------------


def test_a_prompt_is_exactly_this():
  first = english(shots=1).examples('test')[0]
  assert first == {
    'inputs': (
      'Question: Nadia picks 12 mangoes and gives 5 of them to a neighbour.'
      ' How many are left?\n'
      'Answer: Nadia keeps 12 - 5 = 7 mangoes.\n'
      '#### 7\n'
      '\n'
      'Question: Lena has 9 pens and buys 2 packs of 6. How many pens has'
      ' she?\n'
      'Answer:'
    ),
    'targets': (
      ' The packs hold 2 * 6 = 12 pens.\nShe has 9 + 12 = 21 pens.\n#### 21'
    ),
    'question': (
      'Lena has 9 pens and buys 2 packs of 6. How many pens has she?'
    ),
    'answer': '21',
    'number': '21',
  }
  assert json.loads(json.dumps(first)) == first


def test_calculator_marks_can_be_kept():
  one = english(shots=1, calculator_marks=True).examples('test')[0]
  assert '12 - 5 = <<12-5=7>>7 mangoes' in one['inputs']
  assert '2 * 6 = <<2*6=12>>12 pens' in one['targets']


def test_the_tested_question_is_never_among_the_examples():
  rows = english(shots=5).examples('train')
  questions = [row['question'] for row in rows]
  for i, row in enumerate(rows):
    shown = re.findall(r'Question: (.*)\nAnswer:', row['inputs'])
    assert shown == [q for j, q in enumerate(questions) if j != i] + [
      questions[i]
    ]
  assert rows == english(shots=5).examples('train')
  with pytest.raises(ValueError, match='GSM8K.shots = 6, and there are only 5'):
    english(shots=6).examples('train')


def test_references_are_read_by_the_official_expression():
  rows = english(shots=0).examples('train')
  assert [row['answer'] for row in rows] == ['7', '5', '1200', '30', '-5', '48']
  assert [row['number'] for row in rows] == ['7', '5', '1200', '30', '-5', '48']


def test_another_language_by_file():
  task = swahili(shots=1)
  assert task.name == 'gsm8k_swh' and english().name == 'gsm8k'
  rows = task.examples('test')
  assert rows[0]['inputs'].startswith('Question: Nadia anachuma maembe 12')
  # Its test file has the number alone, as a number and as a text.
  assert [row['targets'] for row in rows] == [' 21', ' 2,480']
  assert [row['number'] for row in rows] == ['21', '2480']
  only_test = swahili(train_file=None, shots=0)
  assert len(only_test.examples('test')) == 2
  with pytest.raises(ValueError, match='GSM8K.train_file is not set'):
    only_test.examples('train')
  with pytest.raises(
    ValueError, match=r'from which the prompts take.*GSM8K.shots = 0'
  ):
    swahili(train_file=None).examples('test')


def test_mgsm_with_and_without_examples():
  assert mgsm('bn').examples('test') == [
    {
      'inputs': (
        'Question: লেনার ৯টি কলম আছে এবং সে ৬টির ২টি প্যাকেট কেনে। তার কয়টি কলম'
        ' আছে?\nAnswer:'
      ),
      'targets': ' 21',
      'question': (
        'লেনার ৯টি কলম আছে এবং সে ৬টির ২টি প্যাকেট কেনে। তার কয়টি কলম আছে?'
      ),
      'number': '21',
    }
  ]
  exemplars = str(FIXTURES / 'mgsm' / 'exemplars_de.jsonl')
  task = mgsm(
    exemplars=exemplars,
    shots=2,
    template='Frage: {question}\nAntwort: {answer}',
  )
  assert task.name == 'mgsm_de'
  rows = task.examples('test')
  assert [row['number'] for row in rows] == ['21', '2480', '-5']
  assert rows[0]['inputs'] == (
    'Frage: Nadia pflückt 12 Mangos und verschenkt 5. Wie viele bleiben?\n'
    'Antwort: Es bleiben 12 - 5 = 7 Mangos. Die Antwort ist 7.\n#### 7\n\n'
    'Frage: In 6 Kisten sind je 8 Tassen. Wie viele Tassen sind es?\n'
    'Antwort: Es sind 6 * 8 = 48 Tassen.\n#### 48\n\n'
    'Frage: Lena hat 9 Stifte und kauft 2 Packungen mit je 6. Wie viele Stifte'
    ' hat sie?\nAntwort:'
  )


# --- Scores ------------------------------------------------------------------

OFFICIAL = re.compile(r'#### (\-?[0-9\.\,]+)')


def official(completion):
  """As published: 'the' answer, or a text that equals no answer."""
  match = OFFICIAL.search(completion)
  return match.group(1).strip().replace(',', '') if match else '[invalid]'


ANSWERS = [  # output, strict, flexible
  (' 12 + 9 = 21 pens.\n#### 21', '21', '21'),
  (' So 21.', None, '21'),
  (' #### 21.', '21.', '21'),
  (' #### 1,480\n', '1480', '1480'),
  (' #### -5 degrees', '-5', '-5'),
  (' #### \u22125', None, '-5'),
  (' ####21', None, '21'),
  (' #### 21\n#### 7', '21', '7'),
  (' #### $21', None, '21'),
  (' It is 21.00', None, '21'),
  (' #### 21 (out of 30)', '21', '30'),
  (' No idea.', None, None),
  ('', None, None),
]


@pytest.mark.parametrize('output, strict, flexible', ANSWERS)
def test_an_answer_is_read_in_two_ways(output, strict, flexible):
  read = english().prediction(output, {})
  assert read == {'strict': strict, 'flexible': flexible}
  assert (read['strict'] or '[invalid]') == official(output)


def test_scores_are_percentages_and_no_number_is_wrong():
  task = english(shots=0)
  examples = task.examples('test')  # 21, 750, 2480
  read = lambda *outputs: [
    [task.prediction(output, example)]
    for output, example in zip(outputs, examples, strict=True)
  ]
  right = read('#### 21', 'x #### 750', '#### 2,480')
  assert task.metrics(examples, right) == {'strict': 100, 'flexible': 100}
  mixed = read('#### 21.', '= 750.0', 'nothing')
  expected = {'strict': 0, 'flexible': pytest.approx(200 / 3)}
  assert task.metrics(examples, mixed) == expected
  zero = [{**examples[0], 'answer': '0', 'number': '0'}]
  nothing = [[task.prediction('nothing', zero[0])]]
  assert task.metrics(zero, nothing) == {'strict': 0, 'flexible': 0}
  two = [[*a, *b] for a, b in zip(right, mixed, strict=True)]
  assert task.metrics(examples, two)['strict'] == 50
  with pytest.raises(ValueError, match='3 examples with 2 predictions'):
    task.metrics(examples, right[:2])


def test_mgsm_reads_numbers_as_the_language_writes_them():
  task = mgsm()
  examples = task.examples('test')  # 21, 2480, -5
  outputs = [
    'Es sind 9 + 12 = 21.',
    'Also 2.480 Kinder',
    'Es sind \u22125 Grad.',
  ]
  predictions = [
    [task.prediction(output, example)]
    for output, example in zip(outputs, examples, strict=True)
  ]
  assert task.metrics(examples, predictions) == {'accuracy': 100}
  point = mgsm(decimal_mark='.')
  assert point.prediction(outputs[1], {}) == {'flexible': '2.48'}
  assert mgsm('bn').prediction('উত্তর ২,৪৮০।', {}) == {'flexible': '2480'}
  wrong = [[{'flexible': None}] for _ in examples]
  assert task.metrics(examples, wrong) == {'accuracy': 0}


@pytest.mark.parametrize(
  'text, mark, expected',
  [
    ('16 - 3 = 13', '.', '13'),
    ('10-2', '.', '2'),
    ('16 - 3', '.', '3'),
    ('(4)-3', '.', '3'),
    ('= -2', '.', '-2'),
    ('= - 2', '.', '-2'),
    ('it is \u22122', '.', '-2'),
    ('-$5', '.', '-5'),
    ('$-5', '.', '-5'),
    ('COVID-19', '.', '19'),
    ('18.', '.', '18'),
    ('1,234,567.80', '.', '1234567.8'),
    ('1.234.567,80', '.', '1234567.8'),
    ('1.234', '.', '1.234'),
    ('1.234', ',', '1234'),
    ('1,234', ',', '1234'),
    ('0.125', ',', '0.125'),
    ('1,5', ',', '1.5'),
    ('1,5', '.', '5'),
    ('1, 2, 3', '.', '3'),
    ('1,00,000', '.', '100000'),
    ('12 345', '.', '12345'),
    ('12\u202f345,5', ',', '12345.5'),
    ("12'345", '.', '12345'),
    ('in 2022 300', '.', '300'),
    ('12 34', '.', '34'),
    ('.5', '.', '0.5'),
    ('Rs.500', '.', '500'),
    ('No.5', '.', '5'),
    ('wait...5', '.', '5'),
    ('$.50', '.', '0.5'),
    ('3/4', '.', '4'),
    ('007', '.', '7'),
    ('-0.0', '.', '0'),
    ('१२३', '.', '123'),
    ('١٬٢٣٤٫٥', '.', '1234.5'),
    ('\uff11\uff0c\uff12\uff13\uff14', '.', '1234'),
    ('x\u00b2 + 5', '.', '5'),
    ('\u00b2 \u00bd \u4e09', '.', None),
    ('none', '.', None),
  ],
)
def test_last_numbers(text, mark, expected):
  assert final_numbers.last_number(text, decimal_mark=mark) == expected


def test_equal_numbers():
  assert final_numbers.same_number('18.0', '18')
  assert not final_numbers.same_number(None, '0')
  assert not final_numbers.same_number('-18', '18')


# --- Errors ------------------------------------------------------------------


def write(file, *rows):
  file.write_text('\n'.join(rows) + '\n', 'utf-8')
  return str(file)


GOOD = '{"question": "q", "answer": "#### 1"}'


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"question": "q"}', r"no 'answer'; the fields are \['question'\]"),
    ('{"question": 3, "answer": "#### 1"}', "'question' is 3"),
    ('{"question": "q", "answer": "one"}', "no #### and number: 'one'"),
    ('{"question": "q", "answer": "the 3 of us"}', 'no #### and number'),
    ('{"question": "q", "answer": "3 #### none"}', 'no #### and number'),
    ('{"question": "q"', 'not JSON'),
    ('["q", "a"]', 'no JSON object'),
    ('', 'not JSON'),
  ],
)
def test_a_malformed_line(tmp_path, line, message):
  file = write(tmp_path / 'test.jsonl', GOOD, line)
  with pytest.raises(
    ValueError, match=rf'test.jsonl, line 2: .*{message}'
  ) as e:
    gsm8k.GSM8K(test_file=file, shots=0).examples('test')
  assert 'Expected: GSM8K' in str(e.value) and '#### 18' in str(e.value)


def test_missing_files(tmp_path):
  write(tmp_path / 'tests.jsonl', GOOD)
  with pytest.raises(
    ValueError, match=r'no file .*test.jsonl .*mean tests.jsonl\?.*grade-school'
  ):
    gsm8k.GSM8K(directory=str(tmp_path), shots=0).examples('test')
  with pytest.raises(ValueError, match='set GSM8K.directory, where'):
    gsm8k.GSM8K()
  with pytest.raises(ValueError, match=r'mgsm_fr.tsv .*mgsm_de.tsv'):
    mgsm('fr').examples('test')


@pytest.mark.parametrize(
  'line, message',
  [
    ('no answer', '1 columns between tabs'),
    ('q\t1\t2', '3 columns'),
    ('\t1', '2 columns between tabs, 1 with text'),
    ('q\tone', "the answer 'one' is no number"),
    ('q\t3/4', "the answer '3/4' is no number"),
  ],
)
def test_a_malformed_line_of_mgsm(tmp_path, line, message):
  write(tmp_path / 'mgsm_xx.tsv', 'q\t1', line)
  with pytest.raises(ValueError, match=rf'xx.tsv, line 2: {message}.*Expected'):
    mgsm('xx', directory=str(tmp_path)).examples('test')


@pytest.mark.parametrize(
  'make, settings, message',
  [
    (english, {'shots': -1}, 'GSM8K.shots = -1'),
    (english, {'decimal_mark': ';'}, "decimal_mark = ';'"),
    (english, {'template': 'Q {answer}.'}, r'must end with \{answer\}'),
    (mgsm, {'shots': 8}, 'MGSM.exemplars, the file'),
  ],
)
def test_plain_values_are_checked_at_once(make, settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)
