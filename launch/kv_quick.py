"""Runs the key-value experiment stage by stage; launch/run.sh calls this.

Every stage is a command that could be typed by hand, and is printed. A stage
whose product exists is not run again; training resumes at its last checkpoint.
"""

import argparse
from collections.abc import Iterable, Sequence
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

import kv_quick_report as report

FORMATS = ('direct', 'scratchpad')
EVALUATION = {
  'direct': 'kv_quick_evaluate.gin',
  'scratchpad': 'kv_quick_evaluate_scratchpad.gin',
}
ANCHOR_PARTS = ('anchor', 'anchor_final')
VANILLA = 'vanilla'
# The paper's other columns: the gin file that makes one of an experiment, and
# what is evaluated. A vanilla m_A is another model, and no file.
BASELINES = {
  'lora': ('lora', 'lora'),
  'finetuned': ('finetuned', 'finetuned'),
  VANILLA: (None, 'composed'),
  'random': ('random', 'composed'),
  'encoder': ('encoder', 'composed'),
}
ROOT = pathlib.Path(__file__).parent.parent


class Stage:
  """One command, the file that shows it has ended, and what it prints."""

  def __init__(self, product: pathlib.Path, module: str, *arguments: str):
    self.product = product
    self.command = [sys.executable, '-m', f'calm_jax.{module}', *arguments]
    self.log = product.parent / f'{module}.log'
    self._old_lines = 0
    folder = product.parent
    inside = folder.name in ('eval', 'model')
    self.name = (folder.parent if inside else folder).name

  def start(self, threads: int) -> subprocess.Popen:
    shown = shlex.join(['python', *self.command[1:]])
    print(f'\n$ {shown}\n  (log: {self.log})', flush=True)
    self.log.parent.mkdir(parents=True, exist_ok=True)
    self.log.touch()
    self._old_lines = len(self.lines())  # of an earlier, interrupted start
    environment = dict(os.environ)
    if threads == 1:  # two small programs share two cores best one each
      flags = environment.get('XLA_FLAGS', '')
      environment['XLA_FLAGS'] = (
        f'{flags} --xla_cpu_multi_thread_eigen=false'.strip()
      )
    with self.log.open('a') as log:
      return subprocess.Popen(
        self.command, stdout=log, stderr=subprocess.STDOUT, env=environment
      )

  def lines(self) -> list[str]:
    """Returns what this start has printed so far."""
    lines = self.log.read_text(errors='replace').splitlines()
    return lines[self._old_lines :]


def run(stages: Sequence[Stage]) -> None:
  """Runs the stages that are not finished, side by side where cores allow."""
  waiting = []
  for stage in stages:
    if stage.product.exists():
      print(f'finished before: {stage.product}')
    else:
      waiting.append(stage)
  at_once = max(1, min(len(waiting), os.cpu_count() or 1))
  while waiting:
    now, waiting = waiting[:at_once], waiting[at_once:]
    running = [(s, s.start(threads=1 if len(now) > 1 else 0)) for s in now]
    try:
      _watch(running)
    finally:
      for _, process in running:
        process.terminate()
      for _, process in running:
        process.wait()


def _watch(running: list[tuple[Stage, subprocess.Popen]]) -> None:
  """Shows the last line of each log until all have ended."""
  shown: dict[Stage, str] = {}
  while True:
    ended = [process.poll() is not None for _, process in running]
    for stage, process in running:
      shows = ('step ', 'Done', 'composed ')
      lines = [line for line in stage.lines() if line.startswith(shows)]
      if lines and shown.get(stage) != lines[-1]:
        shown[stage] = lines[-1]
        print(f'[{stage.name}] {lines[-1]}', flush=True)
      if process.poll() not in (None, 0):
        tail = '\n'.join(stage.lines()[-15:])
        sys.exit(
          f'{tail}\nerror: the stage of {stage.product} ended with code'
          f' {process.returncode}; the lines above are the end of {stage.log}.'
          ' Run the same command again to continue.'
        )
    if all(ended):
      return
    time.sleep(0.5)


def inputs() -> list[pathlib.Path]:
  """Returns the files of the checkout that decide what the stages make."""
  donors = ROOT.glob('tasks/donors/kv_quick/*/model.safetensors')
  settings = ROOT.glob('gin/*/kv_quick*.gin')
  others = [
    ROOT.glob(f'gin/{folder}/*.gin') for folder in ('runs', 'baselines')
  ]
  return sorted([*donors, *settings, *itertools.chain(*others)])


def refuse_changed(files: Iterable[pathlib.Path], out: pathlib.Path) -> None:
  """Ends the program if `out` was begun with other contents of the files."""
  contents = hashlib.sha256()
  for file in files:
    contents.update(file.read_bytes())
  record = out / 'inputs.sha256'
  if record.exists() and record.read_text() != contents.hexdigest():
    sys.exit(
      f'error: the donors or gin files have changed since {out} was begun, and'
      f' what is finished there is of the old ones. Rename {out}, or give'
      ' another --out.'
    )
  out.mkdir(parents=True, exist_ok=True)
  record.write_text(contents.hexdigest())


def gin(*files: str, **macros: object) -> list[str]:
  """Returns the flags of gin files with some macros set."""
  bindings = [f'--gin.{k}={v!r}' for k, v in macros.items()]
  return [*(f'--gin_file={file}' for file in files), *bindings]


def train_donors(
  out: pathlib.Path, augmenting: str | None, anchor_parts: Sequence[str]
) -> dict[str, str]:
  """Trains donors from scratch; returns the macros that choose them.

  Args:
    out: results folder.
    augmenting: name of the augmenting model, or None for the shipped one.
    anchor_parts: the anchor's parts, each beginning with the weights of the one
      before; none for the shipped anchor.
  """

  def stage(name, **macros):
    run_dir = out / 'donors' / name
    file = f'experiments/kv_quick_donor_{name}.gin'
    flags = gin(file, MODEL_DIR=str(run_dir), **macros)
    return Stage(run_dir / 'model' / 'model.safetensors', 'train', *flags)

  first = [augmenting, *anchor_parts[:1]]
  run([stage(name) for name in first if name])
  for before, name in itertools.pairwise(anchor_parts):
    run([stage(name, ANCHOR_PATH=str(out / 'donors' / before / 'model'))])
  chosen = {'AUGMENTING_PATH': augmenting}
  chosen['ANCHOR_PATH'] = anchor_parts[-1] if anchor_parts else None
  return {
    macro: str(out / 'donors' / name / 'model')
    for macro, name in chosen.items()
    if name
  }


def stages_of(
  out: pathlib.Path,
  seed: int,
  donors: dict[str, str],
  *,
  baseline: str | None = None,
  pieces: bool = False,
) -> tuple[list[Stage], list[Stage]]:
  """Returns the training and the evaluation of both formats for one seed.

  Args:
    out: results folder.
    seed: of what is trained.
    donors: the macros that choose them.
    baseline: a key of `BASELINES`, instead of the composition.
    pieces: whether m_A has a vocabulary of its own.
  """
  ending = '_pieces' if pieces else ''
  file, system = BASELINES.get(baseline, (None, None))
  prefix = f'{baseline}_' if baseline else ''
  train, evaluate = [], []
  for answer in FORMATS:
    run_dir = out / f'{prefix}{answer}_seed{seed}'
    macros = {'MODEL_DIR': str(run_dir), 'RANDOM_SEED': seed, **donors}
    product = {
      'lora': run_dir / 'lora.safetensors',
      'finetuned': run_dir / 'model' / 'model.safetensors',
    }.get(baseline, run_dir / 'composition.safetensors')
    more = [f'baselines/{file}.gin'] if file else []
    files = [f'experiments/kv_quick_{answer}{ending}.gin', *more]
    train.append(Stage(product, 'train', *gin(*files, **macros)))
    # How a run was trained is in its own files; a random m_A is in none.
    files = [f'experiments/{EVALUATION[answer]}']
    if baseline == 'random':
      files += more
    if system:
      macros['SYSTEMS'] = (system,)
    results = run_dir / 'eval' / 'results.json'
    evaluate.append(Stage(results, 'evaluate', *gin(*files, **macros)))
  return train, evaluate


def report_of(
  out: pathlib.Path, answer: str, seeds: Sequence[int], donors: dict[str, str]
) -> Stage:
  """Returns the stage that makes a page of all columns of one format."""
  columns = {
    report.COLUMNS[name]: tuple(
      str(out / f'{prefix}{answer}_seed{seed}') for seed in seeds
    )
    for name, prefix in (
      ('composed', ''),
      *((baseline, f'{baseline}_') for baseline in BASELINES),
    )
  }
  page = out / f'report_{answer}'
  flags = gin(
    'runs/report.gin',
    'models/kv_quick.gin',
    OUTPUT_DIR=str(page),
    COLUMNS=columns,
    PROMPT=report.prompt_of(out / f'{answer}_seed{seeds[0]}'),
    **donors,
  )
  settings = {
    'title': f'Key-value arithmetic, {answer}',
    'anchor_tasks': ('numeric_arithmetic_quick/test',),
  }
  flags += [f'--gin.report.{k}={v!r}' for k, v in settings.items()]
  return Stage(page / 'report.html', 'report', *flags)


def main() -> None:
  """Runs the stages that the flags ask for, then writes the results."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    '--from_scratch', action='store_true', help='train the two donors anew'
  )
  parser.add_argument(
    '--pieces',
    action='store_true',
    help='an augmenting model with a vocabulary of its own, trained first',
  )
  parser.add_argument(
    '--baselines',
    action='store_true',
    help='also LoRA, full fine-tuning, and a vanilla m_A, a random one, and one'
    ' that reads the prompt alone',
  )
  parser.add_argument(
    '--seeds', default='0', help='seeds of the composition, such as 0,1,2'
  )
  parser.add_argument('--out', default='runs/kv_quick', help='results folder')
  flags = parser.parse_args()
  try:
    seeds = [int(seed) for seed in flags.seeds.split(',')]
  except ValueError:
    parser.error(f'--seeds={flags.seeds} must be integers, such as 0,1,2')
  out = pathlib.Path(flags.out)
  augmenting, anchor_parts = None, ()
  if flags.from_scratch:
    out = out / 'from_scratch'
    augmenting, anchor_parts = 'augmenting', ANCHOR_PARTS
  if flags.pieces:
    out = out / 'pieces'
    augmenting = 'augmenting_pieces'
  refuse_changed(inputs(), out)
  donors = train_donors(out, augmenting, anchor_parts)
  started = time.time()
  columns: list[str | None] = [None]
  of_column = {None: donors}
  if flags.baselines:
    columns += BASELINES
    vanilla = train_donors(out, VANILLA, ())
    of_column[VANILLA] = {**donors, **vanilla}
  for seed in seeds:
    for column in columns:
      train, evaluate = stages_of(
        out,
        seed,
        of_column.get(column, donors),
        baseline=column,
        pieces=flags.pieces,
      )
      run(train)
      run(evaluate)
  print(
    f'\nTrained and evaluated in {(time.time() - started) / 60:.1f} minutes'
  )
  results = report.collect(out, seeds, baselines=list(columns[1:]))
  (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  table = report.markdown(results)
  (out / 'results.md').write_text(table)
  report.picture(results, out, seeds, out / 'results.png')
  print(f'\n{table}\nWritten: {out}/results.json, results.md, results.png')
  if flags.baselines:
    pages = [report_of(out, answer, seeds, donors) for answer in FORMATS]
    run(pages)
    print('Written: ' + ', '.join(str(page.product) for page in pages))


if __name__ == '__main__':
  try:
    main()
  except KeyboardInterrupt:
    print('\nInterrupted. The same command continues where this one stopped.')
    sys.exit(130)
