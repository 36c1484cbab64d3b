"""Points of a sweep: their names, settings, records, and the page of them.

Run: pytest tests/sweep_test.py
"""

import json
import pathlib
import shutil

import pytest

from calm_jax import gin_setup, jobs, sweep
from tests import report_test

FILE = 'experiments/kv_quick_ablation.gin'
SUM, KEYS = report_test.SUM, report_test.KEYS


def test_a_grid_is_every_combination():
  grid = {
    'gin_file': ['ablations/early.gin', 'ablations/late.gin'],
    'CONNECTIONS': [1, 2],
    'StepConfig.z_loss': [0.0],
    'OPTIMIZER': ['@small/OptimizerConfig()'],
  }
  points = sweep.combine({}, grid)
  ending = 'z_loss=0.0,OPTIMIZER=OptimizerConfig'
  assert list(points) == [
    f'gin_file={place},CONNECTIONS={n},{ending}'
    for place in ('early', 'late')
    for n in (1, 2)
  ]
  assert points[f'gin_file=late,CONNECTIONS=2,{ending}'] == {
    'gin_file': 'ablations/late.gin',
    'CONNECTIONS': 2,
    'StepConfig.z_loss': 0.0,
    'OPTIMIZER': '@small/OptimizerConfig()',
  }


def test_points_times_a_grid():
  points = {'a b': {'X': 1}, 'c': {'X': 2, 'Y': 'z'}}
  assert sweep.combine(points, {'Z': [3, 4]}) == {
    'a_b,Z=3': {'X': 1, 'Z': 3},
    'a_b,Z=4': {'X': 1, 'Z': 4},
    'c,Z=3': {'X': 2, 'Y': 'z', 'Z': 3},
    'c,Z=4': {'X': 2, 'Y': 'z', 'Z': 4},
  }


@pytest.mark.parametrize(
  'points, grid, message',
  [
    ({}, {}, 'The sweep has no point: set sweep.points or sweep.grid'),
    ({}, {'A': 3}, "sweep.grid has 'A': 3; expected a list"),
    ({}, {'A': 'abc'}, "sweep.grid has 'A': 'abc'; expected a list"),
    ({}, {'A': []}, 'expected a list of values'),
    ({'p': {'A': 1}}, {'A': [1]}, r"both set \['A'\]"),
    ({}, {'A': ['@a/B()', '@c/B()']}, "would be called 'A=B'"),
    ({'p': {'RANDOM_SEED': 1}}, {}, 'RANDOM_SEED is varied by sweep.seeds'),
  ],
)
def test_what_is_no_sweep(points, grid, message):
  with pytest.raises(ValueError, match=message):
    sweep.combine(points, grid)


@pytest.fixture
def ran(monkeypatch):
  """Instead of running jobs, writes what they would leave; lists commands."""
  commands = []

  def run(chains, *, at_once):
    for chain in chains:
      for job in chain:
        if job.is_finished():
          continue
        commands.append(job.command[3:])
        run_dir = job.products[0].parent
        if job.command[2] == 'calm_jax.train':
          made = run_dir.parent / 'made'
          report_test.write_run(made, composed={SUM: 80.0, KEYS: 20.0})
          shutil.copytree(made, run_dir, dirs_exist_ok=True)
          shutil.rmtree(made)

  monkeypatch.setattr(jobs, 'run', run)
  return commands


def settings(tmp_path, **changes):
  return {
    'sweep_dir': str(tmp_path / 'sweep'),
    'gin_files': [FILE],
    'points': {'early': {'gin_file': 'ablations/early.gin', 'CONNECTIONS': 1}},
    'seeds': (3, 4),
    'evaluate_gin_files': ['experiments/kv_quick_evaluate_scratchpad.gin'],
    'configure': gin_setup.config_of,
    'compared_task': KEYS,
    'anchor_tasks': (SUM,),
    **changes,
  }


def test_every_run_has_its_flags_and_one_page_compares_them(tmp_path, ran):
  page = sweep.sweep(**settings(tmp_path))
  out = tmp_path / 'sweep'
  assert ran == [
    [
      f'--gin_file={FILE}',
      '--gin_file=ablations/early.gin',
      f"--gin.MODEL_DIR='{out}/early_seed{seed}'",
      '--gin.CONNECTIONS=1',
      f'--gin.RANDOM_SEED={seed}',
    ]
    for seed in (3, 4)
  ]
  assert page == out / 'report.html'
  text = report_test.Page(page.read_text())
  assert text.tables[0][1][1] == '80.0 ± 0.0 | n = 2'
  assert (out / 'results.md').read_text() == (
    f'| | {SUM}, exact_match | {KEYS}, exact_match |\n|---|---|---|\n'
    '| early | 80.0 ± 0.0 | 20.0 ± 0.0 |\n'
  )
  assert (out / 'results.csv').read_text().splitlines()[:3] == [
    'column,task,metric,run,value',
    f'early,{SUM},exact_match,0,80.0',
    f'early,{SUM},exact_match,1,80.0',
  ]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'seeds': (3, 3)}, r'seeds = \(3, 3\): give at least one, and none twice'),
    ({'seeds': ()}, 'give at least one'),
    ({'evaluate_gin_files': ()}, 'compared_task = .*no run would be evaluated'),
  ],
)
def test_settings_that_cannot_be_meant(changes, message, tmp_path, ran):
  with pytest.raises(ValueError, match=message):
    sweep.sweep(**settings(tmp_path, **changes))
  assert not ran


def test_a_setting_of_some_points_is_given_to_their_evaluations(tmp_path, ran):
  points = {
    'a': {'gin_file': 'ablations/early.gin', 'CONNECTIONS': 1},
    'b': {
      'gin_file': 'ablations/early.gin',
      'CONNECTIONS': 1,
      'AUGMENTING_WEIGHTS': 'random',
    },
  }
  given = []

  def configure(entry, *read):
    if entry == 'evaluate':
      given.append('AUGMENTING_WEIGHTS' in str(read))
    return gin_setup.config_of(entry, *read)

  sweep.sweep(
    **settings(
      tmp_path,
      points=points,
      seeds=(3,),
      evaluate_settings=('AUGMENTING_WEIGHTS',),
      configure=configure,
    )
  )
  assert given == [False, True]


def test_a_second_run_continues_and_other_settings_are_refused(tmp_path, ran):
  sweep.sweep(**settings(tmp_path))
  ran.clear()
  late = {'late': {'gin_file': 'ablations/late.gin', 'CONNECTIONS': 2}}
  points = settings(tmp_path)['points'] | late
  sweep.sweep(**settings(tmp_path, points=points))
  assert [flags[2][-11:] for flags in ran] == ["late_seed3'", "late_seed4'"]
  points['late']['CONNECTIONS'] = 3
  with pytest.raises(ValueError, match=r'late_seed3 .*\n- CONNEC.* 2\n\+ .* 3'):
    sweep.sweep(**settings(tmp_path, points=points))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'CONECTIONS': 1}, 'The macro CONECTIONS is set, and nothing'),
    ({'StepConfig.z_loss': 'x'}, "StepConfig.z_loss = 'x' has the wrong type"),
    ({'gin_file': 'ablations/none.gin'}, "'ablations/none.gin' was not found"),
  ],
)
def test_every_point_is_checked_before_any_runs(
  tmp_path, ran, changes, message
):
  wrong = {'gin_file': 'ablations/late.gin', **changes}
  points = settings(tmp_path)['points'] | {'wrong': wrong}
  with pytest.raises(ValueError, match=message):
    sweep.sweep(**settings(tmp_path, points=points))
  assert not ran and not (tmp_path / 'sweep').exists()


SWEEPS = sorted(
  (pathlib.Path(__file__).parent.parent / 'gin' / 'sweeps').glob('*.gin')
)


@pytest.mark.parametrize('file', SWEEPS, ids=lambda file: file.stem)
def test_the_points_of_shipped_sweeps_are_configured(file, tmp_path, ran):
  entry = gin_setup.configure(
    'sweep',
    gin_files=[f'sweeps/{file.name}'],
    bindings=[f"SWEEP_DIR = '{tmp_path}/out'"],
  )
  with pytest.raises(ValueError, match='is no evaluated task'):  # of toys
    entry(configure=gin_setup.config_of)
  records = list((tmp_path / 'out').glob('*/point.json'))
  assert len(records) == len(ran) > 1
  configs = {json.dumps(json.loads(one.read_text())) for one in records}
  assert len(configs) == len(records)
