"""Decodes and scores the anchor, the augmenting and the composed model.

  python -m calm_jax.evaluate --gin_file=runs/evaluate.gin \
      --gin.MODEL_DIR="'/tmp/x'"
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import sys

from calm_jax import api, evaluation, paths, run_files, sharding
from calm_jax.model import Model
from calm_jax.models import pretrained
from calm_jax.models.pretrained import ModelSpec

# What a training run leaves, by what it trained.
TRAINED = ('composed', 'disconnected', 'lora', 'finetuned')


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
    model_dir: of the run that trained something.
    anchor: the frozen anchor.
    augmenting: the frozen augmenting models by name.
    systems: 'anchor', names of augmenting models, and what the run trained:
      'composed', 'lora', or 'finetuned' for all of the anchor; 'disconnected'
      is composed with every connection's output at zero, a control.
    random_seed: of models with random weights; the training run's.

  Raises:
    ValueError: for an unknown system, or a composition of other models.
  """
  allowed = ['anchor', *augmenting, *TRAINED]
  unknown = [name for name in systems if name not in allowed]
  if unknown:
    raise ValueError(f'Unknown systems {unknown}; choose from {allowed}.')
  directory = paths.of(model_dir)
  composed = {'composed', 'disconnected'} & set(systems)
  if composed:
    run_files.check_models(directory, {'anchor': anchor, **augmenting})
  if 'lora' in systems:
    run_files.check_models(directory, {'anchor': anchor})
  mesh = sharding.make_mesh()
  models = {}
  if 'finetuned' in systems:
    tuned = _finetuned(directory, anchor)
    models['finetuned'] = api.from_spec(tuned, mesh=mesh)
  if set(systems) - {'finetuned'}:
    models['anchor'] = api.from_spec(anchor, mesh=mesh, seed=random_seed)
  for i, (name, spec) in enumerate(sorted(augmenting.items())):
    if composed or name in systems:
      models[name] = api.from_spec(spec, mesh=mesh, seed=random_seed + 1 + i)
  for name, model in models.items():  # standard output is for answers
    print(f'{name}: {model.report}', file=sys.stderr)
  if 'lora' in systems:
    models['lora'] = api.load_lora(directory, anchor=models['anchor'])
  if composed:
    models['composed'] = api.load_composition(
      directory,
      anchor=models['anchor'],
      augmenting={name: models[name] for name in augmenting},
    )
    models['disconnected'] = models['composed'].disconnected()
  return {name: models[name] for name in systems}


def _finetuned(directory: pathlib.Path, anchor: ModelSpec) -> ModelSpec:
  """Describes the anchor that a run has trained as a whole."""
  path = directory / 'model'
  if not path.is_dir():
    raise ValueError(
      f"{directory} holds no model: 'finetuned' is what a run with trainable ="
      " 'anchor' leaves when it has ended."
    )
  if paths.is_remote(path):
    raise ValueError(
      f"{path}: 'finetuned' is read from this machine only. Copy {directory}"
      ' here, and give the copy as MODEL_DIR.'
    )
  spec = pretrained.pretrained_model(path)
  return dataclasses.replace(spec, config=anchor.config)


def evaluate(
  *,
  model_dir: str,
  anchor: ModelSpec,
  evaluator: evaluation.Evaluator,
  augmenting: Mapping[str, ModelSpec] | None = None,
  systems: Sequence[str] = ('anchor', 'composed'),
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> dict[str, dict[str, dict[str, float | str]]]:
  """Evaluates each system on each split of each task.

  Args:
    model_dir: of the training run; results go to `eval/` in it.
    anchor: the frozen anchor.
    evaluator: the tasks, and how answers to them are decoded.
    augmenting: the frozen augmenting models by name.
    systems: see `load_systems`.
    random_seed: of models with random weights; the training run's.
    summarize_config: writes the operative configuration into a directory.

  Returns:
    Metrics by system and 'task/split'; also written to `eval/results.json`,
    beside those of systems evaluated before.
  """
  directory = paths.of(model_dir) / 'eval'
  evaluator.check()
  models = load_systems(
    model_dir=model_dir,
    anchor=anchor,
    augmenting=augmenting or {},
    systems=systems,
    random_seed=random_seed,
  )
  directory.mkdir(parents=True, exist_ok=True)
  if summarize_config is not None:
    summarize_config(directory)
  file = directory / 'results.json'
  results = json.loads(file.read_text()) if file.exists() else {}
  for system, model in models.items():
    measured = evaluator(
      model.decode, directory=directory, label=system, say=_say
    )
    results[system] = {**results.get(system, {}), **measured}
  paths.write_whole(file, json.dumps(results, indent=2) + '\n')
  return {system: results[system] for system in models}


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('evaluate')
