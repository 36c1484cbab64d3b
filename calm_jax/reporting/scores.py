"""Means and deviations over seeds: what the tables and pictures show."""

from collections.abc import Iterable, Mapping, Sequence
import csv
import dataclasses
import io
import math
import pathlib
import statistics
from typing import Any

from calm_jax.reporting.runs import Run

TABLE_FILE, NUMBERS_FILE = 'results.md', 'results.csv'
COUNTS = ('num_examples', 'count', 'correct')  # not scores


@dataclasses.dataclass(frozen=True)
class Score:
  """One number, measured for some seeds.

  Attributes:
    values: one for each run that has it.
    runs: how many runs should have it.
    examples: on how many examples it was measured, each count once.
    places: which of the runs the values are of, from 0.
  """

  values: tuple[float, ...]
  runs: int = 1
  examples: tuple[int, ...] = ()
  places: tuple[int, ...] = ()

  @property
  def mean(self) -> float:
    return statistics.fmean(self.values)

  @property
  def deviation(self) -> float | None:
    """The sample standard deviation; None for a single value."""
    return statistics.stdev(self.values) if len(self.values) > 1 else None


def rows_of(runs: Iterable[Run]) -> list[str]:
  """Returns every evaluated 'task/split', in the order of evaluation."""
  found: dict[str, None] = {}
  for run in runs:
    for tasks in run.results.values():
      found |= dict.fromkeys(tasks)
  return list(found)


def choose_metrics(
  runs: Sequence[Run], wanted: Mapping[str, str]
) -> dict[str, str]:
  """Returns which metric is shown of each 'task/split'.

  Args:
    runs: all of the report.
    wanted: names of metrics by task or by 'task/split'; of others the first
      number that is no count.

  Raises:
    ValueError: if a metric is asked of what no run has, or is no number.
  """
  rows = rows_of(runs)
  for name in wanted:
    if rows and not any(name in (row, _task(row)) for row in rows):
      raise ValueError(
        f'report.metrics names {name!r}, which no run has. Evaluated are'
        f' {rows}.'
      )
  chosen = {}
  for row in rows:
    numbers: dict[str, None] = {}
    for run in runs:
      for tasks in run.results.values():
        numbers |= dict.fromkeys(
          name for name, v in tasks.get(row, {}).items() if _is_number(v)
        )
    scores = [name for name in numbers if name not in COUNTS]
    metric = wanted.get(row, wanted.get(_task(row)))
    if metric is None and not scores:
      continue  # nothing finite; `Table.gaps` says so
    if metric is None:
      metric = scores[0]
    if metric not in numbers:
      raise ValueError(
        f'{row} has no metric {metric!r} to show; its numbers are'
        f' {list(numbers)}. Choose one: report.metrics = {{{row!r}: ...}}.'
      )
    chosen[row] = metric
  return chosen


def score(runs: Sequence[Run], system: str, row: str, metric: str) -> Score:
  """Gathers one metric of one system; runs that lack it are left out."""
  each = [run.results.get(system, {}).get(row, {}) for run in runs]
  found = {i: one for i, one in enumerate(each) if _is_number(one.get(metric))}
  return Score(
    values=tuple(float(one[metric]) for one in found.values()),
    runs=len(runs),
    examples=_counts(list(found.values())),
    places=tuple(found),
  )


def frozen_score(
  runs: Sequence[Run], system: str, row: str, metric: str
) -> Score:
  """As `score`; equal values of one frozen model are one value."""
  found = score(runs, system, row, metric)
  if len(set(found.values)) == 1:
    found = dataclasses.replace(
      found, values=found.values[:1], places=found.places[:1], runs=1
    )
  return found


def is_loss(difference: Score, *, places: int) -> bool:
  """Whether a change, as shown, is below 0 by more than its deviation."""
  if not difference.values:
    return False
  return round(difference.mean + (difference.deviation or 0.0), places) < 0


def change(
  runs: Sequence[Run],
  row: str,
  metric: str,
  *,
  otherwise: Sequence[Run],
) -> tuple[Score, Score, Score]:
  """Returns the anchor's score, that after training, and the differences.

  Args:
    runs: of one column.
    row: one of the anchor's own tasks.
    metric: what is shown of it.
    otherwise: where the anchor is looked up for a run that was evaluated
      without it.
  """
  shared = frozen_score(otherwise, 'anchor', row, metric).values
  before, after = [], []
  for run in runs:
    own = score([run], 'anchor', row, metric).values or shared[:1]
    then = score([run], run.system, row, metric).values
    if own and then:
      before += own
      after += then
  differences = [b - a for a, b in zip(before, after, strict=True)]
  same = len(set(before)) == 1  # one frozen model, measured more than once
  return (
    Score(tuple(before[:1])) if same else Score(tuple(before), len(runs)),
    Score(tuple(after), len(runs)),
    Score(tuple(differences), len(runs)),
  )


def best(cells: Mapping[str, Score]) -> set[str]:
  """Returns the columns with the highest mean, as shown; none if all have."""
  means = {name: one.mean for name, one in cells.items() if one.values}
  shown = {name: f'{mean:.{digits(cells)}f}' for name, mean in means.items()}
  top = max(means, key=means.get, default=None)
  found = {name for name in shown if shown[name] == shown[top]}
  return found if len(found) < len(shown) else set()


def show(one: Score, *, places: int, sign: bool = False) -> str:
  """Returns 'mean ± deviation', or a dash where nothing was measured."""
  if not one.values:
    return '—'
  text = f'{one.mean:{"+" if sign else ""}.{places}f}'
  if one.deviation is not None:
    text += f' ± {one.deviation:.{places}f}'
  return text


def digits(cells: Mapping[str, Score]) -> int:
  """Returns the decimals of a row: percentages have 1, fractions 3."""
  largest = max((abs(v) for c in cells.values() for v in c.values), default=0)
  return 3 if 0 < largest <= 1 else 1


@dataclasses.dataclass(frozen=True)
class Table:
  """Scores by 'task/split' and column.

  Attributes:
    metrics: which metric is shown of each row.
    cells: scores by row and column, the plain models first.
    plain: names of the columns of models that nothing has trained.
    names: those of the other columns.
    empty: rows of which no run has a finite number.
  """

  metrics: Mapping[str, str]
  cells: Mapping[str, Mapping[str, Score]]
  plain: tuple[str, ...]
  names: tuple[str, ...]
  empty: tuple[str, ...] = ()

  @classmethod
  def of(
    cls,
    columns: Mapping[str, Sequence[Run]],
    *,
    plain: Mapping[str, str],
    trained: Sequence[str],
    variants: Mapping[str, Sequence[Run]],
    metrics: Mapping[str, str],
  ) -> 'Table':
    """Gathers the scores.

    Args:
      columns: runs by column.
      plain: systems by column, looked up in the runs of the first column.
      trained: systems that differ by seed.
      variants: more runs, of which only the metrics are chosen.
      metrics: as in `choose_metrics`.
    """
    if not columns:
      raise ValueError('report.columns is empty: name a column and its runs.')
    _check_composed(variants)
    twice = sorted(plain.keys() & columns.keys())
    if twice:
      raise ValueError(
        f'{twice} are in report.columns and in report.plain: name them apart.'
      )
    everything = [
      run
      for each in (columns, variants)
      for runs in each.values()
      for run in runs
    ]
    chosen = choose_metrics(everything, metrics)
    first = next(iter(columns.values()))
    rows = rows_of([run for runs in columns.values() for run in runs])
    cells = {}
    for row in (one for one in rows if one in chosen):
      cells[row] = {
        name: (score if system in trained else frozen_score)(
          first, system, row, chosen[row]
        )
        for name, system in plain.items()
      }
      for name, runs in columns.items():
        cells[row][name] = score(runs, runs[0].system, row, chosen[row])
    empty = tuple(row for row in rows_of(everything) if row not in chosen)
    return cls(chosen, cells, tuple(plain), tuple(columns), empty)

  def check_rows(self, rows: Iterable[str]) -> None:
    """Raises ValueError if there are scores, and none of one of these."""
    for row in rows:
      if self.metrics and row not in self.metrics:
        raise ValueError(
          f'{row!r} is no evaluated task. Evaluated are {list(self.metrics)};'
          " a task is given as 'task/split'."
        )

  def last_row(self, *, besides: Sequence[str]) -> str | None:
    """Returns the last row that is none of these, or None."""
    rows = [row for row in self.metrics if row not in besides]
    return rows[-1] if rows else None

  def write(self, directory: pathlib.Path) -> None:
    """Writes the table as `results.md`, each run's numbers as `results.csv`."""
    (directory / TABLE_FILE).write_text(self.markdown(), encoding='utf-8')
    (directory / NUMBERS_FILE).write_text(self.csv(), encoding='utf-8')

  def markdown(self) -> str:
    """Returns the table, a column a line: mean ± deviation over seeds."""
    heads = [f'{row}, {self.metrics[row]}' for row in self.cells]
    lines = [f'| | {" | ".join(heads)} |', f'|---{"|---" * len(heads)}|']
    for name in (*self.plain, *self.names):
      texts = [show(c[name], places=digits(c)) for c in self.cells.values()]
      shown = name.replace('|', r'\|')
      lines.append(f'| {" | ".join([shown, *texts])} |')
    return '\n'.join(lines) + '\n'

  def csv(self) -> str:
    """Returns every number that the means are of, one a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['column', 'task', 'metric', 'run', 'value'])
    for row, cells in self.cells.items():
      for name, one in cells.items():
        for i, value in zip(one.places, one.values, strict=True):
          writer.writerow([name, row, self.metrics[row], i, value])
    return text.getvalue()

  def gaps(self) -> list[str]:
    """Returns what is missing of the table, or cannot be compared."""
    found = [f'{row} has no finite number in any run.' for row in self.empty]
    for row, cells in self.cells.items():
      lacking = [name for name, one in cells.items() if not one.values]
      if lacking:
        found.append(f'{row} was not measured of {", ".join(lacking)}.')
      examples = sorted({n for one in cells.values() for n in one.examples})
      if len(examples) > 1:
        found.append(
          f'{row} was measured on different numbers of examples, {examples}:'
          ' the columns do not quite compare.'
        )
    return found


def _check_composed(variants: Mapping[str, Sequence[Run]]) -> None:
  """Raises ValueError if a variant of the mapping is no composition."""
  for name, runs in variants.items():
    if not runs[0].connections:
      raise ValueError(
        f'report.ablations has {name!r}, a run that trained {runs[0].system!r};'
        ' it compares connections, so it takes compositions.'
      )


def _task(row: str) -> str:
  return row.rpartition('/')[0]


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _counts(found: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
  counts = {one['num_examples'] for one in found if 'num_examples' in one}
  return tuple(sorted(counts))
