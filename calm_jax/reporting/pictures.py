"""The pictures of a report, as matplotlib figures that open no window."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from calm_jax.reporting import scores
from calm_jax.reporting.runs import Run
from calm_jax.reporting.scores import Score

WIDTH, NARROW = 5.6, 4.4  # inches; a phone shows about four
# Told apart with any eyes (Okabe and Ito); frozen models are grey.
_COLOURS = (
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#cc79a7',
  '#e69f00',
  '#56b4e9',
  '#8c6d31',
  '#5e4fa2',
)
_GREYS = ('#8a939c', '#4f5a64')


def plain_text(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function draw names as they are: $ begins no formula."""

  @functools.wraps(function)
  def drawing(*args: Any, **kwargs: Any) -> Any:
    import matplotlib

    with matplotlib.rc_context({'text.parse_math': False}):
      return function(*args, **kwargs)

  return drawing


def colours(trained: Sequence[str], frozen: Sequence[str]) -> dict[str, str]:
  """Returns a colour for each column."""
  return {
    name: palette[i % len(palette)]
    for names, palette in ((trained, _COLOURS), (frozen, _GREYS))
    for i, name in enumerate(names)
  }


def score_bars(
  cells: Mapping[str, Score], title: str, colour: Mapping[str, str]
) -> Any:
  """Draws one row of the table as bars with their deviations."""
  names, places = list(cells), scores.digits(cells)
  figure, (axes,) = _figure(1, 0.45 + 0.22 * len(names), width=NARROW)
  means = [cells[name].mean if cells[name].values else 0.0 for name in names]
  spread = [cells[name].deviation or 0.0 for name in names]
  axes.barh(names, means, color=[colour[name] for name in names], height=0.75)
  axes.errorbar(means, names, xerr=spread, fmt='none', ecolor='#222', lw=1)
  for mean, error, name in zip(means, spread, names, strict=True):
    text = f'{mean:.{places}f}' if cells[name].values else 'not measured'
    axes.annotate(
      text,
      (max(mean + error, 0.0), name),
      xytext=(4, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
    )
  largest = max(m + e for m, e in zip(means, spread, strict=True))
  whole = 100.0 if places == 1 else 1.0
  axes.set_xlim(min(0.0, *means), 1.15 * max(largest, whole))
  figure.suptitle(title, fontsize=10, x=0.02, ha='left')
  axes.invert_yaxis()
  axes.tick_params(axis='y', length=0)
  axes.set_xticks([])  # the bars bear their values
  axes.spines['bottom'].set_visible(False)
  return figure


def forgetting(
  changes: Mapping[str, Mapping[str, tuple[Score, Score, Score]]],
  colour: Mapping[str, str],
) -> Any:
  """Draws the anchor's own tasks: an arrow from before to after training."""
  names = list(next(iter(changes.values())))
  figure, panels = _figure(len(changes), 0.9 + 0.32 * len(names))
  for axes, (row, columns) in zip(panels, changes.items(), strict=True):
    measured = {k: v for k, v in columns.items() if v[2].values}
    for name in names:
      if name not in measured:
        axes.text(0.02, name, 'not measured', fontsize=9, va='center')
        continue
      before, after, _ = measured[name]
      axes.plot([before.mean], [name], 'o', mfc='white', mec='#444', ms=7)
      axes.annotate(
        '',
        (after.mean, name),
        (before.mean, name),
        arrowprops={'arrowstyle': '-', 'color': colour[name], 'lw': 2},
      )
      axes.plot([after.mean], [name], 'o', color=colour[name], ms=6)
      axes.errorbar(
        [after.mean], [name], xerr=[after.deviation or 0], ecolor=colour[name]
      )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(row, fontsize=11, loc='left')
    axes.grid(axis='x', color='#e4e4e4')
    axes.set_axisbelow(True)
    axes.tick_params(axis='y', length=0)
  panels[-1].set_xlabel('hollow: the anchor before; filled: after training')
  return figure


def loss_curves(
  columns: Mapping[str, Sequence[Run]],
  colour: Mapping[str, str],
  *,
  log_steps: bool,
) -> Any:
  """Draws the training losses: thin for a seed, bold for their mean."""
  figure, (axes,) = _figure(1, 4.2)
  for name, runs in columns.items():
    curves = [run.curve() for run in runs if run.rows]
    for i, (steps, losses) in enumerate(curves):
      alone = len(curves) == 1
      axes.plot(
        steps,
        losses,
        color=colour[name],
        alpha=1.0 if alone else 0.35,
        lw=1.8 if alone else 0.9,
        label=name if alone and not i else None,
      )
    if len(curves) > 1:
      steps, means = _mean_curve(curves)
      axes.plot(
        steps, means, color=colour[name], lw=2, label=f'{name} ({len(curves)})'
      )
  begun = first_loss(next(iter(columns.values())))
  if begun is not None:
    axes.axhline(begun, color='#777', ls=':', lw=1)
    axes.annotate(
      'step 1',
      (1, begun),
      xycoords=('axes fraction', 'data'),
      xytext=(-2, 3),
      textcoords='offset points',
      ha='right',
      fontsize=9,
      color='#555',
    )
  axes.set_yscale('log')
  if log_steps:
    axes.set_xscale('log')
  _plain_ticks(axes.yaxis)
  axes.set_xlabel('step')
  axes.set_ylabel('training loss (nats per target token)')
  longest = max(map(len, columns), default=0)
  figure.legend(
    frameon=False,
    fontsize=9,
    ncols=max(1, int(WIDTH / (0.9 + 0.07 * longest))),
    loc='outside upper left',
  )
  return figure


def first_loss(runs: Sequence[Run]) -> float | None:
  """Returns the mean loss of step 1, which is before any update, or None."""
  first = [
    run.rows[0]['train/loss']
    for run in runs
    if run.rows and run.rows[0]['step'] == 1
  ]
  return sum(first) / len(first) if first else None


def ablations(
  measured: Mapping[str, Score],
  runs: Mapping[str, Run],
  title: str,
) -> Any:
  """Draws quality against number, and against place, of the connections.

  Args:
    measured: by label.
    runs: one of each label, for its connections.
    title: of what is measured.
  """
  from matplotlib import figure as figure_lib

  labels = list(measured)
  figure = figure_lib.Figure(
    figsize=(WIDTH, 3.0 + 0.9 + 0.36 * len(labels)), layout='constrained'
  )
  above, below = figure.subfigures(2, 1, height_ratios=(3.0, _tall(labels)))
  points = above.subplots()
  rows = below.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
  palette = colours(labels, ())
  _against_number(points, measured, runs, palette)
  points.set_title(title, fontsize=10, loc='left')
  places, quality = rows
  for y, label in enumerate(labels):
    one = measured[label]
    layers = sorted({c.anchor_layer for c in runs[label].connections})
    places.plot([min(layers), max(layers)], [y, y], color='#ccc', lw=1)
    places.plot(layers, [y] * len(layers), 's', color=palette[label], ms=7)
    if one.values:
      quality.barh(y, one.mean, color=palette[label], height=0.6)
      quality.errorbar(
        one.mean, y, xerr=one.deviation or 0, fmt='none', ecolor='#222', lw=1
      )
    text = f'{one.mean:.1f}' if one.values else 'not measured'
    quality.annotate(
      text,
      (one.mean + (one.deviation or 0) if one.values else 0, y),
      xytext=(4, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
    )
  every = {c.anchor_layer for run in runs.values() for c in run.connections}
  ticks = range(min(every), max(every) + 1)
  if len(ticks) > 9:
    ticks = sorted(every)
  places.set_xticks(ticks, ['emb' if t < 0 else str(t) for t in ticks])
  places.set_yticks(range(len(labels)), labels)
  places.set_ylim(len(labels) - 0.5, -0.5)
  places.set_xlabel('into anchor block', fontsize=9)
  places.grid(axis='x', color='#eee')
  places.tick_params(axis='y', length=0)
  quality.tick_params(axis='y', length=0)
  quality.margins(x=0.2)
  quality.set_xlabel(title.rpartition(', ')[2], fontsize=9)
  _bare(points, places, quality)
  return figure


def _tall(labels: Sequence[str]) -> float:
  return 0.9 + 0.36 * len(labels)


def _against_number(
  axes: Any,
  measured: Mapping[str, Score],
  runs: Mapping[str, Run],
  palette: Mapping[str, str],
) -> None:
  """Draws a point for each label; labels of near points move apart."""
  numbers = sorted({len(run.connections) for run in runs.values()})
  taken: list[tuple[int, float]] = []
  shown = {k: one for k, one in measured.items() if one.values}
  span = max((s.mean for s in shown.values()), default=1.0) or 1.0
  for label, one in sorted(shown.items(), key=lambda item: item[1].mean):
    number = len(runs[label].connections)
    axes.errorbar(
      number, one.mean, yerr=one.deviation or 0, fmt='o', color=palette[label]
    )
    height = one.mean
    for other, at in taken:
      if other == number and height - at < 0.07 * span:
        height = at + 0.07 * span
    taken.append((number, height))
    left = number == numbers[-1] > numbers[0]  # else it would be cut off
    axes.annotate(
      label,
      (number, height),
      xytext=(-8 if left else 8, 0),
      textcoords='offset points',
      ha='right' if left else 'left',
      va='center',
      fontsize=9,
      color=palette[label],
    )
  axes.set_xticks(numbers)
  axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
  axes.margins(y=0.2)
  axes.set_xlabel('number of connections')


def _mean_curve(
  curves: Sequence[tuple[list[int], list[float]]],
) -> tuple[list[int], list[float]]:
  """Returns the mean at the steps that all curves have."""
  by_step = [dict(zip(*curve, strict=True)) for curve in curves]
  steps = sorted(set.intersection(*map(set, by_step)))
  return steps, [sum(one[s] for one in by_step) / len(by_step) for s in steps]


def _figure(
  panels: int, height: float, *, width: float = WIDTH
) -> tuple[Any, Sequence[Any]]:
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(
    figsize=(width, height * panels), layout='constrained'
  )
  axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
  _bare(*axes)
  return figure, axes


def _bare(*all_axes: Any) -> None:
  for axes in all_axes:
    axes.spines[['top', 'right']].set_visible(False)


def _plain_ticks(axis: Any) -> None:
  """Writes 0.5 and 2 on a logarithmic axis, not powers of ten."""
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
  axis.set_major_locator(ticker.LogLocator(subs=subs))
  axis.set_minor_locator(ticker.NullLocator())
  axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
