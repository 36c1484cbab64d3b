"""Decodes and scores the anchor, the augmenting and the composed model.

  python -m calm_jax.evaluate --gin_file=runs/evaluate.gin \
      --gin.MODEL_DIR="'/tmp/x'"
"""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
import sys

from calm_jax import api, evaluation, run_files, sharding
from calm_jax.model import Model
from calm_jax.models.pretrained import ModelSpec
from calm_jax.sampling import DecodingConfig


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
  tasks: Sequence[evaluation.EvalTask],
  augmenting: Mapping[str, ModelSpec] | None = None,
  systems: Sequence[str] = ('anchor', 'composed'),
  batch_size: int = 256,
  num_examples: int | None = None,
  decoding: DecodingConfig = DecodingConfig(),
  random_seed: int = 0,
  summarize_config: Callable[[pathlib.Path], None] | None = None,
) -> dict[str, dict[str, dict[str, float | str]]]:
  """Evaluates each system on each split of each task.

  Args:
    model_dir: of the training run; results go to `eval/` in it.
    anchor: the frozen anchor.
    tasks: each with its splits, and how its answers are cut.
    augmenting: the frozen augmenting models by name.
    systems: see `load_systems`.
    batch_size: prompts decoded at once.
    num_examples: of each split; all if None.
    decoding: greedy, sampling or beams.
    random_seed: of models with random weights; the training run's.
    summarize_config: writes the operative configuration into a directory.

  Returns:
    Metrics by system and 'task/split'; also written to `eval/results.json`,
    beside those of systems evaluated before.
  """
  directory = pathlib.Path(model_dir).expanduser() / 'eval'
  evaluator = evaluation.Evaluator(
    tasks=tasks,
    directory=directory,
    batch_size=batch_size,
    num_examples=num_examples,
    decoding=decoding,
  )
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
    measured = evaluator(model.decode, label=system, say=_say)
    results[system] = {**results.get(system, {}), **measured}
  file.write_text(json.dumps(results, indent=2) + '\n')
  return {system: results[system] for system in models}


def _say(text: str) -> None:
  print(text, flush=True)


if __name__ == '__main__':
  from calm_jax import gin_setup

  gin_setup.main('evaluate')
