"""The table and the picture of the key-value experiment."""

from collections.abc import Sequence
import json
import pathlib
import statistics
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

SYSTEMS = {'augmenting': 'm_A', 'anchor': 'm_B', 'composed': 'm_A+B'}
# In the order of the paper's table 5, after the anchor alone.
COLUMNS = {
  'anchor': 'm_B alone',
  'finetuned': 'm_B fully fine-tuned',
  'composed': 'CALM',
  'vanilla': 'vanilla m_A',
  'random': 'random m_A',
  'encoder': 'm_A as encoder',
  'lora': 'LoRA on m_B',
}
ARITHMETIC = {
  'direct': 'kv_arithmetic_quick',
  'scratchpad': 'kv_arithmetic_scratchpad_quick',
}
# Rows of the table: title, and 'task/split' for an answer format.
ROWS = (
  ('KV-substitution, held-out keys', 'kv_substitution_quick/held_out'),
  ('numeric arithmetic', 'numeric_arithmetic_quick/test'),
  ('KV-arithmetic, held-in keys', '{arithmetic}/held_in'),
  ('KV-arithmetic, mixed keys', '{arithmetic}/mixed'),
  ('KV-arithmetic, held-out keys', '{arithmetic}/held_out'),
)
# Table 1 of arXiv 2401.02412, accuracy in percent; its keys are held out by
# expression, so it belongs beside the mixed and held-out rows.
PAPER = {
  'KV-substitution, held-out keys': (98.1, 0.0, 92.9),
  'numeric arithmetic': (4.2, 73.7, 72.0),
  'KV-arithmetic, held-out keys': (0.7, 0.0, 84.3),
}


def collect(
  out: pathlib.Path, seeds: Sequence[int], *, baselines: Sequence[str]
) -> dict[str, Any]:
  """Gathers exact match by format, row and column, a list over seeds."""
  results: dict[str, Any] = {'seeds': list(seeds), 'paper': PAPER}
  for answer, task in ARITHMETIC.items():
    runs = [_read(out / f'{answer}_seed{seed}') for seed in seeds]
    results[answer] = {
      title: {
        system: [run[system][row.format(arithmetic=task)] for run in runs]
        for system in SYSTEMS
      }
      for title, row in ROWS
    }
    for column in baselines:
      runs = [_read(out / f'{column}_{answer}_seed{seed}') for seed in seeds]
      (system,) = runs[0]
      for title, row in ROWS:
        results[answer][title][column] = [
          run[system][row.format(arithmetic=task)] for run in runs
        ]
  return results


def _read(run_dir: pathlib.Path) -> dict[str, dict[str, float]]:
  measured = json.loads((run_dir / 'eval' / 'results.json').read_text())
  return {
    system: {name: one['exact_match'] for name, one in tasks.items()}
    for system, tasks in measured.items()
  }


def prompt_of(run_dir: pathlib.Path) -> str:
  """Returns a prompt of held-out keys that the run was evaluated with."""
  (file,) = run_dir.glob('eval/kv_arithmetic*/held_out/composed/*.jsonl')
  with file.open() as lines:
    return json.loads(next(lines))['inputs']


def markdown(results: dict[str, Any]) -> str:
  """Returns the table, exact match in percent, mean and spread over seeds."""
  lines = [
    'Exact match in percent by greedy decoding; mean ± standard deviation over'
    f' the seeds {results["seeds"]} of the composition.',
    '',
    '| | m_A | m_B | m_A+B direct | m_A+B scratchpad |'
    ' paper m_A / m_B / m_A+B |',
    '|---|---|---|---|---|---|',
  ]
  for title, _ in ROWS:
    direct, scratchpad = results['direct'][title], results['scratchpad'][title]
    paper = results['paper'].get(title)
    cells = [
      title,
      _cell(direct['augmenting'][:1]),
      _cell(direct['anchor'][:1]),
      _cell(direct['composed']),
      _cell(scratchpad['composed']),
      ' / '.join(map(str, paper)) if paper else '',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  for answer in ARITHMETIC:
    columns = {
      name: title
      for name, title in COLUMNS.items()
      if name in results[answer][ROWS[0][0]]
    }
    if len(columns) > 2:
      heads = ' | '.join(columns.values())
      lines += ['', f'| {answer} | {heads} |', f'|---{"|---" * len(columns)}|']
      for title, _ in ROWS:
        row = results[answer][title]
        # The anchor alone is the same for all seeds.
        cells = [
          _cell(row[name][: 1 if name == 'anchor' else None])
          for name in columns
        ]
        lines.append(f'| {title} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def _cell(values: Sequence[float]) -> str:
  mean = statistics.fmean(values)
  if len(values) == 1:
    return f'{mean:.1f}'
  return f'{mean:.1f} ± {statistics.stdev(values):.1f}'


def picture(
  results: dict[str, Any],
  out: pathlib.Path,
  seeds: Sequence[int],
  file: pathlib.Path,
) -> None:
  """Draws the table as bars beside the loss curves."""
  figure, (bars, curves) = plt.subplots(
    1, 2, figsize=(13, 4.8), width_ratios=(1.7, 1)
  )
  series = [
    ('m_A', 'direct', 'augmenting', '#9aa5b1'),
    ('m_B', 'direct', 'anchor', '#52606d'),
    ('m_A+B direct', 'direct', 'composed', '#2a7de1'),
    ('m_A+B scratchpad', 'scratchpad', 'composed', '#e8743b'),
  ]
  width = 0.2
  for i, (label, answer, system, colour) in enumerate(series):
    means = [
      statistics.fmean(results[answer][title][system]) for title, _ in ROWS
    ]
    places = [x + (i - 1.5) * width for x in range(len(ROWS))]
    drawn = bars.bar(places, means, width, label=label, color=colour)
    bars.bar_label(drawn, fmt='%.0f', fontsize=8, padding=1)
  bars.set_xticks(range(len(ROWS)))
  bars.set_xticklabels([t.replace(', ', ',\n') for t, _ in ROWS], fontsize=9)
  bars.axhline(84.3, color='#b0b0b0', linestyle=':', linewidth=1)
  bars.text(1.42, 85.3, 'paper 84.3', fontsize=8, color='#777')
  bars.set_ylim(0, 112)
  bars.set_ylabel('exact match (%)')
  bars.set_title('Two frozen models, and their composition')
  bars.legend(ncols=4, fontsize=8, loc='upper center', frameon=False)
  for _, answer, system, colour in series:
    if system != 'composed':
      continue
    for seed in seeds:
      lines = (out / f'{answer}_seed{seed}' / 'metrics.jsonl').read_text()
      rows = [json.loads(line) for line in lines.splitlines()]
      rows = [row for row in rows if 'train/loss' in row]
      curves.plot(
        [row['step'] for row in rows],
        [row['train/loss'] for row in rows],
        color=colour,
        alpha=0.8,
        label=answer if seed == seeds[0] else None,
      )
  curves.set_yscale('log')
  curves.set_xlabel('step')
  curves.set_ylabel('training loss (nats per target token)')
  curves.set_title('Loss of the composition')
  curves.legend(frameon=False)
  for axes in (bars, curves):
    axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  figure.savefig(file, dpi=130)
  plt.close(figure)
