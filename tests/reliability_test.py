"""The series of tests/reliability.py with small numbers.

Run: pytest tests/reliability_test.py
"""

import pytest

from tests import reliability

pytestmark = [pytest.mark.entry, pytest.mark.slow]

SMALL = {
  'kills': {'count': 2},
  'stops': {'steps': (1, 2, 13, 30)},
  'sigterm': {'count': 1},
  'bits': {'count': 15},
  'composition_bits': {'count': 40},
  'soak': {'steps': 600},
  'topologies': {},
  'meshes': {'names': ('4 devices', '2 processes')},
  'sigterm_of_one': {},
  'damage_seen_by_two': {},
  'damage_seen_by_one': {},
  'peers': {},
  'divergence': {},
}


@pytest.mark.parametrize('name', SMALL)
def test_a_promise_is_kept(name, tmp_path):
  print(reliability.SERIES[name](tmp_path, **SMALL[name]))


def test_no_series_is_forgotten():
  # Files that are cut or lost: tests/checkpoints_test.py has all of it.
  assert {*SMALL, 'files'} == set(reliability.SERIES)


def test_a_run_that_ends_otherwise_is_noticed(tmp_path):
  """Of the tools themselves: a comparison that finds no difference is none."""
  short = {'train_steps': 2, 'checkpoint_every': 1}
  reliability.toy_run.run(tmp_path / 'one', **short)
  reliability.toy_run.run(tmp_path / 'other', **short, random_seed=1)
  expected = reliability.toy_run.result_of(tmp_path / 'one')
  reliability.compare(tmp_path / 'one', expected)
  with pytest.raises(reliability.BrokenError, match='another composition'):
    reliability.compare(tmp_path / 'other', expected)
