"""The sections of a report, as HTML."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics

from calm_jax.attention_maps import AttentionMap
from calm_jax.reporting import page, pictures
from calm_jax.reporting import scores as scores_lib
from calm_jax.reporting.runs import Run
from calm_jax.reporting.scores import Table

Columns = Mapping[str, Sequence[Run]]
_WIDE = 8  # columns of a table that a screen shows


def scores(out: pathlib.Path, table: Table) -> str:
  """Returns the table of all systems with its picture."""
  if not table.cells:
    return page.section(
      'Scores', page.paragraph('No run has been evaluated yet.')
    )
  names = [*table.plain, *table.names]
  heads, marked = [], []
  for row, cells in table.cells.items():
    counts = sorted({n for one in cells.values() for n in one.examples})
    note = table.metrics[row]
    if counts:
      note += f', {" or ".join(f"{n:,}" for n in counts)} examples'
    heads.append(page.heading(row, note))
    marked.append(page.score_row(cells))
  if len(names) > _WIDE:  # a line for each column
    columns = list(zip(*marked, strict=True))
    body = list(zip(map(page.heading, names), columns, strict=True))
    shown = page.table([page.heading(''), *heads], body)
  else:
    body = list(zip(heads, marked, strict=True))
    shown = page.table(map(page.heading, ['', *names]), body)
  colour = pictures.colours(table.names, table.plain)
  drawn = [
    page.picture(
      out / f'scores_{row.replace("/", "_")}.png',
      pictures.score_bars(cells, f'{row}, {table.metrics[row]}', colour),
      caption=f'{row}: mean, and a line of ± one deviation.',
      told=False,
    )
    for row, cells in table.cells.items()
  ]
  return page.section(
    'Scores',
    page.paragraph(
      'Mean ± standard deviation over n runs that differ by seed; the best of a'
      ' task is marked. Models that nothing has trained are measured once. The'
      ' same as bars below.'
    ),
    shown,
    page.side_by_side(drawn),
  )


def forgetting(
  out: pathlib.Path, table: Table, columns: Columns, tasks: Sequence[str]
) -> str:
  """Returns the anchor's own tasks before and after."""
  title = 'Forgetting: what the anchor could do before'
  if not tasks:
    text = "No task is named as the anchor's own (report.anchor_tasks)."
    return page.section(title, page.paragraph(text))
  first = next(iter(columns.values()))
  changes = {
    task: {
      name: scores_lib.change(runs, task, table.metrics[task], otherwise=first)
      for name, runs in columns.items()
    }
    for task in tasks
    if task in table.cells
  }
  if not any(one[2].values for row in changes.values() for one in row.values()):
    text = (
      'Not measured: it needs the anchor before, the system'
      " 'anchor', and the trained model on the same task."
    )
    return page.section(title, page.paragraph(text))
  tables = []
  for task, row in changes.items():
    every = {f'{k}/{i}': one for k, v in row.items() for i, one in enumerate(v)}
    places = scores_lib.digits(every)
    body = [
      (
        page.heading(name),
        [
          page.score_cell(before, places=places),
          page.score_cell(after, places=places),
          page.score_cell(
            difference,
            places=places,
            sign=True,
            kind='lost'
            if scores_lib.is_loss(difference, places=places)
            else '',
          ),
        ],
      )
      for name, (before, after, difference) in row.items()
    ]
    head = [f'{task}, {table.metrics[task]}', 'before', 'after', 'change']
    tables.append(page.table(map(page.heading, head), body))
  figure = pictures.forgetting(
    changes, pictures.colours(table.names, table.plain)
  )
  caption = "The anchor's own tasks, before and after training."
  return page.section(
    title,
    page.paragraph(
      'Before is the anchor alone; the change is taken run by run, and'
      ' then mean ± standard deviation. Red is a loss of more than that.'
    ),
    *tables,
    page.picture(out / 'forgetting.png', figure, caption=caption),
  )


def loss(out: pathlib.Path, columns: Columns, *, log_steps: bool) -> str:
  """Returns the loss curves."""
  logged = {k: runs for k, runs in columns.items() if any(r.rows for r in runs)}
  if not logged:
    text = 'No run has logged a step yet.'
    return page.section('Loss', page.paragraph(text))
  figure = pictures.loss_curves(
    logged, pictures.colours(list(columns), ()), log_steps=log_steps
  )
  late = [
    str(run.directory)
    for runs in logged.values()
    for run in runs
    if run.rows and run.rows[0]['step'] != 1
  ]
  text = (
    'Loss of the batch of each logged step. Step 1 is before any update: its'
    ' loss is that of the anchor, for all that begin as the anchor.'
  )
  if late:
    text += f' Not logged at step 1: {", ".join(late)}.'
  return page.section(
    'Loss',
    page.paragraph(text),
    page.picture(
      out / 'loss.png',
      figure,
      caption='Training loss; thin lines are seeds, bold ones their mean (of'
      ' how many, in brackets); dotted, step 1 of the first column.',
    ),
  )


def ablations(
  out: pathlib.Path, variants: Columns, table: Table, task: str | None
) -> str:
  """Returns quality against number and place of the connections."""
  title = 'Number and place of the connections'
  if not variants:
    text = 'No runs are compared here (report.ablations).'
    return page.section(title, page.paragraph(text))
  if task not in table.metrics:
    text = 'The runs are there, and have not been evaluated.'
    return page.section(title, page.paragraph(text))
  measured = {
    label: scores_lib.score(runs, 'composed', task, table.metrics[task])
    for label, runs in variants.items()
  }
  firsts = {label: runs[0] for label, runs in variants.items()}
  shown = f'{task}, {table.metrics[task]}'
  figure = pictures.ablations(measured, firsts, shown)
  places = scores_lib.digits(measured)
  body = []
  for label, one in measured.items():
    connections = firsts[label].connections
    pairs = ', '.join(
      f'{c.augmenting_layer}→{"emb" if c.anchor_layer < 0 else c.anchor_layer}'
      for c in connections
    )
    body.append(
      (
        page.heading(label),
        [
          page.score_cell(one, places=places),
          page.cell(str(len(connections))),
          page.cell(pairs),
        ],
      )
    )
  head = ['', table.metrics[task], 'connections', 'augmenting → anchor block']
  return page.section(
    title,
    page.picture(
      out / 'ablations.png', figure, caption=f'{shown}, by the connections.'
    ),
    page.table(map(page.heading, head), body),
  )


def attention(out: pathlib.Path, found: AttentionMap | None) -> str:
  """Returns a picture for each connection."""
  title = 'What the connections read'
  if found is None:
    text = 'No example was asked for (report.prompt).'
    return page.section(title, page.paragraph(text))
  prompt = ''.join(found.tokens[: found.prompt_length])
  answer = ''.join(found.tokens[found.prompt_length :])
  drawn = [
    page.picture(
      out / f'attention_{key}.png',
      found.plot([key]),
      caption=f'{one.title}: weights, mean of the heads.',
      told=False,
    )
    for key, one in found.connections.items()
  ]
  return page.section(
    title,
    page.paragraph(
      f'Prompt “{prompt.strip()}”, answer “{answer.strip()}”. A row is a'
      ' position of the anchor; blue is what it reads there of the augmenting'
      ' model, the mean of the heads; grey may not be read. Below the orange'
      ' line is the answer. A gate, the mean of the heads too, multiplies what'
      ' is read: where it is near 0, nothing comes through.'
    ),
    page.side_by_side(drawn),
  )


def costs(columns: Columns) -> str:
  """Returns parameters, work and speed."""
  body = []
  for name, runs in columns.items():
    parts = [f'rank {run.rank}' for run in runs[:1] if run.rank]
    if runs[0].connections:
      parts = [f'{len(runs[0].connections)} connections']
    steps = [run.rows[-1]['step'] for run in runs if run.rows]
    whole = runs[0].system == 'finetuned'
    body.append(
      (
        page.heading(name, ', '.join(parts)),
        [
          _count([run.trained_params for run in runs]),
          _count([run.trained_params for run in runs] if whole else []),
          _count(steps),
          _count([run.rate('flops_per_step') for run in runs], short=True),
          _count([run.rate('tokens_per_second') for run in runs]),
          _percent([run.rate('mfu') for run in runs]),
        ],
      )
    )
  head = [
    '',
    'trained parameters',
    'all parameters',
    'steps',
    'FLOPs a step',
    'tokens/s',
    'MFU',
  ]
  return page.section(
    'Cost',
    page.paragraph(
      'FLOPs are the least that a step needs (F_min); tokens/s and MFU are'
      ' medians over the logged steps, and means over the runs. A run does not'
      ' record the parameters of frozen models, nor MFU on devices whose peak'
      ' is not known.'
    ),
    page.table(map(page.heading, head), body),
  )


def settings(columns: Columns) -> str:
  """Returns the configurations to be unfolded."""
  named: dict[pathlib.Path, tuple[str, Run]] = {}
  for name, runs in columns.items():
    for run in runs:
      named.setdefault(run.directory, (name, run))
  parts = [
    page.details(
      f'{name}: {run.directory}', run.config or 'It holds no config.gin.'
    )
    for name, run in named.values()
  ]
  text = (
    'What each run has read. Saved as a file, it makes the run again: python -m'
    ' calm_jax.train --gin_file=FILE, with a new MODEL_DIR in it.'
  )
  return page.section('Configurations', page.paragraph(text), *parts)


def _count(values: Sequence[float | None], *, short: bool = False) -> str:
  there = [value for value in values if value is not None]
  if not there:
    return page.cell('—', 'not recorded')
  mean = statistics.fmean(there)
  return page.cell(f'{mean:.3g}' if short else f'{mean:,.0f}')


def _percent(values: Sequence[float | None]) -> str:
  there = [100 * value for value in values if value is not None]
  if not there:
    return page.cell('—', 'not recorded')
  return page.cell(f'{statistics.fmean(there):.1f} %')
