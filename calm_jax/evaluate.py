"""Decodes and scores the anchor, the augmenting and the composed model.

  python -m calm_jax.evaluate --gin_file=runs/evaluate.gin \
      --gin.MODEL_DIR="'/tmp/x'"
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import pathlib
import sys

from calm_jax import api, run_files, sharding
from calm_jax.model import Model
from calm_jax.models.pretrained import ModelSpec


def load_systems(
  *,
  model_dir: str,
  anchor: ModelSpec,
  augmenting: Mapping[str, ModelSpec],
  systems: Sequence[str],
  random_seed: int = 0,
) -> dict[str, Model]:
  """Loads what is to be decoded.

  Args:
    model_dir: of the run that trained the composition.
    anchor: the frozen anchor.
    augmenting: the frozen augmenting models by name.
    systems: 'anchor', 'composed', 'disconnected' (composed, with every
      connection's output at zero: a control), or names of augmenting models.
    random_seed: of models with random weights; the training run's.

  Raises:
    ValueError: for an unknown system, or a composition of other models.
  """
  allowed = ['anchor', *augmenting, 'composed', 'disconnected']
  unknown = [name for name in systems if name not in allowed]
  if unknown:
    raise ValueError(f'Unknown systems {unknown}; choose from {allowed}.')
  directory = pathlib.Path(model_dir).expanduser()
  composed = {'composed', 'disconnected'} & set(systems)
  if composed:
    run_files.check_models(directory, {'anchor': anchor, **augmenting})
  mesh = sharding.make_mesh()
  models = {'anchor': api.from_spec(anchor, mesh=mesh, seed=random_seed)}
  for i, (name, spec) in enumerate(sorted(augmenting.items())):
    models[name] = api.from_spec(spec, mesh=mesh, seed=random_seed + 1 + i)
  for name, model in models.items():  # standard output is for answers
    print(f'{name}: {model.report}', file=sys.stderr)
  if composed:
    models['composed'] = api.load_composition(
      directory,
      anchor=models['anchor'],
      augmenting={name: models[name] for name in augmenting},
    )
    models['disconnected'] = models['composed'].disconnected()
  return {name: models[name] for name in systems}


def evaluate(
  *,
  model_dir: str,
  anchor: ModelSpec,
  tasks: Mapping[str, Sequence[str]],
  augmenting: Mapping[str, ModelSpec] | None = None,
  systems: Sequence[str] = ('anchor', 'composed'),
  batch_size: int = 256,
  max_new_tokens: int = 64,
  num_examples: int | None = None,
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
  """Evaluates each system on each split of each task.

  Args:
    model_dir: of the training run; results go to `eval/` in it.
    anchor: the frozen anchor.
    tasks: splits by name of the SeqIO task.
    augmenting: the frozen augmenting models by name.
    systems: see `load_systems`.
    batch_size: rows decoded at once.
    max_new_tokens: at most so many tokens an answer.
    num_examples: of each split; all if None.
    random_seed: of models with random weights; the training run's.
    summarize_config: writes the operative configuration into a directory.

  Returns:
    Metrics by system and 'task/split'; also written to `eval/results.json`.
  """
  from calm_jax import evaluation  # imports TensorFlow

  models = load_systems(
    model_dir=model_dir,
    anchor=anchor,
    augmenting=augmenting or {},
    systems=systems,
    random_seed=random_seed,
  )
  directory = pathlib.Path(model_dir).expanduser() / 'eval'
  directory.mkdir(parents=True, exist_ok=True)
  if summarize_config is not None:
    summarize_config(directory)
  results: dict[str, dict[str, dict[str, float]]] = {}
  for system, model in models.items():
    results[system] = {}
    generate = functools.partial(
      model.generate, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    for task, splits in tasks.items():
      for split in splits:
        measured = evaluation.evaluate_task(
          generate,
          task,
          split=split,
          num_examples=num_examples,
          output_dir=directory / task / split / system,
        )
        results[system][f'{task}/{split}'] = measured
        shown = ', '.join(f'{k} {v:g}' for k, v in measured.items())
        print(f'{system:12} {task}/{split}: {shown}', flush=True)
  text = json.dumps(results, indent=2)
  (directory / 'results.json').write_text(text + '\n')
  return results


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('evaluate')
