"""The files of MODEL_DIR that are shared: `calm_config.json` and Theta_C."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from calm_jax import trees
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, Connection, LayerMapping
from calm_jax.models import pretrained

CONFIG_FILE = 'calm_config.json'
WEIGHTS_FILE = 'composition.safetensors'


def write_config(
  directory: pathlib.Path, model: ComposedLM, fingerprints: Mapping[str, str]
) -> None:
  """Writes what is needed to attach the composition to its models again.

  Args:
    directory: MODEL_DIR, or where a composition is saved.
    model: the composed model.
    fingerprints: of the frozen models by name, 'anchor' among them.
  """
  composition = {
    field.name: getattr(model.composition, field.name)
    for field in dataclasses.fields(CompositionConfig)
    if field.name != 'mapping'
  }
  content = {
    'composition': composition,
    'connections': [dataclasses.asdict(c) for c in model.connections],
    'fingerprints': dict(fingerprints),
  }
  directory.mkdir(parents=True, exist_ok=True)
  (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + '\n')


def read_config(
  directory: pathlib.Path,
) -> tuple[CompositionConfig, dict[str, str]]:
  """Returns the composition with explicit connections, and the fingerprints."""
  file = directory / CONFIG_FILE
  if not file.is_file():
    raise ValueError(
      f'{directory} holds no {CONFIG_FILE}. Give the MODEL_DIR of a training'
      ' run, or a folder that Model.save has written.'
    )
  content = json.loads(file.read_text())
  mapping = LayerMapping.explicit(
    [Connection(**fields) for fields in content['connections']]
  )
  config = CompositionConfig(mapping=mapping, **content['composition'])
  return config, content['fingerprints']


def check_fingerprints(
  expected: Mapping[str, str], actual: Mapping[str, str], *, where: pathlib.Path
) -> None:
  """Raises ValueError unless the frozen models are those trained with."""
  if expected.keys() != actual.keys():
    raise ValueError(
      f'{where / CONFIG_FILE} was written with the models'
      f' {sorted(expected)}; these are {sorted(actual)}.'
    )
  for name in sorted(expected):
    if expected[name] != actual[name]:
      raise ValueError(
        f'The weights or the vocabulary of {name!r} are not those that the'
        f' composition in {where} was trained with: fingerprint'
        f' {actual[name][:16]}..., expected {expected[name][:16]}.... Load the'
        ' original model, or train the composition anew in another MODEL_DIR.'
      )


def check_models(
  directory: pathlib.Path, specs: Mapping[str, pretrained.ModelSpec]
) -> None:
  """Raises ValueError unless these are the models of the run there.

  Reads weights on the host alone, so that wrong ones are refused before
  anything is allocated. Models with random weights are not checked here: what
  they hold is known only once they are drawn.

  Args:
    directory: MODEL_DIR of a run that has begun.
    specs: of the frozen models by name, 'anchor' among them.
  """
  expected = read_config(directory)[1]
  actual = {
    name: pretrained.read_weights(spec.path)[1]
    if spec.weights == 'pretrained'
    else expected.get(name, 'random')
    for name, spec in specs.items()
  }
  check_fingerprints(expected, actual, where=directory)


def check_run(
  directory: pathlib.Path,
  model: ComposedLM,
  specs: Mapping[str, pretrained.ModelSpec],
) -> None:
  """Raises ValueError if the directory holds a run of something else."""
  if not (directory / CONFIG_FILE).exists():
    return
  check_models(directory, specs)
  begun, _ = read_config(directory)
  if begun.mapping.connections != model.connections:
    raise ValueError(
      f'{directory} holds a run with the connections'
      f' {[c.key for c in begun.mapping.connections]}; this one has'
      f' {[c.key for c in model.connections]}. Choose another MODEL_DIR.'
    )
  wanted = dataclasses.replace(model.composition, mapping=begun.mapping)
  for name, value in vars(begun).items():
    if getattr(wanted, name) != value:
      raise ValueError(
        f'{directory} holds a run with CompositionConfig.{name} = {value!r};'
        f' this one has {getattr(wanted, name)!r}. Choose another MODEL_DIR.'
      )


def write_composition(directory: pathlib.Path, composition: Params) -> None:
  """Writes Theta_C, and nothing else, as safetensors."""
  tensors = {
    name: np.ascontiguousarray(leaf)
    for name, leaf in trees.flatten(jax.device_get(composition)).items()
  }
  file = directory / WEIGHTS_FILE
  temporary = file.with_suffix('.tmp')
  safetensors.numpy.save_file(tensors, temporary)
  temporary.replace(file)


def read_composition(directory: pathlib.Path) -> dict[str, Any]:
  """Reads Theta_C as nested numpy arrays."""
  file = directory / WEIGHTS_FILE
  if not file.is_file():
    raise ValueError(
      f'{directory} holds no {WEIGHTS_FILE}: the run has not ended. Let it end,'
      ' by the same command, first.'
    )
  return trees.unflatten(pretrained.read_safetensors(file))
