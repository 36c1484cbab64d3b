"""Runs the key-value experiment stage by stage; launch/run.sh calls this.

Every stage is a command that could be typed by hand, and is printed. A stage
whose product exists is not run again; training resumes at its last checkpoint.
"""

import argparse
from collections.abc import Iterable, Sequence
import functools
import hashlib
import itertools
import json
import pathlib
import sys
import time

import kv_quick_report as report

from calm_jax import jobs

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


def job(module: str, product: pathlib.Path, *flags: str) -> jobs.Job:
  """Returns a job named after its run."""
  folder = product.parent
  inside = folder.name in ('eval', 'model')
  name = (folder.parent if inside else folder).name
  return jobs.Job(module, flags, products=[product], name=name)


def inputs() -> list[pathlib.Path]:
  """Returns the files of the checkout that decide what the stages make."""
  donors = ROOT.glob('tasks/donors/kv_quick/*/model.safetensors')
  files = [
    ROOT.glob(f'gin/{pattern}')
    for pattern in (
      'models/kv_quick*',
      'compositions/kv_quick*',
      'experiments/kv_quick*',
      'baselines/*',
      'runs/*',
    )
  ]
  return sorted([*donors, *itertools.chain(*files)])


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


def donor_chains(
  out: pathlib.Path, augmenting: str | None, anchor_parts: Sequence[str]
) -> tuple[list[list[jobs.Job]], dict[str, str]]:
  """Returns what trains donors from scratch, and the macros that choose them.

  Args:
    out: results folder.
    augmenting: name of the augmenting model, or None for the shipped one.
    anchor_parts: the anchor's parts, each beginning with the weights of the one
      before; none for the shipped anchor.
  """

  def model(name):
    return str(out / 'donors' / name / 'model')

  def stage(name, **macros):
    run_dir = out / 'donors' / name
    file = f'experiments/kv_quick_donor_{name}.gin'
    flags = gin(file, MODEL_DIR=str(run_dir), **macros)
    return job('train', run_dir / 'model' / 'model.safetensors', *flags)

  chains, chosen = [], {}
  if augmenting:
    chains.append([stage(augmenting)])
    chosen['AUGMENTING_PATH'] = model(augmenting)
  if anchor_parts:
    begun = zip(anchor_parts, (None, *anchor_parts), strict=False)
    chains.append(
      [
        stage(name, **({'ANCHOR_PATH': model(before)} if before else {}))
        for name, before in begun
      ]
    )
    chosen['ANCHOR_PATH'] = model(anchor_parts[-1])
  return chains, chosen


def chain_of(
  out: pathlib.Path,
  seed: int,
  answer: str,
  donors: dict[str, str],
  *,
  baseline: str | None = None,
  pieces: bool = False,
) -> list[jobs.Job]:
  """Returns the training and the evaluation of one run.

  Args:
    out: results folder.
    seed: of what is trained.
    answer: the format, of `FORMATS`.
    donors: the macros that choose them.
    baseline: a key of `BASELINES`, instead of the composition.
    pieces: whether m_A has a vocabulary of its own.
  """
  file, system = BASELINES.get(baseline, (None, None))
  prefix = f'{baseline}_' if baseline else ''
  run_dir = out / f'{prefix}{answer}_seed{seed}'
  macros = {'MODEL_DIR': str(run_dir), 'RANDOM_SEED': seed, **donors}
  product = {
    'lora': run_dir / 'lora.safetensors',
    'finetuned': run_dir / 'model' / 'model.safetensors',
  }.get(baseline, run_dir / 'composition.safetensors')
  more = [f'baselines/{file}.gin'] if file else []
  ending = '_pieces' if pieces else ''
  files = [f'experiments/kv_quick_{answer}{ending}.gin', *more]
  train = job('train', product, *gin(*files, **macros))
  # How a run was trained is in its own files; a random m_A is in none.
  files = [f'experiments/{EVALUATION[answer]}']
  if baseline == 'random':
    files += more
  if system:
    macros['SYSTEMS'] = (system,)
  results = run_dir / 'eval' / 'results.json'
  return [train, job('evaluate', results, *gin(*files, **macros))]


def report_of(
  out: pathlib.Path, answer: str, seeds: Sequence[int], donors: dict[str, str]
) -> jobs.Job:
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
  return job('report', page / 'report.html', *flags)


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
  if len(set(seeds)) < len(seeds):
    parser.error(f'--seeds={flags.seeds} names a seed twice')
  out = pathlib.Path(flags.out)
  augmenting, anchor_parts = None, ()
  if flags.from_scratch:
    out = out / 'from_scratch'
    augmenting, anchor_parts = 'augmenting', ANCHOR_PARTS
  if flags.pieces:
    out = out / 'pieces'
    augmenting = 'augmenting_pieces'
  refuse_changed(inputs(), out)
  chains, donors = donor_chains(out, augmenting, anchor_parts)
  jobs.run(chains)
  started = time.time()
  chain = functools.partial(chain_of, out, pieces=flags.pieces)
  composed = [
    chain(seed, answer, donors) for seed in seeds for answer in FORMATS
  ]
  baselines = BASELINES if flags.baselines else {}
  chains, vanilla = donor_chains(out, VANILLA if baselines else None, ())
  jobs.run([*chains, *composed])
  jobs.run(
    [
      chain(
        seed,
        answer,
        donors | vanilla if baseline == VANILLA else donors,
        baseline=baseline,
      )
      for answer in FORMATS
      for seed in seeds
      for baseline in baselines
    ]
  )
  print(
    f'\nTrained and evaluated in {(time.time() - started) / 60:.1f} minutes'
  )
  results = report.collect(out, seeds, baselines=list(baselines))
  (out / 'results.json').write_text(json.dumps(results, indent=2) + '\n')
  table = report.markdown(results)
  (out / 'results.md').write_text(table)
  report.picture(results, out, seeds, out / 'results.png')
  print(f'\n{table}\nWritten: {out}/results.json, results.md, results.png')
  if flags.baselines:
    pages = [report_of(out, answer, seeds, donors) for answer in FORMATS]
    for page in pages:  # of fewer seeds, maybe
      page.products[0].unlink(missing_ok=True)
    jobs.run([page] for page in pages)
    print('Written: ' + ', '.join(str(page.products[0]) for page in pages))


if __name__ == '__main__':
  try:
    main()
  except jobs.JobError as error:
    sys.exit(f'error: {error}')
  except KeyboardInterrupt:
    print('\nInterrupted. The same command continues where this one stopped.')
    sys.exit(130)
