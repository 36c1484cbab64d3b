"""Which steps of a run are traced.

Run: pytest tests/profiling_test.py
"""

import pathlib

import jax
import pytest

from calm_jax import profiling


@pytest.fixture
def calls(monkeypatch):
  made = []

  def start(directory):
    assert directory == pathlib.Path('run') / 'profile'
    made.append('start')

  monkeypatch.setattr(jax.profiler, 'start_trace', start)
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: made.append('stop'))
  return made


def profiler(steps):
  return profiling.Profiler(pathlib.Path('run'), steps, 9)


@pytest.mark.parametrize(
  ('steps', 'numbers', 'expected'),
  [
    ((3, 4), range(1, 10), [1, 2, 'start', 3, 4, 'stop', 5, 6, 7, 8, 9]),
    ((1, 1), range(1, 4), ['start', 1, 'stop', 2, 3]),
    ((3, 9), range(1, 5), [1, 2, 'start', 3, 4, 'stop']),  # told to stop
    ((3, 4), range(4, 6), [4, 5]),  # continued after the first of them
    (None, range(1, 3), [1, 2]),
  ],
)
def test_the_named_steps_are_traced(calls, steps, numbers, expected):
  one = profiler(steps)
  for step in numbers:
    assert (
      one.run(step, lambda step: calls.append(step) or -step, step) == -step
    )
  one.close()
  assert calls == expected


@pytest.mark.parametrize('steps', [(0, 3), (4, 3), (3, 10)])
def test_steps_that_there_are_not_are_refused(steps):
  with pytest.raises(ValueError, match=r'profile_steps = .*TRAIN_STEPS = 9'):
    profiler(steps)
