"""Prompts from JSON lines, answers to JSON lines.

Run: pytest tests/infer_test.py
"""

import io
import json
import sys

import pytest

from calm_jax import evaluate, infer


class Echo:
  """Stands in for a model: answers each prompt with itself, backwards."""

  def __init__(self):
    self.calls = []

  def generate(self, prompts, *, max_new_tokens, batch_size):
    self.calls.append((len(prompts), max_new_tokens, batch_size))
    return [prompt[::-1] for prompt in prompts]


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
  monkeypatch.setattr(sys, 'stdin', io.StringIO('{"inputs": "abc"}\n'))
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
  ],
)
def test_a_wrong_line_is_named(line, message, echo, tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_text(f'{{"inputs": "a"}}\n\n{line}\n')
  with pytest.raises(ValueError, match=message):
    run(source, tmp_path / 'out.jsonl')


def test_a_missing_file_is_named_before_a_model_is_loaded(echo, monkeypatch):
  monkeypatch.setattr(evaluate, 'load_systems', lambda **_: 1 / 0)
  with pytest.raises(
    ValueError, match="input_file = '/no.jsonl' does not exis"
  ):
    run('/no.jsonl')
