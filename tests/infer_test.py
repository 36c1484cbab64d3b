"""Prompts from JSON lines, answers to JSON lines.

Run: pytest tests/infer_test.py
"""

import io
import json
import sys

import pytest

from calm_jax import evaluate, infer, sampling, scoring
from calm_jax.generation import Continuation

NUM = 1


class Echo:
  """Stands in for a model: answers each prompt with itself, backwards."""

  def __init__(self):
    self.calls, self.seeds = [], []

  def decode(self, prompts, *, max_new_tokens, batch_size, seeds, **how):
    self.calls.append((len(prompts), max_new_tokens, batch_size))
    self.seeds = [*self.seeds, *seeds]
    self.how = how
    return [
      [Continuation(prompt[::-1] + '!' * n, [1, 2], True) for n in range(NUM)]
      for prompt in prompts
    ]

  def score(self, prompts, targets, *, batch_size):
    assert len(prompts) <= batch_size
    return [
      scoring.Score(-float(len(text)), len(text), text > prompt)
      for prompt, text in zip(prompts, targets, strict=True)
    ]


@pytest.fixture
def echo(monkeypatch):
  model = Echo()

  def load_systems(*, systems, **_):
    return dict.fromkeys(systems, model)

  monkeypatch.setattr(evaluate, 'load_systems', load_systems)
  return model


def run(source, target='-', **settings):
  return infer.infer(
    model_dir='/nowhere',
    anchor=None,
    input_file=str(source),
    output_file=str(target),
    max_new_tokens=5,
    batch_size=2,
    **settings,
  )


def test_lines_in_lines_out(echo, tmp_path):
  rows = [{'inputs': f'p{i} é', 'id': i} for i in range(5)]
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  lines = [json.dumps(row) for row in rows]
  source.write_text('\n\n'.join(lines) + '\n')  # blank lines are skipped
  assert run(source, target) == 5
  read = [json.loads(line) for line in target.read_text().splitlines()]
  assert read == [{**row, 'prediction': row['inputs'][::-1]} for row in rows]
  assert 'é' in target.read_text()
  assert echo.calls == [(2, 5, 2), (2, 5, 2), (1, 5, 2)]


def test_standard_input_and_output(echo, monkeypatch, capsys):
  stdin = io.TextIOWrapper(io.BytesIO(b'{"inputs": "abc"}\n'))
  monkeypatch.setattr(sys, 'stdin', stdin)
  assert run('-') == 1
  assert json.loads(capsys.readouterr().out) == {
    'inputs': 'abc',
    'prediction': 'cba',
  }


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"inputs": ', 'Line 3 is not JSON'),
    ('["abc"]', 'Line 3 must be an object with a text "inputs"'),
    ('{"prompt": "abc"}', 'Line 3 must be an object'),
    ('{"inputs": 3}', 'Line 3 must be an object'),
    (r'{"inputs": "a\ud800"}', 'Line 3 holds half of a surrogate pair'),
    (b'{"inputs": "\xff"}', "Line 3 cannot be read: 'utf-8' codec can't"),
    ('{"inputs": "a", "n": 1' + '0' * 5000 + '}', 'Line 3 cannot be read: Exc'),
    ('[' * 100_000, 'Line 3 cannot be read: maximum recursion'),
  ],
  ids=range(8),
)
def test_a_wrong_line_is_named(line, message, echo, tmp_path):
  source = tmp_path / 'in.jsonl'
  line = line if isinstance(line, bytes) else line.encode()
  source.write_bytes(b'{"inputs": "a"}\n\n' + line + b'\n')
  with pytest.raises(ValueError, match=message):
    run(source, tmp_path / 'out.jsonl')


def test_rows_that_the_model_refuses_are_named(echo, tmp_path, monkeypatch):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  source.write_text('{"inputs": "a"}\n' * 3 + '{"inputs": ""}\n')
  decode = type(echo).decode

  def refuse(self, prompts, **how):
    if not all(prompts):
      raise ValueError('A prompt is empty')
    return decode(self, prompts, **how)

  monkeypatch.setattr(type(echo), 'decode', refuse)
  with pytest.raises(ValueError, match='In the rows 3 to 4: A prompt is empty'):
    run(source, target)
  assert len(target.read_text().splitlines()) == 2


def test_an_empty_target_is_named_before_a_model_is_loaded(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluate, 'load_systems', lambda **_: 1 / 0)
  monkeypatch.setenv('HOME', str(tmp_path))
  rows = [{'inputs': 'a', 'targets': 'b'}, {'inputs': 'a', 'targets': ''}]
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  with pytest.raises(ValueError, match='Line 2 has empty "targets"'):
    run('~/in.jsonl', mode='score')


def test_a_mark_of_byte_order_is_no_text(echo, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  source.write_bytes(b'\xef\xbb\xbf{"inputs": "ab"}\r\n')
  assert run(source, target) == 1
  assert json.loads(target.read_text())['prediction'] == 'ba'


def test_files_that_cannot_be_are_named_before_a_model_is_loaded(
  echo, tmp_path, monkeypatch
):
  monkeypatch.setattr(evaluate, 'load_systems', lambda **_: 1 / 0)
  source = tmp_path / 'in.jsonl'
  text = '{"inputs": "a"}\n{"inputs": "b"}\n{"inputs": "c"}'
  source.write_text(text)
  link = tmp_path / 'link'
  link.symlink_to(source)
  for target, message in (
    (source, 'are both .*in.jsonl'),
    (link, 'are both .*link'),
    (tmp_path, 'is a folder'),
    (tmp_path / 'no' / 'out', 'is in no folder'),
  ):
    with pytest.raises(ValueError, match=message):
      run(source, target)
    assert source.read_text() == text
  with pytest.raises(ValueError, match='input_file = .* is a folder'):
    run(tmp_path)
  with pytest.raises(ValueError, match='batch_size = 0: it must be at least 1'):
    infer.infer(
      model_dir='/nowhere', anchor=None, input_file=str(source), batch_size=0
    )


def test_a_copy_of_the_input_is_no_answer(echo, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source, targets='t')
  target.write_bytes(source.read_bytes())
  before = target.read_bytes()
  for settings in ({}, {'mode': 'score'}):
    with pytest.raises(ValueError, match='its line 1 is no answer'):
      run(source, target, **settings)
  assert target.read_bytes() == before
  target.unlink()
  run(source, target, mode='score')
  with pytest.raises(
    ValueError, match="line 1 is no answer .*mode = 'predict'"
  ):
    run(source, target)
  many = sampling.DecodingConfig(temperature=1.0, num_samples=2)
  target.unlink()
  run(source, target)
  with pytest.raises(ValueError, match='line 1 is no answer .*samples = 2'):
    run(source, target, decoding=many)


def test_an_input_that_was_answered_before_is_continued_too(echo, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source, prediction='old', num_tokens=3)
  run(source, target)
  whole = target.read_bytes()
  target.write_bytes(whole[:100])
  run(source, target)
  assert target.read_bytes() == whole
  assert b'old' not in whole and b'"num_tokens": 3' in whole


def test_a_missing_file_is_named_before_a_model_is_loaded(echo, monkeypatch):
  monkeypatch.setattr(evaluate, 'load_systems', lambda **_: 1 / 0)
  with pytest.raises(
    ValueError, match="input_file = '/no.jsonl' does not exis"
  ):
    run('/no.jsonl')


def write_rows(path, count=7, **more):
  rows = [{'inputs': f'p{i}', **more} for i in range(count)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return rows


@pytest.mark.parametrize('kept', [0, 1, 40, 41, 90, 10_000])
def test_an_interrupted_run_is_continued(kept, echo, tmp_path, capsys):
  """Cut at any byte: no row is repeated, and none is lost."""
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source)
  assert run(source, target) == 7
  whole = target.read_bytes()
  assert echo.seeds == [*range(7)]
  target.write_bytes(whole[:kept])
  rows = whole[:kept].count(b'\n')
  assert run(source, target) == 7 - rows
  assert target.read_bytes() == whole
  assert echo.seeds == [*range(7), *range(rows, 7)]
  shown = capsys.readouterr().err
  assert f'holds {rows} answers, and is continued; to begin anew' in shown
  assert '7/7 rows, ' in shown
  assert 'tokens/s' in shown


def test_answers_to_other_rows_are_not_continued(echo, monkeypatch, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source, 3)
  run(source, target)
  whole = target.read_bytes()
  write_rows(source, 3, id=5)
  monkeypatch.setattr(evaluate, 'load_systems', lambda **_: 1 / 0)
  with pytest.raises(ValueError, match='its line 1 is no answer to that row'):
    run(source, target)
  write_rows(source, 2)
  with pytest.raises(ValueError, match='its line 3 is no answer to that row'):
    run(source, target)
  with pytest.raises(ValueError, match='exists. A file can be continued if th'):
    run('-', target)
  assert target.read_bytes() == whole


def test_samples_and_settings(echo, monkeypatch, tmp_path):
  monkeypatch.setattr(f'{__name__}.NUM', 2)
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source, 1)
  drawn = sampling.DecodingConfig(temperature=0.5, num_samples=2)
  run(source, target, decoding=drawn, stop=('x',))
  row = json.loads(target.read_text())
  assert row == {'inputs': 'p0', 'predictions': ['0p', '0p!']}
  assert echo.how == {'config': drawn, 'stop': ('x',)}


def test_scores(echo, tmp_path):
  source, target = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
  write_rows(source, 3, targets='q')
  assert run(source, target, mode='score') == 3
  assert json.loads(target.read_text().splitlines()[1]) == {
    'inputs': 'p1',
    'targets': 'q',
    'log_likelihood': -1.0,
    'num_tokens': 1,
    'is_greedy': True,
  }
  write_rows(source, 3)
  with pytest.raises(ValueError, match='Line 1 must be an object with a te'):
    run(source, tmp_path / 'new.jsonl', mode='score')
