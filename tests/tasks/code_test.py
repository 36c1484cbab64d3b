"""HumanEval and MBPP: formats, prompts, programs, pass@k, errors.

Run: pytest tests/tasks/code_test.py
"""

import dataclasses
import gzip
import inspect
import itertools
import json
import math
import pathlib

import pytest

from calm_jax import gin_setup, sandbox
from calm_jax.tasks import code

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tasks'
HUMANEVAL = FIXTURES / 'HumanEval.jsonl'
MBPP = FIXTURES / 'mbpp.jsonl'
TASKS = {
  'HumanEval': code.HumanEval(path=str(HUMANEVAL)),
  'MBPP': code.MBPP(path=str(MBPP)),
}


@pytest.fixture(params=TASKS)
def task(request):
  return TASKS[request.param]


def score(task, examples, outputs):
  """Scores texts: one of them, or a list, for each example."""
  predictions = [
    [
      task.prediction(one, example)
      for one in ([output] if isinstance(output, str) else output)
    ]
    for output, example in zip(outputs, examples, strict=True)
  ]
  return task.metrics(examples, json.loads(json.dumps(predictions)))


# --- Formats and prompts -----------------------------------------------------


def test_humaneval_is_read_packed_and_not(tmp_path):
  packed = tmp_path / 'HumanEval.jsonl.gz'
  packed.write_bytes(gzip.compress(HUMANEVAL.read_bytes()))
  examples = code.HumanEval(path=str(packed)).examples('test')
  assert examples == TASKS['HumanEval'].examples('test')
  rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
  assert [one['inputs'] for one in examples] == [r['prompt'] for r in rows]
  assert list(examples[0]) == [
    'inputs',
    'targets',
    'task_id',
    'entry_point',
    'test',
  ]


def test_the_program_of_humaneval_is_the_official_one():
  example = {'inputs': 'P', 'entry_point': 'f', 'test': 'T'}
  program = TASKS['HumanEval'].prediction('C', example)
  assert program == 'P' + 'C' + '\n' + 'T' + '\n' + 'check(f)'


def test_a_prompt_of_mbpp_is_exactly_this():
  example = TASKS['MBPP'].examples('test')[0]
  start = 'You are an expert Python programmer, and here is your task: '
  assert example['inputs'] == (
    f'{start}Write a function to double a number. Your code should pass these'
    ' tests:\n\nassert double(2) == 4\nassert double(0) == 0\n'
    'assert double(-1) == -2\n[BEGIN]\n'
    'def double(x):\n  return 2 * x\n[DONE]\n\n'
    f'{start}Write a function to join two strings with a space. Your code'
    " should pass these tests:\n\nassert join('a', 'b') == 'a b'\n"
    "assert join('', '') == ' '\nassert join('x', 'y z') == 'x y z'\n[BEGIN]\n"
    "def join(a, b):\n  return a + ' ' + b\n[DONE]\n\n"
    f'{start}Write a function to find the largest {{number}} of a list. Your'
    ' code should pass these tests:\n\nassert largest([1, 3, 2]) == 3\n'
    'assert largest([-1]) == -1\nassert largest([5, 5]) == 5\n[BEGIN]\n'
    'def largest(numbers):\n  top = numbers[0]\n  for number in numbers:\n'
    '    if number > top:\n      top = number\n  return top\n[DONE]\n\n'
    f'{start}Write a python function to count the vowels in a string. Your code'
    " should pass these tests:\n\nassert vowels('banana') == 3\n"
    "assert vowels('xyz') == 0\nassert vowels('') == 0\n[BEGIN]\n"
  )
  assert example['targets'] == (
    "def vowels(text):\n  return sum(one in 'aeiou' for one in text)"
  )


def test_fewer_shots_of_mbpp():
  def prompt(shots):
    task = code.MBPP(path=str(MBPP), shots=shots)
    return task.examples('test')[0]['inputs']

  assert [prompt(shots).count('[DONE]') for shots in range(4)] == [0, 1, 2, 3]
  assert prompt(3).startswith(prompt(2).removesuffix(prompt(0)))


@pytest.mark.parametrize(
  'split, ids',
  [
    ('prompt', [2, 3, 4]),
    ('test', [11, 12, 510]),
    ('validation', [511]),
    ('train', [601, 974]),
  ],
)
def test_the_splits_of_mbpp_are_the_published_ones(split, ids):
  examples = TASKS['MBPP'].examples(split)
  assert [example['task_id'] for example in examples] == ids


def test_the_contract_of_a_task(task):
  assert dataclasses.replace(task) == task
  assert task.name in ('humaneval', 'mbpp')
  assert task.max_new_tokens > 0
  assert all(isinstance(one, str) for one in (*task.stop, *task.splits))
  for split in task.splits:
    for example in task.examples(split):
      assert json.loads(json.dumps(example)) == example
      assert not any(stop in example['targets'] for stop in task.stop)


# --- Scores ------------------------------------------------------------------


def test_the_canonical_solutions_pass(task):
  for split in task.splits:
    examples = task.examples(split)
    outputs = [example['targets'] for example in examples]
    assert score(task, examples, outputs) == {'pass@1': 100.0}


@pytest.mark.parametrize(
  'wrong',
  [
    '    return None\n',
    '    raise SystemExit(0)\n',
    '    import os; os._exit(0)\n',
    '    return "\n',
    '',
    'import sys; sys.exit(0)\n',
  ],
)
def test_wrong_answers_do_not_pass(task, wrong):
  examples = task.examples('test')
  outputs = [wrong] * len(examples)
  assert score(task, examples, outputs) == {'pass@1': 0.0}


def test_the_set_up_of_the_tests_comes_after_the_answer():
  task = TASKS['MBPP']
  example = task.examples('test')[1]
  assert example['setup'] == 'chain = Node(1, Node(2, Node(3)))'
  program = task.prediction(example['targets'], example)
  lines = program.split('\n')
  assert lines[-4:] == [example['setup'], *example['tests'].split('\n')]
  assert score(task, [example], [example['targets']]) == {'pass@1': 100.0}


def test_pass_at_k_of_several_samples(task):
  task = dataclasses.replace(task, ks=(2, 3))
  examples = task.examples('test')
  right = [example['targets'] for example in examples]
  wrong = 'raise ValueError'
  outputs = [
    [right[0], wrong, right[0]],
    [wrong, wrong, right[1]],
    [wrong, wrong, wrong],
  ]
  assert score(task, examples, outputs) == {
    'pass@1': pytest.approx(100 * (2 / 3 + 1 / 3 + 0) / 3),
    'pass@2': pytest.approx(100 * (1 + 2 / 3 + 0) / 3),
    'pass@3': pytest.approx(100 * 2 / 3),
  }


def test_pass_at_k_by_counting():
  """Against every way to draw k of the n samples."""
  for n, k in itertools.product(range(1, 8), range(1, 8)):
    for c in range(n + 1) if k <= n else ():
      draws = list(itertools.combinations(range(n), k))
      good = sum(any(one < c for one in draw) for draw in draws)
      assert code.pass_at_k(n, c, k) == pytest.approx(good / len(draws))


@pytest.mark.parametrize(
  'n, c, k, expected',
  [
    (1, 1, 1, 1.0),
    (1, 0, 1, 0.0),
    (10, 3, 1, 0.3),
    (10, 3, 5, 1 - 21 / 252),
    (200, 10, 100, 1 - math.comb(190, 100) / math.comb(200, 100)),
    (200, 101, 100, 1.0),
  ],
)
def test_worked_examples_of_pass_at_k(n, c, k, expected):
  assert code.pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
  'n, c, k', [(1, 2, 1), (1, -1, 1), (5, 1, 6), (5, 1, 0)]
)
def test_what_pass_at_k_refuses(n, c, k):
  with pytest.raises(ValueError, match=f'pass@{k} of {n} samples'):
    code.pass_at_k(n, c, k)


def test_more_k_than_samples(task):
  task = dataclasses.replace(task, ks=(1, 10))
  examples = task.examples('test')[:2]
  name = type(task).__name__
  with pytest.raises(ValueError, match=f'{name}.ks has 10, .* 2 samples'):
    task.metrics(examples, [['pass'] * 2, ['pass'] * 10])


def test_what_cannot_be_scored_is_told_before_anything_is_decoded(
  task, monkeypatch
):
  task.check(1)
  many = dataclasses.replace(task, ks=(1, 10))
  with pytest.raises(ValueError, match='ks has 10, and a problem has 5 sample'):
    many.check(5)
  many.check(10)

  def refuse(programs, settings):
    raise ValueError('cannot be isolated')

  monkeypatch.setattr(sandbox, 'run_all', refuse)
  with pytest.raises(ValueError, match='cannot be isolated'):
    task.check(1)


def test_the_settings_of_the_sandbox_reach_it(monkeypatch):
  given = []
  monkeypatch.setattr(
    sandbox,
    'run_all',
    lambda programs, settings: [
      given.append(settings) or sandbox.Result(True, 'passed', '')
      for _ in programs
    ],
  )
  settings = sandbox.Sandbox(seconds=1.5)
  task = code.HumanEval(path=str(HUMANEVAL), sandbox=settings)
  assert task.metrics([{}], [['pass']]) == {'pass@1': 100.0}
  assert given == [settings]
  assert TASKS['MBPP'].sandbox.seconds == 3.0


# --- Errors ------------------------------------------------------------------


def broken(tmp_path, task, line, **changes):
  """Returns the task with a copy of its file, one line of it changed."""
  lines = pathlib.Path(task.path).read_text().splitlines()
  row = json.loads(lines[line - 1])
  row = {k: v for k, v in (row | changes).items() if v is not None}
  lines[line - 1] = json.dumps(row)
  file = tmp_path / 'broken.jsonl'
  file.write_text('\n'.join(lines) + '\n')
  return dataclasses.replace(task, path=str(file))


@pytest.mark.parametrize(
  'name, changes, problem',
  [
    ('HumanEval', {'entry_point': None}, "no 'entry_point'"),
    ('HumanEval', {'prompt': 3}, "'prompt' is 3"),
    ('HumanEval', {'task_id': 'HumanEval/0'}, "'HumanEval/0' was already in"),
    ('MBPP', {'test_list': 'assert 1'}, "'test_list' is 'assert 1'"),
    ('MBPP', {'test_list': [1]}, "'test_list' is not a list of texts"),
    ('MBPP', {'task_id': 2}, 'task_id 2 was already in line 1'),
    ('MBPP', {'code': None}, "no 'code'"),
  ],
)
def test_a_malformed_line_is_named(tmp_path, name, changes, problem):
  task = broken(tmp_path, TASKS[name], 3, **changes)
  with pytest.raises(ValueError) as error:
    task.examples('test')
  assert f'{task.path}, line 3: ' in str(error.value)
  assert problem in str(error.value)
  assert f"Expected: {name}'s JSON lines" in str(error.value)


def test_what_is_no_json(tmp_path, task):
  file = tmp_path / 'file.jsonl'
  file.write_text(pathlib.Path(task.path).read_text() + '{"task_id"\n')
  lines = len(file.read_text().splitlines())
  with pytest.raises(ValueError, match=f'line {lines}: not JSON'):
    dataclasses.replace(task, path=str(file)).examples('test')


@pytest.mark.parametrize(
  'content',
  [b'no gzip', gzip.compress(b'{}' * 99, mtime=0)[:-9]],
  ids=['none', 'cut'],  # the same for every process that collects
)
def test_a_broken_archive(tmp_path, task, content):
  file = tmp_path / 'file.jsonl.gz'
  file.write_bytes(content)
  with pytest.raises(ValueError, match='file.jsonl.gz cannot be unpacked'):
    dataclasses.replace(task, path=str(file)).examples('test')


def test_a_missing_file_says_where_to_get_it(task, tmp_path):
  task = dataclasses.replace(task, path=str(tmp_path / 'none.jsonl'))
  with pytest.raises(
    ValueError, match='There is no file .*none.jsonl'
  ) as error:
    task.examples('test')
  source = {'humaneval': 'openai/human-eval', 'mbpp': 'google-research/'}
  assert source[task.name] in str(error.value)


def test_an_empty_file(task, tmp_path):
  file = tmp_path / 'empty.jsonl'
  file.touch()
  with pytest.raises(ValueError, match='empty.jsonl is empty'):
    dataclasses.replace(task, path=str(file)).examples('test')


def test_solved_examples_are_not_tested_beside_themselves():
  task = code.MBPP(path=str(MBPP), called='mbpp_published')
  assert task.name == 'mbpp_published'
  tested = {one['task_id']: one for one in task.examples('prompt')}
  counts = {n: one['inputs'].count('[DONE]') for n, one in tested.items()}
  assert counts[2] == counts[3] == counts[4] == 2
  assert all(one['targets'] not in one['inputs'] for one in tested.values())


def test_a_file_without_the_examples_of_the_prompt(tmp_path):
  file = tmp_path / 'mbpp.jsonl'
  file.write_text(''.join(MBPP.read_text().splitlines(keepends=True)[2:6]))
  task = code.MBPP(path=str(file))
  with pytest.raises(ValueError, match=r'task ids \[2, 3\] of the prompt'):
    task.examples('test')
  task = code.MBPP(path=str(file), shots=0)
  assert len(task.examples('test')) == 3
  with pytest.raises(ValueError, match="split 'train', 601 to 974"):
    task.examples('train')


def test_what_tasks_refuse(task):
  with pytest.raises(ValueError, match='no split .*dev.*; choose among'):
    task.examples('dev')
  with pytest.raises(ValueError, match=r'ks = \(0,\): each must be at least 1'):
    dataclasses.replace(task, ks=(0,))
  with pytest.raises(ValueError, match='MBPP.shots = 4: .* 0 to 3'):
    code.MBPP(path='mbpp.jsonl', shots=4)


def test_gin_can_name_them():
  gin_setup.register()
  for name in ('HumanEval', 'MBPP', 'Sandbox'):
    made = gin_setup.gin.get_configurable(name)
    assert inspect.isclass(made)
  gin_setup.gin.parse_config(
    """
    MBPP.path = 'mbpp.jsonl'
    MBPP.ks = (1, 10)
    MBPP.sandbox = @Sandbox()
    Sandbox.seconds = 10.0
    """
  )
  task = gin_setup.gin.get_configurable('MBPP')()
  assert task.ks == (1, 10)
  assert task.sandbox.seconds == 10.0
