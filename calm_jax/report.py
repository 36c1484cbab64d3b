"""Turns finished runs into one HTML page, with PNG files and tables beside it.

  python -m calm_jax.report --gin_file=runs/report.gin \
      --gin.OUTPUT_DIR="'/tmp/report'" \
      --gin.COLUMNS="{'CALM': ('/tmp/seed_0', '/tmp/seed_1')}"
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib

from calm_jax import attention_maps, evaluate
from calm_jax.models.pretrained import ModelSpec
from calm_jax.reporting import page, pictures, runs, scores, sections

PLAIN = {'m_A': 'augmenting', 'm_B': 'anchor'}


@pictures.plain_text
def report(
  *,
  output_dir: str,
  columns: Mapping[str, Sequence[str]],
  title: str = 'Composition and baselines',
  plain: Mapping[str, str] | None = None,
  metrics: Mapping[str, str] | None = None,
  anchor_tasks: Sequence[str] = (),
  log_steps: bool = False,
  ablations: Mapping[str, Sequence[str]] | None = None,
  ablation_task: str | None = None,
  prompt: str | None = None,
  anchor: ModelSpec | None = None,
  augmenting: Mapping[str, ModelSpec] | None = None,
  max_new_tokens: int = 12,
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> pathlib.Path:
  """Writes `report.html`, which needs no other file, its pictures and numbers.

  Args:
    output_dir: where to.
    columns: the MODEL_DIRs, one for each seed, by the name of the column.
    title: of the page.
    plain: systems that the runs of the first column were evaluated with, as
      `calm_jax.evaluate` names them, by the name of a column; `PLAIN` if None.
    metrics: which metric to show, by task or 'task/split'; of others the first
      number that is no count. More is taken to be better.
    anchor_tasks: what the anchor could do before, as 'task/split'.
    log_steps: whether the loss curves have a logarithmic axis of steps.
    ablations: MODEL_DIRs of compositions by a label.
    ablation_task: the 'task/split' they are compared by; the last one that is
      none of the anchor's if None.
    prompt: if given, the first composed run answers it, and what its
      connections read is drawn.
    anchor: the frozen anchor, needed for that.
    augmenting: the frozen augmenting models by name, needed for that.
    max_new_tokens: of that answer.
    random_seed: of models with random weights; the training run's.
    summarize_config: writes the operative configuration into a directory.

  Returns:
    The page.

  Raises:
    ValueError: if a directory is no run, a file of it is broken, or settings
      name what is not there. What a run merely lacks is listed on the page.
  """
  found = runs.read_columns(columns, setting='report.columns')
  variants = runs.read_columns(ablations or {}, setting='report.ablations')
  table = scores.Table.of(
    found,
    plain=PLAIN if plain is None else plain,
    trained=evaluate.TRAINED,
    variants=variants,
    metrics=metrics or {},
  )
  table.check_rows((*anchor_tasks, *filter(None, [ablation_task])))
  models = anchor, augmenting
  shown_map = _map(found, prompt, max_new_tokens, models, random_seed)
  out = pathlib.Path(output_dir).expanduser()
  out.mkdir(parents=True, exist_ok=True)
  if summarize_config is not None:
    summarize_config(out)
  ablation_task = ablation_task or table.last_row(besides=anchor_tasks)
  parts = [
    page.gaps(runs.gaps(found | variants) + table.gaps()),
    sections.scores(out, table),
    sections.forgetting(out, table, found, anchor_tasks),
    sections.loss(out, found, log_steps=log_steps),
    sections.ablations(out, variants, table, ablation_task),
    sections.attention(out, shown_map),
    sections.costs(found),
    sections.settings(found | variants),
  ]
  page.write(out / 'report.html', title=title, parts=parts)
  table.write(out)
  print(f'Wrote {out / "report.html"}')
  return out / 'report.html'


def _map(
  columns: sections.Columns,
  prompt: str | None,
  max_new_tokens: int,
  models: tuple[ModelSpec | None, Mapping[str, ModelSpec] | None],
  random_seed: int,
) -> attention_maps.AttentionMap | None:
  """Lets a composed run answer a prompt, and maps what it reads of both."""
  if prompt is None:
    return None
  run = runs.first_composed(columns)
  anchor, augmenting = models
  if anchor is None or not augmenting:
    raise ValueError(
      'report.prompt asks for an attention map, which needs the models. Set'
      ' ANCHOR and AUGMENTING as in the training, by the same composition or'
      ' model file, or leave the prompt out.'
    )
  model = evaluate.load_systems(
    model_dir=str(run.directory),
    anchor=anchor,
    augmenting=augmenting,
    systems=['composed'],
    random_seed=random_seed,
  )['composed']
  ((answer,),) = model.decode([prompt], max_new_tokens=max_new_tokens)
  return attention_maps.attention_map(model, prompt, answer.tokens)


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('report')
