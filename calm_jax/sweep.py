"""Trains and evaluates one experiment at many points, and compares them.

  python -m calm_jax.sweep --gin_file=sweeps/kv_quick_mapping.gin \
      --gin.SWEEP_DIR="'runs/mapping'"

A point is a run of its own, with bindings of its own. Run again, a sweep
continues: what is finished is not run again.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import difflib
import itertools
import json
import pathlib
import re
from typing import Any

from calm_jax import jobs, report, run_files
from calm_jax.models import weight_files
from calm_jax.reporting import runs, scores

SEED = 'RANDOM_SEED'
GIN_FILE = 'gin_file'
RECORD = 'point.json'
_UNSAFE = re.compile(r'[^\w.,=+-]+')

# A point's settings: values by the name of a macro or binding, or gin files.
Settings = Mapping[str, Any]


def sweep(
  *,
  sweep_dir: str,
  gin_files: Sequence[str],
  points: Mapping[str, Settings] | None = None,
  grid: Mapping[str, Sequence[Any]] | None = None,
  seeds: Sequence[int] = (0,),
  evaluate_gin_files: Sequence[str] = (),
  evaluate_settings: Sequence[str] = (),
  at_once: int | None = 1,
  launcher: Sequence[str] = (),
  title: str = 'Sweep',
  metrics: Mapping[str, str] | None = None,
  anchor_tasks: Sequence[str] = (),
  compared_task: str | None = None,
  configure: Callable[..., str] | None = None,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> pathlib.Path:
  """Runs every point for every seed, and writes a page that compares them.

  Args:
    sweep_dir: where to; a run's MODEL_DIR is the folder <point>_seed<n> in it.
    gin_files: of the training, common to all points.
    points: settings by a point's name. A setting is a macro or a binding with
      its value, or `gin_file` with a file (or several) read after the common
      ones. A text that begins with @ or % is a reference, as in a gin file.
    grid: values by setting. Every combination is a point, of each of `points`
      if there are any.
    seeds: RANDOM_SEED of the runs of each point.
    evaluate_gin_files: of the evaluation of each run; none if empty.
    evaluate_settings: names of settings that the evaluation takes too, such as
      'AUGMENTING_PATH'; how a run was trained it finds in MODEL_DIR.
    at_once: how many runs side by side; None is one on each core.
    launcher: what runs an entry point elsewhere, given its name and flags,
      such as ('bash', 'launch/run.sh', 'slurm'); here if empty.
    title: of the page.
    metrics: as in `report`.
    anchor_tasks: as in `report`.
    compared_task: the 'task/split' by which connections are compared.
    configure: returns what gin files and bindings configure, or raises
      ValueError; called for all points before any of them runs.
    summarize_config: writes the operative configuration into a directory.

  Returns:
    The page; `results.md` and `results.csv` beside it have its table.

  Raises:
    ValueError: if a configuration is wrong, or a folder holds a run of other
      settings, before anything has run; or if a run has failed.
  """
  _check(seeds, compared_task, evaluate_gin_files)
  directory = pathlib.Path(sweep_dir).expanduser()
  columns, chains, records = collections.defaultdict(list), [], {}
  for name, settings in combine(points or {}, grid or {}).items():
    for seed in seeds:
      run_dir = directory / f'{name}_seed{seed}'
      columns[name].append(str(run_dir))
      chosen = {**settings, SEED: seed}
      taken = {k: chosen[k] for k in (*evaluate_settings, SEED) if k in chosen}
      parts = [('train', gin_files, chosen)]
      if evaluate_gin_files:
        parts.append(('evaluate', evaluate_gin_files, taken))
      if configure is not None:
        records[run_dir] = {
          entry: configure(entry, *_read(*read, 'MODEL_DIR')).splitlines()
          for entry, *read in parts
        }
      chains.append([_job(run_dir, *part, launcher=launcher) for part in parts])
  _keep_records(records)
  if summarize_config is not None:
    summarize_config(directory)
  jobs.run(chains, at_once=at_once)
  return _compare(
    directory,
    columns,
    title=title,
    metrics=metrics,
    anchor_tasks=anchor_tasks,
    ablation_task=compared_task,
  )


def _check(
  seeds: Sequence[int],
  compared_task: str | None,
  evaluate_gin_files: Sequence[str],
) -> None:
  """Raises ValueError for settings of a sweep that cannot be meant."""
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(
      f'sweep.seeds = {tuple(seeds)}: give at least one, and none twice.'
    )
  if compared_task and not evaluate_gin_files:
    raise ValueError(
      f'sweep.compared_task = {compared_task!r}, and no run would be evaluated:'
      ' set sweep.evaluate_gin_files, or leave it out.'
    )


def combine(
  points: Mapping[str, Settings], grid: Mapping[str, Sequence[Any]]
) -> dict[str, Settings]:
  """Returns the settings of every point by its name.

  Raises:
    ValueError: if there is none, or two would have one name.
  """
  for name, values in grid.items():
    if not isinstance(values, list | tuple) or not values:
      raise ValueError(
        f'sweep.grid has {name!r}: {values!r}; expected a list of values.'
      )
  found: dict[str, Settings] = {}
  for point, fixed in (points or {'': {}}).items():
    for values in itertools.product(*grid.values()):
      varied = dict(zip(grid, values, strict=True))
      parts = [point, *(f'{_short(k)}={_short(v)}' for k, v in varied.items())]
      name = _UNSAFE.sub('_', ','.join(filter(None, parts)))
      twice = sorted(fixed.keys() & varied.keys())
      if twice or name in found:
        raise ValueError(
          f'sweep.points[{point!r}] and sweep.grid both set {twice}.'
          if twice
          else f'Two points of the sweep would be called {name!r}. Give points'
          ' of your own names (sweep.points), or values that differ in their'
          ' last parts.'
        )
      found[name] = {**fixed, **varied}
  if list(found) == ['']:
    raise ValueError(
      'The sweep has no point: set sweep.points or sweep.grid, as in'
      " {'LEARNING_RATE': [1e-3, 3e-3]}."
    )
  if any(SEED in settings for settings in found.values()):
    raise ValueError(f'{SEED} is varied by sweep.seeds, not by a point.')
  return found


def _short(value: Any) -> str:
  """Returns the part of a name or value that tells it from its neighbours."""
  text = str(value)
  if text.endswith('.gin'):
    return pathlib.PurePath(text).stem
  reference = text.startswith(('@', '%'))
  is_name = text.replace('.', '').replace('/', '').isidentifier()
  if reference or is_name:
    return re.split(r'[./@%]', text.removesuffix('()'))[-1]
  return text


def _read(
  gin_files: Sequence[str], settings: Settings, model_dir: str
) -> tuple[list[str], list[str]]:
  """Returns the gin files, and the bindings as 'NAME = value'."""
  files, bindings = list(gin_files), [f'MODEL_DIR = {model_dir!r}']
  for name, value in settings.items():
    if name == GIN_FILE:
      files += [value] if isinstance(value, str) else value
    elif isinstance(value, str) and value.startswith(('@', '%')):
      bindings.append(f'{name} = {value}')
    else:
      bindings.append(f'{name} = {value!r}')
  return files, bindings


def _job(
  run_dir: pathlib.Path,
  entry: str,
  gin_files: Sequence[str],
  settings: Settings,
  *,
  launcher: Sequence[str],
) -> jobs.Job:
  """Returns the job of an entry point; its product is what it writes last."""
  files, bindings = _read(gin_files, settings, str(run_dir))
  flags = [
    *(f'--gin_file={file}' for file in files),
    *(f'--gin.{binding.replace(" = ", "=", 1)}' for binding in bindings),
  ]
  products = {
    'evaluate': [run_dir / 'eval' / 'results.json'],
    'train': [  # whatever is trained
      run_dir / run_files.WEIGHTS_FILE,
      run_dir / run_files.LORA_FILE,
      run_dir / 'model' / weight_files.WEIGHTS_FILE,
      run_dir / 'model' / weight_files.INDEX_FILE,
    ],
  }[entry]
  return jobs.Job(
    entry, flags, products=products, name=run_dir.name, launcher=launcher
  )


def _keep_records(records: Mapping[pathlib.Path, Mapping[str, Any]]) -> None:
  """Writes what each run is configured to do; refuses what has changed."""
  for run_dir, record in records.items():
    file = run_dir / RECORD
    before = json.loads(file.read_text()) if file.exists() else record
    if before == record:
      continue
    changed = [
      line
      for entry in record
      for line in difflib.ndiff(before.get(entry, []), record[entry])
      if line.startswith(('- ', '+ '))
    ]
    raise ValueError(
      f'{run_dir} holds a run of other settings:\n'
      + '\n'.join(changed[:6])
      + '\nGive another SWEEP_DIR, rename the point, or remove that folder.'
    )
  for run_dir, record in records.items():
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / RECORD).write_text(json.dumps(record, indent=2) + '\n')


def _compare(
  directory: pathlib.Path, columns: Mapping[str, Sequence[str]], **settings: Any
) -> pathlib.Path:
  """Writes the page, and prints its table."""
  found = runs.read_columns(columns, setting='sweep')
  evaluated = {
    system for each in found.values() for run in each for system in run.results
  }
  page = report.report(
    output_dir=str(directory),
    columns=columns,
    plain={k: v for k, v in report.PLAIN.items() if v in evaluated},
    ablations={
      k: columns[k] for k, each in found.items() if each[0].connections
    },
    **settings,
  )
  print((directory / scores.TABLE_FILE).read_text())
  return page


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('sweep')
