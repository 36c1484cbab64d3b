"""Model directories in the format of Hugging Face, written."""

from collections.abc import Mapping
import dataclasses
import pathlib
import shutil

import numpy as np

from calm_jax import trees, vocabularies
from calm_jax.array_types import Params
from calm_jax.models import (
  directories,
  families,
  pretrained,
  weight_files,
  weights,
)
from calm_jax.models.config import TransformerConfig
from calm_jax.models.weights import Tensor

SHARD_BYTES = 5_000_000_000
_COPIED = ('.json', '.model', '.jinja', '.txt')  # what is not weights


def write_as_it_came(
  directory: pathlib.Path,
  *,
  spec: pretrained.ModelSpec,
  params: Params,
  storage_dtype: str | None = None,
) -> None:
  """Writes the weights of a trained model in the format of its directory.

  Args:
    directory: made if need be; what was written before is replaced.
    spec: of the model; one without a directory comes out in our own format.
    params: nested parameters, each block apart (the 'loop' layout).
    storage_dtype: what to round to; the spec's param_dtype if None.
  """
  if spec.model_type == pretrained.MODEL_TYPE:
    pretrained.write_model(
      directory,
      config=spec.config,
      params=params,
      vocabulary=spec.vocabulary,
      storage_dtype=storage_dtype,
    )
    return
  tensors = {
    name: weights.of_array(leaf) for name, leaf in trees.flatten(params).items()
  }
  write_hugging_face(
    directory,
    config=spec.config,
    tensors=tensors,
    vocabulary=spec.vocabulary,
    source=spec.path,
    dtype=storage_dtype,
    overwrite=True,
  )


def write_hugging_face(
  directory: pathlib.Path,
  *,
  config: TransformerConfig,
  tensors: Mapping[str, Tensor],
  vocabulary: vocabularies.Vocabulary,
  model_type: str | None = None,
  source: pathlib.Path | None = None,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  overwrite: bool = False,
) -> None:
  """Writes a model that `transformers` loads; one tensor in memory at a time.

  With a `source` it comes out as that was: the same config.json but for the
  dtype, the same tokenizer files, and the same names, with what we leave out
  on reading (eyes, buffers) as it was there. Without change of the weights
  every tensor has the bytes it had.

  Args:
    directory: new or empty.
    config: of the model.
    tensors: by our names, each block apart (the 'loop' layout).
    vocabulary: written beside the weights, if there is no source.
    model_type: the family, if there is no source; one of
      `families.MODEL_TYPES`.
    source: a Hugging Face directory of the same model with other weights.
    dtype: what to round to; as the tensors are if None.
    shard_bytes: a larger file is split, and an index written.
    overwrite: the directory holds an older state of the same model.

  Raises:
    ValueError: if the directory holds something, the source is another model,
      or the family has no fields for something in the config; before anything
      is written.
  """
  if not overwrite:
    check_empty(directory)
  if dtype is not None:
    tensors = {name: one.astype(dtype) for name, one in tensors.items()}
  stored = {} if source is None else weight_files.open_directory(source)
  if source is None:
    fields = _fresh_fields(config, model_type, vocabulary)
    model_type = fields['model_type']
  else:
    model_type, fields = _source_fields(source, config)
  named = _named(config, tensors, stored=stored, model_type=model_type)
  _set_dtype(fields, tensors)
  directory.mkdir(parents=True, exist_ok=True)
  if source is None:
    vocabulary.save(directory)
  else:
    for file in sorted(source.iterdir()):
      if file.suffix in _COPIED and file.name != weight_files.INDEX_FILE:
        directories.check_contained(file)
        shutil.copyfile(file, directory / file.name)
  directories.write_json(directory / directories.CONFIG_FILE, fields)
  weight_files.write_directory(directory, named, shard_bytes=shard_bytes)


def check_empty(directory: pathlib.Path) -> None:
  """Raises ValueError if something is in the way."""
  if directory.exists() and (
    not directory.is_dir() or any(directory.iterdir())
  ):
    raise ValueError(
      f'{directory} is there already, and not empty. Name a new directory.'
    )


def _fresh_fields(
  config: TransformerConfig,
  model_type: str | None,
  vocabulary: vocabularies.Vocabulary,
) -> dict:
  if model_type not in families.MODEL_TYPES:
    raise ValueError(
      f'model_type = {model_type!r} is not one of {families.MODEL_TYPES}. Give'
      ' one of them, or the directory that the model comes from as source.'
    )
  fields = families.config_to(config, model_type=model_type)
  for role in ('bos', 'eos', 'pad'):
    fields[f'{role}_token_id'] = getattr(vocabulary, f'{role}_id')
  return fields


def _source_fields(
  source: pathlib.Path, config: TransformerConfig
) -> tuple[str, dict]:
  """Returns the source's own fields, if they are of this model."""
  file = source / directories.CONFIG_FILE
  model_type, theirs = pretrained.read_config(file)
  if model_type == pretrained.MODEL_TYPE:
    raise ValueError(
      f'{source} is a {model_type} directory; as source it must be one of'
      ' Hugging Face. Leave it out, and give a model_type.'
    )
  for field in dataclasses.fields(config):
    if field.name not in ('dtype', 'param_dtype', 'init_stddev'):
      ours, other = (getattr(one, field.name) for one in (config, theirs))
      if ours != other:
        raise ValueError(
          f'{source} is another model: its {field.name} is {other!r}, that of'
          f' the one to be written {ours!r}.'
        )
  return model_type, directories.read_json(file)


def _named(
  config: TransformerConfig,
  tensors: Mapping[str, Tensor],
  *,
  stored: Mapping[str, Tensor],
  model_type: str,
) -> dict[str, Tensor]:
  """Returns what is written, by the names of the family or the source."""
  sources = families.sources(
    config, model_type=model_type, available=stored.keys()
  )
  named = dict(stored)
  for ours, where in sources.items():
    tensor = tensors[ours]
    named[where.name] = tensor.transposed() if where.transposed else tensor
  if config.tie_embeddings and config.attention == 'causal':
    for name in stored:  # a copy of the table, where the source had one
      if name.endswith('lm_head.weight'):
        named[name] = tensors['embedder/table']
  return named


def _set_dtype(fields: dict, tensors: Mapping[str, Tensor]) -> None:
  """Names the dtype of the weights, where config.json has it."""
  sizes: dict[str, int] = {}
  for tensor in tensors.values():
    name = np.dtype(tensor.dtype).name
    sizes[name] = sizes.get(name, 0) + tensor.nbytes
  dtype = max(sizes, key=sizes.get)
  names = [n for n in ('dtype', 'torch_dtype') if fields.get(n) is not None]
  for name in names or ['torch_dtype']:
    fields[name] = dtype
