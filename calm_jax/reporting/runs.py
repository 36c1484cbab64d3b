"""What a finished run has left in its directory, as far as it is there."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import statistics
from typing import Any

from calm_jax import run_files, trees
from calm_jax.connections import Connection
from calm_jax.models import directories, weight_files

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, read.

  Attributes:
    directory: its MODEL_DIR.
    system: what it trained, by the name that `calm_jax.evaluate` has for it:
      'composed', 'lora' or 'finetuned'.
    rows: those of metrics.jsonl that tell of training.
    results: of eval/results.json: metrics by system and 'task/split'.
    connections: of a composition.
    rank: of LoRA.
    trained_params: how many parameters were trained; None if not written yet.
    config: its config.gin, or None.
    gaps: what is missing, in sentences.
  """

  directory: pathlib.Path
  system: str
  rows: tuple[Mapping[str, Any], ...]
  results: Results
  connections: tuple[Connection, ...]
  rank: int | None
  trained_params: int | None
  config: str | None
  gaps: tuple[str, ...]

  def curve(self) -> tuple[list[int], list[float]]:
    """Returns the logged steps, and the training loss at each."""
    steps = [row['step'] for row in self.rows]
    return steps, [row['train/loss'] for row in self.rows]

  def rate(self, name: str) -> float | None:
    """Returns the median of what was logged as 'train/<name>', or None."""
    values = [r[f'train/{name}'] for r in self.rows if f'train/{name}' in r]
    return statistics.median(values) if values else None


def read_run(directory: str, *, column: str) -> Run:
  """Reads one run.

  Args:
    directory: its MODEL_DIR.
    column: what it is called in the report, for errors.

  Raises:
    ValueError: if it is no run, or a file of it is broken; what is merely
      missing is listed in `gaps`.
  """
  path = pathlib.Path(directory).expanduser()
  if not path.is_dir():
    raise ValueError(
      f'{column!r} names the run {directory!r}, and there is no such directory.'
      ' Give the MODEL_DIR of a training run.'
    )
  config = path / run_files.CONFIG_FILE
  content = directories.read_json(config) if config.is_file() else {}
  known = [config, path / 'model', path / 'metrics.jsonl']
  if not any(file.exists() for file in known):
    raise ValueError(
      f'{column!r} names the run {directory!r}, which holds none of'
      f' {[file.name for file in known]}. Give the MODEL_DIR of a training run.'
    )
  system, connections, rank = 'finetuned', (), None
  if 'composition' in content:
    system = 'composed'
    connections = run_files.read_config(path)[0].mapping.connections
  elif 'lora' in content:
    system, rank = 'lora', run_files.read_lora(path)[0].rank
  gaps: list[str] = []
  gin = path / 'config.gin'
  rows = _read_rows(path / 'metrics.jsonl', gaps)
  return Run(
    directory=path,
    system=system,
    rows=tuple(row for row in rows if 'train/loss' in row),
    results=_read_results(path / 'eval' / 'results.json', gaps),
    connections=connections,
    rank=rank,
    trained_params=_count(path, system, gaps),
    config=gin.read_text() if gin.is_file() else None,
    gaps=tuple(gaps),
  )


def read_columns(
  columns: Mapping[str, Sequence[str]], *, setting: str
) -> dict[str, list[Run]]:
  """Reads the runs of each column, which must have trained the same thing."""
  found = {}
  for name, directories_ in columns.items():
    if isinstance(directories_, str) or not directories_:
      raise ValueError(
        f'{setting} has {name!r}: {directories_!r}; expected a tuple of'
        " MODEL_DIRs, such as ('runs/seed_0', 'runs/seed_1')."
      )
    found[name] = [read_run(one, column=name) for one in directories_]
    systems = {run.system for run in found[name]}
    if len(systems) > 1:
      raise ValueError(
        f'{setting} has runs of {sorted(systems)} in {name!r}. Give each its'
        ' own column.'
      )
  return found


def gaps(columns: Mapping[str, Sequence[Run]]) -> list[str]:
  """Returns what the runs lack, each once."""
  found = [gap for runs in columns.values() for run in runs for gap in run.gaps]
  return list(dict.fromkeys(found))


def first_composed(columns: Mapping[str, Sequence[Run]]) -> Run:
  """Returns the first run that has connections."""
  for runs in columns.values():
    if runs[0].connections:
      return runs[0]
  raise ValueError(
    'report.prompt asks for an attention map, and no column is of a'
    f' composition: {list(columns)}. Leave the prompt out.'
  )


def _read_rows(file: pathlib.Path, gaps: list[str]) -> list[dict[str, Any]]:
  if not file.is_file():
    gaps.append(f'{file} is not there: no loss and no speed of this run.')
    return []
  rows, lines = [], file.read_text().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      if number < len(lines):
        raise ValueError(
          f'{file}, line {number}, is no JSON: {error}. Remove the line, or'
          ' give another run.'
        ) from error
      gaps.append(f'{file} ends in a row that was cut off; it is left out.')
      break
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
      raise ValueError(
        f'{file}, line {number}, is not a row of a run: expected an object with'
        f' a "step", found {line[:60]!r}.'
      )
    rows.append(row)
  if not any('train/loss' in row for row in rows):
    gaps.append(f'{file} has no "train/loss": the run has logged no step yet.')
  return rows


def _read_results(file: pathlib.Path, gaps: list[str]) -> Results:
  if not file.is_file():
    gaps.append(
      f'{file} is not there: no scores of this run. calm_jax.evaluate writes'
      ' it.'
    )
    return {}
  results = directories.read_json(file)
  sound = isinstance(results, dict) and all(
    isinstance(tasks, dict) and all(isinstance(m, dict) for m in tasks.values())
    for tasks in results.values()
  )
  if not sound:
    raise ValueError(
      f"{file} is not {{system: {{'task/split': {{metric: value}}}}}}. Remove"
      ' it, and evaluate the run again.'
    )
  return results


def _count(path: pathlib.Path, system: str, gaps: list[str]) -> int | None:
  """Counts what was trained, by the headers of the written weights."""
  names = {'composed': run_files.WEIGHTS_FILE, 'lora': run_files.LORA_FILE}
  file = path / names.get(system, 'model')
  if not file.exists():
    gaps.append(f'{file} is not there: the run has not ended.')
    return None
  read = (
    weight_files.open_directory
    if system == 'finetuned'
    else weight_files.open_file
  )
  return trees.num_params(read(file))
