"""The files of MODEL_DIR that are shared: `calm_config.json` and what it is of.

That is Theta_C, or the updates of a LoRA run.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from calm_jax import metrics, paths, trees
from calm_jax.array_types import Params
from calm_jax.composition import ComposedLM
from calm_jax.connections import CompositionConfig, Connection, LayerMapping
from calm_jax.lora import LoraConfig
from calm_jax.models import directories, pretrained, weight_files, weights

CONFIG_FILE = 'calm_config.json'
WEIGHTS_FILE = 'composition.safetensors'
LORA_FILE = 'lora.safetensors'
CARD_FILE = 'README.md'
_FINGERPRINT = 'fingerprint'  # in the header of the weights
_CARD = """\
---
library_name: calm_jax
---
# A composition of frozen language models

Cross-attention by which an anchor reads other models
([CALM](https://arxiv.org/abs/2401.02412)). The models themselves are not here;
a composition works with exactly those it was trained with:

| model | size | fingerprint of weights and vocabulary |
|---|---|---|
{models}

Connections:

```
{connections}
```

Trained: {count:,} parameters, {nbytes:,} bytes.

To load it, with the directories of the models above:

```python
import calm_jax

anchor = calm_jax.load_pretrained('...')
augmenting = {{{names}}}  # each by calm_jax.load_pretrained
model = calm_jax.load_composition('.', anchor=anchor, augmenting=augmenting)
print(model.generate(['...']))
```

Files: `{config}` has the connections and fingerprints, `{weights}` the trained
parameters. Other base weights are refused.
"""


def write_config(
  directory: pathlib.Path, model: ComposedLM, fingerprints: Mapping[str, str]
) -> None:
  """Writes what is needed to attach what is trained to its models again.

  Args:
    directory: MODEL_DIR, or where a composition is saved.
    model: composed, or an anchor with updates.
    fingerprints: of the frozen models by name, 'anchor' among them.
  """
  content: dict[str, Any]
  if model.lora is not None:
    content = {'lora': dataclasses.asdict(model.lora)}
  else:
    composition = {**vars(model.composition)}
    del composition['mapping']
    content = {
      'composition': composition,
      'connections': [dataclasses.asdict(c) for c in model.connections],
    }
  content['fingerprints'] = dict(fingerprints)
  directory.mkdir(parents=True, exist_ok=True)
  # At once: other processes of the run look whether it is there.
  text = json.dumps(content, indent=2) + '\n'
  paths.write_whole(directory / CONFIG_FILE, text)


def read_config(
  directory: pathlib.Path,
) -> tuple[CompositionConfig, dict[str, str]]:
  """Returns the composition with explicit connections, and the fingerprints."""
  content = _read(directory, 'composition')
  try:
    mapping = LayerMapping.explicit(
      [Connection(**fields) for fields in content['connections']]
    )
    config = CompositionConfig(mapping=mapping, **content['composition'])
    return config, dict(content['fingerprints'])
  except (KeyError, TypeError) as error:
    raise _unreadable(directory, error) from error


def read_lora(directory: pathlib.Path) -> tuple[LoraConfig, dict[str, str]]:
  """Returns the form of the updates, and the anchor's fingerprint by name."""
  content = _read(directory, 'lora')
  try:
    return LoraConfig(**content['lora']), dict(content['fingerprints'])
  except (KeyError, TypeError) as error:
    raise _unreadable(directory, error) from error


def read_fingerprints(directory: pathlib.Path) -> dict[str, str]:
  """Returns the fingerprints of the frozen models by name, of any run."""
  try:
    return dict(_read(directory)['fingerprints'])
  except (KeyError, TypeError) as error:
    raise _unreadable(directory, error) from error


def _read(directory: pathlib.Path, kind: str | None = None) -> dict[str, Any]:
  file = directory / CONFIG_FILE
  if not file.is_file():
    raise ValueError(
      f'{directory} holds no {CONFIG_FILE}. Give the MODEL_DIR of a training'
      ' run, or a folder that Model.save has written.'
    )
  content = directories.read_json(file)
  for other in ('composition', 'lora'):
    if kind not in (None, other) and other in content:
      raise ValueError(
        f'{file} is of a run that trained {other}, not {kind}. Give another'
        f' directory, or load {other}.'
      )
  return content


def _unreadable(directory: pathlib.Path, error: Exception) -> ValueError:
  return ValueError(
    f'{directory / CONFIG_FILE} is not what this version writes: {error}. Take'
    ' it from where the run was saved, or use the version that wrote it.'
  )


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
  expected = read_fingerprints(directory)
  actual = {
    name: pretrained.fingerprint(spec)
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
  if model.lora is not None:
    _check_settings(directory, read_lora(directory)[0], model.lora)
    check_models(directory, specs)
    return
  begun, _ = read_config(directory)
  check_models(directory, specs)
  if begun.mapping.connections != model.connections:
    raise ValueError(
      f'{directory} holds a run with the connections'
      f' {[c.key for c in begun.mapping.connections]}; this one has'
      f' {[c.key for c in model.connections]}. Choose another MODEL_DIR.'
    )
  wanted = dataclasses.replace(model.composition, mapping=begun.mapping)
  _check_settings(directory, begun, wanted)


def _check_settings(directory: pathlib.Path, begun: Any, wanted: Any) -> None:
  for name, value in vars(begun).items():
    if getattr(wanted, name) != value:
      raise ValueError(
        f'{directory} holds a run with {type(begun).__name__}.{name} ='
        f' {value!r}; this one has {getattr(wanted, name)!r}. Choose another'
        ' MODEL_DIR.'
      )


def write_trained(
  directory: pathlib.Path, params: Params, *, name: str = WEIGHTS_FILE
) -> None:
  """Writes Theta_C, or LoRA's updates, and nothing else, as safetensors.

  With a fingerprint, so that `read_trained` notices a flipped bit.
  """
  tensors = {
    name: weights.of_array(leaf) for name, leaf in trees.flatten(params).items()
  }
  weight_files.write_file(
    directory / name, tensors, metadata={_FINGERPRINT: _fingerprint(tensors)}
  )


def _fingerprint(
  tensors: Mapping[str, weight_files.Tensor], what: str = 'what was trained'
) -> str:
  """Raises ValueError if there is NaN or infinity in it."""
  return trees.fingerprint(weight_files.digests(tensors, what=what))


def write_card(
  directory: pathlib.Path, model: ComposedLM, fingerprints: Mapping[str, str]
) -> None:
  """Writes README.md, the model card; one that is there is left alone.

  Args:
    directory: with what `write_config` and `write_trained` have written.
    model: the composed model.
    fingerprints: of the frozen models by name.
  """
  file = directory / CARD_FILE
  if file.exists():
    return
  tensors = weight_files.open_file(directory / WEIGHTS_FILE)
  towers = {'anchor': model.anchor, **model.augmenting}
  rows = [
    f'| {name} | {tower.depth} blocks of width {tower.width}'
    f' | `{fingerprints[name]}` |'
    for name, tower in towers.items()
  ]
  names = ', '.join(f"'{name}': ..." for name in model.augmenting)
  file.write_text(
    _CARD.format(
      models='\n'.join(rows),
      connections=metrics.connection_table(model),
      count=trees.num_params(tensors),
      nbytes=trees.num_bytes(tensors),
      names=names,
      config=CONFIG_FILE,
      weights=WEIGHTS_FILE,
    ),
    encoding='utf-8',
  )


def read_trained(
  directory: pathlib.Path, *, name: str = WEIGHTS_FILE
) -> dict[str, Any]:
  """Reads Theta_C, or LoRA's updates, as nested numpy arrays."""
  file = directory / name
  if not file.is_file():
    raise ValueError(
      f'{directory} holds no {name}: the run has not ended. Let it end,'
      ' by the same command, first.'
    )
  tensors = weight_files.open_file(file)
  found = _fingerprint(tensors, str(file))
  # Other programs write none.
  expected = weight_files.read_metadata(file).get(_FINGERPRINT, found)
  if found != expected:
    raise ValueError(
      f'{file} is damaged: its tensors have the fingerprint {found[:16]}...,'
      f' and {expected[:16]}... was written. Copy it again, or remove it and'
      ' start the run again, which continues at its last checkpoint.'
    )
  return trees.unflatten({k: one.read() for k, one in tensors.items()})
